//! The promises of every server with limits on its clients, from chapter 5 on.
//! [`every_limiter!`](crate::every_limiter!) turns each promise into a test.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::every_reactor::{Chapter, wait_until_idle};
use crate::{
    LIMIT, QUIET, Server, Signal, assert_bytes, assert_echo, assert_silent, frame, is_closing,
    narrow, pattern, queued_by_peer, raise_fd_limit, read, read_to_end, reset, run, send_fin,
    send_until_stuck, served, wait_until, write,
};

/// One test per promise, for the [`Chapter`] `$chapter`.
#[macro_export]
macro_rules! every_limiter {
    ($chapter:expr, [$($promise:ident),* $(,)?]) => {
        mod every_limiter {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_limiter::$promise($chapter);
                }
            )*
        }
    };
    ($chapter:expr) => {
        harness::every_limiter!($chapter, [
            a_client_above_the_limit_reads_why_it_is_refused,
            refusals_are_logged_with_their_number_once_a_second,
            refused_clients_are_closed_if_too_many_are_closing,
            the_ends_of_others_cost_no_replies,
            a_refused_client_that_keeps_coming_does_not_delay_others,
            a_burst_never_gets_more_places_than_there_are,
            any_end_of_a_connection_frees_its_place,
            clients_wait_in_order_for_a_place,
            a_waiting_client_is_refused_when_the_server_stops,
            only_messages_and_replies_keep_a_connection_from_being_idle,
            a_message_has_to_arrive_in_time,
            half_messages_hold_their_memory_only_until_the_timeout,
            time_above_the_high_water_mark_does_not_count,
            idle_connections_cause_no_wake_ups,
            more_connections_than_fds_are_a_warning_and_none_is_a_mistake,
        ]);
    };
}

#[track_caller]
fn ping(client: &TcpStream) {
    assert_echo(client, &frame(1, b"hello"));
}

/// It reads why, then the end of the stream and not a reset.
#[track_caller]
fn assert_refused(client: &TcpStream) {
    assert_bytes(read_to_end(client), frame(-1, b"server is full"));
}

/// The only place of the server is free, in time.
#[track_caller]
fn assert_a_place_is_free(server: &Server, why: &str) {
    let start = Instant::now();
    loop {
        let client = server.connect();
        write(&client, &frame(1, b"hello"));
        send_fin(&client);
        if read_to_end(&client) == frame(1, b"hello") {
            return;
        }
        assert!(start.elapsed() < LIMIT, "no place is free: {why}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether `n` new clients are served at the same time.
fn are_served(server: &Server, n: usize) -> bool {
    let clients: Vec<TcpStream> = (0..n).map(|_| server.connect()).collect();
    clients.iter().all(|client| {
        write(client, &frame(1, b"hello"));
        read(client, 13)[..4] == 1_i32.to_le_bytes()
    })
}

pub fn a_client_above_the_limit_reads_why_it_is_refused(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--max-conns", "2"]);
    let (first, second) = (served(server.addr()), served(server.addr()));
    assert_refused(&server.connect());
    // What it has sent must not turn the end into a reset.
    let talkative = server.connect();
    write(&talkative, &frame(1, &pattern(1000, 1)).repeat(1000));
    assert_refused(&talkative);
    ping(&first);
    ping(&second);
    drop(first);
    assert_a_place_is_free(&server, "a client has gone");
}

pub fn refusals_are_logged_with_their_number_once_a_second(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's log");
    let mut server = Server::start_with(chapter.exe, &["--max-conns", "1"]);
    let _client = served(server.addr());
    let start = Instant::now();
    for _ in 0..300 {
        assert_refused(&server.connect());
    }
    let seconds = start.elapsed().as_secs() + 2;
    let refused = |log: &str| -> Vec<usize> {
        let numbers = log.lines().filter_map(|line| line.split("clients refused: ").nth(1));
        numbers.map(|number| number.parse().unwrap()).collect()
    };
    wait_until("all are counted", || refused(&server.log()).iter().sum::<usize>() == 300);
    assert!(refused(&server.log()).len() as u64 <= seconds, "{}", server.log());
    assert_refused(&server.connect());
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("stopped; ");
    assert_eq!(refused(&server.log()).iter().sum::<usize>(), 301, "{}", server.log());
}

/// They are owed replies, which refused clients and bad frames must not cost them.
pub fn the_ends_of_others_cost_no_replies(chapter: Chapter) {
    raise_fd_limit();
    let server = Server::start_with(chapter.exe, &["--idle-timeout", "600"]);
    let probe = server.connect();
    narrow(&probe);
    chapter.stuff(&probe);
    // More than the kernel takes, so that the server itself holds replies. But it still reads.
    let messages = chapter.messages(queued_by_peer(&probe) + 400_000, 1);
    drop(probe);
    let slow = [(); 4].map(|()| {
        let client = server.connect();
        narrow(&client);
        write(&client, &messages);
        client
    });
    let bad: Vec<TcpStream> = (0..1100).map(|_| server.connect()).collect();
    for client in &bad {
        write(client, &[1_i32.to_le_bytes(), (-1_i32).to_le_bytes()].concat());
    }
    for client in &bad {
        assert_bytes(read_to_end(client), b"");
    }
    slow.iter().for_each(send_fin);
    // The ends reach the server before there is room for the replies.
    wait_until_idle(&server);
    for client in &slow {
        assert_bytes(read_to_end(client), &messages);
    }
}

/// Silent ones, which keep their fd until the linger time is over.
pub fn refused_clients_are_closed_if_too_many_are_closing(chapter: Chapter) {
    raise_fd_limit();
    let server = Server::start_with(chapter.exe, &["--max-conns", "1"]);
    let _client = served(server.addr());
    let before = server.fds();
    let refused: Vec<TcpStream> = (0..1500).map(|_| server.connect()).collect();
    for client in &refused {
        assert_refused(client);
    }
    // The last one may have read its end just before its fd is closed.
    wait_until("only half of the places are taken", || server.fds() <= before + 512);
}

pub fn a_refused_client_that_keeps_coming_does_not_delay_others(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--max-conns", "1"]);
    let client = served(server.addr());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let refused = server.connect();
                    write(&refused, b"let me in");
                    assert_refused(&refused);
                }
            });
        }
        for _ in 0..1000 {
            ping(&client);
        }
        done.store(true, Ordering::Relaxed);
    });
}

pub fn a_burst_never_gets_more_places_than_there_are(chapter: Chapter) {
    raise_fd_limit();
    let server = Server::start_with(chapter.exe, &["--max-conns", "100"]);
    let clients: Vec<TcpStream> = (0..2000).map(|_| server.connect()).collect();
    for client in &clients {
        write(client, &frame(1, b"hello"));
    }
    let answers: Vec<Vec<u8>> = clients.iter().map(|client| read(client, 8)).collect();
    let is_served = |answer: &&Vec<u8>| answer[..4] == 1_i32.to_le_bytes();
    assert_eq!(answers.iter().filter(is_served).count(), 100);
    drop(clients);
    wait_until("all places are free", || are_served(&server, 100));
}

/// The client stays in each of these cases: the place is free when the end begins.
pub fn any_end_of_a_connection_frees_its_place(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--max-conns", "1", "--idle-timeout", "0.1"]);
    let half_closed = served(server.addr());
    send_fin(&half_closed);
    assert_a_place_is_free(&server, "half-close");
    let bad = served(server.addr());
    write(&bad, &[1_i32.to_le_bytes(), (-1_i32).to_le_bytes()].concat());
    assert_a_place_is_free(&server, "a bad frame");
    let _idle = served(server.addr());
    assert_a_place_is_free(&server, "idle");
    reset(served(server.addr()));
    assert_a_place_is_free(&server, "a reset");
    let midway = served(server.addr());
    write(&midway, &frame(1, b"hello")[..10]);
    send_fin(&midway);
    assert_a_place_is_free(&server, "the end inside a message");
}

pub fn clients_wait_in_order_for_a_place(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--max-conns", "2", "--when-full", "wait"]);
    let mut served: Vec<TcpStream> = (0..2).map(|_| served(server.addr())).collect();
    let waiting: Vec<TcpStream> = (0..10).map(|_| server.connect()).collect();
    for client in &waiting {
        write(client, &frame(1, b"hello"));
    }
    assert_silent(&waiting[0]);
    let before = server.cpu();
    thread::sleep(QUIET);
    assert!(server.cpu() - before < QUIET / 10, "it spins");
    for (n, client) in waiting.into_iter().enumerate() {
        drop(served.remove(0));
        assert_eq!(read(&client, 13), frame(1, b"hello"), "client {n}");
        served.push(client);
    }
    let before = server.cpu();
    thread::sleep(QUIET);
    assert!(server.cpu() - before < QUIET / 10, "it spins afterwards");
}

pub fn a_waiting_client_is_refused_when_the_server_stops(chapter: Chapter) {
    let mut server = Server::start_with(chapter.exe, &["--max-conns", "1", "--when-full", "wait"]);
    let client = served(server.addr());
    let waiting: Vec<TcpStream> = (0..10).map(|_| server.connect()).collect();
    server.signal(Signal::SIGTERM);
    waiting.iter().for_each(assert_refused);
    drop((client, waiting));
    assert_eq!(server.wait().code(), Some(0));
    server.assert_nothing_left();
}

/// Neither a byte now and then nor a client that takes no replies counts as activity.
pub fn only_messages_and_replies_keep_a_connection_from_being_idle(chapter: Chapter) {
    let options = ["--idle-timeout", "1.5", "--frame-timeout", "0", "--max-conns", "4"];
    let server = Server::start_with(chapter.exe, &options);
    let [idle, dripping, deaf, active] = [(); 4].map(|()| served(server.addr()));
    narrow(&deaf);
    chapter.stuff(&deaf);
    let mut drops = frame(1, &[b'x'; 1000]).into_iter();
    wait_until("three places are free", || {
        let _ = (&dripping).write(&[drops.next().unwrap()]);
        ping(&active);
        thread::sleep(Duration::from_millis(150));
        are_served(&server, 3)
    });
    server.wait_for_log("idle connections closed: ");
    ping(&active);
    for client in [&idle, &dripping] {
        assert_bytes(read_to_end(client), b"");
    }
    drop(deaf);
}

pub fn a_message_has_to_arrive_in_time(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--frame-timeout", "1"]);
    let slow = served(server.addr());
    let mut drops = frame(1, &[b'x'; 1000]).into_iter();
    // Idle, and often inside a message, but never for long.
    let (idle, busy) = (served(server.addr()), served(server.addr()));
    let peer = slow.local_addr().unwrap();
    let [message, next] = [frame(1, b"hello"), frame(1, b"hello")];
    write(&busy, &message[..5]);
    wait_until("it is closed", || {
        // A byte now and then buys no time.
        let _ = (&slow).write(&[drops.next().unwrap()]);
        write(&busy, &[&message[5..], &next[..5]].concat());
        assert_bytes(read(&busy, 13), &message);
        thread::sleep(Duration::from_millis(50));
        is_closing(&slow)
    });
    server.wait_for_log(&format!("{peer}: closed: message incomplete after 1s"));
    assert_bytes(read_to_end(&slow), b"");
    ping(&idle);
}

/// Half messages take all the memory, so that other clients are dropped, but not for long.
pub fn half_messages_hold_their_memory_only_until_the_timeout(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's log");
    raise_fd_limit();
    let script = "ulimit -v 150000; exec \"$0\" --addr 127.0.0.1:0 --frame-timeout 2";
    let server = Server::from(
        Command::new("sh").args(["-c", script, chapter.exe]).env("MALLOC_ARENA_MAX", "1"),
    );
    let half = &frame(1, &pattern(60_000, 1))[..40_000];
    let clients: Vec<TcpStream> = (0..2500).map(|_| server.connect()).collect();
    for mut client in &clients {
        // It may have been dropped for lack of memory.
        let _ = client.write(half);
    }
    server.wait_for_log("the system has no memory for a buffer of ");
    wait_until("a client is served again", || {
        let client = server.connect();
        write(&client, &frame(1, b"hello"));
        let mut echo = [0; 13];
        (&client).read_exact(&mut echo).is_ok() && echo == *frame(1, b"hello")
    });
}

/// The server holds back the rest of what the client has sent, which ends inside a message.
pub fn time_above_the_high_water_mark_does_not_count(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--frame-timeout", "1"]);
    let client = server.connect();
    narrow(&client);
    let messages = frame(1, &pattern(1000, 1)).repeat(64_000);
    let sent = send_until_stuck(&client, &messages);
    thread::sleep(Duration::from_secs(3));
    let whole = sent / 1008 * 1008;
    assert_bytes(read(&client, whole), &messages[..whole]);
    let rest = sent.next_multiple_of(1008);
    write(&client, &messages[sent..rest]);
    assert_bytes(read(&client, rest - whole), &messages[whole..rest]);
    ping(&client);
}

pub fn idle_connections_cause_no_wake_ups(chapter: Chapter) {
    raise_fd_limit();
    let server = Server::start_with(
        chapter.exe,
        &["--max-conns", "2000", "--frame-timeout", "1", "--idle-timeout", "600"],
    );
    let _clients: Vec<TcpStream> = (0..2000).map(|_| served(server.addr())).collect();
    server.wait_until_asleep();
    let before = server.wake_ups();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(server.wake_ups(), before);
}

pub fn more_connections_than_fds_are_a_warning_and_none_is_a_mistake(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's log and its error messages");
    // Each loop has an epoll instance and an eventfd, and as many closing connections as it may.
    let loops = Server::start(chapter.exe).epoll_sizes().len();
    let (closing, enough) = (loops * 1024, 10_014 + loops * 1026);
    let server = Server::start_under(chapter.exe, &format!("-n {}", enough - 1));
    server.wait_for_log(&format!(
        "10000 connections and {closing} closing ones need more fds than {} (ulimit -n)",
        enough - 1
    ));
    let server = Server::start_under(chapter.exe, &format!("-n {enough}"));
    assert!(!server.log().contains("more fds"));
    for options in [["--max-conns", "0"], ["--when-full", "queue"], ["--frame-timeout", "86401"]] {
        let output = run(chapter.exe, &options);
        assert_eq!(output.status.code(), Some(2));
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(error.contains(options[0]) && error.contains(options[1]), "{error}");
    }
}
