//! The promises of every server with a configuration file, read again on SIGHUP, from chapter 9 on.
//! [`every_config!`](crate::every_config!) turns each promise into a test.

use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{self, Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::{env, fs, thread};

use crate::every_publisher::next_message;
use crate::every_reactor::Chapter;
use crate::every_server::name;
use crate::{
    QUIET, Server, Signal, assert_bytes, assert_echo, assert_silent, frame, is_other, read,
    read_to_end, run, run_command, send_fin, served, wait_until, wait_until_taken, write,
};

/// One test per promise, for the [`Chapter`] `$chapter`.
#[macro_export]
macro_rules! every_config {
    ($chapter:expr, [$($promise:ident),* $(,)?]) => {
        mod every_config {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_config::$promise($chapter);
                }
            )*
        }
    };
    ($chapter:expr) => {
        harness::every_config!($chapter, [
            arguments_take_precedence_over_the_file_and_the_file_over_defaults,
            a_file_from_another_system_is_read_too,
            a_server_has_the_settings_of_its_file,
            a_mistake_in_the_file_is_one_line_and_nothing_starts,
            what_is_no_text_file_is_one_line_too,
            sighup_changes_the_settings_of_a_running_server,
            the_hooks_count_on_after_a_reload,
            what_only_a_restart_can_change_is_one_warning_per_sighup,
            a_file_with_a_mistake_changes_nothing,
            a_lower_limit_keeps_new_clients_out_until_enough_have_gone,
            a_higher_limit_lets_a_waiting_client_in_at_once,
            a_waiting_client_is_refused_once_that_is_what_a_full_server_does,
            a_new_idle_timeout_counts_from_the_last_activity,
            a_timeout_of_zero_is_off,
            sighup_together_with_sigterm_stops_the_server,
            a_server_under_nohup_reads_its_file_again,
            a_reload_reaches_every_busy_worker,
            a_storm_of_sighups_costs_no_reply,
        ]);
    };
}

/// The file of the C++ course.
const SERV_CONF: &str = "[reactor]\nip = 127.0.0.1\nport = 7777\nmaxConn = 1024\nthreadNum = 5\n\n";

/// A configuration file, removed at the end of its test.
pub struct Conf {
    path: PathBuf,
    exe: &'static str,
}

impl Conf {
    /// With these lines in the section `[reactor]`.
    pub fn new(chapter: Chapter, lines: &str) -> Self {
        let conf = Self::from(chapter, b"");
        conf.set(lines);
        conf
    }

    fn from(chapter: Chapter, bytes: &[u8]) -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let file = format!("{}-{}-{n}.conf", name(chapter.exe), process::id());
        let conf = Self { path: env::temp_dir().join(file), exe: chapter.exe };
        fs::write(&conf.path, bytes).unwrap();
        conf
    }

    /// Replaces it as a whole, so that the server never reads half of it.
    fn set(&self, lines: &str) {
        let new = self.path.with_extension("new");
        fs::write(&new, format!("[reactor]\n{lines}\n")).unwrap();
        fs::rename(new, &self.path).unwrap();
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// The chapter with this file, and a log of each connection.
    fn command(&self) -> Command {
        let mut command = Command::new(self.exe);
        command.args(["--config", self.path()]).env("RUST_LOG", "debug");
        command
    }

    /// Runs it with these options, until it ends.
    fn run(&self, options: &[&str]) -> Output {
        run_command(self.command().args(options))
    }

    /// Starts it with these options on a free port.
    #[track_caller]
    pub fn start(&self, options: &[&str]) -> Server {
        Server::start_talkative(self.exe, &[&["--config", self.path()], options].concat())
    }

    /// Sets the lines, and has the server read them. Returns what it logs about that.
    #[track_caller]
    pub fn reload(&self, server: &Server, lines: &str) -> String {
        self.set(lines);
        reload(server)
    }
}

impl Drop for Conf {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Has the server read its file again, and returns what it logs about that. Another program has read it
/// when it sleeps, and the text is empty.
#[track_caller]
fn reload(server: &Server) -> String {
    if is_other() {
        server.signal(Signal::SIGHUP);
        server.wait_until_asleep();
        return String::new();
    }
    let results = || -> Vec<String> {
        let log = server.log();
        log.lines().filter(|line| line.contains("settings changed: ")).map(str::to_owned).collect()
    };
    let before = results().len();
    server.signal(Signal::SIGHUP);
    wait_until("it has read its file", || results().len() > before);
    results().swap_remove(before)
}

#[track_caller]
fn assert_welcomed(server: &Server, text: &str) -> TcpStream {
    let (client, welcome) = (server.connect(), frame(101, text.as_bytes()));
    assert_bytes(read(&client, welcome.len()), &welcome);
    client
}

/// A client that comes once the server has read its file has this welcome.
#[track_caller]
fn wait_until_welcomed(server: &Server, text: &str) {
    wait_until(&format!("a client is welcomed with {text:?}"), || {
        let client = server.connect();
        // So that there is a reply if there is no welcome.
        write(&client, &frame(1, b"hello"));
        next_message(&client) == (101, text.as_bytes().to_vec())
    });
}

#[track_caller]
fn assert_refused(client: &TcpStream) {
    assert_bytes(read_to_end(client), frame(-1, b"server is full"));
}

fn ping(client: &TcpStream) {
    assert_echo(client, &frame(1, b"hello"));
}

/// What `--print-config` prints with this file and these options.
#[track_caller]
fn printed(conf: &Conf, options: &[&str]) -> String {
    let output = conf.run(&[&["--print-config"], options].concat());
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]));
    String::from_utf8(output.stdout).unwrap()
}

pub fn arguments_take_precedence_over_the_file_and_the_file_over_defaults(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's --print-config");
    let conf = Conf::from(chapter, SERV_CONF.as_bytes());
    let expected = "ip = 127.0.0.1 (file)\nport = 7777 (file)\nmaxConn = 1024 (file)\n\
        threadNum = 5 (file)\nwhenFull = refuse (default)\nidleTimeout = off (default)\n\
        frameTimeout = 30 (default)\nwelcome = (default)\n";
    assert_eq!(printed(&conf, &[]), expected);
    let options = ["--addr", "[::1]:0", "--max-conns", "9", "--frame-timeout", "0", "--welcome="];
    let expected = "ip = ::1 (argument)\nport = 0 (argument)\nmaxConn = 9 (argument)\n\
        threadNum = 5 (file)\nwhenFull = refuse (default)\nidleTimeout = off (default)\n\
        frameTimeout = off (argument)\nwelcome = (argument)\n";
    assert_eq!(printed(&conf, &options), expected);
    conf.set("port = 1\nwhenFull=wait\n\tidleTimeout = 1.5\n  frameTimeout = 0\nwelcome =");
    let expected = "ip = 127.0.0.1 (default)\nport = 1 (file)\nmaxConn = 10000 (default)\n\
        threadNum = 3 (argument)\nwhenFull = wait (file)\nidleTimeout = 1.5 (file)\n\
        frameTimeout = off (file)\nwelcome = (file)\n";
    assert_eq!(printed(&conf, &["--threads", "3"]), expected);
    conf.set("ip = ::1");
    assert!(printed(&conf, &[]).starts_with("ip = ::1 (file)\nport = 7777 (default)\n"));
    let output = run(chapter.exe, &["--print-config", "--threads", "3"]);
    let expected = "ip = 127.0.0.1 (default)\nport = 7777 (default)\nmaxConn = 10000 (default)\n\
        threadNum = 3 (argument)\nwhenFull = refuse (default)\nidleTimeout = off (default)\n\
        frameTimeout = 30 (default)\nwelcome = (default)\n";
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

/// A BOM, CRLF, comments, and what only looks like one.
pub fn a_file_from_another_system_is_read_too(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's --print-config");
    let text = "\u{feff}; serv.conf\r\n\t[reactor] \r\n#maxConn = 1\r\n ;maxConn = 2\r\n\r\n\
        maxConn = 3\r\nip = ::1\r\nport = +080\r\nwelcome = a = b; c # d\r\n";
    let conf = Conf::from(chapter, text.as_bytes());
    let printed = printed(&conf, &[]);
    assert!(printed.starts_with("ip = ::1 (file)\nport = 80 (file)\n"), "{printed}");
    assert!(printed.contains("maxConn = 3 (file)\n"), "{printed}");
    assert!(printed.ends_with("\nwelcome = a = b; c # d (file)\n"), "{printed}");
}

/// At first its address is the only thing that the test overrides.
pub fn a_server_has_the_settings_of_its_file(chapter: Chapter) {
    let server = Conf::from(chapter, SERV_CONF.as_bytes()).start(&[]);
    served(server.addr());
    let threads = |server: &Server| server.thread_names().len();
    assert!(threads(&server) == 2 + 5 || is_other());
    let conf = Conf::new(
        chapter,
        "ip = localhost\nport = 0\nthreadNum = 1\nmaxConn = 1\nwelcome = hi there",
    );
    // The command of another program always has an address.
    let server = if is_other() { conf.start(&[]) } else { Server::from(&mut conf.command()) };
    assert!(server.addr().ip().is_loopback() && server.addr().port() != 7777);
    assert!(threads(&server) == 2 + 1 || is_other());
    let _client = assert_welcomed(&server, "hi there");
    assert_refused(&server.connect());
}

/// One line that names the file, the line and the text in it, and the mistake. The option does not
/// make up for it.
pub fn a_mistake_in_the_file_is_one_line_and_nothing_starts(chapter: Chapter) {
    let keys = "unknown key, expected one of ip, port, maxConn, threadNum, whenFull, \
        idleTimeout, frameTimeout, welcome";
    let seconds = "expected a number of seconds, 0 to 86400";
    let port = "expected a port, 0 to 65535";
    for (text, line, why) in [
        ("maxConn = 1\n[reactor]", "1: maxConn = 1", "not in the section [reactor]"),
        ("\n[server]", "2: [server]", "unknown section, expected [reactor]"),
        ("[reactor]\n[reactor", "2: [reactor", "unknown section, expected [reactor]"),
        ("[reactor]\nport = 1\n[tcp]\nip = x", "3: [tcp]", "unknown section, expected [reactor]"),
        ("[reactor]\n\n#\nmaxconn = 1", "4: maxconn = 1", keys),
        ("[reactor]\n= 1", "2: = 1", keys),
        ("[reactor]\nmaxConn", "2: maxConn", "expected KEY = VALUE"),
        ("[reactor]\nmaxConn = 5\u{a0}", "2: maxConn = 5\\u{a0}", "invalid digit"),
        ("[reactor]\nmaxConn = 1\nmaxConn = 1", "3: maxConn = 1", "the key is there twice"),
        ("[reactor]\nip = ::1\n[reactor]\nip = ::1", "4: ip = ::1", "the key is there twice"),
        ("[reactor]\nip = fe80::1%nope0", "2: ip = fe80::1%nope0", "no network interface"),
        ("[reactor]\nport = 65536", "2: port = 65536", port),
        ("[reactor]\nport = -1", "2: port = -1", port),
        ("[reactor]\nport = 77x", "2: port = 77x", port),
        ("[reactor]\nport =", "2: port =", port),
        ("[reactor]\nmaxConn = 0", "2: maxConn = 0", "number would be zero"),
        ("[reactor]\nmaxConn = 10k", "2: maxConn = 10k", "invalid digit"),
        ("[reactor]\nmaxConn = 9 # or 10", "2: maxConn = 9 # or 10", "invalid digit"),
        ("[reactor]\nthreadNum = 1025", "2: threadNum = 1025", "1025 is not in 1..=1024"),
        ("[reactor]\nthreadNum = 0", "2: threadNum = 0", "0 is not in 1..=1024"),
        ("[reactor]\nwhenFull = Wait", "2: whenFull = Wait", "expected one of refuse, wait"),
        ("[reactor]\nidleTimeout = 1s", "2: idleTimeout = 1s", seconds),
        ("[reactor]\nframeTimeout = 86401", "2: frameTimeout = 86401", seconds),
        ("[reactor]\nwelcome = \u{1b}[2J\n?", "3: ?", "expected KEY = VALUE"),
        ("[reactor]\n\u{1b}[2J = \u{7}", "2: \\u{1b}[2J = \\u{7}", keys),
    ] {
        let conf = Conf::from(chapter, text.as_bytes());
        let given = ["--config", conf.path(), "--max-conns", "5", "--threads", "1"];
        let stderr = Server::fail(chapter.exe, "127.0.0.1:0", &given, 1);
        if !is_other() {
            let expected = format!("error: {}:{line}: {why}", conf.path());
            assert!(stderr.starts_with(&expected) && stderr.lines().count() == 1, "{stderr}");
            assert_one_line(&conf.run(&["--print-config"]), &expected);
        }
    }
    if is_other() {
        return;
    }
    // Of a long line only the beginning.
    let conf = Conf::new(chapter, &format!("welcome = {}", "x".repeat(65_528)));
    let line = format!("error: {}:2: welcome = {}: ", conf.path(), "x".repeat(70));
    assert_one_line(&conf.run(&["--print-config"]), &line);
}

#[track_caller]
fn assert_one_line(output: &Output, start: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(1), &b""[..]), "{stderr}");
    assert!(stderr.starts_with(start), "{stderr:?} does not start with {start:?}");
    assert_eq!(stderr.matches('\n').count(), 1, "{stderr:?}");
}

pub fn what_is_no_text_file_is_one_line_too(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's error messages");
    let assert_unread = |path: &str, why: &str| {
        let output = run(chapter.exe, &["--addr", "127.0.0.1:0", "--config", path]);
        assert_one_line(&output, &format!("error: cannot read {path}: {why}"));
    };
    assert_unread(Conf::from(chapter, b"[reactor]\nwelcome = \xff").path(), "line 2 is not UTF-8");
    assert_unread(Conf::from(chapter, &[b'\n'; (1 << 20) + 1]).path(), "larger than 1 MiB");
    printed(&Conf::from(chapter, &[b'\n'; 1 << 20]), &[]);
    assert_unread("/no/such/file", "No such file or directory");
    for path in ["/", "/dev/zero"] {
        assert_unread(path, "not a regular file");
    }
}

/// A line of the chapter's log ends like this. Passes for another program's.
#[track_caller]
fn assert_ends(line: &str, end: &str) {
    assert!(line.ends_with(end) || is_other(), "{line}");
}

pub fn sighup_changes_the_settings_of_a_running_server(chapter: Chapter) {
    let conf = Conf::new(chapter, "maxConn = 1");
    let server = conf.start(&["--frame-timeout", "20"]);
    let client = served(server.addr());
    let line = conf.reload(&server, "maxConn = 2\nwelcome = hello\nframeTimeout = 10");
    assert_ends(&line, "INFO settings changed: maxConn = 2 (file), welcome = hello (file)");
    let second = assert_welcomed(&server, "hello");
    ping(&client);
    assert_refused(&server.connect());
    // Without a line each of them is its default again, and an argument stays.
    let line = conf.reload(&server, "");
    assert_ends(&line, "settings changed: maxConn = 10000 (default), welcome = (default)");
    served(server.addr());
    assert_ends(&reload(&server), "settings changed: none");
    [client, second].iter().for_each(ping);
}

/// It also shows that the count goes on.
pub fn the_hooks_count_on_after_a_reload(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's log");
    let conf = Conf::new(chapter, "");
    let server = conf.start(&[]);
    let first = served(server.addr());
    let _second = served(server.addr());
    conf.reload(&server, "welcome = hello");
    let _third = assert_welcomed(&server, "hello");
    server.wait_for_log("on_conn_start: connections: 3");
    drop(first);
    server.wait_for_log("on_conn_close: connections: 2");
}

pub fn what_only_a_restart_can_change_is_one_warning_per_sighup(chapter: Chapter) {
    crate::chapter_only!("it reads the chapter's log");
    let conf = Conf::new(chapter, "ip = 127.0.0.1\nport = 0\nthreadNum = 1");
    let server = Server::from(&mut conf.command());
    let new = "ip = ::1\nport = 1\nthreadNum = 2\nwelcome = hello";
    for (n, changed) in [(1, "welcome = hello (file)"), (2, "none")] {
        let line = conf.reload(&server, new);
        assert!(line.ends_with(&format!("settings changed: {changed}")), "{line}");
        let warnings = || server.log().matches(" WARN ").count();
        wait_until("it warns", || warnings() == n);
        let warning = "WARN only a restart can change ip, port, threadNum\n";
        assert_eq!(server.log().matches(warning).count(), n, "{}", server.log());
    }
    assert_welcomed(&server, "hello");
    assert_eq!(server.thread_names().len(), 2 + 1);
    conf.reload(&server, "ip = 127.0.0.1\nport = 1\nthreadNum = 1");
    server.wait_for_log("only a restart can change port");
    conf.reload(&server, "ip = 127.0.0.1\nport = 0\nthreadNum = 1");
    conf.reload(&server, "ip = 127.0.0.1\nport = 0\nthreadNum = 1");
    assert_eq!(server.log().matches(" WARN ").count(), 3, "{}", server.log());
}

/// A line of the chapter's log is this warning. Passes for another program's.
#[track_caller]
fn assert_warns(line: &str, warning: &str) {
    assert!(line.contains(&format!(" WARN {warning}")) || is_other(), "{line}");
}

pub fn a_file_with_a_mistake_changes_nothing(chapter: Chapter) {
    let conf = Conf::new(chapter, "welcome = old");
    let server = conf.start(&["--threads", "2"]);
    let line = conf.reload(&server, "welcome = new\nthreadNum = two");
    let mistake = format!("{}:3: threadNum = two: invalid digit", conf.path());
    assert_warns(&line, &format!("no settings changed: {mistake}"));
    assert_welcomed(&server, "old");
    fs::remove_file(&conf.path).unwrap();
    let (line, gone) = (reload(&server), format!("cannot read {}: No such file", conf.path()));
    assert_warns(&line, &format!("no settings changed: {gone}"));
    assert_welcomed(&server, "old");
    let warnings = server.log().matches(" WARN ").count();
    assert!(warnings == 2 || is_other(), "{}", server.log());
    conf.reload(&server, "welcome = new");
    assert_welcomed(&server, "new");
    // An empty text counts as not set.
    conf.reload(&server, "welcome =");
    served(server.addr());
}

/// No client is thrown out.
pub fn a_lower_limit_keeps_new_clients_out_until_enough_have_gone(chapter: Chapter) {
    let conf = Conf::new(chapter, "maxConn = 3");
    let server = conf.start(&[]);
    let mut clients = Vec::from([(); 3].map(|()| served(server.addr())));
    conf.reload(&server, "maxConn = 1");
    while let Some(client) = clients.pop() {
        assert_refused(&server.connect());
        clients.iter().for_each(ping);
        send_fin(&client);
        assert_bytes(read_to_end(&client), b"");
    }
    served(server.addr());
}

pub fn a_higher_limit_lets_a_waiting_client_in_at_once(chapter: Chapter) {
    let conf = Conf::new(chapter, "maxConn = 1\nwhenFull = wait");
    let server = conf.start(&[]);
    let _client = served(server.addr());
    let waiting = [(); 2].map(|()| server.connect());
    waiting.iter().for_each(|client| write(client, &frame(1, b"hello")));
    assert_silent(&waiting[0]);
    conf.reload(&server, "maxConn = 2\nwhenFull = wait");
    assert_bytes(read(&waiting[0], 13), frame(1, b"hello"));
    assert_silent(&waiting[1]);
}

pub fn a_waiting_client_is_refused_once_that_is_what_a_full_server_does(chapter: Chapter) {
    let conf = Conf::new(chapter, "maxConn = 1\nwhenFull = wait");
    let server = conf.start(&[]);
    let client = served(server.addr());
    let waiting = server.connect();
    assert_silent(&waiting);
    conf.reload(&server, "maxConn = 1\nwhenFull = refuse");
    assert_refused(&waiting);
    conf.reload(&server, "maxConn = 1\nwhenFull = wait");
    let waiting = server.connect();
    write(&waiting, &frame(1, b"hello"));
    assert_silent(&waiting);
    drop(client);
    assert_bytes(read(&waiting, 13), frame(1, b"hello"));
}

/// A client that has been idle for longer is closed before the next one starts.
pub fn a_new_idle_timeout_counts_from_the_last_activity(chapter: Chapter) {
    let conf = Conf::new(chapter, "");
    let server = conf.start(&["--threads", "1"]);
    let idle = served(server.addr());
    thread::sleep(QUIET);
    conf.reload(&server, "idleTimeout = 0.1");
    // Without any other event for its worker.
    assert_bytes(read_to_end(&idle), b"");
    served(server.addr());
}

pub fn a_timeout_of_zero_is_off(chapter: Chapter) {
    let conf = Conf::new(chapter, "idleTimeout = 600\nframeTimeout = 600");
    let server = conf.start(&["--threads", "1"]);
    let [idle, midway] = [(); 2].map(|()| served(server.addr()));
    let message = frame(1, b"hello");
    write(&midway, &message[..5]);
    wait_until_taken(&midway);
    let line = conf.reload(&server, "idleTimeout = 0\nframeTimeout = 0");
    assert_ends(&line, ": idleTimeout = off (file), frameTimeout = off (file)");
    // The worker has seen them too.
    served(server.addr());
    write(&midway, &message[5..]);
    assert_bytes(read(&midway, 13), &message);
    ping(&idle);
}

pub fn sighup_together_with_sigterm_stops_the_server(chapter: Chapter) {
    let mut server = Conf::new(chapter, "").start(&[]);
    let client = served(server.addr());
    server.pause();
    for signal in [Signal::SIGHUP, Signal::SIGTERM, Signal::SIGCONT] {
        server.signal(signal);
    }
    assert_bytes(read_to_end(&client), b"");
    drop(client);
    assert_eq!(server.wait().code(), Some(0));
    server.assert_nothing_left();
}

pub fn a_server_under_nohup_reads_its_file_again(chapter: Chapter) {
    let conf = Conf::new(chapter, "");
    let server = Server::start_after("trap '' HUP; ", chapter.exe, &["--config", conf.path()]);
    conf.reload(&server, "welcome = hello");
    assert_welcomed(&server, "hello");
}

/// Ends the threads that wait for it, also when a test has failed.
pub(crate) struct Done<'a>(pub &'a AtomicBool);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

pub fn a_reload_reaches_every_busy_worker(chapter: Chapter) {
    let conf = Conf::new(chapter, "frameTimeout = 0");
    let server = conf.start(&["--threads", "4"]);
    // The workers get their clients in turn.
    let [midway, busy] = [(); 2].map(|()| [(); 4].map(|()| served(server.addr())));
    midway.iter().for_each(|client| write(client, &frame(1, b"hello")[..5]));
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _done = Done(&done);
        for client in &busy {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    ping(client)
                }
            });
        }
        conf.set("frameTimeout = 0.1\nwelcome = hello");
        server.signal(Signal::SIGHUP);
        wait_until_welcomed(&server, "hello");
        (0..4).for_each(|_| drop(assert_welcomed(&server, "hello")));
        midway.iter().for_each(|client| assert_bytes(read_to_end(client), b""));
    });
}

pub fn a_storm_of_sighups_costs_no_reply(chapter: Chapter) {
    let conf = Conf::new(chapter, "welcome = 0");
    let server = conf.start(&["--threads", "2"]);
    let done = AtomicBool::new(false);
    let come_and_go = || {
        while !done.load(Ordering::Relaxed) {
            let client = server.connect();
            assert_bytes(&read(&client, 9)[..4], 101_i32.to_le_bytes());
            (0..20).for_each(|_| ping(&client));
            send_fin(&client);
            assert_bytes(read_to_end(&client), b"");
        }
    };
    thread::scope(|scope| {
        let _done = Done(&done);
        (0..4).for_each(|_| drop(scope.spawn(come_and_go)));
        let client = assert_welcomed(&server, "0");
        for n in 0..300 {
            conf.set(&format!("welcome = {}", n % 10));
            server.signal(Signal::SIGHUP);
            ping(&client);
        }
    });
    conf.set("welcome = the last");
    server.signal(Signal::SIGHUP);
    wait_until_welcomed(&server, "the last");
    server.wait_for_log("settings changed: welcome = the last (file)");
    server.assert_not_logged(" WARN ");
}
