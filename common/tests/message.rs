//! The promises of the message codec.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use common::message::{BadLength, HEADER_LEN, MAX_PAYLOAD, Message, decode, encode_header};

#[track_caller]
fn frame(id: i32, payload: &[u8]) -> Vec<u8> {
    let header = encode_header(id, payload.len()).unwrap();
    [&header[..], payload].concat()
}

#[test]
fn the_limits_are_those_of_the_course() {
    assert_eq!((HEADER_LEN, MAX_PAYLOAD), (8, 65_527));
}

#[test]
fn the_header_is_id_then_length_in_little_endian() {
    assert_eq!(encode_header(0x0403_0201, 0xa0b), Ok([1, 2, 3, 4, 0x0b, 0x0a, 0, 0]));
    assert_eq!(encode_header(-2, 65_527), Ok([0xfe, 0xff, 0xff, 0xff, 0xf7, 0xff, 0, 0]));
    let message = Message { id: i32::MIN, payload: b"abc" };
    assert_eq!(decode(b"\0\0\0\x80\x03\0\0\0abcdef"), Ok(Some(message)));
    assert_eq!(message.frame_len(), 11);
}

#[test]
fn what_was_encoded_is_decoded() {
    let longest: Vec<u8> = (0..MAX_PAYLOAD).map(|i| (i % 251) as u8).collect();
    for id in [0, 1, -1, i32::MAX, i32::MIN] {
        for payload in [&longest[..0], &longest[..1], &longest[..]] {
            let frame = frame(id, payload);
            let message = decode(&frame);
            assert_eq!(message, Ok(Some(Message { id, payload })));
            assert_eq!(
                message.ok().flatten().map(|message| message.frame_len()),
                Some(frame.len())
            );
        }
    }
}

#[test]
fn joined_messages_are_decoded_in_order() {
    let mut bytes: &[u8] = &[frame(1, b"one"), frame(2, b""), frame(3, b"three")].concat();
    let mut ids = Vec::new();
    while let Ok(Some(message)) = decode(bytes) {
        ids.push(message.id);
        bytes = &bytes[message.frame_len()..];
    }
    assert_eq!((&ids[..], bytes), (&[1, 2, 3][..], &b""[..]));
}

#[test]
fn an_incomplete_frame_is_neither_a_message_nor_an_error() {
    for payload in [&b""[..], b"a", b"hello lars!", &[b'x'; MAX_PAYLOAD]] {
        let frame = frame(7, payload);
        for n in 0..frame.len() {
            assert_eq!(decode(&frame[..n]), Ok(None), "{n} bytes of {}", frame.len());
        }
    }
}

#[test]
fn the_header_alone_is_enough_to_refuse_a_length() {
    for length in [65_528, 65_536, i32::MAX, -1, i32::MIN] {
        let header = [5_i32.to_le_bytes(), length.to_le_bytes()].concat();
        assert_eq!(decode(&header), Err(BadLength(length.into())));
        assert_eq!(decode(&header[..7]), Ok(None), "the last byte is missing");
        let header_and_more = [&header[..], &[0; 9]].concat();
        assert_eq!(decode(&header_and_more), Err(BadLength(length.into())));
    }
}

#[test]
fn nothing_too_long_is_encoded() {
    for length in [65_528, 65_536, 1 << 31, 1 << 32, (1 << 32) + 1] {
        assert_eq!(encode_header(1, length), Err(BadLength(length as i64)));
    }
    assert!(encode_header(1, usize::MAX).is_err());
}

#[test]
fn the_error_names_the_length_and_the_limit() {
    let message = BadLength(-1).to_string();
    assert!(message.contains("-1") && message.contains("65527"), "{message}");
}
