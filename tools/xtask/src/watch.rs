//! `cargo xtask grade --watch`: builds and grades a server each time one of its files is saved.

use std::io::{Write, stdout};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use crossterm::terminal;
use notify::{RecursiveMode, Watcher};

use crate::grade::{Case, Grade};

/// An editor may write a file in several steps. This long without one means that it has been saved.
const SETTLED: Duration = Duration::from_millis(100);

/// What the learner does after a verdict.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Save,
    Hint,
    List,
    Next,
    Quit,
}

/// Grades the server in the folder `dir` from its first case on, up to the first that fails, and again after
/// each change. Cases that have passed are repeated at the end.
pub fn watch(grade: &Grade<'_>, cases: &[(String, &Case)], dir: &Path) -> Result<()> {
    let (_watcher, saves) = saves(dir)?;
    let mut passed = vec![false; cases.len()];
    let mut at = 0;
    let mut is_repeated = false;
    loop {
        if build(dir)? {
            grade.check_program()?;
            at = grade_from(grade, cases, &mut passed, at)?;
        }
        // A file was saved meanwhile. Once only: it may be the server that writes files.
        is_repeated = saves.try_iter().count() > 0 && !is_repeated;
        if is_repeated {
            continue;
        }
        let (id, case) = &cases[at];
        loop {
            match wait(&saves)? {
                Action::Save => break,
                Action::Quit => return Ok(()),
                Action::Hint => println!("{id} {}: {}", case.name, case.hint),
                Action::List => {
                    for ((id, case), passed) in cases.iter().zip(&passed) {
                        let mark = if *passed { "pass" } else { "" };
                        println!("{id:5} {:16} {mark:4} {}", case.name, case.must);
                    }
                }
                Action::Next => {
                    at = (at + 1) % cases.len();
                    break;
                }
            }
        }
        println!();
    }
}

/// Grades all cases, beginning with `start`, up to the first that fails. Returns the place of that one.
fn grade_from(
    grade: &Grade<'_>,
    cases: &[(String, &Case)],
    passed: &mut [bool],
    start: usize,
) -> Result<usize> {
    for at in (start..cases.len()).chain(0..start) {
        let (id, case) = &cases[at];
        passed[at] = grade.grade(id, case, false, &mut stdout())?;
        if !passed[at] {
            return Ok(at);
        }
    }
    println!("\nall {} cases passed", cases.len());
    Ok(0)
}

/// Builds the crate in `dir`, if there is one. Returns whether there is something to grade.
pub fn build(dir: &Path) -> Result<bool> {
    let manifest = dir.join("Cargo.toml");
    if !manifest.exists() {
        return Ok(true);
    }
    let mut cargo = Command::new("cargo");
    cargo.args(["build", "--quiet", "--manifest-path"]).arg(manifest);
    // Wherever the user has cargo build other things.
    cargo.arg("--target-dir").arg(dir.join("target"));
    // The toolchain is that of the crate, not of this program.
    let status = cargo.env_remove("RUSTUP_TOOLCHAIN").status().context("cannot run cargo")?;
    if !status.success() {
        println!("it does not build");
    }
    Ok(status.success())
}

/// Receives something for each change of a file in `dir`, but for the build's output and hidden files, as long
/// as the watcher exists.
fn saves(dir: &Path) -> Result<(impl Watcher, Receiver<()>)> {
    ensure!(dir.is_dir(), "no folder {}", dir.display());
    let dir = dir.canonicalize()?;
    let (sender, saves) = mpsc::channel();
    let root = dir.clone();
    let is_source = move |path: &PathBuf| {
        let inside = path.strip_prefix(&root).unwrap_or(path);
        let mut names = inside.components().map(|name| name.as_os_str().to_string_lossy());
        // The folder itself changes too. cargo gives `target` its name when it is complete.
        let is_output = inside.as_os_str().as_bytes().starts_with(b"target")
            || [Path::new(""), Path::new("Cargo.lock")].contains(&inside);
        !is_output && !names.any(|name| name.starts_with('.'))
    };
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // A grader that reads a file has not changed it.
        let Ok(event) = event else { return };
        if !event.kind.is_access() && event.paths.iter().any(&is_source) {
            // This fails once the grader ends.
            let _ = sender.send(());
        }
    })?;
    watcher.watch(&dir, RecursiveMode::Recursive)?;
    Ok((watcher, saves))
}

/// Waits for a save or a key. Only meanwhile is the terminal in raw mode, so that Ctrl-C ends a case at once.
fn wait(saves: &Receiver<()>) -> Result<Action> {
    print!("\n[h]int  [l]ist  [n]ext  [q]uit, or save a file: ");
    stdout().flush()?;
    let has_keys = terminal::enable_raw_mode().is_ok();
    let action = next_action(saves, has_keys);
    if has_keys {
        terminal::disable_raw_mode()?;
    }
    println!();
    action
}

fn next_action(saves: &Receiver<()>, has_keys: bool) -> Result<Action> {
    loop {
        if !has_keys {
            thread::sleep(SETTLED);
        } else if event::poll(SETTLED)?
            && let Event::Key(key) = event::read()?
            && key.kind == KeyEventKind::Press
        {
            match key.code {
                KeyCode::Char('h') => return Ok(Action::Hint),
                KeyCode::Char('l') => return Ok(Action::List),
                KeyCode::Char('n') => return Ok(Action::Next),
                KeyCode::Char('q') => return Ok(Action::Quit),
                KeyCode::Char('c') if key.modifiers == KeyModifiers::CONTROL => {
                    return Ok(Action::Quit);
                }
                _ => {}
            }
        }
        match saves.try_recv() {
            Ok(()) => {
                while saves.recv_timeout(SETTLED).is_ok() {}
                return Ok(Action::Save);
            }
            Err(TryRecvError::Disconnected) => return Ok(Action::Quit),
            Err(TryRecvError::Empty) => {}
        }
    }
}
