//! The promises of every server whose clients publish messages, from chapter 11 on.
//! [`every_publisher!`](crate::every_publisher!) turns each promise into a test.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::every_config::Done;
use crate::every_reactor::Chapter;
use crate::every_udp::{assert_udp_echo, connect_udp};
use crate::{
    LIMIT, Server, Signal, assert_bytes, assert_echo, connect, exchange, frame, narrow, pattern,
    read, read_to_end, reset, send_fin, served, wait_until, write,
};

/// One test per promise, for the [`Chapter`] `$chapter`, which puts `$before` before each text that it
/// publishes.
#[macro_export]
macro_rules! every_publisher {
    ($chapter:expr, $before:expr, [$($promise:ident),* $(,)?]) => {
        mod every_publisher {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_publisher::$promise($chapter, $before);
                }
            )*
        }
    };
    ($chapter:expr, $before:expr) => {
        harness::every_publisher!($chapter, $before, [
            a_message_reaches_every_client_of_every_thread_once,
            a_message_that_is_too_long_reaches_nobody,
            each_receiver_sees_each_publisher_in_order,
            twenty_thousand_messages_in_one_go_lose_none_and_end_nobody,
            a_publisher_gets_its_own_message_before_its_end,
            a_publisher_that_is_reset_hurts_nobody,
            a_client_that_does_not_read_is_ended_and_others_go_on,
            a_storm_starves_neither_echoes_nor_new_clients,
            a_client_gets_nothing_from_before_it_came,
            a_datagram_is_published_once_and_its_sender_gets_no_copy,
            a_datagram_without_room_is_dropped_and_counted,
            what_is_published_keeps_a_receiver_but_not_half_a_message,
            a_stop_in_a_storm_runs_each_task_or_counts_it,
            what_was_published_before_the_stop_arrives,
        ]);
    };
}

/// The longest payload.
const LONGEST: usize = 65_527;

/// Message `n` of a publisher, to be published: 12 bytes.
fn numbered(n: usize) -> Vec<u8> {
    frame(3, &u32::try_from(n).unwrap().to_le_bytes())
}

/// What arrives of these messages: those that are published have `before` before their text.
fn arriving(mut bytes: &[u8], before: &[u8]) -> Vec<u8> {
    let mut arriving = Vec::new();
    while let Some((header, rest)) = bytes.split_at_checked(8) {
        let [id, len] = [0, 4].map(|at| i32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
        let (payload, rest) = rest.split_at(len as usize);
        arriving.extend(frame(id, &[if id == 3 { before } else { b"" }, payload].concat()));
        bytes = rest;
    }
    arriving
}

fn start(chapter: Chapter, threads: &str) -> Server {
    Server::start_with(chapter.exe, &["--threads", threads])
}

fn all_served<const N: usize>(server: &Server) -> [TcpStream; N] {
    [(); N].map(|()| served(server.addr()))
}

/// Publishes a message, and reads the publisher's own copy.
#[track_caller]
fn assert_published(publisher: &TcpStream, message: &[u8], before: &[u8]) {
    write(publisher, message);
    let arriving = arriving(message, before);
    assert_bytes(read(publisher, arriving.len()), &arriving);
}

/// Nothing else has arrived.
#[track_caller]
fn ping(client: &TcpStream) {
    assert_echo(client, &frame(1, b"and nothing else"));
}

/// Reads one message: its id and payload.
#[track_caller]
pub fn next_message(stream: &TcpStream) -> (i32, Vec<u8>) {
    let header = read(stream, 8);
    let [id, len] = [0, 4].map(|at| i32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
    assert!((0..=LONGEST as i32).contains(&len), "a header inside a message: id {id}, {len} bytes");
    (id, read(stream, len as usize))
}

/// Sends `payload`, and skips what others publish until it is echoed.
#[track_caller]
fn assert_echo_in_between(stream: &TcpStream, payload: &[u8]) {
    write(stream, &frame(1, payload));
    loop {
        match next_message(stream) {
            (1, echo) => return assert_eq!(echo, payload),
            (id, _) => assert_eq!(id, 3),
        }
    }
}

/// [`served`], although others publish.
#[track_caller]
fn served_in_between(addr: SocketAddr) -> TcpStream {
    let client = connect(addr);
    assert_echo_in_between(&client, b"hello");
    client
}

/// The longest one and an empty one too. On different threads, clients have the same tokens.
pub fn a_message_reaches_every_client_of_every_thread_once(chapter: Chapter, before: &[u8]) {
    let server = start(chapter, "3");
    let clients: [_; 9] = all_served(&server);
    for (seed, publisher) in clients.iter().enumerate() {
        for n in [0, 1, 4088, 40_000, LONGEST - before.len()] {
            let message = frame(3, &pattern(n, seed as u64));
            write(publisher, &message);
            let arriving = arriving(&message, before);
            for client in &clients {
                assert_bytes(read(client, arriving.len()), &arriving);
            }
        }
    }
    clients.iter().for_each(ping);
}

pub fn a_message_that_is_too_long_reaches_nobody(chapter: Chapter, before: &[u8]) {
    let server = start(chapter, "2");
    let [publisher, others @ ..]: [_; 3] = all_served(&server);
    let too_long = [3, LONGEST as i32 + 1].map(i32::to_le_bytes).concat();
    write(&publisher, &[numbered(1), too_long].concat());
    let arriving = arriving(&numbered(1), before);
    assert_bytes(read_to_end(&publisher), &arriving);
    server.wait_for_log("refused: message length 65528");
    for client in &others {
        assert_bytes(read(client, arriving.len()), &arriving);
        ping(client);
    }
}

/// No message is ever inside another, and large echoes are intact. All that a client gets is below the
/// high-water mark.
pub fn each_receiver_sees_each_publisher_in_order(chapter: Chapter, before: &[u8]) {
    const MESSAGES: usize = 500;
    let server = start(chapter, "2");
    let clients: [_; 8] = all_served(&server);
    let echo = frame(1, &pattern(50_000, 1));
    let message = |publisher: usize, n: usize| -> Vec<u8> {
        let text = pattern(n % 100, (publisher * MESSAGES + n) as u64);
        [&[publisher as u8], &(n as u32).to_le_bytes()[..], &text].concat()
    };
    thread::scope(|scope| {
        for (publisher, client) in clients[..4].iter().enumerate() {
            let echo = &echo;
            scope.spawn(move || {
                for n in 0..MESSAGES {
                    write(client, &frame(3, &message(publisher, n)));
                    if n % 50 == 0 {
                        write(client, echo);
                    }
                }
            });
        }
        for (number, client) in clients.iter().enumerate() {
            let echo = &echo;
            scope.spawn(move || {
                let (mut next, mut echoes) = ([0; 4], if number < 4 { MESSAGES / 50 } else { 0 });
                while next != [MESSAGES; 4] || echoes > 0 {
                    let (id, payload) = next_message(client);
                    if id == 1 {
                        assert!(payload == echo[8..] && echoes > 0);
                        echoes -= 1;
                    } else {
                        let publisher = usize::from(payload[before.len()]);
                        let expected = [before, &message(publisher, next[publisher])].concat();
                        assert!(payload == expected, "{publisher}");
                        next[publisher] += 1;
                    }
                }
                ping(client);
            });
        }
    });
}

/// With one thread, the full mailbox is the publisher's own. It waits, and is not read meanwhile: its
/// echoes and messages come back in the order in which it sent them.
pub fn twenty_thousand_messages_in_one_go_lose_none_and_end_nobody(
    chapter: Chapter,
    before: &[u8],
) {
    for threads in ["1", "2"] {
        let server = start(chapter, threads);
        let [publisher, receiver, other]: [_; 3] = all_served(&server);
        let echo = |n: usize| frame(1, &n.to_le_bytes());
        let published: Vec<u8> = (0..20_000).flat_map(numbered).collect();
        let published = arriving(&published, before);
        let bytes: Vec<u8> = (0..20_000)
            .flat_map(|n| [numbered(n), if n % 7 == 0 { echo(n) } else { Vec::new() }].concat())
            .collect();
        assert_bytes(exchange(&publisher, bytes.clone()), arriving(&bytes, before));
        for client in [&receiver, &other] {
            assert_bytes(read(client, published.len()), &published);
            ping(client);
        }
        server.assert_not_logged("dropped");
    }
}

pub fn a_publisher_gets_its_own_message_before_its_end(chapter: Chapter, before: &[u8]) {
    let server = start(chapter, "2");
    for n in 0..200 {
        let publisher = server.connect();
        let messages = numbered(n).repeat(1 + n % 3 * 600);
        write(&publisher, &messages);
        send_fin(&publisher);
        assert_bytes(read_to_end(&publisher), arriving(&messages, before));
    }
}

/// Nor does it leave anything behind, though it may be waiting.
pub fn a_publisher_that_is_reset_hurts_nobody(chapter: Chapter, before: &[u8]) {
    const MESSAGES: usize = 2000;
    let server = start(chapter, "2");
    let receiver = served(server.addr());
    let (fds, mut next) = (server.fds(), [0; 20]);
    for first in (0..next.len()).map(|n| n * MESSAGES) {
        let publisher = served_in_between(server.addr());
        let messages: Vec<u8> = (first..first + MESSAGES).flat_map(numbered).collect();
        write(&publisher, &messages);
        // It has published one, and then any number of them.
        while next_message(&publisher).1 != [before, &numbered(first)[8..]].concat() {}
        reset(publisher);
        write(&receiver, &frame(1, b"echo"));
        while let (3, payload) = next_message(&receiver) {
            let number = payload[before.len()..].try_into().unwrap();
            let n = u32::from_le_bytes(number) as usize;
            let next = &mut next[n / MESSAGES];
            assert_eq!(n % MESSAGES, *next);
            *next += 1;
        }
    }
    wait_until("all fds are closed", || server.fds() == fds);
}

/// A slow consumer costs no more memory than its high-water mark.
pub fn a_client_that_does_not_read_is_ended_and_others_go_on(chapter: Chapter, before: &[u8]) {
    let server = start(chapter, "2");
    let [publisher, receiver, deaf]: [_; 3] = all_served(&server);
    narrow(&deaf);
    let (fds, memory, peer) = (server.fds(), server.status("VmHWM"), deaf.local_addr().unwrap());
    let messages = frame(3, &pattern(1000, 1)).repeat(100);
    let arriving = arriving(&messages, before);
    for _ in 0..1000 {
        write(&publisher, &messages);
        // Together they read what is sent before more of it is.
        for client in [&publisher, &receiver] {
            assert_bytes(read(client, arriving.len()), &arriving);
        }
    }
    server.wait_for_log(&format!("{peer}: dropped: it reads too slowly"));
    server.assert_logged_once("dropped");
    wait_until("its fd is free", || server.fds() == fds - 1);
    let grown = server.status("VmHWM") - memory;
    assert!(grown < 8192, "by {grown} KiB");
    let received = read_to_end(&deaf);
    assert!(arriving.iter().cycle().zip(&received).all(|(sent, it)| sent == it));
    [publisher, receiver].iter().for_each(ping);
}

pub fn a_storm_starves_neither_echoes_nor_new_clients(chapter: Chapter, before: &[u8]) {
    for threads in ["1", "2"] {
        let server = start(chapter, threads);
        let (addr, done, rounds) = (server.addr(), AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            let _done = Done(&done);
            for publisher in 0..2 {
                let (done, rounds) = (&done, &rounds);
                scope.spawn(move || {
                    let client = served_in_between(addr);
                    // More than a mailbox holds.
                    let messages = frame(3, &[publisher]).repeat(1000);
                    let own = [before, &[publisher]].concat();
                    while !done.load(Ordering::Relaxed) {
                        write(&client, &messages);
                        let mut left = 1000;
                        while left > 0 {
                            left -= usize::from(next_message(&client).1 == own);
                        }
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            wait_until("it storms", || rounds.load(Ordering::Relaxed) > 2);
            let client = served_in_between(addr);
            for n in 0..100 {
                assert_echo_in_between(&client, &pattern(n * 100, 1));
                served_in_between(addr);
            }
            let by_now = rounds.load(Ordering::Relaxed);
            wait_until("it still storms", || {
                assert_echo_in_between(&client, b"hello");
                rounds.load(Ordering::Relaxed) > by_now + 2
            });
        });
    }
}

/// Nor what is sent to the client before it, whose fd it has.
pub fn a_client_gets_nothing_from_before_it_came(chapter: Chapter, before: &[u8]) {
    for threads in ["1", "2"] {
        let server = start(chapter, threads);
        let publisher = served(server.addr());
        for n in 0..200 {
            let message = frame(3, &pattern(n * 200, n as u64));
            assert_published(&publisher, &message, before);
            let client = served(server.addr());
            assert_published(&publisher, &message, before);
            if n % 2 == 0 {
                reset(client);
            }
        }
    }
}

pub fn a_datagram_is_published_once_and_its_sender_gets_no_copy(chapter: Chapter, before: &[u8]) {
    let server = start(chapter, "3");
    let (clients, udp): ([_; 6], _) = (all_served(&server), connect_udp(server.addr()));
    for n in [4, 0, 65_499] {
        let message = frame(3, &pattern(n, 1));
        udp.send(&message).unwrap();
        let arriving = arriving(&message, before);
        clients.iter().for_each(|client| assert_bytes(read(client, arriving.len()), &arriving));
    }
    assert_udp_echo(&udp, b"the only reply");
    clients.iter().for_each(ping);
    server.assert_not_logged("dropped");
}

/// The sum of the numbers that the log has after `text`.
fn sum(server: &Server, text: &str) -> usize {
    let log = server.log();
    let numbers = log.lines().filter_map(|line| line.split_once(text)?.1.split([';', ' ']).next());
    numbers.map(|number| number.parse::<usize>().unwrap()).sum()
}

/// The numbers of the messages in `bytes`, in ascending order.
#[track_caller]
fn numbers(bytes: &[u8], before: &[u8]) -> Vec<usize> {
    let (first, at) = (arriving(&numbered(0), before), 8 + before.len());
    let numbers: Vec<usize> = bytes
        .chunks_exact(first.len())
        .inspect(|message| assert_eq!(message[..at], first[..at]))
        .map(|message| u32::from_le_bytes(message[at..].try_into().unwrap()) as usize)
        .collect();
    assert!(numbers.is_sorted_by(|a, b| a < b), "twice, or out of order");
    numbers
}

/// One thread takes longer to send to a hundred clients than another to publish.
pub fn a_datagram_without_room_is_dropped_and_counted(chapter: Chapter, before: &[u8]) {
    crate::chapter_only!("it reads the chapter's log");
    let mut server = start(chapter, "1");
    let (clients, udp): ([_; 100], _) = (all_served(&server), connect_udp(server.addr()));
    let mut sent = 0;
    wait_until("some are dropped", || {
        for _ in 0..100 {
            udp.send(&numbered(sent)).unwrap();
            sent += 1;
        }
        // The kernel has dropped none.
        assert_udp_echo(&udp, b"done");
        sum(&server, "datagrams dropped: ") > 0
    });
    server.signal(Signal::SIGTERM);
    let received = clients.each_ref().map(|client| numbers(&read_to_end(client), before));
    drop(clients);
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("INFO stopped; ");
    assert!(received.iter().all(|numbers| *numbers == received[0]));
    let (dropped, not_run) = (sum(&server, "datagrams dropped: "), sum(&server, "tasks not run: "));
    assert_eq!(received[0].len() + dropped + not_run, sent, "{}", server.log());
}

/// It is not idle, as its kernel takes what is published. But the frame timeout is for what it sends.
pub fn what_is_published_keeps_a_receiver_but_not_half_a_message(chapter: Chapter, before: &[u8]) {
    let options = ["--threads", "2", "--idle-timeout", "2", "--frame-timeout", "1"];
    let server = Server::start_with(chapter.exe, &options);
    let [publisher, receiver, midway]: [_; 3] = all_served(&server);
    write(&midway, &frame(1, b"hello")[..5]);
    let (start, mut n) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(5) {
        assert_published(&publisher, &numbered(n), before);
        n += 1;
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(numbers(&read(&receiver, (12 + before.len()) * n), before).len(), n);
    ping(&receiver);
    server.wait_for_log(&format!("{}: closed: message incomplete", midway.local_addr().unwrap()));
    read_to_end(&midway);
    [publisher, receiver].iter().for_each(|client| assert_bytes(read_to_end(client), b""));
}

/// Reads what is left to read, also before a reset.
fn read_what_comes(mut client: &TcpStream) -> Vec<u8> {
    let (mut bytes, mut block) = (Vec::new(), vec![0; 65_536]);
    loop {
        match client.read(&mut block) {
            Ok(0) => return bytes,
            Ok(n) => bytes.extend_from_slice(&block[..n]),
            Err(err) if err.kind() == ErrorKind::Interrupted => {}
            Err(err) if err.kind() == ErrorKind::ConnectionReset => return bytes,
            Err(err) => panic!("after {} bytes: {err}", bytes.len()),
        }
    }
}

/// The publisher has its own copy of each message that was published.
pub fn a_stop_in_a_storm_runs_each_task_or_counts_it(chapter: Chapter, before: &[u8]) {
    crate::chapter_only!("it reads the chapter's log");
    for threads in 1..=3 {
        let mut server = start(chapter, &threads.to_string());
        let [publisher, receiver]: [_; 2] = all_served(&server);
        let (start, published) = (Instant::now(), AtomicUsize::new(0));
        let (own, others) = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                // It ends with the server.
                for n in (0..).take_while(|_| start.elapsed() < LIMIT) {
                    let block: Vec<u8> = (n * 1000..(n + 1) * 1000).flat_map(numbered).collect();
                    if (&publisher).write_all(&block).is_err() {
                        break;
                    }
                    published.store(n, Ordering::Relaxed);
                }
            });
            let receiver = scope.spawn(|| read_what_comes(&receiver));
            let own = scope.spawn(|| {
                let own = read_what_comes(&publisher);
                publisher.shutdown(Shutdown::Both).ok();
                own
            });
            wait_until("it storms", || published.load(Ordering::Relaxed) > 2);
            server.signal(Signal::SIGTERM);
            writer.join().unwrap();
            (numbers(&own.join().unwrap(), before), numbers(&receiver.join().unwrap(), before))
        });
        assert!(start.elapsed() < LIMIT, "it has not stopped before the storm");
        assert_eq!(server.wait().code(), Some(0));
        server.wait_for_log("INFO stopped; ");
        let is_complete = |numbers: &[usize]| numbers.iter().enumerate().all(|(n, it)| n == *it);
        assert!(is_complete(&own) && is_complete(&others));
        let lost = own.len() - others.len();
        let not_run = sum(&server, "tasks not run: ");
        assert!(not_run >= lost, "{lost} of {}: {}", own.len(), server.log());
        assert!(threads > 1 || not_run == lost, "{lost} of {}: {}", own.len(), server.log());
    }
}

pub fn what_was_published_before_the_stop_arrives(chapter: Chapter, before: &[u8]) {
    let mut server = start(chapter, "2");
    let [publisher, receiver]: [_; 2] = all_served(&server);
    let messages: Vec<u8> = (0..1500).flat_map(numbered).collect();
    write(&publisher, &messages);
    server.signal(Signal::SIGTERM);
    for client in [&publisher, &receiver] {
        assert_bytes(read_to_end(client), arriving(&messages, before));
    }
    drop((publisher, receiver));
    assert_eq!(server.wait().code(), Some(0));
    server.assert_nothing_left();
    server.assert_not_logged("tasks not run");
}
