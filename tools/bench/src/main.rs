//! The bench program: measures every chapter and every peer in turn, and prints tables.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use bench::latency::Latency;
use bench::load::{self, Scenario};
use bench::report::{Accept, Calls, Idle, Load, Machine, Report, TABLES};
use bench::target::{self, Server, Target};
use bench::{accept, calls, idle, udp};
use clap::Parser;
use common::net;
use indicatif::{ProgressBar, ProgressStyle};
use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::Pid;

/// Benchmarks the chapters and the servers they are compared with. Every server is measured in
/// every round, so that a change in the machine's speed affects all of them.
#[derive(Parser)]
#[command(version, bin_name = "scripts/bench.sh")]
struct Args {
    /// One short round of everything, in a minute: only for a first impression
    #[arg(long, conflicts_with_all = ["rounds", "seconds"])]
    quick: bool,
    /// The number of rounds
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// How long to load each server in a round, per scenario
    #[arg(long, default_value = "2", value_parser = parse_seconds)]
    seconds: Duration,
    /// Connections x requests in flight on each x bytes of a request; after a +, more connections
    /// that load the server meanwhile but are not measured; after udp:, sockets with one request each
    #[arg(
        long,
        value_name = "[udp:]CxPxB[+CxPxB]",
        value_delimiter = ',',
        default_value = "1x1x64,50x1x64,1000x1x64,50x16x64,10x4x16384,1x8x65535,100x1x64,\
                         100x1x64+1x8x65535,udp:1x1x64,udp:50x1x64"
    )]
    scenarios: Vec<Scenario>,
    /// The servers to measure; ratios are to the first [default: floor, the chapters, the peers]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    servers: Vec<String>,
    /// The number of idle connections for the memory measurement; 0 skips it
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    idle: usize,
    /// Do not measure how many clients a server accepts per second
    #[arg(long)]
    no_accept: bool,
    /// Do not count system calls, which needs strace
    #[arg(long)]
    no_calls: bool,
    /// Also write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Instead of all that, measure latency against load, with reactor-v12-qps, and write it to this file;
    /// with --rounds 3 --seconds 1 this takes three minutes
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    latency: Option<PathBuf>,
}

/// The scenarios for which system calls are counted.
const CALLS: [&str; 2] = ["1x1x64", "50x1x64"];

/// Fails now rather than after ten minutes. The old contents stay until the run is over.
fn ensure_writable(path: &Path) -> anyhow::Result<()> {
    let file = fs::OpenOptions::new().append(true).create(true).open(path);
    file.map(drop).with_context(|| format!("cannot write {}", path.display()))
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds
        .filter(|duration| !duration.is_zero())
        .ok_or_else(|| "expected a number of seconds, above 0".to_owned())
}

/// What to measure, where and for how long.
struct Bench {
    servers: Vec<Server>,
    duration: Duration,
    server_cpu: usize,
    progress: ProgressBar,
    report: Report,
}

fn main() -> anyhow::Result<()> {
    let mut args = Args::parse();
    if args.quick {
        (args.rounds, args.seconds) = (1, Duration::from_millis(500));
    }
    // Before a new file is created, which would make the work tree dirty.
    let machine = Machine::this_one();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} left: {msg}")?;
    let progress = ProgressBar::new(0).with_style(style);
    if let Some(path) = &args.latency {
        ensure_writable(path)?;
        let latency = Latency::run(machine, args.rounds, args.seconds, &progress)?;
        return fs::write(path, latency.to_json()?)
            .with_context(|| format!("cannot write {}", path.display()));
    }
    if args.servers.is_empty() {
        args.servers = Server::all()?;
    }
    net::raise_fd_limit();
    let (fds, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // The program itself needs some, too.
    let needed = args.idle as u64 + 32;
    ensure!(fds >= needed, "--idle {} needs {needed} fds, the limit is {fds}", args.idle);
    let servers: Vec<Server> =
        args.servers.iter().map(|name| Server { name: name.clone() }).collect();
    for server in &servers {
        server.command()?;
    }
    for scenario in &args.scenarios {
        let first = servers.first().context("no servers")?;
        let name = &first.name;
        ensure!(can_serve(first, scenario), "ratios are to {name}, which cannot serve {scenario}");
    }
    if let Some(path) = &args.json {
        ensure_writable(path)?;
    }
    let (server_cpu, load_cpu) = target::processors()?;
    target::pin(Pid::from_raw(0), load_cpu)?;
    let count = !args.no_calls && calls::can_count();
    if !args.no_calls && !count {
        eprintln!("not counting system calls: strace is not installed or not permitted");
    }

    let mut bench = Bench {
        duration: args.seconds,
        server_cpu,
        progress,
        report: Report {
            machine,
            rounds: args.rounds.into(),
            seconds: args.seconds.as_secs_f64(),
            servers: args.servers,
            scenarios: args.scenarios.iter().map(Scenario::to_string).collect(),
            loads: Vec::new(),
            accepts: Vec::new(),
            idle: Vec::new(),
            calls: Vec::new(),
        },
        servers,
    };
    bench.measure(&args.scenarios, args.idle, !args.no_accept, count)?;
    if let Some(path) = &args.json {
        fs::write(path, bench.report.to_json()?)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    print(&bench.report);
    Ok(())
}

/// One measurement.
enum Turn<'a> {
    Load(usize, &'a Server, &'a Scenario),
    Accept(usize, &'a Server),
    Idle(&'a Server, usize),
    Calls(&'a Server, Scenario),
}

impl Bench {
    fn measure(
        &mut self,
        scenarios: &[Scenario],
        idle: usize,
        accept: bool,
        count: bool,
    ) -> anyhow::Result<()> {
        let servers = self.servers.clone();
        let mut turns = Vec::new();
        for round in 0..self.report.rounds {
            for scenario in scenarios {
                let able = servers.iter().filter(|server| can_serve(server, scenario));
                turns.extend(able.map(|server| Turn::Load(round, server, scenario)));
            }
            if accept {
                turns.extend(servers.iter().map(|server| Turn::Accept(round, server)));
            }
        }
        if idle > 0 {
            let able = servers.iter().filter(|server| server.serves_many());
            turns.extend(able.map(|server| Turn::Idle(server, idle)));
        }
        for scenario in CALLS.iter().filter(|_| count) {
            let scenario: Scenario = scenario.parse().map_err(anyhow::Error::msg)?;
            let able = servers.iter().filter(|server| can_serve(server, &scenario));
            turns.extend(able.map(|server| Turn::Calls(server, scenario.clone())));
        }
        self.progress.set_length(turns.len().try_into()?);
        for turn in turns {
            self.take(turn)?;
            self.progress.inc(1);
        }
        self.progress.finish_and_clear();
        Ok(())
    }

    fn take(&mut self, turn: Turn<'_>) -> anyhow::Result<()> {
        match turn {
            Turn::Load(round, server, scenario) => {
                let what = self.say(server, scenario.to_string());
                let load = self.load(round, server, scenario).context(what)?;
                self.report.loads.push(load);
            }
            Turn::Accept(round, server) => {
                let what = self.say(server, "accepting clients".to_owned());
                let accept = self.accept(round, server).context(what)?;
                self.report.accepts.push(accept);
            }
            Turn::Idle(server, connections) => {
                let what = self.say(server, format!("{connections} idle connections"));
                let idle = self.idle(server, connections).context(what)?;
                self.report.idle.push(idle);
            }
            Turn::Calls(server, scenario) => {
                let what = self.say(server, format!("{scenario} under strace"));
                let calls = self.calls(server, &scenario).context(what)?;
                self.report.calls.push(calls);
            }
        }
        Ok(())
    }

    fn say(&self, server: &Server, what: String) -> String {
        let what = format!("{}, {what}", server.name);
        self.progress.set_message(what.clone());
        what
    }

    fn load(&self, round: usize, server: &Server, scenario: &Scenario) -> anyhow::Result<Load> {
        let command = if scenario.udp { server.command_udp() } else { server.command() };
        let target = Target::start(command?, Some(self.server_cpu))?;
        let run = if scenario.udp { udp::run } else { load::run };
        let figures = run(&target, scenario, self.duration / 4, self.duration)?;
        let first = &figures.cells[0];
        let all: u64 = figures.cells.iter().map(|cell| cell.replies).sum();
        let others = figures.cells.iter().zip(&scenario.cells).skip(1);
        let beside: u64 = others.map(|(cell, of)| cell.replies * of.bytes as u64).sum();
        let quantile = |q| first.latency.value_at_quantile(q) as f64 / 1000.0;
        Ok(Load {
            server: server.name.clone(),
            scenario: scenario.to_string(),
            round,
            rate: first.replies as f64 / figures.elapsed.as_secs_f64(),
            cpu_ns: figures.cpu.as_nanos() as f64 / all as f64,
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            beside: beside as f64 / figures.elapsed.as_secs_f64(),
        })
    }

    fn accept(&self, round: usize, server: &Server) -> anyhow::Result<Accept> {
        let target = Target::start(server.command()?, Some(self.server_cpu))?;
        let figures = accept::run(&target, server.echoes(), self.duration)?;
        Ok(Accept {
            server: server.name.clone(),
            round,
            rate: figures.clients as f64 / figures.elapsed.as_secs_f64(),
            cpu_ns: figures.cpu.as_nanos() as f64 / figures.clients as f64,
        })
    }

    fn idle(&self, server: &Server, connections: usize) -> anyhow::Result<Idle> {
        let target = Target::start(server.command()?, Some(self.server_cpu))?;
        let idle::Memory { start, connected, echoed, burst } = idle::run(&target, connections)?;
        Ok(Idle { server: server.name.clone(), connections, start, connected, echoed, burst })
    }

    fn calls(&self, server: &Server, scenario: &Scenario) -> anyhow::Result<Calls> {
        let start = |report: &Path| {
            Target::start(target::counted(&server.command()?, report), Some(self.server_cpu))
        };
        let per_reply = calls::run(&start, scenario, self.duration)?;
        Ok(Calls { server: server.name.clone(), scenario: scenario.to_string(), per_reply })
    }
}

/// A server that serves one client at a time can only take scenarios with one connection.
fn can_serve(server: &Server, scenario: &Scenario) -> bool {
    if scenario.udp {
        return server.serves_udp();
    }
    let connections: usize = scenario.cells.iter().map(|cell| cell.connections).sum();
    server.echoes() && (connections == 1 || server.serves_many())
}

fn print(report: &Report) {
    for (_, title, table) in TABLES {
        let table = table(report);
        // Two lines are a title without rows.
        if table.lines().count() != 2 {
            println!("{title}\n{table}");
        }
    }
}
