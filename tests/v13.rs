//! Chapter 13 from outside: it echoes messages, no matter in which pieces they arrive.
//!
//! The exercises give the ids 2 and 3 a meaning, so these tests use other ids.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use harness::every_messenger::assert_serves;
use harness::every_reactor::Chapter;
use harness::{Server, Signal, assert_echo, frame, pattern, read_to_end, send_until_stuck, served};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v13");

/// The replies to one read wait for a client that never reads, and nothing more is read; the smaller
/// blocks that they have grown through stay in the pool. Half a message of 60,000 bytes has grown from
/// 4 KiB to 64 KiB.
const CHAPTER: Chapter = Chapter {
    exe: EXE,
    message: |payload| frame(1, payload),
    stuck_kib: 64 + 128,
    midway_kib: 64 + 16 + 4,
    idle: 600,
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

/// One client does not read, and others wait in the backlog, because there are no fds for them.
#[test]
fn stops_in_order_during_a_blocked_flush_and_a_pause_after_emfile() {
    let mut server = Server::start_under(EXE, "-n 64");
    let [blocked, idle] = [(); 2].map(|()| served(server.addr()));
    let messages = frame(1, &pattern(1000, 1)).repeat(60_000);
    send_until_stuck(&blocked, &messages);
    let waiting: Vec<_> = (0..100).map(|_| server.connect()).collect();
    server.wait_for_log("cannot accept: Too many open files");
    assert_echo(&idle, &frame(1, b"hello"));
    server.signal(Signal::SIGTERM);
    let received = read_to_end(&blocked);
    assert!(received.len() > 100_000 && messages.starts_with(&received));
    harness::assert_bytes(read_to_end(&idle), b"");
    drop((blocked, idle, waiting));
    assert_eq!(server.wait().code(), Some(0));
    server.assert_nothing_left();
}

/// A task that waits for its client again and again stays registered.
#[test]
fn an_echo_costs_three_system_calls() {
    harness::chapter_only!("it needs the chapter's own log");
    let mut command = Command::new(EXE);
    let server = Server::from(command.args(["--addr", "127.0.0.1:0"]).env("RUST_LOG", "trace"));
    let client = served(server.addr());
    let counts = || {
        server.wait_until_asleep();
        let log = server.log();
        ["epoll_wait: ", "read: ", "write: ", "epoll_ctl: "].map(|call| log.matches(call).count())
    };
    let before = counts();
    for _ in 0..100 {
        assert_echo(&client, &frame(1, b"hello"));
    }
    let after = counts();
    let calls: Vec<_> = before.iter().zip(after).map(|(before, after)| after - before).collect();
    assert_eq!(calls, [100, 100, 100, 0]);
}
