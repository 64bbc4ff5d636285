//! An echo on mio: edge-triggered, with a buffer for what a socket does not take.

use std::collections::HashMap;
use std::io::{self, Read, Write};

use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

const LISTENER: Token = Token(0);

struct Conn {
    stream: TcpStream,
    /// Bytes not written yet.
    pending: Vec<u8>,
}

fn main() -> anyhow::Result<()> {
    let listener = bench::listener()?;
    listener.set_nonblocking(true)?;
    let mut listener = TcpListener::from_std(listener);
    let mut poll = Poll::new()?;
    poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
    let mut events = Events::with_capacity(1024);
    let mut conns: HashMap<Token, Conn> = HashMap::new();
    let mut next = 1;
    let mut buf = vec![0; 64 * 1024];
    loop {
        match poll.poll(&mut events, None) {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            if event.token() == LISTENER {
                accept(&listener, &poll, &mut conns, &mut next)?;
                continue;
            }
            let Some(conn) = conns.get_mut(&event.token()) else { continue };
            if !conn.serve(&mut buf, event.is_read_closed())
                && let Some(mut conn) = conns.remove(&event.token())
            {
                poll.registry().deregister(&mut conn.stream)?;
            }
        }
    }
}

fn accept(
    listener: &TcpListener,
    poll: &Poll,
    conns: &mut HashMap<Token, Conn>,
    next: &mut usize,
) -> anyhow::Result<()> {
    loop {
        let mut stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(err) => return Err(err.into()),
        };
        stream.set_nodelay(true)?;
        let token = Token(*next);
        *next += 1;
        let both = Interest::READABLE | Interest::WRITABLE;
        poll.registry().register(&mut stream, token, both)?;
        conns.insert(token, Conn { stream, pending: Vec::new() });
    }
}

impl Conn {
    /// Reads and writes until neither can continue. Returns whether the connection is still open.
    /// `closed` means that the end of the stream has arrived, too.
    fn serve(&mut self, buf: &mut [u8], closed: bool) -> bool {
        loop {
            match self.flush() {
                Ok(true) => {}
                Ok(false) => return true,
                Err(_) => return false,
            }
            let n = match self.stream.read(buf) {
                Ok(0) => return false,
                Ok(n) => n,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return true,
                Err(_) => return false,
            };
            let written = match self.stream.write(&buf[..n]) {
                Ok(written) => written,
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => 0,
                Err(_) => return false,
            };
            self.pending.extend_from_slice(&buf[written..n]);
            // A read that does not fill the buffer has emptied the socket, and later data causes a
            // new event. This saves the read that would return EAGAIN, as in tokio, except when
            // data and the end of the stream have arrived in one event.
            if n < buf.len() && self.pending.is_empty() && !closed {
                return true;
            }
        }
    }

    /// Writes pending bytes. Returns whether none are left.
    fn flush(&mut self) -> io::Result<bool> {
        while !self.pending.is_empty() {
            match self.stream.write(&self.pending) {
                Ok(n) => drop(self.pending.drain(..n)),
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(err) => return Err(err),
            }
        }
        Ok(true)
    }
}
