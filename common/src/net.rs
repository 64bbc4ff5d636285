//! Listening, accepting and what its errors mean, closing without losing the reply (since v01).

use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket,
    sockopt::ReuseAddr,
};
use tracing::{debug, info, warn};

/// How many clients the kernel keeps waiting for `accept`.
///
/// std's own 128 is too short for a burst. The kernel cuts this to /proc/sys/net/core/somaxconn
/// (4096 by default), and nix takes no more.
const BACKLOG: i32 = 4096;

/// How long to wait before the next try when `accept` cannot get an fd or memory.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A listening socket that knows what the errors of `accept` mean (since v01).
pub struct Listener {
    socket: TcpListener,
    /// Inside a shortage, which is logged once and not per attempt.
    short: bool,
}

/// What [`Listener::accept`] found.
pub enum Accepted {
    /// The next client and its address.
    Client(TcpStream, SocketAddr),
    /// Nobody waits. Only a non-blocking listener says so.
    Nobody,
    /// No fd or no memory to be had: try again after [`ACCEPT_PAUSE`]. Those who wait stay in the
    /// queue.
    Shortage,
}

impl Listener {
    /// Listens on the first of `addrs` that this machine has, and says so at info level. The
    /// socket is a blocking one.
    ///
    /// # Errors
    /// EADDRINUSE; EADDRNOTAVAIL for the last address; what else socket(2), bind(2) and listen(2)
    /// say.
    pub fn bind(addrs: &[SocketAddr]) -> io::Result<Self> {
        let mut result = Err(Errno::EINVAL);
        for addr in addrs {
            result = listen_on(*addr);
            // Who finds its port in use wants to know, and not to listen elsewhere.
            if !matches!(result, Err(Errno::EADDRNOTAVAIL | Errno::EAFNOSUPPORT)) {
                break;
            }
        }
        let socket = result?;
        info!("listening on {}", socket.local_addr()?);
        Ok(Self { socket, short: false })
    }

    /// Makes [`accept`](Self::accept) return [`Accepted::Nobody`] instead of waiting (since v03).
    ///
    /// # Errors
    /// What ioctl(2) says.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.socket.set_nonblocking(true)
    }

    /// Takes the next client out of the queue, in blocking mode waiting for it.
    pub fn accept(&mut self) -> Accepted {
        loop {
            match self.socket.accept() {
                Ok((stream, peer)) => return Accepted::Client(stream, peer),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    self.shortage_is_over();
                    return Accepted::Nobody;
                }
                Err(err) if concerns_one_client(&err) => debug!("accept: {err}"),
                // EMFILE, ENFILE, ENOBUFS, ENOMEM, and whatever else: no error of accept is worth
                // dying for while there are clients to serve.
                Err(err) => {
                    if !self.short {
                        let pause = ACCEPT_PAUSE.as_millis();
                        warn!("cannot accept: {err}; trying again every {pause} ms");
                        self.short = true;
                    }
                    return Accepted::Shortage;
                }
            }
        }
    }

    /// Waits for the next client, however long that takes: for a blocking listener.
    pub fn accept_blocking(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            match self.accept() {
                Accepted::Client(stream, peer) => {
                    self.shortage_is_over();
                    return (stream, peer);
                }
                // A blocking listener never finds nobody.
                Accepted::Nobody | Accepted::Shortage => thread::sleep(ACCEPT_PAUSE),
            }
        }
    }

    /// Refuses all further clients, those in the queue too, and frees the port (since v03).
    ///
    /// # Errors
    /// What shutdown(2) says.
    pub fn stop(&self) -> io::Result<()> {
        // Linux takes a listening socket that is shut down for reading out of the LISTEN state.
        nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Read)?;
        Ok(())
    }

    fn shortage_is_over(&mut self) {
        if self.short {
            info!("accepting again");
            self.short = false;
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn listen_on(addr: SocketAddr) -> nix::Result<TcpListener> {
    let fd = tcp_socket(addr, SockFlag::empty())?;
    // Without it the port could not be bound again while connections of an earlier server are in
    // TIME_WAIT.
    setsockopt(&fd, ReuseAddr, &true)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(addr))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(fd))
}

/// Starts to connect to `addr` without waiting for it (since v04).
///
/// How it went is known when the socket becomes writable: `TcpStream::take_error` (SO_ERROR) then
/// says `None` or why it failed.
///
/// # Errors
/// What socket(2) says, and what connect(2) can say at once, ENETUNREACH for example.
pub fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let fd = tcp_socket(addr, SockFlag::SOCK_NONBLOCK)?;
    match nix::sys::socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)) {
        // EINTR: the attempt goes on all the same.
        Ok(()) | Err(Errno::EINPROGRESS | Errno::EINTR) => Ok(TcpStream::from(fd)),
        Err(errno) => Err(errno.into()),
    }
}

fn tcp_socket(addr: SocketAddr, flags: SockFlag) -> nix::Result<OwnedFd> {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC | flags, None)
}

/// The client that gave up while it waited (ECONNABORTED), and the errors of its network, which
/// Linux hands on through `accept` (accept(2), "Error handling"): that client is out of the queue,
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

/// Closes a blocking `stream` so that what was written to it still arrives, in `limit` at the most
/// (since v01).
///
/// close(2) on a socket with unread input sends RST instead of FIN, and an RST lets the peer's
/// kernel throw away what it has not handed on yet. So: say FIN first, read what comes until the
/// peer closes too, and only then close.
///
/// # Errors
/// Those of the peer: it may have reset the connection.
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

/// Raises the soft limit on open fds to the hard one (since v03).
///
/// Most shells hand out a soft limit of 1,024, for the sake of old programs that use select(2).
pub fn raise_fd_limit() {
    let result = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        debug!("raising the limit on fds from {soft} to {hard}");
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    });
    if let Err(errno) = result {
        warn!("cannot raise the limit on fds: {errno}");
    }
}
