//! The server: accepts clients, hands them over to the workers, and answers datagrams itself.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use common::buf_pool::BufPool;
use common::cli::Addr;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::limit::{Limit, Limits, REPORT, refuse};
use common::mailbox::{Inbox, mailbox};
use common::net::{self, Accepted, Listener};
use common::task::NewConn;
use common::udp::{self, UdpServer};
use tracing::{debug, info, trace};

use crate::Session;
use crate::conns::Service;
use crate::worker::Workers;

/// The limit on all buffers together, in bytes. The workers share it equally, but for [`ACCEPTOR_CAP`]. A
/// connection that would exceed its worker's share is dropped.
const POOL_CAP: usize = 1 << 30;

/// The share of the accepting loop, in bytes: a block for each refused client that may be closing.
const ACCEPTOR_CAP: usize = 1024 * 4096;

/// The maximum number of accepts per event, so that a burst cannot starve the other fds.
const ACCEPTS_PER_EVENT: usize = 64;

/// How long a shutdown may take to serve what has arrived.
pub const GRACE: Duration = Duration::from_secs(1);

/// One listening socket, whose clients the workers serve, and a UDP socket.
pub struct TcpServer {
    /// `None` once the shutdown has begun.
    listener: Option<Listener>,
    token: Token,
    limit: Limit,
    /// Clients refused since the last log line.
    refused: usize,
    /// For the datagrams, which have no connection.
    service: Arc<Service>,
    /// `None` once the shutdown has begun.
    udp: Option<UdpServer>,
    pool: BufPool,
    workers: Workers,
    /// Stops the loop when a worker has ended.
    ended: Inbox<()>,
}

impl TcpServer {
    /// Step 1: registers the listening socket, with `accept_callback` for reading, and the UDP socket.
    pub fn new(
        event_loop: &mut EventLoop<Self>,
        addr: &Addr,
        limits: &Limits,
        threads: usize,
        service: Service,
    ) -> Result<Self> {
        net::raise_fd_limit();
        let (listener, mut udp) = udp::bind_both(addr)?;
        listener.set_nonblocking()?;
        let callbacks = Callbacks { read: Some(Self::accept_callback), write: None };
        let token = event_loop.add_io_event(&listener, Interest::READ, callbacks)?;
        udp.register(event_loop, Self::udp_callback)?;
        let limit = Limit::new(limits, threads + 1, event_loop, Self::place_free_callback)?;
        let (mailbox, mut ended) = mailbox()?;
        ended.register(event_loop, EventLoop::stop_callback)?;
        let (pool, cap) = (BufPool::new(ACCEPTOR_CAP), POOL_CAP - ACCEPTOR_CAP);
        let service = Arc::new(service);
        let workers = Workers::start(threads, cap, &service, &mailbox)?;
        let (listener, udp, refused) = (Some(listener), Some(udp), 0);
        Ok(Self { listener, token, limit, refused, service, udp, pool, workers, ended })
    }

    /// Changes the settings while clients are connected: here, and on all threads.
    pub fn apply(&mut self, limits: &Limits, service: Service) -> Result<()> {
        self.service = Arc::new(service);
        self.workers.set_service(&self.service);
        Ok(self.limit.set(limits)?)
    }

    /// Step 2: a client has connected, which makes the listening socket readable.
    fn accept_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("accept_callback");
        for _ in 0..ACCEPTS_PER_EVENT {
            let Some(listener) = &mut self.listener else { return Ok(()) };
            if self.limit.makes_wait() {
                return Ok(event_loop.set_interest(listener, self.token, Interest::NONE)?);
            }
            // While all mailboxes are full, clients wait in the backlog, as when the fds run out.
            let full = self.workers.are_full();
            match if full { Accepted::Exhausted } else { listener.accept() } {
                Accepted::Client(stream, peer) => self.add_conn(event_loop, stream, peer)?,
                Accepted::WouldBlock => break,
                Accepted::Exhausted => {
                    // Pending clients keep it readable: if still watched, the loop would spin.
                    event_loop.set_interest(listener, self.token, Interest::NONE)?;
                    event_loop.run_after(net::ACCEPT_PAUSE, self.token, Self::accept_callback)?;
                    return Ok(());
                }
            }
        }
        let Some(listener) = &self.listener else { return Ok(()) };
        Ok(event_loop.set_interest(listener, self.token, Interest::READ)?)
    }

    fn place_free_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("place_free_callback");
        self.limit.silence()?;
        self.accept_callback(event_loop, self.token)
    }

    fn add_conn(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> Result<()> {
        debug!("{peer}: connected, fd {}", stream.as_raw_fd());
        let refused = match self.limit.try_take() {
            Some(permit) => self.workers.hand_over(NewConn { permit, stream, peer }),
            None => Some(stream),
        };
        let Some(stream) = refused else { return Ok(()) };
        self.refused += 1;
        if self.refused == 1 {
            event_loop.run_after(REPORT, self.token, Self::report_callback)?;
        }
        Ok(refuse(event_loop, stream, peer, &self.pool)?)
    }

    /// Datagrams have arrived. They are handled here, as they belong to no connection.
    fn udp_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("udp_callback");
        let Some(udp) = &mut self.udp else { return Ok(()) };
        let (router, tasks) = (&self.service.router, &*self.workers.tasks);
        Ok(udp.do_read(event_loop, Self::udp_report_callback, |conn, payload, id| {
            // Without a connection, each datagram is the first of its session.
            let mut session = Session { messages: 1, ..Session::default() };
            router.call_sender(conn, &mut session, payload, id, tasks)
        })?)
    }

    fn udp_report_callback(&mut self, _: &mut EventLoop<Self>, _: Token) -> Result<()> {
        self.udp.iter_mut().for_each(UdpServer::report);
        Ok(())
    }

    fn report_callback(&mut self, _: &mut EventLoop<Self>, _: Token) -> Result<()> {
        let refused = std::mem::take(&mut self.refused);
        if refused > 0 {
            info!("the server is full; clients refused: {refused}");
        }
        Ok(())
    }

    /// Stops listening, and stops the workers, within [`GRACE`]. Returns the error of a worker.
    pub fn drain(&mut self, event_loop: &mut EventLoop<Self>) -> Result<()> {
        let end = Instant::now() + GRACE;
        if let Some(mut listener) = self.listener.take() {
            // Closing the listener resets the connections still in its backlog.
            for _ in 0..net::BACKLOG {
                let Accepted::Client(stream, peer) = listener.accept() else { break };
                self.add_conn(event_loop, stream, peer)?;
            }
            event_loop.del_io_event(&listener, self.token)?;
            self.limit.deregister(event_loop)?;
            self.ended.deregister(event_loop)?;
            if let Some(mut udp) = self.udp.take() {
                udp.deregister(event_loop)?;
                udp.report();
            }
        }
        self.workers.stop();
        let cut_off = event_loop.drain_output(self, end)?;
        self.report_callback(event_loop, self.token)?;
        self.workers.join()?;
        let (registered, buffers) = (event_loop.registered(), self.pool.stats());
        info!("stopped; cut off: {cut_off}; still registered: {registered}; buffers: {buffers}");
        Ok(())
    }
}
