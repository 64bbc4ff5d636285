//! What the clients of a recorded run do, and in which order: a file `docs/src/runs/NAME.run`.
//!
//! ```text
//! title: Two clients at the same time
//! server: reactor-v03
//!
//! A connects
//! A sends "hello\n"
//! ? B connects now
//!     B connects
//! ? A leaves
//!     A shuts down
//! ```
//!
//! A line with `?` is a choice; what is indented below it follows if it is chosen. The other lines are listed
//! at [`Act`].

use std::collections::BTreeSet;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use common::message;

/// A script as a tree: acts, then perhaps choices.
#[derive(Debug, Default)]
pub struct Part {
    pub acts: Vec<(char, Act)>,
    pub choices: Vec<(String, Part)>,
}

/// The head of a script.
#[derive(Debug, Default)]
pub struct Script {
    pub title: String,
    /// The server's package and its options.
    pub server: String,
    /// The limit on its fds, if there is one.
    pub fds: Option<u32>,
    /// How long each epoll_wait is held up before it begins, in milliseconds, so that more can happen before it.
    pub delay: u32,
    pub part: Part,
}

/// What a client does, or what is done to the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Act {
    /// `A connects`
    Connects,
    /// `A connects with small buffers`: for the server's output; those of Linux may hold megabytes.
    ConnectsSmall,
    /// `A sends "text"`, `A sends 1 "text"` with a message id, `A sends 20 messages of 60000 bytes`
    Sends(Vec<u8>),
    /// `A shuts down`: a FIN, and it goes on reading
    ShutsDown,
    /// `A closes`
    Closes,
    /// `A resets`
    Resets,
    /// `A stops reading`
    StopsReading,
    /// `A reads on`: all that the kernel has for it, and again whenever the server sleeps, until nothing is left
    ReadsOn,
    /// `server stops`, so that more than one event is ready when it continues
    ServerStops,
    /// `server continues`
    ServerContinues,
    /// `time passes`: a quarter of a second
    TimePasses,
}

/// An act that was done: when, and by which client; the port by which the server knows the client.
pub struct Done {
    pub time: f64,
    pub client: char,
    pub port: u16,
    pub act: Act,
}

/// In place of a client, if the server is stopped, or time passes.
pub const NO_CLIENT: char = ' ';

/// Seconds since 1970, like strace's.
pub fn now() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

impl Script {
    pub fn parse(text: &str) -> Result<Self> {
        let mut script = Self::default();
        let (head, body) = text.split_once("\n\n").context("no empty line after the head")?;
        for line in head.lines() {
            let (key, value) = line.split_once(": ").with_context(|| format!("{line:?}"))?;
            match key {
                "title" => value.clone_into(&mut script.title),
                "server" => value.clone_into(&mut script.server),
                "fds" => script.fds = Some(value.parse()?),
                "delay" => script.delay = value.parse()?,
                _ => bail!("unknown key {key:?}"),
            }
        }
        let lines: Vec<&str> = body.lines().filter(|line| !line.trim().is_empty()).collect();
        script.part = part(&lines).context("the acts")?;
        Ok(script)
    }

    /// The names of all clients, whether they come in a path or not.
    pub fn clients(&self) -> BTreeSet<char> {
        self.part.clients()
    }

    /// The name of the server's package and of its executable.
    pub fn program(&self) -> &str {
        self.server.split(' ').next().unwrap_or_default()
    }
}

impl Part {
    fn clients(&self) -> BTreeSet<char> {
        let below = self.choices.iter().flat_map(|(_, part)| part.clients());
        self.acts
            .iter()
            .map(|(client, _)| *client)
            .chain(below)
            .filter(|it| *it != NO_CLIENT)
            .collect()
    }
}

/// Lines of one indentation, with what is indented below their choices.
fn part(lines: &[&str]) -> Result<Part> {
    let indent = |line: &str| line.len() - line.trim_start().len();
    let mut part_ = Part::default();
    let mut at = 0;
    while let Some(line) = lines.get(at) {
        at += 1;
        let Some(label) = line.trim_start().strip_prefix("? ") else {
            let (times, line) = repeated(line.trim());
            let act = act(&line).with_context(|| format!("{line:?}"))?;
            part_.acts.extend(std::iter::repeat_n(act, times));
            continue;
        };
        let below = lines[at..].iter().take_while(|it| indent(it) > indent(line)).count();
        part_.choices.push((label.to_owned(), part(&lines[at..at + below])?));
        at += below;
    }
    Ok(part_)
}

/// `A sends 3 messages of 9 bytes` is three acts, `A sends a message of 9 bytes`.
fn repeated(line: &str) -> (usize, String) {
    let parts = line.split_once(" messages of ").and_then(|(start, size)| {
        let (start, count) = start.rsplit_once(' ')?;
        Some((count.parse().ok()?, format!("{start} a message of {size}")))
    });
    parts.unwrap_or((1, line.to_owned()))
}

fn act(line: &str) -> Result<(char, Act)> {
    let (who, what) = line.split_once(' ').context("CLIENT and what it does")?;
    let act = match what {
        "connects" => Act::Connects,
        "connects with small buffers" => Act::ConnectsSmall,
        "shuts down" => Act::ShutsDown,
        "closes" => Act::Closes,
        "resets" => Act::Resets,
        "stops reading" => Act::StopsReading,
        "reads on" => Act::ReadsOn,
        "stops" => Act::ServerStops,
        "continues" => Act::ServerContinues,
        "passes" => Act::TimePasses,
        _ => Act::Sends(sent(what.strip_prefix("sends ").context("unknown act")?)?),
    };
    let client = if who.len() == 1 { who.chars().next() } else { None };
    Ok((client.unwrap_or(NO_CLIENT), act))
}

fn sent(what: &str) -> Result<Vec<u8>> {
    if let Some(size) = what.strip_prefix("a message of ") {
        return frame(1, &vec![b'x'; size.trim_end_matches(" bytes").parse()?]);
    }
    let (id, text) = what.split_once('"').context("a text in quotes")?;
    let text = text.trim_end_matches('"').replace("\\n", "\n");
    match id.trim() {
        "" => Ok(text.into_bytes()),
        id => frame(id.parse()?, text.as_bytes()),
    }
}

fn frame(id: i32, payload: &[u8]) -> Result<Vec<u8>> {
    Ok([&message::encode_header(id, payload.len())?[..], payload].concat())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_script_is_a_tree() {
        let text = "title: T\nserver: reactor-v03 --x\nfds: 9\n\nA connects\n? B comes\n    B connects\n    \
            B sends 2 messages of 3 bytes\n? A says hi\n    A sends \"hi\\n\"\n";
        let script = Script::parse(text).unwrap();
        assert_eq!((script.program(), script.fds), ("reactor-v03", Some(9)));
        assert_eq!(script.clients(), ['A', 'B'].into());
        assert_eq!(script.part.acts, [('A', Act::Connects)]);
        let [(first, b), (_, a)] = &script.part.choices[..] else { panic!("two choices") };
        assert_eq!((&**first, b.acts.len(), &b.acts[1]), ("B comes", 3, &b.acts[2]));
        assert_eq!(a.acts, [('A', Act::Sends(b"hi\n".to_vec()))]);
        let message = Act::Sends(frame(1, b"xxx").unwrap());
        assert_eq!(b.acts[1], ('B', message));
    }

    #[test]
    fn a_mistake_is_named() {
        for (text, what) in [
            ("title: T", "no empty line after the head"),
            ("what: T\n\nA connects", "unknown key \"what\""),
            ("title: T\n\nA jumps", "\"A jumps\": unknown act"),
            ("title: T\n\nA sends hi", "\"A sends hi\": a text in quotes"),
        ] {
            let err = Script::parse(text).unwrap_err();
            assert!(format!("{err:#}").contains(what), "{err:#}");
        }
    }
}
