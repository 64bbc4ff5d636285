//! The promises of every server with a pool of threads, from chapter 8 on.
//! [`every_pool!`](crate::every_pool!) turns each promise into a test.

use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::every_reactor::Chapter;
use crate::every_server::name;
use crate::{
    Server, Signal, assert_bytes, assert_echo, frame, raise_fd_limit, read, read_to_end, reset,
    run, run_command, served, wait_until, write,
};

/// One test per promise, for the [`Chapter`] `$chapter`.
#[macro_export]
macro_rules! every_pool {
    ($chapter:expr, [$($promise:ident),* $(,)?]) => {
        mod every_pool {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_pool::$promise($chapter);
                }
            )*
        }
    };
    ($chapter:expr) => {
        harness::every_pool!($chapter, [
            every_worker_is_a_thread_with_a_name,
            no_thread_can_be_interrupted_by_a_stop_signal,
            clients_are_spread_evenly,
            an_idle_thread_does_not_wake_up,
            the_limit_is_one_for_all_threads,
            clients_that_come_and_go_leave_nothing_behind,
            a_worker_that_cannot_start_ends_the_server,
        ]);
    };
}

pub fn every_worker_is_a_thread_with_a_name(chapter: Chapter) {
    crate::chapter_only!("it reads the names of the chapter's threads");
    for n in [1, 3] {
        let server = Server::start_with(chapter.exe, &["--threads", &n.to_string()]);
        served(server.addr());
        let mut expected = vec![name(chapter.exe).to_owned(), "stdout".to_owned()];
        expected.extend((0..n).map(|number| format!("worker-{number}")));
        assert_eq!(server.thread_names(), expected);
    }
    for n in ["0", "1025", "many"] {
        let output = run(chapter.exe, &["--threads", n]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8(output.stderr).unwrap().contains(n));
    }
}

/// SIGTERM is for the accepting thread's signalfd.
pub fn no_thread_can_be_interrupted_by_a_stop_signal(chapter: Chapter) {
    crate::chapter_only!("which threads block signals is up to each program");
    let server = Server::start_with(chapter.exe, &["--threads", "4"]);
    served(server.addr());
    let blocked = server.threads("SigBlk:");
    let sigterm = 1 << (Signal::SIGTERM as i32 - 1);
    assert_eq!(blocked.len(), 6);
    for (name, mask) in blocked {
        let mask = u64::from_str_radix(&mask, 16).unwrap();
        assert!(mask & sigterm != 0, "{name}");
    }
}

/// As many per loop, by the kernel's own account, and none on the loop that accepts.
pub fn clients_are_spread_evenly(chapter: Chapter) {
    raise_fd_limit();
    let server = Server::start_with(chapter.exe, &["--threads", "4"]);
    let before = server.epoll_sizes();
    let clients: Vec<TcpStream> = (0..1000).map(|_| served(server.addr())).collect();
    let after = server.epoll_sizes();
    let mut grown: Vec<usize> =
        after.iter().zip(&before).map(|(after, before)| after - before).collect();
    // Another program may accept without epoll.
    grown.retain(|size| *size > 0);
    assert_eq!(grown, [250; 4], "from {before:?} to {after:?}");
    // They stay where they are.
    clients.iter().for_each(|client| assert_echo(client, &frame(1, b"still here")));
    assert_eq!(server.epoll_sizes(), after);
}

pub fn an_idle_thread_does_not_wake_up(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--threads", "4"]);
    let _clients: Vec<TcpStream> = (0..100).map(|_| served(server.addr())).collect();
    server.wait_until_asleep();
    let before = server.wake_ups();
    thread::sleep(Duration::from_secs(2));
    assert_eq!(server.wake_ups(), before);
}

pub fn the_limit_is_one_for_all_threads(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--threads", "4", "--max-conns", "10"]);
    let fds = server.fds();
    for _ in 0..3 {
        let clients: Vec<TcpStream> = (0..10).map(|_| served(server.addr())).collect();
        assert_bytes(read_to_end(&server.connect()), frame(-1, b"server is full"));
        drop(clients);
        wait_until("a place is free on each thread", || {
            let clients: Vec<TcpStream> = (0..10).map(|_| server.connect()).collect();
            clients.iter().all(|client| {
                write(client, &frame(1, b"hello"));
                read(client, 4) == 1_i32.to_le_bytes()
            })
        });
        wait_until("they are gone", || server.fds() == fds);
    }
}

/// Some are reset while they wait in the backlog, some on their way to a worker, some later.
pub fn clients_that_come_and_go_leave_nothing_behind(chapter: Chapter) {
    let server = Server::start_with(chapter.exe, &["--threads", "4"]);
    drop(served(server.addr()));
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
                        _ => drop(served(server.addr())),
                    }
                }
            });
        }
    });
    wait_until("all fds are closed", || server.fds() == fds);
    server.assert_not_logged("WARN");
    served(server.addr());
}

/// As there are too few fds for them.
pub fn a_worker_that_cannot_start_ends_the_server(chapter: Chapter) {
    crate::chapter_only!("it counts the chapter's fds, and reads its error messages");
    let script = "ulimit -n 24; exec \"$0\" --addr 127.0.0.1:0 --threads 8";
    let output = run_command(Command::new("sh").args(["-c", script, chapter.exe]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(log.contains("error: ") && log.contains("Too many open files"), "{log}");
}
