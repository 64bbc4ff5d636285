//! The promises of `BufPool`.

use std::io;

use common::buf_pool::{BufPool, MAX_BLOCK, PoolError, PoolStats, SIZE_CLASSES};

const KIB: usize = 1024;

#[track_caller]
fn assert_bytes(pool: &BufPool, in_use: usize, free: usize, peak: usize) {
    let stats = pool.stats();
    assert_eq!((stats.in_use, stats.free, stats.peak), (in_use, free, peak));
}

#[test]
fn blocks_come_in_the_seven_sizes_of_the_course() {
    let kib = [4, 16, 64, 256, 1024, 4096, 8192];
    assert_eq!(SIZE_CLASSES, kib.map(|n| n * KIB));
    assert_eq!(MAX_BLOCK, 8192 * KIB);
}

#[test]
fn alloc_gives_the_smallest_class_that_fits() {
    let pool = BufPool::new(usize::MAX);
    let capacity = |n| pool.alloc(n).map(|buf| buf.capacity());
    assert_eq!(capacity(0), Ok(4096));
    assert_eq!(capacity(1), Ok(4096));
    for (i, size) in SIZE_CLASSES.into_iter().enumerate() {
        assert_eq!(capacity(size - 1), Ok(size));
        assert_eq!(capacity(size), Ok(size));
        let next = SIZE_CLASSES.get(i + 1).copied();
        let above = next.ok_or(PoolError::TooLarge { asked: size + 1 });
        assert_eq!(capacity(size + 1), above);
    }
    let asked = usize::MAX;
    assert_eq!(capacity(asked), Err(PoolError::TooLarge { asked }));
}

#[test]
fn the_figures_are_exact() {
    let pool = BufPool::new(100 * KIB);
    let mut expected = PoolStats { cap: 100 * KIB, in_use: 0, free: 0, peak: 0 };
    assert_eq!(pool.stats(), expected, "nothing is allocated in advance");

    let bufs = [1, 2, 3, 64 * KIB].map(|n| pool.alloc(n).unwrap());
    (expected.in_use, expected.peak) = (76 * KIB, 76 * KIB);
    assert_eq!(pool.stats(), expected);

    let [first, second, _third, large] = bufs;
    drop((first, second, large));
    (expected.in_use, expected.free) = (4 * KIB, 72 * KIB);
    assert_eq!(pool.stats(), expected);
    assert_eq!(pool.stats().to_string(), "4096 B in use, 73728 B free, 77824 B peak");
}

#[test]
fn blocks_are_reused_instead_of_allocating_new_ones() {
    let pool = BufPool::new(100 * KIB);
    for _ in 0..100 {
        let held = (pool.alloc(1).unwrap(), pool.alloc(5 * KIB).unwrap());
        assert_bytes(&pool, 20 * KIB, 0, 20 * KIB);
        drop(held);
        assert_bytes(&pool, 0, 20 * KIB, 20 * KIB);
    }
}

#[test]
fn the_cap_can_be_reached_but_not_exceeded() {
    let pool = BufPool::new(20 * KIB);
    let large = pool.alloc(16 * KIB).unwrap();
    let small = pool.alloc(1).unwrap();
    let cap_reached = PoolError::CapReached { asked: 4 * KIB, cap: 20 * KIB };
    assert_eq!(pool.alloc(1).err(), Some(cap_reached));
    assert_bytes(&pool, 20 * KIB, 0, 20 * KIB);
    drop(small);
    assert!(pool.alloc(1).is_ok(), "room again");
    drop(large);
    assert!(pool.alloc(16 * KIB).is_ok(), "room again");
    assert_bytes(&pool, 0, 20 * KIB, 20 * KIB);

    assert!(BufPool::new(0).alloc(0).is_err());
}

#[test]
fn free_blocks_make_room_for_other_sizes_only_as_needed() {
    let pool = BufPool::new(64 * KIB);
    drop([(); 4].map(|()| pool.alloc(16 * KIB).unwrap()));
    assert_bytes(&pool, 0, 64 * KIB, 64 * KIB);
    let small = pool.alloc(1).unwrap();
    assert_bytes(&pool, 4 * KIB, 48 * KIB, 64 * KIB);
    drop(small);
    let large = pool.alloc(64 * KIB).unwrap();
    assert_bytes(&pool, 64 * KIB, 0, 64 * KIB);
    drop(large);
    let _small = pool.alloc(1).unwrap();
    assert_bytes(&pool, 4 * KIB, 0, 64 * KIB);

    let pool = BufPool::new(20 * KIB);
    drop(pool.alloc(16 * KIB).unwrap());
    let _fits_beside_it = pool.alloc(1).unwrap();
    assert_bytes(&pool, 4 * KIB, 16 * KIB, 16 * KIB);
}

#[test]
fn a_refused_alloc_leaves_the_pool_as_it_was() {
    let pool = BufPool::new(64 * KIB);
    let _held = pool.alloc(1).unwrap();
    drop(pool.alloc(16 * KIB).unwrap());
    let before = pool.stats();
    assert!(pool.alloc(64 * KIB).is_err());
    assert!(pool.alloc(MAX_BLOCK + 1).is_err());
    assert_eq!(pool.stats(), before);
}

#[test]
fn an_error_names_the_limit_that_was_hit() {
    let pool = BufPool::new(5000);
    let too_large = pool.alloc(8_388_609).unwrap_err();
    let message = too_large.to_string();
    assert!(message.contains("8388609") && message.contains("8388608"), "{message}");
    let cap_reached = io::Error::from(pool.alloc(5000).unwrap_err());
    assert_eq!(cap_reached.kind(), io::ErrorKind::OutOfMemory);
    let message = cap_reached.to_string();
    assert!(message.contains("16384") && message.contains("5000"), "{message}");
}

#[test]
fn a_buffer_may_outlive_every_handle_to_its_pool() {
    let pool = BufPool::new(4 * KIB);
    let mut buf = pool.clone().alloc(1).unwrap();
    assert_bytes(&pool, 4 * KIB, 0, 4 * KIB);
    drop(buf);
    assert_bytes(&pool, 0, 4 * KIB, 4 * KIB);

    buf = pool.alloc(1).unwrap();
    drop(pool);
    assert_eq!(buf.append(b"still there"), 11);
    assert_eq!(buf.data(), b"still there");
}

#[test]
fn a_reused_block_never_shows_old_bytes() {
    let pool = BufPool::new(4 * KIB);
    let mut buf = pool.alloc(1).unwrap();
    assert_eq!(buf.append(&[b'#'; 4 * KIB]), 4 * KIB);
    buf.pop(1000);
    drop(buf);

    let mut buf = pool.alloc(1).unwrap();
    assert_eq!((buf.head(), buf.len(), buf.room()), (0, 0, 4 * KIB));
    assert_eq!(buf.data(), b"");
    buf.append(b"mine");
    assert_eq!(buf.data(), b"mine");
    buf.pop(3);
    buf.adjust();
    assert_eq!(buf.data(), b"e");
}
