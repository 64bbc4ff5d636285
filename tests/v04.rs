//! Chapter 4 from outside: it echoes messages, whatever the pieces in which they come.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::thread;

use harness::{Server, exchange, pattern, read, read_to_end, wait_until, write};
use nix::sys::signal::Signal;

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v04");
const MAX_PAYLOAD: usize = 65_527;

harness::every_server!(EXE, assert_serves);

fn frame(id: i32, payload: &[u8]) -> Vec<u8> {
    let length = i32::try_from(payload.len()).unwrap();
    [&id.to_le_bytes(), &length.to_le_bytes(), payload].concat()
}

fn bad_frame(length: i32) -> Vec<u8> {
    [1_i32.to_le_bytes(), length.to_le_bytes()].concat()
}

#[track_caller]
fn assert_echo(client: &TcpStream, bytes: &[u8]) {
    harness::assert_echo(client, bytes);
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
fn a_message_may_come_byte_by_byte() {
    let server = Server::start(EXE);
    let client = server.connect();
    client.set_nodelay(true).unwrap();
    let message = frame(7, b"piece by piece");
    for byte in &message {
        write(&client, &[*byte]);
    }
    assert_eq!(read(&client, message.len()), message);
}

/// The sticky packets that this chapter is about.
#[test]
fn messages_may_come_stuck_together_and_cut_anywhere() {
    let server = Server::start(EXE);
    let both = [frame(1, b"the first"), frame(2, b"the second")].concat();
    for cut in 0..both.len() {
        let client = server.connect();
        client.set_nodelay(true).unwrap();
        write(&client, &both[..cut]);
        // As much as is whole is answered before the rest is sent, or the two parts could meet.
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
    for n in 0..50_000 {
        bytes.extend(frame(n, &n.to_le_bytes()[..n as usize % 4]));
    }
    for n in [MAX_PAYLOAD, 1, 30_000, 0, 40_000, MAX_PAYLOAD, 5] {
        bytes.extend(frame(9, &pattern(n, 3)));
    }
    assert!(exchange(&server.connect(), bytes.clone()) == bytes);
}

/// The C++ v0.4 aborts on it.
#[test]
fn an_empty_message_is_a_message() {
    let server = Server::start(EXE);
    let client = server.connect();
    assert_echo(&client, &frame(3, b""));
    assert_echo(&client, &[frame(3, b""), frame(4, b"x"), frame(5, b"")].concat());
}

/// The C++ v0.4 loses the replies to valid messages before a bad one.
#[test]
fn a_bad_length_ends_the_connection_after_the_replies_before_it() {
    let server = Server::start(EXE);
    for length in [-1, i32::MIN, MAX_PAYLOAD as i32 + 1, i32::MAX] {
        let client = server.connect();
        let peer = client.local_addr().unwrap();
        let good = [frame(1, b"good"), frame(2, &pattern(50_000, 1))].concat();
        write(&client, &[good.clone(), bad_frame(length), b"garbage".to_vec()].concat());
        assert!(read_to_end(&client) == good);
        server.wait_for_log(&format!("{peer}: refused: message length {length} is not within"));
        assert_eq!(server.log().matches(&peer.to_string()).count(), 1, "{}", server.log());
    }
    assert_serves(&server.connect());
}

/// Megabytes that the client reads late, and goes on sending: the replies still come to the last
/// byte.
#[test]
fn a_refused_client_may_take_its_time_to_read() {
    let server = Server::start(EXE);
    let client = server.connect();
    let good = frame(1, &pattern(60_000, 1)).repeat(60);
    let garbage = pattern(10_000_000, 2);
    write(&client, &[&good[..], &bad_frame(-1), &garbage].concat());
    client.shutdown(Shutdown::Write).unwrap();
    assert!(read_to_end(&client) == good);
}

#[test]
fn a_refused_client_that_keeps_sending_is_cut_off() {
    let server = Server::start(EXE);
    let before = server.fds();
    let mut client = server.connect();
    write(&client, &[frame(1, b"good"), bad_frame(-1)].concat());
    assert_eq!(read_to_end(&client), frame(1, b"good"));
    while client.write_all(&[b'x'; 65536]).is_ok() {}
    wait_until("it is closed", || server.fds() == before);
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
        write(&client, &[&frame(1, b"whole")[..], &frame(2, b"not whole")[..n]].concat());
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_to_end(&client), frame(1, b"whole"));
        server.wait_for_log(&format!("{peer}: closed inside a message, {n} bytes into it"));
    }
}

#[test]
fn pending_replies_go_out_after_the_fin() {
    let server = Server::start(EXE);
    let client = server.connect();
    let bytes = frame(1, &pattern(60_000, 1)).repeat(10);
    server.signal(Signal::SIGSTOP);
    write(&client, &bytes);
    client.shutdown(Shutdown::Write).unwrap();
    server.signal(Signal::SIGCONT);
    assert!(read_to_end(&client) == bytes);
}

/// Sends messages without reading until nothing more is taken, and returns what has been sent.
fn stuff(mut client: &TcpStream) -> Vec<u8> {
    let bytes = frame(1, &pattern(1000, 7)).repeat(64 << 10);
    client.set_write_timeout(Some(harness::QUIET)).unwrap();
    let mut sent = 0;
    while let Ok(n) = client.write(&bytes[sent..]) {
        sent += n;
    }
    client.set_write_timeout(Some(harness::LIMIT)).unwrap();
    assert!(sent < bytes.len(), "all {sent} bytes have been taken, and none read");
    bytes[..sent].to_vec()
}

#[test]
fn a_client_that_never_reads_is_bounded_and_disturbs_nobody() {
    let server = Server::start(EXE);
    let other = server.connect();
    assert_echo(&other, &frame(1, b"before"));
    let before = server.status("VmRSS");
    let deaf = server.connect();
    let sent = stuff(&deaf);
    assert_echo(&other, &frame(1, b"after"));
    let after = server.status("VmRSS");
    assert!(after < before + 2048, "{before} kB before, {after} kB after");
    let cpu = server.cpu();
    thread::sleep(harness::QUIET);
    assert!(server.cpu() - cpu < harness::QUIET / 10, "it spins");
    // It goes on where it stopped when the client reads.
    deaf.shutdown(Shutdown::Write).unwrap();
    let replies = read_to_end(&deaf);
    assert!(replies == sent[..sent.len() - sent.len() % 1008]);
}

#[test]
fn a_reset_ends_one_connection_and_is_logged() {
    let server = Server::start(EXE);
    let client = server.connect();
    let peer = client.local_addr().unwrap();
    write(&client, &frame(1, b"not read"));
    server.signal(Signal::SIGSTOP);
    harness::reset(client);
    server.signal(Signal::SIGCONT);
    server.wait_for_log(&format!("{peer}: dropped: "));
    assert_serves(&server.connect());
}

#[test]
fn stops_on_sigint_and_sigterm_with_what_is_pending_delivered() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut server = Server::start(EXE);
        let idle = server.connect();
        assert_echo(&idle, &frame(1, b"hello"));
        let late = server.connect();
        let sent = stuff(&late);
        server.signal(signal);
        // What is in the server's own buffer and in the kernel's: whole replies, in order.
        let replies = read_to_end(&late);
        assert!(replies.len() > 100_000 && sent.starts_with(&replies));
        assert_eq!(read_to_end(&idle), b"");
        drop(late);
        assert_eq!(server.wait().code(), Some(0));
        server.wait_for_log("stopped; connections cut off: 0; buffers: 0 B in use");
    }
}

/// More clients than fds, as in chapter 3.
#[test]
fn serves_whom_it_has_when_it_is_out_of_fds() {
    let server = Server::start_under(EXE, "-n 20");
    let clients: Vec<TcpStream> = (0..40).map(|_| server.connect()).collect();
    server.wait_for_log("cannot accept: Too many open files");
    for client in clients {
        assert_serves(&client);
    }
    assert_eq!(server.log().matches("cannot accept").count(), 1);
}
