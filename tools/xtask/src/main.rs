//! `cargo xtask`: what keeps the text to the code and to the measurements.

mod answers;
mod blocks;
mod console;
mod diffs;
mod figures;
mod mentions;
mod pages;
mod sequence;
mod sources;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};

use crate::mentions::{ForeignNames, World};
use crate::pages::Mention;
use crate::sources::Sources;

/// Keeps the text to the code and to the measurements
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Brings excerpts, figures, diffs and diagrams of README.md and docs up to date, and
    /// looks for links and names that lead to nothing
    Docs {
        /// Changes nothing, and fails where something would have to be changed
        #[arg(long)]
        check: bool,
    },
    /// Plays the console sessions of README.md and docs, and puts their output of now into them
    Console {
        /// Changes nothing, and fails where something would have to be changed
        #[arg(long)]
        check: bool,
        /// Only these pages
        pages: Vec<PathBuf>,
    },
    /// Tries the answers to the exercises, each on a copy of the workspace
    Answers {
        /// Of the chapter's tests, runs only those that an answer names: some seconds instead of half
        /// a minute for each
        #[arg(long)]
        quick: bool,
        /// Only these patches
        patches: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let root = workspace_root()?;
    match task {
        Task::Docs { check } => docs(&root, check),
        Task::Console { check, pages } => console(&root, check, pages),
        Task::Answers { quick, patches } => answers(&root, patches, quick),
    }
}

/// The folder above this package that has the lock file: a workspace has one, in its root.
fn workspace_root() -> anyhow::Result<PathBuf> {
    // Set by cargo when it runs the program, so that the folder may be moved after a build.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("run it as `cargo xtask`")?;
    let mut folders = Path::new(&package).ancestors();
    let root = folders.find(|folder| folder.join("Cargo.lock").is_file());
    Ok(root.context("no Cargo.lock above this package")?.to_owned())
}

fn docs(root: &Path, check: bool) -> anyhow::Result<()> {
    let sources = Sources::read(root)?;
    let report = figures::read(&root.join("tools/bench/figures.json"))?;
    let mut files = BTreeMap::new();
    for step in diffs::STEPS {
        files.insert(PathBuf::from(step.page()), step.render(root, &sources)?);
    }
    for path in pages(root)? {
        let old = read(root, &path)?;
        let page = figures::refresh(&old, &report).with_context(|| path.display().to_string())?;
        let page = blocks::refresh(&page, &sources).with_context(|| path.display().to_string())?;
        for block in pages::blocks(&page) {
            let Some(name) = block.comment_of("sequence") else { continue };
            let svg = sequence::draw(&page[block.range.clone()])
                .with_context(|| format!("{}: {}", path.display(), block.place()))?;
            let folder = path.parent().context("a page in a folder")?;
            files.insert(folder.join(name), svg);
        }
        files.insert(path, page);
    }
    let mut stale = Vec::new();
    for (path, text) in &files {
        let old = fs::read_to_string(root.join(path)).unwrap_or_default();
        if *text != old {
            if !check {
                let folder = root.join(path).parent().context("a file in a folder")?.to_owned();
                fs::create_dir_all(folder)?;
                fs::write(root.join(path), text).with_context(|| path.display().to_string())?;
            }
            stale.push(path.display().to_string());
        }
    }
    let names = stale.join(", ");
    ensure!(!check || stale.is_empty(), "not up to date: {names}; `cargo xtask docs` mends it");
    if !stale.is_empty() {
        println!("refreshed {names}");
    }
    check_mentions(root, &sources)?;
    check_book(root)
}

/// Whether all exists that the pages mention.
fn check_mentions(root: &Path, sources: &Sources) -> anyhow::Result<()> {
    let foreign = ForeignNames::parse(&read(root, Path::new("docs/names.txt"))?);
    let page = |path: &Path| fs::read_to_string(root.join(path)).ok();
    let world = World { root, sources, foreign: &foreign, page: &page };
    let mut used = BTreeSet::new();
    let mut mistakes = String::new();
    for path in pages(root)? {
        match mentions::check(&world, &path, &read(root, &path)?) {
            Ok(names) => used.extend(names),
            Err(err) => mistakes += &format!("\n{}:{err:#}", path.display()),
        }
    }
    for path in files(root, "svg")? {
        let svg = read(root, &path)?;
        mentions::check_picture(&world, &svg).with_context(|| path.display().to_string())?;
    }
    ensure!(mistakes.is_empty(), "{mistakes}");
    mentions::check_foreign(&foreign, &used)
}

/// Whether the book has all of its pages, and the pages all of the pictures and answers.
fn check_book(root: &Path) -> anyhow::Result<()> {
    let summary = read(root, Path::new("docs/src/SUMMARY.md"))?;
    let listed: BTreeSet<PathBuf> = pages::mentions(&summary)
        .into_iter()
        .filter_map(|(_, mention)| match mention {
            Mention::Link(path) => Some(Path::new("docs/src").join(path)),
            _ => None,
        })
        .collect();
    let mut shown = BTreeSet::new();
    let mut pictures = BTreeSet::new();
    for path in all_pages(root)? {
        let in_book = path.starts_with("docs/src") && !path.ends_with("SUMMARY.md");
        ensure!(!in_book || listed.contains(&path), "SUMMARY.md lacks {}", path.display());
        let page = read(root, &path)?;
        for block in pages::blocks(&page) {
            let Some(file) = block.include(&page) else { continue };
            let file = root.join(path.with_file_name(file));
            ensure!(file.exists(), "{}: {} does not exist", path.display(), file.display());
            shown.insert(file);
        }
        for (_, mention) in pages::mentions(&page) {
            if let Mention::Link(link) = mention {
                pictures.insert(path.with_file_name(link));
            }
        }
    }
    for path in files(root, "svg")? {
        ensure!(pictures.contains(&path), "no page shows {}", path.display());
    }
    for patch in answers::all(root)? {
        ensure!(shown.contains(&patch), "no page includes {}", patch.display());
    }
    Ok(())
}

fn console(root: &Path, check: bool, mut chosen: Vec<PathBuf>) -> anyhow::Result<()> {
    if chosen.is_empty() {
        chosen = pages(root)?;
    }
    let stage = console::Stage::set(root)?;
    for path in chosen {
        let name = path.display().to_string();
        let page = read(root, &path)?;
        if check {
            let n = console::check(&page, &stage).context(name.clone())?;
            println!("{name}: {n} sessions");
            continue;
        }
        let fresh = console::refresh(&page, &stage).context(name.clone())?;
        if fresh != page {
            fs::write(root.join(&path), fresh).context(name.clone())?;
            println!("refreshed {name}");
        }
    }
    Ok(())
}

fn answers(root: &Path, mut patches: Vec<PathBuf>, quick: bool) -> anyhow::Result<()> {
    if patches.is_empty() {
        patches = answers::all(root)?;
    }
    let copy = answers::WorkspaceCopy::of(root)?;
    for patch in patches {
        let patch = root.join(patch);
        let name = patch.strip_prefix(root).unwrap_or(&patch).display().to_string();
        copy.check(&patch, quick).with_context(|| name.clone())?;
        println!("{name}: ok");
    }
    Ok(())
}

fn read(root: &Path, path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(root.join(path)).with_context(|| path.display().to_string())
}

/// The pages that people write: README.md, and all of docs but the diffs. From the root.
fn pages(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut pages = all_pages(root)?;
    let diffs: Vec<PathBuf> = diffs::STEPS.iter().map(|step| step.page().into()).collect();
    pages.retain(|page| !diffs.contains(page));
    Ok(pages)
}

fn all_pages(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut pages = files(root, "md")?;
    ensure!(!pages.is_empty(), "docs has no pages");
    pages.push("README.md".into());
    pages.sort();
    Ok(pages)
}

/// What has this extension in docs. From the root.
fn files(root: &Path, extension: &str) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                // What mdBook makes of it is not it.
                if path != root.join("docs/book") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|it| it == extension) {
                files.push(path.strip_prefix(root)?.to_owned());
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PAGE: &str = "# Chapter\n\n`A` `epoll_wait` [diff](diffs/v01-v02.md) ![p](s.svg) ![q](drawn.svg)\n\n\
        <!-- code: common/src/lib.rs, A -->\n```rust\n```\n\n\
        ```diff\n{{#include answers/v01-1.patch}}\n```\n\n\
        <!-- sequence: s.svg -->\n```console\n$ cargo run\n 0.1s TRACE epoll_wait: 1 ready\n```\n\n\
        <!-- figures: accept -->\n\n<!-- end of figures -->\n";

    /// A small workspace with a book of one chapter, all of it up to date.
    fn book() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("README.md", "# Readme\n");
        let item = "/// Came in (since v02).\npub struct A;\n";
        write("common/src/lib.rs", &format!("{item}\nfn call_it() {{}}\n"));
        write("docs/src/drawn.svg", "<svg><text x=\"1\">call_it, then</text></svg>\n");
        for chapter in ["v01", "v02", "v03", "v04", "v04-client"] {
            write(
                &format!("reactor-{chapter}/src/main.rs"),
                &format!("// {chapter}\nfn main() {{}}\n"),
            );
        }
        write("tools/bench/figures.json", &figures::tests::json());
        write("docs/names.txt", "epoll_wait # a call\n");
        write("docs/src/answers/v01-1.patch", "Check: true\n+a\n");
        write("docs/src/v01.md", PAGE);
        let mut summary = "[Chapter](v01.md)\n".to_owned();
        for step in diffs::STEPS {
            summary += &format!("[Diff]({})\n", step.page().trim_start_matches("docs/src/"));
        }
        write("docs/src/SUMMARY.md", &summary);
        docs(folder.path(), false).unwrap();
        docs(folder.path(), true).unwrap();
        folder
    }

    #[test]
    fn whatever_is_stale_or_broken_is_found() {
        let book = book();
        let root = book.path();
        for (name, old, new, what) in [
            // In the pages.
            (
                "docs/src/v01.md",
                "pub struct A;",
                "pub struct B;",
                "not up to date: docs/src/v01.md",
            ),
            ("docs/src/v01.md", "v01-1.patch", "v01-2.patch", "v01-2.patch does not exist"),
            ("docs/src/v01.md", "1,234", "1,235", "not up to date: docs/src/v01.md"),
            ("docs/src/v01.md", "v01-v02.md", "v01.md", "diffs/v01.md leads to nothing"),
            ("docs/src/v01.md", "`A`", "`B`", "the name of B"),
            ("docs/src/v01.md", "1 ready", "2 ready", "not up to date: docs/src/s.svg"),
            ("docs/src/s.svg", "1 ready", "2 ready", "not up to date: docs/src/s.svg"),
            ("docs/src/drawn.svg", "call_it", "call_me", "there is nothing called call_me"),
            ("docs/src/diffs/v01-v02.md", "+", "-", "not up to date: docs/src/diffs/v01-v02.md"),
            ("docs/src/SUMMARY.md", "[Chapter](v01.md)", "", "SUMMARY.md lacks docs/src/v01.md"),
            ("docs/names.txt", "epoll_wait", "epoll_wait other", "no page uses: other"),
            // In what the pages are about.
            ("common/src/lib.rs", "struct A", "struct B", "no item A"),
            ("common/src/lib.rs", "Came", "Comes", "docs/src/diffs/v01-v02.md, docs/src/v01.md"),
            (
                "reactor-v03/src/main.rs",
                "v03",
                "3",
                "docs/src/diffs/v02-v03.md, docs/src/diffs/v03",
            ),
            ("tools/bench/figures.json", "1234.5", "1240.5", "not up to date: docs/src/v01.md"),
        ] {
            let text = fs::read_to_string(root.join(name)).unwrap();
            assert!(text.contains(old), "{old:?} is not in {name}");
            fs::write(root.join(name), text.replacen(old, new, 1)).unwrap();
            let err = docs(root, true).unwrap_err();
            assert!(format!("{err:#}").contains(what), "{name}: {err:#}");
            fs::write(root.join(name), text).unwrap();
        }
        let orphan = root.join("docs/src/orphan.svg");
        fs::write(&orphan, "").unwrap();
        let err = docs(root, true).unwrap_err();
        assert!(err.to_string().contains("no page shows docs/src/orphan.svg"), "{err:#}");
        fs::remove_file(&orphan).unwrap();
        fs::write(root.join("docs/src/answers/v01-2.patch"), "").unwrap();
        let err = docs(root, true).unwrap_err();
        assert!(err.to_string().contains("no page includes"), "{err:#}");
    }
}
