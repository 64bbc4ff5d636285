//! The pages that show what a chapter changed: written from the folders, never by hand.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::Context;
use similar::{ChangeTag, TextDiff};

use crate::sources::Sources;

/// A step from one chapter to the next.
pub struct Step {
    /// The chapter before, `v01` for one.
    pub from: &'static str,
    /// The chapter after it.
    pub to: &'static str,
}

/// All of them.
pub const STEPS: [Step; 4] = [
    Step { from: "v01", to: "v02" },
    Step { from: "v02", to: "v03" },
    Step { from: "v03", to: "v04" },
    Step { from: "v04", to: "v04-client" },
];

/// How many unchanged lines a change is shown with, before and after it.
const CONTEXT: usize = 3;

impl Step {
    /// The path of its page from the root.
    pub fn page(&self) -> String {
        format!("docs/src/diffs/{}-{}.md", self.from, self.to.trim_start_matches("v04-"))
    }

    /// Its page.
    ///
    /// # Errors
    /// A source cannot be read.
    pub fn render(&self, root: &Path, sources: &Sources) -> anyhow::Result<String> {
        let Self { from, to } = self;
        let mut page = format!(
            "<!-- Written by `cargo xtask docs`. -->\n\n# From {from} to {to}\n\n\
             What changed from `reactor-{from}` to `reactor-{to}`, file by file, as\n\
             `scripts/diff.sh {from} {to}` shows it in a terminal. Lines that are the same are folded.\n"
        );
        for name in self.files(root)? {
            let read = |chapter: &str| {
                let path = root.join(format!("reactor-{chapter}/src/{name}"));
                if path.exists() {
                    fs::read_to_string(&path).context(name.clone())
                } else {
                    Ok(String::new())
                }
            };
            let (old, new) = (read(from)?, read(to)?);
            write!(page, "\n## {name}\n")?;
            if old.is_empty() {
                write!(page, "\nNew in `reactor-{to}`.\n")?;
            }
            if new.is_empty() {
                write!(page, "\nNot in `reactor-{to}`.\n")?;
                continue;
            }
            page += &folded_diff(&old, &new);
        }
        page += &self.in_common(sources)?;
        Ok(page)
    }

    /// The names of the files of both chapters, main.rs first.
    fn files(&self, root: &Path) -> anyhow::Result<Vec<String>> {
        let mut names = BTreeSet::new();
        for chapter in [self.from, self.to] {
            let folder = root.join(format!("reactor-{chapter}/src"));
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let name = entry?.file_name().to_string_lossy().into_owned();
                names.insert((name != "main.rs", name));
            }
        }
        Ok(names.into_iter().map(|(_, name)| name).collect())
    }

    /// What the chapter brought into `common`: names and first sentences, and new modules whole.
    fn in_common(&self, sources: &Sources) -> anyhow::Result<String> {
        let mut text = String::new();
        let mut modules = String::new();
        for (path, source) in sources.below("common/src/") {
            let items = source.since(self.to);
            for (item, sentence) in &items {
                let module = path.trim_start_matches("common/src/");
                writeln!(text, "| `{module}` | `{item}` | {} |", sentence.replace('|', "\\|"))?;
            }
            let head = source.text.lines().take_while(|line| line.starts_with("//!"));
            if head
                .fold(String::new(), |head, line| head + line)
                .contains(&format!("since {}", self.to))
            {
                let lines = source.without_tests().lines().count();
                write!(
                    modules,
                    "\n<details>\n<summary><code>{path}</code>, {lines} lines</summary>\n\n\
                     ```rust\n{}\n```\n\n</details>\n",
                    source.without_tests()
                )?;
            }
        }
        if text.is_empty() {
            return Ok(String::new());
        }
        let mut page = "\n## In common\n\nWhat the chapter brings along for all the later ones:\n\n\
            | file | item | what it is |\n|---|---|---|\n"
            .to_owned() + &text;
        if !modules.is_empty() {
            page += "\nThe new modules, whole:\n";
            page += &modules;
        }
        Ok(page)
    }
}

/// Blocks of changes, and between them what is the same, folded.
fn folded_diff(old: &str, new: &str) -> String {
    let diff = TextDiff::from_lines(old, new);
    let lines: Vec<_> =
        diff.iter_all_changes().map(|change| (change.tag(), change.value())).collect();
    let changed: Vec<_> = lines.iter().map(|(tag, _)| *tag != ChangeTag::Equal).collect();
    // A line is shown if one that changed is near; of a few lines in between, no fold is made.
    let near = |at: usize| {
        let near = at.saturating_sub(CONTEXT)..(at + CONTEXT + 1).min(lines.len());
        changed[near].contains(&true)
    };
    let mut shown: Vec<bool> = (0..lines.len()).map(near).collect();
    for fold in shown.chunk_by_mut(|one, next| one == next) {
        if fold.len() <= CONTEXT {
            fold.fill(true);
        }
    }
    let mut text = String::new();
    let mut at = 0;
    while at < lines.len() {
        let start = at;
        while at < lines.len() && shown[at] == shown[start] {
            at += 1;
        }
        let part = &lines[start..at];
        if shown[start] {
            text += "\n```diff\n";
            for (tag, line) in part {
                text += match tag {
                    ChangeTag::Equal => " ",
                    ChangeTag::Delete => "-",
                    ChangeTag::Insert => "+",
                };
                text += line;
            }
            text += "```\n";
        } else {
            let code = part.iter().fold(String::new(), |code, (_, line)| code + line);
            text += &format!(
                "\n<details>\n<summary>{} unchanged lines</summary>\n\n```rust\n{code}```\n\n</details>\n",
                part.len()
            );
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_shown_and_the_rest_is_folded() {
        let old: String = (1..=14).map(|n| format!("{n}\n")).collect();
        let new = old.replace("\n7\n", "\nseven\n");
        // Three lines at the start are too few for a fold.
        let expected = "\n```diff\n 1\n 2\n 3\n 4\n 5\n 6\n-7\n+seven\n 8\n 9\n 10\n```\n\
            \n<details>\n<summary>4 unchanged lines</summary>\n\n\
            ```rust\n11\n12\n13\n14\n```\n\n</details>\n";
        assert_eq!(folded_diff(&old, &new), expected);
    }

    #[test]
    fn nothing_is_lost() {
        let (old, new) = ("a\nb\nc\nd\ne\n", "b\nx\nc\nd\ne\nf\n");
        let text = folded_diff(old, new);
        let kept = |sign: &str| -> String {
            let lines = text.lines().filter(|line| line.len() == 2);
            let lines = lines.filter(|line| line.starts_with(' ') || line.starts_with(sign));
            lines.map(|line| line[1..].to_owned() + "\n").collect()
        };
        assert_eq!((kept("-").as_str(), kept("+").as_str()), (old, new));
    }
}
