//! Replays the console sessions of the pages.
//!
//! A block is a session: each line `$ COMMAND` is a command, `^C` stops the server that was started
//! last, and the other lines are the output. A line `# terminal N` says in which terminal the next
//! lines are; a session in one terminal has no such lines. A server keeps its terminal until it
//! stops, and other commands are typed into the next terminal.
//!
//! Each server takes a free port in place of 7777. Times, ports and other numbers that change from
//! run to run are not compared. Neither is the order of lines across terminals.

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
use crate::replay::strace;
use crate::workspace::Workspace;

/// How long a command may take, or a line to arrive.
const LIMIT: Duration = Duration::from_secs(20);

/// If the number of lines is not known, this long without one means that no more come.
const QUIET: Duration = Duration::from_millis(300);

/// Runs before each command. One pipe for stdout and stderr keeps the order of the lines. Inherited
/// fds would change the server's fd numbers. Most shells have this limit on fds, and the text is
/// about this netcat.
const PROLOGUE: &str = r#"exec 2>&1
for fd in {3..63}; do eval "exec $fd>&-"; done
ulimit -Sn 1024
nc() { nc.openbsd "$@"; }"#;

/// The process groups of the running commands. They are killed when this program is stopped.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// Where sessions are played.
pub struct Stage {
    root: PathBuf,
    /// The folder of the chapters' programs.
    programs: PathBuf,
    /// Whether strace works here: a container may forbid it.
    can_trace: bool,
}

impl Stage {
    /// Builds the programs, and checks that netcat and strace are installed.
    pub fn set(workspace: &Workspace) -> anyhow::Result<Self> {
        let root = workspace.root.clone();
        let programs = workspace.build(bench::chapters(&root)?)?;
        let netcat = Command::new("nc.openbsd").arg("-h").stderr(Stdio::null()).status();
        netcat.context("the sessions need netcat-openbsd: apt install netcat-openbsd")?;
        let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        // The commands do not inherit the mask: std gives them an empty one.
        signals.thread_block()?;
        thread::spawn(move || {
            let _ = signals.wait();
            for &group in GROUPS.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                let _ = killpg(group, Signal::SIGKILL);
            }
            std::process::exit(130);
        });
        Ok(Self { root, programs, can_trace: strace::works()? })
    }

    /// Starts a command, and sends each line that it prints to `lines`.
    fn spawn(&self, command: &str, terminal: usize, lines: Sender<Line>) -> anyhow::Result<Child> {
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
                // This fails after the session, when nothing receives the lines any more.
                let _ = lines.send((terminal, String::from_utf8_lossy(&line).into_owned()));
            }
        });
        Ok(child)
    }
}

/// Plays all sessions of a page. Returns how many there are, and the page with the sessions as they
/// are now, where more than times and ports differ. With `check` a difference is an error.
pub fn replay(page: &str, stage: &Stage, check: bool) -> anyhow::Result<(usize, String)> {
    let mut texts = Vec::new();
    let mut count = 0;
    for block in blocks(page).iter().filter(|block| can_be_played(block, stage)) {
        let now = parse(block.body).and_then(|steps| play(&steps, stage, check));
        let now = now.with_context(|| block.place())?;
        if let Err(err) = compare(block.body, &now) {
            if check {
                return Err(err.context(block.place()));
            }
            texts.push((block.range.clone(), now));
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
        eprintln!("{} is not played: strace does not work here", block.place());
    }
    possible
}

/// A terminal, from 1, and a line in it: typed or printed.
type Line = (usize, String);

/// The mark between lines of different terminals, up to the number of the terminal.
const MARK: &str = "# terminal ";

/// One line that is typed.
struct Step {
    /// As in the text; `None` for `^C`.
    command: Option<String>,
    /// How many lines are printed after it.
    printed: usize,
}

fn parse(text: &str) -> anyhow::Result<Vec<Step>> {
    ensure!(!text.is_empty(), "an empty session");
    let mut steps: Vec<Step> = Vec::new();
    let mut lines = text.lines().filter(|line| !line.starts_with(MARK));
    while let Some(line) = lines.next() {
        if let Some(command) = line.strip_prefix("$ ") {
            let mut command = command.to_owned();
            // After a backslash it continues in the next line.
            while command.ends_with('\\') {
                command = command + "\n" + lines.next().context("a command without an end")?;
            }
            steps.push(Step { command: Some(command), printed: 0 });
        } else if line == "^C" {
            steps.push(Step { command: None, printed: 0 });
        } else {
            steps.last_mut().context("it does not begin with a command")?.printed += 1;
        }
    }
    Ok(steps)
}

/// A running command. Dropping this kills it.
struct Running {
    child: Child,
    is_server: bool,
    terminal: usize,
}

impl Running {
    /// This, if it is a server that has not ended.
    fn server(&mut self) -> Option<&mut Self> {
        (self.is_server && matches!(self.child.try_wait(), Ok(None))).then_some(self)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let group = group(&self.child);
        // After a process has ended, another one may have its id.
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

/// Plays a session and returns it with the lines that it prints now. Waits for as many lines as the
/// text has if they are `known`, otherwise until no more come.
fn play(steps: &[Step], stage: &Stage, known: bool) -> anyhow::Result<String> {
    let (sender, lines) = mpsc::channel();
    let mut running: Vec<Running> = Vec::new();
    let mut port = None;
    let mut session: Vec<Line> = Vec::new();
    let mut expected = 0;
    for step in steps {
        expected += 1 + step.printed;
        match &step.command {
            Some(text) => {
                let (command, is_server) = prepare(text, port, &stage.programs);
                let background = command.strip_suffix(" &");
                let command = background.unwrap_or(&command);
                let terminal = 1 + running.iter_mut().filter_map(Running::server).count();
                session.push((terminal, format!("$ {text}")));
                let child = stage.spawn(command, terminal, sender.clone())?;
                let mut started = Running { child, is_server, terminal };
                let child = &mut started.child;
                if is_server {
                    wait_for(child, &lines, &mut session, |line| {
                        port = port_in(line).or(port);
                        line.contains("listening on ")
                    })
                } else if background.is_none() {
                    wait_for(child, &lines, &mut session, |_| false).and_then(|()| succeeded(child))
                } else {
                    Ok(())
                }
                .with_context(|| text.to_owned())?;
                running.push(started);
            }
            None => {
                let server = running.iter_mut().rev().find_map(Running::server);
                let server = server.context("there is no server to stop")?;
                session.push((server.terminal, "^C".to_owned()));
                killpg(group(&server.child), Signal::SIGINT)?;
                wait_for(&mut server.child, &lines, &mut session, |_| false).context("^C")?;
            }
        }
        let start = Instant::now();
        while !known || session.len() < expected {
            let limit = if known { LIMIT.saturating_sub(start.elapsed()) } else { QUIET };
            match lines.recv_timeout(limit) {
                Ok(line) => session.push(line),
                Err(_) => break,
            }
        }
        session.extend(lines.try_iter());
    }
    // More lines may come than expected.
    while let Ok(line) = lines.recv_timeout(QUIET) {
        session.push(line);
    }
    Ok(render(&session))
}

/// A command must not fail unnoticed. If it should fail, it can end with `; echo "exit code $?"`.
fn succeeded(child: &mut Child) -> anyhow::Result<()> {
    let status = child.try_wait()?.context("it does not end")?;
    ensure!(status.success(), "it fails: {status}");
    Ok(())
}

/// Collects lines up to one that `is_last`, or until the process has ended.
fn wait_for(
    child: &mut Child,
    lines: &Receiver<Line>,
    session: &mut Vec<Line>,
    mut is_last: impl FnMut(&str) -> bool,
) -> anyhow::Result<()> {
    let start = Instant::now();
    while start.elapsed() < LIMIT {
        let ended = child.try_wait()?.is_some();
        match lines.recv_timeout(Duration::from_millis(10)) {
            Ok(line) => {
                let last = is_last(&line.1);
                session.push(line);
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

/// Matches how the text runs a program of a chapter.
#[allow(clippy::expect_used)]
static PROGRAM: LazyLock<Regex> = LazyLock::new(|| {
    let how = r"(?:cargo run (?:-q )?-p |target/debug/)";
    let program = r"(?<package>reactor-v[a-z0-9-]+)(?: --bin (?<bin>[a-z0-9-]+))?";
    Regex::new(&format!("{how}{program}(?: --(?<args>(?s: .*)))?"))
        .expect("a constant, which tests use")
});

/// The command to run, and whether it starts a server. It runs the programs that are already built,
/// and the port of the session replaces 7777.
fn prepare(text: &str, port: Option<u16>, programs: &Path) -> (String, bool) {
    // First, since the port itself may contain 7777.
    let text = port.map_or(text.to_owned(), |port| text.replace("7777", &port.to_string()));
    let mut command = text.clone();
    let mut is_server = false;
    if let Some(found) = PROGRAM.captures(&text) {
        let package = &found["package"];
        // A chapter's other programs, and chapters with a second hyphen, are clients.
        is_server = found.name("bin").is_none() && package.matches('-').count() == 1;
        let program = found.name("bin").map_or(package, |bin| bin.as_str());
        let args = found.name("args").map_or("", |args| args.as_str());
        // The first server takes a free port. Another one gets the port that is in use.
        let addr = match port {
            _ if text.contains("--addr") => String::new(),
            None if !is_server => String::new(),
            port => format!(" --addr 127.0.0.1:{}", port.unwrap_or(0)),
        };
        let run = format!("{}/{program}{addr}{args}", programs.display());
        command = text.replacen(&found[0], &run, 1);
    }
    (command, is_server)
}

/// The text of a session, with marks if there is more than one terminal.
fn render(session: &[Line]) -> String {
    let with_marks = session.iter().any(|(terminal, _)| *terminal != 1);
    let mut last = 0;
    let mut port = None;
    let mut text = String::new();
    for (terminal, line) in session {
        if with_marks && *terminal != last {
            last = *terminal;
            text += &format!("{MARK}{terminal}\n");
        }
        port = port.or(port_in(line));
        // strace shows port 0, which the server was given instead of 7777.
        let mut line = line.replace("htons(0)", "htons(7777)");
        if let Some(port) = port {
            line = line.replace(&port.to_string(), "7777");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// The lines of a session in the form that is compared, those of terminal 1 first.
fn by_terminal(session: &str) -> String {
    let mut terminal = "1";
    let mut lines = Vec::new();
    for line in session.lines() {
        match line.strip_prefix(MARK) {
            Some(number) => terminal = number,
            None => lines.push((terminal, normal(line))),
        }
    }
    // This keeps the order within each terminal.
    lines.sort_by_key(|(terminal, _)| *terminal);
    lines.iter().map(|(terminal, line)| format!("{terminal}: {line}\n")).collect()
}

fn compare(text: &str, now: &str) -> anyhow::Result<()> {
    let (text, now) = (by_terminal(text), by_terminal(now));
    let diff = similar::TextDiff::from_lines(&text, &now);
    let changes = diff.iter_all_changes().map(|it| format!("{}{}", it.tag(), it.value()));
    let changes = changes.collect::<String>();
    ensure!(text == now, "the output on the page (-) and of this run (+) differ:\n{changes}");
    Ok(())
}

/// Numbers that change from run to run, with the text before them.
#[allow(clippy::expect_used)]
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    let after = r"(127\.0\.0\.1:|\[::1\]:|htons\(|pid )\d+|(0x)[[:xdigit:]]+";
    let limits = r"(limit on fds from )\d+ to \d+";
    Regex::new(&format!("{after}|{limits}")).expect("a constant, which tests use")
});

/// A line without what changes from run to run.
fn normal(line: &str) -> String {
    let line = line.trim();
    let (time, rest) = line.split_once(' ').unwrap_or((line, ""));
    let is_time = time.strip_suffix('s').is_some_and(|seconds| seconds.parse::<f64>().is_ok());
    let normal = NUMBER.replace_all(if is_time { rest } else { line }, "$1$2${3}N");
    // strace aligns what a call returns: `close(3)        = 0`.
    normal.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use std::env;

    use super::*;

    fn stage() -> Stage {
        Stage { root: env::temp_dir(), programs: env::temp_dir(), can_trace: true }
    }

    fn page(session: &str) -> String {
        format!("a\n\n```console\n{session}```\n")
    }

    #[test]
    fn a_session_with_the_same_output_passes() {
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
    fn a_session_with_other_output_is_found_and_updated() {
        assert_broken("$ echo a\nb\n", "-1: b\n+1: a\n");
        assert_broken("$ echo a; echo b\na\n", "+1: b\n");
        assert_broken("$ true\n^C\n", "no server to stop");
        assert_broken("a\n", "does not begin with a command");
        assert_broken("", "an empty session");
        assert_broken("$ false\n", "it fails");
        // Lines after the last expected one.
        assert_broken("$ (echo a; sleep 0.1; echo b) &\na\n", "+1: b\n");
        let (old, new) = ("$ echo a\nb\n$ true\nc\n", "$ echo a\na\n$ true\n");
        assert_eq!(replay(&page(old), &stage(), false).unwrap(), (1, page(new)));
    }

    #[test]
    fn a_server_keeps_its_terminal_and_each_line_is_marked_with_its_own() {
        let server = "if [ $2 != 127.0.0.1:0 ]; then echo in use; exit; fi\necho listening on :12345\n\
            trap 'echo stopped; exit' INT\nwhile :; do sleep 0.01; done\n";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("reactor-v01");
        fs::write(&path, format!("#!/bin/bash\n{server}")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let stage = Stage { programs: folder.path().to_owned(), ..stage() };
        let marked = "# terminal 1\n$ target/debug/reactor-v01\nlistening on :7777\n\
            # terminal 2\n$ target/debug/reactor-v01\nin use\n$ echo a\na\n\
            # terminal 1\n^C\nstopped\n$ echo b\nb\n";
        let plain = marked.replace("# terminal 1\n", "").replace("# terminal 2\n", "");
        assert_eq!(replay(&page(&plain), &stage, false).unwrap(), (1, page(marked)));
        assert_eq!(replay(&page(marked), &stage, true).unwrap(), (1, page(marked)));
        let wrong = marked.replace("# terminal 2\n", "");
        assert!(replay(&page(&wrong), &stage, true).is_err());
    }

    #[test]
    fn only_within_a_terminal_is_the_order_compared() {
        let text = "# terminal 1\n$ a\n# terminal 2\n$ b\n# terminal 1\na1\na2\n# terminal 2\nb1\n";
        compare(text, "# terminal 1\n$ a\na1\n# terminal 2\n$ b\nb1\n# terminal 1\na2\n").unwrap();
        for (old, new) in [("a1\na2", "a2\na1"), ("# terminal 2\nb1", "b1"), ("b1\n", "")] {
            compare(text, &text.replace(old, new)).unwrap_err();
        }
    }

    #[test]
    fn illustrations_and_sessions_that_cannot_be_traced_are_not_played() {
        let untraced = Stage { can_trace: false, ..stage() };
        let page = page("$ echo 'strace -c'\nx\n");
        assert_eq!(replay(&page, &untraced, true).unwrap(), (0, page.clone()));
        assert!(replay(&page, &stage(), true).is_err());
        let illustration = page.replace("a\n\n", "<!-- illustration: typed by hand -->\n");
        assert_eq!(replay(&illustration, &stage(), true).unwrap(), (0, illustration));
    }

    #[test]
    fn nothing_keeps_running_after_a_session() {
        let child = stage().spawn("sleep 60 | sleep 60", 1, mpsc::channel().0).unwrap();
        let running = Running { child, is_server: false, terminal: 1 };
        let group = group(&running.child);
        assert_eq!(killpg(group, None), Ok(()));
        drop(running);
        let start = Instant::now();
        // init reaps the shell's children.
        while killpg(group, None).is_ok() {
            assert!(start.elapsed() < LIMIT, "it keeps running");
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
            (server, Some(37777), "RUST_LOG=trace /p/reactor-v03 --addr 127.0.0.1:37777", true),
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
        }
        assert_ne!(normal("   0.1s  INFO a 1"), normal("   0.1s  INFO a 2"));
        assert_ne!(normal("moved 1 to 2"), normal("moved 1 to 3"));
    }
}
