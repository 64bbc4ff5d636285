//! Chapter 1 from outside: it says hello to one client at a time, whatever the client does.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::net::TcpStream;
use std::thread;

use harness::{Server, Signal, assert_silent, read_to_end, send_fin, write};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v01");
const GREETING: &[u8] = b"hello Lars\n";

harness::every_server!(EXE, assert_greeted);

#[track_caller]
fn assert_greeted(client: &TcpStream) {
    harness::assert_bytes(read_to_end(client), GREETING);
}

#[test]
fn greets_and_closes() {
    let server = Server::start(EXE);
    for _ in 0..10 {
        assert_greeted(&server.connect());
    }
}

/// The C++ v0.1 never closes its clients' sockets.
#[test]
fn leaks_no_fds() {
    let server = Server::start(EXE);
    let before = server.fds();
    for _ in 0..100 {
        assert_greeted(&server.connect());
        harness::reset(server.connect());
    }
    harness::wait_until("all connections are closed", || server.fds() == before);
}

/// Closing with unread input would send a reset, which destroys the greeting.
#[test]
fn unread_input_does_not_cost_the_greeting() {
    let server = Server::start(EXE);
    for n in [1, 5000, 1_000_000] {
        // However fast the server is, it closes with the input unread.
        server.pause();
        let client = server.connect();
        write(&client, &harness::pattern(n, 1));
        send_fin(&client);
        server.signal(Signal::SIGCONT);
        assert_greeted(&client);
    }
}

#[test]
fn the_greeting_does_not_wait_for_the_client_to_close() {
    let server = Server::start(EXE);
    let client = server.connect();
    assert_greeted(&client);
}

#[test]
fn a_client_that_does_not_close_delays_the_next_one_only_briefly() {
    let server = Server::start(EXE);
    let silent = server.connect();
    assert_greeted(&silent);
    let next = server.connect();
    // Another program may have found a way not to delay it at all.
    if !harness::is_other() {
        assert_silent(&next);
    }
    assert_greeted(&next);
}

#[test]
fn a_client_that_keeps_sending_delays_the_next_one_only_briefly() {
    let server = Server::start(EXE);
    let mut flood = server.connect();
    let sender = thread::spawn(move || while flood.write_all(&[b'x'; 4096]).is_ok() {});
    let next = server.connect();
    assert_greeted(&next);
    sender.join().unwrap();
}

/// With one fd too few, the server logs it once and does not spin. The client is served as soon as
/// there is an fd. (The C++ v0.1 spins.)
#[test]
fn waits_when_out_of_fds() {
    harness::chapter_only!("it counts the chapter's fds");
    let server = Server::start_under(EXE, "-Sn 5");
    let client = server.connect();
    server.wait_for_log("cannot accept: Too many open files");
    let before = server.cpu();
    assert_silent(&client);
    assert!(server.cpu() - before < harness::QUIET / 10, "it spins");
    assert_eq!(server.log().matches("cannot accept").count(), 1);
    server.allow_fds(10);
    assert_greeted(&client);
}
