//! The QPS test of chapter 12: how many requests per second a server answers, and how soon.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::value_parser;
use common::bell::Bell;
use common::buf_pool::BufPool;
use common::cli::{self, Addr};
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::limit::FULL;
use common::mailbox::{StopOnDrop, mailbox};
use common::net;
use common::signal::StopSignals;
use common::tcp_conn::{Progress, TcpConn};
use hdrhistogram::Histogram;
use prost::Message;

/// How long an attempt to connect may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How often the progress is shown.
const PROGRESS: Duration = Duration::from_secs(1);

/// How long replies may take after the end.
const LAST_REPLIES: Duration = Duration::from_secs(1);

/// The resolution of the loop's timers. A request that is sent late by less than this counts from when
/// it was sent: that was not the server's fault.
const TICK: Duration = Duration::from_millis(1);

/// The high-water mark: how many requests of a connection may be unanswered. With a rate, what is
/// due beyond that is sent later, and counts as late. So the output stays far below the mark above
/// which a `TcpConn` does not read.
const MAX_DEPTH: u16 = 4096;

/// The limit on the buffers of all threads together, in bytes.
const POOL_CAP: usize = 1 << 30;

/// The replies to all threads since the progress was last shown.
static REPLIES: AtomicU64 = AtomicU64::new(0);

/// Chapter 12, the QPS test: how many requests per second a server answers, and how soon.
/// Try it: cargo run --release -p reactor-v12 --bin reactor-v12-qps -- --connections 100
#[derive(Clone, clap::Parser)]
#[command(name = "reactor-v12-qps", version, verbatim_doc_comment)]
struct Args {
    /// The server: an IPv4 address, an IPv6 address in brackets or a name
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    addr: Addr,

    /// How many connections, 1 to 50000
    #[arg(long, value_name = "N", default_value_t = 10)]
    #[arg(value_parser = value_parser!(u16).range(1..=50_000))]
    connections: u16,

    /// How many threads share the connections, 1 to 1024; no more than there are connections
    #[arg(long, value_name = "M", default_value_t = 1)]
    #[arg(value_parser = value_parser!(u16).range(1..=1024))]
    threads: u16,

    /// Closed loop: how many requests per connection are unanswered at any time, 1 to 4096; ignored
    /// with --rate
    #[arg(long, value_name = "D", default_value_t = 1)]
    #[arg(value_parser = value_parser!(u16).range(1..=MAX_DEPTH.into()))]
    depth: u16,

    /// Open loop: how many requests per second are sent in all, 1 to 10000000, whether earlier ones
    /// are answered or not; the latency counts from when a request was due
    #[arg(long, value_name = "R", value_parser = value_parser!(u64).range(1..=10_000_000))]
    rate: Option<u64>,

    /// How long to measure; Ctrl-C ends it early
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = cli::parse_seconds)]
    duration: Duration,

    /// Also write the figures to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What has been measured.
struct Figures {
    /// The time from sending a request to its reply, in nanoseconds; with a rate, the time from when
    /// the request was due.
    latency: Histogram<u64>,
    /// How many replies have not come.
    missing: u64,
    /// From the start to the end and the last reply.
    elapsed: Duration,
}

fn main() -> ExitCode {
    cli::run(|mut args: Args| {
        args.threads = args.threads.min(args.connections);
        // Emptied now: the figures of an earlier run must not survive a failure.
        let open = |path: &PathBuf| File::create(path).with_context(|| cannot_write(path));
        let json = args.json.as_ref().map(open).transpose()?;
        let Figures { latency, missing, elapsed } = measure(&args)?;
        let (replies, throughput) = (latency.len(), latency.len() as f64 / elapsed.as_secs_f64());
        let micros = [0.5, 0.99, 0.999, 1.0].map(|q| latency.value_at_quantile(q) as f64 / 1000.0);
        let [p50, p99, p99_9, max] = micros;
        writeln!(
            io::stdout(),
            "replies     {replies}\n\
             throughput  {throughput:.0} per second\n\
             latency     p50 {p50:.1} µs, p99 {p99:.1} µs, p99.9 {p99_9:.1} µs, max {max:.1} µs"
        )
        .context("cannot print")?;
        ensure!(missing == 0, "{missing} replies are missing a second after the end");
        let (Some(mut file), Some(path)) = (json, &args.json) else { return Ok(()) };
        writeln!(
            file,
            "{{\"replies\": {replies}, \"throughput_per_s\": {throughput:.1}, \"latency_us\": {{\"p50\": \
             {p50:.1}, \"p99\": {p99:.1}, \"p99_9\": {p99_9:.1}, \"max\": {max:.1}}}}}"
        )
        .with_context(|| cannot_write(path))
    })
}

fn cannot_write(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// Connects, and measures in threads of their own, each with an event loop.
fn measure(args: &Args) -> Result<Figures> {
    net::raise_fd_limit();
    let mut shares: Vec<Vec<_>> = (0..args.threads).map(|_| Vec::new()).collect();
    for number in 0..args.connections {
        shares[usize::from(number % args.threads)].push((number.into(), connect(&args.addr)?));
    }
    let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
    let signals = StopSignals::register(&mut event_loop).context("cannot watch for signals")?;
    let (ended, mut inbox) = mailbox().context("cannot create a mailbox")?;
    inbox.register(&mut event_loop, EventLoop::stop_callback)?;
    let stop = Arc::new(Bell::new().context("cannot create a bell")?);
    let (start, mut threads) = (Instant::now(), Vec::new());
    for share in shares {
        let (args, stop, ended) = (args.clone(), Arc::clone(&stop), StopOnDrop(ended.clone()));
        let thread = move || {
            // Even a panic stops the main thread's loop.
            let _ended: StopOnDrop<()> = ended;
            Load::run(args, share, &stop)
        };
        threads.push(thread::Builder::new().spawn(thread).context("cannot start a thread")?);
    }
    if io::stderr().is_terminal() {
        event_loop.run_after(PROGRESS, Token::default(), progress_callback)?;
    }
    event_loop.event_process(&mut start.clone())?;
    // A signal, or the failure of a thread; otherwise each ends by itself.
    if start.elapsed() < args.duration {
        signals.restore_default(&mut event_loop)?;
        stop.ring();
    }
    let (latency, missing, elapsed) = (Histogram::new(3)?, 0, Duration::ZERO);
    let mut total = Figures { latency, missing, elapsed };
    for thread in threads {
        let figures = thread.join().map_err(|_| anyhow!("a thread panicked"))??;
        total.latency.add(figures.latency)?;
        total.missing += figures.missing;
        total.elapsed = total.elapsed.max(figures.elapsed);
    }
    Ok(total)
}

/// Connects to the first of the addresses that accepts.
fn connect(addr: &Addr) -> Result<(TcpStream, SocketAddr)> {
    let mut result = Err(io::ErrorKind::AddrNotAvailable.into());
    for peer in addr.resolved() {
        result = TcpStream::connect_timeout(peer, CONNECT_LIMIT)
            .and_then(|stream| net::connect_result(&stream).map(|()| (stream, *peer)));
        if result.is_ok() {
            break;
        }
    }
    result.with_context(|| format!("cannot connect to {addr}"))
}

/// `shown` is when the progress was last shown.
fn progress_callback(
    shown: &mut Instant,
    event_loop: &mut EventLoop<Instant>,
    token: Token,
) -> Result<()> {
    let per_second = REPLIES.swap(0, Ordering::Relaxed) as f64 / shown.elapsed().as_secs_f64();
    *shown = Instant::now();
    // A terminal that is gone shows nothing, which is no failure.
    let _ = writeln!(io::stderr(), "{per_second:.0} replies per second");
    event_loop.run_after(PROGRESS, token, progress_callback)?;
    Ok(())
}

/// The C++ course's `echoMessage.proto`, without a generated file: prost derives the codec.
#[derive(PartialEq, prost::Message)]
struct EchoMessage {
    #[prost(string, tag = "1")]
    content: String,
    #[prost(int32, tag = "2")]
    id: i32,
}

/// The state of a thread's loop. Its times are counted from `start`.
struct Load {
    args: Args,
    conns: Vec<Conn>,
    /// Where a token's connection is in `conns`.
    indices: HashMap<Token, usize>,
    start: Instant,
    /// From then on, no request is due. Without a rate, that is known when it comes.
    end: Duration,
    /// With a rate: how many requests have been due so far. The connections take turns.
    turns: u64,
    sent: u64,
    latency: Histogram<u64>,
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
    /// The id of each unanswered request, and from when on its latency counts.
    unanswered: VecDeque<(i32, Duration)>,
}

impl Load {
    /// The whole life of a thread. Each stream comes with its number and peer. `stop` ends the load
    /// early.
    fn run(
        args: Args,
        streams: Vec<(u64, (TcpStream, SocketAddr))>,
        stop: &Bell,
    ) -> Result<Figures> {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let pool = BufPool::new(POOL_CAP / usize::from(args.threads));
        let (mut conns, mut indices) = (Vec::new(), HashMap::new());
        for (number, (stream, peer)) in streams {
            let callbacks = Callbacks {
                read: Some(Self::conn_rd_callback as _),
                write: Some(Self::conn_wt_callback as _),
            };
            let tcp = TcpConn::new(&mut event_loop, stream, peer, &pool, callbacks)?;
            indices.insert(tcp.token, conns.len());
            conns.push(Conn { tcp, number, sent: 0, unanswered: VecDeque::new() });
        }
        let mut load = Self {
            end: args.rate.map_or(Duration::MAX, |_| args.duration),
            args,
            conns,
            indices,
            start: Instant::now(),
            turns: 0,
            sent: 0,
            latency: Histogram::new(3)?,
            request: EchoMessage { content: "Hello Lars!!!".to_owned(), id: 0 },
            reply: EchoMessage::default(),
            encoded: Vec::new(),
        };
        let callbacks = Callbacks { read: Some(EventLoop::stop_callback as _), write: None };
        let stop_token = event_loop.add_io_event(stop, Interest::READ, callbacks)?;
        event_loop.run_after(load.args.duration, stop_token, EventLoop::stop_callback)?;
        (0..load.conns.len()).try_for_each(|index| load.send(&mut event_loop, index))?;
        load.tick_callback(&mut event_loop, stop_token)?;
        event_loop.event_process(&mut load)?;

        event_loop.del_io_event(stop, stop_token)?;
        load.end = load.end.min(load.start.elapsed());
        load.tick_callback(&mut event_loop, stop_token)?;
        let (limit, mut left) = (Instant::now() + LAST_REPLIES, LAST_REPLIES);
        while load.sent > load.latency.len() && !left.is_zero() {
            left = limit.saturating_duration_since(Instant::now());
            // In the end without waiting: this thread may be late, and its replies there.
            event_loop.poll_once(&mut load, Some(left))?;
        }
        // With a rate, some may have been due, but not sent.
        let missing = load.sent.max(load.turns) - load.latency.len();
        Ok(Figures { latency: load.latency, missing, elapsed: load.start.elapsed() })
    }

    /// With a rate: sends what is due, and sets a timer for what is due next.
    fn tick_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        let (now, n, before) = (self.start.elapsed(), self.conns.len() as u64, self.turns);
        let next = loop {
            let number = self.conns[(self.turns % n) as usize].number;
            let Some(due) = due(&self.args, number, self.turns / n) else { return Ok(()) };
            if due > now || due >= self.end {
                break due;
            }
            self.turns += 1;
        };
        // All that a connection has to send leaves together.
        for turn in before..self.turns.min(before + n) {
            self.send(event_loop, (turn % n) as usize)?;
        }
        if next < self.end {
            let delay = next.saturating_sub(self.start.elapsed());
            event_loop.run_after(delay, token, Self::tick_callback)?;
        }
        Ok(())
    }

    /// Sends the requests of a connection that are due, and what is left of earlier ones.
    fn send(&mut self, event_loop: &mut EventLoop<Self>, index: usize) -> Result<()> {
        let (conn, now) = (&mut self.conns[index], self.start.elapsed());
        let depth = if self.args.rate.is_some() { MAX_DEPTH } else { self.args.depth };
        while conn.unanswered.len() < depth.into() {
            let due = due(&self.args, conn.number, conn.sent).unwrap_or(now);
            if due > now || due >= self.end {
                break;
            }
            // Each connection counts from elsewhere, so that a mix-up shows. Not negative.
            self.request.id = ((conn.number << 16) + conn.sent) as i32 & i32::MAX;
            self.encoded.clear();
            self.request.encode(&mut self.encoded)?;
            conn.tcp.send_message(&self.encoded, 1)?;
            conn.unanswered.push_back((self.request.id, now.min(due + TICK)));
            conn.sent += 1;
            self.sent += 1;
        }
        // There was always room, so no reply has been held back: see `MAX_DEPTH`.
        let progress = conn.tcp.do_write(event_loop, |_, _, _| Ok(()));
        go_on(&conn.tcp, progress)
    }

    fn conn_wt_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        self.send(event_loop, self.indices[&token])
    }

    /// Reads and checks replies, and sends the next requests.
    fn conn_rd_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        let (index, now) = (self.indices[&token], self.start.elapsed());
        let (conn, before) = (&mut self.conns[index], self.latency.len());
        let progress = conn.tcp.do_read(event_loop, |_, payload, id| {
            ensure!((id, payload) != FULL, "the server is full");
            // Others are not replies: a welcome, or what another client has published.
            if id != 1 {
                return Ok(());
            }
            let (id, since) = conn.unanswered.pop_front().context("a reply without a request")?;
            self.request.id = id;
            self.reply.clear();
            self.reply.merge(payload).context("wrong reply")?;
            let (reply, request) = (&self.reply, &self.request);
            ensure!(reply == request, "wrong reply: {reply:?} to {request:?}");
            self.latency.record((now - since).as_nanos() as u64)?;
            Ok(())
        });
        go_on(&conn.tcp, progress)?;
        REPLIES.fetch_add(self.latency.len() - before, Ordering::Relaxed);
        self.send(event_loop, index)
    }
}

/// No connection may end before the test does.
fn go_on(conn: &TcpConn, progress: Progress) -> Result<()> {
    let why = match progress {
        Ok(ControlFlow::Continue(())) => return Ok(()),
        Ok(ControlFlow::Break(why)) => {
            why.unwrap_or_else(|| anyhow!("the server has closed the connection"))
        }
        Err(err) => err.into(),
    };
    Err(why.context(conn.peer.to_string()))
}

/// When a connection's request is due, counted from the start. `None` without a rate.
fn due(args: &Args, number: u64, request: u64) -> Option<Duration> {
    let (rate, k) = (args.rate?, request * u64::from(args.connections) + number);
    // Less than 10^9 nanoseconds, because the remainder is less than `rate`.
    Some(Duration::new(k / rate, (k % rate * 1_000_000_000 / rate) as u32))
}
