//! Reads standard input line by line on the event loop, without blocking it (since v04).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;

use anyhow::bail;
use bytes::Bytes;

use crate::buf_pool::BufPool;
use crate::event_loop::{Callbacks, EventLoop, Interest, IoCallback, Token};
use crate::message::MAX_PAYLOAD;
use crate::reactor_buf::InputBuf;

/// Standard input, line by line, without ever waiting for input (since v04).
pub struct Lines<S> {
    /// Not std's own handle: epoll cannot see what that has in its buffer.
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
    /// Reads nothing yet: that is for the `callback`, which has to call [`read`](Self::read).
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
        // Detects whether it can be watched.
        lines.watch(event_loop, true)?;
        lines.watch(event_loop, false)?;
        Ok(lines)
    }

    /// Registers standard input if lines are `wanted`: the callback runs when it is readable.
    /// Deregisters it otherwise, because a hang-up cannot be masked.
    ///
    /// # Errors
    /// Any epoll_ctl(2) error but EPERM, which regular files cause.
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
            // Reading has failed: the rest of this line is missing.
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
        // Copied: a slice would keep the whole block in use.
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

    /// Why standard input ended early: a line longer than a payload may be, or a read(2) error.
    pub fn take_error(&mut self) -> Option<anyhow::Error> {
        self.error.take()
    }
}
