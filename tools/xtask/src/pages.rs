//! The pages, and what the tasks have to find in them.

use std::ops::Range;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// A fenced block of a page.
#[derive(Debug)]
pub struct Block<'a> {
    /// The line of its fence, from 1.
    pub line: usize,
    /// The comment right above the fence, without its brackets: `code: FILE, ITEM` for one.
    pub comment: Option<&'a str>,
    /// The language that the fence names.
    pub language: &'a str,
    /// Where its text is in the page.
    pub range: Range<usize>,
}

impl<'a> Block<'a> {
    /// What the comment says after `kind: `, if it is of that kind.
    pub fn comment_of(&self, kind: &str) -> Option<&'a str> {
        self.comment?.strip_prefix(kind)?.strip_prefix(": ")
    }

    /// The file that mdBook puts in its place, relative to the page.
    pub fn include(&self, page: &'a str) -> Option<&'a str> {
        page[self.range.clone()].strip_prefix("{{#include ")?.strip_suffix("}}\n")
    }

    /// Where it is, for a message.
    pub fn place(&self) -> String {
        format!("the block in line {}", self.line)
    }
}

/// The events of a page and where they are in it, by the dialect that mdBook and GitHub share.
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
        let before = page[..range.start].trim_end_matches([' ', '\n']).lines().next_back();
        // An empty line in between would make it the comment of something else.
        let near = !page[..range.start].ends_with("\n\n");
        let comment = before
            .filter(|_| near)
            .and_then(|line| line.strip_prefix("<!-- "))
            .and_then(|line| line.strip_suffix(" -->"));
        blocks.push(Block {
            line: line_of(page, range.start),
            comment,
            language: text[..body].trim_start_matches('`').trim(),
            range: range.start + body + 1..range.start + end + 1,
        });
    }
    blocks
}

/// The page with new texts for some of its blocks, which are in the order of the page.
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

/// A heading, a link or a bit of inline code, and the line it is in.
#[derive(Debug, PartialEq, Eq)]
pub enum Mention {
    /// The name by which a link can lead to a heading.
    Anchor(String),
    /// Where a link or an image leads to.
    Link(String),
    /// A bit of code in a sentence.
    Code(String),
    /// A name right after that of a source, as in `net.rs`, `connect`.
    Item(String, String),
}

/// All that a page mentions. Code within a link to elsewhere is elsewhere's.
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
                continue;
            }
            Event::SoftBreak => continue,
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

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# A *b* `c::d`: e\n\n<!-- code: x, y -->\n```rust\nfn y() {}\n```\n\n\
        <!-- far -->\n\n````console\n$ ls\n```\n````\n[l](m.md#n) ![o](p.svg) `q`\n[`r`](https://s.t)\n";

    #[test]
    fn blocks_have_their_comments_and_their_texts() {
        let blocks = blocks(PAGE);
        let seen: Vec<_> = blocks
            .iter()
            .map(|block| {
                (block.line, block.comment_of("code"), block.language, &PAGE[block.range.clone()])
            })
            .collect();
        assert_eq!(
            seen,
            [(4, Some("x, y"), "rust", "fn y() {}\n"), (10, None, "console", "$ ls\n```\n")]
        );
    }

    #[test]
    fn a_block_gets_another_text_and_the_page_stays() {
        let texts = [(blocks(PAGE)[0].range.clone(), "fn z() {}\n".to_owned())];
        assert_eq!(replace(PAGE, &texts), PAGE.replace("fn y", "fn z"));
    }

    #[test]
    fn an_empty_block_can_be_filled() {
        let page = "```rust\n```\n";
        assert_eq!(
            replace(page, &[(blocks(page)[0].range.clone(), "a\n".to_owned())]),
            "```rust\na\n```\n"
        );
    }

    #[test]
    fn mentions_are_found_with_their_lines() {
        let expected = [
            (1, Mention::Code("c::d".to_owned())),
            (1, Mention::Anchor("a-b-cd-e".to_owned())),
            (14, Mention::Link("m.md#n".to_owned())),
            (14, Mention::Link("p.svg".to_owned())),
            (14, Mention::Code("q".to_owned())),
            (15, Mention::Link("https://s.t".to_owned())),
        ];
        assert_eq!(mentions(PAGE), expected);
    }
}
