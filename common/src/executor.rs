//! The executor: async tasks on the event loop of chapter 3 (since v13).
//!
//! ```text
//! Runtime::run:   +-> poll the tasks in the queue --> no task left: return
//!                 |                |
//!     wake: into the queue  <--  one iteration of the loop, EventLoop::poll_once
//! ```
//!
//! While a task waits, its [`Waker`] is where a callback would be: with an fd or a timer. The loop's own
//! callbacks do nothing but find out which task to wake.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::io;
use std::mem;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tracing::{error, trace};

use crate::event_loop::{Callbacks, EventLoop, Interest, TimerId, Token};

/// The executor of one thread (since v13). Clones are the same one.
#[derive(Clone)]
pub struct Runtime(Rc<Inner>);

struct Inner {
    reactor: RefCell<(EventLoop<Waiting>, Waiting)>,
    tasks: RefCell<HashMap<u64, Task>>,
    spawned: Cell<u64>,
    queue: Arc<Queue>,
}

/// The state of the loop: what to wake for which event (since v13).
pub struct Waiting {
    sources: HashMap<Token, Rc<Source<dyn AsFd>>>,
    sleepers: BTreeMap<TimerId, Option<Waker>>,
    /// To be woken after this iteration: waking may run any code, and the loop is borrowed now.
    woken: Vec<Waker>,
    queue: Arc<Queue>,
}

struct Task {
    future: Pin<Box<dyn Future<Output = ()>>>,
    waker: Arc<TaskWaker>,
}

/// What is behind a [`Waker`]. Not the task: a waker may be sent to another thread, and outlive it.
struct TaskWaker {
    number: u64,
    /// Woken again while it is in the queue, a task is still polled once.
    queued: AtomicBool,
    queue: Arc<Queue>,
}

/// The tasks to poll.
struct Queue {
    state: Mutex<QueueState>,
    /// Ends epoll_wait.
    bell: EventFd,
}

#[derive(Default)]
struct QueueState {
    ready: Vec<Arc<TaskWaker>>,
    /// Whether the next wake-up has to ring: the loop sleeps, or is about to. It is under the same lock
    /// as the queue, or a task that is woken in between would not be seen.
    asleep: bool,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            let queue = Arc::clone(&self.queue);
            let mut state = queue.lock();
            state.ready.push(self);
            if mem::take(&mut state.asleep) {
                // It could only fail after 2^64 - 2 rings, and it is readable then.
                let _ = queue.bell.write(1);
            }
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Runtime {
    /// Creates an executor without tasks.
    ///
    /// # Errors
    /// Any epoll_create1(2), eventfd(2) or epoll_ctl(2) error, typically EMFILE.
    pub fn new() -> io::Result<Self> {
        let mut event_loop = EventLoop::new()?;
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        let silence = |waiting: &mut Waiting, _: &mut EventLoop<_>, _| {
            waiting.queue.bell.read()?;
            Ok(())
        };
        let callbacks = Callbacks { read: Some(silence as _), write: None };
        event_loop.add_io_event(&bell, Interest::READ, callbacks)?;
        let queue = Arc::new(Queue { state: Mutex::default(), bell });
        let (sources, sleepers, woken, tasks, spawned) = Default::default();
        let waiting = Waiting { sources, sleepers, woken, queue: Arc::clone(&queue) };
        let reactor = RefCell::new((event_loop, waiting));
        Ok(Self(Rc::new(Inner { reactor, tasks, spawned, queue })))
    }

    /// The event loop, and its state. Not to be held when a task is awaited, spawned or dropped.
    pub fn reactor(&self) -> RefMut<'_, (EventLoop<Waiting>, Waiting)> {
        self.0.reactor.borrow_mut()
    }

    /// Starts a task. If it panics, the others go on.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let number = self.0.spawned.replace(self.0.spawned.get() + 1);
        let (queued, queue) = (AtomicBool::new(false), Arc::clone(&self.0.queue));
        let waker = Arc::new(TaskWaker { number, queued, queue });
        let task = Task { future: Box::pin(future), waker: Arc::clone(&waker) };
        self.0.tasks.borrow_mut().insert(number, task);
        waker.wake();
    }

    /// Polls tasks and runs the loop, until no task is left or the loop is stopped.
    ///
    /// # Errors
    /// Any error of a callback or of epoll_wait(2).
    pub fn run(&self) -> Result<()> {
        let (mut batch, mut woken) = (Vec::new(), Vec::new());
        loop {
            // What is woken from here on has to wait for the fds and the timers: a task that wakes
            // itself again and again must not keep them waiting.
            mem::swap(&mut batch, &mut self.0.queue.lock().ready);
            batch.drain(..).for_each(|waker| self.poll(waker));
            if self.0.tasks.borrow().is_empty() || !self.turn(&mut woken)? {
                return Ok(());
            }
            woken.drain(..).for_each(Waker::wake);
        }
    }

    fn poll(&self, waker: Arc<TaskWaker>) {
        // Before the poll: a wake-up during it counts.
        waker.queued.store(false, Ordering::Release);
        // Out of the table, which the task may use to spawn others.
        let Some(mut task) = self.0.tasks.borrow_mut().remove(&waker.number) else { return };
        trace!("poll: task {}", waker.number);
        let (number, waker) = (waker.number, Waker::from(waker));
        let poll = || task.future.as_mut().poll(&mut Context::from_waker(&waker));
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(Poll::Pending) => drop(self.0.tasks.borrow_mut().insert(number, task)),
            Ok(Poll::Ready(())) => trace!("ready: task {number}"),
            Err(_) => error!("task {number} panicked"),
        }
    }

    /// One iteration of the loop, which waits if the queue is empty. Returns false if it was stopped.
    fn turn(&self, woken: &mut Vec<Waker>) -> Result<bool> {
        let limit = {
            let mut state = self.0.queue.lock();
            state.asleep = state.ready.is_empty();
            (!state.asleep).then_some(Duration::ZERO)
        };
        let (event_loop, waiting) = &mut *self.reactor();
        event_loop.poll_once(waiting, limit)?;
        self.0.queue.lock().asleep = false;
        mem::swap(woken, &mut waiting.woken);
        Ok(event_loop.is_running())
    }

    /// Drops all tasks.
    pub fn clear(&self) {
        // Not while the table is borrowed: dropping a task may run any code.
        let _tasks = self.0.tasks.take();
    }
}

/// A non-blocking fd that a task can wait for (since v13). Waiting registers it with the loop, dropping
/// this deregisters it.
pub struct Async<F: AsFd + 'static> {
    runtime: Runtime,
    source: Rc<Source<F>>,
}

struct Source<F: AsFd + ?Sized> {
    token: Cell<Option<Token>>,
    /// To read, and to write.
    waiters: RefCell<[Waiter; 2]>,
    fd: F,
}

#[derive(Default)]
enum Waiter {
    #[default]
    None,
    Waits(Waker),
    /// It has been woken, and not polled yet.
    Woken,
}

impl<F: AsFd> Async<F> {
    /// Wraps an fd, which has to be non-blocking.
    pub fn new(runtime: &Runtime, fd: F) -> Self {
        let (token, waiters) = Default::default();
        Self { runtime: runtime.clone(), source: Rc::new(Source { token, waiters, fd }) }
    }

    /// The fd itself.
    pub fn get(&self) -> &F {
        &self.source.fd
    }

    /// Waits until there is something to read. Then read once: the other tasks want their turn.
    pub fn readable(&self) -> Readiness<'_, F> {
        Readiness { io: self, side: 0, waits: false }
    }

    /// Waits until there is room to write.
    pub fn writable(&self) -> Readiness<'_, F> {
        Readiness { io: self, side: 1, waits: false }
    }

    /// Deregisters the fd and gives it back.
    pub fn into_inner(self) -> Option<F> {
        let source = Rc::clone(&self.source);
        // Always `Some`: `self` and the registration have the only others.
        drop(self);
        Some(Rc::into_inner(source)?.fd)
    }

    fn watch(&self) -> io::Result<()> {
        let (event_loop, waiting) = &mut *self.runtime.reactor();
        waiting.watch(event_loop, &(Rc::clone(&self.source) as Rc<Source<dyn AsFd>>))
    }
}

impl<F: AsFd> Drop for Async<F> {
    fn drop(&mut self) {
        let _wakers = self.source.waiters.take();
        // It could only fail if the fd were not registered.
        let _ = self.watch();
    }
}

impl Waiting {
    const CALLBACKS: Callbacks<Self> = Callbacks {
        read: Some(|waiting, event_loop, token| waiting.wake(event_loop, token, 0)),
        write: Some(|waiting, event_loop, token| waiting.wake(event_loop, token, 1)),
    };

    fn wake(&mut self, event_loop: &mut EventLoop<Self>, token: Token, side: usize) -> Result<()> {
        let Some(source) = self.sources.get(&token).map(Rc::clone) else { return Ok(()) };
        let waiter = mem::replace(&mut source.waiters.borrow_mut()[side], Waiter::Woken);
        if let Waiter::Waits(waker) = waiter {
            // Nothing changes for epoll: typically the task waits again before the next iteration.
            self.woken.push(waker);
            return Ok(());
        }
        // It has not: level-triggered, the same event would come again and again.
        source.waiters.borrow_mut()[side] = waiter;
        Ok(self.watch(event_loop, &source)?)
    }

    /// Has `source` watched for exactly what is waited for. If that is nothing it is deregistered: errors
    /// cannot be masked.
    fn watch(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        source: &Rc<Source<dyn AsFd>>,
    ) -> io::Result<()> {
        let waits = |waiter: &Waiter| matches!(waiter, Waiter::Waits(_));
        let [read, write] = source.waiters.borrow().each_ref().map(waits);
        let interest = Interest { read, write };
        match source.token.get() {
            None if interest == Interest::NONE => {}
            None => {
                let token = event_loop.add_io_event(&source.fd, interest, Self::CALLBACKS)?;
                source.token.set(Some(token));
                self.sources.insert(token, Rc::clone(source));
            }
            Some(token) if interest == Interest::NONE => {
                source.token.set(None);
                self.sources.remove(&token);
                event_loop.del_io_event(&source.fd, token)?;
            }
            Some(token) => event_loop.set_interest(&source.fd, token, interest)?,
        }
        Ok(())
    }
}

/// The future of [`Async::readable`] and [`Async::writable`]: a state machine of two states, by hand
/// (since v13). Its errors are those of epoll_ctl(2), and ResourceBusy if another task waits for the
/// same.
pub struct Readiness<'a, F: AsFd + 'static> {
    io: &'a Async<F>,
    side: usize,
    waits: bool,
}

impl<F: AsFd> Future for Readiness<'_, F> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io.source.waiters.borrow_mut()[self.side] {
            waiter @ Waiter::Woken if self.waits => {
                *waiter = Waiter::None;
                self.waits = false;
                return Poll::Ready(Ok(()));
            }
            // Polled for another reason.
            Waiter::Waits(waker) if self.waits => {
                waker.clone_from(cx.waker());
                return Poll::Pending;
            }
            waiter @ Waiter::None => *waiter = Waiter::Waits(cx.waker().clone()),
            _ => return Poll::Ready(Err(io::ErrorKind::ResourceBusy.into())),
        }
        self.waits = true;
        // What is ready already is an event too, so no wake-up is lost.
        self.io.watch()?;
        Poll::Pending
    }
}

impl<F: AsFd> Drop for Readiness<'_, F> {
    /// Nothing is lost: the bytes are in the socket.
    fn drop(&mut self) {
        if self.waits {
            self.io.source.waiters.borrow_mut()[self.side] = Waiter::None;
        }
    }
}

/// The future of [`Runtime::sleep`] (since v13).
pub struct Sleep {
    runtime: Runtime,
    id: TimerId,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let waiter = self
            .runtime
            .reactor()
            .1
            .sleepers
            .get_mut(&self.id)
            .map(|waiter| waiter.replace(cx.waker().clone()));
        if waiter.is_some() { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let (event_loop, waiting) = &mut *self.runtime.reactor();
        if waiting.sleepers.remove(&self.id).is_some() {
            event_loop.cancel_timer(self.id);
        }
    }
}

impl Runtime {
    /// Waits until `delay` has passed from now on.
    ///
    /// # Errors
    /// As [`EventLoop::run_after`].
    pub fn sleep(&self, delay: Duration) -> io::Result<Sleep> {
        let (event_loop, waiting) = &mut *self.reactor();
        let id = event_loop.run_after(delay, Token::default(), |waiting: &mut Waiting, _, _| {
            // The loop runs timers in the order of their ids, so the first one is due.
            waiting.woken.extend(waiting.sleepers.pop_first().and_then(|(_, waker)| waker));
            Ok(())
        })?;
        waiting.sleepers.insert(id, None);
        Ok(Sleep { runtime: self.clone(), id })
    }

    /// The output of `future`, or `None` if it is not ready within `limit`. Then it is dropped.
    ///
    /// # Errors
    /// As [`sleep`](Self::sleep).
    pub async fn timeout<F: Future>(
        &self,
        limit: Duration,
        future: F,
    ) -> io::Result<Option<F::Output>> {
        let sleep = self.sleep(limit)?;
        match race(pin!(future), sleep).await {
            Either::Left(output) => Ok(Some(output)),
            Either::Right(()) => Ok(None),
        }
    }

    /// Starts a task. The future that is returned has its output, or an error if it panicked or was
    /// dropped. The task goes on without it too.
    pub fn spawn_join<T: 'static>(
        &self,
        future: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = Result<T>> + Unpin {
        let state = Rc::new(Join { output: Cell::default(), waiter: Cell::default() });
        let end = JoinEnd(Rc::clone(&state));
        // Boxed, because an async block holds twice what it awaits.
        let future = Box::pin(future);
        self.spawn(async move { end.0.output.set(Some(future.await)) });
        poll_fn(move |cx| {
            // The other one is the task's.
            if Rc::strong_count(&state) == 1 {
                return Poll::Ready(
                    state.output.take().context("the task panicked, or was dropped"),
                );
            }
            state.waiter.set(Some(cx.waker().clone()));
            Poll::Pending
        })
    }
}

/// A part of the task, with its output and the waker of the task that joins it. It is dropped when the
/// task ends, in whatever way.
struct JoinEnd<T>(Rc<Join<T>>);

struct Join<T> {
    output: Cell<Option<T>>,
    waiter: Cell<Option<Waker>>,
}

impl<T> Drop for JoinEnd<T> {
    fn drop(&mut self) {
        self.0.waiter.take().into_iter().for_each(Waker::wake);
    }
}

/// Which of two futures was ready first (since v13).
pub enum Either<A, B> {
    /// The first one, with its output.
    Left(A),
    /// The second one, with its output.
    Right(B),
}

/// Polls two futures, `left` first, until one is ready (since v13). The other one is dropped: lend it
/// with [`pin!`] or `&mut` to go on with it.
pub fn race<A: Future + Unpin, B: Future + Unpin>(
    mut left: A,
    mut right: B,
) -> impl Future<Output = Either<A::Output, B::Output>> + Unpin {
    // An `async fn` would hold its arguments twice.
    poll_fn(move |cx| match Pin::new(&mut left).poll(cx) {
        Poll::Ready(output) => Poll::Ready(Either::Left(output)),
        Poll::Pending => Pin::new(&mut right).poll(cx).map(Either::Right),
    })
}

/// Something that happens once, for all tasks that wait for it (since v13).
pub struct Event {
    runtime: Runtime,
    has_happened: Cell<bool>,
}

impl Event {
    /// An event that has not happened.
    pub fn new(runtime: &Runtime) -> Self {
        Self { runtime: runtime.clone(), has_happened: Cell::new(false) }
    }

    /// Lets it happen. This wakes all tasks: a list of those that wait would cost each of them memory.
    pub fn set(&self) {
        self.has_happened.set(true);
        let tasks = self.runtime.0.tasks.borrow();
        tasks.values().for_each(|task| Arc::clone(&task.waker).wake());
    }

    /// Waits until it has happened.
    pub fn wait(&self) -> impl Future<Output = ()> + Unpin {
        poll_fn(|_| if self.has_happened.get() { Poll::Ready(()) } else { Poll::Pending })
    }
}
