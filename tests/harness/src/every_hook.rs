//! The promises of every server with hooks, from chapter 7 on, and of its client.
//! [`every_hook!`](crate::every_hook!) turns each promise into a test.

use std::net::TcpListener;
use std::thread;

use crate::every_reactor::Chapter;
use crate::{
    Server, Signal, assert_bytes, frame, is_other, read, read_to_end, reset, run_client, send_fin,
    served, wait_until, write,
};

/// One test per promise, for the [`Chapter`] `$chapter` and the binary of its client `$client`, with
/// options for it if there are any.
#[macro_export]
macro_rules! every_hook {
    ($chapter:expr, $client:expr, [$($promise:ident),* $(,)?]) => {
        mod every_hook {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_hook::$promise($chapter, $client);
                }
            )*
        }
    };
    ($chapter:expr, $client:expr $(, $option:literal)*) => {
        harness::every_hook!($chapter, &[$client $(, $option)*], [
            the_hooks_count_the_connections_however_they_end,
            the_welcome_comes_before_any_reply,
            a_welcome_is_at_most_as_long_as_a_payload,
            a_client_that_loses_its_server_says_goodbye_too,
            the_client_prints_its_welcome_and_says_goodbye,
            the_client_prints_messages_with_any_id,
        ]);
    };
}

/// The numbers that the hooks have logged.
fn counts(server: &Server, hook: &str) -> Vec<usize> {
    let log = server.log();
    let texts =
        log.lines().filter_map(|line| line.split_once(hook)?.1.strip_prefix(": connections: "));
    // A chapter may log more after the number.
    texts.map(|text| text.split(';').next().unwrap().parse().unwrap()).collect()
}

pub fn the_hooks_count_the_connections_however_they_end(chapter: Chapter, _: &[&str]) {
    crate::chapter_only!("it reads the chapter's log");
    let options = ["--max-conns", "3", "--idle-timeout", "2"];
    let mut server = Server::start_talkative(chapter.exe, &options);
    let mut clients = [(); 3].map(|()| served(server.addr())).into_iter();
    wait_until("all have started", || counts(&server, "on_conn_start") == [1, 2, 3]);
    // A refused client has neither hook.
    assert_bytes(read_to_end(&server.connect()), frame(-1, b"server is full"));
    let half_closed = clients.next().unwrap();
    send_fin(&half_closed);
    wait_until("the first is counted", || counts(&server, "on_conn_close") == [2]);
    reset(clients.next().unwrap());
    wait_until("the second is counted", || counts(&server, "on_conn_close") == [2, 1]);
    wait_until("the third is counted", || counts(&server, "on_conn_close") == [2, 1, 0]);
    server.wait_for_log("idle connections closed: 1");
    let bad = server.connect();
    write(&bad, &[1_i32.to_le_bytes(), (-1_i32).to_le_bytes()].concat());
    wait_until("the fourth is counted", || counts(&server, "on_conn_close").len() == 4);
    let last = served(server.addr());
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("stopped; ");
    drop(last);
    assert_eq!(counts(&server, "on_conn_start"), [1, 2, 3, 1, 1]);
    assert_eq!(counts(&server, "on_conn_close"), [2, 1, 0, 0, 0]);
}

pub fn the_welcome_comes_before_any_reply(chapter: Chapter, _: &[&str]) {
    let server = Server::start_with(chapter.exe, &["--welcome", "hello there"]);
    for _ in 0..50 {
        let client = server.connect();
        write(&client, &frame(1, b"pipelined").repeat(10));
        send_fin(&client);
        let expected = [frame(101, b"hello there"), frame(1, b"pipelined").repeat(10)].concat();
        assert_bytes(read_to_end(&client), &expected);
    }
    let silent = server.connect();
    assert_bytes(read(&silent, 19), frame(101, b"hello there"));
}

pub fn a_welcome_is_at_most_as_long_as_a_payload(chapter: Chapter, _: &[&str]) {
    let longest = "x".repeat(65_527);
    let server = Server::start_with(chapter.exe, &["--welcome", &longest]);
    assert_bytes(read(&server.connect(), 65_535), frame(101, longest.as_bytes()));
    let why = Server::fail(chapter.exe, "127.0.0.1:0", &["--welcome", &(longest + "x")], 2);
    assert!(why.contains("65527") || is_other(), "{why}");
}

pub fn a_client_that_loses_its_server_says_goodbye_too(_: Chapter, client: &[&str]) {
    crate::chapter_only!("it tests the chapter's client");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || drop(read(&listener.accept().unwrap().0, 19)));
    let output = run_client(client, &addr);
    server.join().unwrap();
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b"goodbye\n"[..]));
}

pub fn the_client_prints_its_welcome_and_says_goodbye(chapter: Chapter, client: &[&str]) {
    let server = Server::start_with(chapter.exe, &["--welcome", "hello there"]);
    let output = run_client(client, &server.addr().to_string());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let expected = "id=101 len=11 hello there\nid=1 len=11 hello lars!\ngoodbye\n";
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
}

pub fn the_client_prints_messages_with_any_id(_: Chapter, client: &[&str]) {
    crate::chapter_only!("it tests the chapter's client");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let messages = [frame(77, b"news"), frame(i32::MIN, b""), frame(1, b"hello lars!")];
        write(&stream, &messages.concat());
        read_to_end(&stream)
    });
    let output = run_client(client, &addr);
    let expected = "id=77 len=4 news\nid=-2147483648 len=0\nid=1 len=11 hello lars!\ngoodbye\n";
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let sent = [frame(1, b"hello lars!"), frame(2, b"hello lars!")].concat();
    assert_eq!(server.join().unwrap(), sent);
}
