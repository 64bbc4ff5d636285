//! The limits on a server's clients: how many there may be, and how long they may take (since v05).

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit};
use tracing::{debug, warn};

use crate::bell::Bell;
use crate::buf_pool::BufPool;
use crate::cli;
use crate::event_loop::{Callbacks, EventLoop, Interest, IoCallback, TimerId, Token};
use crate::tcp_conn::TcpConn;

/// What a refused client reads: one message with this id and payload (since v05).
pub const FULL: (i32, &[u8]) = (-1, b"server is full");

/// How often a full server logs how many clients it has refused (since v05).
pub const REPORT: Duration = Duration::from_secs(1);

/// The fds besides those of the connections and the loops: standard input, output and error, the log,
/// the signals, the listener, the bell, one for a client to refuse; and some to spare.
const OTHER_FDS: usize = 14;

/// The options that limit a server's clients (since v05).
#[derive(clap::Args)]
pub struct Limits {
    /// How many clients are served at the same time
    #[arg(long, value_name = "N", default_value = "10000")]
    pub max_conns: NonZeroUsize,

    /// What happens to a client above that number
    #[arg(long, value_enum, default_value = "refuse")]
    pub when_full: WhenFull,

    /// The limits on time.
    #[command(flatten)]
    pub timeouts: Timeouts,
}

/// What a full server does with the next client (since v05).
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum WhenFull {
    /// Send it the message "server is full", and close the connection
    Refuse,
    /// Leave it in the backlog until another client has gone
    Wait,
}

/// The limits on the time that a client may take (since v05).
#[derive(Clone, Copy, clap::Args)]
pub struct Timeouts {
    /// Close a connection after this long without a complete message or a byte of a reply sent; 0
    /// means never
    #[arg(long, value_name = "SECONDS", default_value = "0", value_parser = cli::parse_limit)]
    pub idle_timeout: Duration,

    /// Close a connection if a message takes longer than this to arrive; 0 means never
    #[arg(long, value_name = "SECONDS", default_value = "30", value_parser = cli::parse_limit)]
    pub frame_timeout: Duration,
}

/// Which of its [`Timeouts`] a connection has exceeded (since v05).
#[derive(PartialEq, Eq)]
pub enum TimeUp {
    /// The idle timeout.
    Idle,
    /// The frame timeout.
    Frame,
}

impl Timeouts {
    /// Which timeout `conn` has exceeded, if any. An incomplete message is logged.
    pub fn check(&self, conn: &TcpConn, now: Instant) -> Option<TimeUp> {
        let exceeds = |limit: Duration, since: Instant| {
            !limit.is_zero() && now.duration_since(since) >= limit
        };
        if conn.incomplete_since().is_some_and(|since| exceeds(self.frame_timeout, since)) {
            let limit = self.frame_timeout;
            warn!("{}: closed: message incomplete after {limit:?}", conn.peer);
            return Some(TimeUp::Frame);
        }
        exceeds(self.idle_timeout, conn.last_active()).then_some(TimeUp::Idle)
    }

    /// When to check `conn` next, if a timeout applies to it: after a quarter of that timeout, but no
    /// sooner than a second from now.
    fn next_check(&self, conn: &TcpConn) -> Option<Duration> {
        let timeouts =
            [Some(self.idle_timeout), conn.incomplete_since().map(|_| self.frame_timeout)];
        let shorter = timeouts.into_iter().flatten().filter(|timeout| !timeout.is_zero()).min()?;
        Some((shorter / 4).max(Duration::from_secs(1)))
    }
}

/// The one timer that checks the [`Timeouts`] of all connections of a loop (since v05). With a timer
/// for each connection, every message would have to move one.
pub struct Sweep {
    timeouts: Timeouts,
    /// When the next check is due.
    timer: Option<(Instant, TimerId)>,
}

impl Sweep {
    /// Creates a sweep without a timer: [`watch`](Self::watch) sets it.
    pub fn new(timeouts: Timeouts) -> Self {
        Self { timeouts, timer: None }
    }

    /// Replaces the timeouts (since v09). Connections are checked in the next iteration of the loop,
    /// after their fds: a message that has arrived by now still counts.
    ///
    /// # Errors
    /// As [`EventLoop::run_after`].
    pub fn set_timeouts<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        timeouts: Timeouts,
        callback: IoCallback<S>,
    ) -> io::Result<()> {
        self.timeouts = timeouts;
        self.timer.take().inspect(|(_, timer)| event_loop.cancel_timer(*timer));
        let timer = event_loop.run_after(Duration::ZERO, Token::default(), callback)?;
        self.timer = Some((event_loop.now(), timer));
        Ok(())
    }

    /// If a timeout applies to `conn`, makes sure that `callback` is called in time to check it. Call
    /// it whenever `conn` has read or written, and after each check.
    ///
    /// # Errors
    /// As [`EventLoop::run_after`].
    pub fn watch<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        conn: &TcpConn,
        callback: IoCallback<S>,
    ) -> io::Result<()> {
        let Some(delay) = self.timeouts.next_check(conn) else { return Ok(()) };
        let due = event_loop.now() + delay;
        if self.timer.is_none_or(|(earlier, _)| due < earlier) {
            self.timer.take().inspect(|(_, timer)| event_loop.cancel_timer(*timer));
            self.timer = Some((due, event_loop.run_after(delay, Token::default(), callback)?));
        }
        Ok(())
    }

    /// The callback has been called. Returns the timeouts to [`check`](Timeouts::check).
    pub fn start(&mut self) -> Timeouts {
        self.timer = None;
        self.timeouts
    }
}

/// A limit on the number of connections (since v05).
pub struct Limit {
    places: Arc<Places>,
    when_full: WhenFull,
    /// How many loops there are, and how many connections may be closing on them.
    loops: usize,
    closing: usize,
    token: Token,
}

struct Places {
    max: AtomicUsize,
    taken: AtomicUsize,
    /// Whether `bell` is to ring when a place becomes free.
    awaited: AtomicBool,
    bell: Bell,
}

/// The right to one connection; dropping it frees the place (since v05).
///
/// However a connection ends, its permit is dropped with it: no code path can miss that.
pub struct Permit(Arc<Places>);

impl Limit {
    /// Creates a limit with all places free. Logs a warning if the limit on fds is too low for as many
    /// connections on `loops` event loops. The `callback` is called when a place becomes free after
    /// [`makes_wait`](Self::makes_wait), and has to call [`silence`](Self::silence).
    ///
    /// # Errors
    /// Any eventfd(2) or epoll_ctl(2) error, typically EMFILE.
    pub fn new<S>(
        limits: &Limits,
        loops: usize,
        event_loop: &mut EventLoop<S>,
        callback: IoCallback<S>,
    ) -> io::Result<Self> {
        let (max, taken, awaited) = Default::default();
        let places = Arc::new(Places { max, taken, awaited, bell: Bell::new()? });
        let callbacks = Callbacks { read: Some(callback), write: None };
        let token = event_loop.add_io_event(&places.bell, Interest::READ, callbacks)?;
        let closing = loops * event_loop.close_limits.at_once;
        let mut limit = Self { places, when_full: limits.when_full, loops, closing, token };
        limit.set(limits)?;
        Ok(limit)
    }

    /// Changes the limit (since v09). A lower one closes no connection; it only keeps new ones out.
    /// Logs the same warning as [`new`](Self::new).
    ///
    /// # Errors
    /// Any getrlimit(2) error; none is known.
    pub fn set(&mut self, limits: &Limits) -> io::Result<()> {
        let (max, (fds, _)) = (limits.max_conns.get(), getrlimit(Resource::RLIMIT_NOFILE)?);
        // Each loop has an epoll instance, and an eventfd or two.
        let needed = max.saturating_add(self.closing + 2 * self.loops + OTHER_FDS);
        if self.places.max.swap(max, Ordering::SeqCst) != max && needed as u64 > fds {
            let closing = self.closing;
            warn!(
                "{max} connections and {closing} closing ones need more fds than {fds} (ulimit -n)"
            );
        }
        self.when_full = limits.when_full;
        // A client that waits may have a place now, or be refused.
        self.places.ring_if_awaited();
        Ok(())
    }

    /// Takes a place if one is free. Checking and counting are one step, so threads can share it.
    pub fn try_take(&self) -> Option<Permit> {
        let Places { max, taken, .. } = &*self.places;
        let max = max.load(Ordering::SeqCst);
        let free = |n: usize| (n < max).then_some(n + 1);
        taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, free).ok()?;
        Some(Permit(Arc::clone(&self.places)))
    }

    /// Stops calling the callback.
    ///
    /// # Errors
    /// Any epoll_ctl(2) error.
    pub fn deregister<S>(&self, event_loop: &mut EventLoop<S>) -> io::Result<()> {
        event_loop.del_io_event(&self.places.bell, self.token)
    }

    /// Whether the next client has to wait: no place is free, and waiting is what was chosen. If so,
    /// the registered callback is called once a place is free.
    pub fn makes_wait(&self) -> bool {
        if self.when_full == WhenFull::Refuse || self.places.are_free() {
            return false;
        }
        self.places.awaited.store(true, Ordering::SeqCst);
        // A permit dropped in between did not ring.
        self.places.ring_if_free();
        true
    }

    /// Ends the notification, so that the callback is not called again for it.
    ///
    /// # Errors
    /// Any read(2) error; none is known.
    pub fn silence(&self) -> io::Result<()> {
        self.places.bell.silence()
    }
}

/// Refuses a client: sends it [`FULL`] and closes the connection gracefully (since v05).
///
/// # Errors
/// Any epoll_ctl(2) error. An error on the connection itself only ends that connection.
pub fn refuse<S>(
    event_loop: &mut EventLoop<S>,
    stream: TcpStream,
    peer: SocketAddr,
    pool: &BufPool,
) -> io::Result<()> {
    debug!("{peer}: refused: the server is full");
    match TcpConn::new(event_loop, stream, peer, pool, Callbacks { read: None, write: None }) {
        Ok(mut conn) => {
            // Without memory for it, the connection is closed without a word.
            let _ = conn.send_message(FULL.1, FULL.0);
            event_loop.close_gracefully(conn.stream, conn.token, conn.output)?;
        }
        Err(err) => warn!("{peer}: dropped: {err}"),
    }
    Ok(())
}

impl Places {
    fn are_free(&self) -> bool {
        self.taken.load(Ordering::SeqCst) < self.max.load(Ordering::SeqCst)
    }

    fn ring_if_free(&self) {
        if self.are_free() {
            self.ring_if_awaited();
        }
    }

    fn ring_if_awaited(&self) {
        if self.awaited.swap(false, Ordering::SeqCst) {
            self.bell.ring();
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
        self.0.ring_if_free();
    }
}
