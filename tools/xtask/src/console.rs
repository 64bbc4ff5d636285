//! The console sessions of the pages, played again.
//!
//! A block is a session: each `$ ` starts a command, `^C` stops the server that was started last, and
//! the other lines are what all of them print. A server takes a free port, which stands for the 7777
//! of the text; times, ports and other numbers of the day are not compared. Nor is the order in which
//! a server's log and the output of other programs meet, only that of each by itself.

use std::env;
use std::fmt::Write;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sys::signal::{SigSet, Signal, killpg};
use nix::unistd::Pid;

use crate::pages::{Block, blocks, replace};

/// How long a command may take, or a line to come.
const LIMIT: Duration = Duration::from_secs(20);

/// With no line for so long, all has been said: where it is not known what to wait for.
const QUIET: Duration = Duration::from_millis(300);

/// Before each command: one pipe for both outputs, or the order of the lines is lost; no fd that this
/// program was started with, or the server's would have other numbers; the limit that most shells
/// have; and the netcat that the text is about.
const PROLOGUE: &str = r#"exec 2>&1
for fd in {3..63}; do eval "exec $fd>&-"; done
ulimit -Sn 1024
nc() { nc.openbsd "$@"; }"#;

/// The process groups of the commands that run. Whoever ends this program ends them, too.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Where the programs of the workspace are.
pub struct Stage {
    root: PathBuf,
    programs: PathBuf,
    /// Whether strace may look at other processes.
    can_trace: bool,
}

impl Stage {
    /// Builds the programs.
    ///
    /// # Errors
    /// They cannot be built; there is no netcat-openbsd or no strace; signals cannot be waited for.
    pub fn set(root: &Path) -> anyhow::Result<Self> {
        let mut cargo = Command::new(env::var_os("CARGO").context("to be run as `cargo xtask`")?);
        let build = cargo.args(["build", "--quiet", "--locked"]).current_dir(root);
        for chapter in bench::chapters(root)? {
            build.args(["-p", &chapter]);
        }
        ensure!(build.status()?.success(), "the chapters cannot be built");
        // This program is in target/debug, wherever that is, and so are they.
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
        Ok(Self { root: root.to_owned(), programs, can_trace: strace.status.success() })
    }

    fn spawn(&self, command: &str) -> anyhow::Result<Child> {
        let child = Command::new("bash")
            .args(["-c", &format!("{PROLOGUE}\n{command}")])
            .current_dir(&self.root)
            .env("LC_ALL", "C")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A group of its own, that Ctrl-C can be meant for.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot run {command}"))?;
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).push(group(&child));
        Ok(child)
    }
}

/// Plays all sessions of a page, and returns it with the output that they have now. Where that is no
/// other than the page's, up to times and ports, the page's own stays.
///
/// # Errors
/// A command cannot be run or does not end.
pub fn refresh(page: &str, stage: &Stage) -> anyhow::Result<String> {
    let mut texts = Vec::new();
    for block in sessions(page, stage) {
        let steps = parse(&page[block.range.clone()]).with_context(|| block.place())?;
        let outputs = play(&steps, stage, false).with_context(|| block.place())?;
        if compare(&steps, &outputs).is_err() {
            texts.push((block.range, render(&steps, &outputs)));
        }
    }
    Ok(replace(page, &texts))
}

/// Plays all sessions of a page and returns how many there were.
///
/// # Errors
/// One of them prints something else, or fails.
pub fn check(page: &str, stage: &Stage) -> anyhow::Result<usize> {
    let sessions = sessions(page, stage);
    for block in &sessions {
        let steps = parse(&page[block.range.clone()]).with_context(|| block.place())?;
        let outputs = play(&steps, stage, true).with_context(|| block.place())?;
        compare(&steps, &outputs).with_context(|| block.place())?;
    }
    Ok(sessions.len())
}

/// Those that can be played here: a container may forbid strace(1).
fn sessions<'a>(page: &'a str, stage: &Stage) -> Vec<Block<'a>> {
    let mut blocks = blocks(page);
    blocks.retain(|block| {
        let is_session = block.language == "console" && block.comment_of("illustration").is_none();
        let possible = stage.can_trace || !page[block.range.clone()].contains("strace ");
        if is_session && !possible {
            eprintln!("{} is not played: strace may not be used here", block.place());
        }
        is_session && possible
    });
    blocks
}

/// One thing that somebody types, and the lines that follow it.
#[derive(Debug, PartialEq, Eq)]
struct Step<'a> {
    /// As in the text; `None` for `^C`.
    command: Option<&'a str>,
    output: Vec<&'a str>,
}

fn parse(text: &str) -> anyhow::Result<Vec<Step<'_>>> {
    ensure!(!text.is_empty(), "an empty session");
    let mut steps: Vec<Step<'_>> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let mut end = rest.find('\n').unwrap_or(rest.len() - 1) + 1;
        if let Some(command) = rest.strip_prefix("$ ") {
            // It goes on in the next line after a backslash.
            while rest[..end].ends_with("\\\n") {
                end += rest[end..].find('\n').context("a command without an end")? + 1;
            }
            steps.push(Step { command: Some(command[..end - 2].trim_end()), output: Vec::new() });
        } else if rest[..end].trim_end() == "^C" {
            steps.push(Step { command: None, output: Vec::new() });
        } else {
            let step = steps.last_mut().context("it does not begin with a command")?;
            step.output.push(rest[..end].trim_end_matches('\n'));
        }
        rest = &rest[end..];
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
        // Not by a number that may be another process's by now.
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(group(&self.child), Signal::SIGKILL);
            let _ = self.child.wait();
        }
        let group = group(&self.child);
        GROUPS.lock().unwrap_or_else(PoisonError::into_inner).retain(|&it| it != group);
    }
}

fn group(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().unwrap_or(i32::MAX))
}

/// Plays a session and returns the lines that came after each step. Waits for the lines of the text
/// if they are `known`, and until there are no more if not.
fn play(steps: &[Step<'_>], stage: &Stage, known: bool) -> anyhow::Result<Vec<Vec<String>>> {
    let (sender, lines) = mpsc::channel();
    let mut running: Vec<Running> = Vec::new();
    let mut port = None;
    let mut outputs: Vec<Vec<String>> = Vec::new();
    let mut expected = 0;
    for step in steps {
        expected += step.output.len();
        let mut output = Vec::new();
        match step.command {
            Some(text) => {
                let (command, is_server) = prepare(text, port, &stage.programs);
                let background = command.strip_suffix(" &");
                let child = stage.spawn(background.unwrap_or(&command))?;
                let mut started = Running { child, is_server };
                let child = &mut started.child;
                print_into(child, sender.clone())?;
                if is_server {
                    wait_for(child, &lines, &mut output, |line| {
                        port = port_in(line).or(port);
                        line.contains("listening on ")
                    })
                } else if background.is_none() {
                    let ended = wait_for(child, &lines, &mut output, |_| false);
                    ended.and_then(|()| succeeded(child))
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

/// A command that fails unnoticed is a mistake of the text, which can say `; echo "exit code $?"`.
fn succeeded(child: &mut Child) -> anyhow::Result<()> {
    let status = child.try_wait()?.context("it does not end")?;
    ensure!(status.success(), "it fails: {status}");
    Ok(())
}

/// Hands on the lines of a process.
fn print_into(child: &mut Child, lines: Sender<String>) -> anyhow::Result<()> {
    let stdout = child.stdout.take().context("stdout is a pipe")?;
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            if lines.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    });
    Ok(())
}

/// Collects lines until one is the last that is waited for, or the process has ended.
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

/// The command as it is run, and whether it starts a server: the programs are built already, and 7777
/// stands for the port of the session.
fn prepare(text: &str, port: Option<u16>, programs: &Path) -> (String, bool) {
    let mut command = text.to_owned();
    let mut is_server = false;
    for start in ["cargo run -q -p ", "cargo run -p ", "target/debug/"] {
        let Some((before, after)) = command.split_once(start) else { continue };
        let in_name = |char: char| char.is_ascii_alphanumeric() || char == '-';
        let end = after.find(|char| !in_name(char)).unwrap_or(after.len());
        let (program, rest) = after.split_at(end);
        if !program.starts_with("reactor-v") {
            continue;
        }
        let is_client = program.ends_with("-client");
        is_server = !is_client;
        let args = rest.strip_prefix(" --").filter(|args| args.starts_with(' ')).unwrap_or(rest);
        // A server that is alone takes a free port, one more the port that is in use.
        let addr = match port {
            _ if args.contains("--addr") => String::new(),
            None if is_client => String::new(),
            port => format!(" --addr 127.0.0.1:{}", port.unwrap_or(0)),
        };
        command = format!("{before}{}/{program}{addr}{args}", programs.display());
        break;
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
        text += &step.command.map_or_else(|| "^C".to_owned(), |command| format!("$ {command}"));
        text.push('\n');
        for line in output {
            port = port.or(port_in(line));
            // A server that was given port 0 would have been given 7777.
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

/// The lines that a server's log or strace wrote, or all the others, as they are compared.
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

/// A line without what is another one every time, and whether a server's log or strace wrote it.
fn normal(line: &str) -> (bool, String) {
    let line = line.trim_end();
    let (time, rest) = line.trim_start().split_once(' ').unwrap_or((line, ""));
    let is_time = time.strip_suffix('s').is_some_and(|seconds| seconds.parse::<f64>().is_ok());
    // strace aligns what a call returns: `close(3)        = 0`.
    let is_log =
        is_time || line.split_once(" = ").is_some_and(|(call, _)| call.trim_end().ends_with(')'));
    let mut normal = if is_time { rest.to_owned() } else { line.to_owned() };
    for before in ["127.0.0.1:", "[::1]:", "htons(", "limit on fds from ", " to ", "0x", "pid "] {
        let of_number = |char: char| match before {
            "0x" => char.is_ascii_hexdigit(),
            _ => char.is_ascii_digit(),
        };
        if before == " to " && !normal.contains("limit on fds") {
            continue;
        }
        let mut parts = normal.split(before);
        let mut fresh = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let number = part.find(|char| !of_number(char)).unwrap_or(part.len());
            fresh += before;
            fresh += if number > 0 { "N" } else { "" };
            fresh += &part[number..];
        }
        normal = fresh;
    }
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
        assert_eq!(check(&page(session), &stage()).unwrap(), 1);
        assert_eq!(refresh(&page(session), &stage()).unwrap(), page(session));
    }

    #[track_caller]
    fn assert_broken(session: &str, what: &str) {
        let err = check(&page(session), &stage()).unwrap_err();
        assert!(format!("{err:#}").contains(what), "{err:#}");
    }

    #[test]
    fn a_session_that_says_something_else_is_found() {
        assert_broken("$ echo a\nb\n", "-b\n+a\n");
        assert_broken("$ echo a; echo b\na\n", "+b\n");
        assert_broken("$ true\n^C\n", "no server to stop");
        assert_broken("a\n", "does not begin with a command");
        assert_broken("", "an empty session");
        assert_broken("$ false\n", "it fails");
        // After the last line that is known.
        assert_broken("$ (echo a; sleep 0.1; echo b) &\na\n", "+b\n");
    }

    #[test]
    fn a_session_that_says_something_else_is_refreshed() {
        let (old, new) = ("$ echo a\nb\n$ true\nc\n", "$ echo a\na\n$ true\n");
        assert_eq!(refresh(&page(old), &stage()).unwrap(), page(new));
    }

    #[test]
    fn what_may_not_be_traced_is_not_played() {
        let page = page("$ echo 'strace -c'\nx\n");
        assert!(check(&page, &stage()).is_err());
        assert_eq!(check(&page, &Stage { can_trace: false, ..stage() }).unwrap(), 0);
    }

    #[test]
    fn nothing_goes_on_after_a_session() {
        let child = stage().spawn("sleep 60 | sleep 60").unwrap();
        let running = Running { child, is_server: false };
        let group = group(&running.child);
        assert_eq!(killpg(group, None), Ok(()));
        drop(running);
        let start = Instant::now();
        // Those that the shell had started are not this program's to wait for.
        while killpg(group, None).is_ok() {
            assert!(start.elapsed() < LIMIT, "it goes on");
            thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn illustrations_are_not_played() {
        let page = "<!-- illustration: typed by hand -->\n```console\n$ false || exit 1\nx\n```\n";
        assert_eq!(check(page, &stage()).unwrap(), 0);
    }

    #[test]
    fn a_server_gets_a_free_port_and_the_others_get_the_servers() {
        let at = Path::new("/p");
        let server = "RUST_LOG=trace cargo run -q -p reactor-v03";
        let run = |port| format!("RUST_LOG=trace /p/reactor-v03 --addr 127.0.0.1:{port}");
        assert_eq!(prepare(server, None, at), (run(0), true));
        assert_eq!(prepare(server, Some(12), at), (run(12), true));
        let client = prepare("cargo run -q -p reactor-v04-client -- 'a b' | wc", Some(12), at);
        let run = "/p/reactor-v04-client --addr 127.0.0.1:12 'a b' | wc".to_owned();
        assert_eq!(client, (run, false));
        let netcat = prepare("echo a | nc -N 127.0.0.1 7777", Some(12), at);
        assert_eq!(netcat, ("echo a | nc -N 127.0.0.1 12".to_owned(), false));
        let in_shell = prepare("(ulimit -n 9; target/debug/reactor-v01); echo", None, at);
        let run = "(ulimit -n 9; /p/reactor-v01 --addr 127.0.0.1:0); echo".to_owned();
        assert_eq!(in_shell, (run, true));
        let strace = prepare("strace -c target/debug/reactor-v01", None, at);
        assert_eq!(strace, ("strace -c /p/reactor-v01 --addr 127.0.0.1:0".to_owned(), true));
    }

    #[test]
    fn times_ports_and_limits_are_not_compared() {
        for (one, other) in [
            (
                "   0.000152613s  INFO listening on 127.0.0.1:7777",
                "  12.1s  INFO listening on 127.0.0.1:1",
            ),
            (
                "1.0s DEBUG raising the limit on fds from 1 to 2",
                "1.0s DEBUG raising the limit on fds from 10 to 20",
            ),
            ("accept4(3, {sin_port=htons(1)}) = 4", "accept4(3, {sin_port=htons(22)})   = 4"),
        ] {
            assert_eq!(normal(one), normal(other));
            assert!(normal(one).0);
        }
        assert_ne!(normal("   0.1s  INFO a 1"), normal("   0.1s  INFO a 2"));
        assert_ne!(normal("moved 1 to 2"), normal("moved 1 to 3"));
    }
}
