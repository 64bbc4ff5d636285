//! The lines of standard input, for a program on the event loop (since v04).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use anyhow::bail;
use bytes::Bytes;

use crate::buf_pool::BufPool;
use crate::event_loop::{Callbacks, EventLoop, Interest, IoCallback, Token};
use crate::message::MAX_PAYLOAD;
use crate::reactor_buf::InputBuf;

/// Standard input, line by line, without ever waiting for it (since v04).
pub struct Lines<S> {
    /// Not std's standard input: epoll does not know what that has in its buffer.
    stdin: File,
    input: InputBuf,
    callback: IoCallback<S>,
    watched: Option<Token>,
    /// A regular file cannot be watched (EPERM): it is always ready.
    is_file: bool,
    /// How many lines have been taken.
    count: u64,
    ended: bool,
    error: Option<anyhow::Error>,
}

impl<S> Lines<S> {
    /// No line has been read yet. The `callback` will have to call [`read`](Self::read).
    ///
    /// # Errors
    /// Any fcntl(2) or epoll_ctl(2) error, typically EMFILE.
    pub fn new(
        event_loop: &mut EventLoop<S>,
        pool: &BufPool,
        callback: IoCallback<S>,
    ) -> io::Result<Self> {
        let mut lines = Self {
            stdin: io::stdin().as_fd().try_clone_to_owned()?.into(),
            input: InputBuf::new(pool),
            callback,
            watched: None,
            is_file: false,
            count: 0,
            ended: false,
            error: None,
        };
        // Finds out if it can be watched.
        lines.watch(event_loop, true)?;
        lines.watch(event_loop, false)?;
        Ok(lines)
    }

    /// Registers standard input while lines are `wanted`, to have the callback called when it is
    /// readable, and deregisters it when they are not: a hang-up cannot be masked.
    ///
    /// # Errors
    /// Any epoll_ctl(2) error, except that a regular file cannot be registered.
    pub fn watch(&mut self, event_loop: &mut EventLoop<S>, wanted: bool) -> io::Result<()> {
        let wanted = wanted && !self.ended && !self.is_file;
        match self.watched {
            None if wanted => {
                let callbacks = Callbacks { read: Some(self.callback), write: None };
                match event_loop.add_io_event(&self.stdin, Interest::READ, callbacks) {
                    Err(err) if err.kind() == ErrorKind::PermissionDenied => self.is_file = true,
                    result => self.watched = Some(result?),
                }
            }
            Some(token) if !wanted => {
                event_loop.del_io_event(&self.stdin, token)?;
                self.watched = None;
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads standard input once.
    pub fn read(&mut self) {
        match self.input.read_from(&self.stdin) {
            Ok(n) => self.ended = n == Some(0),
            Err(err) => self.fail(anyhow::Error::new(err).context("cannot read standard input")),
        }
    }

    /// The next complete line, without its line feed, or `None` if none has been read.
    pub fn next_line(&mut self) -> Option<Bytes> {
        loop {
            match self.take_line() {
                Ok(None) if self.is_file && !self.ended => self.read(),
                Ok(line) => return line,
                Err(err) => self.fail(err),
            }
        }
    }

    fn take_line(&mut self) -> anyhow::Result<Option<Bytes>> {
        let Some(mut block) = self.input.take() else { return Ok(None) };
        let feed = block.data().iter().position(|&byte| byte == b'\n');
        let len = feed.unwrap_or(block.len());
        let too_long = len > MAX_PAYLOAD;
        if feed.is_none() && self.error.is_some() {
            // Reading has failed: the rest of this line is not known.
            return Ok(None);
        }
        if feed.is_none() && !self.ended && !too_long {
            self.input.put_back(block);
            return Ok(None);
        }
        self.count += 1;
        if too_long {
            bail!("line {} of standard input is over the limit of {MAX_PAYLOAD} bytes", self.count);
        }
        // Copied: a slice of the block would keep all of it in use.
        let line = Bytes::copy_from_slice(&block.data()[..len]);
        block.pop(len + usize::from(feed.is_some()));
        self.input.put_back(block);
        Ok(Some(line))
    }

    fn fail(&mut self, err: anyhow::Error) {
        self.error = Some(err);
        self.ended = true;
    }

    /// Whether all lines have been taken.
    pub fn is_done(&self) -> bool {
        self.ended && self.input.is_empty()
    }

    /// Why standard input ended early: a line over the limit of a payload, or a read(2) error.
    pub fn take_error(&mut self) -> Option<anyhow::Error> {
        self.error.take()
    }
}
