//! Chapter 4 from outside: it echoes messages, no matter in which pieces they arrive.
//!
//! The exercises give the ids 2 and 3 a meaning, so these tests use other ids.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use harness::every_messenger::assert_serves;
use harness::every_reactor::Chapter;
use harness::{Server, assert_echo, frame};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v04");

/// Replies of up to 1 MiB wait for a client that never reads; the smaller blocks that they have
/// grown through stay in the pool. Half a message of 60,000 bytes has grown from 4 KiB to 64 KiB.
const CHAPTER: Chapter = Chapter {
    exe: EXE,
    message: |payload| frame(1, payload),
    stuck_kib: 2048,
    midway_kib: 64 + 16 + 4,
    idle: 300,
};

harness::every_server!(EXE, assert_serves);
harness::every_reactor!(CHAPTER);
harness::every_messenger!(CHAPTER);

#[test]
fn echoes_any_id() {
    let server = Server::start(EXE);
    let client = server.connect();
    for id in [0, 1, -1, i32::MAX, i32::MIN] {
        assert_echo(&client, &frame(id, b"hello"));
    }
}
