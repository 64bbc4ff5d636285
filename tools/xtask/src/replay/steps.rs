//! Turns a recording into steps: what happens, and what each part of the system holds after it.
//!
//! The calls tell what the kernel and the server know, the log among them which callback runs and where. What a
//! client has sent and got follows from its acts, or if it is not ours, from what the server reads and writes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bench::report::thousands;
use common::message;
use serde::Serialize;
use serde_json::{Map, Value};

use super::model::{Client, Kind, Model, Ready, Row, Thread, changes, count, shown};
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

/// What became of a recording.
pub struct Outcome {
    /// The state before the first act, and where in the sources the main thread is then.
    pub start: Map<String, Value>,
    pub at: Option<(usize, usize)>,
    /// What came after it.
    pub steps: Vec<Step>,
    /// The server's log, in the same order.
    pub log: String,
}

/// Something that happened on a thread.
struct Event<'a> {
    call: &'a Call,
    kind: What,
    /// Whether an act comes before it returns, or it doesn't.
    blocks: bool,
    /// The line of the log that describes the call, or is the call: level and text.
    line: Option<(String, String)>,
}

#[derive(PartialEq)]
enum What {
    /// A call begins, which will wait.
    Begins,
    /// A call has returned.
    Returns,
    /// A line of the log that describes no call.
    Logs,
}

/// What has been told so far.
struct Story<'a> {
    logs: &'a mut Logs,
    /// Whether the clients are not ours, and threads run in the order in which they really did.
    in_order: bool,
    model: Model,
    last: Map<String, Value>,
    steps: Vec<Step>,
    beat: usize,
    log: String,
}

/// Retells a recording, step by step.
pub fn steps(recording: &Recording, logs: &mut Logs) -> Outcome {
    let acts = &recording.acts;
    let mut story = Story::new(logs, recording);
    let mut beats: Vec<BTreeMap<&str, VecDeque<Event>>> = Vec::new();
    beats.resize_with(acts.len() + 1, BTreeMap::new);
    for event in events(&recording.calls, acts) {
        let beat = acts.partition_point(|act| act.time < event.time());
        // A thread without clients writes the log or standard output.
        if story.model.threads.contains_key(&event.call.thread) {
            beats[beat].entry(&event.call.thread).or_default().push_back(event);
        }
    }
    let (mut start, mut at) = (Map::new(), None);
    for (beat, queues) in beats.into_iter().enumerate() {
        story.beat = beat;
        if beat > 0 {
            story.act(&acts[beat - 1]);
        }
        story.run(queues);
        if beat == 0 {
            // How it has come to wait there is not shown.
            for thread in story.model.threads.values_mut().filter(|it| it.epoll.is_none()) {
                *thread = Thread { waits: thread.waits.take(), ..Thread::default() };
            }
            start = story.model.snapshot();
            at = story.model.thread("main").at;
            story.last.clone_from(&start);
            story.steps.clear();
        }
    }
    Outcome { start, at, steps: without_repetitions(story.steps), log: story.log }
}

/// The calls as events, each with the line of the log that describes it.
fn events<'a>(calls: &'a [Call], acts: &[Done]) -> Vec<Event<'a>> {
    let mut order: Vec<(f64, Event)> = Vec::new();
    for call in calls {
        let line = call.log_line();
        let is_during = |act: &Done| call.start < act.time && act.time < call.end;
        let blocks = call.result.is_none() || acts.iter().any(is_during);
        if call.is_wait() || call.is_poll() || blocks && line.is_none() {
            order.push((call.start, Event { call, kind: What::Begins, blocks, line: None }));
        }
        if call.result.is_some() {
            let kind = if line.is_some() { What::Logs } else { What::Returns };
            order.push((call.end, Event { call, kind, blocks, line }));
        }
    }
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut events: Vec<Event> = Vec::new();
    let mut last_of: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, event) in order {
        let last = last_of.get(&*event.call.thread).map(|last| &mut events[*last]);
        if let (Some((_, line)), Some(last)) = (&event.line, last)
            && describes(line, last)
        {
            last.line = event.line;
            continue;
        }
        last_of.insert(&event.call.thread, events.len());
        events.push(event);
    }
    events
}

/// Whether a line of the log is about the event before it, rather than one of its own.
fn describes(line: &str, event: &Event) -> bool {
    let calls: &[&str] = match line.split(": ").next().unwrap_or_default() {
        "epoll_wait" => &["epoll_wait"],
        "epoll_ctl" => &["epoll_ctl"],
        "read" => &["recvfrom", "read"],
        "write" => &["sendto", "write"],
        "cannot accept" => &["accept4"],
        _ if line.contains(": connected") => &["accept4"],
        _ => &[],
    };
    event.kind == What::Returns && event.line.is_none() && calls.contains(&&*event.call.name)
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
        match parts.last_mut().filter(|_| !begins(&step)) {
            Some(part) => part.push(step),
            None => parts.push(vec![step]),
        }
    }
    // Numbers of bytes may differ.
    let say = |step: &Step| step.say.replace(|c: char| c.is_ascii_digit() || c == ',', "");
    let says: Vec<Vec<String>> = parts.iter().map(|part| part.iter().map(say).collect()).collect();
    let mut kept: Vec<Step> = Vec::new();
    let mut skipped = 0;
    for (n, mut part) in parts.into_iter().enumerate() {
        // How often a timer is due that changes nothing is a matter of time.
        let is_timer = part.first().is_some_and(|step| step.say.ends_with("without an event."));
        if is_timer && says[..n].contains(&says[n]) {
            continue;
        }
        if n > 0 && says[n - 1] == says[n] && says.get(n + 1) == Some(&says[n]) {
            skipped += 1;
            continue;
        }
        if skipped > 0 {
            let times =
                if skipped == 1 { "once more".to_owned() } else { format!("{skipped} more times") };
            part[0].say = format!("The same happens {times}. Then: {}", part[0].say);
            skipped = 0;
        }
        kept.extend(part);
    }
    kept
}

impl Event<'_> {
    fn time(&self) -> f64 {
        if self.kind == What::Begins { self.call.start } else { self.call.end }
    }
}

impl<'a> Story<'a> {
    fn new(logs: &'a mut Logs, recording: &Recording) -> Self {
        let is_message =
            |call: &Call| call.log_line().is_some_and(|(_, line)| line.starts_with("message: "));
        let calls = &recording.calls;
        let accepts = calls.iter().filter(|call| call.is_accept());
        let accepted: BTreeSet<i64> = accepts.filter_map(Call::number).collect();
        let serves =
            |call: &&Call| call.is_wait() || call.is_accept() || accepted.contains(&call.fd());
        let threads = calls.iter().filter(serves).map(|call| &*call.thread).chain(["main"]);
        let model = Model {
            clients: recording.clients.iter().map(|name| (*name, Client::default())).collect(),
            threads: threads.map(|name| (name.to_owned(), Thread::default())).collect(),
            has_messages: recording.calls.iter().any(is_message),
            has_slots: !logs.is_empty(),
            ..Model::default()
        };
        let (last, in_order) = (Map::new(), recording.is_derived);
        Self { logs, in_order, model, last, steps: Vec::new(), beat: 0, log: String::new() }
    }

    /// Runs the threads of one beat, each until it waits for something that has not happened yet. The order in
    /// which they really ran is a matter of chance, and would differ each time that a script is recorded.
    fn run(&mut self, mut queues: BTreeMap<&str, VecDeque<Event>>) {
        loop {
            let rank = |event: &Event| match self.can_be(event) {
                true if !self.in_order => (false, 0.0),
                can_be => (!can_be, event.time()),
            };
            // The first of equals.
            let next = queues.values_mut().filter(|queue| !queue.is_empty()).min_by(|a, b| {
                let ((a_waits, a), (b_waits, b)) = (rank(&a[0]), rank(&b[0]));
                a_waits.cmp(&b_waits).then(a.total_cmp(&b))
            });
            let Some(event) = next.and_then(VecDeque::pop_front) else { return };
            self.event(&event);
        }
    }

    /// Whether what a wait reports is true by now.
    fn can_be(&self, event: &Event) -> bool {
        let call = event.call;
        let has_happened = |(_, data): (String, u64)| {
            let fd = self.model.fd_of(call.fd(), data);
            self.model.fds.get(&fd) != Some(&Kind::Bell { rings: 0 })
        };
        event.kind != What::Returns
            || !call.is_wait()
            || call.events().into_iter().all(has_happened)
    }

    fn push(&mut self, actor: &str, say: String) {
        let state = self.model.snapshot();
        let set = changes(&self.last, &state);
        let at = self.model.threads.get(actor).and_then(|thread| thread.at);
        self.steps.push(Step { say, actor: actor.to_owned(), at, beat: self.beat, set });
        self.last = state;
    }

    fn act(&mut self, done: &Done) {
        let name = done.client;
        let messages = self.model.has_messages;
        let client = self.model.client(name);
        if !client.got.is_empty() && client.held.is_empty() {
            // It has read all that there was, and now reads what comes.
            client.deaf = false;
        }
        let say = match &done.act {
            Act::Connects | Act::ConnectsSmall => {
                // With many clients, names come again.
                *client = Client { connected: true, port: done.port, ..Client::default() };
                format!(
                    "{name} connects. The kernel completes the handshake by itself, and puts the connection into \
                     the accept queue."
                )
            }
            Act::Sends(bytes) => {
                client.sent.extend(bytes);
                client.unread.extend(bytes);
                let place = if client.accepted {
                    "It waits in the kernel until the server reads it."
                } else {
                    "The kernel keeps it, although the server has not accepted the connection yet."
                };
                format!("{name} sends {}. {place}", shown(bytes, messages))
            }
            Act::ShutsDown if self.in_order => {
                client.fin = true;
                format!("{name} sends a FIN: it has shut down its side, or closed. The server cannot tell which.")
            }
            Act::ShutsDown => {
                client.fin = true;
                format!("{name} shuts down its side: the kernel sends a FIN. {name} can still receive.")
            }
            Act::Closes => {
                let fin = if client.fin { "" } else { ": the kernel sends a FIN" };
                (client.fin, client.closed) = (true, true);
                format!("{name} closes its connection{fin}.")
            }
            Act::Resets => {
                (client.rst, client.error, client.fin) = (true, true, false);
                client.unread.clear();
                format!("{name} resets its connection: an RST. What the server has not read is lost.")
            }
            Act::StopsReading => {
                client.deaf = true;
                format!("From now on {name} reads nothing. What the server writes stays in the kernel.")
            }
            Act::ReadsOn => {
                client.full = false;
                let n = count(client.held.len());
                client.got.append(&mut client.held);
                let then = if client.server_fin { ", and the end" } else { "" };
                let room = if client.server_fin { "" } else { " There is room again." };
                format!("{name} reads {n}, all that the kernel has for it{then}.{room}")
            }
            Act::ServerStops => {
                "The server is held up for a moment, with SIGSTOP, so that more can happen before its next step."
                    .to_owned()
            }
            Act::ServerContinues => "The server goes on.".to_owned(),
            Act::TimePasses => "A quarter of a second passes.".to_owned(),
        };
        self.model.clients.remove(&NO_CLIENT);
        let actor = if name == NO_CLIENT { "kernel".to_owned() } else { name.to_string() };
        self.push(&actor, say);
    }

    fn event(&mut self, event: &Event) {
        let thread = &*event.call.thread;
        if let Some((level, line)) = &event.line {
            self.log += &format!("{level} {line}\n");
        }
        let say = match (&event.kind, &event.line) {
            (What::Begins, _) => self.begins(event.call, event.blocks),
            (What::Logs, Some((level, line))) => self.logs(thread, level, line),
            (_, line) => {
                let say = self.returns(event.call, line.as_ref().map_or("", |line| &line.1));
                match (&say, line) {
                    (Some(_), Some((level, line))) => self.is_in(thread, level, line),
                    // The log does not tell where it is.
                    (Some(_), None) if !event.call.is_wait() => {
                        let thread = self.model.thread(thread);
                        thread.stack.truncate(thread.base);
                        thread.at = None;
                    }
                    _ => {}
                }
                say
            }
        };
        if let Some(say) = say {
            self.push(thread, say);
        }
    }

    /// The thread is at the line that logs `line`. Below the function around it are the first `base` ones that
    /// were on the stack, or those that stay there anyway.
    fn is_in(&mut self, thread: &str, level: &str, line: &str) {
        let found = self.logs.find(&format!("{level} {line}"));
        let Some((at, function)) = found else { return };
        let thread = self.model.thread(thread);
        thread.at = Some(at);
        thread.stack.truncate(thread.base);
        if thread.stack.last() != Some(&function) {
            thread.stack.push(function);
        }
    }

    /// The same, and until the callback is done the stack stays as it is now, on its first `depth` functions.
    fn enters(&mut self, thread: &str, level: &str, line: &str, depth: usize) {
        let state = self.model.thread(thread);
        state.base = depth.min(state.stack.len());
        self.is_in(thread, level, line);
        let state = self.model.thread(thread);
        state.base = state.stack.len();
    }

    /// The thread is at the call of which `line` tells what came of it: the nearest line above with `call`.
    fn is_before(&mut self, thread: &str, level: &str, line: &str, call: &str) {
        self.is_in(thread, level, line);
        let thread = self.model.thread(thread);
        thread.at = thread.at.map(|at| self.logs.line_before(at, call));
    }

    fn begins(&mut self, call: &Call, blocks: bool) -> Option<String> {
        let (thread, name) = (&*call.thread, &*call.name);
        if call.is_poll() {
            self.model.thread(thread).waits = Some(format!("waits in {name}"));
            return Some(format!("It waits in `{name}` until one of its fds is ready."));
        }
        let what = match self.model.fds.get(&call.fd()) {
            _ if call.is_wait() => return self.waits(call, blocks),
            // A non-blocking one that something happens beside.
            _ if self.model.owner(call.fd()).is_some() => return None,
            Some(Kind::Listener) => "until a client connects".to_owned(),
            Some(Kind::Conn(name)) => format!("until {name} sends something"),
            _ => return None,
        };
        let name = if call.is_accept() {
            self.is_before(thread, "DEBUG", "it: connected", "accept");
            "accept"
        } else {
            self.is_before(thread, "TRACE", "read: 0 bytes from fd 0 into it", "read(");
            "read"
        };
        self.model.thread(thread).waits = Some(format!("waits in {name}"));
        Some(format!("It calls `{name}`, and waits {what}. It can do nothing else."))
    }

    /// epoll_wait begins.
    fn waits(&mut self, call: &Call, blocks: bool) -> Option<String> {
        let (epoll, thread) = (call.fd(), self.model.thread(&call.thread));
        let tasks = std::mem::take(&mut thread.tasks).into_iter();
        let tasks =
            tasks.map(|(task, state)| (task, if state == "polled" { "pending" } else { state }));
        let was_waiting = thread.waits.is_some();
        *thread = Thread {
            waits: Some("waits in epoll_wait".to_owned()),
            epoll: Some(epoll),
            tasks: tasks.collect(),
            ..Thread::default()
        };
        let has_task = thread.tasks.values().any(|state| *state == "woken");
        self.is_before(&call.thread, "TRACE", "epoll_wait: 1 ready", "wait(");
        if was_waiting {
            // A signal has interrupted it.
            return None;
        }
        // It is the second after the events, or after their address; epoll_pwait has more.
        let after = match call.args.rsplit_once("}], ") {
            Some((_, after)) => Some(after),
            None => call.args.splitn(3, ", ").nth(2),
        };
        let timeout = after.and_then(|it| it.split(", ").nth(1)).filter(|_| call.result.is_some());
        let say = match timeout {
            _ if !blocks && self.model.is_ready(epoll) => {
                "It asks with `epoll_wait` what is ready. Something is."
            }
            Some("0") if has_task => {
                "It asks with `epoll_wait` what is ready, and does not wait: a task is to be polled."
            }
            // How long a wait would have been that has not ended is not known.
            None | Some("-1" | "NULL") => {
                "Nothing is ready, so it waits in `epoll_wait`. That takes no processor time."
            }
            Some(_) => "Nothing is ready. It waits in `epoll_wait`, until a timer is due.",
        };
        Some(say.to_owned())
    }

    fn returns(&mut self, call: &Call, line: &str) -> Option<String> {
        if call.is_wait() {
            return self.wakes(call);
        }
        if call.is_poll() {
            self.model.thread(&call.thread).waits = None;
            let (name, n) = (&call.name, call.number()?);
            return Some(format!(
                "`{name}` returns: {n} fd{} ready.",
                if n == 1 { " is" } else { "s are" }
            ));
        }
        let (fd, has_slots) = (call.fd(), self.model.has_slots);
        let thread = self.model.thread(&call.thread);
        thread.waits = None;
        if !has_slots {
            thread.works_at(fd);
        }
        let kind = self.model.fds.get(&fd).cloned();
        if let Some((fd, kind)) = opens(call, kind.as_ref()) {
            self.model.fds.insert(fd, kind);
            return None;
        }
        match (&*call.name, kind) {
            ("epoll_ctl", _) => self.controls(call),
            _ if call.is_accept() => self.accepts(call),
            ("shutdown", Some(Kind::Conn(name))) => {
                self.model.client(name).server_fin = true;
                Some(format!(
                    "It shuts down its side of {name}'s connection: a FIN, after all bytes."
                ))
            }
            ("close", Some(kind)) => {
                self.model.fds.remove(&fd);
                self.model.tables.remove(&fd);
                self.model.tables.values_mut().for_each(|rows| rows.retain(|row| row.fd != fd));
                let Kind::Conn(name) = kind else { return None };
                let client = self.model.client(name);
                client.server_rst = !client.rst && !client.unread.is_empty();
                let kernel = match (client.rst || client.server_fin, client.held.is_empty()) {
                    _ if client.server_rst => {
                        " The kernel sends an RST, because there is unread input."
                    }
                    (true, _) => "",
                    (false, true) => " The kernel sends a FIN.",
                    (false, false) => " The kernel sends what it still holds, and then a FIN.",
                };
                client.server_fin = true;
                client.input.clear();
                client.output.clear();
                Some(format!(
                    "It closes fd {fd}.{kernel} The number is free for the next connection."
                ))
            }
            (_, Some(Kind::Bell { .. })) if call.is_read() => {
                self.model.fds.insert(fd, Kind::Bell { rings: 0 });
                Some(format!("It reads the eventfd {fd}, which silences it."))
            }
            (_, Some(Kind::Bell { rings })) if call.is_write() => {
                self.model.fds.insert(fd, Kind::Bell { rings: rings + 1 });
                let whose = self.model.owner(fd).unwrap_or("its thread");
                Some(format!(
                    "It rings the bell: it writes to the eventfd {fd}, which wakes {whose}."
                ))
            }
            (_, Some(Kind::Conn(name))) if call.is_read() => self.reads(call, name, line),
            (_, Some(Kind::Conn(name))) if call.is_write() => self.writes(call, name),
            _ => None,
        }
    }

    /// epoll_wait returns.
    fn wakes(&mut self, call: &Call) -> Option<String> {
        call.number()?;
        let batch = call.events().into_iter().map(|(flags, data)| {
            let fd = self.model.fd_of(call.fd(), data);
            Ready { fd, who: self.model.who(fd), flags, state: "next" }
        });
        let batch: Vec<Ready> = batch.collect();
        let list = batch.iter().map(|it| format!("fd {} ({}) {}", it.fd, it.who, it.flags));
        let list = list.collect::<Vec<_>>().join(", ");
        let say = match batch.len() {
            0 => "`epoll_wait` returns without an event.".to_owned(),
            1 => format!("`epoll_wait` returns one event: {list}."),
            n => format!("`epoll_wait` returns a batch of {n} events: {list}."),
        };
        let thread = self.model.thread(&call.thread);
        (thread.waits, thread.batch) = (None, batch);
        Some(say)
    }

    fn controls(&mut self, call: &Call) -> Option<String> {
        call.number()?;
        let (epoll, fd) = (call.fd(), call.arg(2).parse().ok()?);
        let who = self.model.who(fd);
        let rows = self.model.tables.entry(epoll).or_default();
        if call.arg(1) == "EPOLL_CTL_DEL" {
            rows.retain(|row| row.fd != fd);
            return Some(format!("`epoll_ctl` takes fd {fd} ({who}) out of the interest list."));
        }
        let (flags, data) = call.events().into_iter().next()?;
        let flags = if flags == "0" { "nothing".to_owned() } else { flags };
        if let Some(row) = rows.iter_mut().find(|row| row.fd == fd) {
            row.data = data;
            let before = std::mem::replace(&mut row.flags, flags.clone());
            if let (Some(Kind::Conn(name)), false) =
                (self.model.fds.get(&fd), self.model.has_messages)
                && flags.contains("OUT")
            {
                // An echo: what was read is to be written.
                let client = self.model.clients.entry(*name).or_default();
                client.output.append(&mut client.input);
            }
            return Some(format!(
                "`epoll_ctl` changes what fd {fd} ({who}) is watched for: {before} becomes {flags}."
            ));
        }
        let mut say =
            format!("`epoll_ctl` puts fd {fd} ({who}) into the interest list, watched for {flags}");
        rows.push(Row { fd, flags, data });
        if self.model.has_slots {
            say += &format!(", in slot {}, generation {}", data & 0xffff_ffff, data >> 32);
        }
        Some(say + ".")
    }

    fn accepts(&mut self, call: &Call) -> Option<String> {
        match call.error() {
            None => {}
            Some("EAGAIN") => {
                let say = "`accept`: EAGAIN. The accept queue is empty, and a non-blocking socket does not wait.";
                return Some(say.to_owned());
            }
            Some(error) => {
                let free = if error == "EMFILE" { ", because no fd is free" } else { "" };
                let first = self.model.queue().next();
                let queue = first.map(|(name, _)| format!(" {name} stays in the accept queue."));
                return Some(format!(
                    "`accept` fails: {error}{free}.{}",
                    queue.unwrap_or_default()
                ));
            }
        }
        let fd = call.number()?;
        // Without an address it is the one that has waited longest.
        let is_it = |client: &Client| match call.port() {
            Some(port) => client.port == port,
            None => client.connected && !client.accepted,
        };
        let (name, client) = self.model.clients.iter_mut().find(|(_, client)| is_it(client))?;
        client.accepted = true;
        self.model.fds.insert(fd, Kind::Conn(*name));
        Some(format!("`accept` takes {name}'s connection out of the accept queue: fd {fd}."))
    }

    fn reads(&mut self, call: &Call, name: char, line: &str) -> Option<String> {
        let messages = self.model.has_messages;
        let client = self.model.client(name);
        match call.error() {
            None => {}
            Some("EAGAIN") => {
                return Some(format!("`read` from {name}: EAGAIN. There is nothing more now."));
            }
            Some(error) => {
                client.error = client.error && error != "ECONNRESET";
                return Some(format!("`read` from {name} fails: {error}."));
            }
        }
        let n = usize::try_from(call.number()?).unwrap_or_default();
        client.unread.drain(..n.min(client.unread.len()));
        Some(match (n, line.ends_with("discarded")) {
            (0, false) => {
                format!("`read`: 0 bytes. {name} has sent its FIN, so nothing will follow.")
            }
            (0, true) if !client.output.is_empty() => {
                let left = count(client.output.len());
                format!("`read`: 0 bytes. {name} has sent its FIN, and is still to get {left}.")
            }
            (0, true) => {
                format!("`read`: 0 bytes. {name} has sent its FIN, so no input is unread.")
            }
            (n, true) => format!("`read`: {}, which no longer matters.", count(n)),
            (n, false) => {
                let bytes = call.data();
                client.input.extend(&bytes[..n.min(bytes.len())]);
                format!("`read` takes {} out of the kernel.", shown(&bytes, messages))
            }
        })
    }

    fn writes(&mut self, call: &Call, name: char) -> Option<String> {
        let (messages, offered) = (self.model.has_messages, call.data());
        let client = self.model.client(name);
        if let Some(error) = call.error() {
            client.full = error == "EAGAIN";
            return Some(match error {
                "EAGAIN" => format!("`write` to {name}: EAGAIN. There is no room in the kernel."),
                error => format!("`write` to {name} fails: {error}."),
            });
        }
        let n = usize::try_from(call.number()?).unwrap_or_default().min(offered.len());
        let (taken, rest) = offered.split_at(n);
        let begins_alike = |buffer: &[u8]| {
            let known = &offered[..offered.len().min(strace::MOST)];
            buffer.len() >= offered.len() && buffer.starts_with(known)
        };
        if begins_alike(&client.input) {
            client.input.drain(..offered.len());
        }
        if begins_alike(&client.output) {
            client.output.drain(..n);
        } else {
            client.output = rest.to_vec();
        }
        client.full = !rest.is_empty();
        if client.deaf { &mut client.held } else { &mut client.got }.extend(taken);
        Some(if client.full {
            format!(
                "`write` to {name}: the kernel has room for {} of {}.",
                thousands(n as f64),
                count(offered.len())
            )
        } else if client.deaf {
            format!("`write` to {name}: the kernel takes {}, and keeps them.", count(n))
        } else {
            format!("`write` sends {} to {name}.", shown(taken, messages))
        })
    }

    /// A line of the log that is a step of its own.
    fn logs(&mut self, thread: &str, level: &str, line: &str) -> Option<String> {
        if let Some((fd, flags)) = line.split_once(" is ready: ") {
            self.model.thread(thread).next_of_batch(Some("now"));
            self.enters(thread, level, line, 1);
            let who = self.model.who(fd.trim_start_matches("fd ").parse().ok()?);
            return Some(format!("It takes the next event of the batch: {fd} ({who}), {flags}."));
        }
        if line.starts_with("stale event") {
            self.model.thread(thread).next_of_batch(Some("stale"));
            self.enters(thread, level, line, 1);
            let say = "The next event of the batch is stale: its token's registration is gone. It is skipped, and \
                does no harm.";
            return Some(say.to_owned());
        }
        if line.ends_with("_callback") {
            self.enters(thread, level, line, 2);
            return Some(format!("It calls the callback, `{line}`."));
        }
        let (first, rest) = line.split_once(": ").unwrap_or((line, ""));
        if let Some(task) = rest.strip_prefix("task ") {
            let task = task.split(',').next().unwrap_or(task);
            return self.task(thread, (level, line), first, task);
        }
        self.is_in(thread, level, line);
        let is_it = |client: &Client| first.ends_with(&format!(":{}", client.port));
        let peer = self.model.clients.iter().find(|(_, client)| is_it(client));
        Some(match (first, peer.map(|(name, _)| *name), rest) {
            ("message", ..) => {
                let name = self.model.reading(thread)?;
                let client = self.model.client(name);
                let message = message::decode(&client.input).ok().flatten()?;
                let (id, frame_len) = (message.id, message.frame_len());
                let frame: Vec<u8> = client.input.drain(..frame_len).collect();
                if id == 1 {
                    client.output.extend(&frame);
                }
                let then = if id == 1 { "puts the reply into the output buffer" } else { "runs" };
                format!("A whole message: {}. Its callback {then}.", shown(&frame, true))
            }
            ("on_conn_start" | "on_conn_close", ..) => format!("The hook `{first}` runs."),
            ("a timer is due", ..) => "A timer is due.".to_owned(),
            (_, Some(name), "closed") => {
                if self.model.fds.values().any(|kind| *kind == Kind::Conn(name)) {
                    format!("{name}'s connection ends: the server closes it gracefully.")
                } else {
                    format!("{name}'s connection is over.")
                }
            }
            (_, Some(name), what) => match what.strip_prefix("handing over to ") {
                Some(worker) => {
                    format!("It puts {name}'s connection into the mailbox of {worker}.")
                }
                None => format!("{name}: {what}."),
            },
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
        let state = self.model.thread(thread);
        let is_in_task = state.stack.iter().any(|it| it.starts_with("task "));
        if what == "poll" {
            // The one before has not said that it is ready.
            state.tasks.values_mut().filter(|it| **it == "polled").for_each(|it| *it = "pending");
        }
        // Tasks are polled outside the loop, and most wakers are called there.
        if what == "poll" || what == "ready" || !is_in_task {
            state.next_of_batch(None);
            self.enters(thread, level, line, 0);
        } else {
            self.is_in(thread, level, line);
        }
        let state = self.model.thread(thread);
        if what == "poll" {
            state.stack.push(format!("task {task}"));
            state.base = state.stack.len();
        }
        let (now, say) = match what {
            "spawn" => ("woken", format!("It spawns task {task}: {}.", line.split(", ").nth(1)?)),
            "wake" => {
                ("woken", format!("The waker of task {task} is called: the task is to be polled."))
            }
            "poll" => (
                "polled",
                format!("It polls task {task}, which runs until it has to wait or is done."),
            ),
            "ready" => ("ready", format!("Task {task} returns Ready: it is done, and removed.")),
            _ => ("ready", format!("Task {task} is removed.")),
        };
        state.tasks.retain(|_, state| *state != "ready");
        state.tasks.insert(task.to_owned(), now);
        Some(say)
    }
}

/// The fd that a call has made, or made a listener, and what is behind it; `kind` is what its own fd is.
fn opens(call: &Call, kind: Option<&Kind>) -> Option<(i64, Kind)> {
    let number = call.number()?;
    match &*call.name {
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

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
            "`epoll_ctl` puts fd 5 (A) into the interest list, watched for IN.",
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
            ["sends 1", "reads", "The same happens 2 more times. Then: sends 4", "reads", "leaves"];
        assert_eq!(says(&steps), expected);
    }
}
