//! The promises of the lingering close, tested with short limits.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use common::buf_pool::BufPool;
use common::closing::CloseLimits;
use common::event_loop::{Callbacks, EventLoop, Interest, IoCallback, Token};
use common::reactor_buf::OutputBuf;
use nix::sys::socket::{setsockopt, sockopt::RcvBuf};

/// The time limit of every wait.
const LIMIT: Duration = Duration::from_secs(20);

/// A limit that no test reaches.
const NEVER: Duration = Duration::from_secs(3600);

const SHORT: Duration = Duration::from_millis(100);

/// Far more than a socket takes for a peer with a small receive buffer.
const MUCH: usize = 8 << 20;

struct Setup {
    event_loop: EventLoop<()>,
    pool: BufPool,
}

impl Setup {
    /// Creates a loop without limits, except those that `change` sets.
    fn new(change: impl FnOnce(&mut CloseLimits)) -> Self {
        let mut event_loop = EventLoop::new().unwrap();
        event_loop.close_limits =
            CloseLimits { stalled: NEVER, silent: NEVER, linger: NEVER, at_once: usize::MAX };
        change(&mut event_loop.close_limits);
        Self { event_loop, pool: BufPool::new(64 << 20) }
    }

    /// Opens a registered connection with `unsent` bytes of output, and its blocking peer.
    #[track_caller]
    fn open(&mut self, unsent: usize) -> (TcpStream, Token, OutputBuf, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        setsockopt(&listener, RcvBuf, &32_768).unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        setsockopt(&peer, RcvBuf, &32_768).unwrap();
        peer.set_read_timeout(Some(LIMIT)).unwrap();
        let (ours, _) = listener.accept().unwrap();
        ours.set_nonblocking(true).unwrap();
        let unused: IoCallback<()> = |_, _, _| Err(anyhow!("the loop has taken it over"));
        let callbacks = Callbacks { read: Some(unused), write: Some(unused) };
        let token = self.event_loop.add_io_event(&ours, Interest::READ, callbacks).unwrap();
        let mut output = OutputBuf::new(&self.pool);
        output.send_data(&bytes(unsent)[..]).unwrap();
        (ours, token, output, peer)
    }

    /// Opens a connection like [`open`](Self::open), and has the loop close it.
    #[track_caller]
    fn close(&mut self, unsent: usize) -> TcpStream {
        let (ours, token, output, peer) = self.open(unsent);
        self.event_loop.close_gracefully(ours, token, output).unwrap();
        peer
    }

    /// Runs the loop until `condition` holds.
    #[track_caller]
    fn run_until(&mut self, mut condition: impl FnMut(&EventLoop<()>) -> bool) {
        let start = Instant::now();
        while !condition(&self.event_loop) {
            assert!(start.elapsed() < LIMIT, "timed out");
            self.event_loop.poll_once(&mut (), Some(Duration::from_millis(5))).unwrap();
        }
    }

    /// Runs the loop until no connection is left, and no block of the pool is in use.
    #[track_caller]
    fn run_until_closed(&mut self) {
        self.run_until(|event_loop| event_loop.registered() == 0);
        assert_eq!(self.pool.stats().in_use, 0);
    }
}

fn bytes(n: usize) -> Vec<u8> {
    (0..n).map(|n| (n % 251) as u8).collect()
}

#[track_caller]
fn read_to_end(mut peer: &TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    peer.read_to_end(&mut received).unwrap();
    received
}

/// The peer keeps sending, and that must not make the kernel send a reset.
#[test]
fn unsent_output_is_delivered_despite_unread_input() {
    let mut setup = Setup::new(|_| {});
    let (ours, token, output, peer) = setup.open(MUCH);
    (&peer).write_all(&bytes(100_000)).unwrap();
    let reader = peer.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut received = Vec::new();
        while received.len() < MUCH {
            let mut block = [0; 10_000];
            let n = (&reader).read(&mut block).unwrap();
            received.extend_from_slice(&block[..n]);
            (&reader).write_all(b"still sending").unwrap();
        }
        received.extend(read_to_end(&reader));
        reader.shutdown(Shutdown::Write).unwrap();
        received
    });
    setup.event_loop.close_gracefully(ours, token, output).unwrap();
    setup.run_until_closed();
    assert!(reader.join().unwrap() == bytes(MUCH));
}

#[test]
fn ends_at_once_if_the_peer_has_closed_and_nothing_is_unsent() {
    let mut setup = Setup::new(|_| {});
    let (ours, token, output, peer) = setup.open(0);
    peer.shutdown(Shutdown::Write).unwrap();
    ours.set_nonblocking(false).unwrap();
    assert_eq!((&ours).read(&mut [0]).unwrap(), 0);
    ours.set_nonblocking(true).unwrap();
    setup.event_loop.close_gracefully(ours, token, output).unwrap();
    assert_eq!(setup.event_loop.registered(), 0);
    assert_eq!(read_to_end(&peer), b"");
}

#[test]
fn a_peer_that_has_half_closed_gets_the_rest() {
    let mut setup = Setup::new(|_| {});
    let peer = setup.close(MUCH);
    peer.shutdown(Shutdown::Write).unwrap();
    let reader = thread::spawn(move || read_to_end(&peer));
    setup.run_until_closed();
    assert!(reader.join().unwrap() == bytes(MUCH));
}

/// What the kernel holds at that time is still delivered.
#[test]
fn gives_up_on_a_silent_peer_after_the_fin() {
    let mut setup = Setup::new(|limits| limits.silent = SHORT);
    let peer = setup.close(5000);
    setup.run_until_closed();
    assert_eq!(read_to_end(&peer), bytes(5000));
}

#[test]
fn a_peer_that_sends_is_not_silent() {
    let mut setup = Setup::new(|limits| limits.silent = SHORT);
    let peer = setup.close(5000);
    let start = Instant::now();
    setup.run_until(|event_loop| {
        (&peer).write_all(b"still there").unwrap();
        event_loop.registered() == 0 || start.elapsed() > 4 * SHORT
    });
    assert_eq!(setup.event_loop.registered(), 1);
    setup.run_until_closed();
}

#[test]
fn gives_up_on_a_peer_that_never_stops_sending() {
    let mut setup = Setup::new(|limits| limits.linger = SHORT);
    let mut peer = setup.close(5000);
    let sender = thread::spawn(move || while peer.write_all(&bytes(4096)).is_ok() {});
    setup.run_until_closed();
    sender.join().unwrap();
}

/// What the peer sends meanwhile does not count: it has to take the output.
#[test]
fn gives_up_on_a_peer_that_takes_no_output() {
    let mut setup = Setup::new(|limits| limits.stalled = SHORT);
    let peer = setup.close(MUCH);
    peer.set_nonblocking(true).unwrap();
    setup.run_until(|event_loop| {
        let _ = (&peer).write(b"I'm still here");
        event_loop.registered() == 0
    });
    assert_eq!((setup.pool.stats().in_use, setup.event_loop.failed_closes), (0, 1));
}

#[test]
fn a_peer_that_takes_its_output_slowly_gets_all_of_it() {
    let mut setup = Setup::new(|limits| limits.stalled = 3 * SHORT);
    let peer = setup.close(MUCH);
    let start = Instant::now();
    let reader = thread::spawn(move || {
        let mut received = vec![0; 1 << 20];
        for part in received.chunks_mut(1 << 16) {
            (&peer).read_exact(part).unwrap();
            thread::sleep(SHORT / 2);
        }
        received.extend(read_to_end(&peer));
        received
    });
    setup.run_until_closed();
    assert!(start.elapsed() > setup.event_loop.close_limits.stalled, "the peer was not slow");
    assert!(reader.join().unwrap() == bytes(MUCH));
}

#[test]
fn a_reset_ends_it() {
    let mut setup = Setup::new(|_| {});
    for unsent in [0, MUCH] {
        let peer = setup.close(unsent);
        let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        setsockopt(&peer, nix::sys::socket::sockopt::Linger, &at_once).unwrap();
        drop(peer);
        setup.run_until_closed();
    }
}

#[test]
fn beyond_the_limit_connections_are_dropped() {
    // Half of it for those that are owed nothing.
    let mut setup = Setup::new(|limits| limits.at_once = 4);
    let peers = [(); 3].map(|()| setup.close(5000));
    assert_eq!(setup.event_loop.registered(), 2);
    assert_eq!(read_to_end(&peers[2]), bytes(5000), "the socket has taken it all");
    drop(peers);
    setup.run_until_closed();
    let _peer = setup.close(0);
    assert_eq!(setup.event_loop.registered(), 1, "there is room again");
}

/// No other limit applies, and only connections with unsent output count as cut off.
#[test]
fn a_stop_waits_for_closing_connections_until_its_end() {
    let mut setup = Setup::new(|limits| limits.at_once = 0);
    let end = Instant::now() + 2 * SHORT;
    setup.event_loop.drain_input(&mut (), end).unwrap();
    let (done, deaf, stays) = (setup.close(5000), setup.close(MUCH), setup.close(5000));
    assert_eq!(setup.event_loop.registered(), 3);
    let client = thread::spawn(move || read_to_end(&done));
    assert_eq!(setup.event_loop.drain_output(&mut (), end).unwrap(), 1);
    assert_eq!((setup.event_loop.registered(), setup.pool.stats().in_use), (0, 0));
    assert_eq!(client.join().unwrap(), bytes(5000));
    assert_eq!(read_to_end(&stays), bytes(5000));
    drop(deaf);
}

#[test]
fn a_stop_does_not_wait_when_nothing_is_closing() {
    let mut setup = Setup::new(|_| {});
    let end = Instant::now() + NEVER;
    setup.event_loop.drain_input(&mut (), end).unwrap();
    drop(setup.close(0));
    assert_eq!(setup.event_loop.drain_output(&mut (), end).unwrap(), 0);
}

/// Neither an event nor a timer that cuts an iteration short makes it stop serving too early.
#[test]
fn a_stop_serves_until_it_is_quiet() {
    struct State {
        ours: TcpStream,
        peer: TcpStream,
        served: usize,
    }
    let (ours, peer) = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (listener.accept().unwrap().0, peer)
    };
    let mut event_loop = EventLoop::<State>::new().unwrap();
    // Each timer makes the peer send again, 30 ms after the previous byte.
    let serve: IoCallback<State> = |state, event_loop, token| {
        (&state.ours).read_exact(&mut [0])?;
        state.served += 1;
        let send: IoCallback<State> = |state, _, _| Ok(state.peer.write_all(b"x")?);
        if state.served < 5 {
            event_loop.run_after(Duration::from_millis(10), token, |_, _, _| Ok(()))?;
            event_loop.run_after(Duration::from_millis(30), token, send)?;
        }
        Ok(())
    };
    let callbacks = Callbacks { read: Some(serve), write: None };
    event_loop.add_io_event(&ours, Interest::READ, callbacks).unwrap();
    (&peer).write_all(b"x").unwrap();
    let mut state = State { ours, peer, served: 0 };
    event_loop.drain_input(&mut state, Instant::now() + LIMIT).unwrap();
    assert_eq!(state.served, 5);

    // It also ends if the peer never stops sending.
    let again: IoCallback<State> = |state, _, _| {
        (&state.ours).read_exact(&mut [0])?;
        Ok(state.peer.write_all(b"x")?)
    };
    let mut event_loop = EventLoop::<State>::new().unwrap();
    let callbacks = Callbacks { read: Some(again), write: None };
    event_loop.add_io_event(&state.ours, Interest::READ, callbacks).unwrap();
    state.peer.write_all(b"x").unwrap();
    event_loop.drain_input(&mut state, Instant::now() + SHORT).unwrap();
}

#[test]
fn the_limits_are_those_of_nginx() {
    let CloseLimits { stalled, silent, linger, at_once } = CloseLimits::default();
    assert_eq!([stalled, silent, linger].map(|limit| limit.as_secs()), [60, 5, 30]);
    assert_eq!(at_once, 1024);
}
