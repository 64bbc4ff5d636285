//! The Reactor: an event loop that waits for events and dispatches them to callbacks (since v03).
//!
//! It waits for everything in one place, epoll_wait(2). Events are level-triggered: what a callback
//! leaves undone is reported again.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tracing::trace;

use crate::closing::{CloseLimits, Closing};

/// The maximum number of events per epoll_wait(2), 12 KiB of them.
const BATCH: usize = 1024;

/// Called when the fd behind the [`Token`] is ready, or its timer is due (since v03). `S` is the
/// state that [`EventLoop::event_process`] lends to each callback; C would pass a `void *args`.
///
/// A method of `S` can be a callback. An error ends the loop: handle a connection's errors inside.
pub type IoCallback<S> = fn(&mut S, &mut EventLoop<S>, Token) -> anyhow::Result<()>;

/// The callbacks of one fd (since v03).
pub struct Callbacks<S> {
    /// Called when there is something to read: bytes, the end of the stream, an error.
    pub read: Option<IoCallback<S>>,
    /// Called when there is room to write, or writing would fail.
    pub write: Option<IoCallback<S>>,
}

/// What one fd is watched for (since v03).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// EPOLLIN.
    pub read: bool,
    /// EPOLLOUT.
    pub write: bool,
}

impl Interest {
    /// Nothing but errors, which cannot be masked.
    pub const NONE: Self = Self { read: false, write: false };
    /// Only reading.
    pub const READ: Self = Self { read: true, write: false };
    /// Only writing.
    pub const WRITE: Self = Self { read: false, write: true };

    fn flags(self) -> EpollFlags {
        let mut flags = EpollFlags::empty();
        flags.set(EpollFlags::EPOLLIN, self.read);
        flags.set(EpollFlags::EPOLLOUT, self.write);
        flags
    }
}

impl fmt::Display for Interest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&names(self.flags()))
    }
}

/// Identifies one registration, and never a later one of the same fd number (since v03).
///
/// The default token identifies none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Token {
    /// An index into `EventLoop::slots`.
    slot: u32,
    /// The value of `Slot::generation` at the time of the registration, 1 or more.
    generation: u32,
}

impl Token {
    /// The 64 bits that epoll stores with an fd and returns with its events.
    fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    fn from_u64(data: u64) -> Self {
        Self { slot: data as u32, generation: (data >> 32) as u32 }
    }
}

/// Identifies a timer, for [`EventLoop::cancel_timer`]; ordered by due time (since v03).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimerId {
    due: Instant,
    number: u64,
}

/// One entry of the table that turns epoll's 64 bits into callbacks.
struct Slot<S> {
    /// Incremented by each registration, so that a stale token no longer matches.
    generation: u32,
    registration: Option<Registration<S>>,
}

struct Registration<S> {
    fd: RawFd,
    interest: Interest,
    callbacks: Callbacks<S>,
}

/// Reported regardless of the interest; the next read or write shows what happened.
const FAULT: EpollFlags = EpollFlags::EPOLLERR.union(EpollFlags::EPOLLHUP);

impl<S> Registration<S> {
    /// The read callback, if `ready` makes it due.
    fn reader(&self, ready: EpollFlags) -> Option<IoCallback<S>> {
        let due = self.interest.read && ready.intersects(EpollFlags::EPOLLIN | FAULT);
        self.callbacks.read.filter(|_| due)
    }

    /// The write callback, if `ready` makes it due.
    fn writer(&self, ready: EpollFlags) -> Option<IoCallback<S>> {
        let due = self.interest.write && ready.intersects(EpollFlags::EPOLLOUT | FAULT);
        self.callbacks.write.filter(|_| due)
    }
}

/// The Reactor: which fds are watched, for what, and what to call when they are ready (since v03).
///
/// The caller keeps its fds, and deregisters each one before closing it.
pub struct EventLoop<S> {
    epoll: Epoll,
    events: Vec<EpollEvent>,
    slots: Vec<Slot<S>>,
    free_slots: Vec<u32>,
    timers: BTreeMap<TimerId, (Token, IoCallback<S>)>,
    next_timer: u64,
    now: Instant,
    running: bool,
    pub(crate) closing: HashMap<Token, Closing>,
    /// How many connections have failed, or lost output, while they were closing (since v06).
    pub failed_closes: u64,
    /// The limits for [`close_gracefully`](Self::close_gracefully).
    pub close_limits: CloseLimits,
}

impl<S> EventLoop<S> {
    /// Creates a loop with nothing registered.
    ///
    /// # Errors
    /// Any epoll_create1(2) error, typically EMFILE.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            events: vec![EpollEvent::empty(); BATCH],
            slots: Vec::new(),
            free_slots: Vec::new(),
            timers: BTreeMap::new(),
            next_timer: 0,
            now: Instant::now(),
            running: false,
            closing: HashMap::new(),
            failed_closes: 0,
            close_limits: CloseLimits::default(),
        })
    }

    /// Registers `fd`: watches it for `interest`, and calls `callbacks` when it is ready.
    ///
    /// # Errors
    /// Any epoll_ctl(2) error: EEXIST if `fd` is registered already, EPERM for a regular file,
    /// ENOMEM or ENOSPC. Nothing is registered then.
    pub fn add_io_event<F: AsFd>(
        &mut self,
        fd: F,
        interest: Interest,
        callbacks: Callbacks<S>,
    ) -> io::Result<Token> {
        if self.free_slots.is_empty() {
            let slot = u32::try_from(self.slots.len()).map_err(io::Error::other)?;
            self.slots.push(Slot { generation: 0, registration: None });
            self.free_slots.push(slot);
        }
        let slot = self.free_slots[self.free_slots.len() - 1];
        let generation = self.slots[slot as usize].generation.wrapping_add(1).max(1);
        let token = Token { slot, generation };
        self.epoll.add(&fd, EpollEvent::new(interest.flags(), token.to_u64()))?;

        let fd = fd.as_fd().as_raw_fd();
        trace!("epoll_ctl: add fd {fd}, {interest}");
        self.free_slots.pop();
        let registration = Some(Registration { fd, interest, callbacks });
        self.slots[slot as usize] = Slot { generation, registration };
        Ok(token)
    }

    /// Changes what `fd` is watched for: one system call, or none if nothing changes.
    ///
    /// # Errors
    /// NotFound if `token` is stale or belongs to another fd; any epoll_ctl(2) error.
    pub fn set_interest<F: AsFd>(
        &mut self,
        fd: F,
        token: Token,
        interest: Interest,
    ) -> io::Result<()> {
        let old = self.registration_of(&fd, token)?.interest;
        if interest == old {
            return Ok(());
        }
        self.epoll.modify(&fd, &mut EpollEvent::new(interest.flags(), token.to_u64()))?;
        trace!("epoll_ctl: fd {}, {old} -> {interest}", fd.as_fd().as_raw_fd());
        self.registration_of(&fd, token)?.interest = interest;
        Ok(())
    }

    /// Replaces the callbacks of a registration, unless `token` is stale. No system call.
    pub fn set_callbacks(&mut self, token: Token, callbacks: Callbacks<S>) {
        if let Some(registration) = self.registration(token) {
            registration.callbacks = callbacks;
        }
    }

    /// Stops watching `fd`. Call it before closing `fd`: if a duplicate is left, say in another
    /// process, epoll would keep reporting its events, and nothing could stop that.
    ///
    /// # Errors
    /// NotFound if `token` is stale or belongs to another fd; any epoll_ctl(2) error.
    pub fn del_io_event<F: AsFd>(&mut self, fd: F, token: Token) -> io::Result<()> {
        self.registration_of(&fd, token)?;
        self.epoll.delete(&fd)?;
        trace!("epoll_ctl: delete fd {}", fd.as_fd().as_raw_fd());
        self.slots[token.slot as usize].registration = None;
        self.free_slots.push(token.slot);
        Ok(())
    }

    /// When this iteration began: the clock is read once for all its events (since v05).
    pub fn now(&self) -> Instant {
        self.now
    }

    /// How many fds are registered.
    pub fn registered(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Whether any fd is watched for writing.
    pub(crate) fn is_writing(&self) -> bool {
        self.slots.iter().flat_map(|slot| &slot.registration).any(|it| it.interest.write)
    }

    /// Calls `callback` with `token` once, `delay` from now, even if the token is stale by then.
    ///
    /// # Errors
    /// InvalidInput if `delay` would overflow an [`Instant`]. No timer is set then.
    pub fn run_after(
        &mut self,
        delay: Duration,
        token: Token,
        callback: IoCallback<S>,
    ) -> io::Result<TimerId> {
        let due = Instant::now().checked_add(delay).ok_or(io::ErrorKind::InvalidInput)?;
        let id = TimerId { due, number: self.next_timer };
        self.next_timer += 1;
        self.timers.insert(id, (token, callback));
        Ok(id)
    }

    /// Removes a timer, if it has not run yet.
    pub fn cancel_timer(&mut self, id: TimerId) {
        self.timers.remove(&id);
    }

    /// Waits for events and dispatches them to their callbacks, until [`stop`](Self::stop).
    ///
    /// # Errors
    /// Any error of a callback or of epoll_wait(2).
    pub fn event_process(&mut self, state: &mut S) -> anyhow::Result<()> {
        self.running = true;
        while self.running {
            self.poll_once(state, None)?;
        }
        Ok(())
    }

    /// One iteration of the loop: waits for events, for at most `limit`, then calls their callbacks
    /// and those of the timers that are due. Returns the number of events.
    ///
    /// # Errors
    /// Any error of a callback or of epoll_wait(2). Events not handled yet are reported again.
    pub fn poll_once(&mut self, state: &mut S, limit: Option<Duration>) -> anyhow::Result<usize> {
        let timeout = self.timeout(limit);
        self.running = true;
        let n = match self.epoll.wait(&mut self.events, timeout) {
            // No timers yet: after a SIGSTOP they may all be overdue, and fds come first.
            Err(Errno::EINTR) => return Ok(0),
            result => result?,
        };
        self.now = Instant::now();
        trace!("epoll_wait: {n} ready");
        for i in 0..n {
            let event = self.events[i];
            self.dispatch(state, Token::from_u64(event.data()), event.events())?;
            if !self.running {
                return Ok(n);
            }
        }
        self.run_timers(state)?;
        Ok(n)
    }

    /// Whether the last iteration was not ended by [`stop`](Self::stop) (since v13).
    pub fn is_running(&self) -> bool {
        self.running
    }

    /// For callbacks: when the callback returns, this iteration and
    /// [`event_process`](Self::event_process) end. Events not handled yet are reported again.
    pub fn stop(&mut self) {
        self.running = false;
    }

    /// For timers: calls the write callback that is registered with `token`, if there is one
    /// (since v11).
    ///
    /// # Errors
    /// Any error of that callback.
    pub fn write_callback(
        state: &mut S,
        event_loop: &mut Self,
        token: Token,
    ) -> anyhow::Result<()> {
        let callback = event_loop.registration(token).and_then(|it| it.callbacks.write);
        callback.map_or(Ok(()), |callback| callback(state, event_loop, token))
    }

    /// [`stop`](Self::stop) as a callback. It never fails.
    pub fn stop_callback(_: &mut S, event_loop: &mut Self, _: Token) -> anyhow::Result<()> {
        trace!("stop_callback");
        event_loop.stop();
        Ok(())
    }

    fn dispatch(&mut self, state: &mut S, token: Token, ready: EpollFlags) -> anyhow::Result<()> {
        // An earlier callback of this batch may have deregistered the fd.
        let Some(registration) = self.registration(token) else {
            trace!("stale event: its registration is gone");
            return Ok(());
        };
        trace!("fd {} is ready: {}", registration.fd, names(ready));
        let reader = registration.reader(ready);
        if reader.or(registration.writer(ready)).is_none() && ready.intersects(FAULT) {
            // These cannot be masked: unless a callback acts on them, the loop spins.
            let any = registration.callbacks.read.or(registration.callbacks.write);
            return any.map_or(Ok(()), |callback| callback(state, self, token));
        }
        if let Some(callback) = reader {
            callback(state, self, token)?;
        }
        // The reader may have deregistered the fd, or dropped the interest in writing.
        let writer = self.registration(token).and_then(|registration| registration.writer(ready));
        writer.filter(|_| self.running).map_or(Ok(()), |callback| callback(state, self, token))
    }

    fn registration(&mut self, token: Token) -> Option<&mut Registration<S>> {
        let slot = self.slots.get_mut(token.slot as usize)?;
        slot.registration.as_mut().filter(|_| slot.generation == token.generation)
    }

    fn registration_of(&mut self, fd: impl AsFd, token: Token) -> io::Result<&mut Registration<S>> {
        self.registration(token)
            .filter(|registration| registration.fd == fd.as_fd().as_raw_fd())
            .ok_or(io::ErrorKind::NotFound.into())
    }

    /// The time until the first timer is due, at most `limit`. Without either there is no timeout.
    fn timeout(&self, limit: Option<Duration>) -> EpollTimeout {
        let first = self.timers.keys().next();
        let until = first.map(|timer| timer.due.saturating_duration_since(Instant::now()));
        let Some(wait) = until.into_iter().chain(limit).min() else { return EpollTimeout::NONE };
        // Rounded up to milliseconds: if it woke up early, the loop would spin until then.
        let wait = wait.saturating_add(Duration::from_nanos(999_999));
        EpollTimeout::try_from(wait).unwrap_or(EpollTimeout::MAX)
    }

    fn run_timers(&mut self, state: &mut S) -> anyhow::Result<()> {
        // Timers set in this iteration run in the next one: fds come first.
        while let Some(timer) = self.timers.first_entry() {
            if timer.key().due > self.now || !self.running {
                break;
            }
            let (token, callback) = timer.remove();
            trace!("a timer is due");
            callback(state, self, token)?;
        }
        Ok(())
    }
}

fn names(flags: EpollFlags) -> String {
    let names: Vec<_> = flags.iter_names().map(|(name, _)| &name["EPOLL".len()..]).collect();
    if names.is_empty() { "nothing".to_owned() } else { names.join("|") }
}
