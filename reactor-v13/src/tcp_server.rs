//! The server: a task that accepts, and one for each client.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytes::Buf;
use common::buf_pool::BufPool;
use common::cli::Addr;
use common::executor::{Async, Event, Runtime, race};
use common::message;
use common::net::{self, Accepted, Listener};
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::{debug, info, trace, warn};

use crate::callback_busi;

/// The limit on all buffers together, in bytes. A connection that would exceed it is dropped.
const POOL_CAP: usize = 1 << 30;

/// The maximum number of accepts per event, so that a burst cannot starve the other tasks.
const ACCEPTS_PER_EVENT: usize = 64;

/// How long a shutdown may take to serve what has arrived.
const GRACE: Duration = Duration::from_secs(1);

/// The high-water mark: with more unsent output than this, in bytes, a connection handles no messages
/// until all of it is sent. The reply to one more message still fits 1 MiB.
const HIGH_WATER: usize = (1024 - 64) * 1024;

/// What all tasks share.
pub struct TcpServer {
    runtime: Rc<Runtime>,
    pool: BufPool,
    /// No more clients are accepted.
    stop: Event,
    /// Nothing more is read.
    close: Event,
    /// Why the server stops without having been told to.
    failed: Cell<Option<io::Error>>,
}

impl TcpServer {
    /// Starts the task that accepts.
    pub fn new(runtime: &Rc<Runtime>, addr: &Addr) -> Result<Rc<Self>> {
        net::raise_fd_limit();
        let listener =
            Listener::bind(addr.resolved()).with_context(|| format!("cannot listen on {addr}"))?;
        listener.set_nonblocking()?;
        // Accepting changes the listener, so it cannot be shared with the loop.
        let socket = Async::new(runtime, listener.as_fd().try_clone_to_owned()?);
        let (runtime, stop, close) = (Rc::clone(runtime), Event::new(runtime), Event::new(runtime));
        let (pool, failed) = (BufPool::new(POOL_CAP), Cell::default());
        let server = Rc::new(Self { runtime, pool, stop, close, failed });
        server.runtime.spawn(Rc::clone(&server).run(listener, socket));
        Ok(server)
    }

    /// The whole life of the server. When it is to stop, it still serves what has arrived.
    async fn run(self: Rc<Self>, mut listener: Listener, socket: Async<OwnedFd>) {
        let first = race(pin!(self.accept(&mut listener, &socket)), self.stop.wait()).await;
        self.failed.set(first.ok().and_then(Result::err));
        // Closing the listener resets the connections still in its backlog.
        for _ in 0..net::BACKLOG {
            let Accepted::Client(stream, peer) = listener.accept() else { break };
            self.add_conn(stream, peer);
        }
        drop((socket, listener));
        self.runtime.drain_input(Instant::now() + GRACE / 2).await;
        self.close.set();
    }

    /// Step 1: accepts clients for as long as it is polled.
    async fn accept(
        self: &Rc<Self>,
        listener: &mut Listener,
        socket: &Async<OwnedFd>,
    ) -> io::Result<Infallible> {
        loop {
            socket.readable().await?;
            for _ in 0..ACCEPTS_PER_EVENT {
                match listener.accept() {
                    Accepted::Client(stream, peer) => self.add_conn(stream, peer),
                    Accepted::WouldBlock => break,
                    Accepted::Exhausted => {
                        self.runtime.sleep(net::ACCEPT_PAUSE).await;
                        break;
                    }
                }
            }
        }
    }

    /// Step 2: starts a task for the client. (An `async fn` that takes the `conn` would hold it twice.)
    fn add_conn(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr) {
        debug!("{peer}: connected, fd {}", stream.as_raw_fd());
        let (mut conn, server) = match Conn::new(self, stream, peer) {
            Ok(conn) => (conn, Rc::clone(self)),
            Err(err) => return warn!("{peer}: dropped: {err}"),
        };
        self.runtime.spawn(async move {
            // `talk` may be dropped wherever it awaits. No byte is lost: they are all in `conn`.
            let first = race(pin!(conn.talk()), server.close.wait()).await.unwrap_or(Ok(()));
            match first.and_then(|()| conn.stream.close_gracefully(conn.output)) {
                Ok(()) => debug!("{peer}: closed"),
                Err(err) => info!("{peer}: dropped: {err}"),
            }
        });
    }

    /// Stops listening, serves what has arrived, and closes all connections, within [`GRACE`].
    pub fn drain(&self) -> Result<()> {
        let end = Instant::now() + GRACE;
        self.stop.set();
        self.runtime.run()?;
        let (event_loop, waiting) = &mut *self.runtime.reactor.borrow_mut();
        let cut_off = event_loop.drain_output(waiting, end)?;
        // One is the executor's own.
        let (registered, buffers) = (event_loop.registered() - 1, self.pool.stats());
        info!("stopped; cut off: {cut_off}; still registered: {registered}; buffers: {buffers}");
        self.failed.take().map_or(Ok(()), |err| Err(err).context("cannot accept any more"))
    }
}

/// One client: its socket, the start of an incomplete message, and unsent replies.
pub struct Conn {
    stream: Async<TcpStream>,
    peer: SocketAddr,
    input: InputBuf,
    output: OutputBuf,
}

impl Conn {
    fn new(server: &TcpServer, stream: TcpStream, peer: SocketAddr) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        // Replies are complete when written: waiting for more (Nagle) would only delay them.
        stream.set_nodelay(true)?;
        let (input, output) = (InputBuf::new(&server.pool), OutputBuf::new(&server.pool));
        Ok(Self { stream: Async::new(&server.runtime, stream), peer, input, output })
    }

    /// Step 3: reads messages and answers them, up to the client's last byte or a bad message.
    async fn talk(&mut self) -> io::Result<()> {
        loop {
            self.stream.readable().await?;
            if self.input.read_from(self.stream.get_ref())? == Some(0) {
                if !self.input.is_empty() {
                    let n = self.input.len();
                    warn!("{}: closed inside a message, {n} bytes into it", self.peer);
                }
                return Ok(());
            }
            loop {
                let handled = self.handle_messages();
                let refused = |err: &_| warn!("{}: refused: {err:#}", self.peer);
                let Ok(more) = handled.inspect_err(refused) else { return Ok(()) };
                // A socket nearly always has room: waits for it only after a write.
                self.output.write_to(self.stream.get_ref())?;
                while !self.output.is_empty() {
                    self.stream.writable().await?;
                    self.output.write_to(self.stream.get_ref())?;
                }
                if !more {
                    break;
                }
                self.stream.writable().await?;
            }
        }
    }

    /// Step 4: answers complete messages, up to the high-water mark. Returns whether there may be more.
    fn handle_messages(&mut self) -> anyhow::Result<bool> {
        let Some(mut block) = self.input.take() else { return Ok(false) };
        while self.output.len() <= HIGH_WATER {
            let Some(message) = message::decode(block.data())? else { break };
            let frame_len = message.frame_len();
            trace!("message: id {}, {} bytes", message.id, message.payload.len());
            callback_busi(self, message.payload, message.id)?;
            block.pop(frame_len);
        }
        self.input.put_back(block);
        Ok(self.output.len() > HIGH_WATER)
    }

    /// Queues one message: all replies to one read leave together.
    ///
    /// # Errors
    /// The payload is too long, or there is no memory for it. Nothing is queued then.
    pub fn send_message(&mut self, payload: &[u8], id: i32) -> anyhow::Result<()> {
        let header = message::encode_header(id, payload.len())?;
        self.output.send_data(header.chain(payload))?;
        Ok(())
    }
}
