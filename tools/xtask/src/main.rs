//! `cargo xtask`: keeps the text in step with the code and the measurements.

mod answers;
mod blocks;
mod chart;
mod console;
mod curve;
mod grade;
mod mentions;
mod notes;
mod pages;
mod phrases;
mod picture;
mod replay;
mod sequence;
mod sources;
mod starter;
mod verdicts;
mod watch;
mod workspace;

use std::collections::BTreeMap;
use std::fs;
use std::path::{self, PathBuf};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, ensure};
use bench::latency::Latency;
use bench::report::Report;
use clap::{Parser, Subcommand};

use crate::answers::WorkspaceCopy;
use crate::grade::{Cases, Grade};
use crate::sources::{Logs, Sources};
use crate::workspace::{Workspace, beside};

/// Keeps the text in step with the code and the measurements
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Updates what README.md and docs take from the code, the figures and the traces, and looks
    /// for broken links, unknown names and phrases to avoid
    Docs {
        /// Changes nothing, and fails if something is out of date
        #[arg(long)]
        check: bool,
    },
    /// Replays the console sessions in README.md and docs, and updates their output
    Console {
        /// Changes nothing, and fails if an output differs
        #[arg(long)]
        check: bool,
        /// Only these pages, for example README.md or docs/src/v01.md
        pages: Vec<String>,
    },
    /// Applies each answer to an exercise to a copy of the workspace, and tests it there. Without the
    /// rest of the answer, its tests have to fail
    Answers {
        /// Runs only the tests that an answer names, not all of its chapter's: a few seconds for
        /// each answer instead of half a minute
        #[arg(long)]
        quick: bool,
        /// Only these patches, for example docs/src/answers/v01-1.patch
        patches: Vec<String>,
    },
    /// Grades servers with one mistake each, and updates what the grader says of them
    Verdicts {
        /// Changes nothing, and fails if a verdict differs
        #[arg(long)]
        check: bool,
    },
    /// Records the runs that pages replay: docs/src/runs/NAME.run
    Record {
        /// Changes nothing, and fails if a recording differs
        #[arg(long)]
        check: bool,
        /// Only these, for example two-clients
        names: Vec<String>,
    },
    /// Runs a server until Ctrl-C, and writes a page that replays what it did. Needs strace
    #[command(override_usage = "scripts/replay.sh [--output FILE] CHAPTER [OPTIONS]...
       scripts/replay.sh [--output FILE] COMMAND...")]
    Replay {
        /// The page
        #[arg(long, value_name = "FILE", default_value = "replay.html")]
        output: PathBuf,
        /// A chapter, for example reactor-v03, or the command of another server; with its options
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Grades your solution of an exercise: runs its tests, those of the answer, on your working tree as
    /// it is. Changes nothing there
    Exercise {
        /// The chapter and the number, for example v03-2
        id: String,
    },
    /// Grades a server of your own, in any language, by a chapter's cases, up to the first that fails
    #[command(
        override_usage = "scripts/grade.sh CHAPTER [--all] [--case CASE] [--record FILE] -- COMMAND...
       scripts/grade.sh CHAPTER --list
       scripts/grade.sh CHAPTER DIR [--watch] [-- COMMAND...]
       scripts/grade.sh --start CHAPTER DIR
       scripts/grade.sh exercise ID"
    )]
    Grade {
        /// Goes on after a failure
        #[arg(long)]
        all: bool,
        /// Only prints the cases
        #[arg(long)]
        list: bool,
        /// Only the case with this number or name, for example 3.4 or slow-reader
        #[arg(long, value_name = "CASE")]
        case: Option<String>,
        /// Writes a page that replays what the server did in the last case. Needs strace
        #[arg(long, value_name = "FILE", conflicts_with = "watch")]
        record: Option<PathBuf>,
        /// Makes a crate to begin with, in the new folder DIR
        #[arg(long, requires = "dir", conflicts_with = "watch")]
        start: bool,
        /// Grades again after each change in DIR
        #[arg(long, requires = "dir", conflicts_with_all = ["all", "case", "list"])]
        watch: bool,
        /// The chapter, for example v03
        chapter: String,
        /// The folder of your server. A crate there is built, and needs no command
        dir: Option<PathBuf>,
        /// How to start the server, or the client; {addr} stands for the server's HOST:PORT
        #[arg(last = true, required_unless_present_any = ["list", "dir"])]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of the output has seen enough.
        Err(err) if is_broken_pipe(&err) => ExitCode::FAILURE,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(err: &anyhow::Error) -> bool {
    let err = err.downcast_ref::<std::io::Error>();
    err.is_some_and(|err| err.kind() == std::io::ErrorKind::BrokenPipe)
}

fn run(task: Task) -> anyhow::Result<()> {
    let workspace = Workspace::current()?;
    match task {
        Task::Docs { check } => docs(&workspace, check),
        Task::Console { check, pages } => console(&workspace, check, pages),
        Task::Answers { quick, patches } => answers(&workspace, patches, quick),
        Task::Verdicts { check } => {
            let now = verdicts::replay(&workspace, check)?;
            if !check {
                fs::write(workspace.root.join(verdicts::FILE), now)?;
            }
            Ok(())
        }
        Task::Record { check, names } => replay::update(&workspace, &names, check),
        Task::Replay { output, command } => replay::watch(&workspace, &command, &output),
        Task::Exercise { id } => {
            let passed = WorkspaceCopy::of(&workspace)?.grade(&workspace, &id)?;
            ensure!(passed, "{id} isn't solved yet");
            Ok(())
        }
        Task::Grade { start: true, chapter, dir: Some(dir), .. } => {
            starter::make(&workspace, &chapter, &dir)
        }
        Task::Grade { all, list, watch, case, record, chapter, dir, mut command, .. } => {
            let (cases, only) = (Cases::read(&workspace, &chapter)?, case.as_deref());
            if list {
                return cases.list(&chapter, only);
            }
            if let (Some(dir), true) = (&dir, command.is_empty()) {
                let manifest = dir.join("Cargo.toml");
                ensure!(manifest.exists(), "no {}: add -- COMMAND", manifest.display());
                let program = path::absolute(dir.join("target/debug/mine"))?;
                command = vec![program.display().to_string(), "--addr".into(), "{addr}".into()];
            }
            let mut grade = Grade::new(&workspace, &chapter, &command)?;
            if let Some(dir) = &dir {
                if watch {
                    return watch::watch(&grade, &cases.numbered(&chapter, None)?, dir);
                }
                ensure!(watch::build(dir)?, "not graded");
            }
            if let Some(page) = &record {
                replay::ensure_folder(page)?;
                grade.record()?;
            }
            let passed = grade.run(&cases, only, all, &mut std::io::stdout())?;
            if let Some(page) = record {
                let recording = grade.last_recording()?;
                replay::write_page(&workspace, recording, Logs::default(), &command[0], &page)?;
            }
            ensure!(passed, "not all cases have passed");
            Ok(())
        }
    }
}

fn docs(workspace: &Workspace, check: bool) -> anyhow::Result<()> {
    const FIGURES: &str = "tools/bench/figures.json";
    const LATENCY: &str = "tools/bench/latency.json";
    let sources = Sources::read(workspace)?;
    let report = Report::from_json(&workspace.read(FIGURES)?).context(FIGURES)?;
    // The pages and diagrams as they should be.
    let mut files = BTreeMap::new();
    for path in workspace.pages() {
        let page = workspace.read(path)?;
        let is_chapter = page.contains("\n## Exercises\n");
        ensure!(!is_chapter || page.contains("<!-- reading"), "{path}: no reading list");
        let page = blocks::refresh(&page, &sources, &report).with_context(|| path.to_owned())?;
        for block in pages::blocks(&page) {
            let Some(args) = block.comment_of("sequence") else { continue };
            let (name, bytes) = args.split_once(", ").unwrap_or((args, ""));
            let svg = sequence::draw(picture::id(name), bytes, block.body, usize::MAX)
                .with_context(|| format!("{path}: {}", block.place()))?;
            files.insert(beside(path, name)?, svg);
        }
        for (table, name) in blocks::charts(&page) {
            let table = report.table(table).with_context(|| format!("no table {table:?}"))?;
            let svg = chart::draw(picture::id(name), &table).with_context(|| name.to_owned())?;
            files.insert(beside(path, name)?, svg);
        }
        for name in blocks::curves(&page) {
            let latency = Latency::from_json(&workspace.read(LATENCY)?).context(LATENCY)?;
            let svg = curve::draw(picture::id(name), &latency).context(LATENCY)?;
            files.insert(beside(path, name)?, svg);
        }
        files.insert(path.to_owned(), page);
    }
    for path in workspace.files("docs/", ".svg") {
        if !files.contains_key(path) {
            files.insert(path.to_owned(), workspace.read(path)?);
        }
    }
    for (path, svg) in files.iter_mut().filter(|(path, _)| path.ends_with(".svg")) {
        *svg = picture::with_style(svg).with_context(|| path.clone())?;
    }
    files.retain(|path, text| workspace.read(path).ok().as_ref() != Some(text));
    let stale = files.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    ensure!(!check || stale.is_empty(), "out of date: {stale}; `cargo xtask docs` fixes it");
    for (path, text) in &files {
        fs::write(workspace.root.join(path), text).with_context(|| path.to_owned())?;
    }
    if !stale.is_empty() {
        println!("updated {stale}");
    }
    // List the files again: a diagram may be new.
    mentions::check(&Workspace::at(&workspace.root)?, &sources)?;
    phrases::check(workspace)
}

fn console(workspace: &Workspace, check: bool, mut pages: Vec<String>) -> anyhow::Result<()> {
    if pages.is_empty() {
        pages.extend(workspace.pages().map(str::to_owned));
    }
    let stage = console::Stage::set(workspace)?;
    let replay = |name: &str| {
        let page = workspace.read(name)?;
        let (count, fresh) = console::replay(&page, &stage, check)?;
        if check {
            println!("{name}: {count} sessions");
        } else if fresh != page {
            fs::write(workspace.root.join(name), fresh)?;
            println!("updated {name}");
        }
        anyhow::Ok(())
    };
    let pages = Mutex::new(pages.into_iter());
    let next = || pages.lock().unwrap_or_else(PoisonError::into_inner).next();
    let replay_all = || {
        std::iter::from_fn(next).try_for_each(|name| replay(&name).with_context(|| name.clone()))
    };
    // Sessions mostly wait. But one that is to be printed has the machine for itself.
    let workers = if check { 3 } else { 1 };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(replay_all)).collect();
        threads.into_iter().try_for_each(|thread| {
            thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a thread has panicked")))
        })
    })
}

fn answers(workspace: &Workspace, mut patches: Vec<String>, quick: bool) -> anyhow::Result<()> {
    if patches.is_empty() {
        patches.extend(workspace.answers().map(str::to_owned));
    }
    let copy = WorkspaceCopy::of(workspace)?;
    // All at first, as the chapters' programs are the same for all of them.
    for patch in &patches {
        copy.check_tests(&workspace.root.join(patch)).with_context(|| patch.clone())?;
    }
    for patch in patches {
        copy.check(&workspace.root.join(&patch), quick).with_context(|| patch.clone())?;
        println!("{patch}: ok");
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::workspace::tests::repository;

    const PAGE: &str = "# One *two* `A::b`: c\n\n`A` `A::b()` `lib.rs`, `A` `epoll_wait(fd)` `127.0.0.1:80` \
        `cargo run -p common` `common/src/lib.rs` `/proc/self` [`D`](https://b.c/d) [f](#one-two-ab-c) \
        [g](../../docs/src/SUMMARY.md) ![p](s.svg) ![q](drawn.svg)\n\n\
        <!-- code: common/src/lib.rs, A -->\n```rust\n```\n\n\
        ```diff\n{{#include answers/v01-1.patch}}\n```\n```diff\n{{#include diffs/v02.diff}}\n```\n\n\
        <script>{{#include runs/a.json}}</script>\n\n\
        <!-- sequence: s.svg -->\n```console\n$ cargo run\n 0.1s TRACE epoll_wait: 1 ready\n```\n\n\
        <!-- illustration: C -->\n```c\nint x;\n```\n\n\
        <!-- figures: accept -->\n\n<!-- end of figures -->\n\n\
        <!-- figures: cpu, bars.svg -->\n\n<!-- end of figures -->\n\n![b](bars.svg)\n\n\
        <!-- latency: curves.svg -->\n\n![c](curves.svg)\n\n\
        <!-- reading, at most 5 by v01: common/src/lib.rs -->\n\n<!-- end of reading -->\n\n\
        ## Exercises\n";

    const FIGURES: &str = r#"{"rounds": 1, "seconds": 1.0, "servers": ["floor", "peer"],
        "scenarios": ["1x1x64"], "loads": [
            {"server": "floor", "scenario": "1x1x64", "round": 0, "rate": 1, "cpu_ns": 1000,
                "p50_us": 1, "p99_us": 1, "p999_us": 1, "beside": 0},
            {"server": "peer", "scenario": "1x1x64", "round": 0, "rate": 1, "cpu_ns": 1500,
                "p50_us": 1, "p99_us": 1, "p999_us": 1, "beside": 0}],
        "idle": [], "calls": [], "machine": {"processor": "P", "processors": 2,
        "kernel": "K", "congestion_control": "C", "rustc": "R", "commit": "C"},
        "accepts": [{"server": "floor", "round": 0, "rate": 1234.5, "cpu_ns": 20000}]}"#;

    const LATENCY: &str = r#"{"rounds": 1, "seconds": 1.0, "machine": {"processor": "P", "processors": 2,
        "kernel": "K", "congestion_control": "C", "rustc": "R", "commit": "C"}, "lines": [
        {"server": "peer", "open": true, "points": [{"rate": 1000, "p99_us": 20}]}]}"#;

    fn check(root: &Path, check: bool) -> anyhow::Result<()> {
        docs(&Workspace::at(root)?, check)
    }

    /// A small workspace with a book of one chapter. Everything in it is up to date.
    fn book() -> tempfile::TempDir {
        let folder = repository(&[
            ("README.md", "# Readme\n"),
            (
                "common/src/lib.rs",
                "//! A module\n//! (since v01). Its rest.\n/// Doc.\npub struct A { b: u8 }\n\n\
                 /// Later (since v02).\nfn call_it() {}\n",
            ),
            ("reactor-v01/src/main.rs", ""),
            ("reactor-v02/src/main.rs", ""),
            ("tools/bench/figures.json", FIGURES),
            ("tools/bench/latency.json", LATENCY),
            ("docs/names.txt", "epoll_wait # a call\n"),
            ("docs/phrases.txt", "# Phrases\nqu+x (a|the) way # how\n"),
            ("docs/src/answers/v01-1.patch", ""),
            ("docs/src/runs/a.json", ""),
            (
                "docs/src/drawn.svg",
                "<svg id=\"drawn\"><style></style><text x=\"1\">call_it, then</text></svg>\n",
            ),
            ("docs/src/v01.md", PAGE),
            ("docs/src/SUMMARY.md", "[Chapter](v01.md)\n"),
        ]);
        check(folder.path(), false).unwrap();
        check(folder.path(), true).unwrap();
        folder
    }

    #[track_caller]
    fn assert_found(root: &Path, change: &str, what: &str) {
        let err = check(root, true).expect_err(change);
        assert!(format!("{err:#}").contains(what), "{change}: {err:#}");
    }

    #[test]
    fn stale_text_and_broken_references_are_found() {
        let page = "docs/src/v01.md";
        let stale = "out of date: docs/src/v01.md;";
        let book = book();
        let root = book.path();
        for (name, old, new, what) in [
            // What the pages take from elsewhere.
            (page, "pub struct A", "pub struct B", stale),
            (page, "1,234", "1,235", stale),
            (page, "1 ready", "2 ready", "out of date: docs/src/s.svg;"),
            ("docs/src/s.svg", "1 ready", "2 ready", "out of date: docs/src/s.svg;"),
            ("docs/src/bars.svg", "1.50", "1.40", "out of date: docs/src/bars.svg;"),
            ("docs/src/drawn.svg", "#drawn text", "#drawn", "out of date: docs/src/drawn.svg;"),
            ("docs/src/drawn.svg", " id=\"drawn\"", "", "docs/src/drawn.svg: it has no id"),
            ("common/src/lib.rs", "Doc", "Docs", stale),
            ("tools/bench/figures.json", "1234.5", "1240.5", stale),
            ("tools/bench/latency.json", ": 20", ": 30", "out of date: docs/src/curves.svg;"),
            ("tools/bench/latency.json", "1000", "0", "there are no figures in it"),
            // Blocks and comments.
            (page, "lib.rs, A -->", "gone.rs, A -->", "no source common/src/gone.rs"),
            (page, "lib.rs, A -->", "lib.rs, B -->", "no item B"),
            (page, "lib.rs, A -->", "lib.rs -->", "not of the form"),
            (page, "```rust", "```c", "its language is \"rust\""),
            (page, "<!-- code: ", "<!-- code:", "line 5: unknown comment"),
            (page, " A -->\n", " A -->\n\n", "no block follows"),
            (page, "\n<!-- illustration: C -->", "", "c needs a source"),
            (page, "illustration: C", "illustration:  ", "needs a reason"),
            (page, "```diff\n", "```\n", "needs a language"),
            (page, "```diff\n", "```text\n$ ls\n```\n```diff\n", "this is a console session"),
            (page, "c\n\n", "c\n\n    int x;\n\n", "line 3: an indented block"),
            (page, "<!-- figures", " <!-- figures", "has to begin the line"),
            (page, "figures: accept", "figures: gone", "gone: no such table"),
            (page, "<!-- end of figures -->", "", "a table before the end of another"),
            (page, "<!-- end of reading -->", "", "a table without an end"),
            (page, "<!-- figures: accept -->", "", "end of figures without a start"),
            (page, "end of figures", "end of reading", "end of reading without a start"),
            (page, "<!-- reading, at most 5 by v01: common/src/lib.rs -->", "", "no reading list"),
            (page, "at most 5", "at most 4", "5 lines to read, more than 4"),
            (page, "5 by v01", "5 by v02", "7 lines to read, more than 5"),
            (page, "reading, at most 5", "reading at most 5", "not `reading, at most LINES by"),
            (
                page,
                "v01: common/src/lib.rs",
                "v01: reactor-v01/src/main.rs",
                "does not begin with a",
            ),
            ("common/src/lib.rs", "A module", "Some module", stale),
            ("common/src/lib.rs", "\n\n///", "\n///", stale),
            (page, "TRACE", "INFO", "there is no trace in it"),
            // What the pages refer to.
            (
                page,
                "(#one-two",
                "(#one-too",
                "v01.md:3: broken link #one-too-ab-c: no such heading",
            ),
            (page, "https://b.c/d", "http://b.c/d", "neither https nor a path"),
            (page, "(../../docs/src/", "(../../", "broken link ../../SUMMARY.md"),
            (page, "(../../docs/src/SUMMARY.md)", "(../../README.md)", "outside the book"),
            (page, "(../../docs", "(../../../docs", "outside the repository"),
            (page, "v01-1.patch", "v01-2.patch", "broken include answers/v01-2.patch"),
            (page, "v02.diff", "v03.diff", "broken include diffs/v03.diff"),
            (page, "a.json", "b.json", "broken include runs/b.json"),
            (page, "`A`", "`B`", "nothing is called B"),
            (page, "`A::b()`", "`A::c()`", "nothing is called A::c"),
            (page, "`A`", "`B<A>`", "nothing is called B"),
            (page, "`lib.rs`, `A`", "`lib.rs`, `B`", "lib.rs has no B"),
            (page, "`common/src/", "`common/", "there is no file common/lib.rs"),
            (page, "`lib.rs`", "`gone.rs`", "there is no file gone.rs"),
            (page, "`/proc/self`", "`docs/gone.sh a b`", "there is no file docs/gone.sh"),
            (page, "run -p common", "run -p reactor-v09", "there is no package reactor-v09"),
            ("docs/src/drawn.svg", "call_it", "call_me", "nothing is called call_me"),
            // What no page refers to.
            (page, "![q](drawn.svg)", "", "docs/src/drawn.svg: no page shows it"),
            (page, "diffs/v02.diff", "answers/v01-1.patch", "v02.diff: no page shows it"),
            (page, "answers/v01-1.patch", "diffs/v02.diff", "v01-1.patch: no page shows it"),
            (page, "runs/a.json", "diffs/v02.diff", "runs/a.json: no page shows it"),
            ("docs/src/SUMMARY.md", "v01.md", "../README.md", "v01.md: SUMMARY.md lacks it"),
            ("docs/names.txt", "epoll_wait", "epoll_wait other", "no page uses other"),
            // Phrases to avoid.
            (
                "README.md",
                "Readme",
                "R\n> Quux\n> the way",
                "README.md:2: \"Quux > the way\"; better: how",
            ),
            (
                "reactor-v01/src/main.rs",
                "",
                "// Qux a\n  // way",
                "main.rs:1: \"Qux a // way\"; better: how",
            ),
            ("docs/phrases.txt", "(", "((", "docs/phrases.txt"),
            ("docs/phrases.txt", " # ", " ", "not `PHRASE # INSTEAD`"),
        ] {
            let text = fs::read_to_string(root.join(name)).unwrap();
            assert!(text.contains(old), "{old:?} is not in {name}");
            fs::write(root.join(name), text.replacen(old, new, 1)).unwrap();
            assert_found(root, new, what);
            fs::write(root.join(name), text).unwrap();
        }
        fs::create_dir(root.join("reactor-v03")).unwrap();
        assert_found(root, "a new chapter", "docs/src/diffs/v03.diff: no page shows it");
    }
}
