//! Compares the models of chapter 8: the same work for each message, on one or two threads, unpinned. The
//! load comes from the same machine, so the figures say what a model costs, and not how far it scales.

use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use bench::load::{self, Scenario};
use bench::target::Target;
use clap::Parser;

/// Compares a thread per client, one reactor, workers and tokio, with 20 µs of work per message.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The number of rounds
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// How long to load each server in a round, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    seconds: u64,
    /// Connections x requests in flight on each x bytes of a request
    #[arg(long, value_name = "CxPxB", default_value = "50x16x64")]
    scenario: Scenario,
}

/// The programs, how many threads each is told to have, and what it is.
const MODELS: [(&str, &str, &str); 6] = [
    ("model-threads", "", "a thread per client"),
    ("model-reactor", "", "one reactor (v07)"),
    ("model-workers", "1", "acceptor and 1 worker (v08)"),
    ("model-workers", "2", "acceptor and 2 workers (v08)"),
    ("model-tokio", "1", "tokio, multi-thread, 1 worker"),
    ("model-tokio", "2", "tokio, multi-thread, 2 workers"),
];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let duration = Duration::from_secs(args.seconds);
    let mut figures = [const { Vec::new() }; MODELS.len()];
    // In every round, so that a change in the machine's speed affects all of them.
    for _ in 0..args.rounds {
        for ((program, threads, name), figures) in MODELS.iter().zip(&mut figures) {
            let mut command = Command::new(std::env::current_exe()?.with_file_name(program));
            command.args((!threads.is_empty()).then_some(threads));
            let target = Target::start(command, None)?;
            let run = load::run(&target, &args.scenario, duration / 4, duration).context(*name)?;
            let replies: u64 = run.cells.iter().map(|cell| cell.replies).sum();
            let rate = replies as f64 / run.elapsed.as_secs_f64();
            figures.push((rate, run.cpu.as_nanos() as f64 / replies as f64));
        }
    }
    println!("| model | replies per second | CPU per reply |");
    println!("|---|---:|---:|");
    for ((_, _, name), mut figures) in MODELS.iter().zip(figures) {
        figures.sort_by(|one, other| one.0.total_cmp(&other.0));
        let (rate, cpu) = figures[figures.len() / 2];
        println!("| {name} | {rate:.0} | {:.1} µs |", cpu / 1000.0);
    }
    Ok(())
}
