//! New settings for a server with a pool of threads: from chapter 9 on. Each chapter's test has a `service`
//! of its own, with the chapter's modules.

use std::net::{TcpListener, TcpStream};
use std::thread;

use clap::Parser;
use common::event_loop::EventLoop;
use common::hooks::Hooks;
use common::mailbox::CAPACITY;
use harness::{
    QUIET, assert_silent, connect, frame, raise_fd_limit, read, read_to_end, send_fin,
    wait_until_taken, write,
};

use crate::callbacks::echo;
use crate::pool_callbacks::{Args, blocking};
use crate::service;
use crate::tcp_server::TcpServer;

/// Hooks that send `text` at the start of a connection and at its end.
fn saying(text: &'static [u8]) -> Hooks {
    let mut hooks = Hooks::new();
    hooks.set_conn_start(Box::new(|conn| conn.send_message(text, 101)));
    hooks.set_conn_close(Box::new(|conn| conn.send_message(text, 102)));
    hooks
}

/// Both workers are blocked, and their mailboxes full. This thread is the one that accepts.
#[test]
fn new_settings_get_past_full_mailboxes() {
    raise_fd_limit();
    // Finds a free port by taking it and giving it back.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let limits = Args::parse_from(["test"]).limits;
    let mut event_loop = EventLoop::new().unwrap();
    let (router, go_on) = blocking();
    let old = service(router, saying(b"old"), &limits);
    let addr_arg = addr.to_string().parse().unwrap();
    let mut server = TcpServer::new(&mut event_loop, &addr_arg, &limits, 2, old).unwrap();
    let mut connect_all = |server: &mut TcpServer, n| -> Vec<TcpStream> {
        let clients = (0..n).map(|_| connect(addr)).collect();
        // Also ends when all mailboxes are full.
        while event_loop.poll_once(server, Some(QUIET)).unwrap() > 0 {}
        clients
    };
    let blocked = connect_all(&mut server, 2);
    for client in &blocked {
        assert_eq!(read(client, 11), frame(101, b"old"));
        write(client, &frame(5, b"blocks"));
        wait_until_taken(client);
    }
    let mut waiting = connect_all(&mut server, 2 * CAPACITY + 10);
    assert_silent(&waiting[0]);
    server.apply(&limits, service(echo(), saying(b"new"), &limits)).unwrap();
    let clients = thread::spawn(move || {
        blocked.iter().for_each(|_| go_on.send(()).unwrap());
        waiting.push(connect(addr));
        waiting.iter().for_each(|client| assert_eq!(read(client, 11), frame(101, b"new")));
        for client in &blocked {
            send_fin(client);
            assert_eq!(read_to_end(client), [frame(5, b"blocks"), frame(102, b"new")].concat());
        }
    });
    while !clients.is_finished() {
        event_loop.poll_once(&mut server, Some(QUIET)).unwrap();
    }
    clients.join().unwrap();
    server.drain(&mut event_loop).unwrap();
}

/// By the clock it has been idle for too long, but its message is there when the worker can look.
#[test]
fn a_reload_does_not_overtake_a_message() {
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let limits = Args::parse_from(["test", "--idle-timeout", "0.2"]).limits;
    let mut event_loop = EventLoop::new().unwrap();
    let (router, go_on) = blocking();
    let old = service(router, Hooks::new(), &limits);
    let addr_arg = addr.to_string().parse().unwrap();
    let mut server = TcpServer::new(&mut event_loop, &addr_arg, &limits, 1, old).unwrap();
    let (blocked, idle) = (connect(addr), connect(addr));
    while event_loop.poll_once(&mut server, Some(QUIET)).unwrap() > 0 {}
    write(&blocked, &frame(5, b"blocks"));
    wait_until_taken(&blocked);
    thread::sleep(2 * limits.timeouts.idle_timeout);
    server.apply(&limits, service(echo(), Hooks::new(), &limits)).unwrap();
    write(&idle, &frame(1, b"hello"));
    go_on.send(()).unwrap();
    assert_eq!(read(&idle, 13), frame(1, b"hello"));
}
