//! One connection of chapter 4.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::ops::ControlFlow;

use bytes::Buf;
use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message;
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::{trace, warn};

use crate::tcp_server::TcpServer;

/// With more unsent output than this, in bytes, a connection reads no more until all of it is
/// sent. The replies to one more read still fit a block of 1 MiB.
const HIGH_WATER: usize = (1024 - 64) * 1024;

/// How many times a server that stops reads from each client to take in what has come.
const DRAIN_READS: usize = 16;

/// Bytes have come.
fn conn_rd_callback(
    event_loop: &mut EventLoop<TcpServer>,
    server: &mut TcpServer,
    token: Token,
) -> io::Result<()> {
    trace!("conn_rd_callback");
    server.with_conn(event_loop, token, TcpConn::do_read)
}

/// There is room for what could not be written before.
fn conn_wt_callback(
    event_loop: &mut EventLoop<TcpServer>,
    server: &mut TcpServer,
    token: Token,
) -> io::Result<()> {
    trace!("conn_wt_callback");
    server.with_conn(event_loop, token, TcpConn::do_write)
}

/// What the client's messages are for: the course's business is an echo.
fn callback_busi(conn: &mut TcpConn, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

/// One client: its socket, what came in and is no whole message yet, what has to go out still.
pub struct TcpConn {
    stream: TcpStream,
    pub peer: SocketAddr,
    pub token: Token,
    input: InputBuf,
    output: OutputBuf,
    phase: Phase,
    /// Has passed [`HIGH_WATER`] and not been emptied since.
    full: bool,
}

/// Where a connection is between its first message and its last.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Messages come, replies go.
    Open,
    /// The client has sent its last byte. What is left to do is to write.
    PeerDone,
    /// The server wants no more. It writes what is left, and throws away what comes.
    Closing,
    /// All is written and the client has been told so (FIN). To close before it closes too could
    /// reset the connection, and take away replies that it has not read yet. How long it takes is up
    /// to the client: no byte of it is kept, so that it costs no more than one that is idle.
    Lingering,
}

impl TcpConn {
    /// The connection is registered, for reading at first.
    pub fn new(
        event_loop: &mut EventLoop<TcpServer>,
        stream: TcpStream,
        peer: SocketAddr,
        pool: &BufPool,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        // A reply is whole when it is written: nothing is gained by waiting for more (Nagle).
        stream.set_nodelay(true)?;
        let callbacks = Callbacks { read: Some(conn_rd_callback), write: Some(conn_wt_callback) };
        let token = event_loop.add_io_event(&stream, Interest::READ, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        let phase = Phase::Open;
        Ok(Self { stream, peer, token, input, output, phase, full: false })
    }

    fn do_read(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<ControlFlow<()>> {
        self.take_in()?;
        // The socket nearly always has room. To ask epoll first, as chapter 3 does, would cost two
        // epoll_ctl and one epoll_wait more.
        self.flush(event_loop)
    }

    /// Reads once and handles what has come. Returns whether anything has.
    fn take_in(&mut self) -> io::Result<bool> {
        match self.input.read_from(&self.stream)? {
            None => return Ok(false),
            Some(0) => {
                if let Some(rest) = self.input.take() {
                    warn!("{}: closed inside a message, {} bytes into it", self.peer, rest.len());
                }
                self.phase = Phase::PeerDone;
            }
            Some(_) if self.phase == Phase::Open => {
                if let Err(err) = self.handle_messages() {
                    warn!("{}: refused: {err:#}", self.peer);
                    self.phase = Phase::Closing;
                }
            }
            Some(_) => drop(self.input.take()),
        }
        Ok(true)
    }

    /// Hands on all the messages that are whole. After an error nothing of the input is left: where
    /// the next message would begin is not known.
    fn handle_messages(&mut self) -> anyhow::Result<()> {
        let Some(mut block) = self.input.take() else { return Ok(()) };
        while let Some(message) = message::decode(block.data())? {
            let frame_len = message.frame_len();
            trace!("message: id {}, {} bytes", message.id, message.payload.len());
            callback_busi(self, message.payload, message.id)?;
            block.pop(frame_len);
        }
        self.input.put_back(block);
        Ok(())
    }

    /// Sends one message, together with all the others of this turn.
    ///
    /// # Errors
    /// The payload is too long, or there is no memory for it. Nothing is sent of it then.
    pub fn send_message(&mut self, payload: &[u8], id: i32) -> anyhow::Result<()> {
        let header = message::encode_header(id, payload.len())?;
        self.output.send_data(header.chain(payload))?;
        Ok(())
    }

    fn do_write(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<ControlFlow<()>> {
        self.flush(event_loop)
    }

    /// Writes what the socket takes, and settles what the connection waits for next.
    fn flush(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<ControlFlow<()>> {
        self.output.write_to(&self.stream)?;
        if self.output.is_empty() {
            match self.phase {
                Phase::Open | Phase::Lingering => {}
                Phase::PeerDone => return Ok(ControlFlow::Break(())),
                Phase::Closing => {
                    self.stream.shutdown(Shutdown::Write)?;
                    self.phase = Phase::Lingering;
                }
            }
        }
        self.full = self.output.len() > HIGH_WATER || (self.full && !self.output.is_empty());
        let read = match self.phase {
            Phase::Open => !self.full,
            Phase::PeerDone => false,
            Phase::Closing | Phase::Lingering => true,
        };
        let write = !self.output.is_empty();
        event_loop.set_interest(&self.stream, self.token, Interest { read, write })?;
        Ok(ControlFlow::Continue(()))
    }

    /// The server stops. What has come is still answered, as far as [`DRAIN_READS`] bring it; then
    /// the connection ends as one that has been refused does.
    pub fn do_drain(
        &mut self,
        event_loop: &mut EventLoop<TcpServer>,
    ) -> io::Result<ControlFlow<()>> {
        let mut idle = self.phase == Phase::Open && self.output.is_empty();
        for _ in 0..DRAIN_READS {
            let more = self.phase == Phase::Open && self.output.len() <= HIGH_WATER;
            if !more || !self.take_in()? {
                break;
            }
            idle = false;
        }
        if idle {
            return Ok(ControlFlow::Break(()));
        }
        if self.phase == Phase::Open {
            self.phase = Phase::Closing;
        }
        self.flush(event_loop)
    }

    pub fn has_pending(&self) -> bool {
        !self.output.is_empty()
    }

    pub fn clean_conn(&mut self, event_loop: &mut EventLoop<TcpServer>) -> io::Result<()> {
        event_loop.del_io_event(&self.stream, self.token)
    }
}
