//! The server: accepts clients and serves them.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use common::buf_pool::BufPool;
use common::cli::Addr;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::net::{self, Accepted, Listener};
use tracing::{debug, info, trace, warn};

use crate::tcp_conn::TcpConn;

/// The limit on all buffers together, in bytes. A connection that would exceed it is dropped.
const POOL_CAP: usize = 1 << 30;

/// The maximum number of accepts per event, so that a burst cannot starve the other fds.
const ACCEPTS_PER_EVENT: usize = 64;

/// How long a shutdown may take to serve what has arrived.
const GRACE: Duration = Duration::from_secs(1);

/// One listening socket, one thread, all clients at once.
pub struct TcpServer {
    /// `None` once the shutdown has begun.
    listener: Option<Listener>,
    token: Token,
    pool: BufPool,
    /// Boxed, because a hash map has empty slots, each the size of an entry.
    conns: HashMap<Token, Box<TcpConn>>,
}

impl TcpServer {
    /// Step 1: registers the listening socket, with `accept_callback` for reading.
    pub fn new(event_loop: &mut EventLoop<Self>, addr: &Addr) -> Result<Self> {
        net::raise_fd_limit();
        let listener =
            Listener::bind(addr.resolved()).with_context(|| format!("cannot listen on {addr}"))?;
        listener.set_nonblocking()?;
        let callbacks = Callbacks { read: Some(Self::accept_callback), write: None };
        let token = event_loop.add_io_event(&listener, Interest::READ, callbacks)?;
        let pool = BufPool::new(POOL_CAP);
        Ok(Self { listener: Some(listener), token, pool, conns: HashMap::new() })
    }

    /// Step 2: a client has connected, which makes the listening socket readable.
    fn accept_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("accept_callback");
        for _ in 0..ACCEPTS_PER_EVENT {
            let Some(listener) = &mut self.listener else { return Ok(()) };
            match listener.accept() {
                Accepted::Client(stream, peer) => self.add_conn(event_loop, stream, peer),
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

    fn add_conn(&mut self, event_loop: &mut EventLoop<Self>, stream: TcpStream, peer: SocketAddr) {
        debug!("{peer}: connected, fd {}", stream.as_raw_fd());
        match TcpConn::new(event_loop, stream, peer, &self.pool) {
            Ok(conn) => drop(self.conns.insert(conn.token, Box::new(conn))),
            Err(err) => warn!("{peer}: dropped: {err}"),
        }
    }

    pub fn conn_rd_callback(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
    ) -> Result<()> {
        trace!("conn_rd_callback");
        self.with_conn(event_loop, token, TcpConn::do_read)
    }

    pub fn conn_wt_callback(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
    ) -> Result<()> {
        trace!("conn_wt_callback");
        self.with_conn(event_loop, token, TcpConn::do_write)
    }

    /// Calls `handler`. On `Break` the connection is closed gracefully, on an error dropped.
    fn with_conn(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
        handler: fn(&mut TcpConn, &mut EventLoop<Self>) -> io::Result<ControlFlow<()>>,
    ) -> Result<()> {
        let Some(mut conn) = self.conns.remove(&token) else { return Ok(()) };
        match handler(&mut conn, event_loop) {
            Ok(ControlFlow::Continue(())) => drop(self.conns.insert(token, conn)),
            Ok(ControlFlow::Break(())) => {
                debug!("{}: closed", conn.peer);
                event_loop.close_gracefully(conn.stream, token, conn.output)?;
            }
            Err(err) => {
                info!("{}: dropped: {err}", conn.peer);
                event_loop.del_io_event(&conn.stream, token)?;
            }
        }
        Ok(())
    }

    /// Stops listening, serves what has arrived, and closes all connections, within [`GRACE`].
    pub fn drain(&mut self, event_loop: &mut EventLoop<Self>) -> Result<()> {
        let end = Instant::now() + GRACE;
        if let Some(mut listener) = self.listener.take() {
            // Closing the listener resets the connections still in its backlog.
            for _ in 0..net::BACKLOG {
                let Accepted::Client(stream, peer) = listener.accept() else { break };
                self.add_conn(event_loop, stream, peer);
            }
            event_loop.del_io_event(&listener, self.token)?;
        }
        event_loop.drain_input(self, end - GRACE / 2)?;
        for (token, conn) in self.conns.drain() {
            debug!("{}: closed", conn.peer);
            event_loop.close_gracefully(conn.stream, token, conn.output)?;
        }
        let cut_off = event_loop.drain_output(self, end)?;
        let (registered, buffers) = (event_loop.registered(), self.pool.stats());
        info!("stopped; cut off: {cut_off}; still registered: {registered}; buffers: {buffers}");
        Ok(())
    }
}
