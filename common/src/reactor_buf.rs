//! `InputBuf` and `OutputBuf`: the bytes read from a socket, and those still to write (since v02).
//!
//! Both hold a block only while they hold bytes: ten thousand idle connections hold none.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use bytes::Buf;
use tracing::trace;

use crate::buf_pool::{BufPool, PoolError, SIZE_CLASSES};
use crate::io_buf::IoBuf;

/// The smallest block for a read, in bytes.
const MIN_READ: usize = SIZE_CLASSES[0];

/// The largest block for a read, in bytes: large enough to make the system call itself cheap, small
/// enough to bound the work per event, during which all other connections wait.
const MAX_READ: usize = SIZE_CLASSES[2];

/// The bytes that have been read from a socket (since v02).
pub struct InputBuf {
    block: Option<IoBuf>,
    pool: BufPool,
    /// The size class for the next read. It follows the sizes of the previous reads, as in Netty's
    /// AdaptiveRecvByteBufAllocator.
    next_read: usize,
}

impl InputBuf {
    /// An empty buffer that takes its blocks from `pool`.
    pub fn new(pool: &BufPool) -> Self {
        Self { block: None, pool: pool.clone(), next_read: MIN_READ }
    }

    /// Reads once, as much as there is room for, typically 4 KiB to 64 KiB. Returns the number of
    /// bytes: 0 means the end of the stream, `None` that nothing has arrived yet (EAGAIN).
    ///
    /// If there is little room, the data moves to the front of its block, or to a larger one.
    ///
    /// # Errors
    /// Any recv(2) error, typically ECONNRESET, and [`PoolError`] as [`ErrorKind::OutOfMemory`].
    /// The data is kept.
    pub fn read_from<R: Read + AsFd>(&mut self, mut socket: R) -> io::Result<Option<usize>> {
        let room = match &self.block {
            None => self.next_read,
            // Half of what is not data: else data near the end of a block causes many small reads.
            Some(block) => ((block.capacity().max(self.next_read) - block.len()) / 2).max(1),
        };
        let block = match with_room(&mut self.block, room, &self.pool) {
            Ok(block) => block,
            // There may still be room for a smaller read.
            Err(_) => with_room(&mut self.block, 1, &self.pool)?,
        };
        let room = block.room();
        let result = retry_interrupted(|| socket.read(block.room_mut()));
        if let Ok(Some(n)) = result {
            block.filled(n);
            trace!("read: {n} bytes from fd {} into {block:?}", socket.as_fd().as_raw_fd());
            self.adapt(n, room);
        }
        drop_if_empty(&mut self.block);
        result
    }

    fn adapt(&mut self, n: usize, room: usize) {
        if n == room {
            self.next_read = (self.next_read * 4).min(MAX_READ);
        } else if n <= self.next_read / 4 {
            self.next_read = (self.next_read / 4).max(MIN_READ);
        }
    }

    /// How many bytes have been read and not taken yet.
    pub fn len(&self) -> usize {
        self.block.as_ref().map_or(0, IoBuf::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.block.is_none()
    }

    /// Takes out the block with all its bytes, or `None` if there are none.
    pub fn take(&mut self) -> Option<IoBuf> {
        self.block.take()
    }

    /// Puts back the block from [`take`](Self::take), with the bytes that are left in it
    /// (since v04). Call it before the next read, which appends to them.
    pub fn put_back(&mut self, block: IoBuf) {
        debug_assert!(self.is_empty(), "bytes read in between would be lost");
        self.block = Some(block);
        drop_if_empty(&mut self.block);
    }
}

/// The bytes still to be written to a socket (since v02).
pub struct OutputBuf {
    block: Option<IoBuf>,
    pool: BufPool,
}

impl OutputBuf {
    /// An empty buffer that takes its blocks from `pool`.
    pub fn new(pool: &BufPool) -> Self {
        Self { block: None, pool: pool.clone() }
    }

    /// Appends all of `data` to the unwritten bytes.
    ///
    /// # Errors
    /// [`PoolError`] if there is no block for all of it. Nothing is appended then.
    pub fn send_data<B: Buf>(&mut self, mut data: B) -> Result<(), PoolError> {
        let n = data.remaining();
        if n == 0 {
            return Ok(());
        }
        let block = match &mut self.block {
            Some(block) if block.room() >= n => block,
            _ => with_room(&mut self.block, n, &self.pool)?,
        };
        // Like copy_to_slice, but with a quarter fewer instructions for a header and its payload.
        let mut room = &mut block.room_mut()[..n];
        while !room.is_empty() {
            let chunk = data.chunk();
            let (part, rest) = room.split_at_mut(chunk.len());
            part.copy_from_slice(chunk);
            data.advance(chunk.len());
            room = rest;
        }
        block.filled(n);
        Ok(())
    }

    /// Appends a whole block to the unwritten bytes. If there are none, the block changes hands and
    /// nothing is copied.
    ///
    /// # Errors
    /// [`PoolError`] if there is no block for all of it. Nothing is appended then.
    pub fn send_block(&mut self, block: IoBuf) -> Result<(), PoolError> {
        if self.block.is_some() {
            return self.send_data(block);
        }
        self.block = Some(block);
        drop_if_empty(&mut self.block);
        Ok(())
    }

    /// Writes until nothing is left or the socket takes no more for now (EAGAIN). Returns how many
    /// bytes it has written.
    ///
    /// # Errors
    /// Any send(2) error, typically EPIPE or ECONNRESET.
    pub fn write_to<W: Write + AsFd>(&mut self, mut socket: W) -> io::Result<usize> {
        let mut written = 0;
        while let Some(block) = &mut self.block {
            let result = retry_interrupted(|| socket.write(block.data()))?;
            let Some(n @ 1..) = result else { break };
            trace!("write: {n} of {} bytes to fd {}", block.len(), socket.as_fd().as_raw_fd());
            block.pop(n);
            written += n;
            drop_if_empty(&mut self.block);
        }
        Ok(written)
    }

    /// How many bytes have not been written yet.
    pub fn len(&self) -> usize {
        self.block.as_ref().map_or(0, IoBuf::len)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.block.is_none()
    }
}

/// Returns the block in `slot` with room for `n` more bytes: as it is, with its data moved to the
/// front, or replaced by a larger one. Then both must fit under the cap. An error leaves the slot
/// unchanged.
fn with_room<'a>(
    slot: &'a mut Option<IoBuf>,
    n: usize,
    pool: &BufPool,
) -> Result<&'a mut IoBuf, PoolError> {
    let block = match slot.take() {
        Some(mut block) if block.capacity() - block.len() >= n => {
            if block.room() < n {
                block.adjust();
            }
            block
        }
        old => {
            let data = old.as_ref().map_or(&[][..], IoBuf::data);
            match pool.alloc(data.len() + n) {
                Ok(mut larger) => {
                    larger.append(data);
                    larger
                }
                Err(err) => {
                    *slot = old;
                    return Err(err);
                }
            }
        }
    };
    Ok(slot.insert(block))
}

/// Returns the block in `slot` to its pool if it is empty.
fn drop_if_empty(slot: &mut Option<IoBuf>) {
    slot.take_if(|block| block.is_empty());
}

/// Repeats a system call that a signal interrupted (EINTR), and turns EAGAIN into `None`.
pub(crate) fn retry_interrupted(
    mut call: impl FnMut() -> io::Result<usize>,
) -> io::Result<Option<usize>> {
    loop {
        match call() {
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(None),
            result => return result.map(Some),
        }
    }
}
