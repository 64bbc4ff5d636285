//! The promises of `InputBuf` and `OutputBuf`, over real sockets.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

use bytes::Buf;
use common::buf_pool::{BufPool, MAX_BLOCK, PoolError};
use common::io_buf::IoBuf;
use common::reactor_buf::{InputBuf, OutputBuf};

const KIB: usize = 1024;

/// Our end and the peer's, both non-blocking.
fn pair() -> (UnixStream, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    peer.set_nonblocking(true).unwrap();
    (ours, peer)
}

/// No two blocks of it are equal, because 251 divides none of their sizes.
fn pattern(n: usize) -> Vec<u8> {
    (0..n).map(|i| (i % 251) as u8).collect()
}

/// Writes as much as the socket takes.
fn fill(mut peer: &UnixStream, mut data: &[u8]) -> usize {
    let all = data.len();
    while !data.is_empty() {
        match peer.write(data) {
            Ok(n) => data = &data[n..],
            Err(err) => {
                assert_eq!(err.kind(), ErrorKind::WouldBlock);
                break;
            }
        }
    }
    all - data.len()
}

/// Reads everything that has arrived.
fn drain(mut peer: &UnixStream) -> Vec<u8> {
    let mut data = Vec::new();
    if let Err(err) = peer.read_to_end(&mut data) {
        assert_eq!(err.kind(), ErrorKind::WouldBlock);
    }
    data
}

/// Writes all of `output` to a peer that reads whenever the socket is full.
#[track_caller]
fn flush(output: &mut OutputBuf, ours: &UnixStream, peer: &UnixStream) -> Vec<u8> {
    let mut arrived = Vec::new();
    while !output.is_empty() {
        let len = output.len();
        let written = output.write_to(ours).unwrap();
        assert!(written > 0, "the peer has made room");
        assert_eq!(output.len(), len - written);
        arrived.append(&mut drain(peer));
    }
    arrived
}

fn block(pool: &BufPool, data: &[u8]) -> IoBuf {
    let mut block = pool.alloc(data.len()).unwrap();
    assert_eq!(block.append(data), data.len());
    block
}

#[track_caller]
fn assert_in_use(pool: &BufPool, bytes: usize) {
    assert_eq!(pool.stats().in_use, bytes);
}

/// Takes the bytes and returns the block; returns them with the size of the block.
#[track_caller]
fn take(input: &mut InputBuf) -> (Vec<u8>, usize) {
    let block = input.take().unwrap();
    (block.data().to_vec(), block.capacity())
}

#[track_caller]
fn assert_pool_error(err: &io::Error, expected: PoolError) {
    assert_eq!(err.kind(), ErrorKind::OutOfMemory);
    let inner = err.get_ref().and_then(|inner| inner.downcast_ref());
    assert_eq!(inner, Some(&expected));
}

#[test]
fn nothing_to_read_is_none_and_holds_no_block() {
    let (ours, _peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    assert_in_use(&pool, 0);
    assert_eq!(input.read_from(&ours).unwrap(), None);
    assert!(input.is_empty() && input.take().is_none());
    assert_in_use(&pool, 0);
}

#[test]
fn the_end_of_the_stream_is_zero_and_comes_after_the_data() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    fill(&peer, b"bye");
    drop(peer);
    assert_eq!(input.read_from(&ours).unwrap(), Some(3));
    assert_eq!(input.read_from(&ours).unwrap(), Some(0));
    assert_eq!(input.len(), 3, "the data stays");
    assert_eq!(take(&mut input).0, b"bye");
    assert_eq!(input.read_from(&ours).unwrap(), Some(0));
    assert_in_use(&pool, 0);
}

#[test]
fn a_read_error_is_returned_and_the_data_kept() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    fill(&peer, b"data");
    assert_eq!(input.read_from(&ours).unwrap(), Some(4));
    // Closing with unread input sends a reset.
    fill(&ours, b"unread");
    drop(peer);
    let err = input.read_from(&ours).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionReset);
    assert_eq!(take(&mut input).0, b"data");
    assert_in_use(&pool, 0);
}

#[test]
fn reads_add_up_until_the_block_is_taken() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    for (part, len) in [("hello", 5), (" ", 6), ("Lars", 10)] {
        fill(&peer, part.as_bytes());
        assert_eq!(input.read_from(&ours).unwrap(), Some(part.len()));
        assert_eq!(input.len(), len);
        assert_in_use(&pool, 4 * KIB);
    }
    let block = input.take().unwrap();
    assert_eq!(block.data(), b"hello Lars");
    assert!(input.is_empty() && input.take().is_none());
    assert_in_use(&pool, 4 * KIB);
    drop(block);
    assert_in_use(&pool, 0);
}

#[test]
fn reads_add_to_what_was_put_back() {
    let (ours, peer) = pair();
    let pool = BufPool::new(4 * KIB);
    let mut input = InputBuf::new(&pool);
    let data = pattern(8000);
    fill(&peer, &data);
    assert_eq!(input.read_from(&ours).unwrap(), Some(4096));
    let mut block = input.take().unwrap();
    block.pop(4000);
    input.put_back(block);
    assert_eq!(input.len(), 96);
    // The cap allows no second block: room is made by moving the data to the front.
    assert_eq!(input.read_from(&ours).unwrap(), Some(8000 - 4096));
    assert_eq!(take(&mut input).0, &data[4000..]);
}

/// Otherwise data at the end of a block would cause one small read after another.
#[test]
fn a_read_finds_room_where_data_has_been_popped() {
    let pool = BufPool::new(MAX_BLOCK);
    let (ours, peer) = pair();
    let mut input = InputBuf::new(&pool);
    fill(&peer, &pattern(4000));
    assert_eq!(input.read_from(&ours).unwrap(), Some(4000));
    let mut block = input.take().unwrap();
    block.pop(3900);
    input.put_back(block);
    fill(&peer, &pattern(3000));
    assert_eq!(input.read_from(&ours).unwrap(), Some(3000));
    assert_in_use(&pool, 4096);
}

#[test]
fn a_block_put_back_empty_goes_back_to_the_pool() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    fill(&peer, b"all of it");
    assert_eq!(input.read_from(&ours).unwrap(), Some(9));
    let mut block = input.take().unwrap();
    block.pop(9);
    input.put_back(block);
    assert!(input.is_empty() && input.take().is_none());
    assert_in_use(&pool, 0);
}

#[test]
fn an_input_that_is_not_taken_grows_through_the_classes_and_keeps_every_byte() {
    let (ours, peer) = pair();
    let pool = BufPool::new(2 * MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    let data = pattern(MAX_BLOCK + 10);
    let mut sent = 0;
    let mut sizes = Vec::new();
    while input.len() < MAX_BLOCK {
        sent += fill(&peer, &data[sent..]);
        assert!(input.read_from(&ours).unwrap() > Some(0));
        let block = input.take().unwrap();
        assert_in_use(&pool, block.capacity());
        sizes.push(block.capacity());
        input.put_back(block);
    }
    sizes.dedup();
    assert_eq!(sizes, [4, 16, 64, 256, 1024, 4096, 8192].map(|n| n * KIB));

    sent += fill(&peer, &data[sent..]);
    let err = input.read_from(&ours).unwrap_err();
    let asked = MAX_BLOCK + 1;
    assert_pool_error(&err, PoolError::TooLarge { asked });
    let mut block = input.take().unwrap();
    assert!(block.data() == &data[..MAX_BLOCK]);
    block.pop(MAX_BLOCK - 1);
    input.put_back(block);
    assert_eq!(input.read_from(&ours).unwrap(), Some(10), "room again");
    assert_eq!(sent, data.len());
    assert_eq!(take(&mut input).0, &data[MAX_BLOCK - 1..]);
    assert_in_use(&pool, 0);
}

#[test]
fn without_memory_a_read_fails_and_loses_nothing() {
    let (ours, peer) = pair();
    let pool = BufPool::new(20 * KIB - 1);
    let mut input = InputBuf::new(&pool);
    let data = pattern(5000);
    fill(&peer, &data);
    assert_eq!(input.read_from(&ours).unwrap(), Some(4096));
    let err = input.read_from(&ours).unwrap_err();
    let cap_reached = PoolError::CapReached { asked: 16 * KIB, cap: 20 * KIB - 1 };
    assert_pool_error(&err, cap_reached);
    assert_in_use(&pool, 4 * KIB);
    assert_eq!(take(&mut input).0, &data[..4096]);
    assert_eq!(input.read_from(&ours).unwrap(), Some(5000 - 4096));
    assert_eq!(take(&mut input).0, &data[4096..]);

    let rest = pool.alloc(16 * KIB).unwrap();
    fill(&peer, b"more");
    assert!(input.read_from(&ours).is_err());
    assert!(input.is_empty());
    drop(rest);
    assert_eq!(input.read_from(&ours).unwrap(), Some(4));
}

#[test]
fn the_next_read_is_as_large_as_the_last_ones_were() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut input = InputBuf::new(&pool);
    let plenty = pattern(64 * KIB);
    for expected in [4, 16, 64, 64] {
        fill(&peer, &plenty[..expected * KIB]);
        assert_eq!(input.read_from(&ours).unwrap(), Some(expected * KIB));
        take(&mut input);
    }
    // The size of the block shows what was expected. It goes down by one class at a time.
    for (n, capacity) in [(20_000, 64), (8, 64), (8, 16), (8, 4), (8, 4)] {
        fill(&peer, &plenty[..n]);
        assert_eq!(input.read_from(&ours).unwrap(), Some(n));
        assert_eq!(take(&mut input).1, capacity * KIB, "for {n} bytes");
    }
}

#[test]
fn megabytes_go_out_in_the_pieces_that_the_socket_takes() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut output = OutputBuf::new(&pool);
    let data = pattern(6 << 20);
    output.send_data(&data[..]).unwrap();
    assert_in_use(&pool, MAX_BLOCK);

    let written = output.write_to(&ours).unwrap();
    assert_eq!(output.len(), data.len() - written);
    assert!(!output.is_empty(), "no socket takes so much");
    assert_eq!(output.write_to(&ours).unwrap(), 0, "the socket is full");
    let mut arrived = drain(&peer);
    arrived.append(&mut flush(&mut output, &ours, &peer));
    assert!(arrived == data);
    assert_in_use(&pool, 0);
}

#[test]
fn an_empty_output_writes_nothing_and_holds_no_block() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut output = OutputBuf::new(&pool);
    output.send_data(&b""[..]).unwrap();
    output.send_block(pool.alloc(1).unwrap()).unwrap();
    assert!(output.is_empty());
    assert_in_use(&pool, 0);
    assert_eq!(output.write_to(&ours).unwrap(), 0);
    assert_eq!(drain(&peer), b"");
}

#[test]
fn output_is_appended_and_grows_through_the_classes() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut output = OutputBuf::new(&pool);
    let data = pattern(100 * KIB);
    let mut sizes = Vec::new();
    for part in data.chunks(3000) {
        let (front, back) = part.split_at(part.len() / 3);
        output.send_data(Buf::chain(front, back)).unwrap();
        sizes.push(pool.stats().in_use);
    }
    sizes.dedup();
    assert_eq!(sizes, [4, 16, 64, 256].map(|n| n * KIB));
    assert_eq!(output.len(), data.len());
    assert_eq!(flush(&mut output, &ours, &peer), data);
    assert_in_use(&pool, 0);
}

#[test]
fn output_moves_to_the_front_before_it_takes_a_larger_block() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut output = OutputBuf::new(&pool);
    let data = pattern(MAX_BLOCK);
    output.send_data(&data[..]).unwrap();
    // The cap allows no second block.
    let written = output.write_to(&ours).unwrap();
    output.send_data(&data[..written]).unwrap();
    let err = output.send_data(&b"x"[..]).unwrap_err();
    let asked = MAX_BLOCK + 1;
    assert_eq!(err, PoolError::TooLarge { asked });

    let mut arrived = drain(&peer);
    arrived.append(&mut flush(&mut output, &ours, &peer));
    assert!(arrived == [&data[..], &data[..written]].concat());
}

#[test]
fn without_memory_nothing_is_added_and_nothing_lost() {
    let (ours, peer) = pair();
    let pool = BufPool::new(20 * KIB);
    let mut output = OutputBuf::new(&pool);
    output.send_data(&b"first"[..]).unwrap();
    let large = block(&pool, &pattern(4097));
    let cap_reached = PoolError::CapReached { asked: 16 * KIB, cap: 20 * KIB };
    let result = output.send_data(&pattern(4092)[..]);
    assert_eq!(result, Err(cap_reached));
    assert_eq!(output.send_block(large), Err(cap_reached));
    assert_in_use(&pool, 4 * KIB);
    output.send_data(&b", last"[..]).unwrap();
    assert_eq!(output.write_to(&ours).unwrap(), 11);
    assert_eq!(drain(&peer), b"first, last");
}

#[test]
fn a_block_is_sent_without_a_copy_if_nothing_waits() {
    let (ours, peer) = pair();
    // A copy would need a second block, which the cap does not allow.
    let pool = BufPool::new(64 * KIB);
    let mut output = OutputBuf::new(&pool);
    let data = pattern(64 * KIB);
    let mut large = block(&pool, &data);
    large.pop(100);
    output.send_block(large).unwrap();
    assert_eq!(output.len(), 64 * KIB - 100);
    assert_eq!(output.write_to(&ours).unwrap(), 64 * KIB - 100);
    assert_eq!(drain(&peer), &data[100..]);
    assert_in_use(&pool, 0);
    assert_eq!(pool.stats().peak, 64 * KIB);
}

#[test]
fn blocks_are_sent_in_order() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut output = OutputBuf::new(&pool);
    output.send_block(block(&pool, b"one")).unwrap();
    output.send_block(block(&pool, b", two")).unwrap();
    assert_in_use(&pool, 4 * KIB);
    output.send_data(&b", three"[..]).unwrap();
    assert_eq!(output.write_to(&ours).unwrap(), 15);
    assert_eq!(drain(&peer), b"one, two, three");
    assert_in_use(&pool, 0);
}

#[test]
fn writing_to_a_closed_peer_is_an_error() {
    let (ours, peer) = pair();
    let pool = BufPool::new(MAX_BLOCK);
    let mut output = OutputBuf::new(&pool);
    output.send_data(&b"too late"[..]).unwrap();
    drop(peer);
    let err = output.write_to(&ours).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::BrokenPipe);
    drop(output);
    assert_in_use(&pool, 0);
}
