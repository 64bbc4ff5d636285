//! Chapter 2 from outside: it echoes, to one client at a time.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::TcpStream;

use harness::every_reactor::Chapter;
use harness::{
    Server, assert_echo, assert_silent, exchange, pattern, read_to_end, send_fin, write,
};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v02");

const CHAPTER: Chapter =
    Chapter { exe: EXE, message: <[u8]>::to_vec, stuck_kib: 64, midway_kib: 64, idle: 300 };

harness::every_server!(EXE, assert_serves);
// The promises of the event loop's chapters that do not concern many clients.
harness::every_reactor!(
    CHAPTER,
    [
        echoes_what_came_before_the_fin,
        echoes_stuck_bytes_after_the_fin,
        a_slow_reader_gets_everything,
        urgent_data_does_no_harm,
    ]
);

#[track_caller]
fn assert_serves(client: &TcpStream) {
    write(client, b"hello");
    send_fin(client);
    harness::assert_bytes(read_to_end(client), b"hello");
}

#[test]
fn echoes_as_it_goes() {
    let server = Server::start(EXE);
    let client = server.connect();
    for text in ["a", "hello Lars\n", "\0\r\n\u{ff}"] {
        assert_echo(&client, text.as_bytes());
    }
}

/// The sizes around those of the pool's blocks.
#[test]
fn echoes_any_number_of_bytes() {
    let server = Server::start(EXE);
    for n in [0, 1, 4095, 4096, 4097, 16384, 16385, 65536, 65537, 300_000, 20_000_000] {
        let bytes = pattern(n, n as u64);
        harness::assert_bytes(exchange(&server.connect(), bytes.clone()), &bytes);
    }
}

#[test]
fn memory_does_not_grow_with_the_bytes() {
    let server = Server::start(EXE);
    assert_serves(&server.connect());
    let before = server.status("VmRSS");
    exchange(&server.connect(), pattern(64 << 20, 1));
    server.assert_grown_at_most(1024, before);
}

/// This is the weakness of a blocking server, and the reason for the next chapter.
#[test]
fn the_second_client_waits_for_the_first_to_close() {
    let server = Server::start(EXE);
    let first = server.connect();
    assert_echo(&first, b"first");
    let second = server.connect();
    write(&second, b"second");
    assert_silent(&second);
    assert_echo(&first, b"first again");
    assert_silent(&second);
    drop(first);
    harness::assert_bytes(harness::read(&second, 6), b"second");
}

/// The server is blocked in a write at that time, and must not stay there.
#[test]
fn a_reset_while_it_cannot_write_ends_that_connection_only() {
    let server = Server::start(EXE);
    let fds = server.fds();
    let client = server.connect();
    harness::send_until_stuck(&client, &pattern(64 << 20, 1));
    harness::reset(client);
    assert_serves(&server.connect());
    harness::wait_until("both connections are closed", || server.fds() == fds);
}

/// The C++ v0.2 exits if a write runs into the reset.
#[test]
fn a_reset_ends_one_connection_and_is_logged() {
    let server = Server::start(EXE);
    let client = server.connect();
    let peer = client.local_addr().unwrap();
    assert_echo(&client, b"hello");
    harness::reset(client);
    server.wait_for_log(&format!("{peer}: dropped: Connection reset by peer"));
    assert_serves(&server.connect());
}

#[test]
fn waits_when_out_of_fds() {
    harness::chapter_only!("it counts the chapter's fds");
    let server = Server::start_under(EXE, "-Sn 5");
    let client = server.connect();
    server.wait_for_log("cannot accept: Too many open files");
    assert_silent(&client);
    assert_eq!(server.log().matches("cannot accept").count(), 1);
    server.allow_fds(10);
    assert_serves(&client);
}
