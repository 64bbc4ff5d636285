//! One thread's share of the load: an event loop with its connections.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Token};
use common::limit::FULL;
use common::mailbox::Inbox;
use common::tcp_conn::TcpConn;
use hdrhistogram::Histogram;
use prost::Message;

use crate::Args;

/// The high-water mark: how many requests of a connection may be unanswered. With a rate, what is
/// due beyond that is sent later, and counts as late. So the output stays far below the mark above
/// which a `TcpConn` does not read.
pub const MAX_DEPTH: usize = 4096;

/// How long replies may take after the end.
const LAST_REPLIES: Duration = Duration::from_secs(1);

/// The resolution of the loop's timers. A request that is sent late by less than this counts from when
/// it was sent: that was not the server's fault.
const TICK: Duration = Duration::from_millis(1);

/// The limit on the buffers of all threads together, in bytes.
const POOL_CAP: usize = 1 << 30;

/// The C++ course's `echoMessage.proto`, without a generated file: prost derives the codec.
#[derive(PartialEq, prost::Message)]
struct EchoMessage {
    #[prost(string, tag = "1")]
    content: String,
    #[prost(int32, tag = "2")]
    id: i32,
}

/// What has been measured.
pub struct Figures {
    /// The time from sending a request to its reply, in nanoseconds; with a rate, the time from when
    /// the request was due.
    pub latency: Histogram<u64>,
    /// How many replies have not come.
    pub missing: u64,
    /// From the start to the end, or to a later last reply.
    pub elapsed: Duration,
}

impl Figures {
    pub fn new() -> Result<Self> {
        // Up to a day, the longest duration, and more; three digits.
        let latency = Histogram::new_with_bounds(1, 100_000_000_000_000, 3)?;
        Ok(Self { latency, missing: 0, elapsed: Duration::ZERO })
    }

    pub fn add(&mut self, other: &Self) -> Result<()> {
        self.latency.add(&other.latency)?;
        self.missing += other.missing;
        self.elapsed = self.elapsed.max(other.elapsed);
        Ok(())
    }
}

/// The state of a thread's loop.
pub struct Load {
    args: Args,
    conns: Vec<Conn>,
    /// Where a token's connection is in `conns`. None ever leaves.
    indices: HashMap<Token, usize>,
    start: Instant,
    /// Set when only the last replies are waited for.
    ended: bool,
    /// With a rate: how many requests have been due so far. The connections take turns.
    turns: u64,
    /// How many requests are unanswered.
    in_flight: usize,
    figures: Figures,
    /// The replies to all threads, to show the progress.
    replies: Arc<AtomicU64>,
    /// Ends the load early.
    inbox: Inbox<()>,
    // Used again for each message, so that none allocates.
    request: EchoMessage,
    reply: EchoMessage,
    encoded: Vec<u8>,
}

struct Conn {
    tcp: TcpConn,
    /// Its number among those of all threads.
    number: u64,
    sent: u64,
    /// How many requests may have been sent by now.
    allowed: u64,
    /// From when on the latency of each unanswered request counts.
    since: VecDeque<Instant>,
}

impl Load {
    /// The whole life of a thread. Each stream comes with its peer and its number.
    pub fn run(
        args: Args,
        streams: Vec<(TcpStream, SocketAddr, u64)>,
        inbox: Inbox<()>,
        replies: Arc<AtomicU64>,
    ) -> Result<Figures> {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let mut load = Self {
            args,
            conns: Vec::new(),
            indices: HashMap::new(),
            start: Instant::now(),
            ended: false,
            turns: 0,
            in_flight: 0,
            figures: Figures::new()?,
            replies,
            inbox,
            request: EchoMessage { content: "Hello Lars!!!".to_owned(), id: 0 },
            reply: EchoMessage::default(),
            encoded: Vec::new(),
        };
        load.inbox.register(&mut event_loop, Self::end_callback)?;
        let pool = BufPool::new(POOL_CAP / usize::from(load.args.threads));
        for (stream, peer, number) in streams {
            let callbacks = Callbacks {
                read: Some(Self::conn_rd_callback as _),
                write: Some(Self::conn_wt_callback as _),
            };
            let tcp = TcpConn::new(&mut event_loop, stream, peer, &pool, callbacks)?;
            load.indices.insert(tcp.token, load.conns.len());
            let allowed = if load.args.rate.is_some() { 0 } else { u64::MAX };
            load.conns.push(Conn { tcp, number, sent: 0, allowed, since: VecDeque::new() });
        }
        load.start = Instant::now();
        event_loop.run_after(load.args.duration, Token::default(), Self::end_callback)?;
        (0..load.conns.len()).try_for_each(|index| load.send(&mut event_loop, index))?;
        load.tick_callback(&mut event_loop, Token::default())?;
        event_loop.event_process(&mut load)?;

        let unsent: u64 = load.conns.iter().map(|conn| conn.allowed - conn.sent).sum();
        load.figures.missing = unsent + load.in_flight as u64;
        Ok(load.figures)
    }

    /// With a rate: sends everything that is due, and sets a timer for what is due next.
    fn tick_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        if self.ended {
            return Ok(());
        }
        let (elapsed, n, before) = (self.start.elapsed(), self.conns.len(), self.turns);
        let next = loop {
            let conn = &mut self.conns[self.turns as usize % n];
            let Some(due) = due(&self.args, conn.number, conn.allowed) else { return Ok(()) };
            if due > elapsed || due >= self.args.duration {
                break due;
            }
            conn.allowed += 1;
            self.turns += 1;
        };
        // All that a connection has to send leaves together.
        for turn in before..self.turns.min(before + n as u64) {
            self.send(event_loop, turn as usize % n)?;
        }
        if next < self.args.duration {
            let delay = next.saturating_sub(self.start.elapsed());
            event_loop.run_after(delay, token, Self::tick_callback)?;
        }
        Ok(())
    }

    /// The time is over, or the program is to stop: waits only for the last replies.
    fn end_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        self.inbox.take()?;
        if self.ended {
            return Ok(());
        }
        self.tick_callback(event_loop, token)?;
        self.ended = true;
        self.figures.elapsed = self.start.elapsed();
        if self.args.rate.is_none() {
            self.conns.iter_mut().for_each(|conn| conn.allowed = conn.sent);
        }
        let limit = if self.in_flight > 0 { LAST_REPLIES } else { Duration::ZERO };
        event_loop.run_after(limit, token, EventLoop::stop_callback)?;
        Ok(())
    }

    fn conn_rd_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        let (index, before) = (self.indices[&token], self.in_flight);
        self.step(event_loop, index, true)?;
        let replies = before - self.in_flight;
        self.replies.fetch_add(replies as u64, Ordering::Relaxed);
        self.send(event_loop, index)?;
        if self.ended && self.in_flight == 0 {
            event_loop.stop();
        }
        Ok(())
    }

    fn conn_wt_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        self.step(event_loop, self.indices[&token], false)
    }

    /// Sends the requests that the connection may send.
    fn send(&mut self, event_loop: &mut EventLoop<Self>, index: usize) -> Result<()> {
        let (conn, before) = (&mut self.conns[index], self.in_flight);
        let depth = if self.args.rate.is_some() { MAX_DEPTH } else { self.args.depth.into() };
        let now = Instant::now();
        while conn.sent < conn.allowed && conn.since.len() < depth {
            let due = due(&self.args, conn.number, conn.sent);
            conn.since.push_back(due.map_or(now, |due| now.min(self.start + due + TICK)));
            self.request.id = request_id(conn.number, conn.sent);
            self.encoded.clear();
            self.request.encode(&mut self.encoded)?;
            conn.tcp.send_message(&self.encoded, 1)?;
            conn.sent += 1;
            self.in_flight += 1;
        }
        if self.in_flight > before { self.step(event_loop, index, false) } else { Ok(()) }
    }

    /// Reads and checks replies, or writes what is queued.
    fn step(&mut self, event_loop: &mut EventLoop<Self>, index: usize, read: bool) -> Result<()> {
        let now = Instant::now();
        let Conn { tcp, number, sent, since, .. } = &mut self.conns[index];
        let on_message = |_: &mut TcpConn, payload: &[u8], id| {
            ensure!((id, payload) != FULL, "the server is full");
            // Others are not replies: a welcome, or what another client has published.
            if id != 1 {
                return Ok(());
            }
            self.request.id = request_id(*number, *sent - since.len() as u64);
            let since = since.pop_front().context("a reply without a request")?;
            self.reply.clear();
            self.reply.merge(payload).context("wrong reply")?;
            let (reply, request) = (&self.reply, &self.request);
            ensure!(reply == request, "wrong reply: {reply:?} to {request:?}");
            self.figures.latency.saturating_record((now - since).as_nanos() as u64);
            self.figures.elapsed = now - self.start;
            self.in_flight -= 1;
            Ok(())
        };
        let progress = if read {
            tcp.do_read(event_loop, on_message)
        } else {
            tcp.do_write(event_loop, on_message)
        };
        let why = match progress {
            Ok(ControlFlow::Continue(())) => return Ok(()),
            Ok(ControlFlow::Break(why)) => {
                why.unwrap_or_else(|| anyhow!("the server has closed the connection"))
            }
            Err(err) => err.into(),
        };
        Err(why.context(tcp.peer.to_string()))
    }
}

/// When a connection's request is due, counted from the start. `None` without a rate.
fn due(args: &Args, number: u64, request: u64) -> Option<Duration> {
    let (rate, k) = (args.rate?, request * args.connections + number);
    // Less than 10^9 nanoseconds, because the remainder is less than `rate`.
    Some(Duration::new(k / rate, (k % rate * 1_000_000_000 / rate) as u32))
}

/// The id of a connection's request, 0 to 2^31 - 1. Each connection counts from elsewhere, so that a
/// mix-up shows.
fn request_id(number: u64, request: u64) -> i32 {
    ((number << 16) + request) as i32 & i32::MAX
}
