//! Counts what a server with a pool of threads allocates: from chapter 8 on. Each chapter's test has a
//! `Session` and a `service` of its own, with the chapter's modules.

use std::alloc::System;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use clap::Parser;
use common::event_loop::EventLoop;
use common::hooks::Hooks;
use common::limit::{Limits, Permit};
use common::message;
use common::router::{MsgRouter, NetConnection};
use common::tcp_conn::TcpConn;
use nix::sys::resource::{UsageWho, getrusage};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

use crate::tcp_server::TcpServer;
use crate::{Session, service};

/// Counts the allocations of all threads; the one of the other chapters' tests sees only its own.
#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

#[derive(Parser)]
struct Args {
    #[command(flatten)]
    limits: Limits,
}

/// What a connection consists of, and as much for the alignment as malloc(3) takes for that.
const CONN: usize = size_of::<Permit>() + size_of::<TcpConn>() + size_of::<Session>() + 16;

/// One test, because all threads share the counter.
#[test]
fn an_idle_connection_costs_its_own_size_and_no_message_costs_an_allocation() {
    // Finds a free port by taking it and giving it back.
    let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    thread::spawn(move || {
        let mut event_loop = EventLoop::new().unwrap();
        let mut router = MsgRouter::new();
        let echo = Box::new(|conn: &mut dyn NetConnection, payload: &[u8], id| {
            conn.send_message(payload, id)
        });
        router.add_msg_router(1, echo).unwrap();
        let limits = Args::parse_from(["test"]).limits;
        let service = service(router, Hooks::new(), &limits);
        let addr = addr.to_string().parse().unwrap();
        let mut server = TcpServer::new(&mut event_loop, &addr, &limits, 2, service).unwrap();
        event_loop.event_process(&mut server).unwrap();
        server.drain(&mut event_loop).unwrap();
    });
    let connect = || loop {
        match TcpStream::connect(addr) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    };
    let request = [&message::encode_header(1, 1000).unwrap()[..], &[7; 1000]].concat().repeat(4);
    let mut reply = vec![0; request.len()];
    let mut echo = |streams: &[TcpStream], rounds| {
        for mut stream in streams.iter().cycle().take(rounds) {
            stream.write_all(&request).unwrap();
            stream.read_exact(&mut reply).unwrap();
            assert!(reply == request);
        }
    };
    // Warms up the pools. Each thread has 70 connections, and then 105; its tables grow at 64 or less,
    // and after 112.
    let mut streams = Vec::with_capacity(210);
    streams.extend((0..140).map(|_| connect()));
    echo(&streams, 1400);
    let region = Region::new(HEAP);
    streams.extend((0..70).map(|_| connect()));
    echo(&streams, 210);
    let change = region.change();
    let each = (change.bytes_allocated - change.bytes_deallocated) / 70;
    assert!(each <= CONN, "{each} bytes, not {CONN}: {change:?}");

    // The first bytes in a new block, which is mapped and not allocated, are a page fault.
    let page_faults = || getrusage(UsageWho::RUSAGE_SELF).unwrap().minor_page_faults();
    let (region, before) = (Region::new(HEAP), page_faults());
    echo(&streams, 4000);
    let change = region.change();
    assert_eq!(change.allocations + change.reallocations, 0, "{change:?}");
    let faults = page_faults() - before;
    assert!(faults < 4000, "{faults} page faults during 4000 requests");
}
