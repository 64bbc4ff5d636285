//! The items of the workspace's sources, found by parsing them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use proc_macro2::Span;
use quote::ToTokens;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// One source file.
pub struct Source {
    /// All of it.
    pub text: String,
    /// Every item by its path within the file, `EventLoop::event_process`, and its lines.
    items: Vec<Item>,
    /// All that has a name: items, and the fields and variants of types.
    names: BTreeSet<String>,
}

struct Item {
    path: String,
    /// From 1, and both within it; the doc comment counts.
    first_line: usize,
    last_line: usize,
    doc: String,
    public: bool,
}

impl Source {
    /// Parses Rust.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let file = syn::parse_file(text)?;
        let mut finder = Finder::default();
        finder.visit_file(&file);
        let Finder { items, mut names, .. } = finder;
        // Those inside macros, as many of the tests are.
        let after_fn = text.split(" fn ").skip(1);
        names.extend(
            after_fn.filter_map(|rest| rest.split_once('(')).map(|(name, _)| name.to_owned()),
        );
        Ok(Self { text: text.to_owned(), items, names })
    }

    /// The text of an item as it stands in the file, its doc comment too, but not indented.
    ///
    /// # Errors
    /// There is no such item, or more than one.
    pub fn excerpt(&self, path: &str) -> anyhow::Result<String> {
        let mut found = self.items.iter().filter(|item| item.path == path);
        let item = found.next().with_context(|| format!("there is no item {path}"))?;
        ensure!(found.next().is_none(), "there is more than one item {path}");
        let lines: Vec<&str> =
            self.text.lines().take(item.last_line).skip(item.first_line - 1).collect();
        let indent = lines[0].len() - lines[0].trim_start().len();
        let lines = lines.iter().map(|line| line.get(indent..).unwrap_or(""));
        Ok(lines.fold(String::new(), |text, line| text + line + "\n"))
    }

    /// The public items whose doc comment says that they came in with `chapter`, and the first
    /// sentence of that comment.
    pub fn since(&self, chapter: &str) -> Vec<(&str, String)> {
        let tag = format!("(since {chapter})");
        let new = self.items.iter().filter(|item| item.public && item.doc.contains(&tag));
        new.map(|item| (item.path.as_str(), first_sentence(&item.doc, &tag))).collect()
    }

    /// The whole file without its tests.
    pub fn without_tests(&self) -> &str {
        self.text.split("\n#[cfg(test)]").next().unwrap_or_default().trim_end()
    }
}

/// Without the tag, and with links made plain, since they lead to other items and not to pages.
fn first_sentence(doc: &str, tag: &str) -> String {
    let doc = doc.split("\n\n").next().unwrap_or_default().split_whitespace();
    let doc = doc.collect::<Vec<_>>().join(" ").replace(&format!(" {tag}"), "");
    let end = doc.find(". ").map_or(doc.len(), |end| end + 1);
    doc[..end].replace("[`", "`").replace("`]", "`")
}

#[derive(Default)]
struct Finder {
    within: Vec<String>,
    items: Vec<Item>,
    names: BTreeSet<String>,
}

impl Finder {
    fn item(&mut self, item: &impl ToTokens, attrs: &[syn::Attribute], public: bool, name: &str) {
        let span: Span = item.to_token_stream().span();
        let path = self.within.iter().map(String::as_str).chain([name]).collect::<Vec<_>>();
        let doc =
            attrs.iter().filter_map(doc_line).fold(String::new(), |doc, line| doc + &line + "\n");
        self.names.insert(name.to_owned());
        self.names.insert(path.join("::"));
        self.items.push(Item {
            path: path.join("::"),
            first_line: span.start().line,
            last_line: span.end().line,
            doc,
            public,
        });
    }

    fn inside(&mut self, name: &str, visit: impl FnOnce(&mut Self)) {
        self.within.push(name.to_owned());
        visit(self);
        self.within.pop();
    }
}

fn doc_line(attr: &syn::Attribute) -> Option<String> {
    let syn::Meta::NameValue(meta) = &attr.meta else { return None };
    let syn::Expr::Lit(literal) = &meta.value else { return None };
    match &literal.lit {
        syn::Lit::Str(text) if meta.path.is_ident("doc") => {
            Some(text.value().trim_start().to_owned())
        }
        _ => None,
    }
}

fn is_public(visibility: &syn::Visibility) -> bool {
    matches!(visibility, syn::Visibility::Public(_))
}

fn type_name(ty: &syn::Type) -> String {
    match ty {
        syn::Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()),
        syn::Type::Reference(reference) => return type_name(&reference.elem),
        _ => None,
    }
    .unwrap_or_default()
}

/// The name of an item, for the kinds that have one and can be shown by it.
fn named(item: &syn::Item) -> Option<(&syn::Ident, &[syn::Attribute], &syn::Visibility)> {
    Some(match item {
        syn::Item::Const(it) => (&it.ident, &it.attrs, &it.vis),
        syn::Item::Enum(it) => (&it.ident, &it.attrs, &it.vis),
        syn::Item::Fn(it) => (&it.sig.ident, &it.attrs, &it.vis),
        syn::Item::Static(it) => (&it.ident, &it.attrs, &it.vis),
        syn::Item::Struct(it) => (&it.ident, &it.attrs, &it.vis),
        syn::Item::Trait(it) => (&it.ident, &it.attrs, &it.vis),
        syn::Item::Type(it) => (&it.ident, &it.attrs, &it.vis),
        _ => return None,
    })
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        if let Some((ident, attrs, visibility)) = named(item) {
            let name = ident.to_string();
            self.item(item, attrs, is_public(visibility), &name);
            return self.inside(&name, |finder| visit::visit_item(finder, item));
        }
        match item {
            syn::Item::Impl(it) => {
                let ty = type_name(&it.self_ty);
                let name = match &it.trait_ {
                    Some((_, path, _)) => {
                        let of = path.segments.last().map(|last| last.ident.to_string());
                        format!("<{ty} as {}>", of.unwrap_or_default())
                    }
                    None => ty.clone(),
                };
                if it.trait_.is_some() {
                    self.item(item, &it.attrs, false, &name);
                    // A method of a trait is known as one of the type, too.
                    for of in &it.items {
                        if let syn::ImplItem::Fn(method) = of {
                            self.names.insert(format!("{ty}::{}", method.sig.ident));
                        }
                    }
                }
                self.inside(&name, |finder| visit::visit_item(finder, item));
            }
            syn::Item::Mod(it) => {
                self.names.insert(it.ident.to_string());
                visit::visit_item(self, item);
            }
            syn::Item::Macro(it) => {
                if let Some(ident) = &it.ident {
                    self.names.insert(ident.to_string());
                }
            }
            _ => visit::visit_item(self, item),
        }
    }

    fn visit_impl_item(&mut self, item: &'ast syn::ImplItem) {
        match item {
            syn::ImplItem::Fn(it) => {
                self.item(item, &it.attrs, is_public(&it.vis), &it.sig.ident.to_string())
            }
            syn::ImplItem::Const(it) => {
                self.item(item, &it.attrs, is_public(&it.vis), &it.ident.to_string())
            }
            _ => {}
        }
    }

    fn visit_field(&mut self, field: &'ast syn::Field) {
        if let Some(ident) = &field.ident {
            self.item(field, &field.attrs, false, &ident.to_string());
        }
    }

    fn visit_variant(&mut self, variant: &'ast syn::Variant) {
        self.item(variant, &variant.attrs, false, &variant.ident.to_string());
    }
}

/// All of the workspace's sources, by their paths from its root.
pub struct Sources(BTreeMap<String, Source>);

impl Sources {
    /// Reads and parses them.
    ///
    /// # Errors
    /// One of them cannot be read, or is no Rust.
    pub fn read(root: &Path) -> anyhow::Result<Self> {
        let mut sources = BTreeMap::new();
        let mut folders = vec![root.to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                if path.is_dir() && name != "target" && !name.starts_with('.') {
                    folders.push(path);
                } else if name.ends_with(".rs") {
                    let name = path.strip_prefix(root)?.display().to_string();
                    let text = fs::read_to_string(&path).context(name.clone())?;
                    let source = Source::parse(&text).with_context(|| name.clone())?;
                    sources.insert(name, source);
                }
            }
        }
        Ok(Self(sources))
    }

    /// One of them.
    ///
    /// # Errors
    /// There is none at that path.
    pub fn get(&self, path: &str) -> anyhow::Result<&Source> {
        self.0.get(path).with_context(|| format!("there is no source {path}"))
    }

    /// Those below a folder, and their paths.
    pub fn below(&self, folder: &str) -> impl Iterator<Item = (&str, &Source)> {
        let paths = self.0.iter().map(|(path, source)| (path.as_str(), source));
        paths.filter(move |(path, _)| path.starts_with(folder))
    }

    /// Whether anything goes by this name: `decode`, or `message::decode`, or `TcpConn::do_read`.
    pub fn has_name(&self, name: &str) -> bool {
        // What checks the text is not what it is about.
        let mut course = self.0.iter().filter(|(path, _)| !path.starts_with("tools/xtask/"));
        course.any(|(path, source)| {
            let module = path.rsplit('/').next().and_then(|file| file.strip_suffix(".rs"));
            let within = module.and_then(|module| name.strip_prefix(module)?.strip_prefix("::"));
            source.names.contains(name) || within.is_some_and(|name| source.names.contains(name))
        })
    }

    /// Whether a file, which may be named by the end of its path, has something by this name.
    pub fn has_in(&self, file: &str, name: &str) -> bool {
        let end = format!("/{file}");
        let mut files = self.0.iter().filter(|(path, _)| *path == file || path.ends_with(&end));
        files.any(|(_, source)| source.names.contains(name))
    }

    /// What a comment `code: FILE, ITEM; ITEM` stands for. The first line says it again, for those
    /// who cannot see the comment.
    ///
    /// # Errors
    /// It names something that does not exist.
    pub fn excerpts(&self, args: &str) -> anyhow::Result<String> {
        let Some((path, items)) = args.split_once(", ") else {
            bail!("{args:?} is not of the form FILE, ITEM; ITEM");
        };
        let source = self.get(path)?;
        let texts: anyhow::Result<Vec<_>> =
            items.split("; ").map(|item| source.excerpt(item).context(path.to_owned())).collect();
        Ok(format!("// {path}: {}\n\n{}", items.replace("; ", ", "), texts?.join("\n")))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub mod tests {
    use super::*;

    const TEXT: &str = "//! A file.\n\n/// A type (since v09). More.\npub struct Type {\n    /// A field.\n    \
        field: u8,\n}\n\nimpl Type {\n    /// A method.\n    ///\n    /// More (since v10).\n    pub fn method(&self) {\n\
        \n        call();\n    }\n}\n\nimpl Drop for Type {\n    fn drop(&mut self) {}\n}\n\n\
        #[cfg(test)]\nmod tests {}\n";

    pub fn sources() -> Sources {
        Sources([("a/b.rs".to_owned(), Source::parse(TEXT).unwrap())].into())
    }

    #[test]
    fn an_item_is_found_by_its_path_and_is_not_indented() {
        let method =
            "/// A method.\n///\n/// More (since v10).\npub fn method(&self) {\n\n    call();\n}\n";
        let assert_excerpt = |items: &str, text: &str| {
            let head = format!("// a/b.rs: {}\n\n", items.replace("; ", ", "));
            assert_eq!(sources().excerpts(&format!("a/b.rs, {items}")).unwrap(), head + text);
        };
        assert_excerpt("Type::method", method);
        let field = "/// A field.\nfield: u8,\n";
        assert_excerpt("Type::method; Type::field", &format!("{method}\n{field}"));
        let drop = "impl Drop for Type {\n    fn drop(&mut self) {}\n}\n";
        assert_excerpt("<Type as Drop>", drop);
    }

    #[track_caller]
    fn assert_broken(args: &str, what: &str) {
        let err = sources().excerpts(args).unwrap_err();
        assert!(format!("{err:#}").contains(what), "{err:#}");
    }

    #[test]
    fn what_does_not_exist_is_named() {
        assert_broken("a/b.rs, Type::other", "there is no item Type::other");
        assert_broken("a/c.rs, Type", "there is no source a/c.rs");
        assert_broken("a/b.rs", "not of the form");
    }

    #[test]
    fn names_are_those_of_items_fields_methods_and_modules() {
        let sources = sources();
        for name in
            ["Type", "field", "Type::field", "method", "Type::method", "b::Type", "Type::drop"]
        {
            assert!(sources.has_name(name), "{name}");
        }
        for name in ["Typ", "Type::fields", "c::Type", "call"] {
            assert!(!sources.has_name(name), "{name}");
        }
    }

    #[test]
    fn what_a_chapter_brought_in_is_known_by_its_doc_comment() {
        let sources = sources();
        let source = sources.get("a/b.rs").unwrap();
        assert_eq!(source.since("v09"), [("Type", "A type.".to_owned())]);
        assert_eq!(source.since("v10"), [("Type::method", "A method.".to_owned())]);
        assert!(!source.without_tests().contains("tests"));
    }
}
