//! The QPS test of chapter 12: how many requests per second a server answers, and how soon.

mod load;

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::mem;
use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::value_parser;
use common::cli::{self, Addr};
use common::event_loop::{EventLoop, Token};
use common::mailbox::{Inbox, Mailbox, mailbox};
use common::net;
use common::signal::StopSignals;

use crate::load::{Figures, Load, MAX_DEPTH};

/// How long an attempt to connect may take.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How often the progress is shown.
const PROGRESS: Duration = Duration::from_secs(1);

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
    #[arg(value_parser = value_parser!(u64).range(1..=50_000))]
    connections: u64,

    /// How many threads share the connections, 1 to 1024; no more than there are connections
    #[arg(long, value_name = "M", default_value_t = 1)]
    #[arg(value_parser = value_parser!(u16).range(1..=1024))]
    threads: u16,

    /// Closed loop: how many requests per connection are unanswered at any time, 1 to 4096; ignored
    /// with --rate
    #[arg(long, value_name = "D", default_value_t = 1)]
    #[arg(value_parser = value_parser!(u16).range(1..=MAX_DEPTH as i64))]
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

fn main() -> ExitCode {
    cli::run(|mut args: Args| {
        args.threads = args.threads.min(u16::try_from(args.connections).unwrap_or(u16::MAX));
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

/// The state of the main thread's loop, while the others measure.
struct Run {
    threads: Vec<Mailbox<()>>,
    /// What each thread has measured comes here when it ends.
    inbox: Inbox<Result<Figures>>,
    ended: usize,
    total: Figures,
    /// The replies to all threads.
    replies: Arc<AtomicU64>,
    /// When the progress was last shown, and how many replies there were.
    shown: (Instant, u64),
}

/// Connects, and measures in threads of their own, until all have ended or one has failed.
fn measure(args: &Args) -> Result<Figures> {
    net::raise_fd_limit();
    let mut shares: Vec<Vec<_>> = (0..args.threads).map(|_| Vec::new()).collect();
    for number in 0..args.connections {
        let (stream, peer) = connect(&args.addr)?;
        let thread = number as usize % shares.len();
        shares[thread].push((stream, peer, number));
    }
    let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
    let signals = StopSignals::register(&mut event_loop).context("cannot watch for signals")?;
    let (done, mut inbox) = mailbox().context("cannot create a mailbox")?;
    inbox.register(&mut event_loop, Run::inbox_callback)?;
    let (replies, shown) = (Arc::new(AtomicU64::new(0)), (Instant::now(), 0));
    let total = Figures::new()?;
    let mut run = Run { threads: Vec::new(), inbox, ended: 0, total, replies, shown };
    for share in shares {
        let (mailbox, inbox) = mailbox().context("cannot create a mailbox")?;
        run.threads.push(mailbox);
        let (args, done, replies) = (args.clone(), done.clone(), Arc::clone(&run.replies));
        let thread = move || {
            // A panic must not leave the main thread waiting.
            let load = AssertUnwindSafe(|| Load::run(args, share, inbox, replies));
            let result = catch_unwind(load).unwrap_or_else(|_| Err(anyhow!("a thread panicked")));
            // Not taken if the program is ending.
            let _ = done.post(result);
        };
        thread::Builder::new().spawn(thread).context("cannot start a thread")?;
    }
    if io::stderr().is_terminal() {
        event_loop.run_after(PROGRESS, Token::default(), Run::progress_callback)?;
    }
    event_loop.event_process(&mut run)?;
    // After a signal; otherwise all have ended.
    signals.restore_default(&mut event_loop)?;
    run.threads.iter().for_each(Mailbox::stop);
    while run.ended < run.threads.len() {
        event_loop.poll_once(&mut run, None)?;
    }
    Ok(run.total)
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

impl Run {
    /// Threads have ended. The failure of one ends the program.
    fn inbox_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        for figures in self.inbox.take()?.into_iter().flatten() {
            self.total.add(&figures?)?;
            self.ended += 1;
        }
        if self.ended == self.threads.len() {
            event_loop.stop();
        }
        Ok(())
    }

    fn progress_callback(&mut self, event_loop: &mut EventLoop<Self>, token: Token) -> Result<()> {
        let (now, replies) = (Instant::now(), self.replies.load(Ordering::Relaxed));
        let (before, had) = mem::replace(&mut self.shown, (now, replies));
        let per_second = (replies - had) as f64 / (now - before).as_secs_f64();
        // A terminal that is gone shows nothing, which is no failure.
        let _ = writeln!(io::stderr(), "{per_second:.0} replies per second");
        event_loop.run_after(PROGRESS, token, Self::progress_callback)?;
        Ok(())
    }
}
