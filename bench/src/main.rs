//! Runs every chapter and every peer in turn and prints what each request costs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use bench::load::{self, Cell};
use bench::target::{self, Target};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use nix::unistd::Pid;

/// Measures the chapters of the course beside their peers: every server has its turn in every
/// round, so that a machine that changes its speed changes it for all.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// How many rounds
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// For how long each server is loaded in a turn
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    seconds: f64,
    /// How many connections, requests under way on each, and bytes in a request
    #[arg(
        long,
        value_name = "CxPxB",
        value_delimiter = ',',
        default_value = "1x1x64,50x1x64,1000x1x64,50x16x64,10x4x16384"
    )]
    cells: Vec<Cell>,
    /// Which servers; ratios are to the first one
    #[arg(
        long,
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "floor,reactor-v03,reactor-v04,peer-mio,peer-tokio,peer-tokio-codec"
    )]
    servers: Vec<String>,
}

/// What one server did in one round with one cell.
struct Turn {
    /// Replies per second.
    rate: f64,
    /// The server's processor time per request, in nanoseconds.
    cpu: f64,
    /// Half of the requests, 99 in 100 and 999 in 1,000 took no longer, in microseconds.
    latency: [f64; 3],
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let (server_cpu, load_cpu) = target::processors()?;
    target::pin(Pid::from_raw(0), load_cpu)?;
    let exe = std::env::current_exe()?;
    let folder = exe.parent().context("this program is in no folder")?;

    let turns = args.rounds * args.cells.len() * args.servers.len();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len}, {eta} more: {msg}")?;
    let progress = ProgressBar::new(turns.try_into()?).with_style(style);
    // By cell, then by server, then by round.
    let mut results: Vec<Vec<Vec<Turn>>> = Vec::new();
    results.resize_with(args.cells.len(), || args.servers.iter().map(|_| Vec::new()).collect());
    for _ in 0..args.rounds {
        for (cell, results) in args.cells.iter().zip(&mut results) {
            for (server, results) in args.servers.iter().zip(results) {
                progress.set_message(format!("{server} {cell}"));
                results.push(
                    run(folder, server, *cell, args.seconds, server_cpu)
                        .with_context(|| format!("{server} at {cell}"))?,
                );
                progress.inc(1);
            }
        }
    }
    progress.finish_and_clear();
    for (cell, results) in args.cells.iter().zip(&results) {
        print(*cell, &args.servers, results);
    }
    Ok(())
}

fn run(
    folder: &Path,
    server: &str,
    cell: Cell,
    seconds: f64,
    server_cpu: usize,
) -> anyhow::Result<Turn> {
    let exe: PathBuf = folder.join(server);
    let chapter = server.starts_with("reactor-");
    let args: &[&str] = if chapter { &["--addr", "127.0.0.1:0"] } else { &[] };
    let target = Target::start(&exe, args, server_cpu)?;
    let duration = Duration::try_from_secs_f64(seconds)?;
    let figures = load::run(&target, cell, duration / 4, duration)?;
    let quantile = |q| figures.latency.value_at_quantile(q) as f64 / 1000.0;
    let latency = [0.5, 0.99, 0.999].map(quantile);
    Ok(Turn { rate: figures.rate, cpu: figures.cpu, latency })
}

/// Medians over the rounds, of the ratios too: each is to the first server in the same round.
fn print(cell: Cell, servers: &[String], results: &[Vec<Turn>]) {
    println!("{cell} (connections x requests under way x bytes)");
    println!(
        "  {:18} {:>7} {:>10} {:>11} {:>9} {:>9} {:>9}",
        "server", "ratio", "cpu ns", "requests/s", "p50 us", "p99 us", "p99.9 us"
    );
    for (server, turns) in servers.iter().zip(results) {
        let floor = results[0].iter();
        println!(
            "  {server:18} {:7.3} {:10.0} {:11.0} {:9.1} {:9.1} {:9.1}",
            median(turns.iter().zip(floor).map(|(turn, floor)| turn.cpu / floor.cpu)),
            median(turns.iter().map(|turn| turn.cpu)),
            median(turns.iter().map(|turn| turn.rate)),
            median(turns.iter().map(|turn| turn.latency[0])),
            median(turns.iter().map(|turn| turn.latency[1])),
            median(turns.iter().map(|turn| turn.latency[2])),
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
