//! The server of chapter 3.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::Context;
use common::buf_pool::BufPool;
use common::cli::Addr;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::net::{self, Accepted, Listener};
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::{debug, info, trace, warn};

/// The most that all buffers together may take, in bytes. A connection that needs one more is ended.
const POOL_CAP: usize = 1 << 30;

/// How many clients one event accepts at the most, so that a burst of them leaves those who are
/// connected their turn.
const ACCEPTS_PER_EVENT: usize = 64;

/// How long the server goes on, once it is told to stop, to deliver what it has taken in.
const GRACE: Duration = Duration::from_secs(1);

/// How many times a server that stops reads from each client to take in what has come.
const DRAIN_READS: usize = 16;

/// One listening socket, one thread, all clients at once.
pub struct TcpServer {
    listener: Option<Listener>,
    token: Token,
    pool: BufPool,
    /// In boxes, since the map keeps free places, of the size of an entry each.
    conns: HashMap<Token, Box<Conn>>,
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
        let conn = Conn::new(event_loop, stream, peer, &self.pool)?;
        self.conns.insert(conn.token, Box::new(conn));
        Ok(())
    }

    /// Gives one connection its turn, and closes it if that was its last one or went wrong.
    fn with_conn(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
        turn: fn(&mut Conn, &mut EventLoop<Self>) -> io::Result<ControlFlow<()>>,
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

/// Step 4: bytes have come. They are read, and reading is swapped for writing.
fn server_rd_callback(
    event_loop: &mut EventLoop<TcpServer>,
    server: &mut TcpServer,
    token: Token,
) -> io::Result<()> {
    trace!("server_rd_callback");
    server.with_conn(event_loop, token, Conn::do_read)
}

/// Step 5: there is room for them. They are written, and writing is swapped for reading.
fn server_wt_callback(
    event_loop: &mut EventLoop<TcpServer>,
    server: &mut TcpServer,
    token: Token,
) -> io::Result<()> {
    trace!("server_wt_callback");
    server.with_conn(event_loop, token, Conn::do_write)
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

/// One client: its socket, and its own bytes on their way in and back out.
struct Conn {
    stream: TcpStream,
    peer: SocketAddr,
    token: Token,
    input: InputBuf,
    output: OutputBuf,
    draining: bool,
}

impl Conn {
    fn new(
        event_loop: &mut EventLoop<TcpServer>,
        stream: TcpStream,
        peer: SocketAddr,
        pool: &BufPool,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let callbacks =
            Callbacks { read: Some(server_rd_callback), write: Some(server_wt_callback) };
        let token = event_loop.add_io_event(&stream, Interest::READ, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        Ok(Self { stream, peer, token, input, output, draining: false })
    }

    fn do_read(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<ControlFlow<()>> {
        // At the end of the stream nothing is left to write, or this would not have been read.
        if self.input.read_from(&self.stream)? == Some(0) {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(block) = self.input.take().filter(|_| !self.draining) {
            self.output.send_block(block)?;
            // A socket nearly always has room: the next epoll_wait will return at once.
            event_loop.set_interest(&self.stream, self.token, Interest::WRITE)?;
        }
        Ok(ControlFlow::Continue(()))
    }

    fn do_write(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<ControlFlow<()>> {
        self.output.write_to(&self.stream)?;
        if self.output.is_empty() {
            if self.draining {
                self.stream.shutdown(Shutdown::Write)?;
            }
            event_loop.set_interest(&self.stream, self.token, Interest::READ)?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The server stops. What has come still goes back, as far as [`DRAIN_READS`] bring it; then
    /// the client is told (FIN), and what it still sends is thrown away until it closes too. To
    /// close before that would reset the connection, and take away what is on its way.
    fn do_drain(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<ControlFlow<()>> {
        self.draining = true;
        for _ in 0..DRAIN_READS {
            let Some(1..) = self.input.read_from(&self.stream)? else { break };
            if let Some(block) = self.input.take() {
                self.output.send_block(block)?;
            }
        }
        if self.output.is_empty() {
            return Ok(ControlFlow::Break(()));
        }
        event_loop.set_interest(&self.stream, self.token, Interest::WRITE)?;
        Ok(ControlFlow::Continue(()))
    }

    fn has_pending(&self) -> bool {
        !self.output.is_empty()
    }

    fn clean_conn(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<()> {
        event_loop.del_io_event(&self.stream, self.token)
    }
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
            self.with_conn(event_loop, token, Conn::do_drain)?;
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
