//! `IoBuf`: one block of the pool, with the position and the length of its data (since v02).

use std::fmt;

use bytes::Buf;
use memmap2::MmapMut;

use crate::buf_pool::BufPool;

/// A block on loan from a [`BufPool`]; dropping it returns the block (since v02).
///
/// ```text
/// 0            head          head + len       capacity
/// +-------------+----------------+----------------+
/// |   popped    |      data      |      room      |
/// +-------------+----------------+----------------+
///                head + len <= capacity, always
/// ```
///
/// Only `data` is visible from outside, never the bytes that an earlier user left in the block.
pub struct IoBuf {
    /// `None` only when it is dropped.
    block: Option<MmapMut>,
    // No block is longer than 8 MiB. As usize they would cost each connection 16 bytes more.
    head: u32,
    len: u32,
    pool: BufPool,
}

impl IoBuf {
    pub(crate) fn new(block: MmapMut, pool: BufPool) -> Self {
        Self { block: Some(block), head: 0, len: 0, pool }
    }

    fn bytes(&self) -> &[u8] {
        self.block.as_deref().unwrap_or_default()
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        self.block.as_deref_mut().unwrap_or_default()
    }

    /// The size of the block, in bytes.
    pub fn capacity(&self) -> usize {
        self.bytes().len()
    }

    /// How many bytes at the start of the block have been popped.
    pub fn head(&self) -> usize {
        self.head as usize
    }

    /// How many bytes of data there are.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there is no data.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The data.
    pub fn data(&self) -> &[u8] {
        &self.bytes()[self.head()..self.head() + self.len()]
    }

    /// How many bytes fit behind the data without [`adjust`](Self::adjust).
    pub fn room(&self) -> usize {
        self.capacity() - self.head() - self.len()
    }

    /// Appends as many of `bytes` as there is room for, and returns how many.
    pub fn append(&mut self, bytes: &[u8]) -> usize {
        let n = bytes.len().min(self.room());
        self.room_mut()[..n].copy_from_slice(&bytes[..n]);
        self.len += n as u32;
        n
    }

    /// Removes `n` bytes from the front of the data. When none is left, the whole block is room.
    ///
    /// # Panics
    /// If `n` is more than [`len`](Self::len).
    pub fn pop(&mut self, n: usize) {
        assert!(n <= self.len(), "cannot pop {n} bytes of {}", self.len);
        self.len -= n as u32;
        self.head = if self.len == 0 { 0 } else { self.head + n as u32 };
    }

    /// Moves the data to the start of the block, so that all the room is behind it.
    pub fn adjust(&mut self) {
        let data = self.head()..self.head() + self.len();
        self.bytes_mut().copy_within(data, 0);
        self.head = 0;
    }

    /// Discards the data.
    pub fn clear(&mut self) {
        self.head = 0;
        self.len = 0;
    }

    /// The room behind the data, for a system call to fill. It may hold an earlier user's bytes.
    pub(crate) fn room_mut(&mut self) -> &mut [u8] {
        let end = self.head() + self.len();
        &mut self.bytes_mut()[end..]
    }

    /// Counts the first `n` bytes of the room as data, after a system call has written them.
    pub(crate) fn filled(&mut self, n: usize) {
        assert!(n <= self.room(), "cannot fill {n} bytes of {}", self.room());
        self.len += n as u32;
    }
}

/// Reads from the front, with all the methods of `bytes`.
impl Buf for IoBuf {
    fn remaining(&self) -> usize {
        self.len()
    }

    fn chunk(&self) -> &[u8] {
        self.data()
    }

    fn advance(&mut self, n: usize) {
        self.pop(n);
    }
}

impl Drop for IoBuf {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

impl fmt::Debug for IoBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { head, len, .. } = self;
        write!(f, "IoBuf {{ head: {head}, len: {len}, capacity: {} }}", self.capacity())
    }
}
