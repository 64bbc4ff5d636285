//! Parses the pages: their blocks, and what they mention.

use std::ops::Range;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// A fenced block of a page.
pub struct Block<'a> {
    /// The line of its fence, from 1.
    pub line: usize,
    /// The comment right above the fence, without its brackets, for example `code: FILE, ITEM`.
    pub comment: Option<&'a str>,
    /// The language that the fence names.
    pub language: &'a str,
    /// The text between the fences.
    pub body: &'a str,
    /// Where the body is in the page.
    pub range: Range<usize>,
}

impl<'a> Block<'a> {
    /// The text after `kind: ` in the comment, if the comment is of that kind.
    pub fn comment_of(&self, kind: &str) -> Option<&'a str> {
        self.comment?.strip_prefix(kind)?.strip_prefix(": ")
    }

    /// Names the block in a message.
    pub fn place(&self) -> String {
        format!("the block in line {}", self.line)
    }
}

/// The Markdown events of a page and their positions, in the dialect that mdBook and GitHub share.
pub fn events(page: &str) -> impl Iterator<Item = (Event<'_>, Range<usize>)> {
    Parser::new_ext(page, Options::ENABLE_TABLES).into_offset_iter()
}

/// The number of the line that `offset` is in, from 1.
pub fn line_of(page: &str, offset: usize) -> usize {
    page[..offset].matches('\n').count() + 1
}

/// All fenced blocks.
pub fn blocks(page: &str) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    for (event, range) in events(page) {
        let Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(_))) = event else { continue };
        let text = &page[range.clone()];
        let Some(body) = text.find('\n') else { continue };
        let end = text.trim_end().rfind('\n').unwrap_or(body);
        // Only the line right above: before an empty line, a comment is about something else.
        let before = page[..range.start].trim_end_matches(' ').strip_suffix('\n');
        let comment = before
            .and_then(|text| text.rsplit('\n').next())
            .and_then(|line| line.strip_prefix("<!-- ")?.strip_suffix(" -->"));
        blocks.push(Block {
            line: line_of(page, range.start),
            comment,
            language: text[..body].trim_start_matches('`').trim(),
            body: &text[body + 1..end + 1],
            range: range.start + body + 1..range.start + end + 1,
        });
    }
    blocks
}

/// The page with some ranges replaced. They are in the order of the page.
pub fn replace(page: &str, texts: &[(Range<usize>, String)]) -> String {
    let mut fresh = String::new();
    let mut end = 0;
    for (range, text) in texts {
        fresh += &page[end..range.start];
        fresh += text;
        end = range.end;
    }
    fresh + &page[end..]
}

/// Something that a page has or refers to.
#[derive(PartialEq)]
pub enum Mention {
    /// The anchor of a heading.
    Anchor(String),
    /// The target of a link or an image.
    Link(String),
    /// A file that mdBook includes here.
    Include(String),
    /// Inline code.
    Code(String),
    /// Inline code right after the name of a source file, for example `net.rs`, `connect`.
    Item(String, String),
}

/// Everything that a page mentions, with its line. Code in a link to another site is left out.
pub fn mentions(page: &str) -> Vec<(usize, Mention)> {
    let mut mentions = Vec::new();
    let mut heading: Option<String> = None;
    let mut elsewhere = false;
    let mut file: Option<String> = None;
    for (event, range) in events(page) {
        let mention = match event {
            Event::Start(Tag::Heading { .. }) => {
                heading = Some(String::new());
                continue;
            }
            Event::End(TagEnd::Heading(_)) => {
                Mention::Anchor(slug(&heading.take().unwrap_or_default()))
            }
            Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                elsewhere = dest_url.starts_with("https://");
                Mention::Link(dest_url.into_string())
            }
            Event::End(TagEnd::Link) => {
                elsewhere = false;
                continue;
            }
            Event::Code(_) if elsewhere => continue,
            Event::Code(code) => {
                let line = line_of(page, range.start);
                if code.ends_with(".rs") {
                    file = Some(code.to_string());
                } else if let Some(file) = &file {
                    mentions.push((line, Mention::Item(file.clone(), code.to_string())));
                }
                heading.iter_mut().for_each(|text| text.push_str(&code));
                Mention::Code(code.into_string())
            }
            Event::Text(text) => {
                if &*text != ", " {
                    file = None;
                }
                heading.iter_mut().for_each(|heading| heading.push_str(&text));
                let include = text.trim_end().strip_prefix("{{#include ");
                let Some(path) = include.and_then(|text| text.strip_suffix("}}")) else { continue };
                Mention::Include(path.to_owned())
            }
            Event::SoftBreak => continue,
            // A recorded run, in a script element.
            Event::Html(html) if html.contains("{{#include ") => {
                let path = html.split("{{#include ").nth(1).and_then(|it| it.split("}}").next());
                Mention::Include(path.unwrap_or_default().to_owned())
            }
            _ => {
                file = None;
                continue;
            }
        };
        mentions.push((line_of(page, range.start), mention));
    }
    mentions
}

/// The anchor of a heading, as mdBook and GitHub make it.
fn slug(heading: &str) -> String {
    let kept = heading.chars().filter_map(|char| match char {
        ' ' => Some('-'),
        '-' | '_' => Some(char),
        _ => char.is_alphanumeric().then_some(char),
    });
    kept.flat_map(char::to_lowercase).collect()
}
