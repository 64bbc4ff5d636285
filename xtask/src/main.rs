//! `cargo xtask`: what keeps the text to the code and to the measurements.

mod figures;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Parser, Subcommand};

/// Keeps the text to the code and to the measurements
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Writes the figures of bench/figures.json into README.md and docs
    Docs {
        /// Changes nothing, and fails where something would have to be changed
        #[arg(long)]
        check: bool,
    },
}

fn main() -> ExitCode {
    let Args { task: Task::Docs { check } } = Args::parse();
    match docs(check) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn docs(check: bool) -> anyhow::Result<()> {
    // Cargo says where the package is when it runs it.
    let package = std::env::var_os("CARGO_MANIFEST_DIR").context("to be run as `cargo xtask`")?;
    let root = Path::new(&package).parent().context("a package of a workspace")?;
    let report = figures::read(&root.join("bench/figures.json"))?;
    let mut stale = Vec::new();
    for path in pages(root)? {
        let name = path.strip_prefix(root)?.display().to_string();
        let text = fs::read_to_string(&path).context(name.clone())?;
        let fresh = figures::refresh(&text, &report).context(name.clone())?;
        if fresh != text {
            if !check {
                fs::write(&path, fresh).context(name.clone())?;
            }
            stale.push(name);
        }
    }
    let names = stale.join(", ");
    ensure!(!check || stale.is_empty(), "not up to date: {names}; `cargo xtask docs` mends it");
    if !stale.is_empty() {
        println!("refreshed {names}");
    }
    Ok(())
}

/// README.md, and all there is in docs.
fn pages(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut pages = vec![root.join("README.md")];
    let mut folders = vec![root.join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                pages.push(path);
            }
        }
    }
    pages.sort();
    Ok(pages)
}
