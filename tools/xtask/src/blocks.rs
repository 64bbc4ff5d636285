//! What a page takes from elsewhere: excerpts of code, tables of figures, lists of files to read.
//!
//! A comment right above a block says what is in the block. A table is between two comments:
//!
//! ```text
//! <!-- figures: cpu -->
//!
//! | server | ...
//!
//! <!-- end of figures -->
//! ```
//!
//! `figures: cpu, images/costs-cpu.svg` draws the table as a bar chart as well.

use std::ops::Range;

use anyhow::{Context, bail, ensure};
use bench::report::Report;
use pulldown_cmark::{CodeBlockKind, Event, Tag};

use crate::pages::{Block, blocks, events, line_of, replace};
use crate::sources::Sources;

/// The page with all excerpts and tables brought up to date. Each block needs a source, or a reason
/// to have none.
pub fn refresh(page: &str, sources: &Sources, report: &Report) -> anyhow::Result<String> {
    let mut texts = tables(page, sources, report)?;
    for block in blocks(page) {
        if let Some(text) = text_of(&block, sources).with_context(|| block.place())? {
            texts.push((block.range, text));
        }
    }
    texts.sort_by_key(|(range, _)| range.start);
    Ok(replace(page, &texts))
}

/// The tables of a page. All other comments are checked too: a misspelt one would be ignored.
fn tables(
    page: &str,
    sources: &Sources,
    report: &Report,
) -> anyhow::Result<Vec<(Range<usize>, String)>> {
    let mut tables = Vec::new();
    let mut start: Option<(usize, String, String)> = None;
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
                    // A picture, and no table.
                    ("latency", image) if image.ends_with(".svg") => {}
                    (kind, args) if kind == "figures" || kind.starts_with("reading") => {
                        ensure!(start.is_none(), "line {line}: a table before the end of another");
                        let table = match kind {
                            "figures" => {
                                let name = args.split(", ").next().unwrap_or(args);
                                report.table(name).context("no such table")
                            }
                            _ => reading(kind, args, sources),
                        };
                        let table = table.with_context(|| format!("line {line}: {args}"))?;
                        let name = kind.split(',').next().unwrap_or(kind);
                        start = Some((range.end, format!("end of {name}"), table));
                    }
                    ("end of figures" | "end of reading", "") => {
                        let open = start.take().filter(|(_, end, _)| end == text);
                        let (start, _, table) =
                            open.with_context(|| format!("line {line}: {text} without a start"))?;
                        tables.push((start..range.start, format!("\n{table}\n")));
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
    ensure!(start.is_none(), "a table without an end");
    Ok(tables)
}

/// The table of a comment `reading: FILE; FILE (skip at first)`, or `reading, at most LINES by CHAPTER: FILE`:
/// the limit is for the lines without what later chapters have added.
fn reading(kind: &str, files: &str, sources: &Sources) -> anyhow::Result<String> {
    let mut table =
        "| to read, in this order | lines | what it is |\n| --- | --- | --- |\n".to_owned();
    let limit = kind.strip_prefix("reading, at most ").and_then(|limit| limit.split_once(" by "));
    ensure!(kind == "reading" || limit.is_some(), "not `reading, at most LINES by CHAPTER`");
    let (mut total, mut first, mut later) = (0, 0, 0);
    for entry in files.split("; ") {
        let file = entry.strip_suffix(" (skip at first)").unwrap_or(entry);
        let note = &entry[file.len()..];
        let (lines, summary) = sources.summary(file)?;
        table += &format!("| `{file}` | {lines} | {summary}{note} |\n");
        total += lines;
        first += if note.is_empty() { lines } else { 0 };
        later += limit.map_or(0, |(_, chapter)| sources.later_lines(file, chapter));
    }
    let mut notes = Vec::new();
    if first < total {
        notes.push(format!("at first {first}"));
    }
    if let Some((limit, _)) = limit {
        let new = total - later;
        ensure!(new <= limit.parse()?, "{new} lines to read, more than {limit}");
        notes.push(format!("{new} without what later chapters have added"));
    }
    Ok(table + &format!("| in all | {total} | {} |\n", notes.join("; ")))
}

/// The tables that are drawn as well, and the pictures that they are drawn in.
pub fn charts(page: &str) -> impl Iterator<Item = (&str, &str)> {
    let comments = page.lines().filter_map(|line| line.strip_prefix("<!-- figures: "));
    comments.filter_map(|comment| comment.strip_suffix(" -->")?.split_once(", "))
}

/// The pictures that latency against load is drawn in.
pub fn curves(page: &str) -> impl Iterator<Item = &str> {
    page.lines().filter_map(|line| line.strip_prefix("<!-- latency: ")?.strip_suffix(" -->"))
}

/// What should be in a block, unless that is up to its page.
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
        // `cargo xtask console` replays it.
        "console" => {}
        // A diagram: a session would not be replayed here.
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
