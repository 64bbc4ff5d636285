//! The promises of `EventLoop`, over real sockets and timers.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use common::event_loop::{Callbacks, EventLoop, Interest, IoCallback, TimerId, Token};

/// The time limit of every wait for a callback.
const LIMIT: Duration = Duration::from_secs(20);

const HOUR: Duration = Duration::from_secs(3600);

const BOTH: Interest = Interest { read: true, write: true };

type Loop = EventLoop<World>;

/// The state of the callbacks, with a record of their calls.
#[derive(Default)]
struct World {
    calls: Vec<(&'static str, Token)>,
    conns: HashMap<Token, Conn>,
    timer: Option<TimerId>,
}

struct Conn {
    ours: UnixStream,
    peer: UnixStream,
}

impl World {
    /// Registers one end of a new pair of sockets.
    #[track_caller]
    fn open(
        &mut self,
        event_loop: &mut Loop,
        interest: Interest,
        callbacks: Callbacks<Self>,
    ) -> Token {
        let (ours, peer) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let token = event_loop.add_io_event(&ours, interest, callbacks).unwrap();
        self.conns.insert(token, Conn { ours, peer });
        token
    }

    #[track_caller]
    fn close(&mut self, event_loop: &mut Loop, token: Token) {
        let conn = self.conns.remove(&token).unwrap();
        event_loop.del_io_event(&conn.ours, token).unwrap();
    }

    #[track_caller]
    fn set_interest(&self, event_loop: &mut Loop, token: Token, interest: Interest) {
        let ours = &self.conns[&token].ours;
        event_loop.set_interest(ours, token, interest).unwrap();
    }

    #[track_caller]
    fn peer_writes(&self, token: Token, data: &[u8]) {
        (&self.conns[&token].peer).write_all(data).unwrap();
    }

    #[track_caller]
    fn assert_calls(&mut self, expected: &[(&str, Token)]) {
        assert_eq!(self.calls, expected);
        self.calls.clear();
    }
}

/// Reads one byte.
fn read(world: &mut World, _: &mut Loop, token: Token) -> anyhow::Result<()> {
    world.calls.push(("read", token));
    Ok((&world.conns[&token].ours).read_exact(&mut [0])?)
}

/// Loses interest after one call.
fn write(world: &mut World, event_loop: &mut Loop, token: Token) -> anyhow::Result<()> {
    world.calls.push(("write", token));
    world.set_interest(event_loop, token, Interest::NONE);
    Ok(())
}

fn timer(world: &mut World, _: &mut Loop, token: Token) -> anyhow::Result<()> {
    world.calls.push(("timer", token));
    Ok(())
}

fn callbacks(read: IoCallback<World>, write: IoCallback<World>) -> Callbacks<World> {
    Callbacks { read: Some(read), write: Some(write) }
}

/// Runs until a callback stops the loop or fails.
fn try_run<S>(event_loop: &mut EventLoop<S>, state: &mut S) -> anyhow::Result<()> {
    let time_out: IoCallback<S> = |_, _, _| Err(anyhow!("timed out"));
    let limit = event_loop.run_after(LIMIT, Token::default(), time_out)?;
    let result = event_loop.event_process(state);
    event_loop.cancel_timer(limit);
    result
}

#[track_caller]
fn run<S>(event_loop: &mut EventLoop<S>, state: &mut S) {
    try_run(event_loop, state).unwrap();
}

/// One iteration: everything that is ready, and the timers that are due.
#[track_caller]
fn run_once<S>(event_loop: &mut EventLoop<S>, state: &mut S) -> usize {
    event_loop.poll_once(state, Some(Duration::ZERO)).unwrap()
}

#[test]
fn each_event_calls_its_callback_with_its_token() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let a = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    let b = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
    world.peer_writes(b, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", b)]);
    world.set_interest(&mut event_loop, a, Interest::WRITE);
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("write", a)]);
}

#[test]
fn one_event_for_both_calls_read_before_write() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, BOTH, callbacks(read, write));
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token), ("write", token)]);
}

#[test]
fn what_a_callback_leaves_undone_is_reported_again() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let read_and_stop: IoCallback<World> = |world, event_loop, token| {
        event_loop.stop();
        read(world, event_loop, token)
    };
    let token = world.open(&mut event_loop, Interest::READ, callbacks(read_and_stop, write));
    world.peer_writes(token, b"abc");
    for _ in 0..3 {
        run(&mut event_loop, &mut world);
        world.assert_calls(&[("read", token)]);
    }
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
}

#[test]
fn without_interest_nothing_is_reported_and_nothing_lost() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, Interest::NONE, callbacks(read, write));
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
    world.set_interest(&mut event_loop, token, Interest::READ);
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
}

/// Otherwise one fd would be deregistered in the loop's table, and the other in epoll.
#[test]
fn a_token_does_not_match_another_fd() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    let other = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    let stranger = &world.conns[&other].ours;
    let change = event_loop.set_interest(stranger, token, Interest::WRITE);
    assert_eq!(change.unwrap_err().kind(), ErrorKind::NotFound);
    let deletion = event_loop.del_io_event(stranger, token);
    assert_eq!(deletion.unwrap_err().kind(), ErrorKind::NotFound);
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
    world.close(&mut event_loop, other);
}

#[test]
fn a_hang_up_is_reported_even_without_interest() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let close: IoCallback<World> = |world, event_loop, token| {
        world.calls.push(("close", token));
        world.close(event_loop, token);
        Ok(())
    };
    let never: IoCallback<World> = |_, _, _| Err(anyhow!("Other"));
    let only_write = Callbacks { read: None, write: Some(close) };
    for callbacks in [callbacks(close, never), only_write] {
        let token = world.open(&mut event_loop, Interest::NONE, callbacks);
        let (_, elsewhere) = UnixStream::pair().unwrap();
        world.conns.get_mut(&token).unwrap().peer = elsewhere;
        run_once(&mut event_loop, &mut world);
        world.assert_calls(&[("close", token)]);
    }
}

#[test]
fn an_error_is_reported_even_without_interest() {
    // The write end of a pipe without a reader has EPOLLERR, and no EPOLLHUP.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    let mut event_loop = EventLoop::<Vec<Token>>::new().unwrap();
    let called: IoCallback<Vec<Token>> = |calls, event_loop, token| {
        calls.push(token);
        event_loop.stop();
        Ok(())
    };
    let callbacks = Callbacks { read: Some(called), write: None };
    let token = event_loop.add_io_event(&writer, Interest::NONE, callbacks).unwrap();
    drop(reader);
    let mut calls = Vec::new();
    run(&mut event_loop, &mut calls);
    assert_eq!(calls, [token]);
}

/// Otherwise the loop would spin, and nothing would stop it.
#[test]
fn a_hang_up_reaches_the_only_callback_there_is() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let close: IoCallback<World> = |world, event_loop, token| {
        world.calls.push(("close", token));
        world.close(event_loop, token);
        event_loop.stop();
        Ok(())
    };
    for interest in [Interest::READ, Interest::WRITE, Interest::NONE, BOTH] {
        for reads in [true, false] {
            let (read, write) = if reads { (Some(close), None) } else { (None, Some(close)) };
            let token = world.open(&mut event_loop, interest, Callbacks { read, write });
            let (other, _) = UnixStream::pair().unwrap();
            drop(std::mem::replace(&mut world.conns.get_mut(&token).unwrap().peer, other));
            run(&mut event_loop, &mut world);
            world.assert_calls(&[("close", token)]);
        }
    }
}

#[test]
fn one_hang_up_calls_the_writer_once() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let once: IoCallback<World> = |world, event_loop, token| {
        world.calls.push(("write", token));
        world.set_interest(event_loop, token, Interest::WRITE);
        event_loop.stop();
        Ok(())
    };
    let writer = Callbacks { read: None, write: Some(once) };
    let token = world.open(&mut event_loop, Interest::NONE, writer);
    let (other, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut world.conns.get_mut(&token).unwrap().peer, other));
    run(&mut event_loop, &mut world);
    world.assert_calls(&[("write", token)]);
}

#[test]
fn a_read_callback_that_stops_the_loop_is_not_followed_by_write() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let stop: IoCallback<World> = |world, event_loop, token| {
        world.calls.push(("read", token));
        event_loop.stop();
        Ok(())
    };
    let token = world.open(&mut event_loop, BOTH, callbacks(stop, write));
    world.peer_writes(token, b"x");
    run(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
}

#[test]
fn a_deregistered_fd_is_silent_until_it_is_registered_again() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, BOTH, callbacks(read, write));
    world.peer_writes(token, b"x");
    let conn = world.conns.remove(&token).unwrap();
    event_loop.del_io_event(&conn.ours, token).unwrap();
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
    let again = event_loop.add_io_event(&conn.ours, Interest::READ, callbacks(read, write));
    let token = again.unwrap();
    world.conns.insert(token, conn);
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
}

#[test]
fn a_stale_event_does_not_reach_a_reused_fd() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    // The callback of the first of two ready sockets replaces the other one by a new socket, which
    // typically has the same fd number.
    let replace_the_other: IoCallback<World> = |world, event_loop, token| {
        read(world, event_loop, token)?;
        let other = *world.conns.keys().find(|other| **other != token).unwrap();
        world.close(event_loop, other);
        let successor: IoCallback<World> = |world, _, token| {
            world.calls.push(("successor", token));
            Ok(())
        };
        let callbacks = callbacks(successor, successor);
        world.open(event_loop, Interest::READ, callbacks);
        Ok(())
    };
    for _ in 0..2 {
        let callbacks = callbacks(replace_the_other, write);
        let token = world.open(&mut event_loop, Interest::READ, callbacks);
        world.peer_writes(token, b"x");
    }
    run_once(&mut event_loop, &mut world);
    let first = world.calls[0].1;
    world.assert_calls(&[("read", first)]);
}

#[test]
fn a_read_callback_that_closes_its_fd_is_the_last_one_called_for_it() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let replace_itself: IoCallback<World> = |world, event_loop, token| {
        read(world, event_loop, token)?;
        world.close(event_loop, token);
        world.open(event_loop, Interest::WRITE, callbacks(read, write));
        Ok(())
    };
    let token = world.open(&mut event_loop, BOTH, callbacks(replace_itself, write));
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    run_once(&mut event_loop, &mut world);
    let successor = *world.conns.keys().next().unwrap();
    world.assert_calls(&[("read", token), ("write", successor)]);
}

#[test]
fn a_read_callback_that_drops_the_interest_in_writing_is_not_followed_by_write() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let read_only: IoCallback<World> = |world, event_loop, token| {
        world.set_interest(event_loop, token, Interest::READ);
        read(world, event_loop, token)
    };
    let token = world.open(&mut event_loop, BOTH, callbacks(read_only, write));
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
}

#[test]
fn an_error_of_any_callback_ends_the_loop_at_once() {
    let fail: IoCallback<World> = |world, _, token| {
        world.calls.push(("fail", token));
        Err(anyhow!("out of luck"))
    };
    for interest in [Interest::READ, Interest::WRITE, BOTH] {
        let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
        for _ in 0..2 {
            let token = world.open(&mut event_loop, interest, callbacks(fail, fail));
            world.peer_writes(token, b"x");
        }
        let err = try_run(&mut event_loop, &mut world).unwrap_err();
        assert_eq!(err.to_string(), "out of luck");
        assert_eq!(world.calls.len(), 1);
    }

    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    for _ in 0..2 {
        let zero = Duration::ZERO;
        event_loop.run_after(zero, Token::default(), fail).unwrap();
    }
    let err = try_run(&mut event_loop, &mut world).unwrap_err();
    assert_eq!(err.to_string(), "out of luck");
    assert_eq!(world.calls.len(), 1);
}

#[test]
fn after_a_stop_the_rest_of_the_batch_is_reported_by_the_next_run() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let write_and_stop: IoCallback<World> = |world, event_loop, token| {
        event_loop.stop();
        write(world, event_loop, token)
    };
    let opened = HashSet::from([(); 3].map(|()| {
        let callbacks = callbacks(read, write_and_stop);
        world.open(&mut event_loop, BOTH, callbacks)
    }));
    for calls in 1..=3 {
        run(&mut event_loop, &mut world);
        assert_eq!(world.calls.len(), calls);
    }
    let called: HashSet<_> = world.calls.into_iter().map(|(_, token)| token).collect();
    assert_eq!(called, opened);
}

#[test]
fn a_regular_file_is_refused_and_leaves_nothing_behind() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let file = File::open(std::env::current_exe().unwrap()).unwrap();
    for _ in 0..2 {
        let result = event_loop.add_io_event(&file, BOTH, callbacks(read, write));
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    let token = world.open(&mut event_loop, Interest::WRITE, callbacks(read, write));
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("write", token)]);
}

#[test]
fn a_second_registration_of_an_fd_is_refused() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    let ours = &world.conns[&token].ours;
    let again = event_loop.add_io_event(ours, Interest::WRITE, callbacks(write, write));
    assert_eq!(again.unwrap_err().kind(), ErrorKind::AlreadyExists);
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
    world.close(&mut event_loop, token);
}

#[test]
fn a_stale_token_finds_nothing_and_harms_no_later_registration() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let old = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    world.close(&mut event_loop, old);
    let token = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    let ours = &world.conns[&token].ours;
    for gone in [old, Token::default()] {
        let result = event_loop.set_interest(ours, gone, Interest::WRITE);
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NotFound);
        let result = event_loop.del_io_event(ours, gone);
        assert_eq!(result.unwrap_err().kind(), ErrorKind::NotFound);
    }
    world.peer_writes(token, b"x");
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("read", token)]);
}

#[test]
fn no_token_is_ever_reused() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let mut tokens = HashSet::from([Token::default()]);
    for _ in 0..100 {
        let opened = [(); 3].map(|()| {
            let callbacks = callbacks(read, write);
            world.open(&mut event_loop, Interest::READ, callbacks)
        });
        for token in opened {
            assert!(tokens.insert(token), "{token:?} is not new");
            world.close(&mut event_loop, token);
        }
    }
}

#[test]
fn an_interest_prints_as_epoll_flags() {
    let named = [Interest::READ, Interest::WRITE, BOTH, Interest::NONE].map(|i| i.to_string());
    assert_eq!(named, ["IN", "OUT", "IN|OUT", "nothing"]);
}

#[test]
fn timers_run_when_due_and_in_the_order_set_if_due_at_once() {
    type State = Vec<(Token, Instant)>;
    const DELAYS: [u64; 6] = [20, 0, 10, 20, 0, 0];
    let mut event_loop = EventLoop::<State>::new().unwrap();
    let callback: IoCallback<State> = |calls, event_loop, token| {
        calls.push((token, Instant::now()));
        if calls.len() == DELAYS.len() {
            event_loop.stop();
        }
        Ok(())
    };
    let pairs = DELAYS.map(|_| UnixStream::pair().unwrap());
    let mut expected = Vec::new();
    for (delay, (ours, _)) in DELAYS.map(Duration::from_millis).into_iter().zip(&pairs) {
        // Registered only to get tokens, which tell the timers apart.
        let none = Callbacks { read: None, write: None };
        let token = event_loop.add_io_event(ours, Interest::NONE, none).unwrap();
        expected.push((Instant::now() + delay, token));
        event_loop.run_after(delay, token, callback).unwrap();
    }
    expected.sort_by_key(|(due, _)| *due);
    let mut calls = Vec::new();
    run(&mut event_loop, &mut calls);
    for ((due, token), (called, at)) in expected.iter().zip(&calls) {
        assert_eq!(called, token, "expected {expected:?}, got {calls:?}");
        assert!(at >= due);
    }
    assert_eq!(calls.len(), DELAYS.len(), "each timer once");
}

#[test]
fn a_timer_does_not_wait_for_a_later_one_that_was_set_before() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let late = event_loop.run_after(HOUR, Token::default(), timer).unwrap();
    let stop = EventLoop::stop_callback;
    let soon = event_loop.run_after(Duration::ZERO, Token::default(), stop);
    assert!(soon.unwrap() < late);
    run(&mut event_loop, &mut world);
    world.assert_calls(&[]);
}

#[test]
fn a_cancelled_timer_does_not_run() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let (zero, token) = (Duration::ZERO, Token::default());
    let before = event_loop.run_after(zero, token, timer).unwrap();
    let cancel_the_next: IoCallback<World> = |world, event_loop, token| {
        world.calls.push(("cancel", token));
        event_loop.cancel_timer(world.timer.take().unwrap());
        Ok(())
    };
    event_loop.run_after(zero, token, cancel_the_next).unwrap();
    world.timer = Some(event_loop.run_after(zero, token, timer).unwrap());
    let ran = event_loop.run_after(zero, token, timer).unwrap();
    event_loop.cancel_timer(before);
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("cancel", token), ("timer", token)]);
    event_loop.cancel_timer(ran);
}

#[test]
fn a_timer_passes_its_token_even_if_stale() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, Interest::READ, callbacks(read, write));
    event_loop.run_after(Duration::ZERO, token, timer).unwrap();
    world.close(&mut event_loop, token);
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("timer", token)]);
}

/// Whatever the fd is watched for, but not once it is gone.
#[test]
fn a_timer_can_call_the_write_callback() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let token = world.open(&mut event_loop, Interest::NONE, callbacks(read, write));
    let other = world.open(&mut event_loop, Interest::NONE, Callbacks { read: None, write: None });
    for token in [token, other, Token::default()] {
        event_loop.run_after(Duration::ZERO, token, Loop::write_callback).unwrap();
    }
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[("write", token)]);
    event_loop.run_after(Duration::ZERO, token, Loop::write_callback).unwrap();
    world.close(&mut event_loop, token);
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
}

#[test]
fn timers_that_set_timers_do_not_starve_the_fds() {
    fn again(world: &mut World, event_loop: &mut Loop, token: Token) -> anyhow::Result<()> {
        if world.calls.len() == 100 {
            return Err(anyhow!("the fd was never dispatched"));
        }
        world.peer_writes(token, b"x");
        event_loop.run_after(Duration::ZERO, token, again)?;
        timer(world, event_loop, token)
    }
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let stop = EventLoop::stop_callback;
    let token = world.open(&mut event_loop, Interest::READ, callbacks(stop, write));
    event_loop.run_after(Duration::ZERO, token, again).unwrap();
    run(&mut event_loop, &mut world);
    assert!(!world.calls.is_empty());
}

#[test]
fn a_stop_leaves_the_timers_that_are_due_for_the_next_run() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let timer_and_stop: IoCallback<World> = |world, event_loop, token| {
        event_loop.stop();
        timer(world, event_loop, token)
    };
    let token = Token::default();
    for _ in 0..3 {
        let zero = Duration::ZERO;
        event_loop.run_after(zero, token, timer_and_stop).unwrap();
    }
    for _ in 0..3 {
        run(&mut event_loop, &mut world);
        world.assert_calls(&[("timer", token)]);
    }
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
}

#[test]
fn an_error_of_one_timer_leaves_the_others_to_run() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let fails: IoCallback<World> = |_, _, _| Err(anyhow!("Other"));
    event_loop.run_after(Duration::ZERO, Token::default(), fails).unwrap();
    event_loop.run_after(Duration::ZERO, Token::default(), EventLoop::stop_callback).unwrap();
    assert_eq!(event_loop.event_process(&mut world).unwrap_err().to_string(), "Other");
    // Only the other timer can end this.
    event_loop.event_process(&mut world).unwrap();
}

#[test]
fn an_endless_delay_is_refused() {
    let (mut event_loop, mut world) = (Loop::new().unwrap(), World::default());
    let refused = event_loop.run_after(Duration::MAX, Token::default(), timer);
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::InvalidInput);
    event_loop.run_after(HOUR * 24 * 365 * 100, Token::default(), timer).unwrap();
    run_once(&mut event_loop, &mut world);
    world.assert_calls(&[]);
}
