//! What the grader notes after the cases: figures of the learner's server, each beside that of the chapter's
//! own. A note is no verdict.

use std::io::{Write, stdout};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use bench::target::{self, Server, Target};
use bench::{calls, idle};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::grade::users_shell;

/// How long to watch a server that has nothing to do, and how long to count its calls.
const WATCHED: Duration = Duration::from_secs(1);

/// Its name, its unit, how many decimals it is printed with, and how it is measured.
type Figure = (&'static str, &'static str, usize, fn(&Starter) -> Result<f64>);

/// Prints the figures of the server that `command` starts, a line for a shell with `{addr}` in it.
pub fn print(chapter: &str, command: &str) -> Result<()> {
    // Both servers inherit it.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let server = Server { name: format!("reactor-{chapter}") };
    let mut figures: Vec<Figure> = vec![("idle-cpu", "% of a processor", 1, idle_cpu)];
    if server.echoes() && calls::can_count() {
        figures.push(("calls", "system calls an echo", 2, calls_per_echo));
    }
    if server.serves_many() {
        figures.push(("memory", "B an idle connection", 0, memory));
    }
    let yours = Starter { command: Some(command), server: &server };
    let own = Starter { command: None, server: &server };
    for (name, unit, decimals, figure) in figures {
        let text = |starter| match figure(starter) {
            Ok(value) => format!("{value:.decimals$}"),
            Err(err) => format!("not measured: {err:#};"),
        };
        let (yours, name_of, own) = (text(&yours), &server.name, text(&own));
        writeln!(stdout(), "note  {name:16} {yours} {unit} ({name_of}: {own})")?;
    }
    Ok(())
}

/// Starts the learner's server, or the chapter's own.
struct Starter<'a> {
    command: Option<&'a str>,
    server: &'a Server,
}

impl Starter<'_> {
    /// Starts it, under strace(1) if there is to be a report of its calls.
    fn start(&self, report: Option<&Path>) -> Result<Target> {
        let counted = |command| match report {
            Some(report) => target::counted(&command, report),
            None => command,
        };
        let Some(text) = self.command else {
            return Target::start(counted(self.server.command()?), None);
        };
        let addr = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        // From chapter 5 on a server has the chapter's options.
        let options = self.server.args().get(2..).unwrap_or_default().join(" ");
        let text = text.replace("{addr}", &addr.to_string());
        let shell = users_shell(&format!("exec {text} {options}"));
        Target::start_silent(counted(shell), addr, None)
    }
}

/// Its CPU time with one client that says nothing.
fn idle_cpu(starter: &Starter) -> Result<f64> {
    let server = starter.start(None)?;
    let _client = TcpStream::connect(server.addr)?;
    // What it does at the start is no matter.
    thread::sleep(WATCHED / 2);
    let before = server.cpu()?;
    thread::sleep(WATCHED);
    let used = server.cpu()? - before;
    Ok(100.0 * used.as_secs_f64() / WATCHED.as_secs_f64())
}

/// What strace counts while one client sends a message after the other.
fn calls_per_echo(starter: &Starter) -> Result<f64> {
    let start = |report: &Path| starter.start(Some(report));
    let scenario = "1x1x64".parse().map_err(anyhow::Error::msg)?;
    Ok(calls::run(&start, &scenario, WATCHED)?.values().sum())
}

/// What ten thousand clients cost that are connected and have had an echo, or as many as there are fds for.
fn memory(starter: &Starter) -> Result<f64> {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let clients = usize::try_from(soft)?.saturating_sub(64).min(10_000);
    let idle::Memory { start, echoed, .. } = idle::run(&starter.start(None)?, clients)?;
    Ok(echoed.saturating_sub(start) as f64 / clients as f64)
}
