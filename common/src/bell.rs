//! A bell: how other threads wake a loop that sleeps in epoll_wait (since v05).
//!
//! It is an eventfd(2), a counter in the kernel: readable once something was added, and zero again after a
//! read. So the loop waits for it where it waits for everything else.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

/// A bell that any thread can ring (since v05). Register it with a loop for reading.
pub struct Bell(EventFd);

impl Bell {
    /// Creates a silent bell.
    ///
    /// # Errors
    /// Any eventfd(2) error, typically EMFILE.
    pub fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?))
    }

    /// Makes the bell readable, until it is silenced. Rings in between are one.
    pub fn ring(&self) {
        // It could only fail after 2^64 - 2 rings, and it is readable then.
        let _ = self.0.write(1);
    }

    /// Makes the bell no longer readable. Look for what was rung for after that, not before.
    ///
    /// # Errors
    /// Any read(2) error; none is known.
    pub fn silence(&self) -> io::Result<()> {
        match self.0.read() {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
