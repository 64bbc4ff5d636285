//! Lingering close: ends a connection without losing replies (since v03).
//!
//! close(2) on a socket with unread input sends RST instead of FIN, and an RST destroys replies on
//! their way to the peer. So every healthy connection ends here: write what is left, send FIN, read
//! and discard until the peer closes too, and only then close.

use std::io::{self, Read};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use tracing::{debug, trace};

use crate::event_loop::{Callbacks, EventLoop, Interest, IoCallback, TimerId, Token};
use crate::reactor_buf::{OutputBuf, retry_interrupted};

/// After this long without an event, a stopping server has served everything that was in flight.
pub(crate) const QUIET: Duration = Duration::from_millis(50);

/// The limits on closing connections (since v03).
#[derive(Clone, Copy, Debug)]
pub struct CloseLimits {
    /// While output is unsent: how long the kernel may take none of it, 60 s (nginx: send_timeout).
    pub stalled: Duration,
    /// After the FIN: how long the peer may be silent, 5 s (nginx: lingering_timeout). What the
    /// kernel holds then still reaches a peer that keeps reading, because no input is unread.
    pub silent: Duration,
    /// After the FIN: how long a peer may keep sending, 30 s (nginx: lingering_time).
    pub linger: Duration,
    /// How many connections may be closing at once, 1,024; those without unsent output only half as
    /// many. Any more are dropped as soon as their sockets have taken what output they can.
    pub at_once: usize,
}

impl Default for CloseLimits {
    fn default() -> Self {
        let [stalled, silent, linger] = [60, 5, 30].map(Duration::from_secs);
        Self { stalled, silent, linger, at_once: 1024 }
    }
}

/// A connection that the loop is closing.
pub(crate) struct Closing {
    stream: TcpStream,
    output: OutputBuf,
    fin_sent: Option<Instant>,
    deadline: Instant,
    timer: Option<TimerId>,
}

impl<S> EventLoop<S> {
    /// Takes over a registered, non-blocking connection and closes it: writes `output`, sends FIN
    /// and discards input until the peer closes, within the [`CloseLimits`].
    ///
    /// # Errors
    /// Any epoll_ctl(2) error. An error on the connection itself only ends that connection.
    pub fn close_gracefully(
        &mut self,
        stream: TcpStream,
        token: Token,
        output: OutputBuf,
    ) -> io::Result<()> {
        let callback: IoCallback<S> = Self::closing_callback;
        self.set_callbacks(token, Callbacks { read: Some(callback), write: Some(callback) });
        let deadline = Instant::now() + self.close_limits.stalled;
        let closing = Closing { stream, output, fin_sent: None, deadline, timer: None };
        self.continue_closing(token, closing)
    }

    /// Called when the socket is ready, or the deadline has passed.
    fn closing_callback(_: &mut S, event_loop: &mut Self, token: Token) -> anyhow::Result<()> {
        trace!("closing_callback");
        let Some(closing) = event_loop.closing.remove(&token) else { return Ok(()) };
        Ok(event_loop.continue_closing(token, closing)?)
    }

    fn continue_closing(&mut self, token: Token, mut closing: Closing) -> io::Result<()> {
        let admitted = closing.timer.take().inspect(|timer| self.cancel_timer(*timer)).is_some();
        let at_once = self.close_limits.at_once;
        // Peers that are owed nothing more get at most half, so that the others find room.
        let room =
            |interest: Interest| if admitted || interest.write { at_once } else { at_once / 2 };
        match closing.proceed(&self.close_limits) {
            Ok(Some(interest)) if self.closing.len() < room(interest) => {
                self.set_interest(&closing.stream, token, interest)?;
                let left = closing.deadline.saturating_duration_since(Instant::now());
                closing.timer = Some(self.run_after(left, token, Self::closing_callback)?);
                self.closing.insert(token, closing);
                return Ok(());
            }
            Ok(_) => self.failed_closes += u64::from(!closing.output.is_empty()),
            Err(err) => {
                debug!("fd {}: {err}", closing.stream.as_raw_fd());
                self.failed_closes += 1;
            }
        }
        self.del_io_event(&closing.stream, token)
    }

    /// The first half of a shutdown, when the server no longer listens: serves until no output is
    /// unsent and nothing has arrived for 50 ms, or until `end`. `at_once` no longer applies.
    ///
    /// # Errors
    /// As [`poll_once`](Self::poll_once).
    pub fn drain_input(&mut self, state: &mut S, end: Instant) -> anyhow::Result<()> {
        self.close_limits.at_once = usize::MAX;
        let mut quiet_at = Instant::now() + QUIET;
        while Instant::now() < end {
            let left = quiet_at.saturating_duration_since(Instant::now());
            // Unsent output may hold back input (backpressure).
            if self.poll_once(state, Some(left))? > 0 || (left.is_zero() && self.is_writing()) {
                quiet_at = Instant::now() + QUIET;
            } else if left.is_zero() {
                // The wait was not cut short by a timer or a signal: nothing has arrived.
                break;
            }
        }
        Ok(())
    }

    /// The second half, when all connections are closing: waits for them until `end`, then drops
    /// the rest. Returns how many of those had unsent output.
    ///
    /// # Errors
    /// As [`poll_once`](Self::poll_once).
    pub fn drain_output(&mut self, state: &mut S, end: Instant) -> anyhow::Result<usize> {
        while !self.closing.is_empty() && Instant::now() < end {
            self.poll_once(state, Some(end.saturating_duration_since(Instant::now())))?;
        }
        let mut cut_off = 0;
        for (token, closing) in std::mem::take(&mut self.closing) {
            cut_off += usize::from(!closing.output.is_empty());
            self.del_io_event(&closing.stream, token)?;
        }
        Ok(cut_off)
    }
}

impl Closing {
    /// Writes output and discards input, without blocking. Returns what to wait for, or `None` at
    /// the end: both sides are done, or the deadline has passed.
    fn proceed(&mut self, limits: &CloseLimits) -> io::Result<Option<Interest>> {
        let (now, fd) = (Instant::now(), self.stream.as_raw_fd());
        if self.output.write_to(&self.stream)? > 0 {
            self.deadline = now + limits.stalled;
        }
        let mut discarded = [0; 16 * 1024];
        let received = retry_interrupted(|| (&self.stream).read(&mut discarded))?;
        received.inspect(|n| trace!("read: {n} bytes from fd {fd}, discarded"));
        let (ended, unsent) = (received == Some(0), self.output.len());
        if unsent == 0 && self.fin_sent.is_none() && !ended {
            trace!("shutdown: fd {fd}, FIN after the last byte");
            self.stream.shutdown(Shutdown::Write)?;
            self.fin_sent = Some(now);
            self.deadline = now + limits.silent;
        } else if let Some(fin_sent) = self.fin_sent.filter(|_| received.is_some()) {
            self.deadline = (now + limits.silent).min(fin_sent + limits.linger);
        }
        if now >= self.deadline {
            debug!("fd {fd}: gave up on the peer; {unsent} bytes unsent");
        }
        let done = now >= self.deadline || (ended && unsent == 0);
        Ok((!done).then_some(Interest { read: !ended, write: unsent > 0 }))
    }
}
