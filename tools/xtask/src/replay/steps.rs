//! Turns a recording into steps: what happens, and what each part of the system holds after it.
//!
//! The calls tell what the kernel and the server know, the log among them which callback runs and where. What a
//! client has sent and got follows from its acts, or if it is not ours, from what the server reads and writes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use common::message;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::record::Recording;
use super::script::{Act, Done, NO_CLIENT};
use super::strace::{self, Call};
use crate::sources::Logs;

/// One step of a run, as the page has it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Step {
    /// What happens, in a sentence.
    pub say: String,
    /// A client, a thread, or the kernel.
    pub actor: String,
    /// Where in the sources: an index and a line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<(usize, usize)>,
    /// How many acts so far.
    pub beat: usize,
    /// What it changes.
    pub set: Map<String, Value>,
}

/// What is behind an fd.
#[derive(Clone, Debug, PartialEq)]
enum Kind {
    Listener,
    Conn(char),
    Bell { rings: u64 },
    Signals,
    Datagrams,
    Epoll,
}

/// A row of an epoll instance's table.
struct Row {
    fd: i64,
    flags: String,
    data: u64,
}

/// An event of a batch.
struct Ready {
    fd: i64,
    who: String,
    flags: String,
    state: &'static str,
}

#[derive(Default)]
struct Client {
    port: u16,
    state: String,
    sent: Vec<u8>,
    got: Vec<u8>,
    /// Sent, and not read by the server yet.
    unread: VecDeque<u8>,
    fin: bool,
    rst: bool,
    accepted: bool,
    /// Whether it reads; if not, what the kernel holds for it.
    deaf: bool,
    held: Vec<u8>,
    /// Whether the server's last write found no room for all of it.
    full: bool,
    input: Vec<u8>,
    output: Vec<u8>,
}

#[derive(Default)]
struct Thread {
    waits: Option<String>,
    epoll: Option<i64>,
    batch: Vec<Ready>,
    /// The functions on the stack, and how many of them stay until the callback is done.
    stack: Vec<String>,
    base: usize,
    at: Option<(usize, usize)>,
    tasks: BTreeMap<String, &'static str>,
    callback: Option<String>,
}

/// Something that happened on a thread: a call begins, or has returned.
struct Event<'a> {
    call: &'a Call,
    begins: bool,
    /// The line of the log that describes the call, or is the call.
    log: Option<(String, String)>,
}

impl Event<'_> {
    fn time(&self) -> f64 {
        if self.begins { self.call.start } else { self.call.end }
    }
}

/// The whole system.
struct Model<'a> {
    logs: &'a mut Logs,
    clients: BTreeMap<char, Client>,
    threads: BTreeMap<String, Thread>,
    fds: BTreeMap<i64, Kind>,
    tables: BTreeMap<i64, Vec<Row>>,
    /// Whether the server sends messages, and so does not echo bytes.
    has_messages: bool,
    /// Whether the clients are not ours, and threads run in the order in which they really did.
    in_order: bool,
    last: Map<String, Value>,
    steps: Vec<Step>,
    beat: usize,
    /// The server's log, in the order of the steps.
    log: String,
}

/// What became of a recording.
pub struct Outcome {
    /// The state before the first act.
    pub start: Map<String, Value>,
    /// What came after it.
    pub steps: Vec<Step>,
    /// The server's log, in the same order.
    pub log: String,
}

/// Retells a recording, step by step.
pub fn steps(recording: &Recording, logs: &mut Logs) -> Outcome {
    let acts = &recording.acts;
    let mut model = Model::new(logs, recording);
    let mut beats: Vec<BTreeMap<String, VecDeque<Event>>> = Vec::new();
    beats.resize_with(acts.len() + 1, BTreeMap::new);
    let beat_at = |time: f64| acts.iter().filter(|act| act.time < time).count();
    for event in events(&recording.calls, acts) {
        let queues = &mut beats[beat_at(event.time())];
        queues.entry(event.call.thread.clone()).or_default().push_back(event);
    }
    let mut start = Map::new();
    for (beat, queues) in beats.into_iter().enumerate() {
        model.beat = beat;
        if beat > 0 {
            model.act(&acts[beat - 1]);
        }
        model.run(queues);
        if beat == 0 {
            // How it has come to wait there is not shown.
            for thread in model.threads.values_mut().filter(|thread| thread.epoll.is_none()) {
                (thread.at, thread.base) = (None, 0);
                thread.stack.clear();
            }
            start = model.snapshot();
            model.last.clone_from(&start);
            model.steps.clear();
        }
    }
    Outcome { start, steps: without_repetitions(model.steps), log: model.log }
}

/// The calls as events, each with the line of the log that describes it.
fn events<'a>(calls: &'a [Call], acts: &[Done]) -> Vec<Event<'a>> {
    let mut events: Vec<Event> = Vec::new();
    let mut last_of: BTreeMap<&str, usize> = BTreeMap::new();
    let mut order: Vec<(f64, bool, usize)> = Vec::new();
    for (n, call) in calls.iter().enumerate() {
        let blocks = acts.iter().any(|act| call.start < act.time && act.time < call.end);
        let is_wait = call.name.starts_with("epoll_") && call.name.contains("wait");
        if is_wait || call.is_poll() || blocks && call.log_line().is_none() {
            order.push((call.start, true, n));
        }
        if call.result.is_some() {
            order.push((call.end, false, n));
        }
    }
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    for (_, begins, n) in order {
        let call = &calls[n];
        let log = if begins { None } else { call.log_line() };
        if let (Some((level, line)), Some(&last)) = (&log, last_of.get(&*call.thread))
            && describes(line, &events[last])
        {
            events[last].log = Some((level.clone(), line.clone()));
            continue;
        }
        last_of.insert(&call.thread, events.len());
        events.push(Event { call, begins, log });
    }
    events
}

/// Whether a line of the log is about the event before it, rather than one of its own.
fn describes(line: &str, event: &Event) -> bool {
    let name = event.call.name.as_str();
    !event.begins
        && event.log.is_none()
        && match line.split([':', ' ']).next().unwrap_or_default() {
            "epoll_wait" | "epoll_ctl" => {
                name.starts_with(line.split(':').next().unwrap_or_default())
            }
            "read" => matches!(name, "recvfrom" | "read"),
            "write" => matches!(name, "sendto" | "write"),
            "cannot" => name.starts_with("accept"),
            _ => name.starts_with("accept") && line.contains(": connected"),
        }
}

/// Leaves out what is like what comes before and after it: first acts with what follows from them, then rounds of
/// the loop.
fn without_repetitions(steps: Vec<Step>) -> Vec<Step> {
    let is_act = |step: &Step| step.actor.len() == 1 || step.actor == "kernel";
    let steps = without_parts(steps, is_act);
    without_parts(steps, |step| is_act(step) || step.say.contains("`epoll_wait` returns"))
}

fn without_parts(steps: Vec<Step>, begins: impl Fn(&Step) -> bool) -> Vec<Step> {
    let mut parts: Vec<Vec<Step>> = vec![Vec::new()];
    for step in steps {
        if begins(&step) {
            parts.push(Vec::new());
        }
        parts.last_mut().into_iter().for_each(|part| part.push(step.clone()));
    }
    // Numbers of bytes may differ.
    let say = |step: &Step| step.say.replace(|c: char| c.is_ascii_digit() || c == ',', "");
    let says: Vec<Vec<String>> = parts.iter().map(|part| part.iter().map(say).collect()).collect();
    let mut kept: Vec<Step> = Vec::new();
    let mut skipped = false;
    for (n, mut part) in parts.into_iter().enumerate() {
        // How often a timer is due that changes nothing is a matter of time.
        let is_timer = part.first().is_some_and(|step| step.say.ends_with("without an event."));
        if is_timer && says[..n].contains(&says[n]) {
            continue;
        }
        if n > 0 && says[n - 1] == says[n] && says.get(n + 1) == Some(&says[n]) {
            skipped = true;
            continue;
        }
        if std::mem::take(&mut skipped) {
            part[0].say = format!("This goes on for a while, until: {}", part[0].say);
        }
        kept.extend(part);
    }
    kept
}

impl<'a> Model<'a> {
    fn new(logs: &'a mut Logs, recording: &Recording) -> Self {
        let lines: Vec<(String, String)> =
            recording.calls.iter().filter_map(Call::log_line).collect();
        let mut threads = BTreeMap::from([("main".to_owned(), Thread::default())]);
        let accepts = recording.calls.iter().filter(|call| call.name.starts_with("accept"));
        let accepted: BTreeSet<i64> = accepts.filter_map(Call::number).collect();
        let serves = |call: &&Call| {
            is_wait(call) || call.name.starts_with("accept") || accepted.contains(&call.fd())
        };
        for call in recording.calls.iter().filter(serves) {
            threads.insert(call.thread.clone(), Thread::default());
        }
        let state = || "not connected".to_owned();
        let client = |name: &char| (*name, Client { state: state(), ..Client::default() });
        Self {
            logs,
            clients: recording.clients.iter().map(client).collect(),
            threads,
            fds: BTreeMap::new(),
            tables: BTreeMap::new(),
            has_messages: lines.iter().any(|(_, line)| line.starts_with("message: ")),
            in_order: recording.is_derived,
            last: Map::new(),
            steps: Vec::new(),
            beat: 0,
            log: String::new(),
        }
    }

    /// Runs the threads of one beat, each until it waits for something that has not happened yet. The order in
    /// which they really ran is a matter of chance, and would differ each time that a script is recorded.
    fn run(&mut self, mut queues: BTreeMap<String, VecDeque<Event>>) {
        while self.in_order {
            let next = queues.values_mut().filter(|queue| !queue.is_empty()).min_by(|a, b| {
                let can_be = self.can_be(&b[0]).cmp(&self.can_be(&a[0]));
                can_be.then(a[0].time().total_cmp(&b[0].time()))
            });
            let Some(event) = next.and_then(VecDeque::pop_front) else { return };
            self.event(&event);
        }
        while queues.values().any(|queue| !queue.is_empty()) {
            let mut stuck = true;
            for queue in queues.values_mut() {
                while queue.front().is_some_and(|event| self.can_be(event)) {
                    stuck = false;
                    queue.pop_front().into_iter().for_each(|event| self.event(&event));
                }
            }
            if stuck {
                let next = queues.values_mut().filter(|queue| !queue.is_empty());
                let next = next.min_by(|a, b| a[0].call.end.total_cmp(&b[0].call.end));
                let event = next.and_then(VecDeque::pop_front);
                event.into_iter().for_each(|event| self.event(&event));
            }
        }
    }

    /// Whether what a wait reports is true by now.
    fn can_be(&self, event: &Event) -> bool {
        let call = event.call;
        if event.begins || !is_wait(call) {
            return true;
        }
        let fds = call.events().into_iter().filter_map(|(_, data)| self.fd_of(call.fd(), data));
        let rings = |fd| match self.fds.get(&fd) {
            Some(Kind::Bell { rings }) => *rings > 0,
            _ => true,
        };
        fds.into_iter().all(rings)
    }

    fn fd_of(&self, epoll: i64, data: u64) -> Option<i64> {
        let row = self.tables.get(&epoll)?.iter().find(|row| row.data == data)?;
        Some(row.fd)
    }

    fn push(&mut self, actor: &str, say: String) {
        let state = self.snapshot();
        let set = changes(&self.last, &state);
        let at = self.threads.get(actor).and_then(|thread| thread.at);
        self.steps.push(Step { say, actor: actor.to_owned(), at, beat: self.beat, set });
        self.last = state;
    }

    fn act(&mut self, done: &Done) {
        let name = done.client;
        let (messages, client) = (self.has_messages, self.clients.entry(name).or_default());
        let place = if client.accepted {
            "It waits in the kernel until the server reads it."
        } else {
            "The kernel keeps it, although the server has not accepted the connection yet."
        };
        let mut actor = name.to_string();
        // It has read all that there was, and now reads what comes.
        if client.deaf && client.state.ends_with("reads now and then") && done.act != Act::ReadsOn {
            client.deaf = false;
            client.state = client.state.replace(", reads now and then", "");
        }
        let say = match &done.act {
            Act::Connects | Act::ConnectsSmall => {
                // With many clients, names come again.
                *client =
                    Client { port: done.port, state: "connected".to_owned(), ..Client::default() };
                format!(
                    "{name} connects. The kernel completes the handshake by itself, and puts the connection into \
                     the accept queue."
                )
            }
            Act::Sends(bytes) => {
                client.sent.extend(bytes);
                client.unread.extend(bytes);
                format!("{name} sends {}. {place}", shown(bytes, messages))
            }
            Act::ShutsDown if self.in_order => {
                client.fin = true;
                client.state = "has sent its FIN".to_owned();
                format!(
                    "{name} sends a FIN: it has shut down its side, or closed. The server cannot tell which."
                )
            }
            Act::ShutsDown => {
                client.fin = true;
                let reads = if client.deaf { "reads nothing" } else { "still reads" };
                client.state = format!("has sent its FIN, and {reads}");
                format!("{name} shuts down its side: the kernel sends a FIN. It can still receive.")
            }
            Act::Closes => {
                let fin = if client.fin { "." } else { ": the kernel sends a FIN." };
                client.fin = true;
                client.state = "has closed".to_owned();
                format!("{name} closes its connection{fin}")
            }
            Act::Resets => {
                (client.rst, client.fin) = (true, false);
                client.unread.clear();
                client.state = "has reset the connection".to_owned();
                format!(
                    "{name} resets its connection: an RST. What the server has not read is lost."
                )
            }
            Act::StopsReading => {
                client.deaf = true;
                client.state = "connected, reads nothing".to_owned();
                format!(
                    "From now on {name} reads nothing. What the server writes stays in the kernel."
                )
            }
            Act::ReadsOn => {
                client.full = false;
                let n = client.held.len();
                client.got.append(&mut client.held);
                client.state = client.state.replace("reads nothing", "reads now and then");
                format!(
                    "{name} reads {}, all that the kernel has for it. There is room again.",
                    count(n)
                )
            }
            Act::ServerStops => {
                "kernel".clone_into(&mut actor);
                "The server is held up for a moment, with SIGSTOP, so that more can happen before its next step."
                    .to_owned()
            }
            Act::ServerContinues => {
                "kernel".clone_into(&mut actor);
                "The server goes on.".to_owned()
            }
            Act::TimePasses => {
                "kernel".clone_into(&mut actor);
                "A quarter of a second passes.".to_owned()
            }
        };
        self.clients.remove(&NO_CLIENT);
        self.push(&actor, say);
    }

    fn event(&mut self, event: &Event) {
        if !self.threads.contains_key(&event.call.thread) {
            // A thread without clients, which writes the log or standard output.
            return;
        }
        if let Some((level, line)) = &event.log {
            self.log += &format!("{level} {line}\n");
        }
        let say = if event.begins {
            self.begins(event.call)
        } else if let Some((level, line)) =
            event.log.as_ref().filter(|_| event.call.log_line().is_some())
        {
            self.log(&event.call.thread, level, line)
        } else {
            let say = self.returns(event.call, event.log.as_ref().map_or("", |log| &log.1));
            match (&say, &event.log) {
                (Some(_), Some((level, line))) => self.is_in(&event.call.thread, level, line),
                // It is where it was, or in another function: the log does not tell.
                (Some(_), None) if !is_wait(event.call) => {
                    let thread = self.thread(&event.call.thread);
                    thread.stack.truncate(thread.base);
                    thread.at = None;
                }
                _ => {}
            }
            say
        };
        if let Some(say) = say {
            self.push(&event.call.thread, say);
        }
    }

    fn thread(&mut self, name: &str) -> &mut Thread {
        self.threads.entry(name.to_owned()).or_default()
    }

    /// The thread is at the line that logs `line`.
    fn is_in(&mut self, thread: &str, level: &str, line: &str) {
        let found = self.logs.find(&format!("{level} {line}"));
        let Some((at, function)) = found else { return };
        let thread = self.thread(thread);
        thread.at = Some(at);
        thread.stack.truncate(thread.base);
        if thread.stack.last() != Some(&function) {
            thread.stack.push(function);
        }
    }

    /// The stack is what it is now, until the callback is done.
    fn stays(&mut self, thread: &str) {
        let thread = self.thread(thread);
        thread.base = thread.stack.len();
    }

    fn begins(&mut self, call: &Call) -> Option<String> {
        let thread = &call.thread;
        let is_first = self.thread(thread).waits.is_none();
        if call.is_poll() {
            self.thread(thread).waits = Some(format!("waits in {}", call.name));
            return Some(format!("It waits in `{}` until one of its fds is ready.", call.name));
        }
        if !is_wait(call) {
            // A non-blocking one that something happens beside.
            if self.tables.values().flatten().any(|row| row.fd == call.fd()) {
                return None;
            }
            let what = match self.fds.get(&call.fd()) {
                Some(Kind::Listener) => "until a client connects".to_owned(),
                Some(Kind::Conn(name)) => format!("until {name} sends something"),
                _ => return None,
            };
            // It is in the function that logs what comes of it.
            let (name, level, line) = match call.name.starts_with("accept") {
                true => ("accept", "DEBUG", "it: connected"),
                false => ("read", "TRACE", "read: 0 bytes from fd 0 into it"),
            };
            self.thread(thread).waits = Some(format!("waits in {name}"));
            self.is_in(thread, level, line);
            return Some(format!("It calls `{name}`, and waits {what}. It can do nothing else."));
        }
        self.fds.insert(call.fd(), Kind::Epoll);
        let state = self.thread(thread);
        for task in state.tasks.values_mut().filter(|task| **task == "polled") {
            *task = "pending";
        }
        state.epoll = Some(call.fd());
        state.waits = Some("waits in epoll_wait".to_owned());
        state.batch.clear();
        state.callback = None;
        (state.base, state.at) = (0, None);
        state.stack.clear();
        self.is_in(thread, "TRACE", "epoll_wait: 1 ready");
        if !is_first {
            return None;
        }
        let table = self.tables.get(&call.fd());
        let ready = table.is_some_and(|rows| rows.iter().any(|row| !self.ready(row).is_empty()));
        // It is the second after the events, or after their address; epoll_pwait has more.
        let after = match call.args.rsplit_once("}], ") {
            Some((_, after)) => Some(after),
            None => call.args.splitn(3, ", ").nth(2),
        };
        let timeout = after.and_then(|it| it.split(", ").nth(1)).filter(|_| call.result.is_some());
        let timeout = timeout.unwrap_or("-1");
        let has_task = self.thread(thread).tasks.values().any(|task| *task == "woken");
        let say = match timeout {
            _ if ready => "It asks with `epoll_wait` what is ready. Something is.",
            "0" if has_task => {
                "It asks with `epoll_wait` what is ready, and does not wait: a task is to be polled."
            }
            "-1" | "NULL" => {
                "Nothing is ready, so it waits in `epoll_wait`. That takes no processor time."
            }
            _ => "Nothing is ready. It waits in `epoll_wait`, until a timer is due.",
        };
        Some(say.to_owned())
    }

    fn returns(&mut self, call: &Call, log: &str) -> Option<String> {
        let (thread, fd) = (call.thread.clone(), call.fd());
        let kind = self.fds.get(&fd).cloned();
        if let Some((fd, kind)) = opens(call, kind.as_ref()) {
            self.fds.insert(fd, kind);
            return None;
        }
        match call.name.as_str() {
            "epoll_ctl" => return self.controls(call),
            "accept" | "accept4" => {
                self.runs(&thread);
                return self.accepts(call);
            }
            name if is_wait(call) => return self.wakes(call, name),
            name if call.is_poll() => {
                self.runs(&thread);
                let n = call.number()?;
                return Some(format!(
                    "`{name}` returns: {n} fd{} ready.",
                    if n == 1 { " is" } else { "s are" }
                ));
            }
            "shutdown" => {
                let Some(Kind::Conn(name)) = kind else { return None };
                self.client_sees_the_end(name);
                return Some(format!(
                    "It shuts down its side of {name}'s connection: a FIN, after all bytes."
                ));
            }
            "close" => {
                let kind = self.fds.remove(&fd)?;
                self.tables.remove(&fd);
                self.tables.values_mut().for_each(|rows| rows.retain(|row| row.fd != fd));
                let Kind::Conn(name) = kind else { return None };
                self.client_sees_the_end(name);
                let client = self.clients.entry(name).or_default();
                client.input.clear();
                client.output.clear();
                return Some(format!(
                    "It closes fd {fd}. The number is free for the next connection."
                ));
            }
            "read" | "recvfrom" | "readv" | "recvmsg" => {
                self.runs(&thread);
                return self.reads(call, kind?, log);
            }
            "write" | "sendto" | "writev" | "sendmsg" => {
                self.runs(&thread);
                return self.writes(call, kind?);
            }
            _ => {}
        }
        None
    }

    fn runs(&mut self, thread: &str) {
        self.thread(thread).waits = None;
    }

    fn client_sees_the_end(&mut self, name: char) {
        let client = self.clients.entry(name).or_default();
        if !client.state.contains("closed")
            && !client.state.contains("reset")
            && !client.state.contains("FIN")
            || client.fin
        {
            client.state =
                if client.fin { "both sides have ended" } else { "has got the server's FIN" }
                    .to_owned();
        }
    }

    fn controls(&mut self, call: &Call) -> Option<String> {
        let (epoll, fd) = (call.fd(), call.arg(2).parse().ok()?);
        call.number()?;
        let who = self.who(fd);
        let rows = self.tables.entry(epoll).or_default();
        let event = call.events().into_iter().next();
        if call.arg(1) == "EPOLL_CTL_DEL" {
            rows.retain(|row| row.fd != fd);
            return Some(format!(
                "`epoll_ctl` takes fd {fd} ({who}) out of the table of interest."
            ));
        }
        let (flags, data) = event?;
        let flags = if flags == "0" { "nothing".to_owned() } else { flags };
        if let Some(row) = rows.iter_mut().find(|row| row.fd == fd) {
            let before = std::mem::replace(&mut row.flags, flags.clone());
            row.data = data;
            if let Some(Kind::Conn(name)) = self.fds.get(&fd)
                && !self.has_messages
                && flags.contains("OUT")
            {
                // An echo: what was read is to be written.
                let client = self.clients.entry(*name).or_default();
                client.output.append(&mut client.input);
            }
            return Some(format!(
                "`epoll_ctl` changes what fd {fd} ({who}) is watched for: {before} becomes {flags}."
            ));
        }
        rows.push(Row { fd, flags: flags.clone(), data });
        let token = if self.logs.is_empty() {
            String::new()
        } else {
            format!(", in slot {}, generation {}", data & 0xffff_ffff, data >> 32)
        };
        Some(format!(
            "`epoll_ctl` puts fd {fd} ({who}) into the table of interest: {flags}{token}."
        ))
    }

    fn accepts(&mut self, call: &Call) -> Option<String> {
        if let Some(error) = call.error() {
            return Some(if error == "EAGAIN" {
                "`accept`: EAGAIN. The accept queue is empty, and a non-blocking socket does not wait.".to_owned()
            } else {
                let free = if error == "EMFILE" { ", because no fd is free" } else { "" };
                let queue = match self.ready_listener().first() {
                    Some(first) => format!(" {} stays in the accept queue.", &first[..1]),
                    None => String::new(),
                };
                format!("`accept` fails: {error}{free}.{queue}")
            });
        }
        let fd = call.number()?;
        // Without an address it is the one that has waited longest.
        let is_it = |client: &Client| match call.port() {
            Some(port) => client.port == port,
            None => !client.accepted && client.state != "not connected",
        };
        let (name, client) = self.clients.iter_mut().find(|(_, client)| is_it(client))?;
        client.accepted = true;
        self.fds.insert(fd, Kind::Conn(*name));
        Some(format!("`accept` takes {name}'s connection out of the accept queue: fd {fd}."))
    }

    fn wakes(&mut self, call: &Call, _name: &str) -> Option<String> {
        if call.error().is_some() {
            return None;
        }
        let events = call.events();
        let batch = events.iter().map(|(flags, data)| {
            let fd = self.fd_of(call.fd(), *data).unwrap_or(-1);
            Ready { fd, who: self.who(fd), flags: flags.clone(), state: "next" }
        });
        let batch: Vec<_> = batch.collect();
        let list = batch.iter().map(|it| format!("fd {} ({}) {}", it.fd, it.who, it.flags));
        let list = list.collect::<Vec<_>>().join(", ");
        let thread = self.thread(&call.thread);
        thread.waits = None;
        thread.batch = batch;
        Some(match events.len() {
            0 => "`epoll_wait` returns without an event.".to_owned(),
            1 => format!("`epoll_wait` returns one event: {list}."),
            n => format!("`epoll_wait` returns a batch of {n} events: {list}."),
        })
    }

    fn reads(&mut self, call: &Call, kind: Kind, log: &str) -> Option<String> {
        let bytes = call.data();
        match kind {
            Kind::Bell { .. } => {
                self.fds.insert(call.fd(), Kind::Bell { rings: 0 });
                Some(format!("It reads the eventfd {}, which silences it.", call.fd()))
            }
            Kind::Conn(name) => {
                let messages = self.has_messages;
                let client = self.clients.entry(name).or_default();
                if let Some(error) = call.error() {
                    client.rst &= error == "EAGAIN";
                    return Some(match error {
                        "EAGAIN" => {
                            format!("`read` from {name}: EAGAIN. There is nothing more now.")
                        }
                        error => format!("`read` from {name} fails: {error}."),
                    });
                }
                let n = usize::try_from(call.number()?).unwrap_or_default();
                client.unread.drain(..n.min(client.unread.len()));
                if log.ends_with("discarded") {
                    return Some(match n {
                        0 if !client.output.is_empty() => {
                            format!(
                                "`read`: 0 bytes. {name} has sent its FIN, and is still owed output."
                            )
                        }
                        0 => format!(
                            "`read`: 0 bytes. {name} has ended its side too, so nothing can get lost."
                        ),
                        n => format!("`read`: {}, which no longer matters.", count(n)),
                    });
                }
                client.input.extend(&bytes[..n.min(bytes.len())]);
                Some(match n {
                    0 => {
                        format!("`read`: 0 bytes. {name} has sent its FIN, so nothing will follow.")
                    }
                    _ => format!("`read` takes {} out of the kernel.", shown(&bytes, messages)),
                })
            }
            _ => None,
        }
    }

    fn writes(&mut self, call: &Call, kind: Kind) -> Option<String> {
        let offered = call.data();
        let begin_alike = |buffer: &[u8]| {
            buffer.len() >= offered.len()
                && buffer.starts_with(&offered[..offered.len().min(strace::MOST)])
        };
        match kind {
            Kind::Bell { rings } => {
                self.fds.insert(call.fd(), Kind::Bell { rings: rings + 1 });
                let whose = self.owner(call.fd()).unwrap_or("its thread");
                Some(format!(
                    "It rings the bell: it writes to the eventfd {}, which wakes {whose}.",
                    call.fd()
                ))
            }
            Kind::Conn(name) => {
                let messages = self.has_messages;
                let client = self.clients.entry(name).or_default();
                let n = match call.number() {
                    Some(n) => usize::try_from(n).unwrap_or_default(),
                    None => {
                        let error = call.error()?;
                        client.full = error == "EAGAIN";
                        return Some(match error {
                            "EAGAIN" => format!(
                                "`write` to {name}: EAGAIN. There is no room in the kernel."
                            ),
                            error => format!("`write` to {name} fails: {error}."),
                        });
                    }
                };
                let n = n.min(offered.len());
                if begin_alike(&client.input) {
                    client.input.drain(..offered.len());
                }
                if begin_alike(&client.output) {
                    client.output.drain(..n);
                } else {
                    client.output = offered[n..].to_vec();
                }
                client.full = n < offered.len();
                if client.deaf {
                    client.held.extend(&offered[..n]);
                } else {
                    client.got.extend(&offered[..n]);
                }
                Some(if client.full {
                    format!(
                        "`write` to {name}: the kernel has room for {} of {}.",
                        digits(n),
                        count(offered.len())
                    )
                } else if client.deaf {
                    format!("`write` to {name}: the kernel takes {}, and keeps them.", count(n))
                } else {
                    format!("`write` sends {} to {name}.", shown(&offered[..n], messages))
                })
            }
            _ => None,
        }
    }

    /// A line of the log that is a step of its own.
    fn log(&mut self, thread: &str, level: &str, line: &str) -> Option<String> {
        if let Some(rest) = line.strip_prefix("fd ")
            && let Some((fd, flags)) = rest.split_once(" is ready: ")
        {
            let fd: i64 = fd.parse().ok()?;
            self.next_of_batch(thread, "now");
            self.thread(thread).base = 1;
            self.is_in(thread, level, line);
            self.stays(thread);
            return Some(format!(
                "It takes the next event of the batch: fd {fd} ({}), {flags}.",
                self.who(fd)
            ));
        }
        if line.starts_with("stale event") {
            self.next_of_batch(thread, "stale");
            self.thread(thread).base = 1;
            self.is_in(thread, level, line);
            return Some(
                "The next event of the batch is stale: its token's registration is gone. It is skipped, and \
                 does no harm."
                    .to_owned(),
            );
        }
        if line.starts_with("epoll_wait: ") || line.starts_with("epoll_ctl: ") {
            return None;
        }
        if let Some(callback) = line.strip_suffix("_callback") {
            let callback = format!("{callback}_callback");
            let depth = self.thread(thread).stack.len().min(2);
            self.thread(thread).base = depth;
            self.is_in(thread, level, line);
            self.stays(thread);
            self.thread(thread).callback = Some(callback.clone());
            return Some(format!("It calls the callback, `{callback}`."));
        }
        let (first, rest) = line.split_once(": ").unwrap_or((line, ""));
        let task = rest.strip_prefix("task ").map(|task| {
            let end = task.find(|c: char| !c.is_ascii_digit()).unwrap_or(task.len());
            task[..end].to_owned()
        });
        if let Some(task) = task {
            return self.task(thread, (level, line), first, &task);
        }
        self.is_in(thread, level, line);
        let peer =
            self.clients.iter().find(|(_, client)| first.ends_with(&format!(":{}", client.port)));
        let peer = peer.map(|(name, _)| *name);
        Some(match (first, peer, rest) {
            ("message", ..) => {
                let name = self.reading(thread)?;
                let client = self.clients.entry(name).or_default();
                let id: i32 = rest.strip_prefix("id ")?.split(',').next()?.parse().ok()?;
                let frame =
                    message::decode(&client.input).ok().flatten().map(|it| it.frame_len())?;
                let frame: Vec<u8> = client.input.drain(..frame).collect();
                if id == 1 {
                    client.output.extend(&frame);
                }
                let what = shown(&frame, true);
                format!(
                    "A whole message: {what}. Its callback {}.",
                    if id == 1 { "puts the reply into the output buffer" } else { "runs" }
                )
            }
            ("on_conn_start" | "on_conn_close", ..) => format!("The hook `{first}` runs."),
            (_, Some(name), what) if what.starts_with("handing over to ") => {
                let worker = what.trim_start_matches("handing over to ");
                format!("It puts {name}'s connection into the mailbox of {worker}.")
            }
            ("a timer is due", ..) => "A timer is due.".to_owned(),
            (_, Some(name), "closed")
                if !self.fds.values().any(|kind| *kind == Kind::Conn(name)) =>
            {
                format!("{name}'s connection is over.")
            }
            (_, Some(name), "closed") => {
                format!("{name}'s connection ends: the server closes it gracefully.")
            }
            (_, Some(name), what) => format!("{name}: {what}."),
            _ if level == "TRACE" || level == "DEBUG" => format!("It logs `{line}`."),
            _ => format!("It logs a line for the operator, {level}: `{line}`."),
        })
    }

    /// A line about a task of the executor.
    fn task(
        &mut self,
        thread: &str,
        (level, line): (&str, &str),
        what: &str,
        task: &str,
    ) -> Option<String> {
        let state = self.thread(thread);
        if what == "poll" {
            // The one before has not said that it is ready.
            state.tasks.values_mut().filter(|it| **it == "polled").for_each(|it| *it = "pending");
        }
        // Tasks are polled outside the loop, and most wakers are called there.
        let is_outside = !state.stack.iter().any(|it| it.starts_with("task "));
        if what == "poll" || is_outside {
            state.base = 0;
            self.next_of_batch(thread, "done");
        }
        self.is_in(thread, level, line);
        if what == "poll" {
            self.thread(thread).stack.push(format!("task {task}"));
            self.stays(thread);
        }
        let (state, say) = match what {
            "spawn" => ("woken", format!("It spawns task {task}: {}.", line.split(", ").nth(1)?)),
            "wake" => {
                ("woken", format!("The waker of task {task} is called: the task is to be polled."))
            }
            "poll" => ("polled", format!("It polls task {task}, which runs until it has to wait.")),
            "ready" => ("ready", format!("Task {task} returns Ready: it is done, and removed.")),
            _ => ("ready", format!("Task {task} is removed.")),
        };
        let tasks = &mut self.thread(thread).tasks;
        tasks.retain(|_, state| *state != "ready");
        tasks.insert(task.to_owned(), state);
        Some(say)
    }

    /// The event that a thread works at is done, and the next one is in this state.
    fn next_of_batch(&mut self, thread: &str, state: &'static str) {
        let batch = &mut self.thread(thread).batch;
        for event in batch.iter_mut().filter(|event| event.state == "now") {
            event.state = "done";
        }
        if state != "done"
            && let Some(event) = batch.iter_mut().find(|event| event.state == "next")
        {
            event.state = state;
        }
    }

    /// Whose input a thread works at.
    fn reading(&self, thread: &str) -> Option<char> {
        let now = self.threads.get(thread)?.batch.iter().rev().find(|event| event.state != "next");
        match now.and_then(|event| self.fds.get(&event.fd)) {
            Some(Kind::Conn(name)) => Some(*name),
            _ => self.clients.iter().find(|(_, it)| !it.input.is_empty()).map(|(name, _)| *name),
        }
    }

    fn who(&self, fd: i64) -> String {
        match self.fds.get(&fd) {
            Some(Kind::Listener) => "the listener".to_owned(),
            Some(Kind::Conn(name)) => name.to_string(),
            Some(Kind::Bell { .. }) => match self.owner(fd) {
                Some(_) if self.threads.len() == 1 => "the bell".to_owned(),
                Some(thread) => format!("the bell of {thread}"),
                None => "an eventfd".to_owned(),
            },
            Some(Kind::Signals) => "signals".to_owned(),
            Some(Kind::Datagrams) => "UDP".to_owned(),
            Some(Kind::Epoll) => "an epoll instance".to_owned(),
            None => "other".to_owned(),
        }
    }

    /// The thread whose loop watches `fd`.
    fn owner(&self, fd: i64) -> Option<&str> {
        let (epoll, _) =
            self.tables.iter().find(|(_, rows)| rows.iter().any(|row| row.fd == fd))?;
        let owner = self.threads.iter().find(|(_, thread)| thread.epoll == Some(*epoll));
        owner.map(|(name, _)| &**name)
    }

    /// What the kernel has ready for a row.
    fn ready(&self, row: &Row) -> Vec<String> {
        match self.fds.get(&row.fd) {
            Some(Kind::Conn(name)) => {
                let all = self.ready_conn(*name, row.flags.contains("OUT"));
                let is_for_it = |it: &String| {
                    if it.contains("room") {
                        it.starts_with("room")
                    } else {
                        row.flags.contains("IN") || it == "RST"
                    }
                };
                all.into_iter().filter(is_for_it).collect()
            }
            Some(Kind::Listener) if row.flags.contains("IN") => self.ready_listener(),
            Some(Kind::Bell { rings }) if *rings > 0 => vec!["rung".to_owned()],
            _ => Vec::new(),
        }
    }

    fn ready_listener(&self) -> Vec<String> {
        let waiting =
            self.clients.iter().filter(|(_, it)| !it.accepted && it.state != "not connected");
        let waiting = waiting.map(|(name, client)| match client.unread.len() {
            0 => format!("{name} in the accept queue"),
            n => format!("{name} in the accept queue, with {}", count(n)),
        });
        waiting.collect()
    }

    fn ready_conn(&self, name: char, wants_room: bool) -> Vec<String> {
        let Some(client) = self.clients.get(&name) else { return Vec::new() };
        let mut what = Vec::new();
        if !client.unread.is_empty() {
            let unread: Vec<u8> = client.unread.iter().copied().collect();
            what.push(format!("to read: {}", shown(&unread, self.has_messages)));
        }
        if client.fin {
            what.push("FIN".to_owned());
        }
        if client.rst {
            what.push("RST".to_owned());
        }
        if !client.held.is_empty() {
            what.push(format!(
                "{} that {name} has not read, {}room",
                count(client.held.len()),
                if client.full { "no " } else { "and " }
            ));
        }
        if wants_room && !client.full {
            what.push("room to write".to_owned());
        }
        what
    }

    fn snapshot(&self) -> Map<String, Value> {
        let mut state = Map::new();
        for (name, client) in &self.clients {
            let sent = shown(&client.sent, self.has_messages);
            let got = shown(&client.got, self.has_messages);
            let value = json!({ "state": client.state, "sent": sent, "got": got });
            state.insert(format!("client {name}"), value);
        }
        let kernel = self.fds.iter().filter_map(|(fd, kind)| {
            let row = self.tables.values().flatten().find(|row| row.fd == *fd);
            let what = match kind {
                // A duplicate that no loop watches.
                Kind::Listener if row.is_none() && !self.tables.is_empty() => Vec::new(),
                Kind::Listener => self.ready_listener(),
                Kind::Conn(name) => {
                    self.ready_conn(*name, row.is_some_and(|row| row.flags.contains("OUT")))
                }
                Kind::Bell { rings } if *rings > 0 => vec!["rung".to_owned()],
                _ => Vec::new(),
            };
            (!what.is_empty()).then(|| json!({ "fd": fd, "who": self.who(*fd), "what": what }))
        });
        state.insert("kernel".to_owned(), kernel.collect());
        for (name, thread) in &self.threads {
            state.insert(format!("thread {name}"), self.thread_value(thread));
        }
        let buffers = self.clients.iter().filter(|(_, it)| it.accepted).map(|(name, client)| {
            let show = |bytes: &[u8]| shown(bytes, self.has_messages);
            let (input, output) = (show(&client.input), show(&client.output));
            let mut value = json!({ "who": name.to_string(), "in": input, "out": output });
            if client.output.len() > 960 * 1024 {
                value["note"] = "above the high-water mark: it reads nothing more".into();
            }
            value
        });
        state.insert("buffers".to_owned(), buffers.collect());
        state
    }

    fn thread_value(&self, thread: &Thread) -> Value {
        let doing = thread.waits.as_deref().unwrap_or("runs");
        let mut value = json!({ "doing": doing });
        if let Some(rows) = thread.epoll.and_then(|epoll| self.tables.get(&epoll)) {
            let rows = rows.iter().map(|row| {
                let mut value = json!({ "fd": row.fd, "who": self.who(row.fd), "for": row.flags });
                if !self.logs.is_empty() {
                    value["slot"] = (row.data & 0xffff_ffff).into();
                    value["generation"] = (row.data >> 32).into();
                }
                value
            });
            value["table"] = rows.collect();
        }
        if thread.epoll.is_some() {
            let batch = thread.batch.iter().map(
                |it| json!({ "fd": it.fd, "who": it.who, "flags": it.flags, "state": it.state }),
            );
            value["batch"] = batch.collect();
        }
        value["stack"] = thread.stack.clone().into();
        if !thread.tasks.is_empty() {
            let tasks = thread.tasks.iter();
            value["tasks"] =
                tasks.map(|(task, state)| json!({ "task": task, "state": state })).collect();
        }
        value
    }
}

/// The fd that a call has made, or made a listener, and what is behind it; `kind` is what its own fd is.
fn opens(call: &Call, kind: Option<&Kind>) -> Option<(i64, Kind)> {
    let number = call.number()?;
    match call.name.as_str() {
        "listen" => Some((call.fd(), Kind::Listener)),
        "eventfd2" => Some((number, Kind::Bell { rings: 0 })),
        "signalfd4" => Some((number, Kind::Signals)),
        "socket" if call.args.contains("SOCK_DGRAM") => Some((number, Kind::Datagrams)),
        "epoll_create1" | "epoll_create" => Some((number, Kind::Epoll)),
        "dup" => Some((number, kind?.clone())),
        "fcntl" if call.args.contains("F_DUPFD") => Some((number, kind?.clone())),
        _ => None,
    }
}

/// What is not as before; of a thread or a client only those parts.
fn changes(before: &Map<String, Value>, after: &Map<String, Value>) -> Map<String, Value> {
    let changed = after.iter().filter(|(key, value)| before.get(*key) != Some(value));
    let changed = changed.map(|(key, value)| match (before.get(key), value) {
        (Some(Value::Object(before)), Value::Object(after)) => {
            (key.clone(), changes(before, after).into())
        }
        _ => (key.clone(), value.clone()),
    });
    changed.collect()
}

fn is_wait(call: &Call) -> bool {
    call.name.starts_with("epoll_") && call.name.contains("wait")
}

/// `1 byte`, `65,536 bytes`.
fn count(n: usize) -> String {
    format!("{} byte{}", digits(n), if n == 1 { "" } else { "s" })
}

/// `65,536`
fn digits(n: usize) -> String {
    let digits = n.to_string();
    let from_end = |at: usize| digits.len() - at;
    let parts = digits.char_indices().flat_map(|(at, digit)| {
        let comma = at > 0 && from_end(at) % 3 == 0;
        comma.then_some(',').into_iter().chain([digit])
    });
    parts.collect()
}

/// Bytes as a page shows them: as messages if they are some, shortened if they are many.
fn shown(bytes: &[u8], as_messages: bool) -> String {
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

    /// A server of another kind, with one client.
    const REPORT: &str = r#"7 1.0 listen(3, 128) = 0 <0.1>
7 2.0 epoll_ctl(4, EPOLL_CTL_ADD, 3, {events=EPOLLIN, data=0x3}) = 0 <0.1>
7 3.0 epoll_wait(4, [{events=EPOLLIN, data=0x3}], 9, -1) = 1 <1.0>
7 5.0 accept4(3, {sa_family=AF_INET, sin_port=htons(99)}, [16], 0) = 5 <0.1>
7 6.0 epoll_ctl(4, EPOLL_CTL_ADD, 5, {events=EPOLLIN, data={u32=5, u64=5}}) = 0 <0.1>
7 7.0 epoll_wait(4, [{events=EPOLLIN, data=0x5}], 9, -1) = 1 <1.0>
7 9.0 recvfrom(5, "\x68\x69", 4096, 0, NULL, NULL) = 2 <0.1>
7 10.0 sendto(5, "\x68\x69", 2, 0, NULL, 0) = 1 <0.1>
7 11.0 sendto(5, "\x69", 1, 0, NULL, 0) = -1 EAGAIN (Resource temporarily unavailable) <0.1>
7 12.0 epoll_wait(4,  <unfinished ...>
"#;

    fn says(steps: &[Step]) -> Vec<&str> {
        steps.iter().map(|step| &*step.say).collect()
    }

    #[test]
    fn a_run_is_retold_from_the_calls_alone() {
        let recording = Recording::derived(strace::parse(REPORT).unwrap());
        let Outcome { start, steps, .. } = super::steps(&recording, &mut Logs::default());
        assert_eq!(start["client A"]["state"], "not connected");
        assert_eq!(start["thread main"]["doing"], "waits in epoll_wait");
        let expected = [
            "A connects. The kernel completes the handshake by itself, and puts the connection into the accept \
             queue.",
            "`epoll_wait` returns one event: fd 3 (the listener) IN.",
            "`accept` takes A's connection out of the accept queue: fd 5.",
            "`epoll_ctl` puts fd 5 (A) into the table of interest: IN.",
            "Nothing is ready, so it waits in `epoll_wait`. That takes no processor time.",
            "A sends \"hi\". It waits in the kernel until the server reads it.",
            "`epoll_wait` returns one event: fd 5 (A) IN.",
            "`read` takes \"hi\" out of the kernel.",
            "`write` to A: the kernel has room for 1 of 2 bytes.",
            "`write` to A: EAGAIN. There is no room in the kernel.",
            "Nothing is ready, so it waits in `epoll_wait`. That takes no processor time.",
        ];
        assert_eq!(says(&steps), expected);
        let buffers = |step: usize| steps[step].set["buffers"].to_string();
        assert_eq!(buffers(7), r#"[{"who":"A","in":"\"hi\"","out":""}]"#);
        assert_eq!(buffers(8), r#"[{"who":"A","in":"","out":"\"i\""}]"#);
        assert_eq!(steps[8].set["client A"], json!({ "got": "\"h\"" }));
        assert_eq!(steps.iter().map(|step| step.beat).collect::<Vec<_>>()[4..6], [1, 2]);
        // Not every server asks for the address.
        let report = REPORT.replace("{sa_family=AF_INET, sin_port=htons(99)}, [16]", "NULL, NULL");
        let recording = Recording::derived(strace::parse(&report).unwrap());
        assert_eq!(super::steps(&recording, &mut Logs::default()).steps, steps);
    }

    #[test]
    fn what_goes_on_and_on_is_left_out() {
        let step = |actor: &str, say: &str| Step {
            say: say.to_owned(),
            actor: actor.to_owned(),
            at: None,
            beat: 0,
            set: Map::new(),
        };
        let sends = |n: usize| [step("A", &format!("sends {n}")), step("main", "reads")];
        let steps = (1..=4).flat_map(sends).chain([step("A", "leaves")]).collect();
        let steps = without_repetitions(steps);
        let expected =
            ["sends 1", "reads", "This goes on for a while, until: sends 4", "reads", "leaves"];
        assert_eq!(says(&steps), expected);
    }

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
