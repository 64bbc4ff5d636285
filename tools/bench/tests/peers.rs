//! The peers do the same as the chapters.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::time::Duration;

use bench::target::{self, Target};

const PEERS: [&str; 4] = [
    env!("CARGO_BIN_EXE_floor"),
    env!("CARGO_BIN_EXE_peer-mio"),
    env!("CARGO_BIN_EXE_peer-tokio"),
    env!("CARGO_BIN_EXE_peer-tokio-codec"),
];

/// Data and the end of the stream may arrive in one event, with more bytes than fit one read.
#[test]
fn everything_comes_back_after_a_half_close() {
    let (cpu, _) = target::processors().unwrap();
    for peer in PEERS {
        let target = Target::start(Command::new(peer), Some(cpu)).unwrap();
        for length in [1, 65_527] {
            for _ in 0..20 {
                let mut message = common::message::encode_header(1, length).unwrap().to_vec();
                message.resize(message.len() + length, 7);
                let mut client = TcpStream::connect(target.addr).unwrap();
                client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                client.write_all(&message).unwrap();
                client.shutdown(Shutdown::Write).unwrap();
                let mut reply = Vec::new();
                client.read_to_end(&mut reply).unwrap_or_else(|err| panic!("{peer}: {err}"));
                assert!(reply == message, "{peer}");
            }
        }
    }
}
