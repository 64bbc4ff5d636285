//! Looks for the phrases of docs/phrases.txt in everything that people read.

use std::fmt::Write;

use anyhow::{Context, ensure};
use regex::{Regex, RegexBuilder};

use crate::pages::line_of;
use crate::workspace::Workspace;

const LIST: &str = "docs/phrases.txt";

/// The files that people read.
const KINDS: [&str; 11] =
    [".md", ".rs", ".sh", ".svg", ".toml", ".html", ".css", ".js", ".yml", ".patch", ".ci/run"];

/// What a space in the list matches. A phrase may continue in the next line, after the marker of a
/// comment, a quotation or a patch.
const SPACE: &str = r"\\?\s[\s/!#>+]*";

/// A phrase, and what to write instead.
struct Phrase<'a> {
    regex: Regex,
    instead: &'a str,
}

/// Checks all files. The error lists all phrases that are found.
pub fn check(workspace: &Workspace) -> anyhow::Result<()> {
    let list = workspace.read(LIST)?;
    let lines = list.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let phrases: Vec<_> =
        lines.map(|line| parse(line).context(LIST)).collect::<anyhow::Result<_>>()?;
    // All at once first: most files have none.
    let any: Vec<_> = phrases.iter().map(|phrase| phrase.regex.as_str()).collect();
    let any = RegexBuilder::new(&any.join("|")).case_insensitive(true).build()?;
    let mut faults = String::new();
    for path in KINDS.iter().flat_map(|kind| workspace.files("", kind)) {
        let text = workspace.read(path)?;
        if !any.is_match(&text) {
            continue;
        }
        for Phrase { regex, instead } in &phrases {
            for found in regex.find_iter(&text) {
                let words = found.as_str().split_whitespace().collect::<Vec<_>>().join(" ");
                let line = line_of(&text, found.start());
                writeln!(faults, "{path}:{line}: {words:?}; better: {instead}")?;
            }
        }
    }
    ensure!(faults.is_empty(), "phrases to avoid, by {LIST}:\n{}", faults.trim_end());
    Ok(())
}

fn parse(line: &str) -> anyhow::Result<Phrase<'_>> {
    let (phrase, instead) =
        line.split_once(" # ").with_context(|| format!("{line:?} is not `PHRASE # INSTEAD`"))?;
    let phrase = phrase.trim_end().replace(' ', SPACE);
    let regex = RegexBuilder::new(&format!(r"\b(?:{phrase})\b")).case_insensitive(true).build()?;
    Ok(Phrase { regex, instead })
}
