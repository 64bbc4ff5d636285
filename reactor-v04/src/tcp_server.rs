//! The server of chapter 4.

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::Context;
use common::buf_pool::BufPool;
use common::cli::Addr;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::net::{self, Accepted, Listener};
use tracing::{debug, info, trace, warn};

use crate::tcp_conn::TcpConn;

/// The most that all buffers together may take, in bytes. A connection that needs one more is ended.
const POOL_CAP: usize = 1 << 30;

/// How many clients one event accepts at the most, so that a burst of them leaves those who are
/// connected their turn.
const ACCEPTS_PER_EVENT: usize = 64;

/// How long the server goes on, once it is told to stop, to deliver what it has taken in.
const GRACE: Duration = Duration::from_secs(1);

/// One listening socket, one thread, all clients at once.
pub struct TcpServer {
    listener: Option<Listener>,
    token: Token,
    pool: BufPool,
    /// In boxes, since the map keeps free places, of the size of an entry each.
    conns: HashMap<Token, Box<TcpConn>>,
    draining: bool,
}

impl TcpServer {
    /// Step 1: the listening socket is registered, with `accept_callback` for reading.
    pub fn new(event_loop: &mut EventLoop<Self>, addr: &Addr) -> anyhow::Result<Self> {
        net::raise_fd_limit();
        let listener =
            Listener::bind(addr.resolved()).with_context(|| format!("cannot listen on {addr}"))?;
        listener.set_nonblocking()?;
        let callbacks = Callbacks { read: Some(accept_callback), write: None };
        let token = event_loop.add_io_event(&listener, Interest::READ, callbacks)?;
        let pool = BufPool::new(POOL_CAP);
        Ok(Self { listener: Some(listener), token, pool, conns: HashMap::new(), draining: false })
    }
}

/// Step 2: somebody connects, and the listening socket has become readable.
fn accept_callback(
    event_loop: &mut EventLoop<TcpServer>,
    server: &mut TcpServer,
    _: Token,
) -> io::Result<()> {
    trace!("accept_callback");
    server.do_accept(event_loop)
}

impl TcpServer {
    /// Takes in those who wait.
    fn do_accept(&mut self, event_loop: &mut EventLoop<Self>) -> io::Result<()> {
        for _ in 0..ACCEPTS_PER_EVENT {
            let Some(listener) = &mut self.listener else { break };
            match listener.accept() {
                Accepted::Client(stream, peer) => {
                    debug!("{peer}: connected, fd {}", stream.as_raw_fd());
                    if let Err(err) = self.add_conn(event_loop, stream, peer) {
                        warn!("{peer}: dropped: {err}");
                    }
                }
                Accepted::WouldBlock => break,
                Accepted::Exhausted => {
                    // Those who wait keep the listener readable: watched on, it would spin.
                    event_loop.set_interest(listener, self.token, Interest::NONE)?;
                    event_loop.run_after(net::ACCEPT_PAUSE, self.token, resume_callback)?;
                    break;
                }
            }
        }
        Ok(())
    }

    /// Step 3: the connection is registered, for reading at first.
    fn add_conn(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        stream: TcpStream,
        peer: SocketAddr,
    ) -> io::Result<()> {
        let conn = TcpConn::new(event_loop, stream, peer, &self.pool)?;
        self.conns.insert(conn.token, Box::new(conn));
        Ok(())
    }

    /// Gives one connection its turn, and closes it if that was its last one or went wrong.
    pub fn with_conn(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
        turn: fn(&mut TcpConn, &mut EventLoop<Self>) -> io::Result<ControlFlow<()>>,
    ) -> io::Result<()> {
        let Some(conn) = self.conns.get_mut(&token) else { return Ok(()) };
        match turn(conn, event_loop) {
            Ok(ControlFlow::Continue(())) => return Ok(()),
            Ok(ControlFlow::Break(())) => debug!("{}: closed", conn.peer),
            Err(err) => info!("{}: dropped: {err}", conn.peer),
        }
        conn.clean_conn(event_loop)?;
        self.conns.remove(&token);
        if self.draining && self.conns.is_empty() {
            event_loop.stop();
        }
        Ok(())
    }
}

/// The pause after a shortage is over.
fn resume_callback(
    event_loop: &mut EventLoop<TcpServer>,
    server: &mut TcpServer,
    token: Token,
) -> io::Result<()> {
    trace!("resume_callback");
    let Some(listener) = &server.listener else { return Ok(()) };
    event_loop.set_interest(listener, token, Interest::READ)
}

impl TcpServer {
    /// Refuses new clients, delivers what has been taken in, within [`GRACE`], and closes.
    pub fn drain(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        if let Some(listener) = self.listener.take() {
            event_loop.del_io_event(&listener, self.token)?;
        }
        self.draining = true;
        let tokens: Vec<Token> = self.conns.keys().copied().collect();
        for token in tokens {
            self.with_conn(event_loop, token, TcpConn::do_drain)?;
        }
        if !self.conns.is_empty() {
            event_loop.run_after(GRACE, self.token, EventLoop::stop_callback)?;
            event_loop.event_process(self)?;
        }
        let cut_off = self.conns.values().filter(|conn| conn.has_pending()).count();
        for (_, mut conn) in self.conns.drain() {
            conn.clean_conn(event_loop)?;
        }
        let (registered, buffers) = (event_loop.registered(), self.pool.stats());
        info!("stopped; cut off: {cut_off}; still registered: {registered}; buffers: {buffers}");
        Ok(())
    }
}
