//! What strace(1) has seen of a server: its system calls, and among them its log, which it writes.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use regex::Regex;

/// What is recorded. Of the rest of a server's calls, a replay shows nothing.
/// Those with a question mark some processors do not have, or an older strace does not know.
const CALLS: &str = "trace=epoll_create1,?epoll_create,epoll_ctl,?epoll_wait,epoll_pwait,?epoll_pwait2,accept,accept4,\
    ?poll,ppoll,?select,pselect6,fcntl,dup,socket,read,readv,recvfrom,recvmsg,write,writev,sendto,sendmsg,close,shutdown,eventfd2,signalfd4,listen,prctl,?fork,clone";

/// How many bytes strace tells of one read or write.
pub const MOST: usize = 65_536;

/// One system call.
#[derive(Clone, Debug)]
pub struct Call {
    pub thread: String,
    pub name: String,
    /// The text between the parentheses. Strings in it are hexadecimal.
    pub args: String,
    /// A number, or the name of an error; `None` if it has not returned.
    pub result: Option<Result<i64, String>>,
    /// When it was called and when it returned, in seconds.
    pub start: f64,
    pub end: f64,
}

/// Whether strace works here: a container may forbid it.
///
/// # Errors
/// It is not installed.
pub fn works() -> Result<bool> {
    let strace = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    Ok(strace.context("this needs strace: apt install strace")?.status.success())
}

/// A command that runs another one, and records its calls in `report`.
pub fn command(report: &Path) -> Command {
    let mut strace = Command::new("strace");
    strace.args([
        "-f",
        "--seccomp-bpf",
        "-ttt",
        "-T",
        "-xx",
        "-s",
        &MOST.to_string(),
        "-e",
        CALLS,
        "-o",
    ]);
    strace.arg(report);
    strace
}

/// The calls in the order in which they returned; at the end those that have not.
pub fn parse(report: &str) -> Result<Vec<Call>> {
    let line = Regex::new(r"^(\d+) +([\d.]+) (.*)$")?;
    let call = Regex::new(r"^(\w+)\((.*)\) += (-?\d+|\?)(?: (E\w+))?.*?(?: <([\d.]+)>)?$")?;
    let mut names: HashMap<&str, String> = HashMap::new();
    let mut open: HashMap<&str, (f64, &str)> = HashMap::new();
    let mut calls = Vec::new();
    let named = |names: &HashMap<&str, String>, pid| {
        names.get(pid).cloned().unwrap_or_else(|| format!("thread {pid}"))
    };
    for text in report.lines() {
        // Signals and exits are of other forms.
        let Some(parts) = line.captures(text) else { continue };
        let (_, [pid, time, rest]) = parts.extract();
        let time: f64 = time.parse().context("a time")?;
        if names.is_empty() {
            names.insert(pid, "main".to_owned());
        }
        if let Some(begun) = rest.strip_suffix("<unfinished ...>") {
            open.insert(pid, (time, begun.trim_end()));
            continue;
        }
        let (start, text) = match rest.split_once(" resumed>") {
            Some((_, rest)) => {
                let Some((start, begun)) = open.remove(pid) else { continue };
                (start, format!("{begun}{rest}"))
            }
            None => (time, rest.to_owned()),
        };
        let Some(parts) = call.captures(&text) else { continue };
        let part = |n| parts.get(n).map_or("", |part| part.as_str());
        let (name, args) = (part(1), part(2));
        // The course's log waits for room like that.
        if matches!(name, "poll" | "ppoll") && !args.contains("POLLIN") {
            continue;
        }
        if name == "prctl" && args.starts_with("PR_SET_NAME") {
            names.insert(pid, String::from_utf8_lossy(&bytes(args)).into_owned());
        }
        // A call that a signal has ended has no number.
        let result = part(3).parse().ok();
        let returned = if start < time { time } else { start + part(5).parse().unwrap_or(0.0) };
        calls.push(Call {
            thread: named(&names, pid),
            name: name.to_owned(),
            args: args.to_owned(),
            result: result.map(|n: i64| if n < 0 { Err(part(4).to_owned()) } else { Ok(n) }),
            start,
            end: if result.is_some() { returned } else { f64::INFINITY },
        });
    }
    for (pid, (start, begun)) in open {
        let Some((name, args)) = begun.split_once('(') else { continue };
        let (thread, name, args) = (named(&names, pid), name.to_owned(), args.to_owned());
        calls.push(Call { thread, name, args, result: None, start, end: f64::INFINITY });
    }
    calls.sort_by(|a, b| a.end.total_cmp(&b.end));
    Ok(calls)
}

/// The bytes in a call's arguments: the strings in it, one after the other.
pub fn bytes(args: &str) -> Vec<u8> {
    let strings = args.split('"').skip(1).step_by(2);
    let bytes = strings.flat_map(|string| string.split("\\x").skip(1));
    bytes.filter_map(|digits| u8::from_str_radix(digits, 16).ok()).collect()
}

impl Call {
    /// The bytes that it was to write, or has read. Of long ones strace tells the beginning, dots are the rest.
    pub fn data(&self) -> Vec<u8> {
        let len = match self.name.as_str() {
            "write" | "sendto" => self.arg(2).parse().unwrap_or_default(),
            "writev" | "sendmsg" => {
                let parts = self.args.split("iov_len=").skip(1);
                let digits =
                    parts.filter_map(|part| part.split(|c: char| !c.is_ascii_digit()).next());
                digits.filter_map(|digits| digits.parse::<usize>().ok()).sum()
            }
            _ => usize::try_from(self.number().unwrap_or_default()).unwrap_or_default(),
        };
        let mut data = bytes(&self.args);
        data.resize(len.max(data.len()), b'.');
        data
    }

    /// Whether it takes a connection.
    pub fn is_accept(&self) -> bool {
        self.name.starts_with("accept")
    }

    /// Whether it reads.
    pub fn is_read(&self) -> bool {
        matches!(&*self.name, "read" | "recvfrom" | "readv" | "recvmsg")
    }

    /// Whether it writes.
    pub fn is_write(&self) -> bool {
        matches!(&*self.name, "write" | "sendto" | "writev" | "sendmsg")
    }

    /// Whether it is a wait that gets what to wait for anew each time.
    pub fn is_poll(&self) -> bool {
        matches!(&*self.name, "poll" | "ppoll" | "select" | "pselect6")
    }

    /// The first argument, which nearly always is an fd; -1 if it is no number.
    pub fn fd(&self) -> i64 {
        self.arg(0).parse().unwrap_or(-1)
    }

    /// An argument without braces, before any that has some.
    pub fn arg(&self, n: usize) -> &str {
        self.args.split(',').nth(n).unwrap_or_default().trim()
    }

    /// Whether it is one of epoll_wait's family.
    pub fn is_wait(&self) -> bool {
        self.name.starts_with("epoll_") && self.name.contains("wait")
    }

    /// The number that it has returned, if it has not failed.
    pub fn number(&self) -> Option<i64> {
        self.result.as_ref()?.as_ref().ok().copied()
    }

    /// The name of the error, if it has failed.
    pub fn error(&self) -> Option<&str> {
        self.result.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// The line of the log that it writes, without its time: level and text.
    pub fn log_line(&self) -> Option<(String, String)> {
        if self.name != "write" {
            return None;
        }
        let text = String::from_utf8(bytes(&self.args)).ok()?;
        let (time, rest) = text.trim().split_once("s ")?;
        time.parse::<f64>().ok()?;
        let (level, line) = rest.trim_start().split_once(' ')?;
        Some((level.to_owned(), line.to_owned()))
    }

    /// The events in an epoll_wait's or epoll_ctl's arguments: the flags without EPOLL, and the 64 bits.
    pub fn events(&self) -> Vec<(String, u64)> {
        let parts = self.args.split("{events=").skip(1);
        let events = parts.filter_map(|part| {
            let flags = part.split(", data=").next()?.replace("EPOLL", "");
            // Short if both are the same number.
            let data = part.split("u64=").nth(1).or_else(|| part.split("data=").nth(1))?;
            let end = data.find(|c: char| !c.is_ascii_hexdigit() && c != 'x').unwrap_or(data.len());
            let data = &data[..end];
            let number = match data.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16),
                None => data.parse(),
            };
            Some((flags, number.ok()?))
        });
        events.collect()
    }

    /// The port of the address in its arguments.
    pub fn port(&self) -> Option<u16> {
        self.args.split("port=htons(").nth(1)?.split(')').next()?.parse().ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_another_thread_interrupts_is_one() {
        let report = "7 1.0 epoll_wait(3,  <unfinished ...>\n\
            8 1.5 prctl(PR_SET_NAME, \"\\x77\\x30\") = 0 <0.000010>\n\
            8 1.6 write(4, \"\\x31\\x73\\x20\\x20\\x49\\x4e\\x46\\x4f\\x20\\x61\\x0a\", 9) = 9 <0.1>\n\
            7 2.0 <... epoll_wait resumed>[{events=EPOLLIN|EPOLLHUP, data={u32=2, u64=4294967298}}], 9, -1) = 1 <1.0>\n\
            7 3.0 --- SIGINT {si_signo=SIGINT} ---\n\
            8 4.0 accept4(5, NULL, NULL, 0) = -1 EAGAIN (Resource temporarily unavailable) <0.1>\n\
            7 5.0 epoll_wait(3, [], 9, -1) = ? ERESTARTSYS (To be restarted) <0.1>\n";
        let calls = parse(report).unwrap();
        let names: Vec<_> = calls.iter().map(|call| (&*call.thread, &*call.name)).collect();
        let expected = [
            ("w0", "prctl"),
            ("w0", "write"),
            ("main", "epoll_wait"),
            ("w0", "accept4"),
            ("main", "epoll_wait"),
        ];
        assert_eq!(names, expected);
        assert_eq!(calls[1].log_line(), Some(("INFO".to_owned(), "a".to_owned())));
        assert_eq!((calls[2].start, calls[2].end, calls[2].number()), (1.0, 2.0, Some(1)));
        assert_eq!(calls[2].events(), [("IN|HUP".to_owned(), 4_294_967_298)]);
        assert_eq!((calls[3].error(), calls[3].fd()), (Some("EAGAIN"), 5));
        assert_eq!(calls[4].result, None);
    }
}
