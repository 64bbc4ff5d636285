//! The blocks of a page that have a source: code, answers, console sessions.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail, ensure};

use crate::pages::{Block, blocks, replace};
use crate::sources::Sources;

/// The page with all excerpts and answers as they are in their files.
///
/// # Errors
/// A block names something that does not exist, or has code in it and names nothing.
pub fn refresh(page: &str, sources: &Sources, root: &Path) -> anyhow::Result<String> {
    let mut texts = Vec::new();
    for block in blocks(page) {
        if let Some(text) = text_of(&block, sources, root).with_context(|| block.place())? {
            texts.push((block.range, text));
        }
    }
    Ok(replace(page, &texts))
}

/// What a block should have in it, if its page does not decide that.
fn text_of(block: &Block<'_>, sources: &Sources, root: &Path) -> anyhow::Result<Option<String>> {
    if let Some(reason) = block.comment_of("illustration") {
        ensure!(!reason.trim().is_empty(), "an illustration needs a reason");
        return Ok(None);
    }
    let (text, language) = if let Some(args) = block.comment_of("code") {
        (sources.excerpts(args)?, "rust")
    } else if let Some(path) = block.comment_of("file") {
        (
            fs::read_to_string(root.join(path)).with_context(|| format!("there is no {path}"))?,
            "diff",
        )
    } else {
        match block.language {
            // Replayed by another task; drawings and exercises' text need no source.
            "console" | "text" => return Ok(None),
            "" => bail!("a block needs a language, `text` if nothing else"),
            language => bail!(
                "{language} needs a source, `<!-- code: FILE, ITEM -->` or `<!-- file: FILE -->`, \
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
        refresh(page, &sources::tests::sources(), Path::new(env!("CARGO_MANIFEST_DIR")))
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
        assert_broken("<!-- code: a/b.rs, Type -->\n\n```rust\n```\n", "rust needs a source");
        assert_broken("```\nfn x() {}\n```\n", "needs a language");
        assert_broken("<!-- code: a/b.rs, Gone -->\n```rust\n```\n", "there is no item Gone");
        assert_broken("<!-- code: a/b.rs, Type -->\n```c\n```\n", "its language is \"rust\"");
        assert_broken("<!-- file: gone.patch -->\n```diff\n```\n", "there is no gone.patch");
        assert_broken("<!-- illustration:  -->\n```c\n```\n", "needs a reason");
    }
}
