//! Tasks: that each one is run, comes back or is counted, and who gets what is published.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::event_loop::{EventLoop, Token};
use common::mailbox::{CAPACITY, Inbox, NotPosted};
use common::task::{Publish, Run, Task, Tasks};

/// The time limit for everything, which only a hang reaches.
const LIMIT: Duration = Duration::from_secs(10);

const SENDERS: u64 = 4;

/// The state of a worker's loop.
struct Worker {
    inbox: Inbox<Task<Self>>,
    /// The numbers of the tasks that have been run.
    ran: Vec<u64>,
    published: Vec<(Vec<u8>, i32, Option<Token>)>,
}

type Loop = EventLoop<Worker>;

/// How each worker is called with what is published.
fn publish_callback(
    worker: &mut Worker,
    _: &mut Loop,
    payload: &[u8],
    id: i32,
    publisher: Option<Token>,
) -> anyhow::Result<()> {
    worker.published.push((payload.to_vec(), id, publisher));
    Ok(())
}

fn inbox_callback(worker: &mut Worker, event_loop: &mut Loop, _: Token) -> anyhow::Result<()> {
    let Some(tasks) = worker.inbox.take()? else {
        event_loop.stop();
        return Ok(());
    };
    for task in tasks {
        let Task::Run(run) = task else { panic!("no client was handed over") };
        run(worker, event_loop)?;
    }
    Ok(())
}

fn with_loop(mut inbox: Inbox<Task<Worker>>) -> (Loop, Worker) {
    let mut event_loop = EventLoop::new().unwrap();
    inbox.register(&mut event_loop, inbox_callback).unwrap();
    (event_loop, Worker { inbox, ran: Vec::new(), published: Vec::new() })
}

fn two_inboxes() -> (Tasks<Worker, ()>, [Inbox<Task<Worker>>; 2]) {
    let (tasks, inboxes) = Tasks::new(2, publish_callback).unwrap();
    (tasks, inboxes.try_into().ok().unwrap())
}

/// Both on this thread.
fn two_workers() -> (Tasks<Worker, ()>, [(Loop, Worker); 2]) {
    let (tasks, inboxes) = two_inboxes();
    (tasks, inboxes.map(with_loop))
}

/// Notes `number` where it is run.
fn noting(number: u64) -> Run<Worker> {
    Box::new(move |worker, _| {
        worker.ran.push(number);
        Ok(())
    })
}

/// Lets a loop handle all that has arrived.
fn poll((event_loop, worker): &mut (Loop, Worker)) {
    while event_loop.poll_once(worker, Some(Duration::ZERO)).unwrap() > 0 {}
}

#[test]
fn a_task_runs_on_the_loop_that_it_is_for_and_tasks_run_in_order() {
    let (tasks, mut workers) = two_workers();
    let thread = thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for n in 0..100 {
                assert!(tasks.send_task(1, noting(n)).is_ok());
            }
            assert!(tasks.send_task_to_all(|| noting(100)));
            thread::current().id()
        });
        sender.join().unwrap()
    });
    assert_ne!(thread, thread::current().id());
    workers.iter_mut().for_each(poll);
    let [(_, first), (_, second)] = &workers;
    assert_eq!((&first.ran[..], &second.ran), (&[100][..], &(0..=100).collect::<Vec<_>>()));
    assert_eq!(tasks.not_run(), 0);
}

#[test]
fn a_task_without_room_comes_back_and_can_be_run_by_its_sender() {
    let (tasks, [(mut event_loop, mut worker), mut second]) = two_workers();
    (0..CAPACITY as u64).for_each(|n| assert!(tasks.send_task(1, noting(n)).is_ok()));
    let Err(NotPosted(Task::Run(run))) = tasks.send_task(1, noting(77)) else {
        panic!("the mailbox is full")
    };
    run(&mut worker, &mut event_loop).unwrap();
    assert_eq!(worker.ran, [77]);
    poll(&mut second);
    assert_eq!(second.1.ran, (0..CAPACITY as u64).collect::<Vec<_>>());
    drop(second);
    assert!(tasks.send_task(1, noting(78)).is_err(), "the loop has ended");
    assert_eq!(tasks.not_run(), 0, "the sender has it");
}

/// The other half of a mailbox is for clients.
#[test]
fn a_task_for_all_needs_half_of_each_mailbox_or_none_gets_it() {
    let (tasks, mut workers) = two_workers();
    (0..CAPACITY as u64 / 2).for_each(|n| assert!(tasks.send_task(1, noting(n)).is_ok()));
    for _ in 0..2 * CAPACITY {
        assert!(!tasks.send_task_to_all(|| noting(77)));
    }
    let queued = || [0, 1].map(|n| tasks.mailboxes()[n].queued());
    assert_eq!(queued(), [0, CAPACITY / 2]);
    for n in CAPACITY / 2..CAPACITY {
        assert!(tasks.send_task(1, noting(n as u64)).is_ok());
    }
    workers.iter_mut().for_each(poll);
    assert_eq!(workers[1].1.ran, (0..CAPACITY as u64).collect::<Vec<_>>());
    assert!(workers[0].1.ran.is_empty());
    (0..CAPACITY as u64 / 2).for_each(|n| assert!(tasks.send_task_to_all(|| noting(n))));
    assert!(!tasks.send_task_to_all(|| noting(77)));
}

/// Whether it is in the mailbox by then, or sent later.
#[test]
fn a_task_for_a_loop_that_has_ended_is_counted() {
    let (tasks, [mut first, second]) = two_workers();
    (0..5).for_each(|n| assert!(tasks.send_task_to_all(|| noting(n))));
    drop(second);
    (5..8).for_each(|n| assert!(tasks.send_task_to_all(|| noting(n))));
    poll(&mut first);
    assert_eq!(first.1.ran, (0..8).collect::<Vec<_>>());
    assert_eq!(tasks.not_run(), 8);
}

/// Runs until it is told to stop, and returns what it has run.
fn run_until_stopped(inbox: Inbox<Task<Worker>>) -> Vec<u64> {
    let (mut event_loop, mut worker) = with_loop(inbox);
    event_loop.event_process(&mut worker).unwrap();
    worker.ran
}

/// Several threads send to both loops; those stop in the middle of it. Each runs the tasks of each sender
/// in order, and exactly once, and all others are counted.
#[test]
fn tasks_of_several_threads_are_run_in_order_or_counted() {
    for (number, stop_after) in [20_000, 1, 3000].into_iter().enumerate() {
        let (tasks, inboxes) = two_inboxes();
        let sent = AtomicUsize::new(0);
        let ran = thread::scope(|scope| {
            let (tasks, sent) = (&tasks, &sent);
            let workers = inboxes.map(|inbox| scope.spawn(|| run_until_stopped(inbox)));
            for sender in 0..SENDERS {
                scope.spawn(move || {
                    for n in 0..5000 {
                        // The places of a loop that has ended are not given back.
                        while !tasks.send_task_to_all(|| noting(sender << 32 | n)) {
                            if sent.load(Ordering::Relaxed) >= stop_after {
                                return;
                            }
                            thread::yield_now();
                        }
                        sent.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let start = Instant::now();
            while sent.load(Ordering::Relaxed) < stop_after && start.elapsed() < LIMIT {
                thread::yield_now();
            }
            tasks.mailboxes().iter().for_each(|mailbox| mailbox.stop());
            workers.map(|worker| worker.join().unwrap())
        });
        for ran in &ran {
            let mut next = [0; SENDERS as usize];
            for task in ran {
                let next = &mut next[(task >> 32) as usize];
                assert_eq!(task & 0xffff_ffff, *next, "round {number}");
                *next += 1;
            }
        }
        let run = ran[0].len() + ran[1].len();
        assert_eq!(run + tasks.not_run(), 2 * sent.into_inner(), "round {number}");
    }
}

/// On another thread's loop the same token may be a different client's.
#[test]
fn the_publisher_is_left_out_only_on_its_own_loop() {
    let (tasks, [own, other]) = two_inboxes();
    let (tasks, token, mut own) = (Arc::new(tasks), Token::default(), with_loop(own));
    let sender = Arc::clone(&tasks);
    let publish = move |_: &mut Worker, _: &mut Loop| {
        assert!(sender.publish(b"news", 3, Some(token)));
        assert!(sender.publish(b"", 4, None));
        Ok(())
    };
    assert!(tasks.send_task(0, Box::new(publish)).is_ok());
    poll(&mut own);
    let other = thread::spawn(|| {
        let mut other = with_loop(other);
        poll(&mut other);
        other.1.published
    });
    let published = |token| [(b"news".to_vec(), 3, token), (vec![], 4, None)];
    assert_eq!(own.1.published, published(Some(token)));
    assert_eq!(other.join().unwrap(), published(None));
}

#[test]
fn what_finds_no_room_is_not_published_at_all() {
    let (tasks, mut workers) = two_workers();
    (0..CAPACITY as u64 / 2).for_each(|n| assert!(tasks.send_task(1, noting(n)).is_ok()));
    assert!(!tasks.publish(b"news", 3, None));
    workers.iter_mut().for_each(poll);
    assert!(workers.iter().all(|(_, worker)| worker.published.is_empty()));
    assert!(tasks.publish(b"news", 3, None));
}
