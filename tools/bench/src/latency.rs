//! Latency against load: chapter 12's QPS test, with both of its loops, against the models of chapter 8,
//! which have work to do for each message. Nothing is pinned: two workers need both processors.

use std::env;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::report::{Machine, median};
use crate::target::Target;

/// Everything that one run has measured.
#[derive(Serialize, Deserialize)]
pub struct Latency {
    /// Where it ran.
    pub machine: Machine,
    /// How many times everything was measured.
    pub rounds: u16,
    /// How long each time, in seconds.
    pub seconds: f64,
    /// Two for each server.
    pub lines: Vec<Line>,
}

/// A server under rising load.
#[derive(Serialize, Deserialize)]
pub struct Line {
    /// Its name and how many threads serve the clients.
    pub server: String,
    /// Whether the loop is open: the load is a rate, and not a number of unanswered requests.
    pub open: bool,
    /// In the order of the load. Those at which replies were missing are left out.
    pub points: Vec<Point>,
}

/// A server under one load: medians over the rounds.
#[derive(Serialize, Deserialize)]
pub struct Point {
    /// Replies per second.
    pub rate: f64,
    /// 99 in 100 replies took at most this long, in microseconds.
    pub p99_us: f64,
}

/// The servers: the name, the program and its arguments.
const SERVERS: [(&str, &str, &[&str]); 4] = [
    ("v07", "model-reactor", &[]),
    ("v08, 1 worker", "model-workers", &["1"]),
    ("v08, 2 workers", "model-workers", &["2"]),
    ("tokio, 2 threads", "model-tokio", &["2"]),
];

/// The loads of the closed loop: connections, and unanswered requests of each.
const CLOSED: [(u32, u32); 6] = [(1, 1), (2, 1), (8, 1), (32, 1), (32, 4), (32, 16)];

/// The loads of the open loop, in percent of the highest throughput of the closed one; its connections.
const PERCENTS: [f64; 8] = [10.0, 25.0, 50.0, 75.0, 90.0, 100.0, 105.0, 110.0];
const OPEN_CONNECTIONS: u32 = 32;

impl Latency {
    /// Reads what [`to_json`](Self::to_json) has written.
    ///
    /// # Errors
    /// The text is something else.
    pub fn from_json(text: &str) -> anyhow::Result<Self> {
        serde_json::from_str(text).context("not a run with --latency")
    }

    /// Returns the figures as JSON, indented.
    ///
    /// # Errors
    /// None is known: all of these figures have a JSON form.
    pub fn to_json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Measures every server in every round, so that a change in the machine's speed affects all of them.
    ///
    /// # Errors
    /// A program is missing or fails.
    pub fn run(
        machine: Machine,
        rounds: u16,
        duration: Duration,
        progress: &ProgressBar,
    ) -> anyhow::Result<Self> {
        const LOADS: usize = CLOSED.len() + PERCENTS.len();
        progress.set_length(u64::from(rounds) * (SERVERS.len() * LOADS) as u64);
        let mut figures = [const { [const { Vec::new() }; LOADS] }; SERVERS.len()];
        for _ in 0..rounds {
            for (server, figures) in SERVERS.iter().zip(&mut figures) {
                let measure = |load: String, figures: &mut Vec<Point>| {
                    let what = format!("{}, {load}", server.0);
                    progress.set_message(what.clone());
                    let point = measure(server, &load, duration).context(what)?;
                    progress.inc(1);
                    let rate = point.as_ref().map_or(0.0, |point| point.rate);
                    figures.extend(point);
                    anyhow::Ok(rate)
                };
                let (closed, open) = figures.split_at_mut(CLOSED.len());
                let mut highest = 0.0_f64;
                for ((n, depth), figures) in CLOSED.iter().zip(closed) {
                    let load = format!("--connections={n} --depth={depth}");
                    highest = highest.max(measure(load, figures)?);
                }
                for (percent, figures) in PERCENTS.iter().zip(open) {
                    let rate = (highest * percent / 100.0).max(1.0);
                    measure(format!("--connections={OPEN_CONNECTIONS} --rate={rate:.0}"), figures)?;
                }
            }
        }
        progress.finish_and_clear();
        let mut lines = Vec::new();
        for ((server, ..), figures) in SERVERS.iter().zip(&figures) {
            let (closed, open) = figures.split_at(CLOSED.len());
            for (open, loads) in [(false, closed), (true, open)] {
                let points = loads.iter().filter_map(|turns| {
                    let rate = median(turns.iter().map(|turn| turn.rate))?;
                    Some(Point { rate, p99_us: median(turns.iter().map(|turn| turn.p99_us))? })
                });
                lines.push(Line { server: (*server).to_owned(), open, points: points.collect() });
            }
        }
        Ok(Self { machine, rounds, seconds: duration.as_secs_f64(), lines })
    }
}

/// Starts a server and loads it once. `None` if replies were missing a second after the end: the load was an
/// open loop far above what the server can do.
fn measure(
    (_, server, args): &(&str, &str, &[&str]),
    load: &str,
    duration: Duration,
) -> anyhow::Result<Option<Point>> {
    const TEST: &str = "reactor-v12-qps";
    let beside = |name: &str| anyhow::Ok(Command::new(env::current_exe()?.with_file_name(name)));
    let mut server = beside(server)?;
    server.args(*args);
    let target = Target::start(server, None)?;
    let output = beside(TEST)?
        // The figures follow the text.
        .args(["--json", "/dev/stdout", "--addr", &target.addr.to_string()])
        .args(load.split_whitespace())
        .args(["--duration", &duration.as_secs_f64().to_string()])
        .output()
        .context(TEST)?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    if stderr.contains("replies are missing") {
        return Ok(None);
    }
    ensure!(output.status.success(), "{TEST}: {}", stderr.trim());
    let stdout = String::from_utf8(output.stdout)?;
    let json: Value = serde_json::from_str(stdout.lines().last().context(TEST)?)?;
    let figures = (json["throughput_per_s"].as_f64(), json["latency_us"]["p99"].as_f64());
    let (Some(rate), Some(p99_us)) = figures else { bail!("{TEST}: {json}") };
    Ok(Some(Point { rate, p99_us }))
}
