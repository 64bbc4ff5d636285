//! What has a source outside its page: excerpts of code and tables of figures.
//!
//! A comment right above a block says what it is. A table is between two comments:
//!
//! ```text
//! <!-- figures: cpu -->
//!
//! | server | ...
//!
//! <!-- end of figures -->
//! ```

use std::ops::Range;

use anyhow::{Context, bail, ensure};
use bench::report::Report;
use pulldown_cmark::{CodeBlockKind, Event, Tag};

use crate::pages::{Block, blocks, events, line_of, replace};
use crate::sources::Sources;

/// The page with all excerpts and tables as their sources have them. Each block has to have a source
/// or a reason to have none.
pub fn refresh(page: &str, sources: &Sources, report: &Report) -> anyhow::Result<String> {
    let mut texts = tables(page, report)?;
    for block in blocks(page) {
        if let Some(text) = text_of(&block, sources).with_context(|| block.place())? {
            texts.push((block.range, text));
        }
    }
    texts.sort_by_key(|(range, _)| range.start);
    Ok(replace(page, &texts))
}

/// The tables of a page. All other comments are checked, too: one that is misspelt would be ignored.
fn tables(page: &str, report: &Report) -> anyhow::Result<Vec<(Range<usize>, String)>> {
    let mut tables = Vec::new();
    let mut start = None;
    for (event, range) in events(page) {
        let line = line_of(page, range.start);
        match event {
            Event::Html(html) if html.trim_start().starts_with("<!--") => {
                let at_start = page[..range.start].ends_with('\n');
                ensure!(at_start, "line {line}: this comment has to begin the line");
                let text = html.trim_end().strip_prefix("<!-- ");
                let text = text.and_then(|text| text.strip_suffix(" -->")).unwrap_or_default();
                match text.split_once(": ").unwrap_or((text, "")) {
                    ("code" | "sequence" | "illustration", _) => {
                        let next = &page[range.start + html.len()..];
                        ensure!(next.starts_with("```"), "line {line}: no block follows");
                    }
                    ("figures", name) => {
                        ensure!(start.is_none(), "line {line}: figures before the end of others");
                        let table = report.table(name);
                        let table =
                            table.with_context(|| format!("line {line}: no table {name:?}"))?;
                        start = Some((range.end, format!("\n{table}\n")));
                    }
                    ("end of figures", "") => {
                        let (start, table) = start.take().context("an end without figures")?;
                        tables.push((start..range.start, table));
                    }
                    _ => bail!("line {line}: unknown comment {}", html.trim_end()),
                }
            }
            Event::Start(Tag::CodeBlock(CodeBlockKind::Indented)) => {
                bail!("line {line}: an indented block, which has no language");
            }
            _ => {}
        }
    }
    ensure!(start.is_none(), "figures without an end");
    Ok(tables)
}

/// What a block should have in it, if its page does not decide that.
fn text_of(block: &Block<'_>, sources: &Sources) -> anyhow::Result<Option<String>> {
    if let Some(reason) = block.comment_of("illustration") {
        ensure!(!reason.trim().is_empty(), "an illustration needs a reason");
        return Ok(None);
    }
    if let Some(args) = block.comment_of("code") {
        ensure!(block.language == "rust", "its language is \"rust\", not {:?}", block.language);
        return Ok(Some(sources.excerpts(args)?));
    }
    match block.language {
        // Replayed by another task.
        "console" => {}
        // Diagrams. A session would not be replayed here.
        "text" => {
            let is_session = block.body.lines().any(|line| line.starts_with("$ "));
            ensure!(!is_session, "this is a console session");
        }
        "" => bail!("a block needs a language, `text` if nothing else"),
        _ if block.body.starts_with("{{#include ") => {}
        language => bail!(
            "{language} needs a source, `<!-- code: FILE, ITEM -->` or `{{{{#include FILE}}}}`, or \
             a reason to have none, `<!-- illustration: REASON -->`"
        ),
    }
    Ok(None)
}
