//! One connection: its socket, its buffers, and how it reads and writes.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;

use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::reactor_buf::{InputBuf, OutputBuf};

use crate::tcp_server::TcpServer;

/// One client: its socket, its input and its output.
pub struct TcpConn {
    pub stream: TcpStream,
    pub peer: SocketAddr,
    pub token: Token,
    input: InputBuf,
    pub output: OutputBuf,
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
        let callbacks = Callbacks {
            read: Some(TcpServer::conn_rd_callback),
            write: Some(TcpServer::conn_wt_callback),
        };
        let token = event_loop.add_io_event(&stream, Interest::READ, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        Ok(Self { stream, peer, token, input, output })
    }

    /// Step 4: bytes have arrived. Reads them, then swaps the interest, IN for OUT.
    pub fn do_read(
        &mut self,
        event_loop: &mut EventLoop<TcpServer>,
    ) -> io::Result<ControlFlow<()>> {
        if self.input.read_from(&self.stream)? == Some(0) {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(block) = self.input.take() {
            self.output.send_block(block)?;
            // A socket nearly always has room: epoll_wait returns at once, and chapter 4 skips it.
            event_loop.set_interest(&self.stream, self.token, Interest::WRITE)?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Step 5: there is room. Writes the bytes, then swaps the interest, OUT for IN.
    pub fn do_write(
        &mut self,
        event_loop: &mut EventLoop<TcpServer>,
    ) -> io::Result<ControlFlow<()>> {
        self.output.write_to(&self.stream)?;
        if self.output.is_empty() {
            event_loop.set_interest(&self.stream, self.token, Interest::READ)?;
        }
        Ok(ControlFlow::Continue(()))
    }
}
