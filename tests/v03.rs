//! Chapter 3 from outside: it echoes, to all clients at once.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::TcpStream;

use harness::every_reactor::Chapter;
use harness::{Server, assert_echo, exchange, pattern, read_to_end, send_fin};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v03");

/// One block of up to 64 KiB; the smaller ones before it stay in the pool.
const CHAPTER: Chapter = Chapter {
    exe: EXE,
    message: <[u8]>::to_vec,
    stuck_kib: 64 + 16 + 4,
    midway_kib: 64 + 16 + 4,
    idle: 300,
};

harness::every_server!(EXE, assert_serves);
harness::every_reactor!(CHAPTER);

#[track_caller]
fn assert_serves(client: &TcpStream) {
    assert_echo(client, b"hello");
    send_fin(client);
    harness::assert_bytes(read_to_end(client), b"");
}

/// The sizes around those of the pool's blocks. (The C++ v0.3 crashes on 128 to 255 bytes.)
#[test]
fn echoes_any_number_of_bytes() {
    let server = Server::start(EXE);
    for n in [0, 1, 128, 255, 4095, 4096, 4097, 16384, 16385, 65536, 65537, 300_000, 20_000_000] {
        let bytes = pattern(n, n as u64);
        harness::assert_bytes(exchange(&server.connect(), bytes.clone()), &bytes);
    }
}
