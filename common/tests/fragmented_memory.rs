//! `BufPool` when memory is short, and small allocations lie beside its blocks. Alone in its file, because all
//! tests in a process share its memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use common::buf_pool::BufPool;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// On the heap, the small allocations would keep the memory of the blocks from the system, and so from the
/// larger ones.
#[test]
fn the_memory_of_free_blocks_can_be_used_again() {
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    setrlimit(Resource::RLIMIT_AS, 200 << 20, hard).unwrap();
    let pool = BufPool::new(usize::MAX);
    let (mut blocks, mut small) = (Vec::new(), Vec::new());
    while let Ok(block) = pool.alloc(4096) {
        blocks.push(block);
        if blocks.len() % 32 == 0 {
            small.push(vec![0_u8; 2000]);
        }
    }
    small.push(vec![0_u8; 2000]);
    let many = blocks.len();
    blocks.clear();
    // The pool has none of this size, and frees the others.
    let larger: Vec<_> = (0..many / 8).map_while(|_| pool.alloc(4097).ok()).collect();
    assert_eq!(larger.len(), many / 8);
    // Nor is the rest lost.
    blocks.extend((0..).map_while(|_| pool.alloc(4096).ok()));
    assert!(blocks.len() > many / 4, "once {many}, and now only {}", blocks.len());
}
