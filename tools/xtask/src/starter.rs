//! `cargo xtask grade --start`: makes a crate outside the workspace for a learner to complete: a chapter with
//! `todo!()` in place of what is new in it.
//!
//! In `common` an item is new if it is marked `(since vNN)`, itself or by the type or module that it is in;
//! in the chapter's own files, if the chapter before has not the same text. A file that a page of the book
//! says to skip at first stays whole. Later items are left out, unless something that stays names them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::ops::Range;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use proc_macro2::{Span, TokenStream, TokenTree};
use regex::Regex;
use syn::spanned::Spanned;

use crate::grade::quoted;
use crate::sources::{ident_of, since};
use crate::workspace::Workspace;

const COMMON: &str = "common/src/";
const ALLOW: &str = "// While functions are still to be written: remove it at the end.
#![allow(dead_code, unused_imports, unused_mut, unused_variables)]
";
/// The starter is no member of the course's workspace.
const WORKSPACE: &str = "
[workspace]

[profile.dev]
debug = \"line-tables-only\"
";

struct Source {
    text: String,
    parts: Vec<Part>,
    /// All identifiers outside comments and strings, and where they are.
    idents: Vec<(usize, String)>,
    /// When it came in.
    since: String,
}

/// An item, or a function of one.
struct Part {
    /// What others call it; for an `impl` block its type.
    name: String,
    since: String,
    range: Range<usize>,
    /// The body of a function that can do without it.
    body: Option<Range<usize>>,
    /// Nothing requires it but what names it, unlike a method of a trait.
    stands_alone: bool,
}

impl Source {
    fn parse(text: String) -> Result<Self> {
        let module = since(text.lines(), "//!").unwrap_or_default();
        let (parts, idents) = (Vec::new(), Vec::new());
        let mut source = Self { text, parts, idents, since: module.clone() };
        source.add_idents(syn::parse_str(&source.text)?);
        let mut types = BTreeMap::new();
        for item in &syn::parse_file(&source.text)?.items {
            if let syn::Item::Impl(it) = item {
                source.add_impl(it, &types);
            } else if let Some(ident) = ident_of(item) {
                let part = source.part(ident.to_string(), item.span(), &module);
                types.insert(part.name.clone(), part.since.clone());
                source.parts.push(match item {
                    syn::Item::Fn(it) => Part { body: source.body(&it.sig, &it.block), ..part },
                    _ => part,
                });
            }
        }
        Ok(source)
    }

    /// `outer` is when what the part is in came in.
    fn part(&self, name: String, span: Span, outer: &str) -> Part {
        let range = span.byte_range();
        let since = since(self.text[range.clone()].lines(), "///");
        let since = since.unwrap_or_else(|| outer.to_owned());
        Part { name, since, range, body: None, stands_alone: true }
    }

    fn add_impl(&mut self, item: &syn::ItemImpl, types: &BTreeMap<String, String>) {
        let ty = self.text[item.self_ty.span().byte_range()].trim_start_matches('&');
        let ty = ty.split('<').next().unwrap_or_default().to_owned();
        let outer = types.get(&ty).unwrap_or(&self.since).clone();
        self.parts.push(self.part(ty, item.span(), &outer));
        for it in &item.items {
            let syn::ImplItem::Fn(it) = it else { continue };
            let part = self.part(it.sig.ident.to_string(), it.span(), &outer);
            let (body, stands_alone) = (self.body(&it.sig, &it.block), item.trait_.is_none());
            self.parts.push(Part { body, stands_alone, ..part });
        }
    }

    /// The body of a function, unless the type that it returns depends on it.
    fn body(&self, signature: &syn::Signature, block: &syn::Block) -> Option<Range<usize>> {
        let returns = &self.text[signature.output.span().byte_range()];
        (!returns.contains("impl ")).then(|| block.span().byte_range())
    }

    fn add_idents(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => self.add_idents(group.stream()),
                TokenTree::Ident(it) => {
                    self.idents.push((it.span().byte_range().start, it.to_string()))
                }
                _ => {}
            }
        }
    }

    /// The text without the parts that are out, and with `todo!()` for the body of those that are to do.
    fn with(&self, is_out: impl Fn(&Part) -> bool, is_todo: impl Fn(&Part) -> bool) -> String {
        let (mut text, mut done) = (String::new(), 0);
        for part in self.parts.iter().filter(|part| is_out(part) || is_todo(part)) {
            if part.range.start < done {
                continue;
            } else if is_out(part) {
                let before = self.text[..part.range.start].trim_end().len();
                text += &self.text[done..before.max(done)];
                // The next item takes its place, without an empty line if it is the first one.
                let is_first =
                    text.ends_with('{') && self.text[part.range.end..].starts_with("\n\n");
                done = part.range.end + usize::from(is_first);
            } else if let Some(body) = &part.body {
                text += &self.text[done..body.start];
                let line = self.text[..body.end].rsplit('\n').next().unwrap_or_default();
                let indent = &line[..line.len() - line.trim_start().len()];
                text += &format!("{{\n{indent}    todo!()\n{indent}}}");
                done = body.end;
            }
        }
        text + &self.text[done..]
    }
}

/// The `common` of a chapter: its files that there are by then. `own` are the chapter's own files, and
/// `is_skipped` tells which files stay whole.
fn common<'a>(
    chapter: &str,
    common: &BTreeMap<&'a str, Source>,
    own: &BTreeMap<&str, Source>,
    is_skipped: impl Fn(&str) -> bool,
) -> BTreeMap<&'a str, String> {
    let is_by_then = |source: &Source| *source.since <= *chapter;
    let here = common.iter().filter(|(path, source)| {
        let path = format!("crate::{}::", path.trim_end_matches(".rs"));
        let names_it = |it: &Source| is_by_then(it) && it.text.contains(&path);
        is_by_then(source) || common.values().any(names_it)
    });
    let here: BTreeMap<&str, &Source> = here.map(|(path, source)| (*path, source)).collect();
    let mut named: BTreeSet<&str> = BTreeSet::new();
    loop {
        let is_out =
            |it: &Part| it.stands_alone && *it.since > *chapter && !named.contains(&*it.name);
        // What an item names that stays has to stay too.
        let found = own.values().chain(here.values().copied()).flat_map(|source| {
            let out = source.parts.iter().filter(|part| is_out(part));
            let out: Vec<_> = out.map(|part| part.range.clone()).collect();
            let stays = move |at: &usize| !out.iter().any(|range| range.contains(at));
            source.idents.iter().filter(move |(at, _)| stays(at)).map(|(_, name)| &**name)
        });
        let found: BTreeSet<&str> = found.collect();
        if found.len() == named.len() {
            let files = here.iter().map(|(path, source)| {
                let is_todo = |part: &Part| part.since == chapter && !is_skipped(path);
                (*path, source.with(is_out, is_todo))
            });
            return files.collect();
        }
        named = found;
    }
}

/// `manifest` without tests and lints, without features unless `has_features`, and with what it takes from
/// the workspace's.
fn manifest(manifest: &str, workspace: &str, has_features: bool) -> Result<String> {
    let (mut text, mut is_kept) = (String::new(), true);
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_kept = !["[dev-dependencies]", "[[test]]", "[lints]"].contains(&line)
                && (has_features || line != "[features]");
        }
        if !is_kept || line.contains("optional = true") && !has_features {
            continue;
        }
        let name = line.split(['.', ' ']).next().unwrap_or_default();
        let inherited = ["workspace = true", &format!("{name}.workspace = true")];
        let Some(here) = inherited.into_iter().rfind(|it| line.contains(it)) else {
            text += &format!("{line}\n");
            continue;
        };
        let mut lines = workspace.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(" = "));
        let value = value.with_context(|| format!("the workspace has no {name}"))?;
        // Inside braces there are features too.
        let value = match value.strip_prefix('{') {
            _ if here.starts_with(name) => format!("{name} = {value}"),
            Some(fields) => fields.trim_matches(['}', ' ']).to_owned(),
            None => format!("version = {value}"),
        };
        text += &format!("{}\n", line.replace(here, &value));
    }
    Ok(text.trim_end().to_owned() + "\n")
}

/// The root of a crate, with the attribute after its documentation.
fn with_allow(root: &str) -> String {
    root.replacen("\n\n", &format!("\n\n{ALLOW}\n"), 1).replace("\n\n#![warn", "\n#![warn")
}

fn sources<'a>(workspace: &'a Workspace, folder: &'a str) -> Result<BTreeMap<&'a str, Source>> {
    let sources = workspace.files(folder, ".rs").map(|path| {
        let source =
            workspace.read(path).and_then(Source::parse).with_context(|| path.to_owned())?;
        Ok((&path[folder.len()..], source))
    });
    sources.collect()
}

/// The chapter with which to compare `chapter`, by scripts/chapters.sh; empty if there is none.
fn predecessor(workspace: &Workspace, chapter: &str) -> Result<String> {
    let mut bash = Command::new("bash");
    bash.args(["-ec", "source scripts/chapters.sh; predecessor \"$1\"", "bash", chapter]);
    let output = bash.current_dir(&workspace.root).output().context("cannot run bash")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?.trim_end().to_owned())
}

/// The files of the starter but its README, by their paths.
fn files(workspace: &Workspace, chapter: &str) -> Result<BTreeMap<String, String>> {
    let (package, mut files) = (format!("reactor-{chapter}"), BTreeMap::new());
    let chapters = bench::chapters(&workspace.root)?;
    ensure!(
        chapters.contains(&package),
        "no chapter {chapter:?}, but {}",
        chapters.join(", ").replace("reactor-", "")
    );
    let predecessor = predecessor(workspace, chapter)?;

    let folder = format!("{package}/src/");
    let own = sources(workspace, &folder)?;
    for (path, source) in &own {
        // The first chapter has no predecessor, and others may not have this file.
        let old = workspace.read(&format!("reactor-{predecessor}/src/{path}")).unwrap_or_default();
        let is_new = |part: &Part| !old.contains(&source.text[part.range.clone()]);
        let text = source.with(|_| false, |part| part.name != "main" && is_new(part));
        let is_root = *path == "main.rs" || path.starts_with("bin/");
        let text = if is_root { with_allow(&text) } else { text };
        files.insert(format!("src/{}", path.replace(&package, "mine")), text);
    }

    let pages = workspace.pages().map(|path| workspace.read(path)).collect::<Result<String>>()?;
    let is_skipped = |path: &str| pages.contains(&format!("{COMMON}{path} (skip at first)"));
    let all = sources(workspace, COMMON)?;
    let common = common(chapter, &all, &own, is_skipped);
    let empty = Regex::new(r"\n\nimpl.* \{\n\}")?;
    for (path, text) in &common {
        files.insert(format!("{COMMON}{path}"), empty.replace_all(text, "").into_owned());
    }
    let mut lib = with_allow(&workspace.read("common/src/lib.rs")?);
    for path in all.keys().filter(|path| !common.contains_key(*path)) {
        let name = path.trim_end_matches(".rs");
        let lines = format!(r"(?m)^(//! \| \[?`{name}`.*|#\[cfg.*\]\npub mod {name};)\n");
        lib = Regex::new(&lines)?.replace_all(&lib, "").into_owned();
    }
    files.insert("common/src/lib.rs".to_owned(), lib);

    let (shared, has_config) = (workspace.read("Cargo.toml")?, common.contains_key("config.rs"));
    let read = |path: &str| manifest(&workspace.read(path)?, &shared, has_config);
    files.insert("common/Cargo.toml".to_owned(), read("common/Cargo.toml")?);
    let own = read(&format!("{package}/Cargo.toml"))?.replace(&package, "mine");
    files.insert("Cargo.toml".to_owned(), own + WORKSPACE);
    files.insert("Cargo.lock".to_owned(), workspace.read("Cargo.lock")?);
    files.insert("rustfmt.toml".to_owned(), workspace.read("rustfmt.toml")?);
    files.insert(".gitignore".to_owned(), "/target\n".to_owned());
    Ok(files)
}

/// Makes the starter of `chapter`, for example `v03`, in `dir`.
pub fn make(workspace: &Workspace, chapter: &str, dir: &Path) -> Result<()> {
    let mut files = files(workspace, chapter)?;
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
    let place = if dir.exists() { dir } else { parent.unwrap_or(Path::new(".")) };
    let place = place.canonicalize().with_context(|| place.display().to_string())?;
    ensure!(!place.starts_with(&workspace.root), "{} is in the course's folder", dir.display());
    ensure!(!dir.exists() || fs::read_dir(dir)?.next().is_none(), "{} is not empty", dir.display());

    fs::create_dir_all(dir)?;
    let dir = dir.canonicalize()?;
    let (root, mine) = (workspace.root.display(), quoted(&dir.display().to_string()));
    let todo: usize = files.values().map(|text| text.matches("todo!()").count()).sum();
    let page = chapter.rsplit('-').next().unwrap_or(chapter);
    let commands = format!(
        "scripts/grade.sh {chapter} {mine}\n\
        scripts/grade.sh {chapter} {mine} --watch\n"
    );
    let readme = format!(
        "# Chapter {chapter}, to be completed\n\n\
        Each of the {todo} `todo!()` in `src` and `common/src` stands for a function that is new or changed in\n\
        this chapter. All others are there. The page to read is docs/src/{page}.md; the chapter's own code is in\n\
        reactor-{chapter}/src and common/src.\n\n\
        Build it and grade it in {root}, once or each time you save a file:\n\n```sh\n{commands}```\n"
    );
    files.insert("README.md".to_owned(), readme);
    for (path, text) in &files {
        let path = dir.join(path);
        fs::create_dir_all(path.parent().unwrap_or(&dir))?;
        fs::write(&path, text).with_context(|| path.display().to_string())?;
    }
    let text = format!(
        "{mine}: {todo} functions to write. Its README.md says more. In {root}:\n\n{commands}"
    );
    Ok(std::io::stdout().write_all(text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOOP: &str = "//! A loop (since v03).\n\npub struct Loop {\n    now: u8,\n}\n\n\
        impl Loop {\n    /// Later (since v05).\n    pub fn later(&self) {}\n\n    \
        /// One turn.\n    pub fn turn(&self) -> u8 {\n        // It is.\n        self.now\n    }\n\n    \
        pub fn wait(&self) -> impl Iterator<Item = u8> {\n        [1].into_iter()\n    }\n\n    \
        /// Later, but named (since v05).\n    pub fn named(&self) {}\n\n    \
        /// Later still (since v06).\n    pub fn last(&self) {\n        self.later();\n    }\n}\n\n\
        /// (since v04)\nstruct Gone;\n\nimpl Drop for Gone {\n    fn drop(&mut self) {}\n}\n";

    #[test]
    fn what_is_new_is_to_do_and_what_is_later_is_left_out() {
        let parse = |text: &str| Source::parse(text.to_owned()).unwrap();
        let net = "//! Sockets (since v01).\n\nfn old() {}\n\n/// (since v03)\nfn new() {}\n";
        let log = "//! The log (since v03).\n\nfn log() {}\n";
        let later = "//! Later (since v04).\n";
        let all = [("loop.rs", LOOP), ("net.rs", net), ("log.rs", log), ("later.rs", later)];
        let all = all.map(|(path, text)| (path, parse(text))).into();
        let own = [("main.rs", parse("fn main() {\n    it.named();\n}\n"))].into();
        let files = common("v03", &all, &own, |path| path == "log.rs");
        assert_eq!(files.keys().copied().collect::<Vec<_>>(), ["log.rs", "loop.rs", "net.rs"]);
        assert_eq!(files["log.rs"], log);
        assert_eq!(files["net.rs"], net.replace("new() {}", "new() {\n    todo!()\n}"));
        let text = "//! A loop (since v03).\n\npub struct Loop {\n    now: u8,\n}\n\n\
            impl Loop {\n    /// One turn.\n    pub fn turn(&self) -> u8 {\n        todo!()\n    }\n\n    \
            pub fn wait(&self) -> impl Iterator<Item = u8> {\n        [1].into_iter()\n    }\n\n    \
            /// Later, but named (since v05).\n    pub fn named(&self) {}\n}\n";
        assert_eq!(files["loop.rs"], text);
    }

    #[test]
    fn a_manifest_stands_alone() {
        let mine = "[package]\nname = \"a\"\nedition.workspace = true\n\n[features]\nb = []\n\n[dependencies]\n\
            c.workspace = true\nd = { workspace = true, optional = true }\n\
            e = { workspace = true, features = [\"f\"] }\n\n[lints]\nworkspace = true\n";
        let workspace = "edition = \"2024\"\nc = { path = \"c\" }\ne = \"1\"\n";
        let text = "[package]\nname = \"a\"\nedition = \"2024\"\n\n[dependencies]\n\
            c = { path = \"c\" }\ne = { version = \"1\", features = [\"f\"] }\n";
        assert_eq!(manifest(mine, workspace, false).unwrap(), text);
    }
}
