//! A server's trace as a sequence diagram: what calls what, in the order in which it happened.
//!
//! The trace is a console block of the page, under a comment `sequence: FILE, BYTES`. BYTES is how the
//! picture shows the bytes that the client sends and gets back.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, ensure};

use crate::picture;

/// The four participants, from left to right, and where each has its line.
const CLIENT: i32 = 50;
const KERNEL: i32 = 158;
const LOOP: i32 = 254;
const CALLBACKS: i32 = 372;

const WIDTH: i32 = 424;
const TOP: i32 = 58;
const STEP: i32 = 30;
/// For text below an arrow.
const LINE: i32 = 12;

/// What one line of the trace is in the picture.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// A call from one to another, or what comes back. The second line of the text is below the arrow.
    Arrow { from: i32, to: i32, text: String, returns: bool },
    /// `epoll_wait` returns, at once if it has waited only for room that was there anyway.
    Ready { count: String, at_once: bool },
    /// Something that the callbacks detect, or the executor between them: at one of the lines.
    Note { at: i32, text: String },
}

impl Event {
    fn is_of_two_lines(&self) -> bool {
        matches!(self, Event::Arrow { text, .. } if text.contains('\n'))
    }
}

/// The SVG of a session's trace, with at most `most` steps; an error if it has none.
pub fn draw(id: &str, bytes: &str, session: &str, most: usize) -> anyhow::Result<String> {
    const TITLE: &str = "The trace of the session as a sequence diagram";
    const DESC: &str = "From left to right the client, the kernel, the EventLoop and the callbacks, each with a \
        lifeline. Time runs downwards. The arrows are the lines of the trace, in their order. Bars on the \
        lifeline of the EventLoop mark where it is in epoll_wait: it waits there, unless the socket it asks about \
        has room anyway.";
    const ASYNC_DESC: &str = "From left to right the client, the kernel, the Runtime, which has the EventLoop \
        inside, and the tasks, each with a lifeline. Time runs downwards. The arrows are the lines of the trace, in \
        their order, and a poll that is not followed by ready returns Pending. Bars on the lifeline of the Runtime \
        mark where it is in epoll_wait: it waits there, unless a task is to be polled.";
    let (event_loop, callbacks, desc) = if session.contains(" TRACE poll: task ") {
        ("Runtime", "tasks", ASYNC_DESC)
    } else {
        ("EventLoop", "callbacks", DESC)
    };
    let mut events = events(session, bytes);
    if events.len() > most {
        events.truncate(most);
        events.push(Event::Note { at: LOOP, text: "and so on".to_owned() });
    }
    ensure!(!events.is_empty(), "there is no trace in it");
    let steps = i32::try_from(events.len()).context("a short trace")?;
    let lines = events.iter().filter(|event| event.is_of_two_lines()).count();
    let height = TOP + STEP * steps + LINE * i32::try_from(lines)? + 44;
    let mut svg = picture::start(id, TITLE, desc, WIDTH, height);
    for (at, name, class) in [
        (CLIENT, "client", "client"),
        (KERNEL, "kernel", "kernel"),
        (LOOP, event_loop, "loop"),
        (CALLBACKS, callbacks, "code"),
    ] {
        writeln!(
            svg,
            "  <path class=\"life\" d=\"M{at} 40V{}\"/>\
             <rect class=\"{class}\" x=\"{}\" y=\"14\" width=\"80\" height=\"26\" rx=\"6\"/>\
             <text class=\"mid\" x=\"{at}\" y=\"31\">{name}</text>",
            height - 48,
            at - 40
        )?;
    }
    // Where the last call of epoll_wait is, which is drawn as a bar when it returns.
    let mut called = 0;
    let mut y = TOP;
    for event in &events {
        match event {
            Event::Arrow { from, to, text, returns } => {
                if (*from, *to) == (LOOP, KERNEL) {
                    called = y;
                }
                writeln!(svg, "  {}", drawn(*from, *to, y, text, *returns))?;
            }
            Event::Ready { count, at_once } => {
                let wait = if *at_once { "returns at once" } else { "waiting in epoll_wait" };
                writeln!(
                    svg,
                    "  <rect class=\"loop\" x=\"{}\" y=\"{called}\" width=\"10\" height=\"{}\"/>{}{}",
                    LOOP - 5,
                    y - called,
                    label("", LOOP + 10, (called + y) / 2 + 4, wait),
                    drawn(KERNEL, LOOP, y, count, true)
                )?;
            }
            Event::Note { at, text } => {
                writeln!(svg, "  {}", label("mid ", *at, y + 2, text))?;
            }
        }
        y += STEP + if event.is_of_two_lines() { LINE } else { 0 };
    }
    writeln!(
        svg,
        "  {}{}\n</svg>",
        label(
            "small mid ",
            WIDTH / 2,
            height - 27,
            "A client's step is drawn in the wait that reports it;"
        ),
        label("small mid ", WIDTH / 2, height - 13, "it may have happened before.")
    )?;
    Ok(svg)
}

/// An arrow with its text.
fn drawn(from: i32, to: i32, y: i32, text: &str, returns: bool) -> String {
    let inset = if from < to { 6 } else { -6 };
    let class = if returns { "data" } else { "call" };
    let (above, below) = text.split_once('\n').unwrap_or((text, ""));
    let middle = (from + to) / 2;
    format!(
        "<path class=\"{class}\" d=\"M{} {y}H{}\"/>{}{}",
        from + inset,
        to - inset,
        label("mid ", middle, y - 6, above),
        label("mid ", middle, y + 15, below)
    )
}

/// Text with an outline, since the lines of participants may cross it.
fn label(class: &str, x: i32, y: i32, text: &str) -> String {
    if text.is_empty() {
        return String::new();
    }
    let text = picture::escape(text).replace("->", "\u{2192}");
    format!("<text class=\"{class}over\" x=\"{x}\" y=\"{y}\">{text}</text>")
}

fn arrow(from: i32, to: i32, text: &str, returns: bool) -> Event {
    Event::Arrow { from, to, text: text.to_owned(), returns }
}

/// Something that the callbacks detect.
fn note(text: &str) -> Event {
    Event::Note { at: CALLBACKS - 40, text: text.to_owned() }
}

fn events(session: &str, bytes: &str) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    // Drawn with the next line, which says what is called.
    let mut ready = String::new();
    // Where the last wait returned. What the client did to end it shows in the lines after that.
    let mut woken = 0;
    // A socket that a callback watches for room without having tried to write, which nearly always has room;
    // and the one for the current wait.
    let (mut untried, mut waited_for) = ("", "");
    // If there are several clients, each has a letter, by its fd.
    let several = session.matches(": connected, fd ").count() > 1;
    let (mut letters, mut names) = ('A'..='Z', BTreeMap::new());
    // How many tasks are to be polled, and whether one is being polled.
    let (mut queued, mut polling) = (0, false);
    // How a server starts and stops is not drawn.
    for line in session.lines().take_while(|line| *line != "^C") {
        let Some((_, line)) = line.split_once("TRACE ").or(line.split_once("DEBUG ")) else {
            continue;
        };
        if events.is_empty() && !line.starts_with("epoll_wait") {
            continue;
        }
        let is_done = line.starts_with("ready: ");
        let is_next = line.starts_with("poll: ") || line.starts_with("epoll_wait: ");
        if polling && (is_done || is_next) {
            polling = false;
            let result = if is_done { "Ready" } else { "Pending" };
            events.push(arrow(CALLBACKS, LOOP, result, true));
        }
        if let (true, Some((_, fd))) = (several, line.split_once(": connected, ")) {
            names.insert(fd, format!("{} ", letters.next().unwrap_or('Z')));
        }
        // Of the client at the end of the line, or before a comma or ` into `.
        let fd = line.rfind("fd ").map_or("", |at| &line[at..]);
        let fd = fd.split([',', ' ']).take(2).collect::<Vec<_>>().join(" ");
        let who = names.get(&*fd).map_or("", String::as_str);
        let mut client_does = |text: &str| {
            let text = &format!("{who}{text}");
            events.insert(woken, arrow(CLIENT, KERNEL, text, false));
            woken += 1;
        };
        if let Some(count) = line.strip_prefix("epoll_wait: ") {
            events.push(arrow(LOOP, KERNEL, "epoll_wait", false));
            woken = events.len();
            waited_for = std::mem::take(&mut untried);
            events.push(Event::Ready { count: count.to_owned(), at_once: queued > 0 });
        } else if let Some((fd, flags)) = line.split_once(" is ready: ") {
            ready = format!("{fd}, {flags}\n");
            if let Some(Event::Ready { at_once, .. }) = events.get_mut(woken) {
                *at_once |= fd == waited_for && flags.ends_with("OUT");
            }
        } else if line.starts_with("wake: ") {
            queued += 1;
            let text = std::mem::take(&mut ready).replace('\n', " -> ") + line;
            events.push(Event::Note { at: LOOP, text });
        } else if line.starts_with("poll: ") {
            (queued, polling) = (queued - 1, true);
            events.push(arrow(LOOP, CALLBACKS, line, false));
        } else if line.starts_with("spawn: ") {
            events.push(arrow(CALLBACKS, LOOP, &line.replace(", ", "\n"), false));
        } else if line.ends_with("_callback") {
            events.push(arrow(LOOP, CALLBACKS, &(std::mem::take(&mut ready) + line), false));
        } else if let Some(what) = line.strip_prefix("epoll_ctl: ") {
            let has_tried = matches!(events.last(), Some(Event::Arrow { to: CLIENT, .. }));
            if what.ends_with("OUT") && !has_tried {
                untried = what.split(", ").next().unwrap_or_default();
            }
            events.push(arrow(CALLBACKS, KERNEL, line, false));
        } else if let Some(write) = line.strip_prefix("write: ") {
            let count = write.split(' ').next().unwrap_or_default();
            events.push(arrow(CALLBACKS, KERNEL, line, false));
            events.push(arrow(KERNEL, CLIENT, &format!("{who}gets {count} bytes\n{bytes}"), true));
        } else if let Some(read) = line.strip_prefix("read: ") {
            let count = read.split(' ').next().unwrap_or_default();
            if count != "0" {
                client_does(&format!("sends {count} bytes\n{bytes}"));
            } else if !line.ends_with("discarded") {
                client_does("closes its side\nFIN");
            }
            let text = line.split(" into ").next().unwrap_or(line);
            events.push(arrow(KERNEL, CALLBACKS, text, true));
        } else if let Some((_, what)) = line.split_once(": connected, ") {
            client_does("connects");
            events.push(arrow(KERNEL, CALLBACKS, &format!("accept: {what}"), true));
        } else if line.ends_with(": closed") {
            events.push(note("the client has closed"));
        } else if line.starts_with("message: ") {
            events.push(note(line));
        }
    }
    events
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SESSION: &str = "# terminal 1\n$ RUST_LOG=trace cargo run -q -p reactor-v03\n   \
        0.000254341s  INFO listening on 127.0.0.1:7777\n   \
        0.000262364s TRACE epoll_ctl: add fd 7, IN\n\
        # terminal 2\n$ echo hello | nc -N 127.0.0.1 7777\n\
        # terminal 1\n   \
        0.706871847s TRACE epoll_wait: 1 ready\n   \
        0.706941936s TRACE fd 7 is ready: IN\n   \
        0.706950601s TRACE accept_callback\n   \
        0.707345785s DEBUG 127.0.0.1:46242: connected, fd 8\n   \
        0.708145785s TRACE epoll_wait: 1 ready\n   \
        0.708445785s TRACE read: 6 bytes from fd 8 into IoBuf { head: 0, len: 6, capacity: 4096 }\n   \
        0.708545785s TRACE write: 6 of 6 bytes to fd 8\nhello\n   \
        0.708645785s TRACE epoll_wait: 1 ready\n   \
        0.708745785s TRACE read: 0 bytes from fd 8 into IoBuf { head: 0, len: 0, capacity: 4096 }\n   \
        0.708845785s TRACE read: 0 bytes from fd 8, discarded\n^C\n   \
        0.808845785s TRACE epoll_wait: 1 ready\n";

    fn one_ready(at_once: bool) -> Event {
        Event::Ready { count: "1 ready".to_owned(), at_once }
    }

    #[test]
    fn a_trace_is_drawn_step_by_step() {
        let expected = [
            arrow(LOOP, KERNEL, "epoll_wait", false),
            arrow(CLIENT, KERNEL, "connects", false),
            one_ready(false),
            arrow(LOOP, CALLBACKS, "fd 7, IN\naccept_callback", false),
            arrow(KERNEL, CALLBACKS, "accept: fd 8", true),
            arrow(LOOP, KERNEL, "epoll_wait", false),
            arrow(CLIENT, KERNEL, "sends 6 bytes\n\"hello\\n\"", false),
            one_ready(false),
            arrow(KERNEL, CALLBACKS, "read: 6 bytes from fd 8", true),
            arrow(CALLBACKS, KERNEL, "write: 6 of 6 bytes to fd 8", false),
            arrow(KERNEL, CLIENT, "gets 6 bytes\n\"hello\\n\"", true),
            arrow(LOOP, KERNEL, "epoll_wait", false),
            arrow(CLIENT, KERNEL, "closes its side\nFIN", false),
            one_ready(false),
            arrow(KERNEL, CALLBACKS, "read: 0 bytes from fd 8", true),
            arrow(KERNEL, CALLBACKS, "read: 0 bytes from fd 8, discarded", true),
        ];
        assert_eq!(events(SESSION, "\"hello\\n\""), expected);
    }

    #[test]
    fn several_clients_have_a_letter_each() {
        let lines = [
            "TRACE epoll_wait: 2 ready",
            "DEBUG 127.0.0.1:5: connected, fd 8",
            "DEBUG 127.0.0.1:6: connected, fd 9",
            "TRACE epoll_wait: 1 ready",
            "TRACE read: 2 bytes from fd 9 into IoBuf { head: 0 }",
            "TRACE write: 2 of 2 bytes to fd 9",
        ];
        let session: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let events = events(&session, "");
        let is_by = |event: &&Event| matches!(event, Event::Arrow { from, to, .. } if [*from, *to].contains(&CLIENT));
        let texts: Vec<_> = events.iter().filter(is_by).collect();
        let expected = [
            arrow(CLIENT, KERNEL, "A connects", false),
            arrow(CLIENT, KERNEL, "B connects", false),
            arrow(CLIENT, KERNEL, "B sends 2 bytes\n", false),
            arrow(KERNEL, CLIENT, "B gets 2 bytes\n", true),
        ];
        assert_eq!(texts, expected.iter().collect::<Vec<_>>());
    }

    #[test]
    fn a_wait_for_room_that_was_there_returns_at_once() {
        let waits = |lines: &[&str]| -> Vec<Event> {
            let session: String = lines.iter().map(|line| format!("TRACE {line}\n")).collect();
            let is_wait = |event: &Event| matches!(event, Event::Ready { .. });
            events(&session, "").into_iter().filter(is_wait).collect()
        };
        let (wait, swap) = ("epoll_wait: 1 ready", "epoll_ctl: fd 7, IN -> OUT");
        let (readable, room) = ("fd 8 is ready: IN", "fd 7 is ready: OUT");
        assert_eq!(waits(&[wait, swap, wait, room]), [one_ready(false), one_ready(true)]);
        // Another socket was ready first.
        let events = waits(&[wait, swap, wait, readable, wait, room]);
        assert_eq!(events, [one_ready(false), one_ready(false), one_ready(false)]);
        // The socket was full.
        let events = waits(&[wait, "write: 1 of 2 bytes to fd 7", swap, wait, room]);
        assert_eq!(events, [one_ready(false), one_ready(false)]);
    }

    #[test]
    fn a_poll_returns_pending_unless_it_is_ready() {
        let lines = ["epoll_wait: 1 ready", "fd 8 is ready: IN", "wake: task 0", "poll: task 0"];
        let later =
            ["spawn: task 1, 9 bytes", "wake: task 1", "epoll_wait: 0 ready", "poll: task 1"];
        let all = lines.iter().chain(&later).chain(&["ready: task 1"]);
        let session: String = all.map(|line| format!("TRACE {line}\n")).collect();
        let at_loop = |text: &str| Event::Note { at: LOOP, text: text.to_owned() };
        let expected = [
            arrow(LOOP, KERNEL, "epoll_wait", false),
            one_ready(false),
            at_loop("fd 8, IN -> wake: task 0"),
            arrow(LOOP, CALLBACKS, "poll: task 0", false),
            arrow(CALLBACKS, LOOP, "spawn: task 1\n9 bytes", false),
            at_loop("wake: task 1"),
            arrow(CALLBACKS, LOOP, "Pending", true),
            arrow(LOOP, KERNEL, "epoll_wait", false),
            Event::Ready { count: "0 ready".to_owned(), at_once: true },
            arrow(LOOP, CALLBACKS, "poll: task 1", false),
            arrow(CALLBACKS, LOOP, "Ready", true),
        ];
        assert_eq!(events(&session, ""), expected);
    }

    #[test]
    fn times_and_ports_do_not_change_the_picture() {
        let other = SESSION.replace("0.70", "3.9").replace("46242", "1").replace("7777", "2");
        assert_eq!(draw("a", "", SESSION, 99).unwrap(), draw("a", "", &other, 99).unwrap());
    }
}
