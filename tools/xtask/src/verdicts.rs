//! `cargo xtask verdicts`: what the grader says of servers with one mistake each.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use regex::Regex;

use crate::grade::{Cases, Grade};
use crate::workspace::Workspace;

/// For each mistake a line `$ CHAPTER CASE MISTAKE`, and then the grader's output.
pub const FILE: &str = "tests/wrong/verdicts.txt";

/// How many servers are graded at a time. Most of them are waited for.
const AT_ONCE: usize = 6;

/// Grades all of them again, and returns the file as it is now. With `check`, a difference is an error. The
/// same server without a mistake has to pass, so that the mistake is what fails.
pub fn replay(workspace: &Workspace, check: bool) -> Result<String> {
    let text = workspace.read(FILE)?;
    let blocks: Vec<&str> = text.split("$ ").skip(1).map(str::trim_end).collect();
    let case_of = |block: &&str| block.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
    let cases: BTreeSet<String> = blocks.iter().map(case_of).collect();
    in_parallel(&cases.iter().collect::<Vec<_>>(), |case| {
        let (passes, output) = verdict(workspace, &format!("{case} none"))?;
        ensure!(passes, "the server without a mistake fails:\n{output}");
        Ok(())
    })?;
    let now = in_parallel(&blocks, |block| {
        let line = block.lines().next().context("an empty block")?;
        let (passes, output) = verdict(workspace, line)?;
        ensure!(!passes, "{line}: it passes with the mistake");
        let output = format!("{line}\n{output}");
        let is_same = stable(block)? == stable(&output)?;
        ensure!(is_same || !check, "expected:\n{block}\n\nnow:\n{output}");
        Ok(format!("$ {}\n", if is_same { *block } else { &output }))
    })?;
    Ok(now.join("\n"))
}

/// The result for each input, in their order.
fn in_parallel<I: Sync, O: Send>(
    inputs: &[I],
    each: impl Fn(&I) -> Result<O> + Sync,
) -> Result<Vec<O>> {
    let (next, results) = (Mutex::new(inputs.iter().enumerate()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        let work = || -> Option<()> {
            loop {
                let (n, input) = next.lock().ok()?.next()?;
                let result = each(input);
                results.lock().ok()?.push((n, result));
            }
        };
        (0..AT_ONCE).for_each(|_| drop(scope.spawn(work)));
    });
    let mut results = results.into_inner().map_err(|_| anyhow!("a thread has panicked"))?;
    results.sort_by_key(|(n, _)| *n);
    results.into_iter().map(|(_, result)| result).collect()
}

/// Whether the server passes the case, and what the grader says, for `CHAPTER CASE MISTAKE`.
fn verdict(workspace: &Workspace, line: &str) -> Result<(bool, String)> {
    let words: Vec<&str> = line.split(' ').collect();
    let [chapter, case, mistake] = words[..] else { bail!("not CHAPTER CASE MISTAKE: {line:?}") };
    let command = ["tests/wrong/server.py", chapter, mistake, "{addr}"].map(str::to_owned);
    let (cases, mut output) = (Cases::read(workspace, chapter)?, Vec::new());
    let grade = Grade::new(workspace, chapter, &command)?;
    let passes = grade.run(&cases, Some(case), false, &mut output)?;
    Ok((passes, String::from_utf8(output)?.trim_end().to_owned()))
}

/// `output` without what changes from run to run: ports, times, what depends on how much fits in the kernel's
/// buffers or on the order of a batch, and by which of its calls a client learns that it is alone.
fn stable(output: &str) -> Result<String> {
    let mut output = output.to_owned();
    for (changing, text) in [
        (r"(?s)\d{4,} bytes, expected .*?\^\^", "N"),
        (r"  (after|connecting|writing)[^\n]*: (Connection re|Broken pipe)[^\n]*", "  ended"),
        (r"  the server closed the connection after[^\n]*", "  ended"),
        (r"  ended\n(  sent[^\n]*\n)*(  The program has ended)", "$2"),
        (r"\d{4,}|\b\d+(\.\d+)?s\b", "N"),
    ] {
        output = Regex::new(changing)?.replace_all(&output, text).into_owned();
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mistake_has_a_verdict() {
        let workspace = Workspace::current().unwrap();
        let read = |path: &str| workspace.read(path).unwrap();
        let found = |pattern, text: &str| -> BTreeSet<String> {
            let pattern = Regex::new(pattern).unwrap();
            pattern.captures_iter(text).map(|found| found[1].to_owned()).collect()
        };
        let mistakes = found(r#"is_wrong\("([a-z-]+)"\)"#, &read("tests/wrong/server.py"));
        let verdicts = found(r"(?m)^\$ v\d\d [a-z-]+ ([a-z-]+)$", &read(FILE));
        assert_eq!(mistakes, verdicts);
        assert!(mistakes.len() >= 30, "{} are left", mistakes.len());
    }
}
