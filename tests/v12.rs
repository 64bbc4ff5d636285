//! Chapter 12 from outside: a session for each connection.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::TcpStream;

use harness::every_config::Conf;
use harness::every_messenger::assert_serves;
use harness::every_publisher::next_message;
use harness::every_reactor::Chapter;
use harness::every_udp::{connect_udp, receive};
use harness::{
    Random, Server, Signal, assert_echo, exchange, frame, pattern, read, read_to_end, reset,
    send_fin, served, write,
};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v12");
const CLIENT: &str = env!("CARGO_BIN_EXE_reactor-v12-client");

/// Replies of up to 1 MiB wait for a client that never reads; the smaller blocks that they have
/// grown through stay in the pool. Half a message of 60,000 bytes has grown from 4 KiB to 64 KiB.
const CHAPTER: Chapter = Chapter {
    exe: EXE,
    message: |payload| frame(1, payload),
    stuck_kib: 2048,
    midway_kib: 64 + 16 + 4,
    // As before, and a session: its 24 bytes and at most 16 more.
    idle: 340,
};

harness::every_server!(EXE, assert_serves);
harness::every_reactor!(CHAPTER);
harness::every_messenger!(CHAPTER);
harness::every_limiter!(CHAPTER);
harness::every_router!(CHAPTER, CLIENT, "--retry", "0", "--timeout", "30");
harness::every_hook!(CHAPTER, CLIENT, "--retry", "0", "--timeout", "30");
harness::every_pool!(CHAPTER);
harness::every_config!(CHAPTER);
harness::every_udp!(CHAPTER, CLIENT);
harness::every_publisher!(CHAPTER, b"anonymous: ");

/// The longest payload.
const LONGEST: usize = 65_527;

/// The longest nickname: 32 characters, 128 bytes.
const LONG_NAME: &str = "🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂🙂";

#[track_caller]
fn set_name(client: &TcpStream, name: &str) {
    assert_echo(client, &frame(4, name.as_bytes()));
}

/// Asks for the name and the count; the question counts too.
#[track_caller]
fn assert_session(client: &TcpStream, expected: &str) {
    write(client, &frame(5, b""));
    assert_next(client, 5, expected);
}

#[track_caller]
fn assert_next(client: &TcpStream, id: i32, text: &str) {
    let (got, payload) = next_message(client);
    assert_eq!((got, &*String::from_utf8_lossy(&payload)), (id, text));
}

/// The answer has the negative id, and the reason.
#[track_caller]
fn assert_refused(client: &TcpStream, id: i32, payload: &[u8], reason: &str) {
    write(client, &frame(id, payload));
    let (got, text) = next_message(client);
    let text = String::from_utf8(text).unwrap();
    assert!(got == -id && text.contains(reason), "{got} {text}");
}

#[test]
fn a_session_counts_every_whole_message() {
    let server = Server::start(EXE);
    let client = server.connect();
    assert_session(&client, "anonymous 1");
    set_name(&client, "lars");
    assert_session(&client, "lars 3");
    // They are printed, skipped and refused. What id 5 carries does not matter.
    for (n, id) in [2, 77, -1].into_iter().enumerate() {
        write(&client, &[frame(id, b"?"), frame(5, b"and mine?")].concat());
        assert_next(&client, 5, &format!("lars {}", 5 + 2 * n));
    }
    assert_refused(&client, 4, b"", "");
    assert_session(&client, "lars 11");
    let half = frame(1, b"in two pieces");
    write(&client, &[&frame(5, b"")[..], &half[..10]].concat());
    assert_next(&client, 5, "lars 12");
    write(&client, &half[10..]);
    harness::assert_bytes(read(&client, half.len()), &half);
    assert_session(&client, "lars 14");
}

/// Some of them wait for room, for their replies or in a mailbox.
#[test]
fn a_message_that_waits_is_counted_once() {
    let server = Server::start(EXE);
    let echoes = frame(1, &pattern(60_000, 1)).repeat(50);
    let expected = [&echoes[..], &frame(5, b"anonymous 51")].concat();
    harness::assert_bytes(
        exchange(&server.connect(), [&echoes[..], &frame(5, b"")].concat()),
        &expected,
    );
    let published = frame(3, b"news").repeat(20_000);
    let received = exchange(&server.connect(), [&published[..], &frame(5, b"")].concat());
    assert!(received.ends_with(&frame(5, b"anonymous 20001")));
}

#[test]
fn a_nickname_has_1_to_32_characters_in_one_line() {
    let server = Server::start(EXE);
    let client = server.connect();
    let names = ["x", LONG_NAME, "  ada  ", "\u{ad}\u{200f}", "\u{2027}\u{202a}\u{a0}", "lars"];
    for (n, name) in names.into_iter().enumerate() {
        set_name(&client, name);
        assert_session(&client, &format!("{name} {}", 2 + 2 * n));
    }
    let (utf8, count, control) = ("UTF-8", "1 to 32 characters", "control characters");
    let longer = format!("{LONG_NAME}x");
    let refused: [(&[u8], &str); 14] = [
        (b"", count),
        (&[b'x'; 33], count),
        (longer.as_bytes(), count),
        (&[b'x'; LONGEST], count),
        (b"\0", control),
        (b"two\nlines", control),
        (b"\x1b[2J", control),
        (b"\x7f", control),
        ("\u{85}".as_bytes(), control),
        ("a\u{2028}".as_bytes(), control),
        ("\u{2029}a".as_bytes(), control),
        (b"\xff", utf8),
        // Cut off, and half a surrogate pair.
        (b"lars\xf0\x9f\x99", utf8),
        (b"\xed\xa0\x80", utf8),
    ];
    for (n, (name, reason)) in refused.into_iter().enumerate() {
        assert_refused(&client, 4, name, reason);
        assert_session(&client, &format!("lars {}", 14 + 2 * n));
    }
}

#[test]
fn what_is_published_comes_with_the_name_of_its_sender() {
    let server = Server::start_with(EXE, &["--threads", "2"]);
    let [lars, ada, other] = [(); 3].map(|()| served(server.addr()));
    let assert_published = |publisher: &TcpStream, payload: &[u8], expected: &[u8]| {
        write(publisher, &frame(3, payload));
        for client in [&lars, &ada, &other] {
            assert_eq!(next_message(client), (3, expected.to_vec()));
        }
    };
    set_name(&lars, "lars");
    set_name(&ada, "Ada L.: ");
    assert_published(&lars, b"hello", b"lars: hello");
    assert_published(&ada, b"", b"Ada L.: : ");
    assert_published(&other, b"\xff\n", b"anonymous: \xff\n");
    set_name(&lars, "sral");
    assert_published(&lars, b"hello", b"sral: hello");
}

#[test]
fn a_text_that_is_too_long_with_the_name_before_it_is_refused() {
    let server = Server::start(EXE);
    let [client, other] = [(); 2].map(|()| served(server.addr()));
    for (name, len) in [("lars", LONGEST - 6), (LONG_NAME, LONGEST - 130)] {
        set_name(&client, name);
        assert_refused(&client, 3, &vec![b'x'; len + 1], "too long");
        assert_refused(&client, 3, &[b'x'; LONGEST], "too long");
        write(&client, &frame(3, &vec![b'x'; len]));
        let expected = frame(3, format!("{name}: {}", "x".repeat(len)).as_bytes());
        for client in [&client, &other] {
            harness::assert_bytes(read(client, expected.len()), &expected);
        }
    }
    assert_session(&client, &format!("{LONG_NAME} 10"));
    assert_session(&other, "anonymous 2");
}

/// On different threads, clients have the same tokens.
#[test]
fn clients_of_all_threads_have_sessions_of_their_own() {
    let server = Server::start_with(EXE, &["--threads", "3"]);
    let clients = [(); 12].map(|()| served(server.addr()));
    let (mut sent, mut random) = ([1; 12], Random::new(1));
    for n in (0..500).map(|_| random.below(12)) {
        sent[n] += 2;
        set_name(&clients[n], &format!("{n} after {}", sent[n]));
        assert_session(&clients[n], &format!("{n} after {} {}", sent[n], sent[n]));
    }
    for (n, client) in clients.iter().enumerate() {
        assert_session(client, &format!("{n} after {} {}", sent[n], sent[n] + 1));
    }
}

#[test]
fn a_reused_fd_has_a_new_session() {
    let server = Server::start(EXE);
    for n in 0..200 {
        let client = server.connect();
        assert_session(&client, "anonymous 1");
        set_name(&client, &format!("client {n}"));
        if n % 2 == 0 {
            reset(client);
        }
    }
}

#[test]
fn a_reload_changes_no_session() {
    let conf = Conf::new(CHAPTER, "");
    let server = conf.start(&["--threads", "2"]);
    let clients = [(); 4].map(|()| served(server.addr()));
    for (n, client) in clients[1..].iter().enumerate() {
        set_name(client, &format!("client {n}"));
    }
    for count in 3..6 {
        conf.reload(&server, &format!("welcome = number {count}\nidleTimeout = {count}00"));
        assert_session(&clients[0], &format!("anonymous {}", count - 1));
        for (n, client) in clients[1..].iter().enumerate() {
            assert_session(client, &format!("client {n} {count}"));
        }
    }
}

/// The sender's address makes no difference.
#[test]
fn every_datagram_has_a_session_of_its_own() {
    let server = Server::start(EXE);
    let (client, udp) = (served(server.addr()), connect_udp(server.addr()));
    set_name(&client, "lars");
    let ask = |message: &[u8]| {
        udp.send(message).unwrap();
        receive(&udp)
    };
    for _ in 0..3 {
        assert_eq!(ask(&frame(4, b"ada")), frame(4, b"ada"));
        assert_eq!(ask(&frame(5, b"")), frame(5, b"anonymous 1"));
        assert_eq!(ask(&frame(4, b"\n"))[..4], (-4_i32).to_le_bytes());
        udp.send(&frame(3, b"news")).unwrap();
        assert_next(&client, 3, "anonymous: news");
    }
    assert_session(&client, "lars 3");
}

/// It is the same at every end; a message that is not whole does not count.
#[test]
fn the_close_hook_logs_the_session() {
    harness::chapter_only!("it reads the chapter's log");
    let mut server = Server::start_talkative(EXE, &["--max-conns", "5", "--idle-timeout", "2"]);
    let [fin, resets, bad, idle, anonymous] = [(); 5].map(|()| served(server.addr()));
    harness::assert_bytes(read_to_end(&server.connect()), frame(-1, b"server is full"));
    for (client, name) in [(&fin, "fin"), (&resets, "resets"), (&bad, "bad"), (&idle, "idle")] {
        set_name(client, name);
    }
    let bad_header = [1_i32, -1].map(i32::to_le_bytes).concat();
    write(&fin, &[frame(77, b"").repeat(3), bad_header[..3].to_vec()].concat());
    send_fin(&fin);
    server.wait_for_log("on_conn_close: connections: 4; fin sent 5");
    reset(resets);
    server.wait_for_log("on_conn_close: connections: 3; resets sent 2");
    write(&bad, &bad_header);
    server.wait_for_log("on_conn_close: connections: 2; bad sent 2");
    assert_eq!([read_to_end(&idle), read_to_end(&anonymous)], [b"", b""]);
    server.wait_for_log("; idle sent 2");
    server.wait_for_log("; anonymous sent 1");
    let stops = served(server.addr());
    set_name(&stops, "stops");
    server.signal(Signal::SIGTERM);
    harness::assert_bytes(read_to_end(&stops), b"");
    drop((stops, bad, fin));
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("on_conn_close: connections: 0; stops sent 2");
    assert_eq!(server.log().matches("on_conn_close").count(), 6, "{}", server.log());
}
