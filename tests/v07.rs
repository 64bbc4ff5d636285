//! Chapter 7 from outside: the hooks, at both ends.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::Shutdown;
use std::process::Command;

use harness::every_messenger::assert_serves;
use harness::every_reactor::Chapter;
use harness::{Server, assert_echo, frame, read, read_to_end, reset, run, wait_until, write};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v07");
const CLIENT: &str = env!("CARGO_BIN_EXE_reactor-v07-client");

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
harness::every_messenger!(CHAPTER);
harness::every_limiter!(CHAPTER);
harness::every_router!(CHAPTER, CLIENT);

/// Starts it with a log of each connection.
#[track_caller]
fn start(options: &[&str]) -> Server {
    let mut command = Command::new(EXE);
    Server::from(command.args(["--addr", "127.0.0.1:0"]).args(options).env("RUST_LOG", "debug"))
}

/// The numbers that the hooks have logged.
fn counts(server: &Server, hook: &str) -> Vec<usize> {
    let log = server.log();
    let numbers = log.lines().filter_map(|line| line.split(hook).nth(1));
    numbers.map(|number| number.rsplit(' ').next().unwrap().parse().unwrap()).collect()
}

#[test]
fn the_hooks_count_the_connections_however_they_end() {
    harness::chapter_only!("it needs the chapter's own options and log");
    let mut server = start(&["--max-conns", "3", "--idle-timeout", "2"]);
    let clients: Vec<_> = (0..3).map(|_| server.connect()).collect();
    clients.iter().for_each(|client| assert_echo(client, &frame(1, b"hello")));
    wait_until("all have started", || counts(&server, "on_conn_start") == [1, 2, 3]);
    // A refused client has neither hook.
    assert_eq!(read_to_end(&server.connect()), frame(-1, b"server is full"));
    let mut clients = clients.into_iter();
    let half_closed = clients.next().unwrap();
    half_closed.shutdown(Shutdown::Write).unwrap();
    wait_until("the first is counted", || counts(&server, "on_conn_close") == [2]);
    reset(clients.next().unwrap());
    wait_until("the second is counted", || counts(&server, "on_conn_close") == [2, 1]);
    wait_until("the third is counted", || counts(&server, "on_conn_close") == [2, 1, 0]);
    server.wait_for_log("idle connections closed: 1");
    let bad = server.connect();
    write(&bad, &[1_i32.to_le_bytes(), (-1_i32).to_le_bytes()].concat());
    wait_until("the fourth is counted", || counts(&server, "on_conn_close").len() == 4);
    let last = server.connect();
    assert_echo(&last, &frame(1, b"hello"));
    server.signal(harness::Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("stopped; ");
    drop(last);
    assert_eq!(counts(&server, "on_conn_start"), [1, 2, 3, 1, 1]);
    assert_eq!(counts(&server, "on_conn_close"), [2, 1, 0, 0, 0]);
}

#[test]
fn the_welcome_comes_before_any_reply() {
    harness::chapter_only!("it needs the chapter's own options and log");
    let server = start(&["--welcome", "hello there"]);
    for _ in 0..50 {
        let client = server.connect();
        write(&client, &frame(1, b"pipelined").repeat(10));
        client.shutdown(Shutdown::Write).unwrap();
        let expected = [frame(101, b"hello there"), frame(1, b"pipelined").repeat(10)].concat();
        assert_eq!(read_to_end(&client), expected);
    }
    let silent = server.connect();
    assert_eq!(read(&silent, 19), frame(101, b"hello there"));
}

#[test]
fn a_welcome_is_at_most_as_long_as_a_payload() {
    harness::chapter_only!("it needs the chapter's own options and log");
    let longest = "x".repeat(65_527);
    let server = start(&["--welcome", &longest]);
    assert_eq!(read(&server.connect(), 65_535), frame(101, longest.as_bytes()));
    let output = run(EXE, &["--welcome", &(longest + "x")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("65527"));
}

#[test]
fn a_client_that_loses_its_server_says_goodbye_too() {
    harness::chapter_only!("it needs the chapter's own options and log");
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = std::thread::spawn(move || drop(read(&listener.accept().unwrap().0, 19)));
    let output = run(CLIENT, &["--addr", &addr]);
    server.join().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b"goodbye\n"[..]));
}

#[test]
fn the_client_prints_every_message_and_says_goodbye() {
    harness::chapter_only!("it needs the chapter's own options and log");
    let server = start(&["--welcome", "hello there"]);
    let output = run(CLIENT, &["--addr", &server.addr().to_string()]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let expected = "id=101 len=11 hello there\nid=1 len=11 hello lars!\ngoodbye\n";
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}
