//! Where the messages come from that are not in the arguments: the lines of standard input.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use anyhow::{Context, bail};
use bytes::Bytes;
use common::buf_pool::BufPool;
use common::message::MAX_PAYLOAD;
use common::reactor_buf::InputBuf;

/// The lines of standard input, each a message.
pub struct Lines {
    /// Without the buffer that std puts before it, which epoll would not know of.
    stdin: File,
    input: InputBuf,
    /// How many lines have been taken.
    count: u64,
}

impl Lines {
    /// # Errors
    /// What fcntl(2) says: there is no fd left.
    pub fn new(pool: &BufPool) -> io::Result<Self> {
        let stdin = io::stdin().as_fd().try_clone_to_owned()?.into();
        Ok(Self { stdin, input: InputBuf::new(pool), count: 0 })
    }

    /// Reads standard input once, adds the lines that are whole to `lines`, without their line
    /// feeds, and returns whether there may be more. It blocks unless standard input is readable.
    ///
    /// # Errors
    /// A line is longer than a message may be, or read(2) fails. The lines before that have been
    /// added; no more can be had.
    pub fn read(&mut self, lines: &mut VecDeque<Bytes>) -> anyhow::Result<bool> {
        let n = self.input.read_from(&self.stdin).context("cannot read standard input")?;
        let Some(mut block) = self.input.take() else { return Ok(n != Some(0)) };
        while let Some(end) = block.data().iter().position(|&byte| byte == b'\n') {
            self.add(&block.data()[..end], lines)?;
            block.pop(end + 1);
        }
        if block.len() > MAX_PAYLOAD || (n == Some(0) && !block.is_empty()) {
            self.add(block.data(), lines)?;
            block.clear();
        }
        self.input.put_back(block);
        Ok(n != Some(0))
    }

    fn add(&mut self, line: &[u8], lines: &mut VecDeque<Bytes>) -> anyhow::Result<()> {
        self.count += 1;
        if line.len() > MAX_PAYLOAD {
            bail!("line {} of standard input is over the limit of {MAX_PAYLOAD} bytes", self.count);
        }
        // A copy: a slice of the block would keep all of it in use until the reply has come.
        lines.push_back(Bytes::copy_from_slice(line));
        Ok(())
    }
}
