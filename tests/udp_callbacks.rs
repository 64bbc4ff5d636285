//! Callbacks for datagrams: from chapter 10 on. Each chapter's test has a `service` of its own, with the
//! chapter's modules.

use std::fmt;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};

use clap::Parser;
use common::event_loop::EventLoop;
use common::hooks::Hooks;
use common::limit::Limits;
use common::router::{MsgRouter, NetConnection};
use harness::every_udp::{assert_udp_echo, connect_udp, receive, received};
use harness::{LIMIT, frame};
use tracing::field::Field;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::callbacks::echo;
use crate::pool_callbacks::{Args, start};
use crate::service;
use crate::tcp_server::TcpServer;

/// A server on this thread, with two workers: it reads datagrams when the test says so.
struct Server {
    event_loop: EventLoop<TcpServer>,
    server: TcpServer,
    limits: Limits,
    addr: SocketAddr,
}

impl Server {
    #[track_caller]
    fn new(router: MsgRouter) -> Self {
        // Finds a free port by taking it and giving it back.
        let addr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (mut event_loop, limits) =
            (EventLoop::new().unwrap(), Args::parse_from(["test"]).limits);
        let (arg, service) =
            (addr.to_string().parse().unwrap(), service(router, Hooks::new(), &limits));
        let server = TcpServer::new(&mut event_loop, &arg, &limits, 2, service).unwrap();
        Self { event_loop, server, limits, addr }
    }

    /// Sends a message without a payload, and lets the server handle it.
    #[track_caller]
    fn handle(&mut self, udp: &UdpSocket, id: i32) {
        udp.send(&frame(id, b"")).unwrap();
        assert_eq!(self.event_loop.poll_once(&mut self.server, Some(LIMIT)).unwrap(), 1);
    }
}

/// A callback that sends as many bytes as that.
fn sending(n: usize) -> Box<common::router::MsgCallback> {
    Box::new(move |conn: &mut dyn NetConnection, _: &[u8], id| conn.send_message(&vec![7; n], id))
}

/// Collects the warnings of this thread.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        event.record(&mut |_: &Field, value: &dyn fmt::Debug| {
            self.0.lock().unwrap().push(format!("{value:?}"));
        });
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// On the loop that accepts, which has other things to do as well.
#[test]
fn at_most_64_datagrams_are_handled_per_event() {
    let mut server = Server::new(echo());
    let udp = connect_udp(server.addr);
    for _ in 0..100 {
        udp.send(&frame(1, b"hello")).unwrap();
    }
    let mut turn = || {
        server.event_loop.poll_once(&mut server.server, Some(LIMIT)).unwrap();
        received(&udp)
    };
    assert_eq!([turn(), turn()], [64, 36]);
}

#[test]
fn a_reply_that_does_not_fit_is_a_warning() {
    let mut router = echo();
    // The last fits a message, but no datagram over IPv4; the one before fits both.
    let sizes = [(2, 65_528), (3, 65_499), (4, 65_500)];
    sizes.iter().for_each(|(id, n)| router.add_msg_router(*id, sending(*n)).unwrap());
    let mut server = Server::new(router);
    let (udp, warnings) = (connect_udp(server.addr), Warnings::default());
    let peer = format!("127.0.0.1:{}", udp.local_addr().unwrap().port());
    tracing::subscriber::with_default(warnings.clone(), || {
        [2, 3, 4, 1].iter().for_each(|id| server.handle(&udp, *id));
    });
    assert!(receive(&udp) == frame(3, &[7; 65_499]));
    assert_eq!(receive(&udp), frame(1, b""));
    let expected = [
        format!("{peer}: message length 65528 is not within 0 to 65527"),
        format!("{peer}: a reply of 65500 bytes does not fit a datagram"),
    ];
    assert_eq!(*warnings.0.lock().unwrap(), expected);
}

/// A connection ends then. Here the next datagram is handled like any other.
#[test]
fn a_callback_that_fails_or_closes_ends_nothing() {
    let mut router = echo();
    let close = |conn: &mut dyn NetConnection, _: &[u8], id| {
        conn.close();
        conn.send_message(b"still here", id)
    };
    router.add_msg_router(3, Box::new(close)).unwrap();
    router.add_msg_router(4, Box::new(|_, _, _| anyhow::bail!("not like this"))).unwrap();
    let udp = connect_udp(start(router, Hooks::new()));
    for _ in 0..2 {
        udp.send(&frame(4, b"")).unwrap();
        udp.send(&frame(3, b"")).unwrap();
        assert_eq!(receive(&udp), frame(3, b"still here"));
        assert_udp_echo(&udp, b"hello");
    }
}

#[test]
fn a_callback_may_answer_more_than_once() {
    let mut router = MsgRouter::new();
    let twice = |conn: &mut dyn NetConnection, payload: &[u8], id: i32| {
        conn.send_message(payload, id)?;
        conn.send_message(payload, id + 1)
    };
    router.add_msg_router(5, Box::new(twice)).unwrap();
    let udp = connect_udp(start(router, Hooks::new()));
    udp.send(&frame(5, b"twice")).unwrap();
    assert_eq!([receive(&udp), receive(&udp)], [frame(5, b"twice"), frame(6, b"twice")]);
}

#[test]
fn new_settings_hold_for_datagrams_too() {
    let answering = |n| {
        let mut router = MsgRouter::new();
        router.add_msg_router(1, sending(n)).unwrap();
        router
    };
    let mut server = Server::new(answering(1));
    let udp = connect_udp(server.addr);
    server.handle(&udp, 1);
    let new = service(answering(2), Hooks::new(), &server.limits);
    server.server.apply(&server.limits, new).unwrap();
    server.handle(&udp, 1);
    assert_eq!([receive(&udp), receive(&udp)], [frame(1, &[7]), frame(1, &[7, 7])]);
}
