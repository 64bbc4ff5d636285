//! `cargo xtask verdicts`: what the grader says of servers with one mistake each.

use anyhow::{Context, Result, ensure};
use regex::Regex;

use crate::grade::{Cases, Grade};
use crate::workspace::Workspace;

/// For each mistake a line `$ CHAPTER CASE MISTAKE`, and then the grader's output.
pub const FILE: &str = "tests/wrong/verdicts.txt";

/// Plays all of them again. With `check`, a difference is an error; otherwise this returns the file as it is
/// now. The same server without a mistake has to pass, so that the mistake is what fails.
pub fn replay(workspace: &Workspace, check: bool) -> Result<String> {
    let (text, mut blocks) = (workspace.read(FILE)?, Vec::new());
    for block in text.split("$ ").skip(1).map(str::trim_end) {
        let line = block.lines().next().context("an empty block")?;
        let words: Vec<&str> = line.split(' ').collect();
        let [chapter, case, mistake] = words[..] else { anyhow::bail!("{line:?}") };
        eprintln!("{line}");
        let (is_right, output) = verdict(workspace, chapter, case, "none")?;
        ensure!(is_right, "{line}: it fails without the mistake:\n{output}");
        let (is_right, output) = verdict(workspace, chapter, case, mistake)?;
        ensure!(!is_right, "{line}: it passes with the mistake");
        let output = format!("{line}\n{output}");
        let is_same = stable(block)? == stable(&output)?;
        ensure!(is_same || !check, "expected:\n{block}\n\nnow:\n{output}");
        blocks.push(format!("$ {}\n", if is_same { block } else { &output }));
    }
    Ok(blocks.join("\n"))
}

/// Whether the server passes the case, and what the grader says.
fn verdict(
    workspace: &Workspace,
    chapter: &str,
    case: &str,
    mistake: &str,
) -> Result<(bool, String)> {
    let command = ["tests/wrong/server.py", chapter, mistake, "{addr}"].map(str::to_owned);
    let cases = Cases::read(workspace, chapter)?;
    let mut output = Vec::new();
    let passes =
        Grade::new(workspace, chapter, &command)?.run(&cases, Some(case), false, &mut output)?;
    Ok((passes, String::from_utf8(output)?.trim_end().to_owned()))
}

/// `output` without what changes from run to run: ports, times, and how much fits in the kernel's buffers.
fn stable(output: &str) -> Result<String> {
    let number = Regex::new(r"\d{4,}|\b\d+(\.\d+)?s\b")?;
    Ok(number.replace_all(output, "N").into_owned())
}
