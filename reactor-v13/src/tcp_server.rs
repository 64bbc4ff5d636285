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
use common::event_loop::{Callbacks, Interest};
use common::executor::{Async, Either, Event, Runtime, race};
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

/// After this long without input, a client has sent everything that was in flight.
const QUIET: Duration = Duration::from_millis(50);

/// The high-water mark: with more unsent output than this, in bytes, a connection handles no messages
/// until all of it is sent. The reply to one more message still fits 1 MiB.
const HIGH_WATER: usize = (1024 - 64) * 1024;

/// What all tasks share.
pub struct TcpServer {
    runtime: Runtime,
    pool: BufPool,
    stop: Event,
    /// Why no more clients are accepted.
    failed: Cell<Option<io::Error>>,
}

impl TcpServer {
    /// Starts the task that accepts.
    pub fn new(runtime: &Runtime, addr: &Addr) -> Result<Rc<Self>> {
        net::raise_fd_limit();
        let listener =
            Listener::bind(addr.resolved()).with_context(|| format!("cannot listen on {addr}"))?;
        listener.set_nonblocking()?;
        let (runtime, stop) = (runtime.clone(), Event::new(runtime));
        let (pool, failed) = (BufPool::new(POOL_CAP), Cell::default());
        let server = Rc::new(Self { runtime, pool, stop, failed });
        // Accepting changes the listener, so it cannot be shared with the loop.
        let socket = Async::new(&server.runtime, listener.as_fd().try_clone_to_owned()?);
        server.runtime.spawn(Rc::clone(&server).accept_all(listener, socket));
        Ok(server)
    }

    /// Step 1: accepts clients until the server stops.
    async fn accept_all(self: Rc<Self>, mut listener: Listener, socket: Async<OwnedFd>) {
        let first = race(pin!(self.accept(&mut listener, &socket)), self.stop.wait()).await;
        if let Either::Left(Err(err)) = first {
            self.failed.set(Some(err));
            self.stop.set();
        }
        // Closing the listener resets the connections still in its backlog.
        for _ in 0..net::BACKLOG {
            let Accepted::Client(stream, peer) = listener.accept() else { break };
            self.add_conn(stream, peer);
        }
    }

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
                        self.runtime.sleep(net::ACCEPT_PAUSE)?.await;
                        break;
                    }
                }
            }
        }
    }

    fn add_conn(self: &Rc<Self>, stream: TcpStream, peer: SocketAddr) {
        debug!("{peer}: connected, fd {}", stream.as_raw_fd());
        match Conn::new(self, stream, peer) {
            Ok(conn) => self.runtime.spawn(conn.serve()),
            Err(err) => warn!("{peer}: dropped: {err}"),
        }
    }

    /// Stops listening, serves what has arrived, and closes all connections, within [`GRACE`].
    pub fn drain(&self) -> Result<()> {
        let end = Instant::now() + GRACE;
        self.runtime.reactor().0.close_limits.at_once = usize::MAX;
        self.stop.set();
        self.runtime.run()?;
        let (event_loop, waiting) = &mut *self.runtime.reactor();
        let cut_off = event_loop.drain_output(waiting, end)?;
        // One is the executor's own.
        let (registered, buffers) = (event_loop.registered() - 1, self.pool.stats());
        info!("stopped; cut off: {cut_off}; still registered: {registered}; buffers: {buffers}");
        self.failed.take().map_or(Ok(()), |err| Err(err).context("cannot accept any more"))
    }
}

/// One client: its socket, the start of an incomplete message, and unsent replies.
pub struct Conn {
    server: Rc<TcpServer>,
    stream: Async<TcpStream>,
    peer: SocketAddr,
    input: InputBuf,
    output: OutputBuf,
}

impl Conn {
    fn new(server: &Rc<TcpServer>, stream: TcpStream, peer: SocketAddr) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        // Replies are complete when written: waiting for more (Nagle) would only delay them.
        stream.set_nodelay(true)?;
        let (input, output) = (InputBuf::new(&server.pool), OutputBuf::new(&server.pool));
        let stream = Async::new(&server.runtime, stream);
        Ok(Self { server: Rc::clone(server), stream, peer, input, output })
    }

    /// Step 2: the whole life of a connection. An `async fn` would hold `self` twice: as its argument,
    /// and where it is used.
    fn serve(mut self) -> impl Future<Output = ()> {
        async move {
            match self.run().await {
                Ok(()) => debug!("{}: closed", self.peer),
                Err(err) => return info!("{}: dropped: {err}", self.peer),
            }
            let Some(stream) = self.stream.into_inner() else { return };
            let event_loop = &mut self.server.runtime.reactor().0;
            let none = Callbacks { read: None, write: None };
            let result = event_loop.add_io_event(&stream, Interest::NONE, none);
            let closed =
                result.and_then(|token| event_loop.close_gracefully(stream, token, self.output));
            closed.unwrap_or_else(|err| info!("{}: dropped: {err}", self.peer));
        }
    }

    /// Returns when the connection is to be closed.
    async fn run(&mut self) -> io::Result<()> {
        let server = Rc::clone(&self.server);
        // The one that is not ready first is dropped, at an await. No byte is lost: they are in `self`.
        if let Either::Left(result) = race(pin!(self.talk()), server.stop.wait()).await {
            return result;
        }
        server.runtime.timeout(GRACE / 2, self.finish()).await?.unwrap_or(Ok(()))
    }

    /// Step 3: reads messages and answers them, until the client has sent its last byte, or something
    /// that is no message.
    async fn talk(&mut self) -> io::Result<()> {
        loop {
            self.stream.readable().await?;
            if self.input.read_from(self.stream.get())? == Some(0) {
                if !self.input.is_empty() {
                    let n = self.input.len();
                    warn!("{}: closed inside a message, {n} bytes into it", self.peer);
                }
                return Ok(());
            }
            if !self.reply().await? {
                return Ok(());
            }
        }
    }

    /// Step 4: answers the complete messages, and writes the replies. Returns false after a bad one.
    async fn reply(&mut self) -> io::Result<bool> {
        loop {
            let handled = self.handle_messages();
            // Also after a bad message: those before it are owed a reply.
            self.output.write_to(self.stream.get())?;
            let Ok(more) = handled.inspect_err(|err| warn!("{}: refused: {err:#}", self.peer))
            else {
                return Ok(false);
            };
            while !self.output.is_empty() {
                self.stream.writable().await?;
                self.output.write_to(self.stream.get())?;
            }
            if !more {
                return Ok(true);
            }
        }
    }

    /// Answers the complete messages, up to the high-water mark. Returns whether there may be more.
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

    /// The server stops: answers what is still in flight.
    async fn finish(&mut self) -> io::Result<()> {
        while self.reply().await? {
            let readable = self.server.runtime.timeout(QUIET, self.stream.readable()).await?;
            if readable.transpose()?.is_none()
                || self.input.read_from(self.stream.get())? == Some(0)
            {
                break;
            }
        }
        Ok(())
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
