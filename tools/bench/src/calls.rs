//! Counts the system calls per reply with strace(1).

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::load::{self, Scenario};
use crate::target::Target;

/// How long strace may take to write its report after the server has ended.
const LIMIT: Duration = Duration::from_secs(10);

/// How often a server made each system call, and how many replies it sent meanwhile.
struct Count {
    calls: BTreeMap<String, u64>,
    replies: u64,
}

/// Whether strace is installed and permitted.
pub fn can_count() -> bool {
    let status = Command::new("strace")
        .args(["-c", "-o", "/dev/null", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

/// Returns the calls per reply, on average, of the server that `start` runs under strace with a report for
/// the path that it gets. Takes the difference between a short run and a longer one, so that one-time calls
/// at startup and on connect do not count.
///
/// # Errors
/// The server or strace cannot be run.
pub fn run(
    start: &dyn Fn(&Path) -> anyhow::Result<Target>,
    scenario: &Scenario,
    duration: Duration,
) -> anyhow::Result<BTreeMap<String, f64>> {
    let once = count(start, scenario, Duration::ZERO)?;
    let more = count(start, scenario, duration)?;
    let replies = more.replies.saturating_sub(once.replies) as f64;
    let mut calls = BTreeMap::new();
    for (name, n) in more.calls {
        let n = n.saturating_sub(once.calls.get(&name).copied().unwrap_or(0));
        // Rounded as in the table.
        let per_reply = (n as f64 / replies * 100.0).round() / 100.0;
        if per_reply > 0.0 {
            calls.insert(name, per_reply);
        }
    }
    Ok(calls)
}

fn count(
    start: &dyn Fn(&Path) -> anyhow::Result<Target>,
    scenario: &Scenario,
    duration: Duration,
) -> anyhow::Result<Count> {
    let report = std::env::temp_dir().join(format!("bench-strace-{}", std::process::id()));
    let target = start(&report)?;
    let warm_up = Duration::from_millis(100);
    let figures = load::run(&target, scenario, warm_up, duration)?;
    drop(target);
    let calls = read_report(&report);
    let _ = fs::remove_file(&report);
    Ok(Count { calls: calls?, replies: figures.replies })
}

/// Reads the table of `strace -c`, which is complete when it has its last line.
fn read_report(path: &Path) -> anyhow::Result<BTreeMap<String, u64>> {
    let start = Instant::now();
    loop {
        let report = fs::read_to_string(path).unwrap_or_default();
        if report.lines().next_back().is_some_and(|line| line.trim_end().ends_with(" total")) {
            return parse(&report);
        }
        if start.elapsed() > LIMIT {
            bail!("no report from strace within {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

fn parse(report: &str) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut calls = BTreeMap::new();
    // After the title and a rule: % time, seconds, usecs/call, calls, errors (optional), syscall.
    for line in report.lines().skip(2).take_while(|line| !line.starts_with('-')) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (n, name) = fields.get(3).zip(fields.last()).context("an unexpected strace report")?;
        calls.insert((*name).to_owned(), n.parse().context("an unexpected strace report")?);
    }
    Ok(calls)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read_with_and_without_errors() {
        let report = "\
% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 50.00    0.000200           2       100           read
 50.00    0.000200          20        10         3 accept4
------ ----------- ----------- --------- --------- ----------------
100.00    0.000400           3       110         3 total
";
        let calls = [("accept4".to_owned(), 10), ("read".to_owned(), 100)];
        assert_eq!(parse(report).unwrap(), BTreeMap::from(calls));
    }

    #[test]
    fn an_invalid_report_is_an_error() {
        assert!(parse("a\nb\nstrace: no such thing\n").is_err());
    }
}
