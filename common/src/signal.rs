//! Stop signals: Ctrl-C, SIGTERM and a closed terminal, as one more fd of the loop (since v03).

use std::fs;
use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::event_loop::{Callbacks, EventLoop, Interest, Token};

/// SIGINT, SIGTERM and SIGHUP, blocked and read from an fd instead (signalfd(2)), so that they
/// arrive between two callbacks and never inside one (since v03).
pub struct StopSignals {
    blocked: SigSet,
    fd: SignalFd,
    token: Token,
}

impl StopSignals {
    /// From now on these signals stop `event_loop` and have no other effect. Call it before there
    /// is work to finish, and before starting threads, which inherit the mask.
    ///
    /// # Errors
    /// Any signalfd(2) or epoll_ctl(2) error, typically EMFILE.
    pub fn register<S>(event_loop: &mut EventLoop<S>) -> io::Result<Self> {
        Self::with_reload(event_loop, false)
    }

    /// Like [`register`](Self::register), for a server in which SIGHUP may mean something else: see
    /// [`are_hangups`](Self::are_hangups) (since v09).
    ///
    /// # Errors
    /// As [`register`](Self::register).
    pub fn with_reload<S>(event_loop: &mut EventLoop<S>, reload: bool) -> io::Result<Self> {
        let mut blocked = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        // Ignored under nohup(1), but signalfd(2) would report it anyway.
        if reload || !is_ignored(Signal::SIGHUP) {
            blocked.add(Signal::SIGHUP);
        }
        blocked.thread_block()?;
        let fd = SignalFd::with_flags(&blocked, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let callbacks = Callbacks { read: Some(EventLoop::stop_callback), write: None };
        let token = event_loop.add_io_event(&fd, Interest::READ, callbacks)?;
        Ok(Self { blocked, fd, token })
    }

    /// Takes the signals that have stopped the loop. Returns whether there was SIGHUP and no other;
    /// false if there was none at all (since v09).
    ///
    /// # Errors
    /// Any read(2) error; none is known.
    pub fn are_hangups(&mut self) -> io::Result<bool> {
        let mut signals = Vec::new();
        while let Some(signal) = self.fd.read_signal()? {
            signals.push(signal.ssi_signo);
        }
        let is_hangup = |signal: &u32| *signal == Signal::SIGHUP as u32;
        Ok(!signals.is_empty() && signals.iter().all(is_hangup))
    }

    /// Discards pending signals and restores their default effect, so that a second Ctrl-C ends the
    /// process at once. SIGHUP stays blocked: when a terminal is closed, first the shell sends it
    /// and then the kernel.
    ///
    /// # Errors
    /// Any epoll_ctl(2) or read(2) error; none is known.
    pub fn restore_default<S>(mut self, event_loop: &mut EventLoop<S>) -> io::Result<()> {
        event_loop.del_io_event(&self.fd, self.token)?;
        while self.fd.read_signal()?.is_some() {}
        self.blocked.remove(Signal::SIGHUP);
        self.blocked.thread_unblock()?;
        Ok(())
    }
}

/// Reads `SigIgn` in proc_pid_status(5), because sigaction(2) needs `unsafe`. False without /proc.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal as i32 - 1) & 1 == 1
}
