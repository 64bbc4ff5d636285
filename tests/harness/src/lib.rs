//! The test harness: runs a chapter's binary, connects to it over real sockets and observes it.
//!
//! Or another program, in any language: REACTOR_CMD is its command, such as `./mine --addr {addr}`,
//! relative to the user's directory. `{addr}` is replaced by the address that the test asks for, or
//! one with a free port. The chapter's options follow it, such as `--max-conns 10`, if a test has any.
//!
//! Every wait in here is for a condition, and panics after [`LIMIT`] at the caller's line.

// A test that cannot get a socket or a process has failed, so it may panic.
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod every_config;
pub mod every_hook;
pub mod every_limiter;
pub mod every_messenger;
pub mod every_pool;
pub mod every_publisher;
pub mod every_reactor;
pub mod every_router;
pub mod every_server;
pub mod every_udp;

use std::collections::VecDeque;
use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, LazyLock, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal;
pub use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt::Linger, sockopt::RcvBuf};
use nix::unistd::Pid;

/// The time limit for everything: far more than anything needs, so that only a hang reaches it.
pub const LIMIT: Duration = Duration::from_secs(30);

/// The same for what another program is to do: REACTOR_LIMIT, in seconds, or [`LIMIT`].
static PATIENCE: LazyLock<Duration> = LazyLock::new(|| {
    let seconds = env::var("REACTOR_LIMIT").ok().and_then(|seconds| seconds.parse().ok());
    seconds.map_or(LIMIT, Duration::from_secs)
});

/// How long to watch when nothing should happen.
pub const QUIET: Duration = Duration::from_millis(300);

/// Waits until `condition` holds.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < *PATIENCE,
            "timed out after {:?}, waiting until {what}",
            *PATIENCE
        );
        thread::sleep(Duration::from_millis(2));
    }
}

/// The command of another program to test, if there is one.
fn reactor_cmd() -> Option<&'static str> {
    static COMMAND: LazyLock<Option<String>> =
        LazyLock::new(|| env::var("REACTOR_CMD").ok().filter(|command| !command.is_empty()));
    COMMAND.as_deref()
}

/// Whether another program is tested.
pub fn is_other() -> bool {
    reactor_cmd().is_some()
}

/// The binary `exe` for `addr`, with options of its chapter, after the shell's `setup`; or if another
/// program is tested, that one.
pub fn program(setup: &str, exe: &str, addr: &str, options: &[&str]) -> Command {
    let mut shell = Command::new("sh");
    let command = match reactor_cmd() {
        Some(command) => {
            assert!(command.contains("{addr}"), "REACTOR_CMD does not contain {{addr}}: {command}");
            // Cargo runs tests in another directory than the user's, but keeps PWD.
            shell.current_dir(env::var_os("PWD").unwrap_or_else(|| ".".into()));
            command.replace("{addr}", addr)
        }
        None => format!("\"$0\" --addr '{addr}'"),
    };
    // `exec`, so that the pid, signals and limits are the program's own.
    let script = format!("{setup}exec {command} \"$@\"");
    shell.args(["-c", &script, exe]).args(options).env_remove("RUST_LOG");
    shell
}

/// Checks that another program has failed, and said something about it.
#[track_caller]
pub fn assert_failed(output: &Output) {
    let (code, stderr) = (output.status.code(), String::from_utf8_lossy(&output.stderr));
    assert!(
        code.is_some_and(|code| code != 0),
        "expected: it fails; got: {}, {stderr}",
        output.status
    );
    assert!(!stderr.is_empty(), "expected: it says on stderr why it fails");
}

/// When another program is tested, skips a test that only the chapter's own program can pass.
#[macro_export]
macro_rules! chapter_only {
    ($why:literal) => {
        // The closure is named after the function that it is in.
        if $crate::is_skipped(std::any::type_name_of_val(&|| ()), $why) {
            return;
        }
    };
}

/// Whether another program is tested; if so, reports the skipped test. For [`chapter_only!`].
pub fn is_skipped(closure: &str, why: &str) -> bool {
    let skipped = is_other();
    if skipped {
        let path = closure.trim_end_matches("::{{closure}}");
        let test = path.split_once("::").map_or(path, |(_, test)| test);
        // Not with `eprintln!`, whose output libtest hides if the test passes.
        io::stderr().write_all(format!("skipped: {test}: {why}\n").as_bytes()).unwrap();
    }
    skipped
}

/// A running process with its stderr so far. Killed when dropped.
pub struct Process {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Process {
    /// Starts `command` with its stderr collected.
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the binary starts");
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = BufReader::new(child.stderr.take().expect("stderr is a pipe"));
        let lines = Arc::clone(&log);
        thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                let mut lines = lines.lock().unwrap();
                lines.push_str(&String::from_utf8_lossy(&line));
                lines.push('\n');
                // Another program may write without end. Only its last lines are shown.
                if is_other() && lines.len() > MAX_LOG {
                    *lines = last_lines(&lines, MAX_LOG / 2).to_owned();
                }
            }
        });
        Self { child, log }
    }

    /// What it has written to stderr so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a line on stderr that contains `text`, and returns it.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        let start = Instant::now();
        loop {
            let log = self.log();
            if let Some(line) = log.lines().find(|line| line.contains(text)) {
                return line.to_owned();
            }
            assert!(start.elapsed() < LIMIT, "no {text:?} in the log:\n{log}");
            if self.has_ended() {
                // Its last output may still be in the pipe.
                thread::sleep(QUIET);
                let log = self.log();
                let line = log.lines().find(|line| line.contains(text));
                return line.unwrap_or_else(|| panic!("ended with {log:?}")).to_owned();
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// The process itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id.
    pub fn pid(&self) -> Pid {
        pid(&self.child)
    }

    /// Sends it a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        signal::kill(self.pid(), signal).expect("the process is running");
    }

    /// Stops all of its threads, until it gets a SIGCONT.
    #[track_caller]
    pub fn pause(&self) {
        self.signal(Signal::SIGSTOP);
        wait_until("it is stopped", || {
            // T, or t under strace.
            self.threads_are("Tt")
        });
    }

    /// Whether it has not ended yet.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Whether it has ended. Does not reap it.
    fn has_ended(&self) -> bool {
        let stat = fs::read_to_string(self.proc("stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_until("the process ends", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.expect("it has ended")
    }

    /// Raises its soft limit on fds to `limit`, if its hard limit is not lower.
    #[track_caller]
    pub fn allow_fds(&self, limit: u32) {
        let pid = format!("--pid={}", self.child.id());
        let limit = format!("--nofile={limit}:");
        let status = Command::new("prlimit").args([&pid, &limit]).status();
        assert!(status.expect("util-linux is installed").success());
    }

    /// How many fds it has open.
    pub fn fds(&self) -> usize {
        fs::read_dir(self.proc("fd")).unwrap().count()
    }

    /// The CPU time that it has used.
    pub fn cpu(&self) -> Duration {
        let stat = fs::read_to_string(self.proc("stat")).unwrap();
        // The fields after the name, which may contain spaces: utime and stime are the 14th and
        // 15th in proc_pid_stat(5), in ticks of 10 ms.
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    /// A number in proc_pid_status(5), for example `VmRSS` (in kB).
    #[track_caller]
    pub fn status(&self, name: &str) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(name)).expect("a known field");
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Checks that it has at most `limit` KiB more resident memory than `before`, which is in KiB too. Another
    /// program may use other buffers, or collect its garbage later.
    #[track_caller]
    pub fn assert_grown_at_most(&self, limit: u64, before: u64) {
        let grown = self.status("VmRSS").saturating_sub(before);
        let limit = if is_other() { 2 * limit + 16_384 } else { limit };
        assert!(grown < limit, "its memory has grown by {grown} KiB, and may by {limit} KiB");
    }

    /// Whether each of its threads is in one of these states, letters from proc_pid_stat(5).
    #[track_caller]
    pub fn threads_are(&self, states: &str) -> bool {
        self.threads("State:").iter().all(|(_, state)| states.contains(state))
    }

    /// The name of each of its threads, and a field in proc_pid_status(5), such as `SigBlk:`.
    #[track_caller]
    pub fn threads(&self, field: &str) -> Vec<(String, String)> {
        let tasks = fs::read_dir(self.proc("task")).unwrap().flatten();
        let texts = tasks.flat_map(|task| fs::read_to_string(task.path().join("status")));
        let value = |text: &str, name: &str| {
            let line = text.lines().find(|line| line.starts_with(name)).expect("a known field");
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        texts.map(|text| (value(&text, "Name:"), value(&text, field))).collect()
    }

    /// The names of its threads, in alphabetical order.
    pub fn thread_names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.threads("Pid:").into_iter().map(|it| it.0).collect();
        names.sort();
        names
    }

    /// How often its threads have gone to sleep.
    pub fn wake_ups(&self) -> u64 {
        let counts = self.threads("voluntary_ctxt_switches:");
        counts.iter().map(|(_, count)| count.parse::<u64>().unwrap()).sum()
    }

    /// How many fds each of its epoll instances watches, the oldest instance first.
    pub fn epoll_sizes(&self) -> Vec<usize> {
        let fds = fs::read_dir(self.proc("fd")).unwrap().flatten();
        let is_epoll = |path: PathBuf| {
            fs::read_link(path).is_ok_and(|it| it.ends_with("anon_inode:[eventpoll]"))
        };
        let mut instances: Vec<u32> = fds
            .filter(|fd| is_epoll(fd.path()))
            .map(|fd| fd.file_name().to_str().unwrap().parse().unwrap())
            .collect();
        instances.sort_unstable();
        let info = |fd| fs::read_to_string(self.proc(&format!("fdinfo/{fd}"))).unwrap();
        instances.iter().map(|fd| info(fd).matches("tfd:").count()).collect()
    }

    /// Waits until it sleeps, which means that for more than a second it has neither woken up nor run: a
    /// process that never goes to sleep doesn't wake up either.
    #[track_caller]
    pub fn wait_until_asleep(&self) {
        wait_until("it sleeps", || {
            let before = (self.wake_ups(), self.cpu());
            thread::sleep(4 * QUIET);
            (self.wake_ups(), self.cpu()) == before
        });
    }

    /// Whether it listens on `port`, and if so, whether on an IPv6 address. Asks /proc, because the
    /// server would notice a connection.
    fn listens_on(&self, port: u16) -> Option<bool> {
        let fds = fs::read_dir(self.proc("fd")).ok()?.flatten();
        let files: Vec<PathBuf> = fds.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        let table = |name| fs::read_to_string(self.proc(name)).unwrap_or_default();
        let (table, port) = (table("net/tcp") + &table("net/tcp6"), format!(":{port:04X}"));
        table.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (local, state) = (fields[1], fields[3]);
            let listens = local.ends_with(&port) && state == "0A";
            // Only its own socket counts: another program may have got the port in the meantime.
            let own = || files.contains(&format!("socket:[{}]", fields[9]).into());
            // Eight digits are an IPv4 address; with this prefix, it is an IPv4-mapped one.
            let ipv6 = local.len() > 13 && !local.starts_with("0000000000000000FFFF0000");
            (listens && own()).then_some(ipv6)
        })
    }

    fn proc(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{file}", self.child.id()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() && is_other() {
            for (client, len, start) in SENT.lock().unwrap().iter() {
                eprintln!("sent     {} ({client}: {len} bytes)", hex_line(start));
            }
            // It may be about to end, and its last output may still be in the pipe.
            thread::sleep(QUIET);
            if let Ok(Some(status)) = self.child.try_wait() {
                eprintln!("The program has ended: {status}");
            }
            eprintln!("The program's output:\n{}", last_lines(&self.log(), 2000));
        }
        // First those that it has started, as long as they are its own.
        if is_other() {
            descendants(self.pid()).into_iter().for_each(|pid| {
                let _ = signal::kill(pid, Signal::SIGKILL);
            });
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How many bytes of another program's output are kept.
const MAX_LOG: usize = 1 << 16;

/// The last whole lines of `text` that have at most `len` bytes in all.
fn last_lines(text: &str, len: usize) -> &str {
    let skipped = &text.as_bytes()[..text.len().saturating_sub(len)];
    let newline = text.as_bytes()[skipped.len()..].iter().position(|byte| *byte == b'\n');
    // After a newline, a character begins.
    let start = if skipped.is_empty() { 0 } else { skipped.len() + newline.map_or(0, |at| at + 1) };
    text.get(start..).unwrap_or_default()
}

/// The processes that `pid` has started, and those that they have started.
fn descendants(pid: Pid) -> Vec<Pid> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let children = tasks.flat_map(|task| fs::read_to_string(task.path().join("children")));
    let children: Vec<String> = children.collect();
    let children = children.iter().flat_map(|pids| pids.split_whitespace());
    let children = children.filter_map(|pid| pid.parse().ok().map(Pid::from_raw));
    children.flat_map(|pid| [descendants(pid), vec![pid]].concat()).collect()
}

/// A server that listens on a free port.
pub struct Server {
    process: Process,
    addr: SocketAddr,
}

impl std::ops::Deref for Server {
    type Target = Process;

    fn deref(&self) -> &Process {
        &self.process
    }
}

impl std::ops::DerefMut for Server {
    fn deref_mut(&mut self) -> &mut Process {
        &mut self.process
    }
}

impl Server {
    /// Starts the server `exe` on a free port.
    #[track_caller]
    pub fn start(exe: &str) -> Self {
        Self::start_on(exe, "127.0.0.1:0")
    }

    /// Starts the server `exe` on `addr`.
    #[track_caller]
    pub fn start_on(exe: &str, addr: &str) -> Self {
        if is_other() {
            return Self::start_other(addr, "", &[], None);
        }
        Self::from(Command::new(exe).args(["--addr", addr]).env_remove("RUST_LOG"))
    }

    /// Starts the server `exe` on a free port, with options of its chapter.
    #[track_caller]
    pub fn start_with(exe: &str, options: &[&str]) -> Self {
        if is_other() {
            return Self::start_other("127.0.0.1:0", "", options, None);
        }
        let mut command = Command::new(exe);
        Self::from(command.args(["--addr", "127.0.0.1:0"]).args(options).env_remove("RUST_LOG"))
    }

    /// [`start_with`](Self::start_with), and the chapter logs each connection.
    #[track_caller]
    pub fn start_talkative(exe: &str, options: &[&str]) -> Self {
        if is_other() {
            return Self::start_with(exe, options);
        }
        let mut command = Command::new(exe);
        Self::from(command.args(["--addr", "127.0.0.1:0"]).args(options).env("RUST_LOG", "debug"))
    }

    /// Starts the server `exe` on a free port, with this standard output.
    #[track_caller]
    pub fn start_printing(exe: &str, stdout: OwnedFd) -> Self {
        if is_other() {
            return Self::start_other("127.0.0.1:0", "", &[], Some(stdout));
        }
        Self::from(program("", exe, "127.0.0.1:0", &[]).stdout(stdout))
    }

    /// Starts the server `exe` on a free port under `limit`, the arguments of the shell's ulimit:
    /// `-n 64` for a hard limit of 64 fds, `-Sn 64` for a soft one.
    #[track_caller]
    pub fn start_under(exe: &str, limit: &str) -> Self {
        // Otherwise malloc(3) may map 64 MiB per thread, which count towards the limit on memory.
        Self::start_after(&format!("export MALLOC_ARENA_MAX=1; ulimit {limit}; "), exe, &[])
    }

    /// Starts the server `exe` on a free port, with options of its chapter, after the shell's `setup`.
    #[track_caller]
    pub fn start_after(setup: &str, exe: &str, options: &[&str]) -> Self {
        if is_other() {
            return Self::start_other("127.0.0.1:0", setup, options, None);
        }
        Self::from(&mut program(setup, exe, "127.0.0.1:0", options))
    }

    /// Runs the server `exe` on `addr`, with options of its chapter, and checks that it ends with
    /// `code`. Returns its stderr. Of another program it checks that it fails and says
    /// something, and returns an empty text.
    #[track_caller]
    pub fn fail(exe: &str, addr: &str, options: &[&str], code: i32) -> String {
        let output = run_command(&mut program("", exe, addr, options));
        let stderr = String::from_utf8_lossy(&output.stderr);
        if is_other() {
            assert_failed(&output);
            return String::new();
        }
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(code), &b""[..]), "{stderr}");
        stderr.into_owned()
    }

    /// Starts a server with `command` and waits until its log says where it listens.
    #[track_caller]
    pub fn from(command: &mut Command) -> Self {
        raise_fd_limit();
        let process = Process::start(command);
        let line = process.wait_for_log("listening on ");
        let addr = line.split("listening on ").nth(1).unwrap().parse().expect("an address");
        // A worker may sleep for a moment before it has set up its loop.
        wait_until("all threads wait for events", || {
            let threads = process.threads("State:");
            let workers = threads.iter().filter(|it| it.0.starts_with("worker-")).count();
            let have_loops = workers == 0 || process.epoll_sizes().len() > workers;
            have_loops && threads.iter().all(|(_, state)| state == "S")
        });
        Self { process, addr }
    }

    /// Starts the other program with `options`, after the shell's `setup`, and waits until it listens.
    #[track_caller]
    fn start_other(addr: &str, setup: &str, options: &[&str], stdout: Option<OwnedFd>) -> Self {
        raise_fd_limit();
        let host = addr.rsplit_once(':').expect("HOST:PORT").0;
        let mut tries = 1..=10;
        loop {
            let listener = match TcpListener::bind(addr) {
                Ok(listener) => listener,
                Err(err) => panic!("no server can listen on {addr} now: {err}"),
            };
            let port = listener.local_addr().unwrap().port();
            drop(listener);
            let addr = format!("{host}:{port}");
            let mut command = match &stdout {
                Some(stdout) => {
                    let mut command = program(setup, "", &addr, options);
                    command.stdout(stdout.try_clone().unwrap());
                    command
                }
                None => program(&format!("{setup}exec >&2; "), "", &addr, options),
            };
            let process = Process::start(command.stdin(Stdio::null()));

            let start = Instant::now();
            while start.elapsed() < *PATIENCE && !process.has_ended() {
                if let Some(ipv6) = process.listens_on(port) {
                    // It may still have to open an fd for its event loop.
                    thread::sleep(QUIET / 3);
                    let addrs: Vec<SocketAddr> = addr.to_socket_addrs().unwrap().collect();
                    let addr = addrs.iter().find(|addr| addr.is_ipv6() == ipv6);
                    return Self { process, addr: *addr.unwrap_or(&addrs[0]) };
                }
                thread::sleep(Duration::from_millis(5));
            }
            let is_taken = || TcpListener::bind(&addr).is_err() || UdpSocket::bind(&addr).is_err();
            let lost_its_port = process.has_ended() && is_taken();
            if !lost_its_port || tries.next().is_none() {
                let command = reactor_cmd().unwrap_or_default().replace("{addr}", &addr);
                let words = [&[&*command], options].concat().join(" ");
                let what = if process.has_ended() { "ended" } else { "ran" };
                let who = if TcpStream::connect(&addr).is_ok() {
                    "; another process does, but it has to be the command's own (a shell can `exec` a server)"
                } else if process.has_ended() {
                    ""
                } else {
                    "; timed out"
                };
                panic!("{what} without listening on {addr}: {setup}{words}{who}");
            }
        }
    }

    /// Waits for a line in the chapter's log. Another program does not need to log it: then this
    /// returns an empty line at once.
    #[track_caller]
    pub fn wait_for_log(&self, text: &str) -> String {
        if is_other() { String::new() } else { self.process.wait_for_log(text) }
    }

    /// Checks in the chapter's log that its shutdown has left nothing behind, on any thread. Passes
    /// for another program.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        let text = "stopped; cut off: 0; still registered: 0; buffers: 0 B in use";
        self.wait_for_log(&format!("INFO {text}"));
        let log = self.log();
        let mut lines = log.lines().filter(|line| line.contains("stopped; "));
        assert!(lines.all(|line| line.contains(text)), "{log}");
    }

    /// Checks that the chapter's log contains `text` exactly once. Passes for another program.
    #[track_caller]
    pub fn assert_logged_once(&self, text: &str) {
        let log = self.log();
        let once = log.matches(text).count() == 1;
        assert!(once || is_other(), "{text:?} in the log:\n{log}");
    }

    /// Checks that the chapter's log does not contain `text`. Passes for another program.
    #[track_caller]
    pub fn assert_not_logged(&self, text: &str) {
        let log = self.log();
        assert!(!log.contains(text) || is_other(), "{text:?} in the log:\n{log}");
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Connects to it. Reads and writes that take longer than [`LIMIT`] fail.
    #[track_caller]
    pub fn connect(&self) -> TcpStream {
        connect(self.addr)
    }
}

/// Connects to `addr`. Reads and writes that take longer than [`LIMIT`] fail.
#[track_caller]
pub fn connect(addr: SocketAddr) -> TcpStream {
    let stream = match TcpStream::connect_timeout(&addr, *PATIENCE) {
        Ok(stream) => stream,
        Err(err) => panic!("connecting: {}", meaning(&err)),
    };
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
    stream.set_write_timeout(Some(*PATIENCE)).unwrap();
    stream
}

/// Connects to `addr` and exchanges a message of chapter 4, so this client has a place.
#[track_caller]
pub fn served(addr: SocketAddr) -> TcpStream {
    let client = connect(addr);
    assert_echo(&client, &frame(1, b"hello"));
    client
}

/// Reads exactly `n` bytes.
#[track_caller]
pub fn read(stream: &TcpStream, n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    let result = stream.take(n as u64).read_to_end(&mut bytes);
    match (result, bytes.len()) {
        (Ok(_), len) if len == n => bytes,
        (Ok(_), len) => panic!(
            "the server closed the connection after {len} of {n} bytes: it gave up too early, or took \
             something else for the end"
        ),
        (Err(err), len) => panic!("after {len} of {n} bytes: {}", meaning(&err)),
    }
}

/// What an error of a socket probably means.
fn meaning(err: &io::Error) -> String {
    let why = match err.kind() {
        io::ErrorKind::WouldBlock => {
            return format!(
                "timed out after {:?}: the server waits for something else, such as another client, \
                 or it has missed an event",
                *PATIENCE
            );
        }
        io::ErrorKind::TimedOut => "its accept queue is full: it does not accept, or has stopped",
        io::ErrorKind::ConnectionRefused => "it does not listen any more: it has ended",
        io::ErrorKind::ConnectionReset => {
            "the server has ended, or has closed its socket while there was something to read"
        }
        io::ErrorKind::BrokenPipe => "the server has closed the connection before this",
        _ => return err.to_string(),
    };
    format!("{err}: {why}")
}

/// The last writes to another program, for the report: the client's address, the length, and the start.
static SENT: Mutex<VecDeque<(SocketAddr, usize, Vec<u8>)>> = Mutex::new(VecDeque::new());

/// Keeps the last few writes to another program.
fn note_sent(stream: &TcpStream, bytes: &[u8]) {
    if !is_other() {
        return;
    }
    let Ok(client) = stream.local_addr() else { return };
    let mut sent = SENT.lock().unwrap();
    sent.push_back((client, bytes.len(), bytes[..bytes.len().min(WIDTH)].to_vec()));
    if sent.len() > 3 {
        sent.pop_front();
    }
}

/// Reads until the peer closes. A reset is a failure.
#[track_caller]
pub fn read_to_end(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => bytes,
        Err(err) => panic!("after {} bytes: {}", bytes.len(), meaning(&err)),
    }
}

/// Makes the receive buffer small, so that the peer's writes are partial.
pub fn narrow(stream: &TcpStream) {
    setsockopt(stream, RcvBuf, &32_768).unwrap();
}

/// [`read_to_end`] in small pieces, with pauses in between.
#[track_caller]
pub fn read_slowly(mut stream: &TcpStream) -> Vec<u8> {
    let mut received = Vec::new();
    let mut block = vec![0; 10_000];
    for n in 0.. {
        match stream.read(&mut block) {
            Ok(0) => break,
            Ok(len) => received.extend_from_slice(&block[..len]),
            Err(err) => panic!("after {} bytes: {}", received.len(), meaning(&err)),
        }
        if n % 16 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    received
}

/// Writes all of `bytes`.
#[track_caller]
pub fn write(mut stream: &TcpStream, bytes: &[u8]) {
    note_sent(stream, bytes);
    if let Err(err) = stream.write_all(bytes) {
        panic!("writing {} bytes: {}", bytes.len(), meaning(&err));
    }
}

/// Sends FIN: nothing more comes from this side.
#[track_caller]
pub fn send_fin(stream: &TcpStream) {
    match stream.shutdown(Shutdown::Write) {
        // The peer has reset the connection. The next read says so.
        Err(err) if err.kind() == io::ErrorKind::NotConnected => {}
        result => result.unwrap(),
    }
}

/// How many of the bytes written to it are still on this side, as far as this side knows.
pub fn unacknowledged(stream: &TcpStream) -> usize {
    own_socket(stream).to_send
}

/// How many bytes have arrived at the peer, on this machine, which has not read them.
pub fn unread(stream: &TcpStream) -> usize {
    peer_socket(stream).to_read
}

/// How many bytes the peer, on this machine, has written that this side has not read.
pub fn queued_by_peer(stream: &TcpStream) -> usize {
    peer_socket(stream).to_send + own_socket(stream).to_read
}

/// Waits until the peer, on this machine, has read everything that was written to it.
#[track_caller]
pub fn wait_until_taken(stream: &TcpStream) {
    wait_until("the peer has read everything", || {
        let Socket { state, to_read, .. } = peer_socket(stream);
        assert!(!state.is_empty(), "the server has closed the connection");
        to_read == 0
    });
}

/// Waits until the peer, on this machine, has closed its end or shut it down for writing.
#[track_caller]
pub fn wait_until_closing(stream: &TcpStream) {
    wait_until("the peer has closed", || is_closing(stream));
}

/// Whether the peer, on this machine, has closed its end or shut it down for writing.
pub fn is_closing(stream: &TcpStream) -> bool {
    // FIN_WAIT1 and FIN_WAIT2: its FIN may still wait for room on this side. Or it has closed.
    ["04", "05", ""].contains(&&*peer_socket(stream).state)
}

/// Waits until the peer, on this machine, has accepted the connection.
#[track_caller]
pub fn wait_until_accepted(stream: &TcpStream) {
    // It may have closed it already.
    let is_accepted = || !["", "0"].contains(&&*peer_socket(stream).inode) || is_closing(stream);
    wait_until("the peer has accepted", is_accepted);
}

/// Fields from /proc/net/tcp. Empty and 0 if there is no such socket.
#[derive(Default)]
struct Socket {
    /// In hexadecimal.
    state: String,
    /// In bytes, with those that are sent but not acknowledged.
    to_send: usize,
    /// In bytes.
    to_read: usize,
    /// 0 while it belongs to no file: not accepted yet, or closed.
    inode: String,
}

fn own_socket(stream: &TcpStream) -> Socket {
    socket(stream.local_addr(), stream.peer_addr())
}

/// The other end, on this machine.
fn peer_socket(stream: &TcpStream) -> Socket {
    socket(stream.peer_addr(), stream.local_addr())
}

fn socket(local: io::Result<SocketAddr>, remote: io::Result<SocketAddr>) -> Socket {
    // A connection that was reset no longer has a peer.
    let (Ok(local), Ok(remote)) = (local, remote) else { return Socket::default() };
    let ports = [local, remote].map(|addr| format!(":{:04X}", addr.port()));
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let mut sockets = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let socket = sockets.find(|it| it[1].ends_with(&ports[0]) && it[2].ends_with(&ports[1]));
    let Some(fields) = socket else { return Socket::default() };
    let (to_send, to_read) = fields[4].split_once(':').unwrap();
    let [to_send, to_read] = [to_send, to_read].map(|it| usize::from_str_radix(it, 16).unwrap());
    Socket { state: fields[3].to_owned(), to_send, to_read, inode: fields[9].to_owned() }
}

/// Checks that for a while nothing arrives, neither bytes nor the end of the stream.
#[track_caller]
pub fn assert_silent(mut stream: &TcpStream) {
    stream.set_read_timeout(Some(QUIET)).unwrap();
    loop {
        match stream.read(&mut [0]) {
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => panic!("expected silence: {}", meaning(&err)),
            Ok(0) => panic!("the server closed the connection, which has to stay open"),
            Ok(_) => panic!("a byte came, although the server has nothing to send yet"),
        }
    }
    stream.set_read_timeout(Some(*PATIENCE)).unwrap();
}

/// Sends `bytes` and expects them back.
#[track_caller]
pub fn assert_echo(stream: &TcpStream, bytes: &[u8]) {
    write(stream, bytes);
    assert_bytes(read(stream, bytes.len()), bytes);
}

/// Checks that the bytes that were received are the expected ones, and shows where they are not.
#[track_caller]
pub fn assert_bytes(received: impl AsRef<[u8]>, expected: impl AsRef<[u8]>) {
    let (received, expected) = (received.as_ref(), expected.as_ref());
    assert!(received == expected, "{}", difference(expected, received));
}

/// How many bytes a line of a hex dump has.
const WIDTH: usize = 16;

/// One line of a hex dump, and the same as text.
fn hex_line(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(WIDTH)];
    let hex = bytes.iter().map(|byte| format!("{byte:02x} ")).collect::<String>();
    format!("{hex:48} {}", bytes.escape_ascii())
}

/// Where the bytes that were received differ from those that were expected: the line of a hex dump with the
/// first difference, and a mark below it.
fn difference(expected: &[u8], received: &[u8]) -> String {
    let same = expected.iter().zip(received).take_while(|(a, b)| a == b).count();
    let start = same - same % WIDTH;
    let line = |bytes: &[u8]| hex_line(&bytes[start.min(bytes.len())..]);
    let mark = " ".repeat(3 * (same - start)) + "^^";
    let (wanted, got) = (line(expected), line(received));
    let (n, of) = (received.len(), expected.len());
    format!(
        "{n} bytes, expected {of}; they differ from byte {same} on\nexpected {wanted}\nreceived {got}\n         {mark}"
    )
}

/// Sends `bytes` and the end of the stream from a second thread, and reads everything that comes
/// back meanwhile, so that the two sides cannot deadlock.
#[track_caller]
pub fn exchange(stream: &TcpStream, bytes: Vec<u8>) -> Vec<u8> {
    note_sent(stream, &bytes);
    let mut writer = stream.try_clone().unwrap();
    let sender = thread::spawn(move || {
        writer.write_all(&bytes)?;
        send_fin(&writer);
        Ok(())
    });
    let received = read_to_end(stream);
    if let Err::<(), io::Error>(err) = sender.join().unwrap() {
        panic!("writing: {}", meaning(&err));
    }
    received
}

/// Sends `bytes` without reading, until all buffers in both directions are full. Returns how many
/// bytes were sent.
#[track_caller]
pub fn send_until_stuck(mut stream: &TcpStream, bytes: &[u8]) -> usize {
    stream.set_write_timeout(Some(QUIET)).unwrap();
    let mut sent = 0;
    loop {
        match stream.write(&bytes[sent..]) {
            Ok(0) => panic!("the server took all {sent} bytes, with no reply read"),
            Ok(n) => sent += n,
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => break,
            Err(err) => panic!("after {sent} bytes: {err}"),
        }
    }
    stream.set_write_timeout(Some(*PATIENCE)).unwrap();
    note_sent(stream, &bytes[..sent]);
    sent
}

/// Opens a new terminal: its screen and keyboard, and the end for a program.
#[track_caller]
pub fn open_terminal() -> (File, File) {
    // openpty(3) would leak both into programs that other tests start at the same time.
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let screen = posix_openpt(flags).unwrap();
    grantpt(&screen).unwrap();
    unlockpt(&screen).unwrap();
    let mut options = File::options();
    let options = options.read(true).write(true).custom_flags(OFlag::O_NOCTTY.bits());
    let program = options.open(ptsname_r(&screen).unwrap()).unwrap();
    (File::from(OwnedFd::from(screen)), program)
}

/// Closes with a reset instead of a FIN, as the kernel does when there is unread input.
#[track_caller]
pub fn reset(stream: TcpStream) {
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    setsockopt(&stream, Linger, &at_once).unwrap();
}

/// Pseudo-random numbers, the same for the same seed: Marsaglia, "Xorshift RNGs" (2003), the 64-bit
/// generator with the shifts 13, 7 and 17.
pub struct Random(u64);

impl Random {
    /// The sequence for `seed`.
    pub fn new(seed: u64) -> Self {
        // Neighbouring seeds must not give neighbouring sequences, and zero would stay zero.
        let mut random = Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        random.number();
        random
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() >> 32) as usize % end
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| (self.number() >> 32) as u8).collect()
    }
}

/// `n` bytes without repetitions, so that a mix-up shows.
pub fn pattern(n: usize, seed: u64) -> Vec<u8> {
    Random::new(seed).bytes(n)
}

/// A message of chapter 4 as it goes over the wire.
pub fn frame(id: i32, payload: &[u8]) -> Vec<u8> {
    let length = i32::try_from(payload.len()).unwrap();
    [&id.to_le_bytes(), &length.to_le_bytes(), payload].concat()
}

/// Raises this process's limit on fds as far as possible, and returns it.
pub fn raise_fd_limit() -> usize {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    hard.try_into().unwrap_or(usize::MAX)
}

/// Runs `exe` with `args` and an empty standard input, and waits for it to end.
#[track_caller]
pub fn run(exe: &str, args: &[&str]) -> Output {
    run_command(Command::new(exe).args(args))
}

/// Runs the client of a chapter, given as its binary and options, against the server at `addr`.
#[track_caller]
pub fn run_client(client: &[&str], addr: &str) -> Output {
    run(client[0], &[&client[1..], &["--addr", addr]].concat())
}

/// Runs `command` with an empty standard input, and waits for it to end.
#[track_caller]
pub fn run_command(command: &mut Command) -> Output {
    run_with_input(command, Stdio::null())
}

/// Runs `command` with `stdin` as its standard input, and waits for it to end.
#[track_caller]
pub fn run_with_input(command: &mut Command, stdin: impl Into<Stdio>) -> Output {
    output(start(command, stdin))
}

/// Runs `command` with an empty standard input until `happened` returns, and ends it by SIGTERM.
#[track_caller]
pub fn run_until(command: &mut Command, happened: impl FnOnce()) -> Output {
    let child = start(command, Stdio::null());
    happened();
    signal::kill(pid(&child), Signal::SIGTERM).expect("it has not been waited for");
    output(child)
}

#[track_caller]
fn start(command: &mut Command, stdin: impl Into<Stdio>) -> Child {
    let command = command.env_remove("RUST_LOG").stdin(stdin);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id().try_into().expect("a pid fits an i32"))
}

/// What it writes until it has ended.
#[track_caller]
fn output(child: Child) -> Output {
    let pid = pid(&child);
    let (done, ended) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if ended.recv_timeout(LIMIT).is_err() {
            let _ = signal::kill(pid, Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    done.send(()).ok();
    watchdog.join().unwrap();
    output
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_before_the_fin_is_left_to_the_next_read() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = connect(listener.local_addr().unwrap());
        write(&client, b"unread");
        drop(listener.accept().unwrap());
        wait_until("it is reset", || client.peer_addr().is_err());
        send_fin(&client);
        assert_eq!((&client).read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn a_difference_is_marked_in_its_line() {
        let report = difference(b"0123456789abcdefhello", b"0123456789abcdefhe\0lo");
        let lines: Vec<&str> = report.lines().map(str::trim_end).collect();
        assert_eq!(lines[0], "21 bytes, expected 21; they differ from byte 18 on");
        assert_eq!(lines[1].split_whitespace().last(), Some("hello"));
        assert_eq!(lines[2].split_whitespace().last(), Some("he\\x00lo"));
        assert_eq!(lines[2].find("00"), lines[3].find("^^"));
    }
}
