//! Ctrl-C and SIGTERM as one more fd of the loop (since v03).

use std::io;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::event_loop::{Callbacks, EventLoop, Interest, Token};

/// SIGINT and SIGTERM, held back and read from an fd instead (signalfd(2)), so that they arrive
/// between two callbacks and never inside one (since v03).
pub struct StopSignals {
    held_back: SigSet,
    fd: SignalFd,
    token: Token,
}

impl StopSignals {
    /// From now on a signal stops `event_loop` and does nothing else. To be called before anything
    /// worth finishing.
    ///
    /// # Errors
    /// What signalfd(2) and epoll_ctl(2) say.
    pub fn register<S>(event_loop: &mut EventLoop<S>) -> io::Result<Self> {
        let held_back = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        held_back.thread_block()?;
        let fd = SignalFd::with_flags(&held_back, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        let callbacks = Callbacks { read: Some(EventLoop::stop_callback), write: None };
        let token = event_loop.add_io_event(&fd, Interest::READ, callbacks)?;
        Ok(Self { held_back, fd, token })
    }

    /// Takes the signals that have come and gives the next one its default effect back: whoever
    /// presses Ctrl-C a second time does not want to wait.
    ///
    /// # Errors
    /// What epoll_ctl(2) and read(2) say.
    pub fn take<S>(self, event_loop: &mut EventLoop<S>) -> io::Result<()> {
        event_loop.del_io_event(&self.fd, self.token)?;
        while self.fd.read_signal()?.is_some() {}
        self.held_back.thread_unblock()?;
        Ok(())
    }
}
