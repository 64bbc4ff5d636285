//! Recorded runs: servers and clients that a page replays step by step, in `<reactor-replay>`.
//!
//! A script (`docs/src/runs/NAME.run`) says what the clients do. The server runs under strace(1) with its log at
//! trace, and the recording becomes `NAME.json` beside the script and the picture `images/run-NAME.svg`.

mod model;
mod record;
mod script;
mod steps;
pub mod strace;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use serde::Serialize;
use serde_json::{Map, Value};

pub use self::record::Recording;
use self::script::{Act, Part, Script};
use self::steps::Step;
use crate::picture;
use crate::sequence;
use crate::sources::{Logs, Piece, Sources};
use crate::workspace::Workspace;

/// Where the scripts and the recordings are.
const RUNS: &str = "docs/src/runs/";

/// How many arrows a run's picture has at most.
const MOST_ARROWS: usize = 40;

/// How often a run is recorded before it counts as different. Threads may take turns in another order.
const TRIES: usize = 3;

/// A run as a page has it.
#[derive(Serialize)]
struct Run {
    title: String,
    program: String,
    sources: Vec<Piece>,
    start: Map<String, Value>,
    /// Where the main thread is at the start.
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<(usize, usize)>,
    #[serde(flatten)]
    part: Steps,
}

/// Steps, and what may follow them.
#[derive(Debug, Default, PartialEq, Serialize)]
struct Steps {
    steps: Vec<Step>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    choices: Vec<Choice>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Choice {
    label: String,
    #[serde(flatten)]
    part: Steps,
}

/// Records the runs with these names, or all. With `check`, compares them with the files.
pub fn update(workspace: &Workspace, names: &[String], check: bool) -> Result<()> {
    if !strace::works()? && check {
        println!("not checked, because strace does not work here; a container may forbid it");
        return Ok(());
    }
    let sources = Sources::read(workspace)?;
    let scripts: Vec<&str> = workspace.files(RUNS, ".run").collect();
    let is_known = |name: &String| scripts.contains(&&*format!("{RUNS}{name}.run"));
    if let Some(name) = names.iter().find(|name| !is_known(name)) {
        bail!("no run is called {name}: there is no {RUNS}{name}.run");
    }
    for path in scripts {
        let name = path[RUNS.len()..].trim_end_matches(".run");
        if !names.is_empty() && !names.iter().any(|it| it == name) {
            continue;
        }
        let script = Script::parse(&workspace.read(path)?).with_context(|| path.to_owned())?;
        let bin = workspace.build([script.program()])?;
        let files = || -> Result<Vec<(String, String)>> {
            let (json, log) = make(&bin, &sources, &script)?;
            let mut files = vec![(path.replace(".run", ".json"), json)];
            // Without a loop there is no trace to draw.
            if log.contains("epoll_wait: ") {
                let picture = sequence::draw(&format!("run-{name}"), "", &log, MOST_ARROWS)?;
                files.push((
                    format!("docs/src/images/run-{name}.svg"),
                    picture::with_style(&picture)?,
                ));
            }
            Ok(files)
        };
        let mut tries = 0;
        let mut last = Vec::new();
        loop {
            let files = files().with_context(|| path.to_owned())?;
            let is_stale = |(file, text): &&(String, String)| {
                let old = workspace.read(file).unwrap_or_default();
                if check { comparable(&old) != comparable(text) } else { old != *text }
            };
            let stale = files.iter().find(is_stale);
            match stale {
                None => break println!("{name}: ok"),
                // Sometimes a thread takes an fd for a moment: what comes twice is the rule.
                Some(_) if !check && last == files => {
                    for (file, text) in &files {
                        fs::write(workspace.root.join(file), text)?;
                    }
                    break println!("updated {name}");
                }
                Some(_) if !check => {
                    tries += 1;
                    ensure!(tries < 2 * TRIES, "{path}: no two recordings are the same");
                    last = files;
                }
                Some((file, text)) => {
                    tries += 1;
                    let old = comparable(&workspace.read(file).unwrap_or_default());
                    let how = difference(&old, &comparable(text));
                    ensure!(tries < TRIES, "{file} differs: {how}");
                }
            }
        }
    }
    Ok(())
}

/// What two recordings have in common. How many bytes the kernel has room for differs from run to run, and so does
/// how often that happens.
fn comparable(text: &str) -> String {
    #[allow(clippy::expect_used)]
    static VARIES: LazyLock<Regex> = LazyLock::new(|| {
        let varies = r#" \d{1,3}(,\d{3})+|\d[\d,]* bytes?|\d{4,}|\d+ more times|"beat":\d+"#;
        Regex::new(varies).expect("a constant, which each check uses")
    });
    VARIES.replace_all(text, "#").into_owned()
}

/// Where two texts differ first.
fn difference(old: &str, new: &str) -> String {
    let same = old.bytes().zip(new.bytes()).take_while(|(a, b)| a == b).count();
    let part = |text: &str| {
        let start = (0..=same.saturating_sub(60)).rev().find(|at| text.is_char_boundary(*at));
        text[start.unwrap_or(0)..].chars().take(160).collect::<String>()
    };
    format!("committed: …{}…\nrecorded: …{}…", part(old), part(new))
}

/// A script's recording, and the log of its first path.
fn make(bin: &Path, sources: &Sources, script: &Script) -> Result<(String, String)> {
    let package = script.program();
    let mut logs = sources.logs(package)?;
    let mut paths = Vec::new();
    leaves(&script.part, &mut Vec::new(), &mut Vec::new(), &mut paths);
    let (mut start, mut at) = (Map::new(), None);
    let (mut part, mut log) = (Steps::default(), String::new());
    for (acts, labels) in &paths {
        let recording = record::record(script, acts, bin)?;
        let outcome = steps::steps(&recording, &mut logs);
        ensure!(start.is_empty() || start == outcome.start, "two of its runs begin differently");
        (start, at) = (outcome.start, outcome.at);
        if log.is_empty() {
            log = outcome.log;
        }
        insert(&mut part, outcome.steps, labels)?;
    }
    let run = Run {
        title: script.title.clone(),
        program: package.to_owned(),
        sources: logs.pieces,
        start,
        at,
        part,
    };
    Ok((json(&run)?, log))
}

/// One line of JSON, which may stand in a page.
fn json(run: &Run) -> Result<String> {
    Ok(serde_json::to_string(run)?.replace('<', "\\u003c") + "\n")
}

/// The acts of each path through the choices, with the choices: after how many acts, and which.
type Paths = Vec<(Vec<(char, Act)>, Vec<(usize, String)>)>;

fn leaves(
    part: &Part,
    acts: &mut Vec<(char, Act)>,
    labels: &mut Vec<(usize, String)>,
    paths: &mut Paths,
) {
    let before = acts.len();
    acts.extend(part.acts.iter().cloned());
    for (label, choice) in &part.choices {
        labels.push((acts.len(), label.clone()));
        leaves(choice, acts, labels, paths);
        labels.pop();
    }
    if part.choices.is_empty() {
        paths.push((acts.clone(), labels.clone()));
    }
    acts.truncate(before);
}

/// Puts the steps of one path into the tree. What it shares with another path has to be the same.
fn insert(part: &mut Steps, steps: Vec<Step>, labels: &[(usize, String)]) -> Result<()> {
    let Some(((acts, label), later)) = labels.split_first() else {
        part.steps = steps;
        return Ok(());
    };
    let (shared, rest): (Vec<Step>, Vec<Step>) =
        steps.into_iter().partition(|step| step.beat <= *acts);
    if part.choices.is_empty() {
        part.steps = shared;
    } else {
        let differs = part.steps.iter().zip(&shared).find(|(a, b)| a != b);
        ensure!(
            differs.is_none() && part.steps.len() == shared.len(),
            "two runs differ before {label:?}: {differs:?}"
        );
    }
    if part.choices.last().is_none_or(|choice| choice.label != *label) {
        part.choices.push(Choice { label: label.clone(), part: Steps::default() });
    }
    let choice = part.choices.last_mut().context("a choice")?;
    insert(&mut choice.part, rest, later)
}

/// Fails before a run, rather than after it, if the page cannot be written.
pub fn ensure_folder(page: &Path) -> Result<()> {
    let folder = page.parent().filter(|folder| !folder.as_os_str().is_empty());
    ensure!(folder.is_none_or(Path::is_dir), "{}: there is no such folder", page.display());
    ensure!(!page.is_dir(), "{} is a folder", page.display());
    Ok(())
}

/// Runs a server until it ends, by Ctrl-C for example, and writes what it did to `page`.
pub fn watch(workspace: &Workspace, command: &[String], page: &Path) -> Result<()> {
    ensure_folder(page)?;
    let sources = Sources::read(workspace)?;
    let (program, args) = command.split_first().context("no command")?;
    let chapter = workspace.has(&format!("{program}/Cargo.toml")).then_some(program);
    let mut command = match chapter {
        Some(chapter) => Command::new(workspace.build([chapter])?.join(chapter)),
        None => Command::new(program),
    };
    command.args(args);
    let folder = tempfile::tempdir()?;
    let calls = record::watch(&command, &folder.path().join("strace"))?;
    let logs = match chapter {
        Some(chapter) => sources.logs(chapter)?,
        None => Logs::default(),
    };
    write_page(workspace, Recording::derived(calls), logs, program, page)
}

/// What strace has reported of a server with other clients.
pub fn recording(report: &str) -> Result<Recording> {
    Ok(Recording::derived(strace::parse(report)?))
}

/// Writes a page of its own, which needs no other file. Without `logs` it shows no sources.
pub fn write_page(
    workspace: &Workspace,
    recording: Recording,
    mut logs: Logs,
    program: &str,
    page: &Path,
) -> Result<()> {
    let listens = recording.calls.iter().any(|call| call.name == "listen");
    ensure!(listens, "the server has not listened, so there is nothing to replay");
    ensure!(!recording.acts.is_empty(), "no client has connected, so there is nothing to replay");
    let mut served = recording.calls.iter().skip_while(|call| call.name != "listen");
    let forks = served
        .any(|call| call.name == "fork" || call.name == "clone" && !call.args.contains("CLONE_VM"));
    ensure!(!forks, "the server forks: a replay shows one process, though many threads");
    let outcome = steps::steps(&recording, &mut logs);
    let (start, part) = (outcome.start, Steps { steps: outcome.steps, choices: Vec::new() });
    let title = "A recorded run".to_owned();
    let (program, sources) = (program.to_owned(), logs.pieces);
    let steps = part.steps.len();
    let run = Run { title, program, sources, start, at: outcome.at, part };
    let [style, script] = ["docs/replay.css", "docs/replay.js"].map(|file| workspace.read(file));
    let html = format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>A run of {}</title>\n\
         <style>\n:root {{ color-scheme: light dark }}\nbody {{ max-width: 80em; margin: 1em auto; padding: 0 1em }}\n\
         {}</style>\n\
         <reactor-replay id=\"run\">\n<script type=\"application/json\">{}</script>\n</reactor-replay>\n\
         <script>\n{}</script>\n</html>\n",
        picture::escape(&run.program),
        style?,
        json(&run)?,
        script?
    );
    fs::write(page, html).with_context(|| page.display().to_string())?;
    Ok(writeln!(std::io::stdout(), "{steps} steps in {}", page.display())?)
}
