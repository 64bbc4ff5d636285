//! The server: accepts clients and serves them.

use std::io;
use std::net::TcpStream;

use anyhow::{Context, Result};
use common::buf_pool::BufPool;
use common::cli::Addr;
use common::net::Listener;
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::{debug, info};

/// The limit on all buffers together, in bytes. A connection that would exceed it is dropped.
const POOL_CAP: usize = 1 << 30;

/// One listening socket, one thread, one client at a time.
pub struct TcpServer {
    listener: Listener,
    pool: BufPool,
}

impl TcpServer {
    pub fn new(addr: &Addr) -> Result<Self> {
        let listener =
            Listener::bind(addr.resolved()).with_context(|| format!("cannot listen on {addr}"))?;
        let pool = BufPool::new(POOL_CAP);
        Ok(Self { listener, pool })
    }

    /// Serves clients forever, one at a time.
    pub fn do_accept(&mut self) -> ! {
        loop {
            let (stream, peer) = self.listener.accept_blocking();
            debug!("{peer}: connected");
            match self.serve(stream) {
                Ok(()) => debug!("{peer}: closed"),
                Err(err) => info!("{peer}: dropped: {err}"),
            }
        }
    }

    /// Echoes until the end of the stream.
    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        let mut input = InputBuf::new(&self.pool);
        let mut output = OutputBuf::new(&self.pool);
        while input.read_from(&stream)? != Some(0) {
            if let Some(block) = input.take() {
                output.send_block(block)?;
            }
            // A client that does not read blocks this write, and so all other clients.
            output.write_to(&stream)?;
        }
        Ok(())
    }
}
