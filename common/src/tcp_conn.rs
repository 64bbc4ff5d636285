//! One connection that carries messages, as in chapter 4, but for any loop and any application
//! (since v05).

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use bytes::Buf;
use tracing::{trace, warn};

use crate::buf_pool::BufPool;
use crate::event_loop::{Callbacks, EventLoop, Interest, TimerId, Token};
use crate::message;
use crate::reactor_buf::{InputBuf, OutputBuf};

/// The high-water mark: with more unsent output than this, in bytes, a connection neither reads nor
/// handles messages until all of it is sent. The reply to one more message still fits 1 MiB.
const HIGH_WATER: usize = (1024 - 64) * 1024;

/// How long a connection pauses (since v11). The end of its reason causes no event here.
const PAUSE: Duration = Duration::from_millis(1);

/// How a connection goes on (since v05). After `Break` it is to be closed gracefully; the reason is
/// given if something was wrong. After an error it is to be dropped.
pub type Progress = io::Result<ControlFlow<Option<anyhow::Error>>>;

/// One peer: its socket, the start of an incomplete message, and unsent output (since v05).
pub struct TcpConn {
    /// The socket. Deregister it before you close it.
    pub stream: TcpStream,
    /// The address at the other end.
    pub peer: SocketAddr,
    /// Its registration with the loop.
    pub token: Token,
    input: InputBuf,
    /// The output that is still unsent.
    pub output: OutputBuf,
    /// Set above [`HIGH_WATER`] until all output is sent: `input` may hold whole messages then.
    full: bool,
    /// Set by [`close`](Self::close): no more messages are handled.
    closed: bool,
    /// Set by [`pause`](Self::pause): `input` begins with a message that is still to be handled.
    paused: bool,
    /// Set while paused. Boxed, because that is rare, and there are many connections.
    retry: Option<Box<TimerId>>,
    /// How many messages had no callback.
    skipped: u64,
    /// When it was made, last completed a message, or the kernel last took output.
    last_active: Instant,
    /// When the incomplete message in `input` began. `None` above [`HIGH_WATER`], where the server
    /// itself does not read on.
    incomplete_since: Option<Instant>,
}

impl TcpConn {
    /// Registers the connection, for reading at first.
    ///
    /// # Errors
    /// Any error of fcntl(2), setsockopt(2) or epoll_ctl(2). Nothing is registered then.
    pub fn new<S>(
        event_loop: &mut EventLoop<S>,
        stream: TcpStream,
        peer: SocketAddr,
        pool: &BufPool,
        callbacks: Callbacks<S>,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        // Replies are complete when written: waiting for more (Nagle) would only delay them.
        stream.set_nodelay(true)?;
        let token = event_loop.add_io_event(&stream, Interest::READ, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        Ok(Self {
            stream,
            peer,
            token,
            input,
            output,
            full: false,
            closed: false,
            paused: false,
            retry: None,
            skipped: 0,
            last_active: event_loop.now(),
            incomplete_since: None,
        })
    }

    /// The connection has started. Calls `on_start`, and writes what that has sent (since v07).
    ///
    /// # Errors
    /// Any send(2) error.
    pub fn do_start<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        on_start: impl FnOnce(&mut Self) -> anyhow::Result<()>,
    ) -> Progress {
        match on_start(self) {
            Ok(()) => self.do_write(event_loop, |_, _, _| Ok(())),
            Err(err) => Ok(ControlFlow::Break(Some(err))),
        }
    }

    /// Bytes have arrived. Reads them, passes each complete message to `on_message`, and writes.
    ///
    /// # Errors
    /// Any recv(2) or send(2) error, and a lack of memory.
    pub fn do_read<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        on_message: impl FnMut(&mut Self, &[u8], i32) -> anyhow::Result<()>,
    ) -> Progress {
        if self.input.read_from(&self.stream)? == Some(0) {
            let (n, incomplete) = (self.input.len(), !self.input.is_empty());
            let why = incomplete.then(|| anyhow!("closed inside a message, {n} bytes into it"));
            return Ok(ControlFlow::Break(why));
        }
        // A socket nearly always has room: asking epoll first, as in chapter 3, costs three calls.
        self.do_write(event_loop, on_message)
    }

    /// There may be room. Writes, and passes on the messages that were held back for lack of it.
    ///
    /// # Errors
    /// Any send(2) error.
    pub fn do_write<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        on_message: impl FnMut(&mut Self, &[u8], i32) -> anyhow::Result<()>,
    ) -> Progress {
        self.paused = false;
        self.retry.take().inspect(|timer| event_loop.cancel_timer(**timer));
        if !self.full || self.output.is_empty() {
            if let Err(err) = self.handle_messages(event_loop.now(), on_message) {
                return Ok(ControlFlow::Break(Some(err)));
            }
            if self.closed {
                return Ok(ControlFlow::Break(None));
            }
            self.full = self.output.len() > HIGH_WATER;
        }
        if self.paused {
            let retry = EventLoop::write_callback;
            self.retry = Some(Box::new(event_loop.run_after(PAUSE, self.token, retry)?));
            // It is not the client that is idle.
            self.last_active = event_loop.now();
        }
        self.write_output(event_loop)
    }

    fn write_output<S>(&mut self, event_loop: &mut EventLoop<S>) -> Progress {
        if self.output.write_to(&self.stream)? > 0 {
            self.last_active = event_loop.now();
        }
        // Messages held back in `input` cause no event: the loop returns to them when it can write.
        let write = self.full || !self.output.is_empty();
        let interest = Interest { read: !self.full && !self.paused, write };
        event_loop.set_interest(&self.stream, self.token, interest)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Sends a message that is no reply to one of this peer's, and so not limited by them (since v11).
    ///
    /// # Errors
    /// The peer reads too slowly: its unsent output is above the high-water mark. Any send(2) error,
    /// and a lack of memory.
    pub fn do_send<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        payload: &[u8],
        id: i32,
    ) -> Progress {
        if self.output.len() > HIGH_WATER {
            return Err(io::Error::other("it reads too slowly"));
        }
        match self.send_message(payload, id) {
            Ok(()) => self.write_output(event_loop),
            Err(err) => Err(io::Error::other(err)),
        }
    }

    /// Passes on the complete messages, up to the high-water mark.
    fn handle_messages(
        &mut self,
        now: Instant,
        mut on_message: impl FnMut(&mut Self, &[u8], i32) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let Some(mut block) = self.input.take() else { return Ok(()) };
        while !self.closed && self.output.len() <= HIGH_WATER {
            let Some(message) = message::decode(block.data()).context("refused")? else { break };
            let frame_len = message.frame_len();
            trace!("message: id {}, {} bytes", message.id, message.payload.len());
            on_message(self, message.payload, message.id)?;
            if self.paused {
                break;
            }
            block.pop(frame_len);
            (self.last_active, self.incomplete_since) = (now, None);
        }
        if block.is_empty() || self.paused || self.output.len() > HIGH_WATER {
            self.incomplete_since = None;
        } else {
            self.incomplete_since.get_or_insert(now);
        }
        self.input.put_back(block);
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

    /// Asks for a graceful close once this callback has returned (since v06).
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// Whether [`close`](Self::close) was called (since v06).
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Asks for the callback of a message to be called again with the same message, a millisecond
    /// later. Until then nothing is read (since v11).
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Whether the callback has asked for a [`pause`](Self::pause) (since v12).
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Notes a message without a callback, and logs the first one (since v06).
    pub fn skip_message(&mut self, id: i32) {
        if self.skipped == 0 {
            warn!("{}: no callback for message id {id}: skipping such messages", self.peer);
        }
        self.skipped += 1;
    }

    /// How many messages had no callback (since v06).
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// When it was made, last completed a message, or the kernel last took output.
    pub fn last_active(&self) -> Instant {
        self.last_active
    }

    /// When the message began that is still incomplete. `None` if there is none, or if this side does
    /// not read on.
    pub fn incomplete_since(&self) -> Option<Instant> {
        self.incomplete_since
    }
}
