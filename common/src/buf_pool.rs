//! The buffer pool: reuses blocks of memory in fixed size classes, up to a cap (since v02).

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::rc::Rc;

use memmap2::MmapMut;

use crate::io_buf::IoBuf;

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

/// The size classes of blocks, in bytes, the smallest first (since v02).
pub const SIZE_CLASSES: [usize; 7] =
    [4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB];

/// The size of the largest block, in bytes: 8 MiB (since v02).
pub const MAX_BLOCK: usize = 8 * MIB;

/// How much memory must stay free for everything else, in bytes: a small allocation that fails
/// aborts the process. When memory is short, each of them may take a page of its own.
const RESERVE: usize = 32 * MIB;

/// Blocks of memory that are reused, so that a server in steady state allocates nothing
/// (since v02).
///
/// A block is allocated when it is first needed, comes back when its [`IoBuf`] is dropped, and is
/// kept for the next one. Clones share the same blocks. A pool belongs to one thread.
#[derive(Clone)]
pub struct BufPool(Rc<RefCell<Blocks>>);

struct Blocks {
    cap: usize,
    in_use: usize,
    free: usize,
    peak: usize,
    /// The free blocks of each class. The block returned last may still be in the CPU cache, so it
    /// is reused first.
    classes: [Vec<MmapMut>; SIZE_CLASSES.len()],
}

impl BufPool {
    /// Creates an empty pool of at most `cap` bytes, blocks in use and free ones together.
    pub fn new(cap: usize) -> Self {
        let classes = Default::default();
        Self(Rc::new(RefCell::new(Blocks { cap, in_use: 0, free: 0, peak: 0, classes })))
    }

    /// Returns an empty buffer with room for at least `n` bytes, from the smallest class that fits.
    ///
    /// # Errors
    /// [`PoolError`], which names the limit that was reached. The pool is unchanged then, except
    /// that [`PoolError::OutOfMemory`] leaves it without free blocks.
    pub fn alloc(&self, n: usize) -> Result<IoBuf, PoolError> {
        let class = SIZE_CLASSES.partition_point(|&size| size < n);
        if class == SIZE_CLASSES.len() {
            return Err(PoolError::TooLarge { asked: n });
        }
        let block = self.0.borrow_mut().take(class)?;
        Ok(IoBuf::new(block, self.clone()))
    }

    /// Takes a block back. Its old bytes stay: an `IoBuf` shows only bytes written through it.
    pub(crate) fn give_back(&self, block: MmapMut) {
        self.0.borrow_mut().give_back(block);
    }

    /// The current figures.
    pub fn stats(&self) -> PoolStats {
        let Blocks { cap, in_use, free, peak, .. } = *self.0.borrow();
        PoolStats { cap, in_use, free, peak }
    }
}

impl Blocks {
    fn take(&mut self, class: usize) -> Result<MmapMut, PoolError> {
        let size = SIZE_CLASSES[class];
        let block = match self.classes[class].pop() {
            Some(block) => {
                self.free -= size;
                block
            }
            None => {
                if self.cap.saturating_sub(self.in_use) < size {
                    return Err(PoolError::CapReached { asked: size, cap: self.cap });
                }
                self.make_room_for(size);
                allocate(size).or_else(|_| {
                    // Free blocks of other classes may hold that memory: free them, try again.
                    self.classes = Default::default();
                    self.free = 0;
                    allocate(size)
                })?
            }
        };
        self.in_use += size;
        self.peak = self.peak.max(self.in_use);
        Ok(block)
    }

    fn give_back(&mut self, block: MmapMut) {
        let size = block.len();
        self.classes[SIZE_CLASSES.partition_point(|&class| class < size)].push(block);
        self.in_use -= size;
        self.free += size;
    }

    /// Frees blocks of other classes, the largest first, until `size` more bytes fit under the cap.
    fn make_room_for(&mut self, size: usize) {
        for (class, class_size) in self.classes.iter_mut().zip(SIZE_CLASSES).rev() {
            while self.in_use + self.free + size > self.cap && class.pop().is_some() {
                self.free -= class_size;
            }
        }
    }
}

/// Maps a block, if the system has [`RESERVE`] beside it.
///
/// A mapping of its own goes back to the system when it is dropped, whatever lies beside it; on the heap, a
/// small allocation behind it would prevent that. Large ones take up memory only where they have been written.
///
/// The kernel joins blocks that lie side by side into one mapping, and splits it when one of them is dropped. If
/// the process has 65,530 mappings already (vm.max_map_count), munmap(2) fails, memmap2 ignores that, and the
/// block is lost. It takes some 131,000 blocks to get there.
fn allocate(size: usize) -> Result<MmapMut, PoolError> {
    let out_of_memory = PoolError::OutOfMemory { asked: size };
    let block = MmapMut::map_anon(size).map_err(|_| out_of_memory)?;
    MmapMut::map_anon(RESERVE).map_err(|_| out_of_memory)?;
    Ok(block)
}

/// Why [`BufPool::alloc`] returned no buffer (since v02).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolError {
    /// More than fits the largest block.
    TooLarge {
        /// The bytes asked for.
        asked: usize,
    },
    /// The blocks in use leave too little room under the cap.
    CapReached {
        /// The size of the block that did not fit, in bytes.
        asked: usize,
        /// The pool's cap, in bytes.
        cap: usize,
    },
    /// The operating system has no memory for the block (mmap(2), typically under RLIMIT_AS).
    OutOfMemory {
        /// The size of the block, in bytes.
        asked: usize,
    },
}

impl fmt::Display for PoolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge { asked } => {
                write!(
                    f,
                    "a buffer of {asked} bytes is over the limit of {MAX_BLOCK} bytes for one block"
                )
            }
            Self::CapReached { asked, cap } => {
                write!(
                    f,
                    "no room for a buffer of {asked} bytes under the pool's cap of {cap} bytes"
                )
            }
            Self::OutOfMemory { asked } => {
                write!(f, "the system has no memory for a buffer of {asked} bytes")
            }
        }
    }
}

impl std::error::Error for PoolError {}

impl From<PoolError> for io::Error {
    fn from(err: PoolError) -> Self {
        Self::new(io::ErrorKind::OutOfMemory, err)
    }
}

/// The figures of a [`BufPool`] (since v02). They print as `0 B in use, 8192 B free, 8192 B peak`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolStats {
    /// The limit on `in_use` and `free` together, in bytes.
    pub cap: usize,
    /// The size of the blocks in use, in bytes.
    pub in_use: usize,
    /// The size of the free blocks, kept for reuse, in bytes.
    pub free: usize,
    /// The highest value that `in_use` has had, in bytes.
    pub peak: usize,
}

impl fmt::Display for PoolStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { in_use, free, peak, .. } = self;
        write!(f, "{in_use} B in use, {free} B free, {peak} B peak")
    }
}
