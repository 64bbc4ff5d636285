//! Checks what the pages refer to: every link, anchor, path and name has to exist, and every page,
//! picture and answer has to be shown by some page.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use anyhow::{Context, bail, ensure};

use crate::pages::{Mention, mentions};
use crate::sources::Sources;
use crate::workspace::{Workspace, beside};

/// Checks all pages and pictures. The error lists everything that is wrong.
pub fn check(workspace: &Workspace, sources: &Sources) -> anyhow::Result<()> {
    let mut pages = BTreeMap::new();
    for path in workspace.pages() {
        pages.insert(path, mentions(&workspace.read(path)?));
    }
    let chapters = bench::chapters(&workspace.root)?;
    // There is nothing to compare the first chapter with.
    let diffs = chapters.iter().skip(1).filter_map(|chapter| chapter.strip_prefix("reactor-"));
    let diffs = diffs.map(|chapter| format!("docs/src/diffs/{chapter}.diff")).collect();
    let foreign = foreign_names(&workspace.read("docs/names.txt")?);
    let mut used = BTreeSet::new();
    let mut shown = BTreeSet::new();
    let mut faults = String::new();
    let world = World { workspace, sources, pages: &pages, diffs: &diffs, foreign: &foreign };
    for (&path, mentions) in &pages {
        for (line, mention) in mentions {
            let result = match mention {
                Mention::Anchor(_) => Ok(()),
                Mention::Link(url) => world
                    .check_link(path, url)
                    .map(|target| shown.extend(target.map(|target| (path, target)))),
                Mention::Include(file) => {
                    world.check_include(path, file).map(|target| shown.extend([(path, target)]))
                }
                Mention::Code(code) => world.check_code(code, &mut used),
                Mention::Item(file, name) => world.check_item(file, name),
            };
            if let Err(err) = result {
                writeln!(faults, "{path}:{line}: {err:#}")?;
            }
        }
    }
    for path in workspace.files("docs/", ".svg") {
        if let Err(err) = world.check_picture(&workspace.read(path)?) {
            writeln!(faults, "{path}: {err:#}")?;
        }
    }
    for fault in world.left_over(&shown) {
        writeln!(faults, "{fault}")?;
    }
    let unused: Vec<_> = foreign.difference(&used).map(String::as_str).collect();
    if !unused.is_empty() {
        writeln!(faults, "docs/names.txt: no page uses {}", unused.join(" "))?;
    }
    ensure!(faults.is_empty(), "{}", faults.trim_end());
    Ok(())
}

/// The names in docs/names.txt: one or more in a line, with a comment after `#`.
fn foreign_names(text: &str) -> BTreeSet<String> {
    let lines = text.lines().map(|line| line.split('#').next().unwrap_or_default());
    lines.flat_map(str::split_whitespace).map(str::to_owned).collect()
}

/// Everything that a page may refer to.
struct World<'a> {
    workspace: &'a Workspace,
    sources: &'a Sources,
    pages: &'a BTreeMap<&'a str, Vec<(usize, Mention)>>,
    /// The diffs that scripts/book.sh writes before it builds the book.
    diffs: &'a BTreeSet<String>,
    /// Names from outside the course: the kernel, std, the C++ course.
    foreign: &'a BTreeSet<String>,
}

impl World<'_> {
    /// The files that no page shows, although one should. `shown` has pages, and the files that
    /// they refer to.
    fn left_over(&self, shown: &BTreeSet<(&str, String)>) -> Vec<String> {
        const SUMMARY: &str = "docs/src/SUMMARY.md";
        let to_show = self.workspace.files("docs/", ".svg").chain(self.workspace.answers());
        let to_show = to_show.chain(self.diffs.iter().map(String::as_str));
        let to_show = to_show.chain(self.workspace.files("docs/src/runs/", ".json"));
        let hidden = to_show.filter(|path| !shown.iter().any(|(_, target)| target == path));
        let in_book = self.workspace.files("docs/src/", ".md").filter(|path| *path != SUMMARY);
        let unlisted = in_book.filter(|path| !shown.contains(&(SUMMARY, path.to_string())));
        let hidden = hidden.map(|path| format!("{path}: no page shows it"));
        hidden.chain(unlisted.map(|path| format!("{path}: SUMMARY.md lacks it"))).collect()
    }

    /// Returns the page or picture of this repository that the link shows, if any.
    fn check_link(&self, from: &str, url: &str) -> anyhow::Result<Option<String>> {
        if url.starts_with("https://") {
            return Ok(None);
        }
        ensure!(!url.contains(':'), "{url} is neither https nor a path");
        let (file, anchor) = url.split_once('#').unwrap_or((url, ""));
        let target = if file.is_empty() { from.to_owned() } else { beside(from, file)? };
        ensure!(self.workspace.has(&target), "broken link {url}");
        let in_book = |path: &str| path.starts_with("docs/src");
        ensure!(!in_book(from) || in_book(&target), "{url} is outside the book");
        if !anchor.is_empty() {
            let page = self.pages.get(&*target).with_context(|| format!("{url} is not a page"))?;
            let wanted = Mention::Anchor(anchor.to_owned());
            let found = page.iter().any(|(_, mention)| *mention == wanted);
            ensure!(found, "broken link {url}: no such heading");
        }
        // A link to an answer does not show it: a page has to include it.
        Ok(Some(target).filter(|target| !target.ends_with(".patch")))
    }

    /// Returns the path of the included file.
    fn check_include(&self, from: &str, file: &str) -> anyhow::Result<String> {
        let target = beside(from, file)?;
        let exists = self.workspace.files.contains(&target) || self.diffs.contains(&target);
        ensure!(exists, "broken include {file}");
        Ok(target)
    }

    fn check_item(&self, file: &str, name: &str) -> anyhow::Result<()> {
        let name = name.strip_suffix("()").unwrap_or(name);
        // The name of its module may come first.
        let module = file.rsplit('/').next().unwrap_or(file).trim_end_matches(".rs");
        let name = name.strip_prefix(&format!("{module}::")).unwrap_or(name);
        ensure!(!is_name(name) || self.sources.has_in(file, name), "{file} has no {name}");
        Ok(())
    }

    fn check_code(&self, code: &str, used: &mut BTreeSet<String>) -> anyhow::Result<()> {
        if code.contains(' ') {
            return self.check_command(code);
        }
        let mut is_foreign = |name: &str| {
            let is_foreign = self.foreign.contains(name);
            if is_foreign {
                used.insert(name.to_owned());
            }
            is_foreign
        };
        let is_path = code.contains('/')
            || [".rs", ".sh", ".md", ".toml", ".json"].iter().any(|end| code.ends_with(end));
        let is_plain = |char: char| char.is_ascii_alphanumeric() || "_-./".contains(char);
        if is_path && code.chars().all(is_plain) && !code.starts_with(['/', '.']) {
            // A page may name a file of a chapter without its folder.
            let exists =
                self.workspace.has(code) || self.sources.has_file(code) || is_foreign(code);
            ensure!(exists, "there is no file {code}");
            return Ok(());
        }
        // The name of a call or a generic type ends at its brackets.
        let name = code.split(['(', '<']).next().unwrap_or(code);
        let is_ours = self.sources.has_name(name) || self.has_package(name);
        if is_name(name) && !is_ours && !is_foreign(name) {
            bail!(
                "nothing is called {name}; if it is not part of the course, add it to docs/names.txt"
            )
        }
        Ok(())
    }

    /// A package, or another folder, goes by its own name, even below tools.
    fn has_package(&self, name: &str) -> bool {
        self.workspace.has(name) || self.workspace.has(&format!("tools/{name}"))
    }

    /// The paths and packages of a command have to exist.
    fn check_command(&self, command: &str) -> anyhow::Result<()> {
        let words: Vec<&str> = command.split_whitespace().collect();
        for (n, word) in words.iter().enumerate() {
            let folder = word.split('/').next().unwrap_or_default();
            let is_path = word.contains('/') && !folder.is_empty() && folder != "target";
            if is_path && self.workspace.has(folder) {
                ensure!(self.workspace.has(word), "there is no file {word}");
            }
            if n > 0 && words[n - 1] == "-p" && words[0] == "cargo" {
                ensure!(self.has_package(word), "there is no package {word}");
            }
        }
        Ok(())
    }

    /// Words in a picture that look like names, such as `do_read`, have to be names.
    fn check_picture(&self, svg: &str) -> anyhow::Result<()> {
        let texts = svg.split('>').filter_map(|part| part.split('<').next());
        let words = texts.flat_map(|text| text.split([' ', ',', ':', '\n']));
        for word in words.filter(|word| word.contains('_') && is_name(word)) {
            let known = self.sources.has_name(word) || self.foreign.contains(word);
            ensure!(known, "nothing is called {word}");
        }
        Ok(())
    }
}

/// `Type::method` and the like.
fn is_name(text: &str) -> bool {
    text.is_ascii() && syn::parse_str::<syn::Path>(text).is_ok()
}
