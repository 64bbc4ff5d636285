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
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tracing::{error, trace};

use crate::bell::Bell;
use crate::closing::QUIET;
use crate::event_loop::{Callbacks, EventLoop, Interest, TimerId, Token};
use crate::reactor_buf::OutputBuf;

/// The executor of one thread (since v13). Clones are the same one.
#[derive(Clone)]
pub struct Runtime(Rc<Inner>);

struct Inner {
    reactor: RefCell<(Loop, Waiting)>,
    /// `None` while it is polled.
    tasks: RefCell<HashMap<u64, Option<Task>>>,
    /// How many tasks have been spawned, and how many events have come.
    spawned: Cell<u64>,
    events: Cell<usize>,
    queue: Arc<Queue>,
}

type Loop = EventLoop<Waiting>;
type Task = Pin<Box<dyn Future<Output = ()>>>;
type AnySource = Rc<Source<dyn AsFd>>;

/// The state of the loop: what to wake for which event (since v13).
#[derive(Default)]
pub struct Waiting {
    sources: HashMap<Token, AnySource>,
    sleepers: BTreeMap<TimerId, Option<Waker>>,
    /// To be woken after this iteration: waking may run any code, and the loop is borrowed now.
    woken: Vec<Waker>,
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
    bell: Bell,
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
                queue.bell.ring();
            }
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is nothing to poll, so that the loop may sleep.
    fn sleep(&self) -> bool {
        let mut state = self.lock();
        state.asleep = state.ready.is_empty();
        state.asleep
    }
}

impl Runtime {
    /// Creates an executor without tasks.
    ///
    /// # Errors
    /// Any epoll_create1(2), eventfd(2) or epoll_ctl(2) error, typically EMFILE.
    pub fn new() -> io::Result<Self> {
        let mut event_loop = EventLoop::new()?;
        let queue = Arc::new(Queue { state: Mutex::default(), bell: Bell::new()? });
        // The bell only ends epoll_wait; `turn` silences it.
        let callbacks = Callbacks { read: Some(|_, _, _| Ok(())), write: None };
        event_loop.add_io_event(&queue.bell, Interest::READ, callbacks)?;
        let (waiting, tasks, spawned, events) = Default::default();
        let reactor = RefCell::new((event_loop, waiting));
        Ok(Self(Rc::new(Inner { reactor, tasks, spawned, events, queue })))
    }

    /// The event loop, and its state. Not to be held when a task is awaited, spawned or dropped.
    pub fn reactor(&self) -> RefMut<'_, (Loop, Waiting)> {
        self.0.reactor.borrow_mut()
    }

    /// Starts a task. If it panics, the others go on.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let number = self.0.spawned.replace(self.0.spawned.get() + 1);
        self.0.tasks.borrow_mut().insert(number, Some(Box::pin(future)));
        self.wake(number);
    }

    fn wake(&self, number: u64) {
        let (queued, queue) = (AtomicBool::new(false), Arc::clone(&self.0.queue));
        Arc::new(TaskWaker { number, queued, queue }).wake();
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
        let (number, waker) = (waker.number, Waker::from(waker));
        let put = |task: Option<Task>| {
            self.0.tasks.borrow_mut().get_mut(&number).and_then(|slot| mem::replace(slot, task))
        };
        // Out of the table, which the task may use to spawn others.
        let Some(mut task) = put(None) else { return };
        trace!("poll: task {number}");
        let poll = || task.as_mut().poll(&mut Context::from_waker(&waker));
        match catch_unwind(AssertUnwindSafe(poll)) {
            Ok(Poll::Pending) => return drop(put(Some(task))),
            Ok(Poll::Ready(())) => trace!("ready: task {number}"),
            Err(_) => error!("task {number} panicked"),
        }
        self.0.tasks.borrow_mut().remove(&number);
    }

    /// One iteration of the loop, which waits if the queue is empty. Returns false if it was stopped.
    fn turn(&self, woken: &mut Vec<Waker>) -> Result<bool> {
        let sleeps = self.0.queue.sleep();
        let (event_loop, waiting) = &mut *self.reactor();
        let n = event_loop.poll_once(waiting, (!sleeps).then_some(Duration::ZERO))?;
        self.0.events.set(self.0.events.get() + n);
        if sleeps && !mem::take(&mut self.0.queue.lock().asleep) {
            self.0.queue.bell.silence()?;
        }
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
    pub fn get_ref(&self) -> &F {
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

    fn watch(&self) -> io::Result<()> {
        let (event_loop, waiting) = &mut *self.runtime.reactor();
        waiting.watch(event_loop, &(Rc::clone(&self.source) as AnySource))
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

    fn wake(&mut self, event_loop: &mut Loop, token: Token, side: usize) -> Result<()> {
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
    fn watch(&mut self, event_loop: &mut Loop, source: &AnySource) -> io::Result<()> {
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

// ---- What is built on it -------------------------------------------------------------------------

impl Runtime {
    /// Waits until `delay` has passed from now on; for ever, if that would overflow an [`Instant`].
    pub fn sleep(&self, delay: Duration) -> Sleep {
        let (event_loop, waiting) = &mut *self.reactor();
        let timer = event_loop.run_after(delay, Token::default(), |waiting: &mut Waiting, _, _| {
            // The loop runs timers in the order of their ids, so the first one is due.
            waiting.woken.extend(waiting.sleepers.pop_first().and_then(|(_, waker)| waker));
            Ok(())
        });
        let id = timer.inspect(|id| drop(waiting.sleepers.insert(*id, None))).ok();
        Sleep { runtime: self.clone(), id }
    }

    /// The output of `future`, or `None` if it is not ready within `limit`. Then it is dropped.
    pub async fn timeout<F: Future>(&self, limit: Duration, future: F) -> Option<F::Output> {
        race(pin!(future), self.sleep(limit)).await.ok()
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
            if Rc::strong_count(&state) > 1 {
                state.waiter.set(Some(cx.waker().clone()));
                return Poll::Pending;
            }
            Poll::Ready(state.output.take().context("the task panicked, or was dropped"))
        })
    }

    /// The same as [`EventLoop::drain_input`]: waits until no output is unsent and nothing has arrived
    /// for 50 ms, or until `end`.
    pub async fn drain_input(&self, end: Instant) {
        self.reactor().0.close_limits.at_once = usize::MAX;
        let mut before = None;
        while Instant::now() < end {
            let events = self.0.events.get();
            if before == Some(events) && !self.reactor().0.is_writing() {
                break;
            }
            before = Some(events);
            self.sleep(QUIET).await;
        }
    }
}

/// The future of [`Runtime::sleep`] (since v13).
pub struct Sleep {
    runtime: Runtime,
    id: Option<TimerId>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(id) = self.id else { return Poll::Pending };
        let waker = cx.waker().clone();
        let waiter = self.runtime.reactor().1.sleepers.get_mut(&id).map(|it| it.replace(waker));
        if waiter.is_some() { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        self.runtime.reactor().0.cancel_timer(id);
        // Dropped at the end, when the loop is free.
        let _waker = self.runtime.reactor().1.sleepers.remove(&id);
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

impl Async<TcpStream> {
    /// The same as [`EventLoop::close_gracefully`].
    ///
    /// # Errors
    /// Any epoll_ctl(2) error. An error on the connection itself only ends that connection.
    pub fn close_gracefully(self, output: OutputBuf) -> io::Result<()> {
        let (runtime, source) = (self.runtime.clone(), Rc::clone(&self.source));
        drop(self);
        let none = Callbacks { read: None, write: None };
        let event_loop = &mut runtime.reactor().0;
        let token = event_loop.add_io_event(&source.fd, Interest::NONE, none)?;
        // `self` and the registration had the only others.
        Rc::into_inner(source)
            .map_or(Ok(()), |it| event_loop.close_gracefully(it.fd, token, output))
    }
}

/// Polls two futures, `left` first, until one is ready: `Ok` has the output of `left`, `Err` that of
/// `right` (since v13). The other one is dropped: lend it with [`pin!`] or `&mut` to go on with it.
pub fn race<A: Future + Unpin, B: Future + Unpin>(
    mut left: A,
    mut right: B,
) -> impl Future<Output = Result<A::Output, B::Output>> + Unpin {
    // An `async fn` would hold its arguments twice.
    poll_fn(move |cx| match Pin::new(&mut left).poll(cx) {
        Poll::Ready(output) => Poll::Ready(Ok(output)),
        Poll::Pending => Pin::new(&mut right).poll(cx).map(Err),
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
        self.runtime.0.tasks.borrow().keys().for_each(|number| self.runtime.wake(*number));
    }

    /// Waits until it has happened.
    pub fn wait(&self) -> impl Future<Output = ()> + Unpin {
        poll_fn(|_| if self.has_happened.get() { Poll::Ready(()) } else { Poll::Pending })
    }
}
