//! What a connection sends of its own accord, while its peer does not read; and what counts as activity.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;

use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop};
use common::tcp_conn::TcpConn;
use harness::{LIMIT, frame, narrow, pattern};
use nix::sys::socket::{setsockopt, sockopt::SndBuf};

/// A connection whose kernel holds little, and its peer.
fn connection(event_loop: &mut EventLoop<()>) -> (TcpConn, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    peer.set_read_timeout(Some(LIMIT)).unwrap();
    narrow(&peer);
    let (stream, addr) = listener.accept().unwrap();
    setsockopt(&stream, SndBuf, &4096).unwrap();
    let callbacks = Callbacks { read: None, write: None };
    let conn = TcpConn::new(event_loop, stream, addr, &BufPool::new(1 << 22), callbacks).unwrap();
    (conn, peer)
}

/// Neither those before it nor those after it, though all of them are unsent at first.
#[test]
fn what_is_sent_comes_after_unsent_output_and_inside_no_message() {
    let mut event_loop = EventLoop::new().unwrap();
    let (mut conn, mut peer) = connection(&mut event_loop);
    let mut expected = Vec::new();
    for n in 0..10 {
        let (reply, news) = (pattern(60_000, n), pattern(n as usize * 7, n));
        conn.send_message(&reply, 1).unwrap();
        assert!(conn.do_write(&mut event_loop, |_, _, _| Ok(())).unwrap().is_continue());
        assert!(n == 0 || !conn.output.is_empty());
        assert!(conn.do_send(&mut event_loop, &news, 3).unwrap().is_continue());
        expected.extend([frame(1, &reply), frame(3, &news)].concat());
    }
    let mut received = vec![0; expected.len()];
    let reader = thread::spawn(move || peer.read_exact(&mut received).map(|()| received));
    while !conn.output.is_empty() {
        let progress = conn.do_write(&mut event_loop, |_, _, _| Ok(()));
        assert!(matches!(progress, Ok(ControlFlow::Continue(()))));
    }
    assert!(reader.join().unwrap().unwrap() == expected);
}

#[test]
fn a_slow_consumer_fails_above_the_high_water_mark() {
    const HIGH_WATER: usize = 960 * 1024;
    let mut event_loop = EventLoop::new().unwrap();
    let (mut conn, _peer) = connection(&mut event_loop);
    let err = (0..1000).find_map(|_| {
        let before = conn.output.len();
        let result = conn.do_send(&mut event_loop, &[7; 10_000], 3);
        assert_eq!(result.is_ok(), before <= HIGH_WATER);
        result.err()
    });
    assert_eq!(err.unwrap().to_string(), "it reads too slowly");
    let unsent = conn.output.len();
    assert!(unsent > HIGH_WATER && unsent <= HIGH_WATER + 10_008, "{unsent}");
}

/// Each by itself: a message without a reply, and output for a peer that sends nothing.
#[test]
fn a_message_and_output_are_activity_but_half_a_message_is_not() {
    let mut event_loop = EventLoop::new().unwrap();
    let (mut conn, mut peer) = connection(&mut event_loop);
    let message = frame(2, b"hello");
    let mut before = conn.last_active();
    for (part, is_activity) in [(&message[..9], false), (&message[9..], true)] {
        peer.write_all(part).unwrap();
        event_loop.poll_once(&mut (), Some(LIMIT)).unwrap();
        assert!(conn.do_read(&mut event_loop, |_, _, _| Ok(())).unwrap().is_continue());
        assert_eq!(conn.last_active() > before, is_activity);
        before = conn.last_active();
    }
    event_loop.poll_once(&mut (), Some(Duration::ZERO)).unwrap();
    assert!(conn.do_send(&mut event_loop, b"news", 3).unwrap().is_continue());
    assert!(conn.last_active() > before);
}
