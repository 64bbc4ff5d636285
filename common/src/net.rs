//! Sockets: listens, accepts, connects, and closes without losing a reply (since v01).

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt::{KeepAlive, ReuseAddr, TcpKeepCount, TcpKeepIdle, TcpKeepInterval},
};
use tracing::{debug, info, warn};

/// The backlog: how many pending connections the kernel queues for `accept`.
///
/// std's own 128 are too few for a burst. The kernel caps this at /proc/sys/net/core/somaxconn
/// (4096 by default), and nix accepts no more.
pub const BACKLOG: i32 = 4096;

/// Keep-alive: after this many seconds without a byte from the peer the kernel sends a probe.
const KEEP_IDLE: u32 = 60;

/// Keep-alive: it waits this many seconds for an answer before it sends another probe.
const KEEP_INTERVAL: u32 = 20;

/// Keep-alive: after this many unanswered probes the connection fails with ETIMEDOUT.
const KEEP_PROBES: u32 = 3;

/// How long to wait after [`Accepted::Exhausted`] before the next try: 100 ms (since v01).
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket that knows which errors of `accept` matter (since v01).
///
/// Its connections have keep-alive set: one whose peer has vanished (a cut link, a power failure)
/// ends within two minutes. With unacknowledged output there are no probes: it then lasts until the
/// kernel gives up retransmitting, typically after a quarter of an hour (tcp_retries2 in tcp(7)).
///
/// Dropping it closes it, which resets the connections in its backlog and frees the port.
pub struct Listener {
    socket: TcpListener,
    /// Set while out of fds or memory, to log that once and not on every attempt.
    exhausted: bool,
}

/// The outcome of [`Listener::accept`] (since v01).
pub enum Accepted {
    /// The next client and its address.
    Client(TcpStream, SocketAddr),
    /// Out of fds or memory (fd exhaustion): try again after [`ACCEPT_PAUSE`]. Pending connections
    /// stay in the backlog.
    Exhausted,
    /// No pending connection. Only a non-blocking listener returns this (since v03).
    WouldBlock,
}

impl Listener {
    /// Listens on the first of `addrs` that this machine has, and logs it at info level
    /// (since v01). The socket is blocking, its backlog 4,096.
    ///
    /// # Errors
    /// EADDRINUSE if the port is taken, EADDRNOTAVAIL if the machine has none of the addresses,
    /// EINVAL if there are none; any other error of socket(2), bind(2) and listen(2).
    pub fn bind(addrs: &[SocketAddr]) -> io::Result<Self> {
        let socket = bind_first(addrs, listen_on)?;
        info!("listening on {}", socket.local_addr()?);
        Ok(Self { socket, exhausted: false })
    }

    /// Makes [`accept`](Self::accept) return [`Accepted::WouldBlock`] instead of waiting
    /// (since v03).
    ///
    /// # Errors
    /// Any ioctl(2) error; none is known.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)
    }

    /// Takes the next client out of the backlog, waiting for one if it is empty (since v01).
    ///
    /// If an error concerns one client only, it is logged at debug level and the next one is tried.
    pub fn accept(&mut self) -> Accepted {
        loop {
            match self.socket.accept() {
                Ok((stream, peer)) => return Accepted::Client(stream, peer),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    self.exhaustion_is_over();
                    return Accepted::WouldBlock;
                }
                Err(err) if concerns_one_client(&err) => debug!("accept: {err}"),
                // EMFILE, ENFILE, ENOBUFS, ENOMEM or any other: no accept error is a reason to exit
                // while there are clients to serve.
                Err(err) => {
                    if !self.exhausted {
                        let pause = ACCEPT_PAUSE.as_millis();
                        warn!("cannot accept: {err}; trying again every {pause} ms");
                        self.exhausted = true;
                    }
                    return Accepted::Exhausted;
                }
            }
        }
    }

    /// Waits for the next client as long as it takes, even through fd exhaustion (since v01).
    pub fn accept_blocking(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.accept() {
                Accepted::Client(stream, peer) => {
                    self.exhaustion_is_over();
                    return (stream, peer);
                }
                // A blocking listener never returns WouldBlock.
                Accepted::Exhausted | Accepted::WouldBlock => thread::sleep(ACCEPT_PAUSE),
            }
        }
    }

    fn exhaustion_is_over(&mut self) {
        if self.exhausted {
            info!("accepting again");
            self.exhausted = false;
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Binds to the first of `addrs` that this machine has.
pub(crate) fn bind_first<T>(
    addrs: &[SocketAddr],
    bind: impl Fn(SocketAddr) -> io::Result<T>,
) -> io::Result<T> {
    let mut result = Err(Errno::EINVAL.into());
    for addr in addrs {
        result = bind(*addr);
        let code = result.as_ref().err().and_then(io::Error::raw_os_error);
        // A port in use is a mistake to report, not a reason to listen elsewhere.
        let errno = code.map(Errno::from_raw);
        if !matches!(errno, Some(Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT)) {
            break;
        }
    }
    result
}

fn listen_on(addr: SocketAddr) -> io::Result<TcpListener> {
    let fd = new_socket(addr, SockType::Stream, SockFlag::empty())?;
    // Without this, bind fails while connections of an earlier server are in TIME_WAIT.
    setsockopt(&fd, ReuseAddr, &true)?;
    // Accepted sockets inherit these.
    setsockopt(&fd, KeepAlive, &true)?;
    setsockopt(&fd, TcpKeepIdle, &KEEP_IDLE)?;
    setsockopt(&fd, TcpKeepInterval, &KEEP_INTERVAL)?;
    setsockopt(&fd, TcpKeepCount, &KEEP_PROBES)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(addr))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(fd))
}

/// Starts connecting to `addr`, without waiting for the outcome (since v04).
///
/// The attempt is over when the socket becomes writable: [`connect_result`] returns its outcome.
///
/// # Errors
/// Any socket(2) error, and any connect(2) error that is known at once, typically ENETUNREACH.
pub fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let fd = new_socket(addr, SockType::Stream, SockFlag::SOCK_NONBLOCK)?;
    match nix::sys::socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)) {
        // EINTR: the attempt continues in the kernel.
        Ok(()) | Err(Errno::EINPROGRESS | Errno::EINTR) => Ok(TcpStream::from(fd)),
        Err(errno) => Err(errno.into()),
    }
}

/// The outcome of the attempt that [`connect`] started (since v04). Call it when `stream` becomes
/// writable.
///
/// # Errors
/// Why the attempt failed (SO_ERROR), typically ECONNREFUSED or ETIMEDOUT.
pub fn connect_result(stream: &TcpStream) -> io::Result<()> {
    if let Some(err) = stream.take_error()? {
        return Err(err);
    }
    // If nothing listens on a port and the kernel picks it as the local port too, TCP connects the
    // socket to itself (simultaneous open): there is no server.
    if stream.local_addr()? == stream.peer_addr()? {
        return Err(Errno::ECONNREFUSED.into());
    }
    Ok(())
}

/// A socket of the address family of `addr`, which is not bound yet.
pub(crate) fn new_socket(
    addr: SocketAddr,
    kind: SockType,
    flags: SockFlag,
) -> nix::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, kind, SockFlag::SOCK_CLOEXEC | flags, None)
}

/// True if a client gave up while it was pending (ECONNABORTED), or its network failed, which Linux
/// reports through `accept` (accept(2), "Error handling"). That client has left the backlog, and
/// the next one may be fine.
fn concerns_one_client(err: &io::Error) -> bool {
    let Some(code) = err.raw_os_error() else { return false };
    matches!(
        Errno::from_raw(code),
        Errno::EINTR
            | Errno::ECONNABORTED
            | Errno::ENETDOWN
            | Errno::EPROTO
            | Errno::ENOPROTOOPT
            | Errno::EHOSTDOWN
            | Errno::ENONET
            | Errno::EHOSTUNREACH
            | Errno::EOPNOTSUPP
            | Errno::ENETUNREACH
    )
}

/// Closes a blocking `stream` so that everything written to it still arrives: a lingering close of
/// at most `limit` (since v01).
///
/// close(2) on a socket with unread input sends RST instead of FIN, and an RST destroys what is
/// still in flight to the peer. So send FIN first, read and discard until the peer closes too, and
/// only then close.
///
/// # Errors
/// Any shutdown(2) or recv(2) error, typically ENOTCONN or ECONNRESET, after a reset by the peer.
pub fn close_gracefully(mut stream: TcpStream, limit: Duration) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let start = Instant::now();
    let mut discarded = [0; 4096];
    loop {
        let left = limit.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Ok(());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut discarded) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

/// Raises the soft limit on open fds to the hard one; a failure is logged (since v03).
///
/// Most shells set a soft limit of 1,024, for old programs that use select(2).
pub fn raise_fd_limit() {
    let result = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        debug!("raising the limit on fds from {soft} to {hard}");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    });
    if let Err(errno) = result {
        warn!("cannot raise the limit on fds: {errno}");
    }
}
