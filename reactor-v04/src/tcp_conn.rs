//! One connection: its socket, its buffers, and how it reads and writes.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;

use bytes::Buf;
use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message;
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::{trace, warn};

use crate::callback_busi;
use crate::tcp_server::TcpServer;

/// The high-water mark: with more unsent output than this, in bytes, a connection neither reads nor
/// handles messages until all of it is sent. The reply to one more message still fits 1 MiB.
const HIGH_WATER: usize = (1024 - 64) * 1024;

/// One client: its socket, the start of an incomplete message, and unsent replies.
pub struct TcpConn {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    pub token: Token,
    input: InputBuf,
    pub output: OutputBuf,
    /// Set above [`HIGH_WATER`] until all output is sent: `input` may hold whole messages then.
    full: bool,
}

impl TcpConn {
    /// Step 3: registers the connection, for reading at first.
    pub fn new(
        event_loop: &mut EventLoop<TcpServer>,
        stream: TcpStream,
        peer: SocketAddr,
        pool: &BufPool,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        // Replies are complete when written: waiting for more (Nagle) would only delay them.
        stream.set_nodelay(true)?;
        let callbacks = Callbacks {
            read: Some(TcpServer::conn_rd_callback),
            write: Some(TcpServer::conn_wt_callback),
        };
        let token = event_loop.add_io_event(&stream, Interest::READ, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        Ok(Self { stream, peer, token, input, output, full: false })
    }

    /// Step 4: bytes have arrived. Reads them, then goes on to step 5 without waiting for room.
    pub fn do_read(
        &mut self,
        event_loop: &mut EventLoop<TcpServer>,
    ) -> io::Result<ControlFlow<()>> {
        if self.input.read_from(&self.stream)? == Some(0) {
            if !self.input.is_empty() {
                let n = self.input.len();
                warn!("{}: closed inside a message, {n} bytes into it", self.peer);
            }
            return Ok(ControlFlow::Break(()));
        }
        // A socket nearly always has room: asking epoll first, as in chapter 3, costs three calls.
        self.do_write(event_loop)
    }

    /// Step 5: there may be room. Answers the complete messages, and writes the replies.
    pub fn do_write(
        &mut self,
        event_loop: &mut EventLoop<TcpServer>,
    ) -> io::Result<ControlFlow<()>> {
        if !self.full || self.output.is_empty() {
            if let Err(err) = self.handle_messages() {
                warn!("{}: refused: {err:#}", self.peer);
                return Ok(ControlFlow::Break(()));
            }
            self.full = self.output.len() > HIGH_WATER;
        }
        self.output.write_to(&self.stream)?;
        // Messages held back in `input` cause no event: the loop returns to them when it can write.
        let interest = Interest { read: !self.full, write: self.full || !self.output.is_empty() };
        event_loop.set_interest(&self.stream, self.token, interest)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Answers the complete messages, up to the high-water mark.
    fn handle_messages(&mut self) -> anyhow::Result<()> {
        let Some(mut block) = self.input.take() else { return Ok(()) };
        while self.output.len() <= HIGH_WATER {
            let Some(message) = message::decode(block.data())? else { break };
            let frame_len = message.frame_len();
            trace!("message: id {}, {} bytes", message.id, message.payload.len());
            callback_busi(self, message.payload, message.id)?;
            block.pop(frame_len);
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
}
