//! A server with another application: its replies are 200 times as long as the requests. From chapter 4 on.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use common::cli::Addr;
use harness::{frame, read, read_to_end, send_fin};

use crate::serve;

/// As many requests as fit one read: 64 KiB of them.
const REQUESTS: usize = 8192;

const REQUEST_LEN: usize = 8;

const REPLY_LEN: usize = 200 * REQUEST_LEN;

/// The id of the first request; the exercises give smaller ones a meaning.
const FIRST_ID: i32 = 10;

pub fn reply(id: i32) -> Vec<u8> {
    vec![id as u8; REPLY_LEN - REQUEST_LEN]
}

/// Starts a server on a thread, which ends with this process.
fn start() -> SocketAddr {
    // Finds a free port by taking it and giving it back.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let own: Addr = addr.to_string().parse().unwrap();
    thread::spawn(move || serve(&own).unwrap());
    harness::wait_until("it listens", || TcpStream::connect(addr).is_ok());
    addr
}

#[track_caller]
fn assert_answered(client: &TcpStream, requests: usize) {
    for id in FIRST_ID..FIRST_ID + requests as i32 {
        let expected = frame(id, &reply(id));
        assert!(read(client, expected.len()) == expected, "request {id} of {requests}");
    }
}

fn requests(n: usize) -> Vec<u8> {
    (FIRST_ID..FIRST_ID + n as i32).flat_map(|id| frame(id, b"")).collect()
}

/// Connects a client whose next requests are read all at once, because earlier reads were large.
#[track_caller]
fn connect(addr: SocketAddr) -> TcpStream {
    let client = harness::connect(addr);
    for _ in 0..4 {
        (&client).write_all(&requests(REQUESTS)).unwrap();
        assert_answered(&client, REQUESTS);
    }
    client
}

/// The peak memory of this process, in KiB.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// All 13 MB of replies together fit no block: the client would lose all of them.
#[test]
fn decoding_stops_at_the_high_water_mark_and_goes_on_below_it() {
    let client = connect(start());
    let before = peak_memory();
    (&client).write_all(&requests(REQUESTS)).unwrap();
    assert_answered(&client, REQUESTS);
    let grown = peak_memory() - before;
    assert!(grown < 4096, "by {grown} KiB");
    send_fin(&client);
    assert_eq!(read_to_end(&client), b"");
}

/// The end of the stream must not overtake the messages that are held back.
#[test]
fn messages_held_back_at_the_high_water_mark_are_answered_after_the_fin() {
    let client = connect(start());
    (&client).write_all(&requests(REQUESTS)).unwrap();
    send_fin(&client);
    assert_answered(&client, REQUESTS);
    assert_eq!(read_to_end(&client), b"");
}
