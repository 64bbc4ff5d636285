//! The server: accepts clients and serves them.

use std::io::{self, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result};
use common::cli::Addr;
use common::net::{self, Listener};
use tracing::{debug, info, trace};

/// What every client receives.
const GREETING: &[u8] = b"hello Lars\n";

/// How long a client may delay the next one by not closing its side.
const LINGER: Duration = Duration::from_secs(1);

/// One listening socket, one thread, one client at a time.
pub struct TcpServer {
    listener: Listener,
}

impl TcpServer {
    pub fn new(addr: &Addr) -> Result<Self> {
        let listener =
            Listener::bind(addr.resolved()).with_context(|| format!("cannot listen on {addr}"))?;
        Ok(Self { listener })
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

    fn serve(&self, mut stream: TcpStream) -> io::Result<()> {
        stream.write_all(GREETING)?;
        trace!("wrote {} bytes", GREETING.len());
        // The client's input is ignored, but left unread it would cost the client its greeting.
        net::close_gracefully(stream, LINGER)
    }
}
