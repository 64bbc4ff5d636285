//! A closed-loop load over UDP: each socket has one request in flight, and sends the next one when the
//! reply arrives. It asks again if there is none, because datagrams may get lost. Verifies every byte.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::mem;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message::{self, HEADER_LEN};

use crate::load::{CellFigures, Figures, Scenario};
use crate::target::Target;

/// How long to wait for a reply before asking again.
const PATIENCE: Duration = Duration::from_millis(100);

/// Where the number of a request ends, after its header.
const NUMBERED: usize = HEADER_LEN + 8;

struct Load {
    sockets: HashMap<Token, Socket>,
    figures: CellFigures,
    scratch: Vec<u8>,
}

struct Socket {
    socket: UdpSocket,
    number: u64,
    /// The header, the number, and bytes that stay the same.
    request: Vec<u8>,
    /// When the request was sent for the first time.
    begun: Instant,
    /// And for the last time.
    sent: Instant,
}

/// Loads `target` with the first cell for `warm_up`, and then for `duration`, which is measured.
///
/// # Errors
/// A socket fails, a reply differs from its request, or there are no replies.
pub fn run(
    target: &Target,
    scenario: &Scenario,
    warm_up: Duration,
    duration: Duration,
) -> anyhow::Result<Figures> {
    let cell = scenario.cells.first().context("no cell")?;
    let mut event_loop = EventLoop::new()?;
    let (sockets, scratch) = (HashMap::new(), vec![0; 65_536]);
    let mut load = Load { sockets, figures: CellFigures::new()?, scratch };
    for seed in 0..cell.connections {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.connect(target.addr)?;
        socket.set_nonblocking(true)?;
        let callbacks = Callbacks { read: Some(Load::read_callback), write: None };
        let token = event_loop.add_io_event(&socket, Interest::READ, callbacks)?;
        let mut request = message::encode_header(1, cell.bytes - HEADER_LEN)?.to_vec();
        request.extend((HEADER_LEN..cell.bytes).map(|i| (i ^ seed) as u8));
        let now = Instant::now();
        let mut socket = Socket { socket, number: 0, request, begun: now, sent: now };
        socket.send_next()?;
        load.sockets.insert(token, socket);
    }
    event_loop.run_after(PATIENCE, Token::default(), Load::ask_again_callback)?;
    load.run_for(&mut event_loop, warm_up)?;
    let before = mem::take(&mut load.figures.replies);
    load.figures.latency.reset();
    let (start, cpu) = (Instant::now(), target.cpu()?);
    load.run_for(&mut event_loop, duration)?;
    let (elapsed, cpu) = (start.elapsed(), target.cpu()? - cpu);
    ensure!(load.figures.replies > 0, "no reply in {duration:?}");
    let replies = before + load.figures.replies;
    Ok(Figures { cells: vec![load.figures], replies, elapsed, cpu })
}

impl Load {
    fn run_for(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        duration: Duration,
    ) -> anyhow::Result<()> {
        event_loop.run_after(duration, Token::default(), EventLoop::stop_callback)?;
        event_loop.event_process(self)
    }

    fn read_callback(&mut self, _: &mut EventLoop<Self>, token: Token) -> anyhow::Result<()> {
        let Some(socket) = self.sockets.get_mut(&token) else { return Ok(()) };
        let n = match socket.socket.recv(&mut self.scratch) {
            Ok(n) => n,
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(err) => return Err(err).context("receiving a reply"),
        };
        if socket.is_reply(&self.scratch[..n])? {
            self.figures.replies += 1;
            self.figures.latency.saturating_record(socket.begun.elapsed().as_nanos() as u64);
            socket.send_next()?;
        }
        Ok(())
    }

    fn ask_again_callback(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
    ) -> anyhow::Result<()> {
        let mut late = self.sockets.values_mut().filter(|socket| socket.sent.elapsed() > PATIENCE);
        late.try_for_each(Socket::send)?;
        event_loop.run_after(PATIENCE, token, Self::ask_again_callback)?;
        Ok(())
    }
}

impl Socket {
    /// Whether it is the reply to the last request. A late one to an earlier request is none.
    fn is_reply(&self, reply: &[u8]) -> anyhow::Result<bool> {
        if reply == self.request {
            return Ok(true);
        }
        let mut earlier = self.request.clone();
        if let Some(number) = reply.get(HEADER_LEN..NUMBERED) {
            earlier[HEADER_LEN..NUMBERED].copy_from_slice(number);
        }
        let number =
            earlier[HEADER_LEN..NUMBERED].iter().rfold(0, |n, &byte| n << 8 | u64::from(byte));
        ensure!(reply == earlier && number < self.number, "a reply differs from its request");
        Ok(false)
    }

    fn send_next(&mut self) -> anyhow::Result<()> {
        self.number += 1;
        self.request[HEADER_LEN..NUMBERED].copy_from_slice(&self.number.to_le_bytes());
        self.begun = Instant::now();
        self.send()
    }

    fn send(&mut self) -> anyhow::Result<()> {
        self.sent = Instant::now();
        match self.socket.send(&self.request) {
            Ok(_) => Ok(()),
            // Lost like any other datagram.
            Err(err) if err.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(err) => bail!("sending a request: {err}"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_request_has_a_reply_and_a_wrong_byte_is_detected() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(server.local_addr().unwrap()).unwrap();
        let (request, now) = (vec![7; 64], Instant::now());
        let mut socket = Socket { socket, number: 0, request, begun: now, sent: now };
        let mut requests = Vec::new();
        for _ in 0..3 {
            socket.send_next().unwrap();
            let mut request = [0; 64];
            assert_eq!(server.recv(&mut request).unwrap(), 64);
            requests.push(request);
        }
        assert!(!socket.is_reply(&requests[0]).unwrap() && !socket.is_reply(&requests[1]).unwrap());
        assert!(socket.is_reply(&requests[2]).unwrap());
        for wrong in [0, 8, 40] {
            let mut reply = requests[2];
            reply[wrong] ^= 0x80;
            socket.is_reply(&reply).unwrap_err();
        }
        socket.is_reply(&requests[2][..63]).unwrap_err();
    }
}
