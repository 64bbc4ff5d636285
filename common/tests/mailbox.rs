//! The mailbox: its order of steps, its bounds, and that no letter is lost or late.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;
use std::time::{Duration, Instant};

use common::event_loop::{EventLoop, Token};
use common::mailbox::{CAPACITY, Inbox, mailbox};
use harness::Random;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The time limit for everything, which only a hang reaches.
const LIMIT: Duration = Duration::from_secs(10);

/// The state of a loop with an inbox.
struct State {
    inbox: Inbox<u64, u64>,
    letters: Vec<u64>,
    /// How many times there were any.
    batches: usize,
    notices: Vec<u64>,
}

fn inbox_callback(
    state: &mut State,
    event_loop: &mut EventLoop<State>,
    _: Token,
) -> anyhow::Result<()> {
    let Some(letters) = state.inbox.take()? else {
        event_loop.stop();
        return Ok(());
    };
    state.batches += usize::from(!letters.is_empty());
    state.letters.extend(letters);
    state.notices.extend(state.inbox.take_notice());
    Ok(())
}

fn with_loop(mut inbox: Inbox<u64, u64>) -> (EventLoop<State>, State) {
    let mut event_loop = EventLoop::new().unwrap();
    inbox.register(&mut event_loop, inbox_callback).unwrap();
    (event_loop, State { inbox, letters: Vec::new(), batches: 0, notices: Vec::new() })
}

/// How many events there are right now.
fn poll(event_loop: &mut EventLoop<State>, state: &mut State) -> usize {
    event_loop.poll_once(state, Some(Duration::ZERO)).unwrap()
}

#[test]
fn letters_wake_the_loop_up_and_come_in_order() {
    let (mailbox, inbox) = mailbox().unwrap();
    let (mut event_loop, mut state) = with_loop(inbox);
    assert_eq!(poll(&mut event_loop, &mut state), 0);
    (0..10).for_each(|n| assert!(mailbox.post(n).is_ok()));
    assert_eq!(poll(&mut event_loop, &mut state), 1);
    assert_eq!(state.letters, (0..10).collect::<Vec<_>>());
    assert_eq!(poll(&mut event_loop, &mut state), 0, "the bell is silent again");
}

#[test]
fn a_full_mailbox_gives_the_letter_back_and_a_stop_gets_past_it() {
    let (mailbox, inbox) = mailbox().unwrap();
    let (mut event_loop, mut state) = with_loop(inbox);
    (0..CAPACITY as u64).for_each(|n| assert!(mailbox.post(n).is_ok()));
    assert!(mailbox.is_full());
    assert_eq!(mailbox.post(77).map_err(|err| err.0), Err(77));
    mailbox.clone().stop();
    event_loop.event_process(&mut state).unwrap();
    // One event takes a few, and the bell rings for the rest.
    assert_eq!(state.batches, CAPACITY / 64);
    assert_eq!(state.letters, (0..CAPACITY as u64).collect::<Vec<_>>());
    assert!(!mailbox.is_full());
    drop(state);
    assert_eq!(mailbox.post(78).map_err(|err| err.0), Err(78), "the loop has ended");
}

/// A place that is not used, or whose letter comes back, is given back.
#[test]
fn a_limit_makes_batches_smaller_but_none_empty() {
    for (limit, batch) in [(0, 1), (1, 1), (10, 10), (64, 64), (1000, 64)] {
        let (mailbox, inbox) = mailbox().unwrap();
        let (mut event_loop, mut state) = with_loop(inbox);
        state.inbox.set_limit(limit);
        (0..100).for_each(|n| assert!(mailbox.post(n).is_ok()));
        mailbox.stop();
        event_loop.event_process(&mut state).unwrap();
        let all: Vec<_> = (0..100).collect();
        assert_eq!((state.batches, state.letters), (100_usize.div_ceil(batch), all));
    }
}

#[test]
fn a_reserved_place_is_taken_until_it_is_used_or_dropped() {
    let (mailbox, inbox) = mailbox().unwrap();
    let (mut event_loop, mut state) = with_loop(inbox);
    let places = [mailbox.reserve(2).unwrap(), mailbox.reserve(2).unwrap()];
    assert!(mailbox.reserve(2).is_none() && mailbox.queued() == 2);
    assert!(mailbox.post(1).is_ok(), "the limit is not that of others");
    let [first, second] = places;
    drop(first);
    assert!(second.post(2).is_ok());
    assert_eq!(mailbox.queued(), 2);
    poll(&mut event_loop, &mut state);
    assert_eq!((&state.letters[..], mailbox.queued()), (&[1, 2][..], 0));
    let places: Vec<_> = (0..).map_while(|_| mailbox.reserve(usize::MAX)).collect();
    assert_eq!(places.len(), CAPACITY);
    assert!(mailbox.is_full() && mailbox.post(3).is_err());
    drop((places, state));
    assert_eq!(mailbox.reserve(1).unwrap().post(4).map_err(|err| err.0), Err(4));
    assert_eq!(mailbox.queued(), 0);
}

#[test]
fn a_notice_gets_past_a_full_mailbox_and_replaces_an_earlier_one() {
    let (mailbox, inbox) = mailbox().unwrap();
    let (mut event_loop, mut state) = with_loop(inbox);
    (0..CAPACITY as u64).for_each(|n| assert!(mailbox.post(n).is_ok()));
    (1..=3).for_each(|n| mailbox.put_up(n));
    poll(&mut event_loop, &mut state);
    assert_eq!((&state.notices[..], state.letters.len()), (&[3][..], 64));
    while poll(&mut event_loop, &mut state) > 0 {}
    assert_eq!(state.letters.len(), CAPACITY);
    mailbox.put_up(4);
    poll(&mut event_loop, &mut state);
    assert_eq!(state.notices, [3, 4]);
    assert_eq!(poll(&mut event_loop, &mut state), 0, "the bell is silent again");
}

/// In each round all threads put up a notice, and wait until the loop has seen that of the last one.
#[test]
fn the_last_of_many_notices_is_always_seen() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 5000;
    let (mailbox, inbox) = mailbox::<u64, u64>().unwrap();
    let (mut event_loop, mut state) = with_loop(inbox);
    let (put_up, seen, failed) = (Mutex::new(0), AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for thread in 0..THREADS {
            let (mailbox, put_up, seen, failed) = (mailbox.clone(), &put_up, &seen, &failed);
            scope.spawn(move || {
                let mut random = Random::new(thread);
                for round in 1..=ROUNDS {
                    (0..random.below(100)).for_each(|_| std::hint::spin_loop());
                    let mut last = put_up.lock().unwrap();
                    *last += 1;
                    mailbox.put_up(*last);
                    drop(last);
                    while seen.load(Ordering::Acquire) < round * THREADS {
                        if failed.load(Ordering::Relaxed) {
                            return;
                        }
                        thread::yield_now();
                    }
                }
            });
        }
        while seen.load(Ordering::Relaxed) < ROUNDS * THREADS {
            if event_loop.poll_once(&mut state, Some(LIMIT)).unwrap() == 0 {
                failed.store(true, Ordering::Relaxed);
                break;
            }
            let ascending = state.notices.is_sorted_by(|a, b| a < b);
            failed.fetch_or(!ascending, Ordering::Relaxed);
            if let Some(last) = state.notices.last() {
                seen.store(*last, Ordering::Release);
            }
        }
    });
    assert!(!failed.into_inner(), "late, or out of order");
}

/// Empties a queue in two orders, while a letter is posted between the two steps.
#[test]
fn the_bell_has_to_be_silenced_before_the_queue_is_emptied() {
    for (silence_first, lost) in [(true, false), (false, true)] {
        let (sender, receiver) = sync_channel::<&str>(10);
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        let post = |letter| {
            sender.send(letter).unwrap();
            bell.write(1).unwrap();
        };
        post("first");
        let mut letters = Vec::new();
        let mut steps: [&mut dyn FnMut(); 2] =
            [&mut || assert!(bell.read().is_ok()), &mut || letters.extend(receiver.try_iter())];
        if !silence_first {
            steps.reverse();
        }
        steps[0]();
        post("between the steps");
        steps[1]();
        let rings = bell.read().is_ok();
        // Lost: it is in the queue, and nothing will wake the loop up.
        assert_eq!(letters.len() == 1 && !rings, lost);
    }
}

/// Threads post `letters` per round, with a `pause` after each, for which it gets a random number. At the
/// end of a round they wait until the loop has taken everything: a lost ring would keep them waiting.
#[track_caller]
fn assert_none_is_lost_or_late(senders: u64, rounds: u64, letters: u64, pause: fn(u64)) {
    let (mailbox, inbox) = mailbox().unwrap();
    let (mut event_loop, mut state) = with_loop(inbox);
    let (taken, failed) = (AtomicU64::new(0), AtomicBool::new(false));
    let mut next = vec![0; senders as usize];
    thread::scope(|scope| {
        for sender in 0..senders {
            let (mailbox, taken, failed) = (mailbox.clone(), &taken, &failed);
            scope.spawn(move || {
                let mut random = Random::new(sender);
                for round in 0..rounds {
                    for n in 0..letters {
                        let mut letter = sender << 32 | (round * letters + n);
                        while let Err(back) = mailbox.post(letter) {
                            letter = back.0;
                            thread::yield_now();
                        }
                        pause(random.number());
                    }
                    while taken.load(Ordering::Acquire) < (round + 1) * letters * senders {
                        if failed.load(Ordering::Relaxed) {
                            return;
                        }
                        thread::yield_now();
                    }
                }
            });
        }
        while taken.load(Ordering::Relaxed) < senders * rounds * letters {
            if event_loop.poll_once(&mut state, Some(LIMIT)).unwrap() == 0 {
                failed.store(true, Ordering::Relaxed);
                // Makes room for senders that wait for it.
                while state.inbox.take().unwrap().is_some_and(|letters| !letters.is_empty()) {}
                break;
            }
            for letter in state.letters.drain(..) {
                let next = &mut next[(letter >> 32) as usize];
                failed.fetch_or(letter & 0xffff_ffff != *next, Ordering::Relaxed);
                *next += 1;
                taken.fetch_add(1, Ordering::Release);
            }
        }
    });
    assert!(!failed.into_inner(), "late, or out of order");
    assert_eq!(next, vec![rounds * letters; senders as usize]);
    // The last ring may have come after its letter was taken, with an earlier ring.
    poll(&mut event_loop, &mut state);
    assert_eq!((poll(&mut event_loop, &mut state), state.letters.len()), (0, 0));
}

/// Mostly while the loop is busy, or about to go to sleep.
#[test]
fn millions_of_letters_from_several_threads_are_neither_lost_nor_late() {
    assert_none_is_lost_or_late(4, 500, 1000, |random| {
        if random % 16 == 0 {
            thread::yield_now();
        } else if random % 1024 == 1 {
            thread::sleep(Duration::from_micros(random >> 32 & 63));
        }
    });
}

/// No third letter covers up that the ring of the second one was taken for that of the first.
#[test]
fn a_letter_posted_while_the_loop_wakes_up_is_not_late() {
    assert_none_is_lost_or_late(1, 30_000, 2, |random| {
        let start = Instant::now();
        while start.elapsed() < Duration::from_nanos(random >> 32 & 0x7fff) {}
    });
}
