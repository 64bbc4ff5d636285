//! The promises of every server on the event loop, from chapter 3 on.
//! [`every_reactor!`](crate::every_reactor!) turns each promise into a test.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, send};

use crate::{
    LIMIT, QUIET, Server, assert_bytes, assert_echo, is_other, narrow, pattern, raise_fd_limit,
    read, read_slowly, read_to_end, reset, send_fin, unacknowledged, unread, wait_until,
    wait_until_closing, write,
};

/// A shutdown takes a second at most. Later than this after the signal, on a busy machine, it proves
/// nothing if a client has been cut off.
const WITHIN_GRACE: Duration = Duration::from_millis(800);

/// The same for what has not been read: a shutdown reads for half a second at most.
const WITHIN_INPUT_GRACE: Duration = Duration::from_millis(400);

/// A chapter, as these tests see it.
#[derive(Clone, Copy)]
pub struct Chapter {
    /// Its binary.
    pub exe: &'static str,
    /// Wraps a payload in a message that the server echoes.
    pub message: fn(&[u8]) -> Vec<u8>,
    /// How much memory a client that never reads may cost the server, in KiB.
    pub stuck_kib: u64,
    /// How much memory a client that stops in the middle of a message may cost, in KiB.
    pub midway_kib: u64,
    /// How much memory an idle client may cost, in bytes.
    pub idle: u64,
}

/// One test per promise, for the [`Chapter`] `$chapter`.
#[macro_export]
macro_rules! every_reactor {
    ($chapter:expr, [$($promise:ident),* $(,)?]) => {
        mod every_reactor {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_reactor::$promise($chapter);
                }
            )*
        }
    };
    ($chapter:expr) => {
        harness::every_reactor!($chapter, [
            the_second_client_does_not_wait,
            every_client_gets_its_own_bytes_back,
            echoes_what_came_before_the_fin,
            echoes_stuck_bytes_after_the_fin,
            a_client_that_never_reads_costs_bounded_memory,
            clients_that_never_read_do_not_delay_others,
            survives_a_shortage_of_memory,
            two_hundred_clients_that_stop_midway_cost_little,
            a_client_that_never_stops_does_not_starve_others,
            a_slow_reader_gets_everything,
            a_reset_ends_one_connection_and_is_logged,
            resets_at_any_moment_leave_nothing_behind,
            thousands_of_silent_clients_leave_nothing_behind,
            urgent_data_does_no_harm,
            a_reused_fd_never_sees_its_predecessors_bytes,
            serves_connected_clients_when_out_of_fds,
            ten_thousand_idle_clients_hold_no_blocks,
            stops_on_sigint_and_sigterm,
            answers_what_arrived_before_the_signal,
            replies_in_flight_arrive_despite_unread_input,
            delivers_pending_output_before_it_stops,
            a_client_that_has_everything_and_stays_is_not_cut_off,
            a_client_that_never_reads_does_not_prevent_the_stop,
            replies_survive_a_message_sent_after_the_stop,
            a_late_reader_gets_all_replies_from_before_the_stop,
            serves_the_backlog_before_it_stops,
            the_stop_does_not_reset_clients_that_keep_sending,
        ]);
    };
}

impl Chapter {
    #[track_caller]
    fn start(&self) -> Server {
        Server::start(self.exe)
    }

    /// Sends `payload` and gets it back.
    #[track_caller]
    fn ping(&self, client: &TcpStream, payload: &[u8]) {
        assert_echo(client, &(self.message)(payload));
    }

    /// A hundred pings, each answered within a second. This machine may be busy for a while, so
    /// there are five attempts.
    #[track_caller]
    fn assert_served_within_the_second(&self, client: &TcpStream) {
        let mut late = 0;
        for _ in 0..5 {
            late = 0;
            for _ in 0..100 {
                let start = Instant::now();
                self.ping(client, b"served within the second");
                late += usize::from(start.elapsed() > Duration::from_secs(1));
            }
            if late == 0 {
                return;
            }
        }
        panic!("{late} of the last 100 were not");
    }

    /// How many bytes each of the [`messages`](Self::messages) has.
    fn message_len(&self) -> usize {
        (self.message)(&[0; 1000]).len()
    }

    /// About `n` bytes of whole messages.
    pub(crate) fn messages(&self, n: usize, seed: u64) -> Vec<u8> {
        let message = (self.message)(&pattern(1000, seed));
        message.repeat(n.div_ceil(message.len()))
    }

    /// Sends whole messages without reading until the socket is full. Returns what has been sent,
    /// and the unsent rest of the last message.
    #[track_caller]
    pub(crate) fn stuff(&self, client: &TcpStream) -> (Vec<u8>, Vec<u8>) {
        let bytes = self.messages(64 << 20, 7);
        let sent = crate::send_until_stuck(client, &bytes);
        let end = sent.next_multiple_of(self.message_len());
        (bytes[..sent].to_vec(), bytes[sent..end].to_vec())
    }

    /// Checks that `received` answers the first `owed` bytes of what was written, at least. The rest may
    /// have arrived too late, if the kernel has dropped a packet.
    #[track_caller]
    fn assert_answered(&self, received: &[u8], written: &[u8], owed: usize) {
        let (n, len) = (received.len(), self.message_len());
        assert!(written.starts_with(received), "{n} bytes came back, and not those");
        assert!(n >= owed / len * len, "{n} bytes came back, of {owed} that had arrived");
    }
}

/// Waits until the server has nothing more to do. One that spins never gets there.
#[track_caller]
pub(crate) fn wait_until_idle(server: &Server) {
    wait_until("the server is idle", || {
        let before = server.cpu();
        thread::sleep(QUIET);
        // One that spins may get little time on a busy machine, but it never sleeps.
        server.threads_are("S") && server.cpu() - before < QUIET / 10
    });
}

/// SIGTERM ends it with code 0, with no connection left and no block in use.
#[track_caller]
fn assert_stops_with_nothing_in_use(mut server: Server) {
    // Of another program, other tests check how it stops.
    if is_other() {
        return;
    }
    server.signal(Signal::SIGTERM);
    assert_stopped_with_nothing_in_use(&mut server);
}

#[track_caller]
fn assert_stopped_with_nothing_in_use(server: &mut Server) {
    let status = server.wait();
    assert!(status.code() == Some(0), "expected: it ends with exit code 0; got: {status}");
    server.assert_nothing_left();
}

/// What chapter 2 cannot do.
pub fn the_second_client_does_not_wait(chapter: Chapter) {
    let server = chapter.start();
    let first = server.connect();
    chapter.ping(&first, b"first");
    let second = server.connect();
    chapter.ping(&second, b"second");
    chapter.ping(&first, b"first again");
}

/// The C++ v0.3 has one buffer for all clients, and mixes up two of one batch.
pub fn every_client_gets_its_own_bytes_back(chapter: Chapter) {
    let server = chapter.start();
    let clients: Vec<_> =
        (0..200).map(|n| (server.connect(), (chapter.message)(&pattern(1000, n)))).collect();
    for _ in 0..5 {
        server.pause();
        for (client, bytes) in &clients {
            write(client, bytes);
        }
        server.signal(Signal::SIGCONT);
        for (client, bytes) in &clients {
            assert_bytes(read(client, bytes.len()), bytes);
        }
    }
}

pub fn echoes_what_came_before_the_fin(chapter: Chapter) {
    let server = chapter.start();
    for n in [1, 5_000, 200_000] {
        let client = server.connect();
        let bytes = chapter.messages(n, 1);
        server.pause();
        write(&client, &bytes);
        send_fin(&client);
        server.signal(Signal::SIGCONT);
        assert_bytes(read_to_end(&client), &bytes);
    }
}

/// The FIN arrives while the server cannot write, because the client reads late.
pub fn echoes_stuck_bytes_after_the_fin(chapter: Chapter) {
    let server = chapter.start();
    let client = server.connect();
    let (mut sent, rest) = chapter.stuff(&client);
    let writer = client.try_clone().unwrap();
    let sender = thread::spawn(move || {
        write(&writer, &rest);
        send_fin(&writer);
        rest
    });
    let received = read_to_end(&client);
    sent.extend(sender.join().unwrap());
    assert_bytes(&received, &sent);
}

pub fn a_client_that_never_reads_costs_bounded_memory(chapter: Chapter) {
    let server = chapter.start();
    let other = server.connect();
    chapter.ping(&other, b"before");
    let before = server.status("VmRSS");
    let deaf = server.connect();
    chapter.stuff(&deaf);
    chapter.ping(&other, b"after");
    server.assert_grown_at_most(chapter.stuck_kib + 256, before);
    wait_until_idle(&server);
    reset(deaf);
    chapter.ping(&other, b"and again");
    drop(other);
    assert_stops_with_nothing_in_use(server);
}

pub fn clients_that_never_read_do_not_delay_others(chapter: Chapter) {
    let server = chapter.start();
    let other = server.connect();
    chapter.ping(&other, b"before");
    let before = server.status("VmRSS");
    let deaf: Vec<TcpStream> = (0..24).map(|_| server.connect()).collect();
    thread::scope(|scope| {
        for client in &deaf {
            scope.spawn(|| chapter.stuff(client));
        }
        chapter.assert_served_within_the_second(&other);
    });
    server.assert_grown_at_most(24 * chapter.stuck_kib + 256, before);
    chapter.ping(&other, b"after");
    wait_until_idle(&server);
}

/// More clients that never read than there is memory for (RLIMIT_AS): the excess ones are dropped,
/// and the log says why. (`vec!` would abort the process.)
pub fn survives_a_shortage_of_memory(chapter: Chapter) {
    const LIMIT_KIB: u64 = 200 << 10;
    let server = Server::start_under(chapter.exe, &format!("-v {LIMIT_KIB}"));
    let bytes = chapter.messages(64 << 20, 7);
    let mut deaf: Vec<(TcpStream, &[u8])> = (0..220)
        .map(|_| {
            let client = server.connect();
            narrow(&client);
            client.set_nonblocking(true).unwrap();
            (client, &bytes[..])
        })
        .collect();
    let mut last_progress = Instant::now();
    while last_progress.elapsed() < QUIET {
        deaf.retain_mut(|(client, bytes)| match client.write(bytes) {
            Ok(n) => {
                last_progress = Instant::now();
                *bytes = &bytes[n..];
                !bytes.is_empty()
            }
            Err(err) => err.kind() == ErrorKind::WouldBlock,
        });
    }
    if 220 * chapter.stuck_kib > LIMIT_KIB {
        server.wait_for_log("the system has no memory for a buffer of ");
    }
    assert!(deaf.len() > 100, "only {} clients are left", deaf.len());
    wait_until_idle(&server);
    chapter.ping(&server.connect(), b"served");
    drop(deaf);
    assert_stops_with_nothing_in_use(server);
}

pub fn two_hundred_clients_that_stop_midway_cost_little(chapter: Chapter) {
    let server = chapter.start();
    let other = server.connect();
    chapter.ping(&other, b"before");
    let before = server.status("VmRSS");
    let message = (chapter.message)(&pattern(60_000, 3));
    let half = message.len() / 2;
    let clients: Vec<TcpStream> = (0..200).map(|_| server.connect()).collect();
    for client in &clients {
        write(client, &message[..half]);
    }
    chapter.ping(&other, b"served");
    wait_until_idle(&server);
    server.assert_grown_at_most(200 * chapter.midway_kib + 256, before);
    // They can continue later.
    for client in &clients {
        write(client, &message[half..]);
    }
    for client in &clients {
        assert_bytes(read(client, message.len()), &message);
    }
}

pub fn a_client_that_never_stops_does_not_starve_others(chapter: Chapter) {
    let server = chapter.start();
    let busy = server.connect();
    let done = AtomicBool::new(false);
    let received = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let bytes = chapter.messages(1 << 20, 1);
            while !done.load(Ordering::Relaxed) {
                write(&busy, &bytes);
            }
            send_fin(&busy);
        });
        scope.spawn(|| {
            let mut block = vec![0; 1 << 16];
            while let Ok(n @ 1..) = (&busy).read(&mut block) {
                received.fetch_add(n, Ordering::Relaxed);
            }
        });
        wait_until("data flows", || received.load(Ordering::Relaxed) > 4 << 20);
        let other = server.connect();
        chapter.assert_served_within_the_second(&other);
        done.store(true, Ordering::Relaxed);
    });
}

/// With a small window and pauses between its reads, so that the server's writes are partial.
pub fn a_slow_reader_gets_everything(chapter: Chapter) {
    let server = chapter.start();
    let client = server.connect();
    narrow(&client);
    let bytes = chapter.messages(16 << 20, 5);
    let received = thread::scope(|scope| {
        scope.spawn(|| {
            write(&client, &bytes);
            send_fin(&client);
        });
        read_slowly(&client)
    });
    assert_bytes(&received, &bytes);
}

pub fn a_reset_ends_one_connection_and_is_logged(chapter: Chapter) {
    let server = chapter.start();
    let other = server.connect();
    let client = server.connect();
    let peer = client.local_addr().unwrap();
    chapter.ping(&client, b"hello");
    reset(client);
    server.wait_for_log(&format!("{peer}: dropped: Connection reset by peer"));
    chapter.ping(&other, b"served");
}

/// Before the first byte, in the accept queue, in the middle of a message, with replies unread, and
/// while the server cannot write.
pub fn resets_at_any_moment_leave_nothing_behind(chapter: Chapter) {
    let server = chapter.start();
    let fds = server.fds();
    for _ in 0..3 {
        let client = server.connect();
        chapter.stuff(&client);
        reset(client);
    }
    let message = (chapter.message)(&pattern(10_000, 1));
    let resets = |count: usize| {
        for n in 0..count {
            let stopped = n % 8 < 4;
            if stopped {
                server.signal(Signal::SIGSTOP);
            }
            let client = server.connect();
            match n % 4 {
                0 => {}
                1 => write(&client, &message[..message.len() / 2]),
                2 => write(&client, &message),
                _ => {
                    write(&client, &message);
                    send_fin(&client);
                }
            }
            reset(client);
            if stopped {
                server.signal(Signal::SIGCONT);
            }
        }
        wait_until("all connections are closed", || server.fds() == fds);
    };
    assert_costs_no_memory(&server, resets, 1000);
    chapter.ping(&server.connect(), b"served");
    assert_stops_with_nothing_in_use(server);
}

pub fn thousands_of_silent_clients_leave_nothing_behind(chapter: Chapter) {
    let server = chapter.start();
    let fds = server.fds();
    let come_and_go = |count| {
        for n in 0..count {
            let client = server.connect();
            if n % 2 == 0 {
                reset(client);
            }
        }
        wait_until("all connections are closed", || server.fds() == fds);
    };
    assert_costs_no_memory(&server, come_and_go, 1500);
    chapter.ping(&server.connect(), b"served");
    assert_stops_with_nothing_in_use(server);
}

/// Runs `clients` twice, `count` of them each time. The first time the server allocates what it
/// needs; the second time it must not grow. A leak of 1 KiB per client would show.
#[track_caller]
fn assert_costs_no_memory(server: &Server, clients: impl Fn(usize), count: usize) {
    clients(count);
    let before = server.status("VmRSS");
    clients(count);
    server.assert_grown_at_most(count as u64, before);
}

/// Urgent data (MSG_OOB) is not part of the stream, and no server here asks for it.
pub fn urgent_data_does_no_harm(chapter: Chapter) {
    let server = chapter.start();
    let client = server.connect();
    let message = (chapter.message)(b"hello");
    write(&client, &message[..4]);
    send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).unwrap();
    write(&client, &message[4..]);
    assert_bytes(read(&client, message.len()), message);
    wait_until_idle(&server);
}

/// Clients leave, with and without replies pending, and in the same batch others connect and get
/// their fds. The fds are the same, but the bytes must not be.
pub fn a_reused_fd_never_sees_its_predecessors_bytes(chapter: Chapter) {
    let server = chapter.start();
    let mut clients: HashMap<u64, TcpStream> = HashMap::new();
    let bytes_of = |n: u64| (chapter.message)(&pattern(3000, n));
    for round in 0..40_u64 {
        server.pause();
        for n in round * 20..(round + 1) * 20 {
            // Twenty connect, and those of the previous round leave, in four different ways.
            if let Some(client) = clients.remove(&n.wrapping_sub(20)) {
                match n % 4 {
                    0 => drop(client),
                    1 => reset(client),
                    2 => {
                        write(&client, &bytes_of(n - 20));
                        reset(client);
                    }
                    _ => {
                        write(&client, &bytes_of(n - 20));
                        send_fin(&client);
                        clients.insert(u64::MAX - n, client);
                    }
                }
            }
            let client = server.connect();
            if n % 2 == 0 {
                write(&client, &bytes_of(n));
            }
            clients.insert(n, client);
        }
        server.signal(Signal::SIGCONT);
        for n in round * 20..(round + 1) * 20 {
            let client = &clients[&n];
            let bytes = bytes_of(n);
            if n % 2 != 0 {
                write(client, &bytes);
            }
            assert_eq!(read(client, bytes.len()), bytes, "client {n}");
            if let Some(gone) = clients.get(&(u64::MAX - n)) {
                assert_eq!(read_to_end(gone), bytes_of(n - 20), "client {n}'s predecessor");
            }
        }
    }
}

/// With more clients than fds, the connected ones are served, and the others wait until one leaves.
/// One line in the log, and no spinning. (The C++ course's servers spin or exit.)
pub fn serves_connected_clients_when_out_of_fds(chapter: Chapter) {
    let server = Server::start_under(chapter.exe, "-n 64");
    let clients: Vec<TcpStream> = (0..120).map(|_| server.connect()).collect();
    server.wait_for_log("cannot accept: Too many open files");
    chapter.ping(&clients[0], b"one of the first");
    wait_until_idle(&server);
    server.assert_logged_once("cannot accept");
    for client in clients {
        chapter.ping(&client, b"served in the end");
    }
    server.wait_for_log("accepting again");
    server.assert_logged_once("cannot accept");
    assert_stops_with_nothing_in_use(server);
}

pub fn ten_thousand_idle_clients_hold_no_blocks(chapter: Chapter) {
    let mut server = chapter.start();
    chapter.ping(&server.connect(), b"hello");
    let before = server.status("VmRSS");
    // Fewer if the hard limit is lower.
    let n = 10_000.min(raise_fd_limit() - 500);
    let clients: Vec<TcpStream> = (0..n).map(|_| server.connect()).collect();
    for client in &clients {
        chapter.ping(client, b"hello");
    }
    let each = (server.status("VmRSS") - before) * 1024 / n as u64;
    // Another program may have larger objects, but no block for each client either.
    let limit = if is_other() { 16_384 } else { chapter.idle };
    assert!(each <= limit, "each costs {each} bytes, and may cost {limit}");
    server.wait_until_asleep();
    if is_other() {
        return;
    }
    server.signal(Signal::SIGTERM);
    assert_stopped_with_nothing_in_use(&mut server);
    assert_bytes(read_to_end(&clients[0]), b"");
    // One after another they needed one block or two: one for input, one for output.
    let log = server.wait_for_log("stopped");
    assert!(
        log.is_empty() || log.ends_with(", 4096 B peak") || log.ends_with(", 8192 B peak"),
        "{log}"
    );
}

/// A client that looks idle may be sending at this very moment. So it gets a FIN, and has to close.
pub fn stops_on_sigint_and_sigterm(chapter: Chapter) {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut server = Server::start_talkative(chapter.exe, &[]);
        let idle = server.connect();
        chapter.ping(&idle, b"hello");
        server.signal(signal);
        assert_bytes(read_to_end(&idle), b"");
        let peer = idle.local_addr().unwrap();
        drop(idle);
        assert_stopped_with_nothing_in_use(&mut server);
        server.wait_for_log(&format!("{peer}: closed"));
    }
}

/// From a few bytes to more than one read returns, followed by the end of the stream, not a reset.
/// The server waits for the client to close too.
pub fn answers_what_arrived_before_the_signal(chapter: Chapter) {
    for n in [1, 40_000, 300_000] {
        let mut server = Server::start_talkative(chapter.exe, &[]);
        let client = server.connect();
        let peer = client.local_addr().unwrap();
        let messages = chapter.messages(n, 1);
        assert_echo(&client, &messages);
        server.pause();
        write(&client, &messages);
        let owed = unread(&client);
        server.signal(Signal::SIGTERM);
        server.signal(Signal::SIGCONT);
        chapter.assert_answered(&read_to_end(&client), &messages, owed);
        drop(client);
        assert_stopped_with_nothing_in_use(&mut server);
        server.wait_for_log(&format!("{peer}: closed"));
    }
}

/// Closing with unread input would reset the connection, and replies in flight would be lost.
pub fn replies_in_flight_arrive_despite_unread_input(chapter: Chapter) {
    let mut server = chapter.start();
    let client = server.connect();
    let messages = chapter.messages(400_000, 1);
    write(&client, &messages);
    // By now the replies are in the kernel, on both sides, and not all of them on this one.
    wait_until_idle(&server);
    server.pause();
    write(&client, &messages);
    let owed = messages.len() + unread(&client);
    server.signal(Signal::SIGTERM);
    server.signal(Signal::SIGCONT);
    chapter.assert_answered(&read_to_end(&client), &messages.repeat(2), owed);
    drop(client);
    assert_stopped_with_nothing_in_use(&mut server);
}

/// The pending output is in the server's buffer and in the kernel's.
pub fn delivers_pending_output_before_it_stops(chapter: Chapter) {
    let mut server = chapter.start();
    let client = server.connect();
    let (sent, _) = chapter.stuff(&client);
    server.signal(Signal::SIGTERM);
    let received = read_to_end(&client);
    assert!(received.len() > 100_000 && sent.starts_with(&received));
    drop(client);
    assert_stopped_with_nothing_in_use(&mut server);
}

pub fn a_client_that_has_everything_and_stays_is_not_cut_off(chapter: Chapter) {
    let mut server = chapter.start();
    let client = server.connect();
    chapter.ping(&client, b"hello");
    let messages = chapter.messages(1, 1);
    // In this order, so that the server handles the signal first, with the message still unread.
    server.wait_until_asleep();
    server.pause();
    server.signal(Signal::SIGTERM);
    write(&client, &messages);
    server.signal(Signal::SIGCONT);
    assert_bytes(read_to_end(&client), &messages);
    assert_stopped_with_nothing_in_use(&mut server);
}

pub fn a_client_that_never_reads_does_not_prevent_the_stop(chapter: Chapter) {
    let mut server = chapter.start();
    let deaf = server.connect();
    chapter.stuff(&deaf);
    let start = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(10));
    server.wait_for_log("stopped; cut off: ");
}

/// The replies are in the kernel's queue, and the client looks idle. If the server closed without
/// waiting, the client's next message would cause a reset, which would destroy them.
pub fn replies_survive_a_message_sent_after_the_stop(chapter: Chapter) {
    let messages = chapter.messages(100_000, 1);
    // On a busy machine the client may be late, which proves nothing: try again.
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let mut server = chapter.start();
        let client = server.connect();
        narrow(&client);
        write(&client, &messages);
        wait_until_idle(&server);
        let signalled = Instant::now();
        server.signal(Signal::SIGTERM);
        wait_until_closing(&client);
        let mut received = vec![0; messages.len()];
        let _ = (&client).write_all(&(chapter.message)(b"one more"));
        let result = (&client).read_exact(&mut received);
        if server.is_running() && signalled.elapsed() < WITHIN_GRACE {
            assert!(result.is_ok() && received == messages, "{result:?}");
            assert_bytes(read_to_end(&client), b"");
            drop(client);
            assert_stopped_with_nothing_in_use(&mut server);
            return;
        }
    }
    panic!("the server never waits for its client");
}

/// The server has stopped reading from a client that does not read (backpressure), and its output
/// waits in the kernel. That does not count as quiet: the server must wait for the client to read.
pub fn a_late_reader_gets_all_replies_from_before_the_stop(chapter: Chapter) {
    let len = chapter.message_len();
    // Several attempts, as above.
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let mut server = chapter.start();
        let client = server.connect();
        narrow(&client);
        let (sent, _) = chapter.stuff(&client);
        // The rest may arrive too late, if the kernel has dropped a packet.
        let arrived = sent.len() - unacknowledged(&client);
        let sent = &sent[..arrived / len * len];
        let signalled = Instant::now();
        server.signal(Signal::SIGTERM);
        thread::sleep(Duration::from_millis(100));
        let mut received = vec![0; sent.len()];
        let result = (&client).read_exact(&mut received);
        if server.is_running() && signalled.elapsed() < WITHIN_INPUT_GRACE {
            assert!(result.is_ok() && received == sent, "{result:?}");
            return;
        }
    }
    panic!("the server never waits for its client");
}

/// All clients have sent something, and none has been accepted when the signal arrives.
pub fn serves_the_backlog_before_it_stops(chapter: Chapter) {
    let mut server = chapter.start();
    let messages = chapter.messages(5000, 1);
    server.pause();
    let clients: Vec<TcpStream> = (0..200).map(|_| server.connect()).collect();
    for client in &clients {
        write(client, &messages);
    }
    server.signal(Signal::SIGTERM);
    server.signal(Signal::SIGCONT);
    for client in clients {
        assert_bytes(read_to_end(&client), &messages);
    }
    assert_stopped_with_nothing_in_use(&mut server);
}

/// They receive a prefix of what they have sent, and then the end of the stream.
pub fn the_stop_does_not_reset_clients_that_keep_sending(chapter: Chapter) {
    for seed in 0..5 {
        let mut server = chapter.start();
        let bytes = chapter.messages(50_000, seed);
        let (begun, signalled) = (AtomicUsize::new(0), OnceLock::<Instant>::new());
        thread::scope(|scope| {
            for _ in 0..8 {
                let (client, bytes) = (server.connect(), &bytes);
                let (begun, signalled) = (&begun, &signalled);
                scope.spawn(move || {
                    let writer = client.try_clone().unwrap();
                    scope.spawn(move || while (&writer).write_all(bytes).is_ok() {});
                    assert_bytes(read(&client, bytes.len()), bytes);
                    begun.fetch_add(1, Ordering::Relaxed);
                    let mut received = Vec::new();
                    let result = (&client).read_to_end(&mut received);
                    let late = signalled.get().is_some_and(|it| it.elapsed() >= WITHIN_GRACE);
                    assert!(late || result.is_ok(), "after {} bytes: {result:?}", received.len());
                    assert!(received.chunks(bytes.len()).all(|chunk| bytes.starts_with(chunk)));
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
            wait_until("all clients are busy", || begun.load(Ordering::Relaxed) == 8);
            signalled.set(Instant::now()).unwrap();
            server.signal(Signal::SIGTERM);
        });
        assert_eq!(server.wait().code(), Some(0));
    }
}
