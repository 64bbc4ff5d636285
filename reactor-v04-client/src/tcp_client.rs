//! The client's connection: connects, sends messages, receives replies.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;

use anyhow::{Context, Result};
use bytes::Buf;
use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message::{self, Message};
use common::net;
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::debug;

use crate::exchange::Exchange;

/// A connection to a server, or an attempt to connect.
pub struct TcpClient {
    pub stream: TcpStream,
    peer: SocketAddr,
    pub token: Token,
    pub connected: bool,
    input: InputBuf,
    pub output: OutputBuf,
    /// Why nothing more can be written. What the server has sent can still be read.
    write_error: Option<io::Error>,
}

impl TcpClient {
    /// Step 1: starts connecting. The socket becomes writable when that has succeeded or failed.
    pub fn new(
        event_loop: &mut EventLoop<Exchange>,
        peer: SocketAddr,
        pool: &BufPool,
    ) -> io::Result<Self> {
        let stream = net::connect(peer)?;
        stream.set_nodelay(true)?;
        let callbacks = Callbacks { read: None, write: Some(Exchange::connected_callback) };
        let token = event_loop.add_io_event(&stream, Interest::WRITE, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        Ok(Self { stream, peer, token, connected: false, input, output, write_error: None })
    }

    /// Step 2: connecting has succeeded or failed. On success, swaps the callbacks; the first write
    /// then asks for reading.
    pub fn do_connected(&mut self, event_loop: &mut EventLoop<Exchange>) -> io::Result<()> {
        net::connect_result(&self.stream)?;
        debug!("connected to {}", self.peer);
        let callbacks = Callbacks {
            read: Some(Exchange::conn_rd_callback),
            write: Some(Exchange::conn_wt_callback),
        };
        event_loop.set_callbacks(self.token, callbacks);
        self.connected = true;
        Ok(())
    }

    /// Step 3: queues one message, to be written together with others.
    ///
    /// # Errors
    /// The payload is too long, or there is no memory for it. Nothing is queued then.
    pub fn send_message(&mut self, payload: &[u8], id: i32) -> Result<()> {
        let header = message::encode_header(id, payload.len())?;
        self.output.send_data(header.chain(payload))?;
        Ok(())
    }

    /// Step 4: writes messages, as far as the socket takes them.
    pub fn do_write(&mut self, event_loop: &mut EventLoop<Exchange>) -> io::Result<()> {
        if self.write_error.is_none() {
            self.write_error = self.output.write_to(&self.stream).err();
        }
        let write = !self.output.is_empty() && self.write_error.is_none();
        event_loop.set_interest(&self.stream, self.token, Interest { read: true, write })
    }

    /// Step 5: replies have arrived. Passes each complete one to `message_callback`. `Break` says
    /// why no more will arrive.
    ///
    /// # Errors
    /// A bad frame, once the replies before it are passed on, and any error of the callback.
    pub fn do_read(
        &mut self,
        message_callback: impl FnMut(Message) -> Result<()>,
    ) -> Result<ControlFlow<String>> {
        let reason = match self.input.read_from(&self.stream) {
            Ok(Some(0)) => match (self.write_error.take(), self.input.len()) {
                (Some(err), _) => format!("connection lost: {err}"),
                (None, 0) => "closed the connection".to_owned(),
                (None, n) => format!("closed the connection {n} bytes into a message"),
            },
            Err(err) => format!("connection lost: {err}"),
            Ok(_) => {
                self.handle_messages(message_callback)?;
                return Ok(ControlFlow::Continue(()));
            }
        };
        Ok(ControlFlow::Break(reason))
    }

    fn handle_messages(&mut self, mut callback: impl FnMut(Message) -> Result<()>) -> Result<()> {
        let Some(mut block) = self.input.take() else { return Ok(()) };
        while let Some(reply) = message::decode(block.data())
            .with_context(|| format!("{} has sent a bad frame", self.peer))?
        {
            let frame_len = reply.frame_len();
            callback(reply)?;
            block.pop(frame_len);
        }
        self.input.put_back(block);
        Ok(())
    }
}
