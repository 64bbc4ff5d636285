//! `EventLoop`: the Reactor itself (since v03).
//!
//! It waits in one place, epoll_wait(2), for all that can happen, and calls a function for each
//! thing that did. Level-triggered: what a callback leaves undone is reported again.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tracing::trace;

/// How many events one epoll_wait brings at the most: 12 KiB of them.
const BATCH: usize = 1024;

/// Called when the fd behind the [`Token`] is ready, or its timer has run out. What C passes as
/// `void *args` is `S`, the one state that [`EventLoop::event_process`] lends out (since v03).
///
/// An error that it returns ends the loop. What goes wrong with one connection is no such error.
pub type IoCallback<S> = fn(&mut EventLoop<S>, &mut S, Token) -> io::Result<()>;

/// What to call for one fd (since v03).
pub struct Callbacks<S> {
    /// When there is something to read: bytes, the end of the stream, an error.
    pub read: Option<IoCallback<S>>,
    /// When there is room to write, or writing would fail.
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
        Ready(self.flags()).fmt(f)
    }
}

/// Names one registration, and never a later one, though that may have the same fd (since v03).
///
/// The default token names none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Token {
    /// An index into `EventLoop::slots`.
    slot: u32,
    /// The value of `Slot::generation` at the time of the registration, 1 or more.
    generation: u32,
}

impl Token {
    /// As epoll carries it for us.
    fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    fn from_u64(data: u64) -> Self {
        Self { slot: data as u32, generation: (data >> 32) as u32 }
    }
}

/// The loop's own timer fd has no slot: it goes by the token that names no registration.
const TIMER: Token = Token { slot: 0, generation: 0 };

/// Names one timer, for [`EventLoop::cancel_timer`] (since v03). In the order in which they are
/// due.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TimerId {
    due: Instant,
    number: u64,
}

/// One entry of the table that turns epoll's 64 bits into callbacks.
struct Slot<S> {
    /// Goes up whenever the slot is given out, so that an old token no longer fits.
    generation: u32,
    registration: Option<Registration<S>>,
}

struct Registration<S> {
    fd: RawFd,
    interest: Interest,
    callbacks: Callbacks<S>,
}

/// What epoll reports whatever the interest: both the reader and the writer will find out why.
const FAULT: EpollFlags = EpollFlags::EPOLLERR.union(EpollFlags::EPOLLHUP);

impl<S> Registration<S> {
    /// Who is to be called when the fd is ready to be read.
    fn reader(&self, ready: EpollFlags) -> Option<IoCallback<S>> {
        let due = self.interest.read && ready.intersects(EpollFlags::EPOLLIN | FAULT);
        self.callbacks.read.filter(|_| due)
    }

    /// Who is to be called when the fd is ready to be written.
    fn writer(&self, ready: EpollFlags) -> Option<IoCallback<S>> {
        let due = self.interest.write && ready.intersects(EpollFlags::EPOLLOUT | FAULT);
        self.callbacks.write.filter(|_| due)
    }
}

/// The Reactor: fds, what they are watched for, and what to call when it happens (since v03).
///
/// The loop owns no fd but its own: callers lend theirs, and deregister before they close.
pub struct EventLoop<S> {
    epoll: Epoll,
    slots: Vec<Slot<S>>,
    free_slots: Vec<u32>,
    timer: TimerFd,
    timers: BTreeMap<TimerId, (Token, IoCallback<S>)>,
    timers_set: u64,
    running: bool,
}

impl<S> EventLoop<S> {
    /// A loop with nothing registered.
    ///
    /// # Errors
    /// What epoll_create1(2) and timerfd_create(2) say, EMFILE as a rule.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        epoll.add(&timer, EpollEvent::new(EpollFlags::EPOLLIN, TIMER.to_u64()))?;
        Ok(Self {
            epoll,
            slots: Vec::new(),
            free_slots: Vec::new(),
            timer,
            timers: BTreeMap::new(),
            timers_set: 0,
            running: false,
        })
    }

    /// Watches `fd` for `interest` and calls `callbacks` from now on. The token is for all that
    /// comes later.
    ///
    /// # Errors
    /// What epoll_ctl(2) says: EEXIST if `fd` is registered already, EPERM for a regular file,
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

    /// Watches `fd` for `interest` instead of what it was watched for: one system call, or none if
    /// that is the same.
    ///
    /// # Errors
    /// NotFound unless the token is that of `fd` and still good; what epoll_ctl(2) says.
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
        if let Some(registration) = &mut self.slots[token.slot as usize].registration {
            registration.interest = interest;
        }
        Ok(())
    }

    /// Watches `fd` no longer. To be called before it is closed: an fd that lives on in another
    /// process, or as a duplicate, would go on to report events that nobody can stop.
    ///
    /// # Errors
    /// NotFound unless the token is that of `fd` and still good; what epoll_ctl(2) says.
    pub fn del_io_event<F: AsFd>(&mut self, fd: F, token: Token) -> io::Result<()> {
        self.registration_of(&fd, token)?;
        self.epoll.delete(&fd)?;
        trace!("epoll_ctl: delete fd {}", fd.as_fd().as_raw_fd());
        self.slots[token.slot as usize].registration = None;
        self.free_slots.push(token.slot);
        Ok(())
    }

    /// How many fds are registered.
    pub fn registered(&self) -> usize {
        self.slots.len() - self.free_slots.len()
    }

    /// Calls `callback` once, `delay` from now, with `token`, whatever became of it meanwhile.
    ///
    /// # Errors
    /// InvalidInput for a delay that ends after the end of time; what timerfd_settime(2) says. No
    /// timer is set then.
    pub fn run_after(
        &mut self,
        delay: Duration,
        token: Token,
        callback: IoCallback<S>,
    ) -> io::Result<TimerId> {
        let due = Instant::now().checked_add(delay).ok_or(io::ErrorKind::InvalidInput)?;
        let id = TimerId { due, number: self.timers_set };
        if self.timers.first_key_value().is_none_or(|(first, _)| id < *first) {
            self.set_timer_fd(id)?;
        }
        self.timers_set += 1;
        self.timers.insert(id, (token, callback));
        Ok(id)
    }

    /// Forgets a timer, if it has not run out yet.
    pub fn cancel_timer(&mut self, id: TimerId) {
        self.timers.remove(&id);
    }

    /// Waits for events and calls what is registered for them, until [`stop`](Self::stop).
    ///
    /// # Errors
    /// What a callback returns, and what epoll_wait(2) says.
    pub fn event_process(&mut self, state: &mut S) -> io::Result<()> {
        let mut events = vec![EpollEvent::empty(); BATCH];
        self.running = true;
        while self.running {
            let n = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(n) => n,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            trace!("epoll_wait: {n} ready");
            for event in &events[..n] {
                if !self.running {
                    break;
                }
                match Token::from_u64(event.data()) {
                    TIMER => self.run_timers(state)?,
                    token => self.dispatch(state, token, event.events())?,
                }
            }
        }
        Ok(())
    }

    /// Makes [`event_process`](Self::event_process) return when the current callback does. What was
    /// ready and not looked at yet will be reported again. Does nothing outside of a callback.
    pub fn stop(&mut self) {
        self.running = false;
    }

    /// [`stop`](Self::stop) as a callback. It never fails.
    pub fn stop_callback(&mut self, _: &mut S, _: Token) -> io::Result<()> {
        trace!("stop_callback");
        self.stop();
        Ok(())
    }

    fn dispatch(&mut self, state: &mut S, token: Token, ready: EpollFlags) -> io::Result<()> {
        // An earlier callback of this batch may have deregistered it.
        let Some(registration) = self.registration(token) else {
            trace!("an event for a registration that is gone");
            return Ok(());
        };
        trace!("fd {} is ready: {}", registration.fd, Ready(ready));
        let Registration { callbacks, .. } = registration;
        let (reader, writer) = (registration.reader(ready), registration.writer(ready));
        if reader.is_none() && writer.is_none() && ready.intersects(FAULT) {
            // These come unasked, and for ever: someone has to be told, or the loop spins.
            let anyone = callbacks.read.or(callbacks.write);
            return anyone.map_or(Ok(()), |callback| callback(self, state, token));
        }
        if let Some(callback) = reader {
            callback(self, state, token)?;
        }
        // The reader may have deregistered it too, or wait no longer for writing.
        let writer = self.registration(token).and_then(|registration| registration.writer(ready));
        match writer {
            Some(callback) if self.running => callback(self, state, token),
            _ => Ok(()),
        }
    }

    fn registration(&self, token: Token) -> Option<&Registration<S>> {
        let slot = self.slots.get(token.slot as usize)?;
        slot.registration.as_ref().filter(|_| slot.generation == token.generation)
    }

    fn registration_of<F: AsFd>(&self, fd: F, token: Token) -> io::Result<&Registration<S>> {
        self.registration(token)
            .filter(|registration| registration.fd == fd.as_fd().as_raw_fd())
            .ok_or(io::ErrorKind::NotFound.into())
    }

    fn run_timers(&mut self, state: &mut S) -> io::Result<()> {
        // Reads the fd, or it would stay ready. EAGAIN: it was set again meanwhile.
        match self.timer.wait() {
            Ok(()) | Err(Errno::EAGAIN) => {}
            Err(errno) => return Err(errno.into()),
        }
        let result = self.run_due_timers(state);
        // Also after an error, or those that are left would never run.
        self.set_timer()?;
        result
    }

    fn run_due_timers(&mut self, state: &mut S) -> io::Result<()> {
        let now = Instant::now();
        while let Some(timer) = self.timers.first_entry() {
            if timer.key().due > now || !self.running {
                break;
            }
            let (token, callback) = timer.remove();
            trace!("a timer has run out");
            callback(self, state, token)?;
        }
        Ok(())
    }

    /// Sets the timer fd to when the first timer is due.
    fn set_timer(&mut self) -> io::Result<()> {
        match self.timers.first_key_value() {
            Some((&first, _)) => self.set_timer_fd(first),
            None => Ok(()),
        }
    }

    fn set_timer_fd(&self, first: TimerId) -> io::Result<()> {
        // A zero would disarm it.
        let delay = first.due.saturating_duration_since(Instant::now());
        let delay = TimeSpec::from_duration(delay.max(Duration::from_nanos(1)));
        self.timer.set(Expiration::OneShot(delay), TimerSetTimeFlags::empty())?;
        Ok(())
    }
}

/// Readable names for epoll's flags.
struct Ready(EpollFlags);

impl fmt::Display for Ready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (flag, name) in [
            (EpollFlags::EPOLLIN, "IN"),
            (EpollFlags::EPOLLOUT, "OUT"),
            (EpollFlags::EPOLLERR, "ERR"),
            (EpollFlags::EPOLLHUP, "HUP"),
        ] {
            if self.0.contains(flag) {
                write!(f, "{separator}{name}")?;
                separator = "|";
            }
        }
        if separator.is_empty() { f.write_str("nothing") } else { Ok(()) }
    }
}
