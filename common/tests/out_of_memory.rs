//! The promises of `BufPool` when memory is short. Alone in its file, because all tests in a
//! process share its memory.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use common::buf_pool::{BufPool, MAX_BLOCK, PoolError};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn resident_kib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn out_of_memory_is_an_error_and_free_blocks_make_room() {
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    setrlimit(Resource::RLIMIT_AS, 1 << 30, hard).unwrap();
    let pool = BufPool::new(usize::MAX);
    let before = resident_kib();
    let mut blocks = Vec::new();
    let err = loop {
        match pool.alloc(1 << 20) {
            Ok(block) => blocks.push(block),
            Err(err) => break err,
        }
    };
    assert_eq!(err, PoolError::OutOfMemory { asked: 1 << 20 });
    assert_eq!(err.to_string(), "the system has no memory for a buffer of 1048576 bytes");
    assert_eq!(pool.stats().in_use, blocks.len() << 20);
    let grown = resident_kib() - before;
    assert!(grown < 256 << 10, "blocks that were never written take up {grown} KiB");
    drop(blocks);
    assert_eq!(pool.alloc(MAX_BLOCK).unwrap().capacity(), MAX_BLOCK);
    assert_eq!(pool.stats().free, MAX_BLOCK);
}
