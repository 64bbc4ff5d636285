//! A server's trace as a sequence diagram: what calls what, in the order in which it happened.
//!
//! The trace is a console block of the page, under a comment `sequence: FILE`.

use std::fmt::Write;

use anyhow::{Context, ensure};

/// The three participants, from left to right, and where each has its line.
const KERNEL: i32 = 60;
const LOOP: i32 = 200;
const CALLBACKS: i32 = 385;

const WIDTH: i32 = 445;
const TOP: i32 = 52;
const STEP: i32 = 30;

/// What one line of the trace is in the picture.
#[derive(Debug, PartialEq, Eq)]
enum Event {
    /// A call from one to another, or what it returns.
    Arrow { from: i32, to: i32, text: String, returns: bool },
    /// Something that the callbacks find out for themselves.
    Note(String),
}

/// The SVG of a session's trace; an error if it has none.
pub fn draw(session: &str) -> anyhow::Result<String> {
    let events = events(session);
    ensure!(!events.is_empty(), "there is no trace in it");
    let height = TOP + STEP * i32::try_from(events.len()).context("a short trace")? + 20;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <title>The trace of a session as a sequence diagram</title>\n\
         <!-- Drawn by `cargo xtask docs` from the trace in the page. -->\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" rx=\"10\" fill=\"#fbfaf7\" stroke=\"#c9c4b8\"/>\n\
         <defs><marker id=\"head\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"8\" \
         markerHeight=\"8\" orient=\"auto\"><path d=\"M0 0L8 4L0 8z\" fill=\"#33415c\"/></marker></defs>\n"
    );
    for (at, name, fill) in [
        (KERNEL, "kernel", "#e4e1d8"),
        (LOOP, "EventLoop", "#d3e3f5"),
        (CALLBACKS, "callbacks", "#d8ecd9"),
    ] {
        writeln!(
            svg,
            "<path d=\"M{at} 40V{}\" stroke=\"#c9c4b8\" stroke-dasharray=\"3 3\"/>\
             <rect x=\"{}\" y=\"14\" width=\"92\" height=\"26\" rx=\"6\" fill=\"{fill}\" stroke=\"#33415c\"/>\
             <text x=\"{at}\" y=\"31\" text-anchor=\"middle\" fill=\"#1d2433\">{name}</text>",
            height - 12,
            at - 46
        )?;
    }
    for (number, event) in (1..).zip(&events) {
        let y = TOP + STEP * number - 4;
        match event {
            Event::Arrow { from, to, text, returns } => {
                let inset = if from < to { 2 } else { -2 };
                let dashes = if *returns { " stroke-dasharray=\"5 3\"" } else { "" };
                writeln!(
                    svg,
                    "<path d=\"M{} {y}H{}\" stroke=\"#33415c\"{dashes} marker-end=\"url(#head)\"/>{}",
                    from + inset,
                    to - inset,
                    label((from + to) / 2, y - 5, text)
                )?;
            }
            Event::Note(text) => {
                writeln!(svg, "{}", label(CALLBACKS - 40, y - 2, text))?;
            }
        }
    }
    Ok(svg + "</svg>\n")
}

/// Text with an outline, since the line of the participant in the middle may cross it.
fn label(x: i32, y: i32, text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace("->", "\u{2192}");
    format!(
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" fill=\"#1d2433\" stroke=\"#fbfaf7\" \
         stroke-width=\"4\" paint-order=\"stroke\">{text}</text>"
    )
}

fn arrow(from: i32, to: i32, text: &str, returns: bool) -> Event {
    Event::Arrow { from, to, text: text.to_owned(), returns }
}

fn events(session: &str) -> Vec<Event> {
    let mut events: Vec<Event> = Vec::new();
    // Drawn with the next line, which says what is called.
    let mut ready = String::new();
    // How a server starts and stops is not drawn.
    for line in session.lines().take_while(|line| *line != "^C") {
        let Some((_, line)) = line.split_once("TRACE ").or(line.split_once("DEBUG ")) else {
            continue;
        };
        if events.is_empty() && !line.starts_with("epoll_wait") {
            continue;
        }
        events.push(if line.starts_with("epoll_wait") {
            arrow(KERNEL, LOOP, line, true)
        } else if let Some((fd, flags)) = line.split_once(" is ready: ") {
            ready = format!("{fd}, {flags}: ");
            continue;
        } else if line.ends_with("_callback") {
            arrow(LOOP, CALLBACKS, &(std::mem::take(&mut ready) + line), false)
        } else if line.starts_with("epoll_ctl") || line.starts_with("write: ") {
            arrow(CALLBACKS, KERNEL, line, false)
        } else if line.starts_with("read: ") {
            let text = line.split(" into ").next().unwrap_or(line);
            arrow(KERNEL, CALLBACKS, text, true)
        } else if let Some((_, what)) = line.split_once(": connected, ") {
            arrow(KERNEL, CALLBACKS, &format!("accept: {what}"), true)
        } else if line.ends_with(": closed") {
            Event::Note("the client has closed".to_owned())
        } else if line.starts_with("message: ") {
            Event::Note(line.to_owned())
        } else {
            continue;
        });
    }
    events
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SESSION: &str = "$ RUST_LOG=trace cargo run -q -p reactor-v03\n   \
        0.000254341s  INFO listening on 127.0.0.1:7777\n   \
        0.000262364s TRACE epoll_ctl: add fd 7, IN\n   \
        0.706871847s TRACE epoll_wait: 1 ready\n   \
        0.706941936s TRACE fd 7 is ready: IN\n   \
        0.706950601s TRACE accept_callback\n   \
        0.707345785s DEBUG 127.0.0.1:46242: connected, fd 8\nhello\n";

    #[test]
    fn a_trace_is_drawn_step_by_step() {
        let expected = [
            arrow(KERNEL, LOOP, "epoll_wait: 1 ready", true),
            arrow(LOOP, CALLBACKS, "fd 7, IN: accept_callback", false),
            arrow(KERNEL, CALLBACKS, "accept: fd 8", true),
        ];
        assert_eq!(events(SESSION), expected);
    }

    #[test]
    fn times_and_ports_do_not_change_the_picture() {
        let other = SESSION.replace("0.706", "3.9").replace("46242", "1").replace("7777", "2");
        assert_eq!(draw(SESSION).unwrap(), draw(&other).unwrap());
    }
}
