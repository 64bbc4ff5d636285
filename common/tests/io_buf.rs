//! The promises of `IoBuf`.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use bytes::Buf;
use common::buf_pool::BufPool;
use common::io_buf::IoBuf;

fn io_buf(data: &[u8]) -> IoBuf {
    let mut buf = BufPool::new(4096).alloc(4096).unwrap();
    assert_eq!(buf.append(data), data.len());
    buf
}

#[track_caller]
fn assert_buf(buf: &IoBuf, head: usize, data: &[u8]) {
    assert_eq!(buf.data(), data);
    assert_eq!((buf.head(), buf.len()), (head, data.len()));
    assert_eq!(buf.is_empty(), data.is_empty());
    assert_eq!(buf.room(), buf.capacity() - head - data.len());
    assert_eq!((buf.remaining(), buf.chunk()), (data.len(), data));
}

#[test]
fn head_length_and_room_follow_every_step() {
    let mut buf = io_buf(b"");
    assert_eq!(buf.capacity(), 4096);
    assert_buf(&buf, 0, b"");
    assert_eq!(buf.append(b"hello"), 5);
    assert_buf(&buf, 0, b"hello");
    buf.pop(2);
    assert_buf(&buf, 2, b"llo");
    assert_eq!(buf.append(b" Lars"), 5);
    assert_buf(&buf, 2, b"llo Lars");
    buf.pop(0);
    assert_buf(&buf, 2, b"llo Lars");
    buf.adjust();
    assert_buf(&buf, 0, b"llo Lars");
    buf.pop(4);
    buf.clear();
    assert_buf(&buf, 0, b"");
}

#[test]
fn the_whole_block_is_room_again_when_the_last_byte_is_popped() {
    let mut buf = io_buf(b"hello");
    buf.pop(4);
    assert_buf(&buf, 4, b"o");
    buf.pop(1);
    assert_buf(&buf, 0, b"");
}

#[test]
fn append_takes_what_there_is_room_for() {
    let mut buf = io_buf(&[1; 4090]);
    assert_eq!(buf.append(&[2; 10]), 6);
    assert_eq!(buf.append(&[3; 10]), 0);
    buf.pop(4090);
    assert_eq!(buf.append(&[3; 10]), 0, "popped bytes are not room yet");
    assert_buf(&buf, 4090, &[2; 6]);
    buf.adjust();
    assert_eq!(buf.append(&[3; 10]), 10);
    assert_buf(&buf, 0, b"\x02\x02\x02\x02\x02\x02\x03\x03\x03\x03\x03\x03\x03\x03\x03\x03");
}

#[test]
fn adjust_moves_data_over_its_own_old_place() {
    let data: Vec<u8> = (0..4096).map(|i| (i % 251) as u8).collect();
    let mut buf = io_buf(&data);
    buf.pop(1);
    buf.adjust();
    assert_buf(&buf, 0, &data[1..]);
}

#[test]
#[should_panic(expected = "cannot pop 4 bytes of 3")]
fn pop_of_more_than_there_is_panics() {
    io_buf(b"abc").pop(4);
}

#[test]
#[should_panic(expected = "cannot pop 3 bytes of 2")]
fn pop_does_not_reach_back_over_the_head() {
    let mut buf = io_buf(b"abc");
    buf.pop(1);
    buf.pop(3);
}

#[test]
#[should_panic(expected = "cannot pop 4 bytes of 3")]
fn advance_past_the_end_panics() {
    io_buf(b"abc").advance(4);
}

#[test]
fn reading_through_buf_pops() {
    let mut buf = io_buf(b"\x01\x02\x03\x04\x05rest");
    assert_eq!(buf.get_u8(), 1);
    assert_eq!(buf.get_u32_le(), 0x0504_0302);
    assert_buf(&buf, 5, b"rest");
    assert_eq!(&buf.copy_to_bytes(3)[..], b"res");
    assert_buf(&buf, 8, b"t");
    buf.advance(1);
    assert!(!buf.has_remaining());
    assert_buf(&buf, 0, b"");
}

#[test]
fn debug_shows_the_figures_and_not_the_data() {
    let mut buf = io_buf(b"secret");
    buf.pop(1);
    let shown = format!("{buf:?}");
    assert_eq!(shown, "IoBuf { head: 1, len: 5, capacity: 4096 }");
}
