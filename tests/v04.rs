//! Chapter 4 from outside: it echoes messages, no matter in which pieces they arrive.
//!
//! The exercises give the ids 2 and 3 a meaning, so these tests use other ids.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::{Shutdown, TcpStream};

use harness::every_reactor::Chapter;
use harness::{
    Server, assert_echo, exchange, frame, pattern, read, read_to_end, wait_until, write,
};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v04");
const MAX_PAYLOAD: usize = 65_527;

/// Replies of up to 1 MiB wait for a client that never reads; the smaller blocks that they have
/// grown through stay in the pool. Half a message of 60,000 bytes has grown from 4 KiB to 64 KiB.
const CHAPTER: Chapter = Chapter {
    exe: EXE,
    message: |payload| frame(1, payload),
    stuck_kib: 2048,
    midway_kib: 64 + 16 + 4,
};

harness::every_server!(EXE, assert_serves);
harness::every_reactor!(CHAPTER);

fn bad_frame(length: i32) -> Vec<u8> {
    [1_i32.to_le_bytes(), length.to_le_bytes()].concat()
}

#[track_caller]
fn assert_serves(client: &TcpStream) {
    assert_echo(client, &frame(1, b"hello"));
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(client), b"");
}

#[test]
fn echoes_a_message_of_any_length_and_id() {
    let server = Server::start(EXE);
    let client = server.connect();
    for id in [0, 1, -1, i32::MAX, i32::MIN] {
        for n in [0, 1, 8, 4087, 4088, 4089, 16_376, 16_377, 40_000, MAX_PAYLOAD - 1, MAX_PAYLOAD] {
            assert_echo(&client, &frame(id, &pattern(n, n as u64)));
        }
    }
}

#[test]
fn a_message_may_arrive_byte_by_byte() {
    let server = Server::start(EXE);
    let client = server.connect();
    client.set_nodelay(true).unwrap();
    let message = frame(7, b"piece by piece");
    for byte in &message {
        write(&client, &[*byte]);
        harness::wait_until_taken(&client);
    }
    assert_eq!(read(&client, message.len()), message);
}

/// Some call these sticky packets: they are what this chapter is about.
#[test]
fn messages_may_arrive_joined_and_split_anywhere() {
    let server = Server::start(EXE);
    let both = [frame(1, b"the first"), frame(4, b"the second")].concat();
    for cut in 0..both.len() {
        let client = server.connect();
        client.set_nodelay(true).unwrap();
        write(&client, &both[..cut]);
        // Waits before sending the rest, or one read could return both parts.
        harness::wait_until_taken(&client);
        let whole = if cut < 17 { 0 } else { 17 };
        assert_eq!(read(&client, whole), both[..whole]);
        write(&client, &both[cut..]);
        assert_eq!(read(&client, both.len() - whole), both[whole..]);
    }
}

#[test]
fn pipelined_messages_are_answered_in_order() {
    let server = Server::start(EXE);
    let mut bytes = Vec::new();
    for n in 0..50_000_i32 {
        bytes.extend(frame(10 + n, &n.to_le_bytes()[..n as usize % 4]));
    }
    for n in [MAX_PAYLOAD, 1, 30_000, 0, 40_000, MAX_PAYLOAD, 5] {
        bytes.extend(frame(9, &pattern(n, 3)));
    }
    assert!(exchange(&server.connect(), bytes.clone()) == bytes);
}

/// The trace of the reactor's steps shows it.
#[test]
fn the_replies_to_one_read_leave_in_one_write() {
    harness::chapter_only!("it reads the chapter's trace");
    let mut command = std::process::Command::new(EXE);
    command.args(["--addr", "127.0.0.1:0"]).env("RUST_LOG", "trace");
    let server = Server::from(&mut command);
    let client = server.connect();
    let messages = frame(1, b"one of ten").repeat(10);
    assert_echo(&client, &messages);
    server.wait_for_log("write: 180 of 180 bytes");
    assert_eq!(server.log().matches("write: ").count(), 1, "{}", server.log());
}

/// The C++ v0.4 aborts here.
#[test]
fn an_empty_message_is_a_message() {
    let server = Server::start(EXE);
    let client = server.connect();
    assert_echo(&client, &frame(4, b""));
    assert_echo(&client, &[frame(4, b""), frame(5, b"x"), frame(6, b"")].concat());
}

/// The C++ v0.4 loses the replies to valid messages before a bad one.
#[test]
fn a_bad_length_ends_the_connection_after_earlier_replies() {
    let server = Server::start(EXE);
    for length in [-1, i32::MIN, MAX_PAYLOAD as i32 + 1, i32::MAX] {
        let client = server.connect();
        let peer = client.local_addr().unwrap();
        let good = [frame(1, b"good"), frame(4, &pattern(50_000, 1))].concat();
        write(&client, &[good.clone(), bad_frame(length), b"garbage".to_vec()].concat());
        assert!(read_to_end(&client) == good);
        server.wait_for_log(&format!("{peer}: refused: message length {length} is not within"));
        server.assert_logged_once(&peer.to_string());
    }
    assert_serves(&server.connect());
}

/// There are megabytes of replies, and the client reads them slowly, once it has sent everything.
#[test]
fn a_refused_client_may_read_slowly() {
    let server = Server::start(EXE);
    let good = frame(1, &pattern(60_000, 1)).repeat(50);
    for garbage in [0, 10_000_000] {
        let client = server.connect();
        harness::narrow(&client);
        write(&client, &[&good[..], &bad_frame(-1), &pattern(garbage, 2)].concat());
        client.shutdown(Shutdown::Write).unwrap();
        assert!(harness::read_slowly(&client) == good, "{garbage} bytes of garbage");
    }
}

/// Valid messages and a bad one in one segment: one read returns them all.
#[test]
fn messages_in_one_segment_with_a_bad_length_are_answered() {
    let server = Server::start(EXE);
    let client = server.connect();
    let good = frame(7, b"x").repeat(400);
    write(&client, &[&good[..], &bad_frame(1 << 20)].concat());
    assert_eq!(read_to_end(&client), good);
}

/// The kernel has taken all replies at once, but the client has not read them. It sends something
/// now and then, so the server must not give up on it.
#[test]
fn a_refused_client_that_reads_late_and_keeps_sending_gets_everything() {
    let server = Server::start(EXE);
    let client = server.connect();
    harness::narrow(&client);
    let good = frame(1, &pattern(1000, 1)).repeat(400);
    write(&client, &[&good[..], &bad_frame(-1)].concat());
    let begin = std::time::Instant::now();
    while begin.elapsed() < std::time::Duration::from_secs(7) {
        write(&client, b"still here");
        std::thread::sleep(harness::QUIET);
    }
    assert!(read_to_end(&client) == good);
}

/// The server discards its bytes as they arrive, without growing, and goes on serving others.
#[test]
fn a_refused_client_that_keeps_sending_costs_nothing() {
    let server = Server::start(EXE);
    let client = server.connect();
    write(&client, &[frame(1, b"good"), bad_frame(-1)].concat());
    assert_eq!(read_to_end(&client), frame(1, b"good"));
    let (fds, before) = (server.fds(), server.status("VmRSS"));
    for _ in 0..100 {
        write(&client, &pattern(1_000_000, 1));
    }
    assert_serves(&server.connect());
    let grown = server.status("VmRSS").saturating_sub(before);
    assert!(grown < 256, "by {grown} KiB");
    drop(client);
    wait_until("it is closed", || server.fds() == fds - 1);
}

/// The client reads at the pace of a bad line, from megabytes in the server's buffer and in the
/// kernel's, and sends something meanwhile. No fixed time limit would be long enough.
#[test]
fn a_refused_client_may_be_slow_and_keep_sending() {
    let server = Server::start(EXE);
    let client = server.connect();
    harness::narrow(&client);
    let good = frame(1, &pattern(60_000, 1)).repeat(50);
    write(&client, &[&good[..], &bad_frame(-1)].concat());
    let mut received = Vec::new();
    while received.len() < good.len() {
        write(&client, b"still here");
        received.extend(read(&client, 30_004));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    received.extend(read_to_end(&client));
    assert!(received == good);
}

#[test]
fn text_is_refused() {
    let server = Server::start(EXE);
    for text in ["hello world, is this on?", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let client = server.connect();
        write(&client, text.as_bytes());
        assert_eq!(read_to_end(&client), b"");
        let length = i32::from_le_bytes(text.as_bytes()[4..8].try_into().unwrap());
        server.wait_for_log(&format!("message length {length} is not within 0 to 65527"));
    }
}

#[test]
fn the_end_of_the_stream_inside_a_message_is_logged() {
    let server = Server::start(EXE);
    for n in [1, 8, 12] {
        let client = server.connect();
        let peer = client.local_addr().unwrap();
        write(&client, &[&frame(1, b"whole")[..], &frame(4, b"not whole")[..n]].concat());
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&client), frame(1, b"whole"));
        server.wait_for_log(&format!("{peer}: closed inside a message, {n} bytes into it"));
    }
}

/// A stopping server reads what has arrived, but no more than the high-water mark allows.
#[test]
fn stopping_takes_no_more_memory_than_serving() {
    harness::chapter_only!("it reads the chapter's log");
    let mut server = Server::start(EXE);
    let deaf = server.connect();
    harness::send_until_stuck(&deaf, &frame(1, &pattern(1000, 1)).repeat(64_000));
    server.signal(harness::Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    let log = server.wait_for_log("stopped; cut off: 1");
    let peak = log.strip_suffix(" B peak").and_then(|log| log.rsplit(' ').next()).unwrap();
    assert!(peak.parse::<u64>().unwrap() <= CHAPTER.stuck_kib * 1024, "{log}");
}
