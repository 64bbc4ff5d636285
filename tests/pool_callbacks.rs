//! Callbacks that block or panic in a server with a pool of threads: from chapter 8 on. Each chapter's test
//! has a `service` of its own, with the chapter's modules.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::mpsc::{self, Sender};
use std::thread::{self, JoinHandle};

use clap::Parser;
use common::event_loop::EventLoop;
use common::hooks::Hooks;
use common::limit::Limits;
use common::mailbox::{CAPACITY, Mailbox, mailbox};
use common::router::{MsgRouter, NetConnection};
use harness::{
    assert_echo, assert_silent, connect, frame, pattern, raise_fd_limit, read, read_to_end, served,
    wait_until, write,
};

use crate::callbacks::echo;
use crate::conns::Service;
use crate::service;
use crate::tcp_server::TcpServer;

#[derive(Parser)]
pub struct Args {
    #[command(flatten)]
    pub limits: Limits,
}

/// A server in threads of this process.
pub struct Running {
    pub addr: SocketAddr,
    /// Stops it.
    mailbox: Mailbox<()>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Running {
    fn start(threads: usize, router: MsgRouter, hooks: Hooks) -> Self {
        Self::with(threads, &[], move |limits| service(router, hooks, limits))
    }

    /// With these options, and a service that depends on them.
    pub fn with(
        threads: usize,
        options: &[&str],
        service: impl FnOnce(&Limits) -> Service + Send + 'static,
    ) -> Self {
        raise_fd_limit();
        let args = Args::parse_from([&["test"], options].concat());
        // Finds a free port by taking it and giving it back.
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (mailbox, mut inbox) = mailbox().unwrap();
        let thread = thread::spawn(move || {
            let mut event_loop = EventLoop::new()?;
            inbox.register(&mut event_loop, EventLoop::stop_callback)?;
            let (service, addr) = (service(&args.limits), addr.to_string().parse().unwrap());
            let mut server =
                TcpServer::new(&mut event_loop, &addr, &args.limits, threads, service)?;
            event_loop.event_process(&mut server)?;
            inbox.deregister(&mut event_loop)?;
            server.drain(&mut event_loop)
        });
        wait_until("it listens", || TcpStream::connect(addr).is_ok());
        Self { addr, mailbox, thread }
    }

    /// How it ends.
    fn join(self) -> Result<(), String> {
        self.thread.join().unwrap().map_err(|err| format!("{err:#}"))
    }

    pub fn stop(self) -> Result<(), String> {
        self.mailbox.stop();
        self.join()
    }
}

/// Starts a server with two workers, which ends with this process.
pub fn start(router: MsgRouter, hooks: Hooks) -> SocketAddr {
    Running::start(2, router, hooks).addr
}

/// An echo for id 1, and for id 5 too, but only when the sender lets it go on.
pub fn blocking() -> (MsgRouter, Sender<()>) {
    let mut router = echo();
    let (sender, receiver) = mpsc::channel();
    let receiver = Mutex::new(receiver);
    let callback = Box::new(move |conn: &mut dyn NetConnection, payload: &[u8], id| {
        receiver.lock().unwrap().recv()?;
        conn.send_message(payload, id)
    });
    router.add_msg_router(5, callback).unwrap();
    (router, sender)
}

/// It delays only those on the same thread.
#[test]
fn a_callback_that_blocks_does_not_delay_the_clients_of_another_worker() {
    let (router, go_on) = blocking();
    let server = Running::start(2, router, Hooks::new());
    // Clients go to the workers in turn.
    let clients: Vec<TcpStream> = (0..6).map(|_| served(server.addr)).collect();
    write(&clients[0], &frame(5, b"blocks"));
    for client in [&clients[1], &clients[3], &clients[5]] {
        assert_echo(client, &frame(1, b"the other worker").repeat(100));
    }
    write(&clients[2], &frame(1, b"the same worker"));
    assert_silent(&clients[2]);
    go_on.send(()).unwrap();
    assert_eq!(read(&clients[0], 14), frame(5, b"blocks"));
    assert_eq!(read(&clients[2], 23), frame(1, b"the same worker"));
    drop(clients);
    server.stop().unwrap();
}

/// And if all are full, clients wait in the backlog: none is refused below the limit.
#[test]
fn a_full_mailbox_is_passed_over() {
    let (router, go_on) = blocking();
    let server = Running::start(2, router, Hooks::new());
    let mut blocked = vec![served(server.addr), served(server.addr)];
    write(&blocked[0], &frame(5, b"blocks"));
    // Every second client waits in the mailbox of the blocked worker.
    let mut others = Vec::new();
    for _ in 0..CAPACITY {
        blocked.push(connect(server.addr));
        others.push(served(server.addr));
    }
    for _ in 0..10 {
        served(server.addr);
    }
    write(&blocked[1], &frame(5, b"blocks"));
    for _ in 0..CAPACITY + 500 {
        blocked.push(connect(server.addr));
    }
    for client in &blocked[2..] {
        write(client, &frame(1, b"hello"));
    }
    assert_silent(&blocked[blocked.len() - 1]);
    go_on.send(()).unwrap();
    go_on.send(()).unwrap();
    blocked[..2].iter().for_each(|client| assert_eq!(read(client, 14), frame(5, b"blocks")));
    blocked[2..].iter().for_each(|client| assert_eq!(read(client, 13), frame(1, b"hello")));
    drop((blocked, others));
    server.stop().unwrap();
}

#[test]
fn a_client_that_is_in_a_mailbox_when_the_server_stops_is_served() {
    let (router, go_on) = blocking();
    let server = Running::start(1, router, Hooks::new());
    let blocks = served(server.addr);
    write(&blocks, &frame(5, b"blocks"));
    let waiting: Vec<TcpStream> = (0..100).map(|_| connect(server.addr)).collect();
    waiting.iter().for_each(|client| write(client, &frame(1, b"hello")));
    assert_silent(&waiting[99]);
    let thread = thread::spawn(|| server.stop());
    // The acceptor has closed its listening socket, and then tells the worker.
    let addr = blocks.peer_addr().unwrap();
    wait_until("it no longer listens", || TcpStream::connect(addr).is_err());
    go_on.send(()).unwrap();
    assert_eq!(read_to_end(&blocks), frame(5, b"blocks"));
    waiting.iter().for_each(|client| assert_eq!(read_to_end(client), frame(1, b"hello")));
    drop((blocks, waiting));
    thread.join().unwrap().unwrap();
}

/// What the other workers' clients are owed is delivered.
#[test]
fn a_worker_that_panics_ends_the_server() {
    let mut router = echo();
    router.add_msg_router(6, Box::new(|_, _, _| panic!("on purpose"))).unwrap();
    let server = Running::start(2, router, Hooks::new());
    let (panics, other) = (served(server.addr), served(server.addr));
    let messages = frame(1, &pattern(1000, 1)).repeat(500);
    write(&other, &messages);
    write(&panics, &frame(6, b""));
    assert!(read_to_end(&other) == messages);
    drop((panics, other));
    let err = server.join().unwrap_err();
    assert!(err.starts_with("worker-") && err.ends_with(": panicked"), "{err}");
}
