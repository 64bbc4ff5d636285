//! UDP: one datagram is one message, for the same callbacks as a connection (since v10).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc::{in_pktinfo, in6_pktinfo};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrStorage, bind,
    recvmsg, sendmsg, sendto, setsockopt,
    sockopt::{Ipv4PacketInfo, Ipv6RecvPacketInfo},
};
use tracing::{debug, info, trace, warn};

use crate::cli::Addr;
use crate::event_loop::{Callbacks, EventLoop, Interest, IoCallback, Token};
use crate::limit::REPORT;
use crate::message;
use crate::net::{self, Listener};
use crate::router::NetConnection;

/// How many datagrams are read per event, so that a flood of them cannot starve the other fds.
const DATAGRAMS_PER_EVENT: usize = 64;

/// No datagram is longer, in bytes.
const MAX_DATAGRAM: usize = 65_535;

/// A server's UDP socket (since v10).
pub struct UdpServer {
    socket: UdpSocket,
    addr: SocketAddr,
    token: Token,
    datagram: Box<[u8]>,
    /// Room for the control message with the address that a datagram was sent to, if it may be any.
    control: Option<Vec<u8>>,
    /// The reply that is being sent.
    frame: Vec<u8>,
    /// Datagrams that were not a message with a callback, since the last report.
    dropped: u64,
    /// Replies that the kernel has not taken, since the last report.
    unsent: u64,
}

/// Listens on the first of the addresses that this machine has, with TCP and with UDP (since v10).
/// Port 0 picks a number that is free for both.
///
/// # Errors
/// One line that says which of the two has failed. Typically EADDRINUSE: the port is taken.
pub fn bind_both(addr: &Addr) -> Result<(Listener, UdpServer)> {
    // Sockets whose port TCP has taken: they stay open, so that the kernel picks another.
    let mut tried = Vec::new();
    loop {
        let udp = UdpServer::bind(addr.resolved())
            .with_context(|| format!("cannot listen on {addr} over UDP"))?;
        match Listener::bind(&[udp.addr]) {
            Err(err) if err.kind() == io::ErrorKind::AddrInUse && addr.picks_port() => {
                tried.push(udp);
            }
            tcp => return Ok((tcp.with_context(|| format!("cannot listen on {addr}"))?, udp)),
        }
    }
}

impl UdpServer {
    fn bind(addrs: &[SocketAddr]) -> io::Result<Self> {
        let socket = net::bind_first(addrs, |addr| {
            let fd = net::new_socket(addr, SockType::Datagram, SockFlag::SOCK_NONBLOCK)?;
            // Bound to all addresses of the machine, a reply would leave from any of them: a client
            // that sent to another one would not accept it as the reply.
            match addr {
                SocketAddr::V4(_) => setsockopt(&fd, Ipv4PacketInfo, &is_any(addr))?,
                SocketAddr::V6(_) => setsockopt(&fd, Ipv6RecvPacketInfo, &is_any(addr))?,
            }
            bind(fd.as_raw_fd(), &SockaddrStorage::from(addr))?;
            Ok(UdpSocket::from(fd))
        })?;
        let addr = socket.local_addr()?;
        let (token, frame, dropped, unsent) = Default::default();
        let control = is_any(addr).then(|| cmsg_space!(in6_pktinfo));
        let datagram = vec![0; MAX_DATAGRAM].into();
        Ok(Self { socket, addr, token, datagram, control, frame, dropped, unsent })
    }

    /// From now on `callback` is called when datagrams have arrived.
    ///
    /// # Errors
    /// Any epoll_ctl(2) error.
    pub fn register<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        callback: IoCallback<S>,
    ) -> io::Result<()> {
        let callbacks = Callbacks { read: Some(callback), write: None };
        self.token = event_loop.add_io_event(&self.socket, Interest::READ, callbacks)?;
        Ok(())
    }

    /// Stops calling the callback.
    ///
    /// # Errors
    /// NotFound if it is not registered; any epoll_ctl(2) error.
    pub fn deregister<S>(&self, event_loop: &mut EventLoop<S>) -> io::Result<()> {
        event_loop.del_io_event(&self.socket, self.token)
    }

    /// Reads datagrams, at most 64 or one of the longest, and passes each that is exactly one message
    /// to `on_message`, which returns `None` if there is no callback for it. The others are dropped.
    /// `report` is called a second after the first loss, and has to call [`report`](Self::report).
    ///
    /// # Errors
    /// As [`EventLoop::run_after`]. An error of recvmsg(2) or of a callback does not end the loop.
    pub fn do_read<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        report: IoCallback<S>,
        mut on_message: impl FnMut(&mut dyn NetConnection, &[u8], i32) -> Option<Result<()>>,
    ) -> io::Result<()> {
        let lost = self.dropped + self.unsent;
        let mut bytes = 0;
        for _ in 0..DATAGRAMS_PER_EVENT {
            match self.receive(&mut on_message) {
                Ok(n) => bytes += n,
                Err(Errno::EAGAIN) => break,
                Err(errno) => debug!("recvmsg: {errno}"),
            }
            if bytes >= MAX_DATAGRAM {
                break;
            }
        }
        if lost == 0 && self.dropped + self.unsent > 0 {
            event_loop.run_after(REPORT, self.token, report)?;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        on_message: &mut impl FnMut(&mut dyn NetConnection, &[u8], i32) -> Option<Result<()>>,
    ) -> nix::Result<usize> {
        let mut buffers = [IoSliceMut::new(&mut self.datagram)];
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::empty());
        let received =
            recvmsg::<SockaddrStorage>(fd, &mut buffers, self.control.as_deref_mut(), flags)?;
        let n = received.bytes;
        let Some(peer) = received.address else { return Ok(n) };
        let local = received.cmsgs()?.next().map(|local| match local {
            // The reply may leave through another interface. Only link-local addresses of IPv6 are
            // tied to theirs.
            ControlMessageOwned::Ipv4PacketInfo(to) => {
                ControlMessageOwned::Ipv4PacketInfo(in_pktinfo { ipi_ifindex: 0, ..to })
            }
            ControlMessageOwned::Ipv6PacketInfo(to)
                if !Ipv6Addr::from(to.ipi6_addr.s6_addr).is_unicast_link_local() =>
            {
                ControlMessageOwned::Ipv6PacketInfo(in6_pktinfo { ipi6_ifindex: 0, ..to })
            }
            local => local,
        });
        if self.may_be_itself(&peer) {
            debug!("{peer}: dropped: answering it might never end");
            self.dropped += 1;
            return Ok(n);
        }
        trace!("datagram from {peer}: {n} bytes");
        let message = match message::decode(&self.datagram[..n]) {
            Ok(Some(message)) if message.frame_len() == n => message,
            _ => {
                debug!("{peer}: dropped: {n} bytes that are not one message");
                self.dropped += 1;
                return Ok(n);
            }
        };
        let (frame, unsent) = (&mut self.frame, &mut self.unsent);
        let mut sender = Sender { socket: &self.socket, peer, local, frame, unsent };
        match on_message(&mut sender, message.payload, message.id) {
            Some(Ok(())) => {}
            Some(Err(err)) => warn!("{peer}: {err:#}"),
            None => {
                debug!("{peer}: dropped: no callback for message id {}", message.id);
                self.dropped += 1;
            }
        }
        Ok(n)
    }

    /// Whether the sender, by a forged address, may be this socket: the server would answer itself, again
    /// and again. Bound to all addresses, it does not know its own; the port is all it can go by.
    fn may_be_itself(&self, peer: &SockaddrStorage) -> bool {
        let peer = match (peer.as_sockaddr_in(), peer.as_sockaddr_in6()) {
            (Some(peer), _) => SocketAddr::new(peer.ip().into(), peer.port()),
            (_, Some(peer)) => SocketAddr::new(peer.ip().into(), peer.port()),
            _ => return false,
        };
        peer.port() == self.addr.port() && (is_any(self.addr) || peer.ip() == self.addr.ip())
    }

    /// Logs how many datagrams and replies have been dropped since the last time.
    pub fn report(&mut self) {
        let (dropped, unsent) = (mem::take(&mut self.dropped), mem::take(&mut self.unsent));
        if dropped + unsent > 0 {
            info!("datagrams dropped: {dropped}; replies dropped: {unsent}");
        }
    }
}

/// Whether the address stands for all of this machine, in `::ffff:0.0.0.0` too.
fn is_any(addr: SocketAddr) -> bool {
    addr.ip().to_canonical().is_unspecified()
}

/// The sender of a datagram, as a callback sees it.
struct Sender<'a> {
    socket: &'a UdpSocket,
    peer: SockaddrStorage,
    /// Which address the datagram was sent to, if the server is bound to all of them.
    local: Option<ControlMessageOwned>,
    frame: &'a mut Vec<u8>,
    unsent: &'a mut u64,
}

impl NetConnection for Sender<'_> {
    fn send_message(&mut self, payload: &[u8], id: i32) -> Result<()> {
        let header = message::encode_header(id, payload.len())?;
        self.frame.clear();
        self.frame.extend_from_slice(&header);
        self.frame.extend_from_slice(payload);
        let control = match &self.local {
            Some(ControlMessageOwned::Ipv4PacketInfo(to)) => {
                Some(ControlMessage::Ipv4PacketInfo(to))
            }
            Some(ControlMessageOwned::Ipv6PacketInfo(to)) => {
                Some(ControlMessage::Ipv6PacketInfo(to))
            }
            _ => None,
        };
        let (fd, flags) = (self.socket.as_raw_fd(), MsgFlags::empty());
        // sendto(2) is cheaper than sendmsg(2), and typically enough.
        let sent = match control {
            None => sendto(fd, self.frame, &self.peer, flags),
            control => {
                let frame = [IoSlice::new(self.frame)];
                sendmsg(fd, &frame, control.as_slice(), flags, Some(&self.peer))
            }
        };
        match sent {
            Ok(_) => Ok(()),
            Err(Errno::EMSGSIZE) => {
                bail!("a reply of {} bytes does not fit a datagram", payload.len())
            }
            Err(errno) => {
                debug!("{}: reply dropped: {errno}", self.peer);
                *self.unsent += 1;
                Ok(())
            }
        }
    }

    /// There is no connection to close.
    fn close(&mut self) {}
}

/// A client that asks again until it is answered: UDP loses datagrams (since v10).
pub struct UdpClient {
    addr: Addr,
    socket: UdpSocket,
    token: Token,
    timeout: Duration,
    retry: u32,
    /// The message that is sent, and expected back.
    frame: Vec<u8>,
    answered: bool,
}

impl UdpClient {
    /// Creates a client. It waits for `timeout` after each request, and repeats one up to `retry` times.
    /// If the name has several addresses, it goes on to the next one each time.
    ///
    /// # Errors
    /// Any error of socket(2), connect(2) and epoll_ctl(2), typically ENETUNREACH.
    pub fn new(
        event_loop: &mut EventLoop<Self>,
        addr: Addr,
        timeout: Duration,
        retry: u32,
    ) -> Result<Self> {
        let (socket, token) = Self::connect(event_loop, &addr, 0)?;
        Ok(Self { addr, socket, token, timeout, retry, frame: Vec::new(), answered: false })
    }

    fn connect(
        event_loop: &mut EventLoop<Self>,
        addr: &Addr,
        attempt: usize,
    ) -> Result<(UdpSocket, Token)> {
        let peer = addr.resolved()[attempt % addr.resolved().len()];
        let any: IpAddr = match peer {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind((any, 0)).context("cannot create a socket")?;
        socket.connect(peer).with_context(|| format!("cannot connect to {peer}"))?;
        // From now on the kernel drops what other addresses send. What has come before is no reply.
        socket.set_nonblocking(true)?;
        while socket.recv(&mut [0]).is_ok() {}
        // If no server has the port, the kernel may pick it as the local one.
        ensure!(socket.local_addr()? != peer, "cannot connect to {peer}: no server has the port");
        let callbacks = Callbacks { read: Some(Self::reply_callback), write: None };
        let token = event_loop.add_io_event(&socket, Interest::READ, callbacks)?;
        Ok((socket, token))
    }

    /// Sends a message, and runs the loop until the same message comes back.
    ///
    /// # Errors
    /// The message does not fit a datagram; there was no answer; any epoll_wait(2) error.
    pub fn request(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        payload: &[u8],
        id: i32,
    ) -> Result<()> {
        for attempt in 0..=self.retry as usize {
            if attempt > 0 && self.addr.resolved().len() > 1 {
                event_loop.del_io_event(&self.socket, self.token)?;
                (self.socket, self.token) = Self::connect(event_loop, &self.addr, attempt)?;
            }
            self.send_message(payload, id)?;
            self.answered = false;
            let timer = event_loop.run_after(self.timeout, self.token, EventLoop::stop_callback)?;
            event_loop.event_process(self)?;
            event_loop.cancel_timer(timer);
            if self.answered {
                return Ok(());
            }
        }
        bail!("no reply from {}; requests sent: {}", self.addr, u64::from(self.retry) + 1)
    }

    /// Sends a message, which may get lost.
    ///
    /// # Errors
    /// The message does not fit a datagram.
    pub fn send_message(&mut self, payload: &[u8], id: i32) -> Result<()> {
        let header = message::encode_header(id, payload.len())?;
        self.frame = [&header, payload].concat();
        match self.socket.send(&self.frame) {
            Err(err) if err.raw_os_error() == Some(Errno::EMSGSIZE as i32) => {
                bail!("a payload of {} bytes does not fit a datagram", payload.len())
            }
            // Or an ICMP error about an earlier one.
            Err(err) => debug!("{}: not sent: {err}", self.addr),
            Ok(_) => trace!("sent: id {id}, {} bytes", payload.len()),
        }
        Ok(())
    }

    fn reply_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("reply_callback");
        let mut datagram = vec![0; MAX_DATAGRAM];
        for _ in 0..DATAGRAMS_PER_EVENT {
            match self.socket.recv(&mut datagram) {
                Ok(n) if datagram[..n] == self.frame => {
                    self.answered = true;
                    event_loop.stop();
                }
                Ok(n) => debug!("{}: ignored: {n} bytes that are no reply", self.addr),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
                Err(err) => debug!("{}: {err}", self.addr),
            }
        }
        Ok(())
    }
}
