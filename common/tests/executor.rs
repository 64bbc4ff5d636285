//! The executor: that every wake-up counts, and none costs more than it has to.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::cell::{Cell, RefCell};
use std::fs::{self, File};
use std::future::{pending, poll_fn, ready};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::executor::{Async, Event, Runtime, Waiting, race};
use common::reactor_buf::OutputBuf;
use harness::{Random, reset, wait_until};
use nix::time::{ClockId, clock_gettime};
use tracing::Dispatch;
use tracing::subscriber::{DefaultGuard, NoSubscriber};

/// The time limit foreverything, which only a hang reaches.
const LIMIT: Duration = Duration::from_secs(30);

/// How long something may go on that should not.
const QUIET: Duration = Duration::from_millis(300);

const HOUR: Duration = Duration::from_secs(3600);

type Io = Async<UnixStream>;

/// Runs until no task is left, or the loop is stopped.
#[track_caller]
fn run(runtime: &Runtime) {
    run_within(LIMIT, runtime);
}

#[track_caller]
fn run_within(limit: Duration, runtime: &Runtime) {
    let time_out = |_: &mut Waiting, _: &mut EventLoop<Waiting>, _: Token| {
        anyhow::bail!("timed out");
    };
    let limit = runtime.reactor.borrow_mut().0.run_after(limit, Token::default(), time_out);
    runtime.run().unwrap();
    runtime.reactor.borrow_mut().0.cancel_timer(limit.unwrap());
}

/// Runs one task and those that it starts; returns its output.
#[track_caller]
fn block_on<T: 'static>(runtime: &Rc<Runtime>, future: impl Future<Output = T> + 'static) -> T {
    let task = runtime.spawn_join(future);
    run(runtime);
    output(task).unwrap()
}

/// The output of a future that is ready.
#[track_caller]
fn output<T>(future: impl Future<Output = T>) -> T {
    match poll(pin!(future)) {
        Poll::Ready(output) => output,
        Poll::Pending => panic!("it is not ready"),
    }
}

/// Polls outside of all tasks.
fn poll<F: Future + ?Sized>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut Context::from_waker(Waker::noop()))
}

/// Lets all other tasks that are ready have a turn.
async fn yield_now() {
    let mut polled = false;
    poll_fn(|cx| {
        cx.waker().wake_by_ref();
        if std::mem::replace(&mut polled, true) { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
}

/// The waker of the task that awaits it.
async fn own_waker() -> Waker {
    poll_fn(|cx| Poll::Ready(cx.waker().clone())).await
}

fn pair(runtime: &Rc<Runtime>) -> (Io, UnixStream) {
    let (ours, peer) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Async::new(runtime, ours), peer)
}

/// Waits for one byte and reads it.
async fn read_byte(io: &Io) -> u8 {
    io.readable().await.unwrap();
    let mut byte = [0];
    io.get_ref().read_exact(&mut byte).unwrap();
    byte[0]
}

/// Both ends of a TCP connection.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let server = listener.accept().unwrap().0;
    server.set_nonblocking(true).unwrap();
    (server, client)
}

/// Until it is dropped, records what this thread logs.
struct Log(Arc<Mutex<Vec<u8>>>, #[expect(dead_code, reason = "a guard")] DefaultGuard);

impl Log {
    fn new() -> Self {
        struct Writer(Arc<Mutex<Vec<u8>>>);
        impl Write for Writer {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0.lock().unwrap().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        // If ours were the only one, a line that another thread reaches first would be off for this one too.
        static OTHER: LazyLock<Dispatch> = LazyLock::new(|| Dispatch::new(NoSubscriber::new()));
        LazyLock::force(&OTHER);
        let log = Arc::<Mutex<Vec<u8>>>::default();
        let written = Arc::clone(&log);
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::TRACE)
            .with_ansi(false)
            .with_writer(move || Writer(Arc::clone(&written)))
            .finish();
        Self(log, tracing::subscriber::set_default(subscriber))
    }

    /// What follows `start` in each message that begins with it.
    fn messages(&self, start: &str) -> Vec<String> {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter_map(|line| Some(line.split_once(start)?.1.to_owned())).collect()
    }
}

// ---- Tasks ---------------------------------------------------------------------------------------

#[test]
fn it_runs_until_no_task_is_left() {
    let runtime = Runtime::new().unwrap();
    run(&runtime);
    let order = Rc::new(RefCell::new(Vec::new()));
    for n in 0..3 {
        let (spawner, order) = (Rc::clone(&runtime), Rc::clone(&order));
        runtime.spawn(async move {
            order.borrow_mut().push(n);
            let later = Rc::clone(&order);
            spawner.spawn(async move { later.borrow_mut().push(n + 10) });
            yield_now().await;
            order.borrow_mut().push(n + 20);
        });
    }
    assert!(order.borrow().is_empty(), "nothing is polled before");
    run(&runtime);
    order.borrow_mut()[3..].sort_unstable();
    assert_eq!(*order.borrow(), [0, 1, 2, 10, 11, 12, 20, 21, 22]);
    assert_eq!(block_on(&runtime, ready(7)), 7, "and again");
}

/// A socket is ready before the one that stops the loop, in one batch, and a timer is due before another
/// one that stops it. Nothing else would wake these tasks up.
#[test]
fn what_is_ready_when_the_loop_is_stopped_is_not_lost() {
    let runtime = Runtime::new().unwrap();
    let ((io, mut peer), (stop, mut stopper)) = (pair(&runtime), UnixStream::pair().unwrap());
    let reader = runtime.spawn_join(async move { read_byte(&io).await });
    let stop_callback = Callbacks { read: Some(EventLoop::stop_callback), write: None };
    let token = runtime.reactor.borrow_mut().0.add_io_event(&stop, Interest::READ, stop_callback);
    // The reader waits by then.
    runtime.spawn(async move {
        yield_now().await;
        peer.write_all(b"x").unwrap();
        stopper.write_all(b"x").unwrap();
        pending().await
    });
    run(&runtime);
    runtime.reactor.borrow_mut().0.del_io_event(&stop, token.unwrap()).unwrap();

    let sleep = runtime.sleep(Duration::ZERO);
    let sleeper = runtime.spawn_join(sleep);
    let (zero, stop) = (Duration::ZERO, EventLoop::stop_callback);
    runtime.reactor.borrow_mut().0.run_after(zero, Token::default(), stop).unwrap();
    run(&runtime);

    let both = async move { (reader.await.unwrap(), sleeper.await.unwrap()) };
    let (clearer, both) = (Rc::clone(&runtime), runtime.spawn_join(both));
    let both = runtime.spawn_join(async move {
        let both = both.await;
        clearer.clear();
        both
    });
    run(&runtime);
    assert_eq!(output(both).unwrap().unwrap(), (b'x', ()));
}

#[test]
fn a_task_that_panics_ends_alone_and_is_logged() {
    let (log, runtime) = (Log::new(), Runtime::new().unwrap());
    let panics = runtime.spawn_join(async {
        yield_now().await;
        panic!("on purpose");
    });
    let joins =
        runtime.spawn_join(async move { panics.await.map(|()| 0).unwrap_err().to_string() });
    let goes_on = runtime.spawn_join(async {
        for _ in 0..10 {
            yield_now().await;
        }
        7
    });
    run(&runtime);
    assert_eq!(output(joins).unwrap(), "the task panicked, or was dropped");
    assert_eq!(output(goes_on).unwrap(), 7);
    assert_eq!(log.messages("ERROR").len(), 1);
    assert_eq!(log.messages(" panicked"), [""]);
}

#[test]
fn a_task_goes_on_without_its_joiner_and_can_be_joined_late() {
    let runtime = Runtime::new().unwrap();
    let ran = Rc::new(Cell::new(false));
    let sets = Rc::clone(&ran);
    drop(runtime.spawn_join(async move {
        yield_now().await;
        sets.set(true);
    }));
    let late = runtime.spawn_join(ready(7));
    run(&runtime);
    assert!(ran.get());
    assert_eq!(block_on(&runtime, late).unwrap(), 7);
}

/// The joiner is a task of another executor, or it would be cleared too.
#[test]
fn a_task_that_is_cleared_does_not_hang_its_joiner() {
    let (runtime, other) = (Runtime::new().unwrap(), Runtime::new().unwrap());
    let waits = runtime.spawn_join(pending::<()>());
    let joiner = other.spawn_join(async move { waits.await.unwrap_err().to_string() });
    block_on(&other, async move {
        yield_now().await;
        runtime.clear();
    });
    assert_eq!(output(joiner).unwrap(), "the task panicked, or was dropped");
}

/// Its destructor finds nothing borrowed, no matter how the task ends.
#[test]
fn a_destructor_can_use_the_executor() {
    struct SpawnsOnDrop(Rc<Runtime>, Io, Rc<Cell<u32>>);
    impl Drop for SpawnsOnDrop {
        fn drop(&mut self) {
            let (runtime, count) = (Rc::clone(&self.0), Rc::clone(&self.2));
            drop(runtime.sleep(HOUR));
            Event::new(&runtime).set();
            self.0.spawn(async move {
                count.set(count.get() + 1);
                drop(runtime);
            });
        }
    }
    let runtime = Runtime::new().unwrap();
    let (count, mut peers) = (Rc::default(), Vec::new());
    let mut guard = || {
        let (io, peer) = pair(&runtime);
        peers.push(peer);
        SpawnsOnDrop(Rc::clone(&runtime), io, Rc::clone(&count))
    };
    let guards = [(); 5].map(|()| guard());
    let [ends, panics, clears, cleared, lost] = guards;
    runtime.spawn(async move { drop(ends) });
    run(&runtime);
    assert_eq!(count.get(), 1);
    runtime.spawn(async move {
        let _guard = panics;
        panic!("on purpose");
    });
    run(&runtime);
    assert_eq!(count.get(), 2);
    runtime.spawn(async move {
        assert!(poll(pin!(cleared.1.readable())).is_pending());
        cleared.1.readable().await.unwrap();
    });
    runtime.spawn(async move {
        clears.0.clear();
        // It is cleared when it has been polled.
        clears.1.readable().await.unwrap();
    });
    run(&runtime);
    assert_eq!(count.get(), 4);
    runtime.spawn(async move {
        let lost = lost;
        let _ = race(lost.1.readable(), ready(())).await;
    });
    run(&runtime);
    assert_eq!(count.get(), 5);
}

/// It wakes itself forever, and yet a socket and a timer end it.
#[test]
fn a_task_that_wakes_itself_leaves_io_and_timers_their_turn() {
    let runtime = Runtime::new().unwrap();
    let (io, mut peer) = pair(&runtime);
    let turns = Rc::new(Cell::new(0));
    for _ in 0..3 {
        let turns = Rc::clone(&turns);
        runtime.spawn(async move {
            loop {
                turns.set(turns.get() + 1);
                assert!(turns.get() < 1_000_000, "nothing else has had a turn");
                yield_now().await;
            }
        });
    }
    let clearer = Rc::clone(&runtime);
    runtime.spawn(async move {
        clearer.sleep(Duration::from_millis(1)).await;
        peer.write_all(b"x").unwrap();
        assert_eq!(read_byte(&io).await, b'x');
        clearer.clear();
    });
    run(&runtime);
    assert!((4..1_000_000).contains(&turns.get()), "{}", turns.get());
}

#[test]
fn an_event_reaches_all_tasks_that_wait_and_those_that_come_late() {
    let runtime = Runtime::new().unwrap();
    let event = Rc::new(Event::new(&runtime));
    let tasks: Vec<_> = (0..10)
        .map(|n| {
            let (sleeper, event) = (Rc::clone(&runtime), Rc::clone(&event));
            runtime.spawn_join(async move {
                if n == 5 {
                    sleeper.sleep(Duration::from_millis(1)).await;
                    event.set();
                }
                event.wait().await;
                n
            })
        })
        .collect();
    run(&runtime);
    assert!(tasks.into_iter().map(output).map(Result::unwrap).eq(0..10));
    block_on(&runtime, async move { event.wait().await });
}

/// Its socket is watched only once it has been polled, and another task takes longer than the quiet.
#[test]
fn a_drain_waits_for_what_a_task_that_was_just_spawned_has_to_read() {
    let runtime = Runtime::new().unwrap();
    let (io, mut peer) = pair(&runtime);
    peer.write_all(b"0123456789").unwrap();
    let (drainer, received) = (Rc::clone(&runtime), Rc::new(Cell::new(0)));
    let count = Rc::clone(&received);
    runtime.spawn(async move {
        let close = Rc::new(Event::new(&drainer));
        let closed = Rc::clone(&close);
        drainer.spawn(async move {
            let reads = async {
                loop {
                    read_byte(&io).await;
                    count.set(count.get() + 1);
                }
            };
            let _ = race(pin!(reads), closed.wait()).await;
        });
        drainer.drain_input(Instant::now() + HOUR).await;
        close.set();
    });
    runtime.spawn(async { thread::sleep(QUIET) });
    run(&runtime);
    assert_eq!(received.get(), 10);
}

#[test]
fn a_race_has_the_first_output_and_drops_the_other_future() {
    let runtime = Runtime::new().unwrap();
    let sleeper = Rc::clone(&runtime);
    block_on(&runtime, async move {
        let alive = Rc::new(());
        let holds = |alive: &Rc<()>| {
            let alive = Rc::clone(alive);
            Box::pin(async move {
                let _alive = alive;
                pending::<()>().await;
            })
        };
        assert_eq!(race(ready(1), ready(2)).await, Ok(1), "the left one goes first");
        assert_eq!(race(holds(&alive), ready(2)).await, Err(2));
        assert_eq!(race(ready(1), holds(&alive)).await, Ok(1));
        assert_eq!(sleeper.timeout(Duration::ZERO, holds(&alive)).await, None);
        assert_eq!(sleeper.timeout(Duration::ZERO, ready(1)).await, Some(1));
        assert_eq!(sleeper.timeout(Duration::MAX, yield_now()).await, Some(()));
        assert_eq!(Rc::strong_count(&alive), 1);
        let mut sleep = sleeper.sleep(Duration::from_millis(2));
        for _ in 0..3 {
            assert!(race(&mut sleep, ready(())).await.is_err(), "lent, and not dropped");
        }
        sleep.await;
    });
}

// ---- Sleeping ------------------------------------------------------------------------------------

#[test]
fn sleeps_end_when_due_and_in_the_order_begun_if_due_at_once() {
    const DELAYS: [u64; 6] = [20, 0, 10, 20, 0, 0];
    let (runtime, woken) = (Runtime::new().unwrap(), Rc::new(RefCell::new(Vec::new())));
    let mut expected = Vec::new();
    for (n, delay) in DELAYS.map(Duration::from_millis).into_iter().enumerate() {
        let (sleep, woken) = (runtime.sleep(delay), Rc::clone(&woken));
        expected.push((Instant::now() + delay, n));
        runtime.spawn(async move {
            sleep.await;
            woken.borrow_mut().push((Instant::now(), n));
        });
    }
    expected.sort_unstable();
    run(&runtime);
    let order = |it: &[(_, usize)]| it.iter().map(|it| it.1).collect::<Vec<_>>();
    assert_eq!(order(&woken.borrow()), order(&expected));
    // It was due before `expected` says.
    assert!(
        woken
            .borrow()
            .iter()
            .zip(&expected)
            .all(|(at, due)| at.0 + Duration::from_millis(1) > due.0)
    );
}

#[test]
fn a_sleep_that_is_dropped_or_too_long_disturbs_no_other() {
    let runtime = Runtime::new().unwrap();
    let first = runtime.sleep(Duration::ZERO);
    let mut polled = runtime.sleep(Duration::ZERO);
    let mut endless = runtime.sleep(Duration::MAX);
    let hour = runtime.sleep(HOUR);
    let second = runtime.sleep(Duration::ZERO);
    let (sleeper, ended) = (Rc::clone(&runtime), Rc::new(Cell::new(0)));
    let count = Rc::clone(&ended);
    block_on(&runtime, async move {
        assert!(race(&mut polled, ready(())).await.is_err());
        drop((first, polled));
        second.await;
        sleeper.sleep(Duration::from_millis(1)).await;
        assert!(race(&mut endless, sleeper.sleep(Duration::from_millis(1))).await.is_err());
        assert!(race(hour, ready(())).await.is_err());
        count.set(1);
    });
    assert_eq!(ended.get(), 1);
    assert!(runtime.reactor.borrow().0.registered() == 1, "the bell");
}

/// Nor before: it may have ended unseen.
#[test]
fn a_sleep_that_has_ended_is_ready_whenever_it_is_polled() {
    let runtime = Runtime::new().unwrap();
    let sleeper = Rc::clone(&runtime);
    block_on(&runtime, async move {
        let mut unseen = sleeper.sleep(Duration::ZERO);
        sleeper.sleep(Duration::from_millis(1)).await;
        for _ in 0..2 {
            (&mut unseen).await;
        }
    });
}

// ---- Readiness -----------------------------------------------------------------------------------

#[test]
fn readiness_and_one_call_echo_every_byte() {
    let runtime = Runtime::new().unwrap();
    let (io, mut peer) = pair(&runtime);
    let peer = thread::spawn(move || {
        let sent = Random::new(1).bytes(3_000_000);
        let (mut writer, bytes) = (peer.try_clone().unwrap(), sent.clone());
        let writer = thread::spawn(move || {
            writer.write_all(&bytes).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut received = Vec::new();
        peer.read_to_end(&mut received).unwrap();
        writer.join().unwrap();
        received == sent
    });
    block_on(&runtime, async move {
        let mut bytes = vec![0; 100_000];
        loop {
            io.readable().await.unwrap();
            let n = io.get_ref().read(&mut bytes).unwrap();
            if n == 0 {
                return;
            }
            let mut written = 0;
            while written < n {
                io.writable().await.unwrap();
                written += io.get_ref().write(&bytes[written..n]).unwrap();
            }
        }
    });
    assert!(peer.join().unwrap());
}

#[test]
fn waiting_again_and_again_costs_no_epoll_ctl() {
    let (log, runtime) = (Log::new(), Runtime::new().unwrap());
    let (io, peer) = pair(&runtime);
    let before = log.messages("epoll_ctl: ").len();
    let io = block_on(&runtime, async move {
        for n in 0..100 {
            (&peer).write_all(&[n]).unwrap();
            assert_eq!(read_byte(&io).await, n);
        }
        io
    });
    assert_eq!(log.messages("epoll_ctl: ").len() - before, 1, "it is registered once");
    drop(io);
    assert_eq!(log.messages("epoll_ctl: ").len() - before, 2);
}

/// The reader waits on. There is always room to write, and no task to wake for it again and again.
#[test]
fn an_event_that_no_task_waits_for_reduces_the_interest() {
    let (log, runtime) = (Log::new(), Runtime::new().unwrap());
    let (io, mut peer) = pair(&runtime);
    let fd = io.get_ref().as_raw_fd();
    let io = Rc::new(io);
    let reader = Rc::clone(&io);
    let reader = runtime.spawn_join(async move { read_byte(&reader).await });
    let sleeper = Rc::clone(&runtime);
    let io = block_on(&runtime, async move {
        for _ in 0..3 {
            io.writable().await.unwrap();
        }
        sleeper.sleep(Duration::from_millis(1)).await;
        peer.write_all(b"xy").unwrap();
        assert_eq!(reader.await.unwrap(), b'x');
        // No task waits for the second byte.
        sleeper.sleep(Duration::from_millis(1)).await;
        io
    });
    let changes = [
        format!("add fd {fd}, IN"),
        format!("fd {fd}, IN -> IN|OUT"),
        format!("fd {fd}, IN|OUT -> IN"),
        format!("delete fd {fd}"),
    ];
    assert_eq!(log.messages("epoll_ctl: ")[1..], changes);
    assert_eq!(block_on(&runtime, async move { read_byte(&io).await }), b'y');
}

/// Errors and hang-ups cannot be masked.
#[test]
fn nothing_that_happens_while_nobody_waits_makes_the_loop_spin() {
    let happens: [fn(TcpStream); 4] = [
        drop,
        reset,
        |mut peer| {
            peer.write_all(b"x").unwrap();
            reset(peer);
        },
        |mut peer| {
            peer.write_all(b"x").unwrap();
            drop(peer);
        },
    ];
    let runtime = Runtime::new().unwrap();
    let cpu = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    for (n, happen) in happens.into_iter().enumerate() {
        for write in [false, true] {
            let (sleeper, (ours, mut peer)) = (Rc::clone(&runtime), tcp_pair());
            let io = Async::new(&runtime, ours);
            let before = cpu();
            block_on(&runtime, async move {
                if write {
                    io.writable().await.unwrap();
                } else {
                    peer.write_all(b"x").unwrap();
                    io.readable().await.unwrap();
                    io.get_ref().read_exact(&mut [0]).unwrap();
                }
                happen(peer);
                sleeper.sleep(QUIET).await;
                // It has not been forgotten.
                io.readable().await.unwrap();
            });
            let spent = cpu() - before;
            assert!(spent < QUIET / 10, "case {n}, {write}: {spent:?}");
        }
    }
}

#[test]
fn a_second_waiter_on_the_same_side_gets_an_error() {
    let runtime = Runtime::new().unwrap();
    let (io, peer) = pair(&runtime);
    let io = Rc::new(io);
    let first = Rc::clone(&io);
    let first = runtime.spawn_join(async move { read_byte(&first).await });
    let second = Rc::clone(&io);
    let second = runtime.spawn_join(async move { second.readable().await });
    let other_side = Rc::clone(&io);
    let other_side = runtime.spawn_join(async move { other_side.writable().await });
    block_on(&runtime, async move {
        let kind = second.await.unwrap().unwrap_err().kind();
        assert_eq!(kind, ErrorKind::ResourceBusy);
        assert!(other_side.await.unwrap().is_ok());
        // Also when the first has been woken.
        (&peer).write_all(b"x").unwrap();
        let mut woken = pin!(io.writable());
        assert!(race(woken.as_mut(), ready(())).await.is_err());
        yield_now().await;
        let kind = io.writable().await.unwrap_err().kind();
        assert_eq!(kind, ErrorKind::ResourceBusy);
        woken.await.unwrap();
        io.writable().await.unwrap();
        assert_eq!(first.await.unwrap(), b'x');
    });
}

/// All bytes are in the socket or with the connection. Half of the waits end early.
#[test]
fn a_dropped_future_loses_no_byte() {
    let runtime = Runtime::new().unwrap();
    let (io, mut peer) = pair(&runtime);
    let sent = Random::new(1).bytes(20_000);
    let bytes = sent.clone();
    let writer = thread::spawn(move || {
        let mut random = Random::new(2);
        for piece in bytes.chunks(10) {
            peer.write_all(piece).unwrap();
            thread::sleep(Duration::from_micros(random.below(100) as u64));
        }
    });
    let sleeper = Rc::clone(&runtime);
    let (received, dropped) = block_on(&runtime, async move {
        let (mut received, mut dropped, mut random) = (Vec::<u8>::new(), 0, Random::new(3));
        loop {
            let dropped_early = match random.below(3) {
                0 => race(io.readable(), ready(())).await.is_err(),
                1 => race(io.readable(), pin!(yield_now())).await.is_err(),
                _ => sleeper.timeout(Duration::ZERO, io.readable()).await.is_none(),
            };
            dropped += u32::from(dropped_early);
            if !dropped_early || random.below(2) == 0 {
                io.readable().await.unwrap();
                let mut bytes = [0; 7];
                match io.get_ref().read(&mut bytes).unwrap() {
                    0 => return (received, dropped),
                    n => received.extend(&bytes[..n]),
                }
            }
        }
    });
    writer.join().unwrap();
    assert!(received == sent);
    assert!(dropped > 100);
}

#[test]
fn what_cannot_be_watched_is_an_error_each_time() {
    let runtime = Runtime::new().unwrap();
    let file = Async::new(&runtime, File::open(std::env::current_exe().unwrap()).unwrap());
    block_on(&runtime, async move {
        for _ in 0..2 {
            let kind = file.readable().await.unwrap_err().kind();
            assert_eq!(kind, ErrorKind::PermissionDenied);
        }
    });
    assert_eq!(runtime.reactor.borrow().0.registered(), 1);
}

/// Unread bytes would reset the connection.
#[test]
fn a_graceful_close_sends_the_rest_and_leaves_nothing_registered() {
    let runtime = Runtime::new().unwrap();
    let (ours, mut peer) = tcp_pair();
    let (io, pool) = (Async::new(&runtime, ours), BufPool::new(1 << 20));
    peer.write_all(b"unread").unwrap();
    let mut output = OutputBuf::new(&pool);
    output.send_data(&b"the rest"[..]).unwrap();
    block_on(&runtime, async move {
        io.readable().await.unwrap();
        io.close_gracefully(output).unwrap();
    });
    let mut received = String::new();
    peer.read_to_string(&mut received).unwrap();
    assert_eq!(received, "the rest");
    drop(peer);
    let (event_loop, waiting) = &mut *runtime.reactor.borrow_mut();
    assert_eq!(event_loop.drain_output(waiting, Instant::now() + LIMIT).unwrap(), 0);
    assert_eq!(event_loop.registered(), 1);
}

// ---- Wakers --------------------------------------------------------------------------------------

#[test]
fn a_thousand_wake_ups_are_one_poll() {
    let runtime = Runtime::new().unwrap();
    let (waker, polls) = (Rc::new(RefCell::new(None)), Rc::new(Cell::new(0)));
    let (set, count) = (Rc::clone(&waker), Rc::clone(&polls));
    runtime.spawn(poll_fn(move |cx| {
        *set.borrow_mut() = Some(cx.waker().clone());
        count.set(count.get() + 1);
        Poll::Pending
    }));
    let clearer = Rc::clone(&runtime);
    block_on(&runtime, async move {
        for expected in 1..4 {
            assert_eq!(polls.get(), expected);
            let waker: Waker = waker.take().unwrap();
            thread::scope(|scope| {
                (0..4)
                    .for_each(|_| drop(scope.spawn(|| (0..250).for_each(|_| waker.wake_by_ref()))));
            });
            yield_now().await;
            yield_now().await;
        }
        clearer.clear();
    });
}

/// The first task has ended, and others have come since.
#[test]
fn a_waker_that_outlives_its_task_does_nothing() {
    let runtime = Runtime::new().unwrap();
    let stale = block_on(&runtime, own_waker());
    let polls = Rc::new(Cell::new(0));
    for _ in 0..10 {
        let polls = Rc::clone(&polls);
        runtime.spawn(poll_fn(move |_| {
            polls.set(polls.get() + 1);
            Poll::<()>::Pending
        }));
    }
    let clearer = Rc::clone(&runtime);
    let waker = stale.clone();
    block_on(&runtime, async move {
        for _ in 0..3 {
            waker.wake_by_ref();
            yield_now().await;
        }
        clearer.clear();
    });
    assert_eq!(polls.get(), 10);
    drop(runtime);
    stale.wake();
}

/// The bell is one of its fds: with a cycle of references, it would stay.
#[test]
fn an_executor_leaves_nothing_behind_whatever_is_in_its_queue() {
    let eventfds = || {
        let fds = fs::read_dir("/proc/self/fd").unwrap();
        let links = fds.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        links.filter(|link| link.as_os_str() == "anon_inode:[eventfd]").count()
    };
    let before = eventfds();
    for n in 0..300 {
        let runtime = Runtime::new().unwrap();
        let waker = block_on(&runtime, async {
            // It ends in the queue.
            let waker = own_waker().await;
            waker.wake_by_ref();
            waker
        });
        match n % 3 {
            0 => runtime.spawn(async {}),
            1 => waker.wake(),
            _ => {
                drop(runtime);
                waker.wake();
            }
        }
    }
    let left = eventfds().saturating_sub(before);
    assert!(left < 100, "{left} eventfds are left");
}

thread_local! {
    /// What the following wakers do.
    static ON_WAKE: RefCell<Vec<Box<dyn FnOnce()>>> = const { RefCell::new(Vec::new()) };
}

fn call_all() {
    ON_WAKE.take().into_iter().for_each(|call| call());
}

/// The waker of something other than a task: it may run any code, when it is woken.
struct Calls;

impl Wake for Calls {
    fn wake(self: Arc<Self>) {
        call_all();
    }
}

/// And when it is dropped.
struct CallsOnDrop;

impl Wake for CallsOnDrop {
    fn wake(self: Arc<Self>) {}
}

impl Drop for CallsOnDrop {
    fn drop(&mut self) {
        call_all();
    }
}

/// Two sockets are ready in one batch. The first one's waker drops the other one's task.
#[test]
fn a_waker_may_drop_other_tasks_and_their_sockets() {
    let runtime = Runtime::new().unwrap();
    let ((first, mut first_peer), (second, mut second_peer)) = (pair(&runtime), pair(&runtime));
    let (clearer, dropped) = (Rc::clone(&runtime), Rc::new(()));
    let held = Rc::clone(&dropped);
    runtime.spawn(async move {
        let _held = held;
        let foreign = Waker::from(Arc::new(Calls));
        let mut readable = first.readable();
        assert!(Pin::new(&mut readable).poll(&mut Context::from_waker(&foreign)).is_pending());
        second.readable().await.unwrap();
    });
    let seen = Rc::downgrade(&dropped);
    drop(dropped);
    ON_WAKE.with_borrow_mut(|calls| {
        calls.push(Box::new(move || {
            // Nothing is borrowed.
            assert!(clearer.reactor.try_borrow_mut().is_ok());
            clearer.clear();
        }));
    });
    runtime.spawn(async move {
        yield_now().await;
        first_peer.write_all(b"x").unwrap();
        second_peer.write_all(b"x").unwrap();
        pending().await
    });
    run(&runtime);
    assert_eq!(seen.strong_count(), 0);
    assert_eq!(runtime.reactor.borrow().0.registered(), 1);
}

/// It is replaced, or dropped with the future that holds it.
#[test]
fn a_waker_may_run_any_code_when_it_is_dropped() {
    let runtime = Runtime::new().unwrap();
    let io = Rc::new(pair(&runtime).0);
    let sleep = || Box::pin(runtime.sleep(HOUR)) as Pin<Box<dyn Future<Output = ()>>>;
    let waits = |io: &Rc<Io>| {
        let io = Rc::clone(io);
        Box::pin(async move { io.readable().await.unwrap() }) as Pin<Box<dyn Future<Output = ()>>>
    };
    for mut future in [sleep(), waits(&io)] {
        for replace in [true, false] {
            let called = Rc::new(Cell::new(false));
            let (runtime, io, set) = (Rc::clone(&runtime), Rc::clone(&io), Rc::clone(&called));
            ON_WAKE.with_borrow_mut(|calls| {
                calls.push(Box::new(move || {
                    drop(runtime.sleep(HOUR));
                    let _ = poll(pin!(io.readable()));
                    set.set(true);
                }));
            });
            let waker = Waker::from(Arc::new(CallsOnDrop));
            assert!(future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
            drop(waker);
            assert!(!called.get());
            if replace {
                assert!(poll(future.as_mut()).is_pending());
            } else {
                future = Box::pin(ready(()));
            }
            assert!(called.get());
        }
    }
}

#[test]
fn a_joiner_that_is_polled_when_it_is_woken_finds_the_output() {
    let runtime = Runtime::new().unwrap();
    let (mut task, joined) = (runtime.spawn_join(ready(7)), Rc::new(Cell::new(None)));
    let foreign = Waker::from(Arc::new(Calls));
    assert!(Pin::new(&mut task).poll(&mut Context::from_waker(&foreign)).is_pending());
    let set = Rc::clone(&joined);
    ON_WAKE.with_borrow_mut(|calls| {
        calls.push(Box::new(move || set.set(output(task).ok())));
    });
    run(&runtime);
    assert_eq!(joined.get(), Some(7));
}

#[test]
fn a_wake_up_while_the_loop_is_borrowed_counts() {
    let runtime = Runtime::new().unwrap();
    let task = runtime.spawn_join(async {
        let (waker, mut woken) = (own_waker().await, false);
        ON_WAKE.with_borrow_mut(|calls| calls.push(Box::new(move || waker.wake())));
        poll_fn(|_| {
            let woken = std::mem::replace(&mut woken, true);
            if woken { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    });
    let wakes = |_: &mut Waiting, _: &mut EventLoop<Waiting>, _: Token| {
        call_all();
        Ok(())
    };
    let delay = Duration::from_millis(1);
    runtime.reactor.borrow_mut().0.run_after(delay, Token::default(), wakes).unwrap();
    run(&runtime);
    assert!(output(task).is_ok());
}

/// Before epoll_wait, during it, or whenever it comes. After a ring the loop sleeps again.
#[test]
fn a_wake_up_from_another_thread_ends_the_wait_once() {
    for moment in ["before", "during", "whenever"] {
        let (log, runtime) = (Log::new(), Runtime::new().unwrap());
        let (sender, receiver) = mpsc::channel();
        let woken = Arc::new(AtomicBool::new(false));
        let sees = Arc::clone(&woken);
        let task = runtime.spawn_join(poll_fn(move |cx| {
            let _ = sender.send(cx.waker().clone());
            if sees.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }
        }));
        let tid = nix::unistd::gettid();
        let wake = move || {
            let waker: Waker = receiver.recv().unwrap();
            if moment == "during" {
                let status = format!("/proc/self/task/{tid}/status");
                wait_until("it sleeps", || {
                    fs::read_to_string(&status).unwrap().contains("\nState:\tS")
                });
            }
            woken.store(true, Ordering::Relaxed);
            waker.wake();
        };
        let sleeper = Rc::clone(&runtime);
        let thread = thread::spawn(wake);
        if moment == "before" {
            // The task that waits has been polled by then.
            runtime.spawn(async { thread.join().unwrap() });
        }
        block_on(&runtime, async move {
            task.await.unwrap();
            let waits = || log.messages("epoll_wait: ").len();
            let before = waits();
            sleeper.sleep(Duration::from_millis(20)).await;
            assert!(waits() - before <= 3, "{moment}: the bell still rings");
        });
    }
}

/// Looks at the queue and sets the flag, with a wake-up before, between or after. The lock rules out the
/// second.
#[test]
fn the_flag_has_to_be_set_under_the_lock_of_the_queue() {
    for (moment, lost) in [(0, false), (1, true), (2, false)] {
        let (mut queued, mut asleep, mut sees, mut rings) = (false, false, false, false);
        for step in 0..3 {
            if step == moment {
                queued = true;
                rings = asleep;
            }
            match step {
                0 => sees = queued,
                1 => asleep = !sees,
                _ => {}
            }
        }
        // Lost: it is in the queue, the loop sleeps, and nothing will end that.
        assert_eq!(queued && asleep && !rings, lost);
    }
}

/// What a task has been woken for, and how much of it it has seen.
#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    seen: AtomicU64,
    failed: AtomicBool,
}

/// Threads wake one task up, `wakes` times per round, with a `pause` before each, for which it gets a random
/// number. At the end of a round they wait until it has seen everything: they would wait forever if the
/// task were not polled after the last wake-up. A loop that is `busy` never sleeps.
#[track_caller]
fn assert_none_is_lost(threads: u64, rounds: u64, wakes: u64, busy: bool, pause: fn(u64)) {
    let wake_up = move |thread: u64, counts: &Counts, waker: &Waker, watcher: &Waker| {
        let mut random = Random::new(thread);
        for round in 1..=rounds {
            for _ in 0..wakes {
                pause(random.number());
                // All that makes this visible is the wake-up.
                counts.sent.fetch_add(1, Ordering::Relaxed);
                waker.wake_by_ref();
            }
            let start = Instant::now();
            while counts.seen.load(Ordering::Relaxed) < round * wakes * threads {
                if start.elapsed() > LIMIT / 3 {
                    counts.failed.store(true, Ordering::Relaxed);
                    watcher.wake_by_ref();
                    return;
                }
                thread::yield_now();
            }
        }
    };
    let (runtime, counts) = (Runtime::new().unwrap(), Arc::new(Counts::default()));
    let clearer = Rc::clone(&runtime);
    // No timer may cut a wait short that a wake-up should have ended.
    let failed = runtime.spawn_join(async move {
        let (watcher, woken) = (own_waker().await, Arc::clone(&counts));
        let task = clearer.spawn_join(async move {
            let waker = own_waker().await;
            for thread in 0..threads {
                let (counts, waker) = (Arc::clone(&woken), waker.clone());
                let watcher = watcher.clone();
                thread::spawn(move || wake_up(thread, &counts, &waker, &watcher));
            }
            let mut random = Random::new(threads);
            poll_fn(|_| {
                let sent = woken.sent.load(Ordering::Relaxed);
                if busy {
                    // The poll goes on, but has seen all that it will see.
                    pause(random.number());
                }
                woken.seen.store(sent, Ordering::Relaxed);
                if sent == rounds * wakes * threads { Poll::Ready(()) } else { Poll::Pending }
            })
            .await;
        });
        if busy {
            clearer.spawn(async {
                loop {
                    yield_now().await;
                }
            });
        }
        let failed = poll_fn(|_| {
            if counts.failed.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }
        });
        let failed = race(task, failed).await.is_err();
        clearer.clear();
        failed
    });
    run_within(10 * LIMIT, &runtime);
    assert!(!output(failed).unwrap(), "the task has not been polled after a wake-up");
}

/// Mostly while the loop is busy, or about to go to sleep.
#[test]
fn millions_of_wake_ups_from_several_threads_are_not_lost() {
    assert_none_is_lost(4, 500, 1000, false, |random| {
        if random % 16 == 0 {
            thread::yield_now();
        } else if random % 1024 == 1 {
            thread::sleep(Duration::from_micros(random >> 32 & 63));
        }
    });
}

fn spin(random: u64, limit: u64) {
    let start = Instant::now();
    while start.elapsed() < Duration::from_nanos(random >> 32 & limit) {}
}

/// No third wake-up covers up that the second one was taken for the first.
#[test]
fn a_wake_up_while_the_loop_wakes_up_is_not_lost() {
    assert_none_is_lost(1, 20_000, 2, false, |random| spin(random, 0x7fff));
    assert_none_is_lost(1, 100_000, 1, false, |random| spin(random, 0xfff));
}

/// Nor at the very moment of a poll: what was written before a wake-up is read by the poll after it.
#[test]
fn a_wake_up_while_the_task_is_polled_is_not_lost() {
    assert_none_is_lost(1, 50_000, 2, true, |random| spin(random, 0xfff));
}
