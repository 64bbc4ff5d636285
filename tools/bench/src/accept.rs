//! Measures how many clients per second a server accepts, a few at a time. Each one connects, has
//! one message echoed or reads the greeting, and leaves.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::{message, net};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt::Linger};

use crate::target::Target;

/// How many clients are connected at a time.
const AT_A_TIME: usize = 16;

/// The greeting of chapter 1.
const HELLO: &[u8] = b"hello Lars\n";

/// The results.
pub struct Figures {
    /// How many clients were served.
    pub clients: u64,
    /// How long the measurement took.
    pub elapsed: Duration,
    /// The CPU time that the server used meanwhile.
    pub cpu: Duration,
}

struct Load {
    addr: SocketAddr,
    /// What each client sends: nothing, if the server says hello.
    request: Vec<u8>,
    /// What each client receives.
    reply: Vec<u8>,
    clients: HashMap<Token, Client>,
    served: u64,
}

struct Client {
    stream: TcpStream,
    received: Vec<u8>,
}

/// Connects clients to `target` for `duration`. If it echoes, each one sends a message of 64 bytes.
///
/// # Errors
/// A client fails, or a reply is wrong.
pub fn run(target: &Target, echoes: bool, duration: Duration) -> anyhow::Result<Figures> {
    let mut request = Vec::new();
    if echoes {
        request.extend(message::encode_header(1, 64 - message::HEADER_LEN)?);
        request.resize(64, 7);
    }
    let mut event_loop = EventLoop::new()?;
    let reply = if echoes { request.clone() } else { HELLO.to_vec() };
    let (addr, clients) = (target.addr, HashMap::new());
    let mut load = Load { addr, request, reply, clients, served: 0 };
    for _ in 0..AT_A_TIME {
        load.connect(&mut event_loop)?;
    }
    event_loop.run_after(duration, Token::default(), EventLoop::stop_callback)?;
    let (start, cpu) = (Instant::now(), target.cpu()?);
    event_loop.event_process(&mut load)?;
    let (elapsed, cpu) = (start.elapsed(), target.cpu()? - cpu);
    Ok(Figures { clients: load.served, elapsed, cpu })
}

impl Load {
    fn connect(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let stream = net::connect(self.addr)?;
        // Closing with a reset leaves no TIME_WAIT, which would soon use up the ports.
        setsockopt(&stream, Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        let callbacks = Callbacks { read: Some(Self::receive), write: Some(Self::send) };
        let token = event_loop.add_io_event(&stream, Interest::WRITE, callbacks)?;
        self.clients.insert(token, Client { stream, received: Vec::new() });
        Ok(())
    }

    /// Called when a client is connected: sends its request.
    fn send(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> anyhow::Result<()> {
        let Some(Client { stream, .. }) = self.clients.get_mut(&token) else { return Ok(()) };
        if let Some(err) = stream.take_error()? {
            return Err(err).context("cannot connect to the server");
        }
        stream.write_all(&self.request).context("sending a request")?;
        Ok(event_loop.set_interest(&*stream, token, Interest::READ)?)
    }

    /// Called when a reply arrives: replaces a client that has been served by a new one.
    fn receive(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> anyhow::Result<()> {
        let Some(client) = self.clients.get_mut(&token) else { return Ok(()) };
        let mut bytes = [0; 256];
        match client.stream.read(&mut bytes) {
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(err) => return Err(err).context("reading a reply"),
            Ok(0) => bail!("the server closed after {} bytes", client.received.len()),
            Ok(n) => client.received.extend_from_slice(&bytes[..n]),
        }
        ensure!(self.reply.starts_with(&client.received), "a reply is wrong");
        if client.received.len() < self.reply.len() {
            return Ok(());
        }
        event_loop.del_io_event(&client.stream, token)?;
        self.clients.remove(&token);
        self.served += 1;
        self.connect(event_loop)
    }
}
