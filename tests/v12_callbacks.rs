//! Chapter 12's server with callbacks that block, panic, fail or close, with new settings, over UDP, with
//! callbacks that publish, and with sessions of another kind.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod callbacks;
mod config_callbacks;
#[path = "../reactor-v12/src/conns.rs"]
mod conns;
mod pool_callbacks;
mod publish_callbacks;
#[path = "../reactor-v12/src/tcp_server.rs"]
mod tcp_server;
mod udp_callbacks;
#[path = "../reactor-v12/src/worker.rs"]
mod worker;

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::ensure;
use common::hooks::{Hooks, SessionHook};
use common::limit::Limits;
use common::router::{MsgRouter, NetConnection};
use common::task::{Publisher, PublisherCallback};
use harness::{
    assert_echo, assert_silent, connect, frame, narrow, read, read_to_end, reset, send_fin, served,
    wait_until, write,
};

use crate::callbacks::echo;
use crate::conns::Service;
use crate::pool_callbacks::{Running, start};
use crate::publish_callbacks::{Blocked, MANY, ROOM, for_publishers, numbered};

#[derive(Default)]
pub struct Session {
    messages: u64,
    /// Set by the start hook of [`Counted`], which so counts the sessions that live.
    alive: Option<Arc<()>>,
}

fn service(router: MsgRouter, hooks: Hooks, limits: &Limits) -> Service {
    publisher_service(for_publishers(router), hooks, limits)
}

/// With hooks that do not know of sessions.
fn publisher_service(
    router: MsgRouter<PublisherCallback<Session>>,
    hooks: Hooks,
    limits: &Limits,
) -> Service {
    let start = Arc::new(hooks);
    let (close, mut hooks) = (Arc::clone(&start), Hooks::<SessionHook<Session>>::default());
    hooks.set_conn_start(Box::new(move |conn, _| start.on_conn_start(conn)));
    hooks.set_conn_close(Box::new(move |conn, _| close.on_conn_close(conn)));
    Service { router, hooks, timeouts: limits.timeouts }
}

/// Although its callback is called again and again.
#[test]
fn a_message_that_waits_counts_once() {
    let publish_and_count = |conn: &mut Publisher<Session>, payload: &[u8], id| {
        conn.publish(payload, id)?;
        let count = conn.session.messages;
        conn.send_message(&count.to_le_bytes(), 6)
    };
    let server = Blocked::new(&[], Hooks::new(), Box::new(publish_and_count));
    let [_beside, publisher] = server.clients();
    server.block();
    let counted = |numbers: std::ops::Range<usize>| -> Vec<u8> {
        // The first message was the one of `served`.
        let count = |n: usize| frame(6, &(n as u64 + 2).to_le_bytes());
        numbers.flat_map(|n| [numbered(n..n + 1), count(n)].concat()).collect()
    };
    write(&publisher, &numbered(0..MANY));
    assert!(read(&publisher, 32 * ROOM) == counted(0..ROOM));
    assert_silent(&publisher);
    server.go_on(&numbered(0..MANY));
    assert!(read(&publisher, 32 * (MANY - ROOM)) == counted(ROOM..MANY));
}

/// A server on one thread whose sessions are counted.
struct Counted {
    server: Running,
    alive: Arc<()>,
    /// How many sessions have been closed with what the start hook gave them.
    closed: Arc<AtomicUsize>,
}

impl Counted {
    /// Id 3 publishes, 4 closes, 5 fails, and 6 makes the start hooks fail from then on.
    fn new(options: &[&str]) -> Self {
        let (alive, closed, fails) = <(Arc<()>, Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let (given, counter, failing) = (alive.clone(), closed.clone(), fails.clone());
        let mut router = for_publishers(echo());
        router.add_msg_router(3, Box::new(|conn, payload, id| conn.publish(payload, id))).unwrap();
        let close = |conn: &mut Publisher<Session>, _: &[u8], _: i32| {
            conn.close();
            Ok(())
        };
        router.add_msg_router(4, Box::new(close)).unwrap();
        router.add_msg_router(5, Box::new(|_, _, _| anyhow::bail!("not like this"))).unwrap();
        let fail = move |conn: &mut Publisher<Session>, payload: &[u8], id: i32| {
            fails.store(1, Ordering::SeqCst);
            conn.send_message(payload, id)
        };
        router.add_msg_router(6, Box::new(fail)).unwrap();
        let mut hooks = Hooks::<SessionHook<Session>>::default();
        hooks.set_conn_start(Box::new(move |_, session| {
            ensure!(session.messages == 0 && session.alive.is_none(), "not a new session");
            session.alive = Some(Arc::clone(&given));
            ensure!(failing.load(Ordering::SeqCst) == 0, "on purpose");
            Ok(())
        }));
        hooks.set_conn_close(Box::new(move |_, session| {
            counter.fetch_add(usize::from(session.alive.is_some()), Ordering::SeqCst);
            Ok(())
        }));
        let server = Running::with(1, options, |limits| Service {
            router,
            hooks,
            timeouts: limits.timeouts,
        });
        let counted = Self { server, alive, closed };
        // The first client was the one that tries whether it listens.
        counted.wait_for(0, 1);
        counted
    }

    /// Waits until this many sessions live and this many have been closed.
    #[track_caller]
    fn wait_for(&self, alive: usize, closed: usize) {
        // This is one, and the hook has one.
        wait_until(&format!("{alive} sessions live, {closed} are closed"), || {
            Arc::strong_count(&self.alive) == 2 + alive
                && self.closed.load(Ordering::SeqCst) == closed
        });
    }

    fn client(&self) -> TcpStream {
        served(self.server.addr)
    }

    /// There is one client. Another one comes, and is ended.
    #[track_caller]
    fn assert_ends(&self, end: impl FnOnce(TcpStream)) {
        let closed = self.closed.load(Ordering::SeqCst);
        let client = self.client();
        self.wait_for(2, closed);
        end(client);
        self.wait_for(1, closed + 1);
    }
}

#[test]
fn a_session_ends_with_its_connection_however_that_ends() {
    let counted = Counted::new(&["--max-conns", "2"]);
    let stays = counted.client();
    counted.assert_ends(|client| {
        let refused = connect(counted.server.addr);
        assert_eq!(read_to_end(&refused), frame(-1, b"server is full"));
        counted.wait_for(2, 1);
        drop(client);
    });
    counted.assert_ends(|client| send_fin(&client));
    counted.assert_ends(reset);
    let bad_header = [1_i32, -1].map(i32::to_le_bytes).concat();
    for end in [bad_header, frame(4, b""), frame(5, b"")] {
        counted.assert_ends(|client| write(&client, &end));
    }
    // One that reads too slowly.
    counted.assert_ends(|client| {
        narrow(&client);
        let message = frame(3, &[7; 60_000]);
        wait_until("it is dropped", || {
            assert_echo(&stays, &message);
            Arc::strong_count(&counted.alive) == 2 + 1
        });
    });
    let closed = counted.closed.load(Ordering::SeqCst);
    assert_echo(&stays, &frame(6, b""));
    assert_eq!(read_to_end(&connect(counted.server.addr)), b"");
    counted.wait_for(1, closed + 1);
    let Counted { server, alive, .. } = counted;
    server.stop().unwrap();
    assert_eq!(Arc::strong_count(&alive), 1);
    assert_eq!(read_to_end(&stays), b"");
}

#[test]
fn a_session_ends_with_a_timeout() {
    let options = ["--idle-timeout", "0.5", "--frame-timeout", "0.1"];
    let counted = Counted::new(&options);
    let (idle, midway) = (counted.client(), counted.client());
    write(&midway, &frame(1, b"hello")[..5]);
    counted.wait_for(0, 3);
    assert_eq!([read_to_end(&idle), read_to_end(&midway)], [b"", b""]);
}
