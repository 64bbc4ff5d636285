//! `cargo xtask grade`: runs a chapter's cases against a server (or client) of the learner's own. A case is
//! one of the chapter's tests, with a name and a sentence; they are in `tests/cases`, one file for each chapter.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::iter;
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::Deserialize;
use tempfile::TempDir;

use crate::notes;
use crate::replay::{self, Recording, strace};
use crate::workspace::Workspace;

/// How long a test waits for the server on a machine that is quick and has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long a byte and its echo between two threads take there.
const ROUND_TRIP: Duration = Duration::from_micros(25);

/// How many of the last lines are shown that a server has written.
const MAX_YOURS: usize = 20;

/// The cases of one chapter, in the order in which you would build the server.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cases {
    #[serde(rename = "case")]
    cases: Vec<Case>,
}

/// One of the chapter's tests, as a learner sees it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Case {
    /// In a word or two, joined by hyphens.
    pub name: String,
    /// What the server or the client has to do, in one sentence.
    pub must: String,
    /// The section of the book about it, beside `docs/src`.
    page: String,
    /// What to do or where to look if the case fails, without giving the code away.
    pub hint: String,
    /// How to try it without the grader, if a line is enough.
    by_hand: Option<String>,
    /// The path of the test.
    test: String,
}

/// What to do with the cases of a chapter.
pub struct Grade<'a> {
    workspace: &'a Workspace,
    chapter: &'a str,
    /// The first word of the command.
    program: String,
    /// The command for a shell.
    command: String,
    /// How long a test waits for the server.
    patience: Duration,
    /// Where strace(1) writes what each server does, if it is to be recorded.
    reports: Option<TempDir>,
}

impl Cases {
    /// Reads the cases of `chapter`, for example `v03`.
    pub fn read(workspace: &Workspace, chapter: &str) -> Result<Self> {
        let names: Vec<&str> = chapters(workspace).collect();
        ensure!(names.contains(&chapter), "no cases for {chapter:?}, but for {}", names.join(", "));
        let path = format!("tests/cases/{chapter}.toml");
        toml::from_str(&workspace.read(&path)?).context(path)
    }

    /// Each case with its id, such as `3.4` or `client.1`, or only the one with this id or name.
    pub fn numbered(&self, chapter: &str, only: Option<&str>) -> Result<Vec<(String, &Case)>> {
        let name = chapter.rsplit('-').next().unwrap_or(chapter);
        let chapter = name.trim_start_matches(['v', '0']);
        let id = |(n, case)| (format!("{chapter}.{}", n + 1), case);
        let mut cases: Vec<_> = self.cases.iter().enumerate().map(id).collect();
        if let Some(only) = only {
            cases.retain(|(id, case)| id == only || case.name == only);
            ensure!(!cases.is_empty(), "no case {only:?}: --list shows them");
        }
        Ok(cases)
    }

    /// Prints each case: its id, its name and what it asks.
    pub fn list(&self, chapter: &str, only: Option<&str>) -> Result<()> {
        for (id, case) in self.numbered(chapter, only)? {
            writeln!(std::io::stdout(), "{id:5} {:16} {}", case.name, case.must)?;
        }
        Ok(())
    }
}

/// The chapters that have cases.
fn chapters(workspace: &Workspace) -> impl Iterator<Item = &str> {
    let (folder, end) = ("tests/cases/", ".toml");
    workspace.files(folder, end).map(|path| &path[folder.len()..path.len() - end.len()])
}

impl<'a> Grade<'a> {
    /// For a server that `command` starts. One of its words contains `{addr}`. Builds the tests.
    pub fn new(workspace: &'a Workspace, chapter: &'a str, command: &[String]) -> Result<Self> {
        ensure!(
            command.iter().any(|word| word.contains("{addr}")),
            "the command has to contain {{addr}}, which stands for the server's HOST:PORT"
        );
        let program = command.first().cloned().unwrap_or_default();
        let command = command.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ");
        // On a machine that takes longer for everything, the server may too.
        let slowness = round_trip()?.as_secs_f64() / ROUND_TRIP.as_secs_f64();
        let patience = PATIENCE.mul_f64(slowness.clamp(1.0, 6.0));
        let grade = Self { workspace, chapter, program, command, patience, reports: None };
        let built = grade.test(&["--no-run"], patience)?;
        ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        Ok(grade)
    }

    /// Records what each server does, from now on.
    pub fn record(&mut self) -> Result<()> {
        self.reports = Some(tempfile::tempdir()?);
        Ok(())
    }

    /// The last server that a client has connected to.
    pub fn last_recording(&self) -> Result<Recording> {
        let folder = self.reports.as_ref().context("nothing was recorded")?;
        let reports = fs::read_dir(folder)?.map(|report| {
            let report = report?;
            Ok((report.metadata()?.modified()?, report.path()))
        });
        let mut reports = reports.collect::<Result<Vec<_>>>()?;
        reports.sort();
        for (_, report) in reports.iter().rev() {
            let recording = replay::recording(&fs::read_to_string(report)?)?;
            if !recording.acts.is_empty() {
                return Ok(recording);
            }
        }
        bail!("no client has connected, so there is nothing to replay")
    }

    /// Fails if the command names no program.
    pub fn check_program(&self) -> Result<()> {
        let program = &self.program;
        let mut shell = users_shell("command -v \"$1\" >/dev/null");
        let status = shell.args(["sh", program]).status()?;
        ensure!(status.success(), "no program {program:?}, or it is not executable");
        Ok(())
    }

    /// Runs the cases, up to the first failure or all of them, and writes the report to `out`. Returns whether
    /// all have passed.
    pub fn run(
        &self,
        cases: &Cases,
        only: Option<&str>,
        all: bool,
        out: &mut impl Write,
    ) -> Result<bool> {
        self.check_program()?;
        let cases = cases.numbered(self.chapter, only)?;
        let mut passed = 0;
        for (id, case) in &cases {
            if self.grade(id, case, true, out)? {
                passed += 1;
            } else if !all {
                break;
            }
        }
        writeln!(out, "\n{passed} of {} cases passed", cases.len())?;
        if only.is_none() && passed == cases.len() && !self.chapter.contains("client") {
            notes::print(self.chapter, &self.command)?;
        }
        Ok(passed == cases.len())
    }

    /// Runs a case, writes the report to `out`, with the hint if there is to be one, and returns whether it
    /// has passed.
    pub fn grade(
        &self,
        id: &str,
        case: &Case,
        has_hint: bool,
        out: &mut impl Write,
    ) -> Result<bool> {
        write!(out, "{id:5} {:16} ", case.name)?;
        // The line is complete after the case, which may take a while.
        out.flush()?;
        let why = self.failure(case)?;
        writeln!(out, "{}", if why.is_none() { "pass" } else { "FAIL" })?;
        if let Some(why) = &why {
            self.explain(id, case, why, has_hint, out)?;
        }
        Ok(why.is_none())
    }

    /// Runs a case, and a second time with twice the patience if that was the matter. If it fails, returns
    /// what its test says.
    fn failure(&self, case: &Case) -> Result<Option<String>> {
        let why = self.failure_within(case, self.patience)?;
        if why.as_ref().is_some_and(|why| why.contains("timed out")) {
            return self.failure_within(case, 2 * self.patience);
        }
        Ok(why)
    }

    fn failure_within(&self, case: &Case, patience: Duration) -> Result<Option<String>> {
        let output = self.test(&["--", "--exact", &case.test], patience)?;
        let stdout = String::from_utf8_lossy(&output.stdout);
        // Neither would say anything about the server, and both end with success.
        let is_skipped = String::from_utf8_lossy(&output.stderr).contains("skipped: ");
        ensure!(!is_skipped, "{} is only for the chapter's own program", case.test);
        ensure!(!stdout.contains("running 0 tests"), "no test {} in {}", case.test, self.chapter);
        Ok((!output.status.success()).then(|| report(&stdout)))
    }

    /// Runs cargo test for the chapter's tests, with the learner's server in place of the chapter's.
    fn test(&self, args: &[&str], patience: Duration) -> Result<Output> {
        let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo
            .args(["test", "--locked", "--manifest-path"])
            .arg(self.workspace.root.join("Cargo.toml"));
        let package = format!("reactor-{}", self.chapter);
        cargo.args(["--package", &package, "--test", &self.chapter.replace('-', "_")]);
        let command = match &self.reports {
            None => self.command.clone(),
            Some(folder) => {
                let mut traced = strace::command(&folder.path().join("report"));
                // As a grandchild, so that the process that a test starts is the server.
                traced.arg("-D");
                let words = iter::once(traced.get_program()).chain(traced.get_args());
                let words: Vec<_> = words.map(|word| quoted(&word.to_string_lossy())).collect();
                // $$ is another number for each server.
                format!("{} {}", words.join(" ").replace("/report", "/\"$$\""), self.command)
            }
        };
        cargo.args(args).env("REACTOR_CMD", command).env_remove("RUST_BACKTRACE");
        cargo.env("REACTOR_LIMIT", patience.as_secs().to_string());
        cargo.output().context("cannot run cargo")
    }

    fn explain(
        &self,
        id: &str,
        case: &Case,
        why: &str,
        has_hint: bool,
        out: &mut impl Write,
    ) -> Result<()> {
        writeln!(out, "\n  {}\n", case.must)?;
        for line in why.lines() {
            writeln!(out, "  {line}")?;
        }
        writeln!(out, "\n  read   docs/src/{}", case.page)?;
        // Before it listens, no hint of a case is of use.
        if has_hint && !why.contains("without listening") {
            writeln!(out, "  hint   {}", case.hint)?;
        }
        if let Some(command) = &case.by_hand {
            writeln!(out, "  try    {command}")?;
        }
        writeln!(
            out,
            "  again  scripts/grade.sh {} --case {id} -- {}",
            self.chapter, self.command
        )?;
        Ok(())
    }
}

/// A shell that runs `script` in the directory of the user, which cargo keeps in PWD.
pub fn users_shell(script: &str) -> Command {
    let mut shell = Command::new("sh");
    shell.args(["-c", script]).current_dir(env::var_os("PWD").unwrap_or_else(|| ".".into()));
    shell
}

/// How long a byte and its echo over loopback take now, on average.
fn round_trip() -> Result<Duration> {
    const TIMES: u32 = 1000;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut client = TcpStream::connect(listener.local_addr()?)?;
    let (mut server, _) = listener.accept()?;
    let start = Instant::now();
    let echo = thread::spawn(move || {
        let mut byte = [0];
        (0..TIMES)
            .try_for_each(|_| server.read_exact(&mut byte).and_then(|()| server.write_all(&byte)))
    });
    let mut byte = [0];
    for _ in 0..TIMES {
        client.write_all(&byte)?;
        client.read_exact(&mut byte)?;
    }
    echo.join().map_err(|_| anyhow!("the echo has panicked"))??;
    Ok(start.elapsed() / TIMES)
}

/// What a failed test says, from the output of libtest: its message, then what the server wrote.
pub(crate) fn report(stdout: &str) -> String {
    let lines = stdout.lines().skip_while(|line| !line.starts_with("---- ")).skip(1);
    let lines = lines.take_while(|line| *line != "failures:").filter(|line| !line.is_empty());
    let mut lines = lines.collect::<Vec<_>>().into_iter();
    let is_noise =
        |line: &&str| ["note: ", "thread '", "---- "].iter().any(|start| line.starts_with(start));
    let said = lines.by_ref().take_while(|line| *line != "The program's output:");
    let said: Vec<_> = said.filter(|line| !is_noise(line)).map(str::to_owned).collect();
    let last = lines.len().saturating_sub(MAX_YOURS);
    let yours = lines.skip(last).map(|line| format!("[yours] {line}"));
    said.into_iter().chain(yours).map(|line| line + "\n").collect()
}

/// `word` for a POSIX shell.
pub fn quoted(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:={},@%+".contains(c);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pages::{Mention, mentions};

    /// The tests and the sections of the book that the cases name.
    #[test]
    fn every_case_has_a_test_and_a_page() {
        let workspace = Workspace::current().unwrap();
        let read = |path: &str| workspace.read(path).unwrap();
        let text = |start, end| workspace.files(start, end).map(read).collect::<String>();
        let tests = text("tests/", ".rs");
        for chapter in chapters(&workspace) {
            let cases = Cases::read(&workspace, chapter).unwrap().cases;
            for case in cases {
                let test = case.test.rsplit("::").next().unwrap();
                assert!(tests.contains(&format!("fn {test}(")), "{chapter}: no test {test}");
                let (page, section) = case.page.split_once('#').unwrap();
                let page = read(&format!("docs/src/{page}"));
                let section = Mention::Anchor(section.to_owned());
                let has_it = mentions(&page).iter().any(|(_, it)| *it == section);
                assert!(has_it, "{chapter}: no section {}", case.page);
                assert!(case.must.contains("MUST"), "{}", case.must);
            }
        }
    }

    #[test]
    fn words_are_quoted_for_a_shell() {
        assert_eq!(quoted("--addr={addr}"), "--addr={addr}");
        assert_eq!(quoted("a server's"), r"'a server'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn the_report_has_the_message_and_the_servers_output() {
        let stdout = "running 1 test\nF\n\n---- echoes stdout ----\n\nthread 'echoes' (7) panicked at \
            tests/v03.rs:3:5:\nreading 5 bytes: end of file\nnote: run with `RUST_BACKTRACE=1`\n\
            The program's output:\nTraceback\n\n\nfailures:\n    echoes\n";
        assert_eq!(report(stdout), "reading 5 bytes: end of file\n[yours] Traceback\n");
    }
}
