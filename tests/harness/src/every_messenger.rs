//! The promises of every server that speaks in messages, from chapter 4 on, for messages with id 1.
//! [`every_messenger!`](crate::every_messenger!) turns each promise into a test.

use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::every_reactor::Chapter;
use crate::{
    QUIET, Server, assert_bytes, assert_echo, assert_silent, exchange, frame, narrow, pattern,
    read, read_slowly, read_to_end, send_fin, wait_until, wait_until_taken, write,
};

/// The longest payload.
pub const MAX_PAYLOAD: usize = 65_527;

/// One test per promise, for the [`Chapter`] `$chapter`.
#[macro_export]
macro_rules! every_messenger {
    ($chapter:expr, [$($promise:ident),* $(,)?]) => {
        mod every_messenger {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_messenger::$promise($chapter);
                }
            )*
        }
    };
    ($chapter:expr) => {
        harness::every_messenger!($chapter, [
            echoes_a_message_of_any_length,
            a_message_may_arrive_byte_by_byte,
            messages_may_arrive_joined_and_split_anywhere,
            pipelined_messages_are_answered_in_order,
            the_replies_to_one_read_leave_in_one_write,
            an_empty_message_is_a_message,
            a_bad_length_ends_the_connection_after_earlier_replies,
            a_refused_client_may_read_slowly,
            messages_in_one_segment_with_a_bad_length_are_answered,
            a_refused_client_that_reads_late_and_keeps_sending_gets_everything,
            a_refused_client_that_keeps_sending_costs_nothing,
            a_refused_client_may_be_slow_and_keep_sending,
            text_is_refused,
            the_end_of_the_stream_inside_a_message_is_logged,
            stopping_takes_no_more_memory_than_serving,
        ]);
    };
}

/// A client that sends a message, then closes its side, is served.
#[track_caller]
pub fn assert_serves(client: &TcpStream) {
    assert_echo(client, &frame(1, b"hello"));
    send_fin(client);
    assert_bytes(read_to_end(client), b"");
}

fn bad_frame(length: i32) -> Vec<u8> {
    [1_i32.to_le_bytes(), length.to_le_bytes()].concat()
}

pub fn echoes_a_message_of_any_length(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    for n in [0, 1, 8, 4087, 4088, 4089, 16_376, 16_377, 40_000, MAX_PAYLOAD - 1, MAX_PAYLOAD] {
        assert_echo(&client, &frame(1, &pattern(n, n as u64)));
    }
}

pub fn a_message_may_arrive_byte_by_byte(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    client.set_nodelay(true).unwrap();
    let message = frame(1, b"xy");
    let (last, others) = message.split_last().unwrap();
    for byte in others {
        write(&client, &[*byte]);
        wait_until_taken(&client);
    }
    assert_silent(&client);
    write(&client, &[*last]);
    assert_bytes(read(&client, message.len()), &message);
}

/// Some call these sticky packets: they are what this chapter is about.
pub fn messages_may_arrive_joined_and_split_anywhere(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let both = [frame(1, b"the first"), frame(1, b"the second")].concat();
    for cut in 0..both.len() {
        let client = server.connect();
        client.set_nodelay(true).unwrap();
        write(&client, &both[..cut]);
        // Waits before sending the rest, or one read could return both parts.
        wait_until_taken(&client);
        let whole = if cut < 17 { 0 } else { 17 };
        assert_bytes(read(&client, whole), &both[..whole]);
        write(&client, &both[cut..]);
        assert_bytes(read(&client, both.len() - whole), &both[whole..]);
    }
}

pub fn pipelined_messages_are_answered_in_order(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let mut bytes = Vec::new();
    for n in 0..50_000_i32 {
        bytes.extend(frame(1, &n.to_le_bytes()[..n as usize % 4]));
    }
    for n in [MAX_PAYLOAD, 1, 30_000, 0, 40_000, MAX_PAYLOAD, 5] {
        bytes.extend(frame(1, &pattern(n, 3)));
    }
    assert_bytes(exchange(&server.connect(), bytes.clone()), &bytes);
}

/// The trace of the reactor's steps shows it.
pub fn the_replies_to_one_read_leave_in_one_write(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's trace");
    let mut command = Command::new(chapter.exe);
    command.args(["--addr", "127.0.0.1:0"]).env("RUST_LOG", "trace");
    let server = Server::from(&mut command);
    let client = server.connect();
    let messages = frame(1, b"one of ten").repeat(10);
    assert_echo(&client, &messages);
    server.wait_for_log("write: 180 of 180 bytes");
    assert_eq!(server.log().matches("write: ").count(), 1, "{}", server.log());
}

/// The C++ v0.4 aborts here.
pub fn an_empty_message_is_a_message(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    assert_echo(&client, &frame(1, b""));
    assert_echo(&client, &[frame(1, b""), frame(1, b"x"), frame(1, b"")].concat());
}

/// The C++ v0.4 loses the replies to valid messages before a bad one.
pub fn a_bad_length_ends_the_connection_after_earlier_replies(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    for length in [-1, i32::MIN, MAX_PAYLOAD as i32 + 1, i32::MAX] {
        let client = server.connect();
        let peer = client.local_addr().unwrap();
        let good = [frame(1, b"good"), frame(1, &pattern(50_000, 1))].concat();
        write(&client, &[good.clone(), bad_frame(length), b"garbage".to_vec()].concat());
        assert_bytes(read_to_end(&client), &good);
        server.wait_for_log(&format!("{peer}: refused: message length {length} is not within"));
        server.assert_logged_once(&peer.to_string());
    }
    assert_serves(&server.connect());
}

/// There are megabytes of replies, and the client reads them slowly, once it has sent everything.
pub fn a_refused_client_may_read_slowly(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let good = frame(1, &pattern(60_000, 1)).repeat(50);
    for garbage in [0, 10_000_000] {
        let client = server.connect();
        narrow(&client);
        write(&client, &[&good[..], &bad_frame(-1), &pattern(garbage, 2)].concat());
        send_fin(&client);
        assert!(read_slowly(&client) == good, "{garbage} bytes of garbage");
    }
}

/// Valid messages and a bad one in one segment: one read returns them all.
pub fn messages_in_one_segment_with_a_bad_length_are_answered(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    let good = frame(1, b"x").repeat(400);
    write(&client, &[&good[..], &bad_frame(1 << 20)].concat());
    assert_bytes(read_to_end(&client), good);
}

/// The kernel has taken all replies at once, but the client has not read them. It sends something
/// now and then, so the server must not give up on it.
pub fn a_refused_client_that_reads_late_and_keeps_sending_gets_everything(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    narrow(&client);
    let good = frame(1, &pattern(1000, 1)).repeat(400);
    write(&client, &[&good[..], &bad_frame(-1)].concat());
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(7) {
        write(&client, b"still here");
        thread::sleep(QUIET);
    }
    assert_bytes(read_to_end(&client), &good);
}

/// The server discards its bytes as they arrive, without growing, and goes on serving others.
pub fn a_refused_client_that_keeps_sending_costs_nothing(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    write(&client, &[frame(1, b"good"), bad_frame(-1)].concat());
    assert_bytes(read_to_end(&client), frame(1, b"good"));
    let (fds, before) = (server.fds(), server.status("VmRSS"));
    for _ in 0..100 {
        write(&client, &pattern(1_000_000, 1));
    }
    assert_serves(&server.connect());
    server.assert_grown_at_most(256, before);
    drop(client);
    wait_until("it is closed", || server.fds() == fds - 1);
}

/// The client reads at the pace of a bad line, from megabytes in the server's buffer and in the
/// kernel's, and sends something meanwhile. No fixed time limit would be long enough.
pub fn a_refused_client_may_be_slow_and_keep_sending(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    let client = server.connect();
    narrow(&client);
    let good = frame(1, &pattern(60_000, 1)).repeat(50);
    write(&client, &[&good[..], &bad_frame(-1)].concat());
    let mut received = Vec::new();
    while received.len() < good.len() {
        write(&client, b"still here");
        received.extend(read(&client, 30_004));
        thread::sleep(Duration::from_millis(20));
    }
    received.extend(read_to_end(&client));
    assert_bytes(&received, &good);
}

pub fn text_is_refused(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    for text in ["hello world, is this on?", "GET / HTTP/1.1\r\nHost: x\r\n\r\n"] {
        let client = server.connect();
        write(&client, text.as_bytes());
        assert_bytes(read_to_end(&client), b"");
        let length = i32::from_le_bytes(text.as_bytes()[4..8].try_into().unwrap());
        server.wait_for_log(&format!("message length {length} is not within 0 to 65527"));
    }
}

pub fn the_end_of_the_stream_inside_a_message_is_logged(chapter: Chapter) {
    let server = Server::start(chapter.exe);
    for n in [1, 8, 12] {
        let client = server.connect();
        let peer = client.local_addr().unwrap();
        write(&client, &[&frame(1, b"whole")[..], &frame(1, b"not whole")[..n]].concat());
        send_fin(&client);
        assert_bytes(read_to_end(&client), frame(1, b"whole"));
        server.wait_for_log(&format!("{peer}: closed inside a message, {n} bytes into it"));
    }
}

/// A stopping server reads what has arrived, but no more than the high-water mark allows.
pub fn stopping_takes_no_more_memory_than_serving(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's log");
    let mut server = Server::start(chapter.exe);
    let deaf = server.connect();
    chapter.stuff(&deaf);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    // What chapter 13 holds back is so little that the kernel may take it after all.
    let cut_off = if chapter.stuck_kib < 1024 { "" } else { "1" };
    let log = server.wait_for_log(&format!("stopped; cut off: {cut_off}"));
    let peak = log.strip_suffix(" B peak").and_then(|log| log.rsplit(' ').next()).unwrap();
    assert!(peak.parse::<u64>().unwrap() <= chapter.stuck_kib * 1024, "{log}");
}
