//! The figures of a run, as they are stored, and the tables made from them.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::load::UDP;

/// Everything that one run of the bench program has measured.
#[derive(Serialize, Deserialize)]
pub struct Report {
    /// Where it ran.
    pub machine: Machine,
    /// How many times everything was measured.
    pub rounds: usize,
    /// How long each time, in seconds.
    pub seconds: f64,
    /// The servers; ratios are to the first.
    pub servers: Vec<String>,
    /// The loads on the servers.
    pub scenarios: Vec<String>,
    /// One entry for each server, scenario and round.
    pub loads: Vec<Load>,
    /// One entry for each server and round.
    pub accepts: Vec<Accept>,
    /// One entry for each server.
    pub idle: Vec<Idle>,
    /// One entry for each server and scenario, or none without strace.
    pub calls: Vec<Calls>,
}

/// The machine that was measured.
#[derive(Serialize, Deserialize)]
pub struct Machine {
    /// The model name of the processor.
    pub processor: String,
    /// How many processors there were.
    pub processors: usize,
    /// The version of Linux.
    pub kernel: String,
    /// TCP's congestion control, typically cubic. It limits the rate of large messages.
    pub congestion_control: String,
    /// The output of `rustc --version`.
    pub rustc: String,
    /// The commit that was measured, with `-dirty` if there were other changes.
    pub commit: String,
}

/// One measurement of one server under load.
#[derive(Serialize, Deserialize)]
pub struct Load {
    /// Its name.
    pub server: String,
    /// Connections x requests in flight x bytes; after a `+`, the load beside it; `udp:` before it all
    /// if it is over UDP.
    pub scenario: String,
    /// The number of the round, from 0.
    pub round: usize,
    /// Replies per second to the first cell.
    pub rate: f64,
    /// The server's CPU time per reply to any cell, in nanoseconds.
    pub cpu_ns: f64,
    /// Half of the replies to the first cell took at most this long, in microseconds.
    pub p50_us: f64,
    /// The same for 99 in 100.
    pub p99_us: f64,
    /// The same for 999 in 1,000.
    pub p999_us: f64,
    /// The rate at which the other cells were echoed meanwhile, in bytes per second.
    pub beside: f64,
}

/// One measurement of one server accepting clients.
#[derive(Serialize, Deserialize)]
pub struct Accept {
    /// Its name.
    pub server: String,
    /// The number of the round, from 0.
    pub round: usize,
    /// Clients per second.
    pub rate: f64,
    /// The server's CPU time per client, in nanoseconds.
    pub cpu_ns: f64,
}

/// The resident memory of one server.
#[derive(Serialize, Deserialize)]
pub struct Idle {
    /// Its name.
    pub server: String,
    /// The number of clients.
    pub connections: usize,
    /// Before any client has connected, in bytes.
    pub start: u64,
    /// With all clients connected, in bytes.
    pub connected: u64,
    /// After each client, one after another, has sent a message and got it back, in bytes.
    pub echoed: u64,
    /// After all clients together have sent a message, and then got it back, in bytes.
    pub burst: u64,
}

/// The system calls of one server per reply, on average.
#[derive(Serialize, Deserialize)]
pub struct Calls {
    /// Its name.
    pub server: String,
    /// Connections x requests in flight x bytes.
    pub scenario: String,
    /// By the name of the call.
    pub per_reply: BTreeMap<String, f64>,
}

impl Machine {
    /// Describes the machine that this runs on. What cannot be determined is `unknown`.
    pub fn this_one() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name\t: "));
        let sysctl = |name| match fs::read_to_string(Path::new("/proc/sys").join(name)) {
            Ok(value) => value.trim().to_owned(),
            Err(_) => unknown(),
        };
        Self {
            processor: model.map_or_else(unknown, str::to_owned),
            processors: thread::available_parallelism().map_or(0, usize::from),
            kernel: sysctl("kernel/osrelease"),
            congestion_control: sysctl("net/ipv4/tcp_congestion_control"),
            rustc: output_of("rustc", &["--version"]),
            commit: output_of("git", &["-C", crate::ROOT, "describe", "--always", "--dirty"]),
        }
    }
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn output_of(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().ok();
    let text = output.filter(|output| output.status.success()).map(|output| output.stdout);
    text.map_or_else(unknown, |text| String::from_utf8_lossy(&text).trim().to_owned())
}

/// Makes a table in Markdown.
pub type Table = fn(&Report) -> String;

/// The tables: the name by which pages include one, its title, and the function that makes it.
pub const TABLES: [(&str, &str, Table); 10] = [
    ("machine", "The machine", Report::machine),
    (
        "cpu",
        "CPU time per reply; for the other servers, as a ratio to the first one in the same round",
        Report::cpu,
    ),
    ("rate", "Replies per second", Report::rate),
    ("latency", "Latency in microseconds: p50 / p99 / p99.9", Report::latency),
    ("stream", "One connection that streams large messages, each way", Report::stream),
    (
        "fairness",
        "Fairness: the p99 of 100 clients that ping, alone and beside one that sends at full speed",
        Report::fairness,
    ),
    (
        "udp",
        "UDP: CPU time per datagram echoed; for the chapters, as a ratio to the first one in the same round",
        Report::udp,
    ),
    ("accept", "Clients accepted per second, 16 at a time", Report::accept),
    ("idle", "Resident memory", Report::idle),
    ("calls", "System calls per reply, by strace", Report::calls),
];

/// Separates the first cell of a scenario from the load beside it.
const BESIDE: char = '+';

impl Report {
    /// Reads what [`to_json`](Self::to_json) has written.
    ///
    /// # Errors
    /// The text is something else.
    pub fn from_json(text: &str) -> anyhow::Result<Self> {
        serde_json::from_str(text).context("not a report of the bench program")
    }

    /// Returns the report as JSON, indented.
    ///
    /// # Errors
    /// None is known: all of these figures have a JSON form.
    pub fn to_json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Returns a table by its name, in Markdown.
    pub fn table(&self, name: &str) -> Option<String> {
        TABLES.iter().find(|(of, ..)| *of == name).map(|(.., table)| table(self))
    }

    fn machine(&self) -> String {
        let Machine { processor, processors, kernel, congestion_control, rustc, commit } =
            &self.machine;
        let Self { rounds, seconds, .. } = self;
        let s = if *rounds == 1 { "" } else { "s" };
        format!(
            "{processor}, {processors} processors, Linux {kernel}, TCP {congestion_control}, \
             {rustc}, commit {commit}; medians of {rounds} round{s} of {seconds} s per server; \
             memory and system calls measured once.\n"
        )
    }

    /// CPU time per reply, as a ratio to the first server in the same round.
    fn cpu(&self) -> String {
        self.ratios(|scenario| self.is_plain(scenario))
    }

    /// The same for datagrams.
    fn udp(&self) -> String {
        self.ratios(|scenario| scenario.starts_with(UDP))
    }

    fn ratios(&self, wanted: impl Fn(&str) -> bool) -> String {
        let first = &self.servers[0];
        self.by_scenario(wanted, |server, scenario| {
            let ratio = median(self.loads_of(server, scenario).filter_map(|turn| {
                let floor = self.loads_of(first, scenario).find(|floor| floor.round == turn.round);
                floor.map(|floor| turn.cpu_ns / floor.cpu_ns)
            }))?;
            let nanos = median(self.loads_of(server, scenario).map(|turn| turn.cpu_ns))?;
            Some(if server == first {
                format!("{} ns", thousands(nanos))
            } else {
                format!("{ratio:.2}")
            })
        })
    }

    /// Replies per second.
    fn rate(&self) -> String {
        self.by_scenario(
            |scenario| self.is_plain(scenario),
            |server, scenario| {
                median(self.loads_of(server, scenario).map(|turn| turn.rate)).map(thousands)
            },
        )
    }

    /// The quantiles p50, p99 and p99.9 of the latency, in microseconds.
    fn latency(&self) -> String {
        self.by_scenario(
            |scenario| self.is_plain(scenario),
            |server, scenario| {
                let quantiles: [fn(&Load) -> f64; 3] =
                    [|turn| turn.p50_us, |turn| turn.p99_us, |turn| turn.p999_us];
                let medians: Option<Vec<String>> = quantiles
                    .iter()
                    .map(|of| median(self.loads_of(server, scenario).map(of)).map(thousands))
                    .collect();
                medians.map(|medians| medians.join(" / "))
            },
        )
    }

    /// Bytes per second in each direction, for one connection with large messages.
    fn stream(&self) -> String {
        self.by_scenario(
            |scenario| scenario.starts_with("1x") && bytes_of(scenario) >= 16_384.0,
            |server, scenario| {
                let rate = median(self.loads_of(server, scenario).map(|turn| turn.rate))?;
                Some(format!("{} MB/s", thousands(rate * bytes_of(scenario) / 1e6)))
            },
        )
    }

    /// Whether a scenario is over TCP, and not about fairness.
    fn is_plain(&self, scenario: &str) -> bool {
        !scenario.starts_with(UDP) && !self.is_of_fairness(scenario)
    }

    /// Whether a scenario has another load beside it, or is the comparison for one that has.
    fn is_of_fairness(&self, scenario: &str) -> bool {
        let both = |other: &String| other.split_once(BESIDE).is_some_and(|(it, _)| it == scenario);
        scenario.contains(BESIDE) || self.scenarios.iter().any(both)
    }

    /// The p99 of the clients that ping, alone and beside one that sends as fast as it can, and the
    /// rate of that one.
    fn fairness(&self) -> String {
        self.by_scenario(
            |scenario| self.is_of_fairness(scenario),
            |server, scenario| {
                let p99 = median(self.loads_of(server, scenario).map(|turn| turn.p99_us))?;
                let beside = median(self.loads_of(server, scenario).map(|turn| turn.beside))?;
                let p99 = format!("{} µs", thousands(p99));
                Some(if scenario.contains(BESIDE) {
                    format!("{p99}, {} MB/s", thousands(beside / 1e6))
                } else {
                    p99
                })
            },
        )
    }

    /// Clients per second, and the cost of each one.
    fn accept(&self) -> String {
        let rows = self.servers.iter().filter_map(|server| {
            let turns = || self.accepts.iter().filter(|turn| turn.server == *server);
            let rate = median(turns().map(|turn| turn.rate))?;
            let cpu = median(turns().map(|turn| turn.cpu_ns))?;
            let cpu = format!("{:.1} µs", cpu / 1e3);
            Some(vec![server.clone(), thousands(rate), cpu])
        });
        markdown(&["server", "clients/s", "processor time each"], rows.collect())
    }

    /// Resident memory: at the start, and then for each connection.
    fn idle(&self) -> String {
        let each = |idle: &Idle, bytes: u64| {
            let more = bytes.saturating_sub(idle.start) as f64;
            format!("{} B", thousands(more / idle.connections as f64))
        };
        let rows = self.idle.iter().map(|idle| {
            let start = format!("{:.1} MiB", idle.start as f64 / f64::from(1 << 20));
            let figures = [idle.connected, idle.echoed, idle.burst].map(|bytes| each(idle, bytes));
            [idle.server.clone(), start].into_iter().chain(figures).collect()
        });
        let connections = self.idle.first().map_or(0, |idle| idle.connections);
        let each = format!("each of {} connections", thousands(connections as f64));
        let title = ["server", "at startup", &each, "after an echo", "after all at once"];
        markdown(&title, rows.collect())
    }

    /// System calls for each reply.
    fn calls(&self) -> String {
        let mut names: Vec<&str> = Vec::new();
        for call in self.calls.iter().flat_map(|calls| calls.per_reply.keys()) {
            if !names.contains(&call.as_str()) {
                names.push(call);
            }
        }
        names.sort_unstable();
        let mut title = vec!["server", "connections"];
        title.extend(&names);
        title.push("all");
        let rows = self.calls.iter().map(|calls| {
            let connections = calls.scenario.split('x').next().unwrap_or_default();
            let mut row = vec![calls.server.clone(), connections.to_owned()];
            let count = |name: &&str| calls.per_reply.get(*name).map_or(0.0, |n| *n);
            row.extend(names.iter().map(|name| match count(name) {
                0.0 => "–".to_owned(),
                n => format!("{n:.2}"),
            }));
            row.push(format!("{:.2}", names.iter().map(count).sum::<f64>()));
            row
        });
        markdown(&title, rows.collect())
    }

    fn loads_of<'a>(
        &'a self,
        server: &'a str,
        scenario: &'a str,
    ) -> impl Iterator<Item = &'a Load> + 'a {
        self.loads.iter().filter(move |turn| turn.server == server && turn.scenario == scenario)
    }

    /// Makes a row for each server that has a figure, and a column for each `wanted` scenario.
    fn by_scenario(
        &self,
        wanted: impl Fn(&str) -> bool,
        figure: impl Fn(&str, &str) -> Option<String>,
    ) -> String {
        let scenarios: Vec<&str> =
            self.scenarios.iter().map(String::as_str).filter(|scenario| wanted(scenario)).collect();
        let rows = self.servers.iter().filter_map(|server| {
            let figures: Vec<Option<String>> =
                scenarios.iter().map(|scenario| figure(server, scenario)).collect();
            figures.iter().any(Option::is_some).then(|| {
                let figures =
                    figures.into_iter().map(|figure| figure.unwrap_or_else(|| "–".to_owned()));
                [server.clone()].into_iter().chain(figures).collect()
            })
        });
        let rows = rows.collect();
        let scenarios: Vec<String> = scenarios
            .iter()
            .map(|scenario| {
                scenario.trim_start_matches(UDP).replace('x', "×").replace(BESIDE, " + ")
            })
            .collect();
        let mut title = vec!["server"];
        title.extend(scenarios.iter().map(String::as_str));
        markdown(&title, rows)
    }
}

fn bytes_of(scenario: &str) -> f64 {
    scenario.rsplit('x').next().and_then(|bytes| bytes.parse().ok()).unwrap_or(0.0)
}

/// The middle value, or the mean of the two middle ones.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

/// Formats a number without its fraction, with thousands separators.
pub fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Makes an aligned table: the first column on the left, the others on the right.
fn markdown(title: &[&str], rows: Vec<Vec<String>>) -> String {
    let width = |n: usize| {
        let cells = rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count());
        cells.chain([title[n].chars().count(), 3]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..title.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = String>| {
        for cell in cells {
            // Writing to a String never fails.
            let _ = write!(text, "| {cell} ");
        }
        text.push_str("|\n");
    };
    let pad = |n: usize, cell: &str| match (n, widths[n]) {
        (0, width) => format!("{cell:width$}"),
        (_, width) => format!("{cell:>width$}"),
    };
    line(&mut title.iter().enumerate().map(|(n, cell)| pad(n, cell)));
    line(&mut widths.iter().enumerate().map(|(n, &width)| match n {
        0 => "-".repeat(width),
        _ => "-".repeat(width - 1) + ":",
    }));
    for row in &rows {
        line(&mut row.iter().enumerate().map(|(n, cell)| pad(n, cell)));
    }
    text
}
