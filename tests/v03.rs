//! Chapter 3 from outside: it echoes, to all clients at once.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::{Shutdown, TcpStream};
use std::thread;

use harness::{
    Server, assert_echo, exchange, pattern, read, read_to_end, stuff, wait_until, write,
};
use nix::sys::signal::Signal;

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v03");

harness::every_server!(EXE, assert_serves);

#[track_caller]
fn assert_serves(client: &TcpStream) {
    assert_echo(client, b"hello");
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(client), b"");
}

/// The sizes around every class of blocks. (The C++ v0.3 crashes on 128 to 255 bytes.)
#[test]
fn echoes_any_number_of_bytes() {
    let server = Server::start(EXE);
    for n in [0, 1, 128, 255, 4095, 4096, 4097, 16384, 16385, 65536, 65537, 300_000, 20_000_000] {
        let bytes = pattern(n, n as u64);
        assert!(exchange(&server.connect(), bytes.clone()) == bytes, "{n} bytes");
    }
}

/// The C++ v0.3 has one buffer for all clients, and mixes up two of one batch.
#[test]
fn every_client_gets_its_own_bytes_back() {
    let server = Server::start(EXE);
    let clients: Vec<_> = (0..200).map(|n| (server.connect(), pattern(1000, n))).collect();
    for _ in 0..5 {
        server.signal(Signal::SIGSTOP);
        for (client, bytes) in &clients {
            write(client, bytes);
        }
        server.signal(Signal::SIGCONT);
        for (client, bytes) in &clients {
            assert_eq!(&read(client, bytes.len()), bytes);
        }
    }
}

/// What chapter 2 cannot do.
#[test]
fn the_second_client_does_not_wait() {
    let server = Server::start(EXE);
    let first = server.connect();
    assert_echo(&first, b"first");
    let second = server.connect();
    assert_echo(&second, b"second");
    assert_echo(&first, b"still first");
}

#[test]
fn what_came_before_the_fin_goes_back_after_it() {
    let server = Server::start(EXE);
    let client = server.connect();
    server.signal(Signal::SIGSTOP);
    write(&client, b"data and FIN in one batch");
    client.shutdown(Shutdown::Write).unwrap();
    server.signal(Signal::SIGCONT);
    assert_eq!(read_to_end(&client), b"data and FIN in one batch");
}

#[test]
fn a_client_that_never_reads_costs_one_block_and_nobody_else_anything() {
    let server = Server::start(EXE);
    let before = server.status("VmRSS");
    let deaf: Vec<_> = (0..4).map(|_| server.connect()).collect();
    let sent: Vec<_> = deaf.iter().map(stuff).collect();
    assert_serves(&server.connect());
    let after = server.status("VmRSS");
    assert!(after < before + 4 * 64 + 512, "{before} kB before, {after} kB after");
    let cpu = server.cpu();
    thread::sleep(harness::QUIET);
    assert!(server.cpu() - cpu < harness::QUIET / 10, "it spins");
    // And it is all there when they do read.
    for (client, sent) in deaf.iter().zip(sent) {
        client.shutdown(Shutdown::Write).unwrap();
        assert!(read_to_end(client) == sent);
    }
}

#[test]
fn a_reset_ends_one_connection_and_is_logged() {
    let server = Server::start(EXE);
    let other = server.connect();
    let client = server.connect();
    let peer = client.local_addr().unwrap();
    assert_echo(&client, b"hello");
    harness::reset(client);
    server.wait_for_log(&format!("{peer}: dropped: Connection reset by peer"));
    assert_serves(&other);
}

#[test]
fn nothing_of_a_client_stays_behind() {
    let server = Server::start(EXE);
    let before = server.fds();
    for n in 0..500 {
        let client = server.connect();
        match n % 3 {
            0 => assert_serves(&client),
            1 => stuff_a_little(client),
            _ => harness::reset(client),
        }
    }
    wait_until("all are closed", || server.fds() == before);
    assert_stops_with_nothing_in_use(server, Signal::SIGTERM);
}

fn stuff_a_little(client: TcpStream) {
    write(&client, &pattern(10_000, 1));
}

#[track_caller]
fn assert_stops_with_nothing_in_use(mut server: Server, signal: Signal) {
    server.signal(signal);
    assert_ends_with_nothing_in_use(&mut server);
}

#[track_caller]
fn assert_ends_with_nothing_in_use(server: &mut Server) {
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("stopped; connections cut off: 0; buffers: 0 B in use");
}

#[test]
fn stops_on_sigint_and_sigterm() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let server = Server::start(EXE);
        let idle = server.connect();
        assert_echo(&idle, b"hello");
        assert_stops_with_nothing_in_use(server, signal);
        assert_eq!(read_to_end(&idle), b"");
    }
}

#[test]
fn echoes_what_came_before_the_signal() {
    let mut server = Server::start(EXE);
    let client = server.connect();
    assert_echo(&client, b"hello");
    server.signal(Signal::SIGSTOP);
    write(&client, b"just in time");
    server.signal(Signal::SIGTERM);
    server.signal(Signal::SIGCONT);
    assert_eq!(read_to_end(&client), b"just in time");
    assert_ends_with_nothing_in_use(&mut server);
}

#[test]
fn a_client_that_never_reads_does_not_keep_it_from_stopping() {
    let mut server = Server::start(EXE);
    let deaf = server.connect();
    stuff(&deaf);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("stopped; connections cut off: 1");
}

/// More clients than fds: those who are in are served, the others wait until somebody leaves. One
/// line in the log, and no spinning. (The C++ course's servers spin or exit.)
#[test]
fn serves_whom_it_has_when_it_is_out_of_fds() {
    let server = Server::start_under(EXE, "-n 20");
    let clients: Vec<TcpStream> = (0..40).map(|_| server.connect()).collect();
    server.wait_for_log("cannot accept: Too many open files");
    assert_echo(&clients[0], b"one of the first");
    let cpu = server.cpu();
    thread::sleep(harness::QUIET);
    assert!(server.cpu() - cpu < harness::QUIET / 10, "it spins");
    assert_eq!(server.log().matches("cannot accept").count(), 1);
    for client in clients {
        assert_serves(&client);
    }
    server.wait_for_log("accepting again");
    assert_eq!(server.log().matches("cannot accept").count(), 1);
}

#[test]
fn ten_thousand_idle_clients_hold_no_blocks() {
    harness::raise_fd_limit();
    let server = Server::start(EXE);
    let clients: Vec<TcpStream> = (0..10_000).map(|_| server.connect()).collect();
    for client in [&clients[0], &clients[5_000], &clients[9_999]] {
        assert_echo(client, b"hello");
    }
    drop(clients);
    assert_stops_with_nothing_in_use(server, Signal::SIGTERM);
}
