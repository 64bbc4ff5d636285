//! Chapter 9 from outside: a configuration file.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

use harness::every_messenger::assert_serves;
use harness::every_reactor::Chapter;
use harness::{Server, assert_echo, frame, raise_fd_limit, read_to_end, reset, run, wait_until};

const EXE: &str = env!("CARGO_BIN_EXE_reactor-v09");
const CLIENT: &str = env!("CARGO_BIN_EXE_reactor-v09-client");

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
harness::every_hook!(CHAPTER, CLIENT);

/// With these options, separated by spaces, and a free port.
#[track_caller]
fn start(options: &str) -> Server {
    let mut command = Command::new(EXE);
    Server::from(command.args(["--addr", "127.0.0.1:0"]).args(options.split(' ')))
}

/// A client that has been answered.
#[track_caller]
fn served(server: &Server) -> TcpStream {
    let client = server.connect();
    assert_echo(&client, &frame(1, b"hello"));
    client
}

#[test]
fn every_worker_is_a_thread_with_a_name() {
    harness::chapter_only!("it needs the chapter's own options");
    for n in [1, 3] {
        let server = start(&format!("--threads {n}"));
        served(&server);
        let mut expected = vec!["reactor-v09".to_owned(), "stdout".to_owned()];
        expected.extend((0..n).map(|number| format!("worker-{number}")));
        assert_eq!(server.thread_names(), expected);
    }
    for n in ["0", "1025", "many"] {
        let output = run(EXE, &["--threads", n]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains(n));
    }
}

/// SIGTERM is for the accepting thread's signalfd.
#[test]
fn no_thread_can_be_interrupted_by_a_stop_signal() {
    harness::chapter_only!("it needs the chapter's own options");
    let server = start("--threads 4");
    served(&server);
    let blocked = server.threads("SigBlk:");
    let sigterm = 1 << (harness::Signal::SIGTERM as i32 - 1);
    assert_eq!(blocked.len(), 6);
    for (name, mask) in blocked {
        let mask = u64::from_str_radix(&mask, 16).unwrap();
        assert!(mask & sigterm != 0, "{name}");
    }
}

/// As many per loop, by the kernel's own account.
#[test]
fn clients_are_spread_evenly() {
    harness::chapter_only!("it needs the chapter's own options");
    raise_fd_limit();
    let server = start("--threads 4");
    let before = server.epoll_sizes();
    let clients: Vec<TcpStream> = (0..1000).map(|_| served(&server)).collect();
    let after = server.epoll_sizes();
    let grown: Vec<usize> =
        after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_eq!(grown, [0, 250, 250, 250, 250]);
    // They stay where they are.
    clients.iter().for_each(|client| assert_echo(client, &frame(1, b"still here")));
    assert_eq!(server.epoll_sizes(), after);
}

#[test]
fn an_idle_thread_does_not_wake_up() {
    harness::chapter_only!("it needs the chapter's own options");
    let server = start("--threads 4");
    let _clients: Vec<TcpStream> = (0..100).map(|_| served(&server)).collect();
    server.wait_until_asleep();
    let before = server.wake_ups();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(server.wake_ups(), before);
}

#[test]
fn the_limit_is_one_for_all_threads() {
    harness::chapter_only!("it needs the chapter's own options");
    let server = start("--threads 4 --max-conns 10");
    for _ in 0..3 {
        let clients: Vec<TcpStream> = (0..10).map(|_| served(&server)).collect();
        assert_eq!(read_to_end(&server.connect()), frame(-1, b"server is full"));
        drop(clients);
        wait_until("a place is free on each thread", || {
            let clients: Vec<TcpStream> = (0..10).map(|_| server.connect()).collect();
            clients.iter().all(|client| {
                harness::write(client, &frame(1, b"hello"));
                let mut id = [0; 4];
                std::io::Read::read_exact(&mut &*client, &mut id).unwrap();
                i32::from_le_bytes(id) == 1
            })
        });
        wait_until("they are gone", || server.epoll_sizes().iter().skip(1).all(|size| *size == 1));
    }
}

/// Some are reset while they wait in the backlog, some on their way to a worker, some later.
#[test]
fn clients_that_come_and_go_leave_nothing_behind() {
    harness::chapter_only!("it needs the chapter's own options");
    let server = start("--threads 4");
    drop(served(&server));
    let mut fds = 0;
    wait_until("it is back to no clients", || {
        let before = std::mem::replace(&mut fds, server.fds());
        thread::sleep(Duration::from_millis(20));
        before == fds
    });
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in 0..1250 {
                    match n % 3 {
                        0 => reset(server.connect()),
                        1 => drop(server.connect()),
                        _ => drop(served(&server)),
                    }
                }
            });
        }
    });
    wait_until("all fds are closed", || server.fds() == fds);
    assert!(!server.log().contains("WARN"), "{}", server.log());
    served(&server);
}

/// As there are too few fds for them.
#[test]
fn a_worker_that_cannot_start_ends_the_server() {
    harness::chapter_only!("it needs the chapter's own options");
    let script = "ulimit -n 24; exec \"$0\" --addr 127.0.0.1:0 --threads 8";
    let output = harness::run_command(Command::new("sh").args(["-c", script, EXE]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("error: ") && log.contains("Too many open files"), "{log}");
}
