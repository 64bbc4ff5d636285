//! The executor: async tasks on the event loop of chapter 3 (since v13).
//!
//! It polls the tasks that have been woken, then gives the loop one iteration, and so on. While a task
//! waits, its [`Waker`] is where a callback would be. The loop's own callbacks only find it, and wake.

use std::cell::{Cell, RefCell};
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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use tracing::{error, trace};

use crate::bell::Bell;
use crate::closing::QUIET;
use crate::event_loop::{Callbacks, EventLoop, Interest, TimerId, Token};
use crate::reactor_buf::OutputBuf;

/// The executor of one thread (since v13).
pub struct Runtime {
    /// The event loop, and its state. Not to be borrowed when a task is awaited, spawned or dropped.
    pub reactor: RefCell<(Loop, Waiting)>,
    /// `None` while it is polled.
    tasks: RefCell<HashMap<u64, Option<Task>>>,
    /// How many tasks have been spawned, and how many events have come.
    spawned: Cell<u64>,
    events: Cell<usize>,
    queue: Arc<Mutex<Queue>>,
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

/// What is behind a [`Waker`], which may be sent to another thread, and outlive task and executor.
struct TaskWaker {
    number: u64,
    /// However often this wakes its task, it is in the queue once.
    queued: AtomicBool,
    queue: Weak<Mutex<Queue>>,
}

struct Queue {
    /// The tasks to poll.
    ready: Vec<Arc<TaskWaker>>,
    /// Whether the next wake-up has to ring: the loop sleeps, or is about to. Under the same lock, or a
    /// wake-up between the last look at `ready` and epoll_wait would be lost.
    asleep: bool,
    bell: Bell,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        if !self.queued.swap(true, Ordering::AcqRel) {
            trace!("wake: task {}", self.number);
            let Some(queue) = self.queue.upgrade() else { return };
            let mut queue = lock(&queue);
            queue.ready.push(self);
            if mem::take(&mut queue.asleep) {
                queue.bell.ring();
            }
        }
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Runtime {
    /// Creates an executor without tasks.
    ///
    /// # Errors
    /// Any epoll_create1(2), eventfd(2) or epoll_ctl(2) error, typically EMFILE.
    pub fn new() -> io::Result<Rc<Self>> {
        let (mut event_loop, bell) = (EventLoop::new()?, Bell::new()?);
        // The bell only ends epoll_wait; `turn` silences it.
        let callbacks = Callbacks { read: Some(|_, _, _| Ok(())), write: None };
        event_loop.add_io_event(&bell, Interest::READ, callbacks)?;
        let (waiting, tasks, spawned, events) = Default::default();
        let reactor = RefCell::new((event_loop, waiting));
        let queue = Arc::new(Mutex::new(Queue { ready: Vec::new(), asleep: false, bell }));
        Ok(Rc::new(Self { reactor, tasks, spawned, events, queue }))
    }

    /// Starts a task. If it panics, the others go on.
    pub fn spawn(&self, future: impl Future<Output = ()> + 'static) {
        let number = self.spawned.replace(self.spawned.get() + 1);
        trace!("spawn: task {number}, {} bytes", size_of_val(&future));
        self.tasks.borrow_mut().insert(number, Some(Box::pin(future)));
        self.wake(number);
    }

    fn wake(&self, number: u64) {
        let (queued, queue) = (AtomicBool::new(false), Arc::downgrade(&self.queue));
        Arc::new(TaskWaker { number, queued, queue }).wake();
    }

    /// Polls tasks and runs the loop, until no task is left or the loop is stopped.
    ///
    /// # Errors
    /// Any error of a callback or of epoll_wait(2).
    pub fn run(&self) -> Result<()> {
        let (mut batch, mut woken, mut ends) = (Vec::new(), Vec::new(), false);
        while !ends {
            // From here on, what is woken waits for fds and timers: a task may keep waking itself.
            mem::swap(&mut batch, &mut lock(&self.queue).ready);
            batch.drain(..).for_each(|waker| self.poll(waker));
            ends = self.tasks.borrow().is_empty() || !self.turn(&mut woken)?;
            woken.drain(..).for_each(Waker::wake);
        }
        Ok(())
    }

    fn poll(&self, waker: Arc<TaskWaker>) {
        // Before the poll, so that a wake-up during it counts. A swap acquires what was done before one.
        waker.queued.swap(false, Ordering::AcqRel);
        let (number, waker) = (waker.number, Waker::from(waker));
        // Out of the table, which the task may use to spawn others.
        let slot = self.tasks.borrow_mut().get_mut(&number).and_then(Option::take);
        let Some(mut task) = slot else { return };
        trace!("poll: task {number}");
        let poll = || task.as_mut().poll(&mut Context::from_waker(&waker));
        let result = catch_unwind(AssertUnwindSafe(poll)).map_err(drop);
        // Given back before the task is dropped, which may run any code.
        let mut tasks = self.tasks.borrow_mut();
        match (result, tasks.get_mut(&number)) {
            (Ok(Poll::Pending), Some(slot)) => return *slot = Some(task),
            (Ok(Poll::Pending), None) => trace!("cleared: task {number}"),
            (Ok(Poll::Ready(())), _) => trace!("ready: task {number}"),
            (Err(()), _) => error!("task {number} panicked"),
        }
        tasks.remove(&number);
    }

    /// One iteration of the loop, which waits if the queue is empty. Returns false if it was stopped.
    fn turn(&self, woken: &mut Vec<Waker>) -> Result<bool> {
        let mut queue = lock(&self.queue);
        queue.asleep = queue.ready.is_empty();
        let limit = (!queue.asleep).then_some(Duration::ZERO);
        drop(queue);
        let (event_loop, waiting) = &mut *self.reactor.borrow_mut();
        let result = event_loop.poll_once(waiting, limit);
        let mut queue = lock(&self.queue);
        if limit.is_none() && !mem::take(&mut queue.asleep) {
            queue.bell.silence()?;
        }
        self.events.set(self.events.get() + result?);
        mem::swap(woken, &mut waiting.woken);
        Ok(event_loop.is_running())
    }

    /// Drops all tasks.
    pub fn clear(&self) {
        // Not while the table is borrowed: dropping a task may run any code.
        let _tasks = self.tasks.take();
    }
}

/// A non-blocking fd that a task can wait for (since v13). Waiting registers it with the loop, dropping
/// this deregisters it.
pub struct Async<F: AsFd + 'static>(Rc<Source<F>>);

struct Source<F: AsFd + ?Sized> {
    runtime: Rc<Runtime>,
    token: Cell<Option<Token>>,
    /// Whether a task waits to read, and to write; and its waker, until it is woken.
    waiters: RefCell<[Option<Option<Waker>>; 2]>,
    fd: F,
}

impl<F: AsFd> Async<F> {
    /// Wraps an fd, which has to be non-blocking.
    pub fn new(runtime: &Rc<Runtime>, fd: F) -> Self {
        let (token, waiters) = Default::default();
        Self(Rc::new(Source { runtime: Rc::clone(runtime), token, waiters, fd }))
    }

    /// The fd itself.
    pub fn get_ref(&self) -> &F {
        &self.0.fd
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
        let (event_loop, waiting) = &mut *self.0.runtime.reactor.borrow_mut();
        waiting.watch(event_loop, &(Rc::clone(&self.0) as AnySource))
    }
}

impl<F: AsFd> Drop for Async<F> {
    fn drop(&mut self) {
        // No future is left that waits. It could only fail if the fd were not registered.
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
        let waker = source.waiters.borrow_mut()[side].as_mut().and_then(Option::take);
        // No task waits: level-triggered, the same event would come again and again.
        let Some(waker) = waker else { return Ok(self.watch(event_loop, &source)?) };
        // Nothing changes for epoll: typically the task waits again before the next iteration.
        self.woken.push(waker);
        Ok(())
    }

    /// Has `source` watched for exactly what is waited for. If that is nothing it is deregistered: errors
    /// cannot be masked.
    fn watch(&mut self, event_loop: &mut Loop, source: &AnySource) -> io::Result<()> {
        let [read, write] =
            source.waiters.borrow().each_ref().map(|it| matches!(it, Some(Some(_))));
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

/// The future of [`Async::readable`] and [`Async::writable`]: two states, by hand (since v13). Its errors
/// are those of epoll_ctl(2), and ResourceBusy if another task waits for the same.
pub struct Readiness<'a, F: AsFd + 'static> {
    io: &'a Async<F>,
    side: usize,
    waits: bool,
}

impl<F: AsFd> Future for Readiness<'_, F> {
    type Output = io::Result<()>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Dropped at the end, when nothing is borrowed.
        let _waker = match &mut self.io.0.waiters.borrow_mut()[self.side] {
            waiter @ Some(None) if self.waits => {
                *waiter = None;
                self.waits = false;
                return Poll::Ready(Ok(()));
            }
            Some(_) if !self.waits => return Poll::Ready(Err(io::ErrorKind::ResourceBusy.into())),
            waiter => waiter.replace(Some(cx.waker().clone())),
        };
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
            let _waker = self.io.0.waiters.borrow_mut()[self.side].take();
        }
    }
}

impl Runtime {
    /// Waits until `delay` has passed from now on; forever, if that would overflow an [`Instant`].
    pub fn sleep(self: &Rc<Self>, delay: Duration) -> Sleep {
        let (event_loop, waiting) = &mut *self.reactor.borrow_mut();
        let timer = event_loop.run_after(delay, Token::default(), |waiting: &mut Waiting, _, _| {
            // The loop runs timers in the order of their ids, so the first one is due.
            waiting.woken.extend(waiting.sleepers.pop_first().and_then(|(_, waker)| waker));
            Ok(())
        });
        let id = timer.inspect(|id| drop(waiting.sleepers.insert(*id, None))).ok();
        Sleep { runtime: Rc::clone(self), id }
    }

    /// The output of `future`, or `None` if it is not ready within `limit`. Then it is dropped.
    pub async fn timeout<F: Future>(
        self: &Rc<Self>,
        limit: Duration,
        future: F,
    ) -> Option<F::Output> {
        race(pin!(future), self.sleep(limit)).await.ok()
    }

    /// Starts a task. The future that is returned has its output, or an error if it panicked or was
    /// dropped. The task goes on without it too.
    pub fn spawn_join<F: Future<Output: 'static> + 'static>(
        &self,
        future: F,
    ) -> impl Future<Output = Result<F::Output>> + Unpin + use<F> {
        let state = Rc::new((Cell::new(None), Cell::new(Some(Waker::noop().clone()))));
        let end = JoinEnd(Rc::clone(&state));
        // Boxed, because an async block holds twice what it awaits.
        let future = Box::pin(future);
        self.spawn(async move { end.0.0.set(Some(future.await)) });
        poll_fn(move |cx| {
            if let Some(_old) = state.1.take() {
                state.1.set(Some(cx.waker().clone()));
                return Poll::Pending;
            }
            Poll::Ready(state.0.take().context("the task panicked, or was dropped"))
        })
    }

    /// The same as [`EventLoop::drain_input`]: waits until no output is unsent and nothing has arrived
    /// for 50 ms, or until `end`.
    pub async fn drain_input(self: &Rc<Self>, end: Instant) {
        self.reactor.borrow_mut().0.close_limits.at_once = usize::MAX;
        // The tasks just spawned are polled first: what they wait for counts only when it is watched.
        self.sleep(Duration::ZERO).await;
        let mut quiet = false;
        while !quiet && Instant::now() < end {
            let events = self.events.get();
            self.sleep(QUIET).await;
            quiet = self.events.get() == events && !self.reactor.borrow().0.is_writing();
        }
    }
}

/// The future of [`Runtime::sleep`] (since v13).
pub struct Sleep {
    runtime: Rc<Runtime>,
    id: Option<TimerId>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(id) = self.id else { return Poll::Pending };
        let (waker, reactor) = (cx.waker().clone(), &self.runtime.reactor);
        let old = reactor.borrow_mut().1.sleepers.get_mut(&id).map(|it| it.replace(waker));
        if old.is_some() { Poll::Pending } else { Poll::Ready(()) }
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        let Some(id) = self.id else { return };
        self.runtime.reactor.borrow_mut().0.cancel_timer(id);
        // Dropped at the end, when the loop is free.
        let _waker = self.runtime.reactor.borrow_mut().1.sleepers.remove(&id);
    }
}

/// Dropped with the task, however it ends: its output, and the joiner's waker, `None` from then on.
struct JoinEnd<T>(Rc<Join<T>>);
type Join<T> = (Cell<Option<T>>, Cell<Option<Waker>>);

impl<T> Drop for JoinEnd<T> {
    fn drop(&mut self) {
        self.0.1.take().into_iter().for_each(Waker::wake);
    }
}

impl Async<TcpStream> {
    /// The same as [`EventLoop::close_gracefully`].
    ///
    /// # Errors
    /// Any epoll_ctl(2) error. An error on the connection itself only ends that connection.
    pub fn close_gracefully(self, output: OutputBuf) -> io::Result<()> {
        let (runtime, source) = (Rc::clone(&self.0.runtime), Rc::clone(&self.0));
        drop(self);
        let none = Callbacks { read: None, write: None };
        let event_loop = &mut runtime.reactor.borrow_mut().0;
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
    runtime: Rc<Runtime>,
    has_happened: Cell<bool>,
}

impl Event {
    /// An event that has not happened.
    pub fn new(runtime: &Rc<Runtime>) -> Self {
        Self { runtime: Rc::clone(runtime), has_happened: Cell::new(false) }
    }

    /// Lets it happen, and wakes all tasks, by new wakers. A list of those that wait would cost memory.
    pub fn set(&self) {
        self.has_happened.set(true);
        self.runtime.tasks.borrow().keys().for_each(|number| self.runtime.wake(*number));
    }

    /// Waits until it has happened, in a task of the same [`Runtime`]. It keeps no waker: poll it whenever
    /// that task is polled.
    pub fn wait(&self) -> impl Future<Output = ()> + Unpin {
        poll_fn(|_| if self.has_happened.get() { Poll::Ready(()) } else { Poll::Pending })
    }
}
