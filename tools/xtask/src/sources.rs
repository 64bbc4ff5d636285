//! Finds the items and names in the workspace's sources by parsing them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, ensure};
use regex::Regex;
use serde::Serialize;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use crate::workspace::Workspace;

/// All sources by their paths.
#[derive(Default)]
pub struct Sources {
    files: BTreeMap<String, Source>,
    /// The names in the course, with and without their module: `message::decode`, `decode`.
    names: BTreeSet<String>,
}

#[derive(Default)]
struct Source {
    text: String,
    items: Vec<Item>,
    /// The names of items, and of the fields and variants of types.
    names: BTreeSet<String>,
}

struct Item {
    /// Its path within the file, for example `EventLoop::event_process`.
    path: String,
    /// From 1. The item starts with its doc comment, and includes both lines.
    first_line: usize,
    last_line: usize,
}

impl Sources {
    /// Reads and parses all sources.
    pub fn read(workspace: &Workspace) -> anyhow::Result<Self> {
        let mut sources = Self::default();
        for path in workspace.files("", ".rs") {
            sources.add(path, &workspace.read(path)?).with_context(|| path.to_owned())?;
        }
        Ok(sources)
    }

    fn add(&mut self, path: &str, text: &str) -> anyhow::Result<()> {
        let mut source = Source { text: text.to_owned(), ..Source::default() };
        let mut finder = Finder { source: &mut source, within: Vec::new() };
        finder.visit_file(&syn::parse_file(text)?);
        // Functions inside macros: many tests are in one.
        let after_fn = text.split(" fn ").skip(1).filter_map(|rest| rest.split_once('('));
        source.names.extend(after_fn.map(|(name, _)| name.to_owned()));
        // The text is not about the program that checks it.
        if !path.starts_with("tools/xtask/") {
            let module = path.rsplit('/').next().unwrap_or(path).trim_end_matches(".rs");
            self.names.extend(source.names.iter().map(|name| format!("{module}::{name}")));
            self.names.extend(source.names.iter().cloned());
        }
        self.files.insert(path.to_owned(), source);
        Ok(())
    }

    /// Whether anything in the course has this name, for example `TcpConn::do_read`.
    pub fn has_name(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// The sources whose path is `file` or ends with it.
    fn named<'a>(&'a self, file: &'a str) -> impl Iterator<Item = &'a Source> {
        let is_named = move |path: &str| {
            path.strip_suffix(file).is_some_and(|before| before.is_empty() || before.ends_with('/'))
        };
        self.files.iter().filter(move |(path, _)| is_named(path)).map(|(_, source)| source)
    }

    /// Whether a source can be called by this name.
    pub fn has_file(&self, file: &str) -> bool {
        self.named(file).next().is_some()
    }

    /// Whether a source that can be called `file` has something called `name`.
    pub fn has_in(&self, file: &str, name: &str) -> bool {
        self.named(file).any(|source| source.names.contains(name))
    }

    /// How many lines a source has, and the first sentence of its module's documentation.
    pub fn summary(&self, path: &str) -> anyhow::Result<(usize, String)> {
        let source = self.files.get(path).with_context(|| format!("there is no source {path}"))?;
        let lines = source.text.lines().map_while(|line| line.strip_prefix("//! "));
        let text = lines.collect::<Vec<_>>().join(" ");
        ensure!(!text.is_empty(), "{path} does not begin with a comment `//! `");
        let sentence = text.split_inclusive(". ").next().unwrap_or_default().trim_end();
        // A page does not need what is for rustdoc: versions and links.
        let since = sentence.find(" (since v").map_or(sentence, |end| &sentence[..end]);
        let sentence = since.trim_end_matches('.').replace("[`", "`").replace("`]", "`");
        Ok((source.text.lines().count(), sentence))
    }

    /// How many lines of a source are of later chapters than `chapter`, for example `v03`: those of items
    /// that are marked `(since vNN)`.
    pub fn later_lines(&self, path: &str, chapter: &str) -> usize {
        self.files.get(path).map_or(0, |source| {
            let is_later = |item: &&Item| source.since(item).is_some_and(|since| *since > *chapter);
            let later = source.items.iter().filter(is_later);
            later.map(|item| item.last_line + 1 - item.first_line).sum()
        })
    }

    /// The text for a comment `code: FILE, ITEM; ITEM`. Its first line repeats the comment, because
    /// the site hides it.
    pub fn excerpts(&self, args: &str) -> anyhow::Result<String> {
        let (path, items) = args
            .split_once(", ")
            .with_context(|| format!("{args:?} is not of the form FILE, ITEM; ITEM"))?;
        let source = self.files.get(path).with_context(|| format!("there is no source {path}"))?;
        let texts: anyhow::Result<Vec<_>> =
            items.split("; ").map(|item| source.excerpt(item).context(path.to_owned())).collect();
        Ok(format!("// {path}: {}\n\n{}", items.replace("; ", ", "), texts?.join("\n")))
    }
}

/// A piece of a source that a replay shows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Piece {
    file: String,
    name: String,
    /// The number of the first line, from 1.
    first: usize,
    lines: Vec<String>,
}

/// Where a program's log lines come from.
#[derive(Default)]
pub struct Logs {
    /// Each pattern with how much of it is literal, the line, and the function around it.
    patterns: Vec<(Regex, usize, usize, Piece)>,
    /// The functions that were asked for.
    pub pieces: Vec<Piece>,
}

impl Sources {
    /// The lines that a package and `common` may log.
    pub fn logs(&self, package: &str) -> anyhow::Result<Logs> {
        let logs = Regex::new(r#"\b(trace|debug|info|warn|error)!\(\s*"((?:[^"\\]|\\.)*)""#)?;
        let (hole, mut patterns) = (Regex::new(r"\{[^}]*\}")?, Vec::new());
        let folders = [format!("{package}/src/"), "common/src/".to_owned()];
        for folder in folders {
            for (file, source) in self.files.iter().filter(|(file, _)| file.starts_with(&folder)) {
                for log in logs.captures_iter(&source.text) {
                    let (_, [level, format]) = log.extract();
                    let at = log.get(0).map_or(0, |it| it.start());
                    let line = source.text[..at].matches('\n').count() + 1;
                    let within = |item: &&Item| item.first_line <= line && line <= item.last_line;
                    let Some(item) = source.items.iter().rfind(within) else { continue };
                    let lines = source.text.lines().enumerate().map(|(n, text)| (n + 1, text));
                    let lines =
                        lines.skip(item.first_line - 1).take(item.last_line + 1 - item.first_line);
                    let lines = lines.skip_while(|(_, text)| text.trim_start().starts_with("///"));
                    let lines: Vec<(usize, &str)> = lines.collect();
                    let piece = Piece {
                        file: file.clone(),
                        name: item.path.clone(),
                        first: lines[0].0,
                        lines: lines.into_iter().map(|(_, text)| text.to_owned()).collect(),
                    };
                    let literal = hole.split(format).map(regex::escape).collect::<Vec<_>>();
                    let level = level.to_uppercase();
                    let pattern = Regex::new(&format!("^{level} {}$", literal.join(".*")))?;
                    patterns.push((pattern, literal.concat().len(), line, piece));
                }
            }
        }
        Ok(Logs { patterns, pieces: Vec::new() })
    }
}

impl Logs {
    /// The nearest line above `at`, as [`find`](Self::find) returns it, in which `text` occurs.
    pub fn line_before(&self, at: (usize, usize), text: &str) -> (usize, usize) {
        let piece = &self.pieces[at.0];
        let before = piece.lines.iter().take(at.1 - piece.first);
        let found = before.enumerate().rfind(|(_, line)| line.contains(text));
        (at.0, found.map_or(at.1, |(n, _)| piece.first + n))
    }

    /// Whether nothing is known of the program.
    pub fn is_empty(&self) -> bool {
        self.patterns.is_empty()
    }

    /// Where a line with its level comes from: the index of its function in `pieces`, and the number of the line that
    /// logs it; and the function's name. Of several that could have logged it, the one that says most of it
    /// literally.
    pub fn find(&mut self, line: &str) -> Option<((usize, usize), String)> {
        let fits = self.patterns.iter().filter(|(pattern, ..)| pattern.is_match(line));
        // The first of equals: the package comes before `common`.
        let (_, _, number, piece) = fits.rev().max_by_key(|(_, literal, ..)| *literal)?;
        let index = self.pieces.iter().position(|it| it == piece).unwrap_or_else(|| {
            self.pieces.push(piece.clone());
            self.pieces.len() - 1
        });
        Some(((index, *number), piece.name.clone()))
    }
}

impl Source {
    /// The chapter in which an item came in, by its doc comment.
    fn since(&self, item: &Item) -> Option<String> {
        since(self.text.lines().skip(item.first_line - 1), "///")
    }

    /// The text of an item with its doc comment, without indentation.
    fn excerpt(&self, path: &str) -> anyhow::Result<String> {
        let mut found = self.items.iter().filter(|item| item.path == path);
        let item = found.next().with_context(|| format!("there is no item {path}"))?;
        ensure!(found.next().is_none(), "there is more than one item {path}");
        let lines: Vec<&str> =
            self.text.lines().take(item.last_line).skip(item.first_line - 1).collect();
        let indent = lines[0].len() - lines[0].trim_start().len();
        let lines = lines.iter().map(|line| line.get(indent..).unwrap_or(""));
        Ok(lines.fold(String::new(), |text, line| text + line + "\n"))
    }
}

/// The chapter that `lines` name in the comment that they begin with: `(since vNN)`.
pub fn since<'a>(lines: impl Iterator<Item = &'a str>, comment: &str) -> Option<String> {
    let doc = lines.map_while(|line| line.trim_start().strip_prefix(comment));
    let doc = doc.collect::<Vec<_>>().concat();
    doc.split_once("(since ").and_then(|(_, since)| since.get(..3)).map(str::to_owned)
}

/// Adds the items it visits to a source.
struct Finder<'a> {
    source: &'a mut Source,
    /// The names of the items around the visited one.
    within: Vec<String>,
}

impl Finder<'_> {
    fn add(&mut self, item: &impl Spanned, name: &str) {
        let span = item.span();
        let path = self.within.iter().map(String::as_str).chain([name]).collect::<Vec<_>>();
        let path = path.join("::");
        self.source.names.extend([name.to_owned(), path.clone()]);
        let (first_line, last_line) = (span.start().line, span.end().line);
        self.source.items.push(Item { path, first_line, last_line });
    }

    /// Visits the parts of an item.
    fn visit_inside(&mut self, item: &syn::Item, name: String) {
        self.within.push(name);
        visit::visit_item(self, item);
        self.within.pop();
    }
}

/// The name of an item, if it is part of the paths of its parts.
pub fn ident_of(item: &syn::Item) -> Option<&syn::Ident> {
    match item {
        syn::Item::Const(it) => Some(&it.ident),
        syn::Item::Enum(it) => Some(&it.ident),
        syn::Item::Fn(it) => Some(&it.sig.ident),
        syn::Item::Static(it) => Some(&it.ident),
        syn::Item::Struct(it) => Some(&it.ident),
        syn::Item::Trait(it) => Some(&it.ident),
        syn::Item::Type(it) => Some(&it.ident),
        _ => None,
    }
}

fn path_name(path: &syn::Path) -> String {
    path.segments.last().map(|last| last.ident.to_string()).unwrap_or_default()
}

impl<'ast> Visit<'ast> for Finder<'_> {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if let Some(ident) = ident_of(item) {
            let name = ident.to_string();
            self.add(item, &name);
            return self.visit_inside(item, name);
        }
        match item {
            syn::Item::Impl(it) => {
                let mut ty = &*it.self_ty;
                if let syn::Type::Reference(reference) = ty {
                    ty = &reference.elem;
                }
                // A tuple, for example, has no name.
                let syn::Type::Path(ty) = ty else { return };
                let ty = path_name(&ty.path);
                if let Some((_, path, _)) = &it.trait_ {
                    self.add(item, &format!("<{ty} as {}>", path_name(path)));
                }
                self.visit_inside(item, ty);
            }
            syn::Item::Mod(it) => {
                self.source.names.insert(it.ident.to_string());
                visit::visit_item(self, item);
            }
            syn::Item::Macro(it) => {
                self.source.names.extend(it.ident.iter().map(syn::Ident::to_string))
            }
            _ => {}
        }
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        match item {
            syn::ImplItem::Fn(it) => self.add(item, &it.sig.ident.to_string()),
            syn::ImplItem::Const(it) => self.add(item, &it.ident.to_string()),
            _ => {}
        }
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if let Some(ident) = &field.ident {
            self.add(field, &ident.to_string());
        }
    }

    fn visit_variant(&mut self, variant: &'ast syn::Variant) {
        self.add(variant, &variant.ident.to_string());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TEXT: &str = "pub struct Type {\n    /// A field.\n    field: u8,\n}\n\nimpl Type {\n    \
        /// A method.\n    pub fn method(&self) {\n\n        call();\n    }\n}\n\nimpl Drop for Type {\n    \
        fn drop(&mut self) {}\n}\n";

    fn sources() -> Sources {
        let mut sources = Sources::default();
        sources.add("a/b.rs", TEXT).unwrap();
        sources
    }

    #[test]
    fn an_item_is_found_by_its_path_and_is_not_indented() {
        let assert_excerpt = |items: &str, text: &str| {
            let head = format!("// a/b.rs: {}\n\n", items.replace("; ", ", "));
            assert_eq!(sources().excerpts(&format!("a/b.rs, {items}")).unwrap(), head + text);
        };
        let method = "/// A method.\npub fn method(&self) {\n\n    call();\n}\n";
        assert_excerpt("Type::method", method);
        let field = "/// A field.\nfield: u8,\n";
        assert_excerpt("Type::method; Type::field", &format!("{method}\n{field}"));
        assert_excerpt("<Type as Drop>", "impl Drop for Type {\n    fn drop(&mut self) {}\n}\n");
    }

    #[test]
    fn names_are_those_of_items_fields_methods_and_modules() {
        let sources = sources();
        for name in ["Type", "Type::field", "method", "Type::method", "b::Type", "Type::drop"] {
            assert!(sources.has_name(name), "{name}");
        }
        for name in ["Typ", "Type::fields", "c::Type", "call"] {
            assert!(!sources.has_name(name), "{name}");
        }
        assert!(sources.has_in("b.rs", "Type::field") && !sources.has_in(".rs", "Type::field"));
    }
}
