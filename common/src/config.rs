//! The configuration file: an INI file, as in the C++ course (since v09).
//!
//! ```text
//! [reactor]
//! ip = 127.0.0.1
//! port = 7777
//! maxConn = 10000
//! threadNum = 4
//! ```
//!
//! Each key is another name for an option of the command line, so clap checks its values.

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::error::ContextKind;
use clap::parser::ValueSource;
use clap::{ArgMatches, Parser};
use ini_roundtrip::Item;
use nix::fcntl::OFlag;
use tracing::{info, warn};

use crate::cli;

/// The keys, and the option that each stands for (since v09). They are in the section `[reactor]`.
pub const KEYS: [(&str, &str); 8] = [
    ("ip", "addr"),
    ("port", "addr"),
    ("maxConn", "max-conns"),
    ("threadNum", "threads"),
    ("whenFull", "when-full"),
    ("idleTimeout", "idle-timeout"),
    ("frameTimeout", "frame-timeout"),
    ("welcome", "welcome"),
];

/// The keys that only a restart can change (since v09).
pub const FIXED_KEYS: [&str; 3] = ["ip", "port", "threadNum"];

/// The longest file, in bytes.
const MAX_LEN: u64 = 1 << 20;

/// The options for a configuration file (since v09).
#[derive(clap::Args)]
pub struct ConfigArgs {
    /// Read the settings from this file, and again on SIGHUP; options given here take precedence
    #[arg(long = "config", value_name = "FILE")]
    pub file: Option<PathBuf>,

    /// Print the settings and where each comes from, and exit
    #[arg(long = "print-config")]
    pub print: bool,
}

/// The settings: each from the command line, else from the file, else the default (since v09). `A` has
/// the options of all [`KEYS`], and [`ConfigArgs`].
pub struct Config<A> {
    /// The settings in the form of options.
    pub args: A,
    settings: [Setting; KEYS.len()],
}

#[derive(Clone)]
struct Setting {
    key: &'static str,
    value: String,
    source: &'static str,
}

/// The keys that a file contains, with their values.
type Values = BTreeMap<&'static str, String>;

impl<A: Parser> Config<A> {
    /// Combines the command line, the file that it names with [`ConfigArgs`], and the defaults.
    ///
    /// # Errors
    /// The file cannot be read, or has a mistake, even in a setting that the command line has too:
    /// one line with the file, the line in it, the key, the value and what is wrong.
    pub fn load() -> Result<Self> {
        let given = A::command().try_get_matches().map_err(|err| anyhow!(reason(err)))?;
        let file = given.get_one::<PathBuf>("file");
        let values = file.map_or(Ok(Values::new()), |path| read::<A>(path))?;
        let addr = text(&given, "addr");
        let (host, port) = addr.rsplit_once(':').unwrap_or((&addr, ""));
        let get = |key, default| values.get(key).map_or(default, String::as_str);
        let mut options = vec![format!("--addr={}", join(get("ip", host), get("port", port)))];
        let rest = KEYS.iter().filter(|(_, option)| *option != "addr");
        // An empty text counts as not set.
        let set = |key| values.get(key).filter(|value| !value.is_empty());
        options.extend(rest.filter_map(|(key, option)| Some(format!("--{option}={}", set(key)?))));
        // Of several equal ones the last counts, which is that of the command line.
        let all = options.into_iter().map(OsString::from).chain(env::args_os().skip(1));
        let command = A::command().no_binary_name(true).args_override_self(true);
        let matches = command.try_get_matches_from(all).map_err(|err| anyhow!(reason(err)))?;
        let settings = KEYS.map(|(key, option)| Setting {
            key,
            value: value(&matches, key, option),
            source: match given.value_source(&id(option)) {
                Some(ValueSource::CommandLine) => "argument",
                _ if values.contains_key(key) => "file",
                _ => "default",
            },
        });
        Ok(Self { args: A::from_arg_matches(&matches)?, settings })
    }

    /// Reads the file again, and logs which settings have changed. Returns false after a mistake,
    /// which is logged too; the settings are those from before then.
    ///
    /// If one of [`FIXED_KEYS`] has changed, a warning says so; here it keeps its value, though not
    /// in [`args`](Self::args).
    pub fn reload(&mut self) -> bool {
        let mut new = match Self::load() {
            Ok(new) => new,
            Err(err) => {
                warn!("no settings changed: {err:#}");
                return false;
            }
        };
        let (mut changed, mut fixed) = (Vec::new(), Vec::new());
        for (old, setting) in self.settings.iter().zip(&mut new.settings) {
            if old.value != setting.value && FIXED_KEYS.contains(&old.key) {
                fixed.push(old.key);
                setting.clone_from(old);
            } else if old.value != setting.value {
                changed.push(format!("{:.100}", setting.to_string()));
            }
        }
        let changed = if changed.is_empty() { "none".into() } else { changed.join(", ") };
        info!("settings changed: {changed}");
        if !fixed.is_empty() {
            warn!("only a restart can change {}", fixed.join(", "));
        }
        *self = new;
        true
    }
}

/// One line for each setting: `maxConn = 10000 (default)`.
impl<A> fmt::Display for Config<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.settings.iter().try_for_each(|setting| writeln!(f, "{setting}"))
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {}", self.key, escape(&self.value))?;
        if !self.value.is_empty() {
            f.write_str(" ")?;
        }
        write!(f, "({})", self.source)
    }
}

/// The text of an option's value, or of its default.
fn text(matches: &ArgMatches, option: &str) -> String {
    let raw = matches.get_raw(&id(option)).and_then(|mut values| values.next());
    raw.unwrap_or_default().to_string_lossy().into_owned()
}

/// How the value of a key is printed.
fn value(matches: &ArgMatches, key: &str, option: &str) -> String {
    let text = text(matches, option);
    // Only the value of a timeout is a Duration.
    let timeout = matches.try_get_one::<Duration>(&id(option)).unwrap_or(None);
    match (key, text.rsplit_once(':')) {
        ("ip", Some((host, _))) => host.trim_matches(['[', ']']).to_owned(),
        ("port", Some((_, port))) => port.to_owned(),
        _ if timeout.is_some_and(Duration::is_zero) => "off".to_owned(),
        _ => text,
    }
}

/// clap's name for an option.
fn id(option: &str) -> String {
    option.replace('-', "_")
}

/// An address as the option takes it, with an IPv6 address in brackets.
fn join(host: &str, port: &str) -> String {
    let brackets = host.contains(':') && !host.starts_with('[');
    if brackets { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

fn read<A: Parser>(path: &Path) -> Result<Values> {
    let file = escape(&path.display().to_string());
    let text = read_text(path).with_context(|| format!("cannot read {file}"))?;
    let (mut values, mut in_section) = (Values::new(), false);
    // The parser would not take blanks around a section.
    let lines = text.strip_prefix('\u{feff}').unwrap_or(&text).lines();
    let text = lines.map(|line| line.trim_matches([' ', '\t'])).collect::<Vec<_>>().join("\n");
    let items = ini_roundtrip::Parser::new(&text);
    // Each item is a line, except for the end of a section.
    for (item, line) in items.filter(|item| *item != Item::SectionEnd).zip(1..) {
        // Of a long line only the beginning.
        let place = |raw: &str| format!("{file}:{line}: {:.80}", escape(raw));
        match item {
            Item::Section { name: "reactor", .. } => in_section = true,
            Item::Section { raw, .. } | Item::Error(raw) => {
                bail!("{}: unknown section, expected [reactor]", place(raw))
            }
            Item::Property { raw, .. } if !in_section => {
                bail!("{}: not in the section [reactor]", place(raw))
            }
            Item::Property { key, val: Some(value), raw } => {
                add::<A>(&mut values, key, value).map_err(|why| anyhow!("{}: {why}", place(raw)))?
            }
            Item::Property { raw, .. } => bail!("{}: expected KEY = VALUE", place(raw)),
            Item::Comment { .. } | Item::Blank { .. } | Item::SectionEnd => {}
        }
    }
    Ok(values)
}

fn read_text(path: &Path) -> Result<String> {
    // A pipe might never be opened at its other end, and never be closed.
    let flags = OFlag::O_NONBLOCK.bits();
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    ensure!(file.metadata()?.is_file(), "not a regular file");
    let mut bytes = Vec::new();
    file.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
    ensure!(bytes.len() as u64 <= MAX_LEN, "larger than 1 MiB");
    String::from_utf8(bytes).map_err(|err| {
        let valid = &err.as_bytes()[..err.utf8_error().valid_up_to()];
        anyhow!("line {} is not UTF-8", 1 + valid.iter().filter(|byte| **byte == b'\n').count())
    })
}

/// Adds a value, if its option takes it.
fn add<A: Parser>(values: &mut Values, key: &str, value: &str) -> Result<(), String> {
    let known = KEYS.iter().find(|(name, _)| *name == key);
    let (key, option) = known.ok_or_else(|| {
        format!("unknown key, expected one of {}", KEYS.map(|(key, _)| key).join(", "))
    })?;
    let mut value = value.to_owned();
    match *key {
        "ip" => cli::resolve(&join(&value, "0")).map(drop)?,
        "port" => {
            let port: u16 = value.parse().map_err(|_| "expected a port, 0 to 65535")?;
            value = port.to_string();
        }
        _ => {
            let argument = format!("--{option}={value}");
            A::command().try_get_matches_from(["", &argument]).map_err(reason)?;
        }
    }
    let twice = values.insert(key, value).is_some();
    if twice { Err("the key is there twice".to_owned()) } else { Ok(()) }
}

/// What clap objects to, without the option that a user of the file does not see.
fn reason(err: clap::Error) -> String {
    match (err.source(), err.get(ContextKind::ValidValue)) {
        (Some(source), _) => source.to_string(),
        (_, Some(values)) => format!("expected one of {values}"),
        _ => err.kind().to_string(),
    }
}

/// On one line, and with nothing in it that cannot be seen.
fn escape(text: &str) -> String {
    let escape = |c: char| match c {
        '"' | '\'' | '\\' => c.into(),
        _ => c.escape_debug().to_string(),
    };
    text.chars().map(escape).collect()
}
