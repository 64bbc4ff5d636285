//! Links, anchors, file paths and names in the text: all that they lead to exists.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, bail, ensure};

use crate::pages::{Mention, mentions};
use crate::sources::Sources;

/// Names that the text may use though no source of the course has them: the kernel's, std's, the
/// original's.
pub struct ForeignNames(BTreeSet<String>);

impl ForeignNames {
    /// One or more in a line, after `#` a comment.
    pub fn parse(text: &str) -> Self {
        let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
        Self(lines.flat_map(str::split_whitespace).map(str::to_owned).collect())
    }
}

/// What a page may refer to.
pub struct World<'a> {
    /// Where all paths begin.
    pub root: &'a Path,
    /// The course's own names.
    pub sources: &'a Sources,
    /// All the others.
    pub foreign: &'a ForeignNames,
    /// The text of a page by its path from the root.
    pub page: &'a dyn Fn(&Path) -> Option<String>,
}

/// Names the foreign names that a page uses.
///
/// # Errors
/// Something that a page mentions does not exist. All of it is listed.
pub fn check(world: &World<'_>, path: &Path, page: &str) -> anyhow::Result<BTreeSet<String>> {
    let mut used = BTreeSet::new();
    let mut mistakes = String::new();
    for (line, mention) in mentions(page) {
        let result = match &mention {
            Mention::Anchor(_) => Ok(()),
            Mention::Link(url) => check_link(world, path, url),
            Mention::Code(code) => check_code(world, code, &mut used),
            Mention::Item(file, name) => check_item(world, file, name),
        };
        if let Err(err) = result {
            mistakes += &format!("\n  line {line}: {err:#}");
        }
    }
    ensure!(mistakes.is_empty(), "{mistakes}");
    Ok(used)
}

fn check_link(world: &World<'_>, from: &Path, url: &str) -> anyhow::Result<()> {
    if url.starts_with("https://") {
        return Ok(());
    }
    ensure!(!url.contains(':'), "{url} is neither https nor a path");
    let (file, anchor) = url.split_once('#').unwrap_or((url, ""));
    let target = match file {
        "" => from.to_owned(),
        _ => normal(&from.parent().context("a page in a folder")?.join(file))?,
    };
    ensure!(world.root.join(&target).exists(), "{url} leads to nothing");
    let in_book = |path: &Path| path.starts_with("docs/src");
    ensure!(!in_book(from) || in_book(&target), "{url} leads out of the book");
    if !anchor.is_empty() {
        let page = (world.page)(&target).with_context(|| format!("{url} is no page"))?;
        let anchors: Vec<_> = mentions(&page).into_iter().map(|(_, mention)| mention).collect();
        let wanted = Mention::Anchor(anchor.to_owned());
        ensure!(anchors.contains(&wanted), "{url} leads to no heading");
    }
    Ok(())
}

/// `a/b/../c` as `a/c`.
fn normal(path: &Path) -> anyhow::Result<PathBuf> {
    let mut normal = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => ensure!(normal.pop(), "{} leads out", path.display()),
            other => normal.push(other),
        }
    }
    Ok(normal)
}

fn check_item(world: &World<'_>, file: &str, name: &str) -> anyhow::Result<()> {
    let name = name.strip_suffix("()").unwrap_or(name);
    // A module's own name may be before it.
    let module = file.rsplit('/').next().unwrap_or(file).trim_end_matches("rs").replace('.', "::");
    let name = name.strip_prefix(&module).unwrap_or(name);
    ensure!(!is_name(name) || world.sources.has_in(file, name), "{file} has nothing called {name}");
    Ok(())
}

/// `Type::method` and the like.
fn is_name(text: &str) -> bool {
    text.split("::").all(|part| {
        let mut chars = part.chars();
        chars.next().is_some_and(|char| char.is_ascii_alphabetic() || char == '_')
            && chars.all(|char| char.is_ascii_alphanumeric() || char == '_')
    })
}

/// A command, whose paths and packages have to exist.
fn check_command(world: &World<'_>, command: &str) -> anyhow::Result<()> {
    let words: Vec<&str> = command.split_whitespace().collect();
    for (n, word) in words.iter().enumerate() {
        let folder = word.split('/').next().unwrap_or_default();
        let is_path = word.contains('/') && !folder.is_empty() && folder != "target";
        if is_path && world.root.join(folder).is_dir() {
            ensure!(world.root.join(word).exists(), "there is no file {word}");
        }
        if n > 0 && words[n - 1] == "-p" && words[0] == "cargo" {
            ensure!(world.root.join(word).is_dir(), "there is no package {word}");
        }
    }
    Ok(())
}

fn check_code(world: &World<'_>, code: &str, used: &mut BTreeSet<String>) -> anyhow::Result<()> {
    if code.contains(' ') {
        return check_command(world, code);
    }
    let is_path = code.contains('/')
        || [".rs", ".sh", ".md", ".toml", ".json"].iter().any(|end| code.ends_with(end));
    let is_plain = |char: char| char.is_ascii_alphanumeric() || "_-./".contains(char);
    if is_path && code.chars().all(is_plain) && !code.starts_with(['/', '.']) {
        // A file of a chapter may go by its name alone.
        let exists = world.root.join(code).exists()
            || world.sources.below("").any(|(path, _)| path.ends_with(&format!("/{code}")))
            || foreign(world, code, used);
        ensure!(exists, "there is no file {code}");
        return Ok(());
    }
    // A call or a generic type: what is before its brackets.
    let name = code.split(['(', '<']).next().unwrap_or(code);
    // A crate goes by the name of its folder.
    let is_ours = world.sources.has_name(name) || world.root.join(name).is_dir();
    if !is_name(name) || is_ours || foreign(world, name, used) {
        return Ok(());
    }
    bail!(
        "nothing goes by the name of {name}; if it is not the course's, it belongs in docs/names.txt"
    )
}

fn foreign(world: &World<'_>, name: &str, used: &mut BTreeSet<String>) -> bool {
    let known = world.foreign.0.contains(name);
    if known {
        used.insert(name.to_owned());
    }
    known
}

/// Looks at the words of a drawing that can only be names, as `do_read` can.
///
/// # Errors
/// The course has nothing by one of them.
pub fn check_picture(world: &World<'_>, svg: &str) -> anyhow::Result<()> {
    let texts = svg.split('>').filter_map(|part| part.split('<').next());
    let words = texts.flat_map(|text| text.split([' ', ',', ':', '\n']));
    for word in words.filter(|word| word.contains('_') && is_name(word)) {
        let known = world.sources.has_name(word) || world.foreign.0.contains(word);
        ensure!(known, "there is nothing called {word}");
    }
    Ok(())
}

/// # Errors
/// The list has names that no page uses.
pub fn check_foreign(foreign: &ForeignNames, used: &BTreeSet<String>) -> anyhow::Result<()> {
    let unused: Vec<_> = foreign.0.difference(used).map(String::as_str).collect();
    ensure!(unused.is_empty(), "names that no page uses: {}", unused.join(" "));
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sources;

    fn checked(page: &str) -> anyhow::Result<BTreeSet<String>> {
        let world = World {
            root: &crate::workspace_root().unwrap(),
            sources: &sources::tests::sources(),
            foreign: &ForeignNames::parse("epoll_wait  # a call\nTcpStream::connect a.cpp\n"),
            page: &|path| match path.to_str()? {
                "README.md" => Some("# One two\n".to_owned()),
                "docs/README.md" => Some(page.to_owned()),
                _ => None,
            },
        };
        check(&world, Path::new("docs/README.md"), page)
    }

    #[test]
    fn what_exists_passes() {
        let page = "`Type::method` `Type` `method()` `epoll_wait` `cargo run -p common` \
            `b.rs`, `Type` `127.0.0.1:7777` `b.rs` `/proc/self` `common/src/net.rs` `common/` \
            [a](https://b.c/d) [e](../README.md#one-two) [f](#g-h) [i](../README.md)\n\n## G h\n";
        assert_eq!(checked(page).unwrap(), ["epoll_wait".to_owned()].into());
    }

    #[track_caller]
    fn assert_broken(page: &str, what: &str) {
        let err = checked(page).unwrap_err();
        assert!(format!("{err:#}").contains(what), "{err:#}");
    }

    #[test]
    fn what_does_not_exist_is_named_with_its_line() {
        assert_broken("a\n\n`Type::gone`", "line 3: nothing goes by the name of Type::gone");
        assert_broken("`gone()`", "the name of gone");
        assert_broken("`Type::gone(fd)`", "the name of Type::gone");
        assert_broken("`Gone<T>`", "the name of Gone");
        assert_broken("`scripts/gone.sh v01 v02`", "there is no file scripts/gone.sh");
        assert_broken("`cargo run -p reactor-v09`", "there is no package reactor-v09");
        assert_broken("`b.rs`, `gone`", "b.rs has nothing called gone");
        assert_broken("`common/src/gone.rs`", "there is no file common/src/gone.rs");
        assert_broken("`gone.rs`", "there is no file gone.rs");
        assert_broken("[a](gone.md)", "gone.md leads to nothing");
        assert_broken("![a](gone.svg)", "gone.svg leads to nothing");
        assert_broken("[a](../README.md#one-three)", "leads to no heading");
        assert_broken("[a](#one)", "leads to no heading");
        assert_broken("[a](http://b.c)", "neither https nor a path");
        assert_broken("[a](../../README.md)", "leads out");
    }

    #[test]
    fn a_page_of_the_book_does_not_lead_out_of_it() {
        let world = World {
            root: &crate::workspace_root().unwrap(),
            sources: &sources::tests::sources(),
            foreign: &ForeignNames::parse(""),
            page: &|_| None,
        };
        let err = check(&world, Path::new("docs/src/page.md"), "[a](../../README.md)").unwrap_err();
        assert!(format!("{err:#}").contains("leads out of the book"), "{err:#}");
    }

    #[test]
    fn a_foreign_name_that_nobody_uses_is_found() {
        let foreign = ForeignNames::parse("epoll_wait accept4");
        let err = check_foreign(&foreign, &["accept4".to_owned()].into()).unwrap_err();
        assert!(err.to_string().ends_with(": epoll_wait"), "{err}");
        assert!(
            check_foreign(&foreign, &["accept4".to_owned(), "epoll_wait".to_owned()].into())
                .is_ok()
        );
    }
}
