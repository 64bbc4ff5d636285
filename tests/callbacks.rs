//! Hooks and callbacks that fail, or close: from chapter 7 on. Each chapter's test has a `start` of its
//! own, with the chapter's modules.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::ensure;
use common::hooks::Hooks;
use common::router::{MsgRouter, NetConnection};
use harness::{assert_echo, frame, read_to_end, send_fin, wait_until, write};

use crate::start;

/// An echo for id 1.
pub fn echo() -> MsgRouter {
    let mut router = MsgRouter::new();
    router.add_msg_router(1, Box::new(|conn, payload, id| conn.send_message(payload, id))).unwrap();
    router
}

#[test]
fn a_second_callback_for_an_id_is_an_error() {
    let err = echo().add_msg_router(1, Box::new(|_, _, _| Ok(()))).unwrap_err();
    assert!(err.to_string().contains("message id 1"), "{err}");
}

#[test]
fn a_start_hook_that_fails_ends_that_connection_alone() {
    let (started, closed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (starts, closes) = (Arc::clone(&started), Arc::clone(&closed));
    let mut hooks = Hooks::new();
    hooks.set_conn_start(Box::new(move |conn| {
        conn.send_message(b"welcome", 101)?;
        ensure!(starts.fetch_add(1, Ordering::SeqCst) % 2 == 0, "every second one fails");
        Ok(())
    }));
    hooks.set_conn_close(Box::new(move |_| {
        closes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }));
    // The first client is the one that tries whether it listens.
    let addr = start(echo(), hooks);
    wait_until("it has started", || started.load(Ordering::SeqCst) == 1);
    let fails = harness::connect(addr);
    assert_eq!(read_to_end(&fails), frame(101, b"welcome"));
    let good = harness::connect(addr);
    assert_echo_after(&good, &frame(101, b"welcome"));
    drop((fails, good));
    wait_until("each start has its end", || {
        closed.load(Ordering::SeqCst) == 3 && started.load(Ordering::SeqCst) == 3
    });
}

#[track_caller]
fn assert_echo_after(client: &TcpStream, first: &[u8]) {
    assert_eq!(harness::read(client, first.len()), first);
    assert_echo(client, &frame(1, b"hello"));
}

#[test]
fn what_the_close_hook_sends_arrives() {
    let mut hooks = Hooks::new();
    hooks.set_conn_close(Box::new(|conn| conn.send_message(b"goodbye", 102)));
    let client = harness::connect(start(echo(), hooks));
    assert_echo(&client, &frame(1, b"hello"));
    send_fin(&client);
    assert_eq!(read_to_end(&client), frame(102, b"goodbye"));
}

#[test]
fn a_close_hook_that_fails_costs_neither_replies_nor_other_clients() {
    let mut hooks = Hooks::new();
    hooks.set_conn_close(Box::new(|_| anyhow::bail!("not like this")));
    let addr = start(echo(), hooks);
    let [ends, resets, stays] = [(); 3].map(|()| harness::connect(addr));
    write(&ends, &frame(1, b"last words"));
    send_fin(&ends);
    assert_eq!(read_to_end(&ends), frame(1, b"last words"));
    assert_echo(&resets, &frame(1, b"hello"));
    harness::reset(resets);
    assert_echo(&stays, &frame(1, b"hello"));
    assert_echo(&harness::connect(addr), &frame(1, b"hello"));
}

/// The replies before it arrive; the messages after it are not handled.
#[test]
fn a_callback_can_close_the_connection_or_fail() {
    let mut router = echo();
    let close = |conn: &mut dyn NetConnection, _: &[u8], _: i32| {
        conn.close();
        Ok(())
    };
    router.add_msg_router(3, Box::new(close)).unwrap();
    router.add_msg_router(4, Box::new(|_, _, _| anyhow::bail!("not like this"))).unwrap();
    let addr = start(router, Hooks::new());
    for id in [3, 4] {
        let client = harness::connect(addr);
        let (before, after) = (frame(1, b"before").repeat(3), frame(1, b"after"));
        write(&client, &[before.clone(), frame(id, b""), after].concat());
        assert_eq!(read_to_end(&client), before, "id {id}");
    }
}
