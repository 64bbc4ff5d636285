//! The blocks of a page that have a source: code, console sessions.

use anyhow::{Context, bail, ensure};
use pulldown_cmark::{CodeBlockKind, Event, Tag};

use crate::pages::{Block, blocks, events, line_of, replace};
use crate::sources::Sources;

/// The page with all excerpts as they are in their files.
///
/// # Errors
/// A block names something that does not exist, or has code in it and names nothing.
pub fn refresh(page: &str, sources: &Sources) -> anyhow::Result<String> {
    check_comments(page)?;
    let mut texts = Vec::new();
    for block in blocks(page) {
        if block.include(page).is_some() {
            continue;
        }
        let body = &page[block.range.clone()];
        if let Some(text) = text_of(&block, body, sources).with_context(|| block.place())? {
            texts.push((block.range, text));
        }
    }
    Ok(replace(page, &texts))
}

/// What a comment can begin with, and whether a block has to follow.
const COMMENTS: [(&str, bool); 5] = [
    ("<!-- code: ", true),
    ("<!-- sequence: ", true),
    ("<!-- illustration: ", true),
    ("<!-- figures: ", false),
    ("<!-- end of figures -->", false),
];

/// A comment that is misspelt would just be ignored, and so would a block that is no fenced one.
fn check_comments(page: &str) -> anyhow::Result<()> {
    for (event, range) in events(page) {
        let line = line_of(page, range.start);
        match event {
            Event::Html(html) if html.trim_start().starts_with("<!--") => {
                let known = COMMENTS.iter().find(|(start, _)| html.starts_with(start));
                let Some((_, has_block)) = known else {
                    bail!("line {line}: nobody understands {}", html.trim_end());
                };
                let at_start = page[..range.start].ends_with('\n');
                ensure!(at_start, "line {line}: this comment has to begin the line");
                let next = &page[range.start + html.len()..];
                ensure!(!has_block || next.starts_with("```"), "line {line}: no block follows");
            }
            Event::Start(Tag::CodeBlock(CodeBlockKind::Indented)) => {
                bail!("line {line}: an indented block, which has no language");
            }
            _ => {}
        }
    }
    let count = |text| page.matches(text).count();
    ensure!(
        count("\n<!-- figures: ") == count("\n<!-- end of figures -->"),
        "not every table of figures has a start and an end"
    );
    Ok(())
}

/// What a block should have in it, if its page does not decide that.
fn text_of(block: &Block<'_>, body: &str, sources: &Sources) -> anyhow::Result<Option<String>> {
    if let Some(reason) = block.comment_of("illustration") {
        ensure!(!reason.trim().is_empty(), "an illustration needs a reason");
        return Ok(None);
    }
    let (text, language) = if let Some(args) = block.comment_of("code") {
        (sources.excerpts(args)?, "rust")
    } else {
        match block.language {
            // Replayed by another task.
            "console" => return Ok(None),
            // Drawings, but no session that would be replayed if it were called one.
            "text" => {
                ensure!(
                    !body.lines().any(|line| line.starts_with("$ ")),
                    "this is a console session"
                );
                return Ok(None);
            }
            "" => bail!("a block needs a language, `text` if nothing else"),
            language => bail!(
                "{language} needs a source, `<!-- code: FILE, ITEM -->` or `{{{{#include FILE}}}}`, \
                 or a reason to have none, `<!-- illustration: REASON -->`"
            ),
        }
    };
    ensure!(block.language == language, "its language is {language:?}, not {:?}", block.language);
    Ok(Some(text))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sources;

    fn refreshed(page: &str) -> anyhow::Result<String> {
        refresh(page, &sources::tests::sources())
    }

    #[test]
    fn excerpts_are_refreshed_and_the_rest_left_alone() {
        let page = "a\n<!-- code: a/b.rs, <Type as Drop> -->\n```rust\nold\n```\n\n\
            <!-- illustration: how it looks in C -->\n```c\nint x;\n```\n\n```console\n$ ls\n```\n";
        let fresh =
            "// a/b.rs: <Type as Drop>\n\nimpl Drop for Type {\n    fn drop(&mut self) {}\n}\n";
        assert_eq!(refreshed(page).unwrap(), page.replace("old\n", fresh));
        assert_eq!(refreshed(&page.replace("old\n", fresh)).unwrap(), page.replace("old\n", fresh));
    }

    #[track_caller]
    fn assert_broken(page: &str, what: &str) {
        let err = refreshed(page).unwrap_err();
        assert!(format!("{err:#}").contains(what), "{err:#}");
    }

    #[test]
    fn blocks_without_a_source_are_found() {
        assert_broken("a\n```rust\nfn x() {}\n```\n", "line 2: rust needs a source");
        assert_broken("a\n\n<!-- code: a/b.rs, Type -->\n\n```rust\n```\n", "no block follows");
        assert_broken("a\n\n<!-- code:a/b.rs, Type -->\n```rust\n```\n", "nobody understands");
        assert_broken("a\n\n <!-- figures: cpu -->\n", "has to begin the line");
        assert_broken("a\n\n<!-- end of figures -->\n", "not every table of figures");
        assert_broken("a\n\n    fn x() {}\n", "an indented block");
        assert_broken("a\n\n```text\n$ ls\n```\n", "this is a console session");
        assert_broken("```\nfn x() {}\n```\n", "needs a language");
        assert_broken("a\n\n<!-- code: a/b.rs, Gone -->\n```rust\n```\n", "there is no item Gone");
        assert_broken("a\n\n<!-- code: a/b.rs, Type -->\n```c\n```\n", "its language is \"rust\"");
        assert_broken("a\n\n<!-- illustration:  -->\n```c\n```\n", "needs a reason");
    }
}
