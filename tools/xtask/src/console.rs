//! The console sessions of the pages, replayed.
//!
//! A block is a session: each `$ ` starts a command, `^C` stops the server that was started last, and
//! the other lines are what all of them print. A server takes a free port in place of the 7777 in the
//! text. Times, ports and other numbers that change from run to run are not compared. Nor is how a
//! server's log and the output of other programs interleave, only the order within each.

use std::env;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;
use regex::Regex;

use crate::pages::{Block, blocks, replace};
use crate::workspace::Workspace;

/// How long a command may take, or a line to arrive.
const LIMIT: Duration = Duration::from_secs(20);

/// Where it is not known what to wait for: no more lines are expected after so long without one.
const QUIET: Duration = Duration::from_millis(300);

/// Before each command: one pipe for both outputs, which keeps the order of the lines; no inherited
/// fds, which would change the numbers of the server's own; the limit on fds that most shells have; and
/// the netcat that the text is about.
const PROLOGUE: &str = r#"exec 2>&1
for fd in {3..63}; do eval "exec $fd>&-"; done
ulimit -Sn 1024
nc() { nc.openbsd "$@"; }"#;

/// The process groups of the commands that run, which are killed when this program is stopped.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Where sessions are played.
pub struct Stage {
    root: PathBuf,
    /// The folder of the chapters' programs.
    programs: PathBuf,
    /// Whether strace may be used: a container may forbid it.
    can_trace: bool,
}

impl Stage {
    /// Builds the programs, and looks for what else the sessions need.
    pub fn set(workspace: &Workspace) -> anyhow::Result<Self> {
        let root = workspace.root.clone();
        let mut cargo = Command::new(env::var_os("CARGO").context("run it as `cargo xtask`")?);
        let build = cargo.args(["build", "--quiet", "--locked"]).current_dir(&root);
        for chapter in bench::chapters(&root)? {
            build.args(["-p", &chapter]);
        }
        ensure!(build.status()?.success(), "the chapters cannot be built");
        // They are where this program is: in target/debug, wherever that is.
        let programs = env::current_exe()?.parent().context("a program in a folder")?.to_owned();
        let netcat = Command::new("nc.openbsd").arg("-h").stderr(Stdio::null()).status();
        netcat.context("the sessions need netcat-openbsd: apt install netcat-openbsd")?;
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        // The commands do not inherit it: std gives them an empty mask.
        signals.thread_block()?;
        thread::spawn(move || {
            let _ = signals.wait();
            for &group in GROUPS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                let _ = killpg(group, Signal::SIGKILL);
            }
            std::process::exit(130);
        });
        let strace = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
        let strace = strace.context("the sessions need strace: apt install strace")?;
        Ok(Self { root, programs, can_trace: strace.status.success() })
    }

    /// Starts a command, whose lines go to `lines`.
    fn spawn(&self, command: &str, lines: Sender<String>) -> anyhow::Result<Child> {
        let mut child = Command::new("bash")
            .args(["-c", &format!("{PROLOGUE}\n{command}")])
            .current_dir(&self.root)
            .env("LC_ALL", "C")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A group of its own, for Ctrl-C.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {command}"))?;
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).push(group(&child));
        let stdout = BufReader::new(child.stdout.take().context("stdout is a pipe")?);
        thread::spawn(move || {
            for line in stdout.split(b'\n').map_while(Result::ok) {
                // After the session they are not received.
                let _ = lines.send(String::from_utf8_lossy(&line).into_owned());
            }
        });
        Ok(child)
    }
}

/// Plays all sessions of a page. Returns how many there are, and the page with the output that they
/// have now, where that differs in more than times and ports. With `check` a difference is an error.
pub fn replay(page: &str, stage: &Stage, check: bool) -> anyhow::Result<(usize, String)> {
    let mut texts = Vec::new();
    let mut count = 0;
    for block in blocks(page).iter().filter(|block| can_be_played(block, stage)) {
        let steps = parse(block.body).with_context(|| block.place())?;
        let outputs = play(&steps, stage, check).with_context(|| block.place())?;
        if let Err(err) = compare(&steps, &outputs) {
            if check {
                return Err(err.context(block.place()));
            }
            texts.push((block.range.clone(), render(&steps, &outputs)));
        }
        count += 1;
    }
    Ok((count, replace(page, &texts)))
}

fn can_be_played(block: &Block<'_>, stage: &Stage) -> bool {
    if block.language != "console" || block.comment_of("illustration").is_some() {
        return false;
    }
    let possible = stage.can_trace || !block.body.contains("strace ");
    if !possible {
        eprintln!("{} is not played: strace may not be used here", block.place());
    }
    possible
}

/// One line that is typed, and the lines that follow it.
struct Step<'a> {
    /// As in the text; `None` for `^C`.
    command: Option<String>,
    output: Vec<&'a str>,
}

fn parse(text: &str) -> anyhow::Result<Vec<Step<'_>>> {
    ensure!(!text.is_empty(), "an empty session");
    let mut steps: Vec<Step<'_>> = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(command) = line.strip_prefix("$ ") {
            let mut command = command.to_owned();
            // After a backslash it continues in the next line.
            while command.ends_with('\\') {
                command = command + "\n" + lines.next().context("a command without an end")?;
            }
            steps.push(Step { command: Some(command), output: Vec::new() });
        } else if line == "^C" {
            steps.push(Step { command: None, output: Vec::new() });
        } else {
            let step = steps.last_mut().context("it does not begin with a command")?;
            step.output.push(line);
        }
    }
    Ok(steps)
}

/// A command that runs, until this is dropped.
struct Running {
    child: Child,
    is_server: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        let group = group(&self.child);
        // The id of a process that has ended may be another one's by now.
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(group, Signal::SIGKILL);
            let _ = self.child.wait();
        }
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).retain(|&it| it != group);
    }
}

fn group(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap_or(i32::MAX))
}

/// Plays a session and returns the lines that came after each step. Waits for as many as the text has
/// if that is `known`, or else until there are no more.
fn play(steps: &[Step<'_>], stage: &Stage, known: bool) -> anyhow::Result<Vec<Vec<String>>> {
    let (sender, lines) = mpsc::channel();
    let mut running: Vec<Running> = Vec::new();
    let mut port = None;
    let mut outputs: Vec<Vec<String>> = Vec::new();
    let mut expected = 0;
    for step in steps {
        expected += step.output.len();
        let mut output = Vec::new();
        match &step.command {
            Some(text) => {
                let (command, is_server) = prepare(text, port, &stage.programs);
                let background = command.strip_suffix(" &");
                let child = stage.spawn(background.unwrap_or(&command), sender.clone())?;
                let mut started = Running { child, is_server };
                let child = &mut started.child;
                if is_server {
                    wait_for(child, &lines, &mut output, |line| {
                        port = port_in(line).or(port);
                        line.contains("listening on ")
                    })
                } else if background.is_none() {
                    wait_for(child, &lines, &mut output, |_| false).and_then(|()| succeeded(child))
                } else {
                    Ok(())
                }
                .with_context(|| text.to_owned())?;
                running.push(started);
            }
            None => {
                let server = running.iter_mut().rev().find(|running| running.is_server);
                let server = server.context("there is no server to stop")?;
                killpg(group(&server.child), Signal::SIGINT)?;
                wait_for(&mut server.child, &lines, &mut output, |_| false).context("^C")?;
            }
        }
        let before: usize = outputs.iter().map(Vec::len).sum();
        let start = Instant::now();
        while !known || before + output.len() < expected {
            let limit = if known { LIMIT.saturating_sub(start.elapsed()) } else { QUIET };
            match lines.recv_timeout(limit) {
                Ok(line) => output.push(line),
                Err(_) => break,
            }
        }
        output.extend(lines.try_iter());
        outputs.push(output);
    }
    // There may be more than is known.
    if let Some(last) = outputs.last_mut() {
        while let Ok(line) = lines.recv_timeout(QUIET) {
            last.push(line);
        }
    }
    Ok(outputs)
}

/// A command must not fail unnoticed. One that should can end with `; echo "exit code $?"`.
fn succeeded(child: &mut Child) -> anyhow::Result<()> {
    let status = child.try_wait()?.context("it does not end")?;
    ensure!(status.success(), "it fails: {status}");
    Ok(())
}

/// Collects lines until `is_last` says so of one, or the process has ended.
fn wait_for(
    child: &mut Child,
    lines: &Receiver<String>,
    output: &mut Vec<String>,
    mut is_last: impl FnMut(&str) -> bool,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let ended = child.try_wait()?.is_some();
        match lines.recv_timeout(Duration::from_millis(10)) {
            Ok(line) => {
                let last = is_last(&line);
                output.push(line);
                if last {
                    return Ok(());
                }
            }
            Err(RecvTimeoutError::Timeout) if ended => return Ok(()),
            Err(_) => {}
        }
    }
    bail!("it does not end")
}

fn port_in(line: &str) -> Option<u16> {
    line.split_once("listening on ")?.1.rsplit(':').next()?.parse().ok()
}

/// How the text runs a program of a chapter.
#[allow(clippy::expect_used)]
static PROGRAM: LazyLock<Regex> = LazyLock::new(|| {
    let how = r"(?:cargo run (?:-q )?-p |target/debug/)";
    let program = r"(?<package>reactor-v[a-z0-9-]+)(?: --bin (?<bin>[a-z0-9-]+))?";
    Regex::new(&format!("{how}{program}(?: --(?<args>(?s: .*)))?"))
        .expect("a constant, which tests use")
});

/// The command as it is run, and whether it starts a server: the programs are built already, and the
/// port of the session is in place of 7777.
fn prepare(text: &str, port: Option<u16>, programs: &Path) -> (String, bool) {
    let mut command = text.to_owned();
    let mut is_server = false;
    if let Some(found) = PROGRAM.captures(text) {
        let package = &found["package"];
        // Further programs of a chapter, and chapters with a second hyphen, are clients.
        is_server = found.name("bin").is_none() && package.matches('-').count() == 1;
        let program = found.name("bin").map_or(package, |bin| bin.as_str());
        let args = found.name("args").map_or("", |args| args.as_str());
        // The first server takes a free port, another one the port that is in use.
        let addr = match port {
            _ if text.contains("--addr") => String::new(),
            None if !is_server => String::new(),
            port => format!(" --addr 127.0.0.1:{}", port.unwrap_or(0)),
        };
        let run = format!("{}/{program}{addr}{args}", programs.display());
        command = text.replacen(&found[0], &run, 1);
    }
    if let Some(port) = port {
        command = command.replace("7777", &port.to_string());
    }
    (command, is_server)
}

fn render(steps: &[Step<'_>], outputs: &[Vec<String>]) -> String {
    let mut port = None;
    let mut text = String::new();
    for (step, output) in steps.iter().zip(outputs) {
        text += &step.command.as_ref().map_or("^C".to_owned(), |command| format!("$ {command}"));
        text.push('\n');
        for line in output {
            port = port.or(port_in(line));
            // strace shows the port 0 that the server was given in place of 7777.
            let mut line = line.replace("htons(0)", "htons(7777)");
            if let Some(port) = port {
                line = line.replace(&port.to_string(), "7777");
            }
            text += line.trim_end();
            text.push('\n');
        }
    }
    text
}

/// The lines that a server's log or strace wrote, or all others, in the form that is compared.
fn of_kind<'a>(is_log: bool, lines: impl Iterator<Item = &'a str>) -> String {
    let lines = lines.map(normal).filter(|(log, _)| *log == is_log).map(|(_, line)| line);
    lines.collect::<Vec<_>>().join("\n")
}

fn compare(steps: &[Step<'_>], outputs: &[Vec<String>]) -> anyhow::Result<()> {
    let mut message = String::new();
    for is_log in [true, false] {
        let text = of_kind(is_log, steps.iter().flat_map(|step| step.output.iter().copied()));
        let run = of_kind(is_log, outputs.iter().flatten().map(String::as_str));
        if text != run {
            for change in similar::TextDiff::from_lines(&text, &run).iter_all_changes() {
                writeln!(message, "{}{}", change.tag(), change.value().trim_end_matches('\n'))?;
            }
        }
    }
    ensure!(message.is_empty(), "the page's output (-) and that of now (+) differ:\n{message}");
    Ok(())
}

/// Numbers that change from run to run, after what stands before them.
#[allow(clippy::expect_used)]
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    let after = r"(127\.0\.0\.1:|\[::1\]:|htons\(|pid )\d+|(0x)[[:xdigit:]]+";
    let limits = r"(limit on fds from )\d+ to \d+";
    Regex::new(&format!("{after}|{limits}")).expect("a constant, which tests use")
});

/// A line without what changes from run to run, and whether a server's log or strace wrote it.
fn normal(line: &str) -> (bool, String) {
    let line = line.trim_end();
    let (time, rest) = line.trim_start().split_once(' ').unwrap_or((line, ""));
    let is_time = time.strip_suffix('s').is_some_and(|seconds| seconds.parse::<f64>().is_ok());
    // strace aligns what a call returns: `close(3)        = 0`.
    let is_log =
        is_time || line.split_once(" = ").is_some_and(|(call, _)| call.trim_end().ends_with(')'));
    let normal = NUMBER.replace_all(if is_time { rest } else { line }, "$1$2${3}N");
    (is_log, normal.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn stage() -> Stage {
        Stage { root: env::temp_dir(), programs: env::temp_dir(), can_trace: true }
    }

    fn page(session: &str) -> String {
        format!("a\n\n```console\n{session}```\n")
    }

    #[test]
    fn a_session_that_says_the_same_passes() {
        let session = "$ echo a; echo 127.0.0.1:1234 >&2\na\n127.0.0.1:9999\n$ (echo b; sleep 20) &\nb\n\
            $ echo \\\n   c\nc\n";
        assert_eq!(replay(&page(session), &stage(), true).unwrap(), (1, page(session)));
        assert_eq!(replay(&page(session), &stage(), false).unwrap(), (1, page(session)));
    }

    #[track_caller]
    fn assert_broken(session: &str, what: &str) {
        let err = replay(&page(session), &stage(), true).unwrap_err();
        assert!(format!("{err:#}").contains(what), "{err:#}");
    }

    #[test]
    fn a_session_that_says_something_else_is_found_and_updated() {
        assert_broken("$ echo a\nb\n", "-b\n+a\n");
        assert_broken("$ echo a; echo b\na\n", "+b\n");
        assert_broken("$ true\n^C\n", "no server to stop");
        assert_broken("a\n", "does not begin with a command");
        assert_broken("", "an empty session");
        assert_broken("$ false\n", "it fails");
        // After the last line that is known.
        assert_broken("$ (echo a; sleep 0.1; echo b) &\na\n", "+b\n");
        let (old, new) = ("$ echo a\nb\n$ true\nc\n", "$ echo a\na\n$ true\n");
        assert_eq!(replay(&page(old), &stage(), false).unwrap(), (1, page(new)));
    }

    #[test]
    fn illustrations_and_what_may_not_be_traced_are_not_played() {
        let untraced = Stage { can_trace: false, ..stage() };
        let page = page("$ echo 'strace -c'\nx\n");
        assert_eq!(replay(&page, &untraced, true).unwrap(), (0, page.clone()));
        assert!(replay(&page, &stage(), true).is_err());
        let illustration = page.replace("a\n\n", "<!-- illustration: typed by hand -->\n");
        assert_eq!(replay(&illustration, &stage(), true).unwrap(), (0, illustration));
    }

    #[test]
    fn nothing_goes_on_after_a_session() {
        let child = stage().spawn("sleep 60 | sleep 60", mpsc::channel().0).unwrap();
        let running = Running { child, is_server: false };
        let group = group(&running.child);
        assert_eq!(killpg(group, None), Ok(()));
        drop(running);
        let start = Instant::now();
        // The children of the shell are reaped by init.
        while killpg(group, None).is_ok() {
            assert!(start.elapsed() < LIMIT, "it goes on");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_server_gets_a_free_port_and_the_others_get_the_servers() {
        let server = "RUST_LOG=trace cargo run -q -p reactor-v03";
        let client = "cargo run -q -p reactor-v04-client -- 'a b' | wc";
        let in_shell = "(ulimit -n 9; target/debug/reactor-v01); echo";
        let bin = "cargo run -p reactor-v06 --bin v06-client";
        for (text, port, run, is_server) in [
            (server, None, "RUST_LOG=trace /p/reactor-v03 --addr 127.0.0.1:0", true),
            (server, Some(12), "RUST_LOG=trace /p/reactor-v03 --addr 127.0.0.1:12", true),
            (in_shell, None, "(ulimit -n 9; /p/reactor-v01 --addr 127.0.0.1:0); echo", true),
            (
                "strace -c target/debug/reactor-v01 --addr x",
                None,
                "strace -c /p/reactor-v01 --addr x",
                true,
            ),
            (client, Some(12), "/p/reactor-v04-client --addr 127.0.0.1:12 'a b' | wc", false),
            (bin, Some(12), "/p/v06-client --addr 127.0.0.1:12", false),
            ("echo a | nc -N 127.0.0.1 7777", Some(12), "echo a | nc -N 127.0.0.1 12", false),
        ] {
            let expected = (run.to_owned(), is_server);
            assert_eq!(prepare(text, port, Path::new("/p")), expected);
        }
    }

    #[test]
    fn times_ports_and_limits_are_not_compared() {
        for (one, other) in [
            ("   0.0001s  INFO on 127.0.0.1:7777", "  12.1s  INFO on 127.0.0.1:1"),
            ("1.0s DEBUG limit on fds from 1 to 2", "1.0s DEBUG limit on fds from 10 to 20"),
            ("accept4(3, {sin_port=htons(1)}) = 4", "accept4(3, {sin_port=htons(22)})   = 4"),
        ] {
            assert_eq!(normal(one), normal(other));
            assert!(normal(one).0);
        }
        assert_ne!(normal("   0.1s  INFO a 1"), normal("   0.1s  INFO a 2"));
        assert_ne!(normal("moved 1 to 2"), normal("moved 1 to 3"));
    }
}
