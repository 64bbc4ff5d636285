//! The system in a recorded run: what its clients, the kernel, the threads and the buffers hold.

use std::collections::{BTreeMap, VecDeque};

use bench::report::thousands;
use common::message;
use serde_json::{Map, Value, json};

/// Above this much output a connection reads nothing, in bytes: `HIGH_WATER` of chapter 4.
const HIGH_WATER: usize = 960 * 1024;

/// With more clients than this, they share a table.
const MOST_LANES: usize = 6;

/// What is behind an fd.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    Listener,
    Conn(char),
    Bell { rings: u64 },
    Signals,
    Datagrams,
    Epoll,
}

/// A row of an epoll instance's table.
pub struct Row {
    pub fd: i64,
    pub flags: String,
    /// What epoll returns with an event: here a slot and its generation.
    pub data: u64,
}

/// An event of a batch.
pub struct Ready {
    pub fd: i64,
    pub who: String,
    pub flags: String,
    pub state: &'static str,
}

/// A client and its connection.
#[derive(Default)]
pub struct Client {
    pub port: u16,
    pub connected: bool,
    pub accepted: bool,
    /// Whether it has closed or shut down its side, and whether the server has.
    pub closed: bool,
    pub fin: bool,
    pub rst: bool,
    /// Whether the server has yet to learn of the reset, by the error of a call.
    pub error: bool,
    pub server_fin: bool,
    /// Whether the server has closed it without having read everything.
    pub server_rst: bool,
    pub sent: Vec<u8>,
    pub got: Vec<u8>,
    /// Sent, and not read by the server yet.
    pub unread: VecDeque<u8>,
    /// Whether it reads nothing. What the kernel holds for it.
    pub deaf: bool,
    pub held: Vec<u8>,
    /// Whether the server's last write found no room for all of it.
    pub full: bool,
    pub input: Vec<u8>,
    pub output: Vec<u8>,
}

/// A thread with a loop, or the main thread.
#[derive(Default)]
pub struct Thread {
    /// What it waits in; otherwise it runs.
    pub waits: Option<String>,
    pub epoll: Option<i64>,
    pub batch: Vec<Ready>,
    /// The functions on the stack, and how many of them stay until the callback is done.
    pub stack: Vec<String>,
    pub base: usize,
    /// Where in the sources it is: an index and a line.
    pub at: Option<(usize, usize)>,
    pub tasks: BTreeMap<String, &'static str>,
}

/// The whole system.
#[derive(Default)]
pub struct Model {
    pub clients: BTreeMap<char, Client>,
    pub threads: BTreeMap<String, Thread>,
    pub fds: BTreeMap<i64, Kind>,
    pub tables: BTreeMap<i64, Vec<Row>>,
    /// Whether the server sends messages, and so does not echo bytes.
    pub has_messages: bool,
    /// Whether its tokens are slots and generations.
    pub has_slots: bool,
}

impl Client {
    fn state(&self) -> &'static str {
        match self {
            Self { connected: false, .. } => "not connected",
            Self { rst: true, .. } => "has reset it",
            Self { server_rst: true, .. } => "was reset",
            Self { closed: true, .. } => "has closed",
            Self { server_fin: true, held, .. } if held.is_empty() => match self.fin {
                true => "both have ended",
                false => "has got the FIN",
            },
            Self { fin: true, .. } => "has sent its FIN",
            Self { deaf: true, .. } => "reads nothing",
            _ => "connected",
        }
    }

    /// What is to be read from it.
    fn readable(&self, has_messages: bool) -> Vec<String> {
        let unread: Vec<u8> = self.unread.iter().copied().collect();
        let bytes =
            (!unread.is_empty()).then(|| format!("to read: {}", shown(&unread, has_messages)));
        let fin = self.fin.then(|| "FIN".to_owned());
        let rst = self.error.then(|| "RST".to_owned());
        [bytes, fin, rst].into_iter().flatten().collect()
    }
}

impl Thread {
    /// The event that it works at is done, and the next one is in this state, if there is to be one.
    pub fn next_of_batch(&mut self, state: Option<&'static str>) {
        for event in self.batch.iter_mut().filter(|event| event.state == "now") {
            event.state = "done";
        }
        let next = self.batch.iter_mut().find(|event| event.state == "next");
        if let (Some(state), Some(event)) = (state, next) {
            event.state = state;
        }
    }

    /// It works at this fd: if nothing else tells, that shows which event of the batch it handles.
    pub fn works_at(&mut self, fd: i64) {
        if let Some(at) = self.batch.iter().position(|it| it.fd == fd && it.state == "next") {
            self.next_of_batch(None);
            self.batch[at].state = "now";
        }
    }

    fn value(&self, model: &Model) -> Value {
        let mut value = json!({ "doing": self.waits.as_deref().unwrap_or("runs") });
        if let Some(rows) = self.epoll.and_then(|epoll| model.tables.get(&epoll)) {
            let rows = rows.iter().map(|row| {
                let is_bell = matches!(model.fds.get(&row.fd), Some(Kind::Bell { .. }));
                let who = if is_bell { "its bell".to_owned() } else { model.who(row.fd) };
                let mut value = json!({ "fd": row.fd, "who": who, "for": row.flags });
                if model.has_slots {
                    value["slot"] = (row.data & 0xffff_ffff).into();
                    value["generation"] = (row.data >> 32).into();
                }
                value
            });
            value["table"] = rows.collect();
        }
        if self.epoll.is_some() {
            let batch = self.batch.iter();
            let batch = batch.map(
                |it| json!({ "fd": it.fd, "who": it.who, "flags": it.flags, "state": it.state }),
            );
            value["batch"] = batch.collect();
        }
        value["stack"] = self.stack.clone().into();
        if !self.tasks.is_empty() {
            let tasks = self.tasks.iter();
            value["tasks"] =
                tasks.map(|(task, state)| json!({ "task": task, "state": state })).collect();
        }
        value
    }
}

impl Model {
    pub fn client(&mut self, name: char) -> &mut Client {
        self.clients.entry(name).or_default()
    }

    pub fn thread(&mut self, name: &str) -> &mut Thread {
        self.threads.entry(name.to_owned()).or_default()
    }

    /// The fd that an epoll instance returns `data` for; -1 if there is none.
    pub fn fd_of(&self, epoll: i64, data: u64) -> i64 {
        let row = self.tables.get(&epoll).and_then(|rows| rows.iter().find(|row| row.data == data));
        row.map_or(-1, |row| row.fd)
    }

    pub fn who(&self, fd: i64) -> String {
        match self.fds.get(&fd) {
            Some(Kind::Listener) => "the listener".to_owned(),
            Some(Kind::Conn(name)) => name.to_string(),
            Some(Kind::Bell { .. }) => match self.owner(fd) {
                Some(_) if self.threads.len() == 1 => "the bell".to_owned(),
                Some(thread) => format!("a bell of {thread}"),
                None => "an eventfd".to_owned(),
            },
            Some(Kind::Signals) => "signals".to_owned(),
            Some(Kind::Datagrams) => "UDP".to_owned(),
            Some(Kind::Epoll) => "an epoll instance".to_owned(),
            None => "other".to_owned(),
        }
    }

    /// The thread whose loop watches `fd`.
    pub fn owner(&self, fd: i64) -> Option<&str> {
        let watches = |rows: &Vec<Row>| rows.iter().any(|row| row.fd == fd);
        let (epoll, _) = self.tables.iter().find(|(_, rows)| watches(rows))?;
        let owner = self.threads.iter().find(|(_, thread)| thread.epoll == Some(*epoll));
        owner.map(|(name, _)| &**name)
    }

    /// The client whose input a thread works at.
    pub fn reading(&self, thread: &str) -> Option<char> {
        let now = self.threads.get(thread)?.batch.iter().rev().find(|event| event.state != "next");
        match now.and_then(|event| self.fds.get(&event.fd)) {
            Some(Kind::Conn(name)) => Some(*name),
            _ => self.clients.iter().find(|(_, it)| !it.input.is_empty()).map(|(name, _)| *name),
        }
    }

    /// The clients in the accept queue.
    pub fn queue(&self) -> impl Iterator<Item = (&char, &Client)> {
        self.clients.iter().filter(|(_, it)| it.connected && !it.accepted)
    }

    /// Whether epoll would return something at once.
    pub fn is_ready(&self, epoll: i64) -> bool {
        let is_ready = |row: &Row| match self.fds.get(&row.fd) {
            Some(Kind::Conn(name)) => self.clients.get(name).is_some_and(|client| {
                let readable = client.fin || !client.unread.is_empty();
                let (reads, writes) = (row.flags.contains("IN"), row.flags.contains("OUT"));
                client.error || reads && readable || writes && !client.full
            }),
            Some(Kind::Listener) => row.flags.contains("IN") && self.queue().next().is_some(),
            Some(Kind::Bell { rings }) => *rings > 0,
            _ => false,
        };
        self.tables.get(&epoll).is_some_and(|rows| rows.iter().any(is_ready))
    }

    /// What the kernel has for an fd.
    fn kernel(&self, fd: i64, kind: &Kind) -> Vec<String> {
        let row = self.tables.values().flatten().find(|row| row.fd == fd);
        match kind {
            // A duplicate that no loop watches.
            Kind::Listener if row.is_none() && !self.tables.is_empty() => Vec::new(),
            Kind::Listener => {
                let queue = self.queue().map(|(name, client)| match client.unread.len() {
                    0 => format!("{name} in the accept queue"),
                    n => format!("{name} in the accept queue, with {}", count(n)),
                });
                queue.collect()
            }
            Kind::Conn(name) => {
                let Some(client) = self.clients.get(name) else { return Vec::new() };
                let mut what = client.readable(self.has_messages);
                if !client.held.is_empty() {
                    let room = if client.full { "no room" } else { "and room" };
                    what.push(format!(
                        "{} that {name} has not read, {room}",
                        count(client.held.len())
                    ));
                } else if !client.full && row.is_some_and(|row| row.flags.contains("OUT")) {
                    what.push("room to write".to_owned());
                }
                what
            }
            Kind::Bell { rings } if *rings > 0 => vec!["rung".to_owned()],
            _ => Vec::new(),
        }
    }

    /// All of it, as a page has it.
    pub fn snapshot(&self) -> Map<String, Value> {
        let show = |bytes: &[u8]| shown(bytes, self.has_messages);
        let mut state = Map::new();
        let clients = self.clients.iter().map(|(name, client)| {
            let (sent, got) = (show(&client.sent), show(&client.got));
            (name, json!({ "state": client.state(), "sent": sent, "got": got }))
        });
        if self.clients.len() > MOST_LANES {
            let rows = clients.map(|(name, mut value)| {
                value["who"] = name.to_string().into();
                value
            });
            state.insert("clients".to_owned(), rows.collect());
        } else {
            state.extend(clients.map(|(name, value)| (format!("client {name}"), value)));
        }
        let kernel = self.fds.iter().map(|(fd, kind)| (fd, self.kernel(*fd, kind)));
        let kernel = kernel.filter(|(_, what)| !what.is_empty());
        let kernel =
            kernel.map(|(fd, what)| json!({ "fd": fd, "who": self.who(*fd), "what": what }));
        // What is closed may still hold bytes.
        let is_open = |name| self.fds.values().any(|kind| *kind == Kind::Conn(name));
        let closed =
            self.clients.iter().filter(|(name, it)| !it.held.is_empty() && !is_open(**name));
        let closed = closed.map(|(name, client)| {
            let what = [format!("{}, then a FIN", count(client.held.len()))];
            json!({ "fd": "–", "who": name.to_string(), "what": what })
        });
        let kernel = kernel.chain(closed);
        state.insert("kernel".to_owned(), kernel.collect());
        for (name, thread) in &self.threads {
            state.insert(format!("thread {name}"), thread.value(self));
        }
        let buffers = self.clients.iter().filter(|(_, it)| it.accepted).map(|(name, client)| {
            let (input, output) = (show(&client.input), show(&client.output));
            let mut value = json!({ "who": name.to_string(), "in": input, "out": output });
            if client.output.len() > HIGH_WATER {
                value["note"] = "above the high-water mark: it reads nothing more".into();
            }
            value
        });
        state.insert("buffers".to_owned(), buffers.collect());
        state
    }
}

/// What is not as before; of a thread or a client only those parts.
pub fn changes(before: &Map<String, Value>, after: &Map<String, Value>) -> Map<String, Value> {
    let changed = after.iter().filter(|(key, value)| before.get(*key) != Some(value));
    let changed = changed.map(|(key, value)| match (before.get(key), value) {
        (Some(Value::Object(before)), Value::Object(after)) => {
            (key.clone(), changes(before, after).into())
        }
        _ => (key.clone(), value.clone()),
    });
    changed.collect()
}

/// `1 byte`, `65,536 bytes`.
pub fn count(n: usize) -> String {
    format!("{} byte{}", thousands(n as f64), if n == 1 { "" } else { "s" })
}

/// Bytes as a page shows them: as messages if they are some, shortened if they are many.
pub fn shown(bytes: &[u8], as_messages: bool) -> String {
    const MOST: usize = 40;
    if bytes.is_empty() {
        return String::new();
    }
    let text = |bytes: &[u8]| -> String {
        let escaped = bytes.iter().take(MOST).flat_map(|byte| std::ascii::escape_default(*byte));
        // In a sentence, backquotes are for code.
        escaped.map(char::from).collect::<String>().replace('`', "\\x60")
    };
    let mut rest = bytes;
    let mut messages = Vec::new();
    while let (true, Ok(Some(message))) =
        (as_messages && messages.len() <= 3, message::decode(rest))
    {
        messages.push(match message.payload.len() {
            n if n > MOST => format!("id {}, {}", message.id, count(n)),
            _ => format!("id {} \"{}\"", message.id, text(message.payload)),
        });
        rest = &rest[message.frame_len()..];
    }
    if rest.is_empty() && messages.len() <= 3 {
        messages.join(", ")
    } else if bytes.len() > MOST {
        count(bytes.len())
    } else {
        format!("\"{}\"", text(bytes))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_shown_as_text_or_as_messages() {
        let message = [&message::encode_header(1, 2).unwrap()[..], b"hi"].concat();
        assert_eq!(shown(&message, true), "id 1 \"hi\"");
        assert_eq!(shown(&message[..9], false), r#""\x01\x00\x00\x00\x02\x00\x00\x00h""#);
        assert_eq!(shown(&[b'x'; 65_536], true), "65,536 bytes");
        assert_eq!(
            (count(1), count(1_234_567)),
            ("1 byte".to_owned(), "1,234,567 bytes".to_owned())
        );
    }
}
