//! Chapter 7's server with hooks and callbacks that fail, or close.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod callbacks;
#[path = "../reactor-v07/src/conns.rs"]
mod conns;
#[path = "../reactor-v07/src/tcp_server.rs"]
mod tcp_server;

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;

use clap::Parser;
use common::event_loop::EventLoop;
use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;
use harness::wait_until;

use crate::conns::Service;
use crate::tcp_server::TcpServer;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    limits: Limits,
}

/// Starts a server on a thread, which ends with this process.
fn start(router: MsgRouter, hooks: Hooks) -> SocketAddr {
    // Finds a free port by taking it and giving it back.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    thread::spawn(move || {
        let mut event_loop = EventLoop::new().unwrap();
        let (service, limits) = (Service { router, hooks }, Args::parse_from(["test"]).limits);
        let addr = addr.to_string().parse().unwrap();
        let mut server = TcpServer::new(&mut event_loop, &addr, &limits, service).unwrap();
        event_loop.event_process(&mut server).unwrap();
        server.drain(&mut event_loop).unwrap();
    });
    wait_until("it listens", || TcpStream::connect(addr).is_ok());
    addr
}
