//! A closed-loop load: each connection keeps a fixed number of requests in flight, and sends the
//! next one when a reply arrives. Runs on the course's own event loop, and verifies every byte.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::mem;
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message;
use hdrhistogram::Histogram;

use crate::target::Target;

/// How many different requests a connection sends, in turn, so that a mix-up shows.
const VARIETY: usize = 8;

/// How long it may take until each client has received a reply.
const START_LIMIT: Duration = Duration::from_secs(20);

/// A group of connections with the same load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cell {
    /// How many connections.
    pub connections: usize,
    /// How many requests each of them has in flight.
    pub pipeline: usize,
    /// The size of a request and of its reply, in bytes, including a header.
    pub bytes: usize,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.connections, self.pipeline, self.bytes)
    }
}

impl FromStr for Cell {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let numbers: Option<Vec<usize>> =
            text.split('x').map(|n| n.parse().ok().filter(|&n| n > 0)).collect();
        match numbers.as_deref() {
            // A message has a header of 8 bytes.
            Some(&[connections, pipeline, bytes]) if (8..=65_535).contains(&bytes) => {
                Ok(Self { connections, pipeline, bytes })
            }
            _ => Err("expected CONNECTIONSxPIPELINExBYTES, with 8 to 65535 bytes".to_owned()),
        }
    }
}

/// What the name of a scenario over UDP begins with.
pub const UDP: &str = "udp:";

/// The cell to measure, and optionally cells that load the server at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scenario {
    /// Over UDP there is only one.
    pub cells: Vec<Cell>,
    /// Whether the load is over UDP, with a socket for each connection.
    pub udp: bool,
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.udp { UDP } else { "" })?;
        for (n, cell) in self.cells.iter().enumerate() {
            if n > 0 {
                f.write_str("+")?;
            }
            cell.fmt(f)?;
        }
        Ok(())
    }
}

impl FromStr for Scenario {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (udp, cells) = text.strip_prefix(UDP).map_or((false, text), |cells| (true, cells));
        let cells: Vec<Cell> = cells.split('+').map(str::parse).collect::<Result<_, _>>()?;
        // A numbered request, and the longest datagram over IPv4.
        let fits = |cell: &Cell| cell.pipeline == 1 && (16..=65_507).contains(&cell.bytes);
        if udp && !matches!(&cells[..], [cell] if fits(cell)) {
            return Err("expected udp:CONNECTIONSx1xBYTES, with 16 to 65507 bytes".to_owned());
        }
        Ok(Self { cells, udp })
    }
}

/// The results.
pub struct Figures {
    /// One entry per cell of the scenario.
    pub cells: Vec<CellFigures>,
    /// The number of replies to all cells, including those before the measurement.
    pub replies: u64,
    /// How long the measurement took.
    pub elapsed: Duration,
    /// The CPU time that the server used meanwhile.
    pub cpu: Duration,
}

/// The results of one cell.
pub struct CellFigures {
    /// The number of replies during the measurement.
    pub replies: u64,
    /// The time from sending a request to receiving its reply, in nanoseconds.
    pub latency: Histogram<u64>,
}

impl CellFigures {
    /// Without a reply.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let latency = Histogram::new_with_bounds(1, 60_000_000_000, 3)?;
        Ok(Self { replies: 0, latency })
    }
}

struct Load {
    conns: HashMap<Token, Conn>,
    cells: Vec<Cell>,
    figures: Vec<CellFigures>,
    /// How many connections have not received a reply yet.
    silent: usize,
    scratch: Vec<u8>,
}

struct Conn {
    stream: TcpStream,
    /// The index of its cell.
    cell: usize,
    /// The size of a request, in bytes.
    bytes: usize,
    /// `VARIETY` requests, one after another. They are sent again and again, and the replies are
    /// the same.
    requests: Vec<u8>,
    sent: u64,
    received: u64,
    /// How many bytes it may send: `pipeline` requests more than have been answered completely.
    allowed: u64,
    /// When each request in flight was sent.
    times: VecDeque<Instant>,
}

/// Loads `target` for `warm_up`, and then for `duration`, which is measured.
///
/// # Errors
/// A connection fails, a reply differs from its request, or there are no replies.
pub fn run(
    target: &Target,
    scenario: &Scenario,
    warm_up: Duration,
    duration: Duration,
) -> anyhow::Result<Figures> {
    let mut event_loop = EventLoop::new()?;
    let mut load = Load {
        conns: HashMap::new(),
        cells: scenario.cells.clone(),
        figures: Vec::new(),
        silent: 0,
        scratch: vec![0; 256 * 1024],
    };
    for (number, cell) in scenario.cells.iter().enumerate() {
        load.figures.push(CellFigures::new()?);
        for _ in 0..cell.connections {
            load.connect(&mut event_loop, target.addr, number)?;
        }
    }
    // Wait until every connection has been accepted and served once.
    load.silent = load.conns.len();
    load.run_for(&mut event_loop, START_LIMIT)?;
    ensure!(load.silent == 0, "{} clients without a reply in {START_LIMIT:?}", load.silent);
    load.run_for(&mut event_loop, warm_up)?;

    let mut replies = 0;
    for cell in &mut load.figures {
        replies += mem::take(&mut cell.replies);
        cell.latency.reset();
    }
    let (start, cpu) = (Instant::now(), target.cpu()?);
    load.run_for(&mut event_loop, duration)?;
    let (elapsed, cpu) = (start.elapsed(), target.cpu()? - cpu);
    let dead = load.figures.iter().any(|cell| cell.replies == 0);
    ensure!(!dead || duration.is_zero(), "no reply in {duration:?}");
    replies += load.figures.iter().map(|cell| cell.replies).sum::<u64>();
    Ok(Figures { cells: load.figures, replies, elapsed, cpu })
}

impl Load {
    fn connect(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        addr: SocketAddr,
        cell: usize,
    ) -> anyhow::Result<()> {
        let stream = TcpStream::connect(addr).context("cannot connect to the server")?;
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let callbacks =
            Callbacks { read: Some(Self::read_callback), write: Some(Self::write_callback) };
        let interest = Interest { read: true, write: true };
        let token = event_loop.add_io_event(&stream, interest, callbacks)?;
        let Cell { pipeline, bytes, .. } = self.cells[cell];
        let conn = Conn {
            stream,
            cell,
            bytes,
            requests: requests(bytes, self.conns.len())?,
            sent: 0,
            received: 0,
            allowed: (pipeline * bytes) as u64,
            times: VecDeque::new(),
        };
        self.conns.insert(token, conn);
        Ok(())
    }

    fn run_for(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        duration: Duration,
    ) -> anyhow::Result<()> {
        let timer = event_loop.run_after(duration, Token::default(), EventLoop::stop_callback)?;
        event_loop.event_process(self)?;
        event_loop.cancel_timer(timer);
        Ok(())
    }

    fn read_callback(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
    ) -> anyhow::Result<()> {
        let Some(conn) = self.conns.get_mut(&token) else { return Ok(()) };
        let had_none = conn.received < conn.bytes as u64;
        let figures = &mut self.figures[conn.cell];
        conn.receive(&mut self.scratch, |nanos| {
            figures.replies += 1;
            figures.latency.saturating_record(nanos);
        })?;
        if had_none && conn.received >= conn.bytes as u64 {
            self.silent -= 1;
            if self.silent == 0 {
                event_loop.stop();
            }
        }
        conn.send(event_loop, token)
    }

    fn write_callback(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
    ) -> anyhow::Result<()> {
        let Some(conn) = self.conns.get_mut(&token) else { return Ok(()) };
        conn.send(event_loop, token)
    }
}

/// Messages of chapter 4; for the other servers these are bytes like any others.
fn requests(bytes: usize, number: usize) -> anyhow::Result<Vec<u8>> {
    let mut requests = Vec::with_capacity(VARIETY * bytes);
    for n in 0..VARIETY {
        let length = bytes - message::HEADER_LEN;
        // From chapter 6 on, servers echo only messages with id 1.
        requests.extend(message::encode_header(1, length)?);
        requests.extend((0..length).map(|i| (i ^ number ^ (n << 5)) as u8));
    }
    Ok(requests)
}

impl Conn {
    fn receive(&mut self, scratch: &mut [u8], mut done: impl FnMut(u64)) -> anyhow::Result<()> {
        let n = match (&self.stream).read(scratch) {
            Ok(0) => bail!("the server closed a connection"),
            Ok(n) => n,
            Err(err) if err.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(err) => return Err(err).context("reading a reply"),
        };
        let mut rest = &scratch[..n];
        while !rest.is_empty() {
            let expected = &self.requests[self.received as usize % self.requests.len()..];
            let (part, next) = rest.split_at(rest.len().min(expected.len()));
            if *part != expected[..part.len()] {
                bail!("a reply differs from its request, near byte {}", self.received);
            }
            self.received += part.len() as u64;
            rest = next;
        }
        let bytes = self.bytes as u64;
        let whole = self.received / bytes;
        let now = Instant::now();
        while self.times.len() as u64 > self.sent.div_ceil(bytes) - whole {
            if let Some(time) = self.times.pop_front() {
                done((now - time).as_nanos() as u64);
                self.allowed += bytes;
            }
        }
        Ok(())
    }

    fn send(&mut self, event_loop: &mut EventLoop<Load>, token: Token) -> anyhow::Result<()> {
        let bytes = self.bytes as u64;
        while self.sent < self.allowed {
            let start = self.sent as usize % self.requests.len();
            let end = self.requests.len().min(start + (self.allowed - self.sent) as usize);
            let now = Instant::now();
            let n = match (&self.stream).write(&self.requests[start..end]) {
                Ok(n) => n,
                Err(err) if err.kind() == ErrorKind::WouldBlock => break,
                Err(err) => return Err(err).context("sending a request"),
            };
            let before = self.sent.div_ceil(bytes);
            self.sent += n as u64;
            let begun = self.sent.div_ceil(bytes) - before;
            self.times.extend((0..begun).map(|_| now));
        }
        let write = self.sent < self.allowed;
        event_loop.set_interest(&self.stream, token, Interest { read: true, write })?;
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A connection that has sent its first request of 64 bytes, and the server's end of it.
    fn conn() -> (Conn, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let requests = requests(64, 3).unwrap();
        let times = VecDeque::from([Instant::now()]);
        let conn = Conn {
            stream,
            cell: 0,
            bytes: 64,
            requests,
            sent: 64,
            received: 0,
            allowed: 64,
            times,
        };
        (conn, listener.accept().unwrap().0)
    }

    /// Sends `reply` from the server. Returns the number of complete replies.
    fn receive(conn: &mut Conn, server: &mut TcpStream, reply: &[u8]) -> anyhow::Result<usize> {
        server.write_all(reply).unwrap();
        let mut done = 0;
        conn.receive(&mut [0; 256], |_| done += 1).map(|()| done)
    }

    #[test]
    fn a_reply_counts_when_it_is_complete() {
        let (mut conn, mut server) = conn();
        let reply = conn.requests[..64].to_vec();
        assert_eq!(receive(&mut conn, &mut server, &reply[..63]).unwrap(), 0);
        assert_eq!(receive(&mut conn, &mut server, &reply[63..]).unwrap(), 1);
        assert_eq!(conn.allowed, 128);
    }

    #[test]
    fn a_wrong_byte_is_detected() {
        let (mut conn, mut server) = conn();
        let mut reply = conn.requests[..64].to_vec();
        reply[40] ^= 1;
        let err = receive(&mut conn, &mut server, &reply).unwrap_err();
        assert!(err.to_string().contains("differs from its request"), "{err}");
    }

    #[test]
    fn scenarios_are_parsed_as_they_are_printed() {
        for text in ["1x1x64", "100x1x64+1x8x65535", "udp:50x1x65507"] {
            assert_eq!(text.parse::<Scenario>().unwrap().to_string(), text);
        }
        let tcp = ["", "1x1", "0x1x64", "1x1x7", "1x1x65536", "1x1x64+", "1x1x64x1"];
        let udp = ["udp:", "udp:1x2x64", "udp:1x1x15", "udp:1x1x65508", "udp:1x1x64+1x1x64"];
        for text in [&tcp[..], &udp].concat() {
            assert!(text.parse::<Scenario>().is_err(), "{text:?}");
        }
    }
}
