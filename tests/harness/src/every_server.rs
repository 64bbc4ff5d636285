//! The promises of every server, in all chapters. [`every_server!`](crate::every_server!) turns
//! each promise into a test.

use std::fs::{File, Permissions};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, fchown};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::{
    LIMIT, Server, connect, open_terminal, run, run_command, wait_until, wait_until_accepted,
    wait_until_closing,
};

/// One test per promise, for the binary `$exe`. `$works` is a function that checks over a fresh
/// connection that the server does its job.
#[macro_export]
macro_rules! every_server {
    ($exe:expr, $works:expr, [$($promise:ident),* $(,)?]) => {
        mod every_server {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_server::$promise($exe, $works);
                }
            )*
        }
    };
    ($exe:expr, $works:expr) => {
        harness::every_server!($exe, $works, [
            prints_help_and_version,
            listens_on_the_given_address,
            refuses_an_invalid_address,
            reports_a_port_in_use,
            reports_an_address_that_is_not_local,
            ends_with_its_terminal_but_not_under_nohup,
            survives_a_log_that_cannot_be_written,
            survives_a_log_on_another_users_terminal,
            shows_every_step_on_request,
            warns_about_an_invalid_rust_log,
            sleeps_when_idle,
            can_be_restarted_at_once,
            accepts_a_burst_of_clients,
            survives_clients_that_reset,
        ]);
    };
}

/// Checks that the server at the other end does its job.
pub type Works = fn(&TcpStream);

pub(crate) fn name(exe: &str) -> &str {
    exe.rsplit('/').next().unwrap_or(exe)
}

pub fn prints_help_and_version(exe: &str, _: Works) {
    crate::chapter_only!("it reads the chapter's --help and --version");
    let help = run(exe, &["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    assert!(help.starts_with("Chapter ") && help.contains("\nTry it: "), "{help}");
    let version = run(exe, &["--version"]);
    assert!(version.status.success());
    assert_eq!(String::from_utf8(version.stdout).unwrap(), format!("{} 0.1.0\n", name(exe)));
}

pub fn listens_on_the_given_address(exe: &str, works: Works) {
    for addr in ["127.0.0.1:0", "[::1]:0", "localhost:0"] {
        if addr.starts_with('[') && TcpListener::bind(addr).is_err() {
            eprintln!("no IPv6 on this machine: {addr} is not tested");
            continue;
        }
        works(&Server::start_on(exe, addr).connect());
    }
}

pub fn refuses_an_invalid_address(exe: &str, _: Works) {
    crate::chapter_only!("it reads the chapter's error messages");
    for addr in ["nonsense", "127.0.0.1", "127.0.0.1:65536", "::1:7777:x", ""] {
        let output = run(exe, &["--addr", addr]);
        assert_eq!(output.status.code(), Some(2), "{addr}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("--addr") && stderr.contains("HOST:PORT"), "{stderr}");
    }
}

#[track_caller]
fn assert_one_line_about(exe: &str, addr: &str, reason: &str) {
    let output = run_command(Command::new(exe).args(["--addr", addr]).env("RUST_BACKTRACE", "1"));
    assert_eq!(output.status.code(), Some(1));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let (start, reason) = (format!("error: cannot listen on {addr}"), format!(": {reason}"));
    // In between a chapter may say whether this was TCP or UDP.
    assert!(stderr.starts_with(&start) && stderr.contains(&reason), "{stderr}");
}

pub fn reports_a_port_in_use(exe: &str, _: Works) {
    crate::chapter_only!("it reads the chapter's error messages");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    assert_one_line_about(exe, &addr.to_string(), "Address already in use");
}

pub fn reports_an_address_that_is_not_local(exe: &str, _: Works) {
    crate::chapter_only!("it reads the chapter's error messages");
    // 192.0.2.0/24 is for documentation (RFC 5737): no machine has it.
    assert_one_line_about(exe, "192.0.2.1:7777", "Cannot assign requested address");
}

/// Otherwise it would keep its port forever, out of sight.
pub fn ends_with_its_terminal_but_not_under_nohup(exe: &str, works: Works) {
    crate::chapter_only!("what SIGHUP does is up to each program");
    let start = |setup: &str| {
        let script = format!("{setup} \"$0\" --addr 127.0.0.1:0");
        Server::from(Command::new("sh").args(["-c", &script, exe]).env_remove("RUST_LOG"))
    };
    // The tests themselves may run under nohup.
    let mut server = start("exec env --default-signal=HUP");
    server.signal(Signal::SIGPIPE);
    works(&server.connect());
    let client = server.connect();
    server.signal(Signal::SIGHUP);
    wait_until_closing(&client);
    // A shell passes the signal on, and the kernel sends it again when the shell ends.
    server.signal(Signal::SIGHUP);
    assert_ended_by(exe, Signal::SIGHUP, server.wait());

    let server = start("trap '' HUP; exec");
    server.signal(Signal::SIGHUP);
    server.wait_until_asleep();
    works(&server.connect());
}

/// From chapter 3 on there is a handler, and the exit code is 0.
#[track_caller]
fn assert_ended_by(exe: &str, signal: Signal, status: ExitStatus) {
    let handled = name(exe) >= "reactor-v03";
    let expected = if handled { (Some(0), None) } else { (None, Some(signal as i32)) };
    assert_eq!((status.code(), status.signal()), expected);
}

/// Its log goes to a full disk, to a file that may not grow, to a pipe whose reader is gone, and to
/// a pipe and a terminal that are never read.
pub fn survives_a_log_that_cannot_be_written(exe: &str, works: Works) {
    crate::chapter_only!("it reads the chapter's log");
    let start = |setup: &str, stderr: Stdio| {
        let (child, addr) = start_with_log(exe, setup, stderr);
        assert_eq!(child.log_threads(), 0);
        (child, addr)
    };
    let unlimited = "exec";

    let full_disk = File::options().write(true).open("/dev/full").unwrap();
    let (_full_disk, addr) = start(unlimited, full_disk.into());
    works(&connect(addr));

    let path = std::env::temp_dir().join(format!("{}-{}.log", name(exe), std::process::id()));
    let (_full_file, addr) = start("ulimit -f 1; exec", File::create(&path).unwrap().into());
    std::fs::remove_file(path).unwrap();
    for _ in 0..50 {
        works(&connect(addr));
    }

    let (mut gone, addr) = start(unlimited, Stdio::piped());
    drop(gone.0.stderr.take());
    works(&connect(addr));

    // A pipe and a terminal hold 64 KiB each; one connection logs at least about 100 bytes.
    let (mut unread, addr) = start(unlimited, Stdio::piped());
    for _ in 0..1500 {
        works(&connect(addr));
    }
    let mut log = vec![0; 1 << 20];
    let n = unread.0.stderr.take().unwrap().read(&mut log).unwrap();
    assert!(n > 32 << 10, "the pipe was not full: {n} bytes");

    let (_screen, terminal) = open_terminal();
    let (_unread, addr) = start(unlimited, terminal.into());
    for _ in 0..1500 {
        works(&connect(addr));
    }
}

/// The server may not open this terminal again, so it cannot make it non-blocking. Its last line is
/// still shown. If the terminal is never read, that delays neither clients nor a signal.
pub fn survives_a_log_on_another_users_terminal(exe: &str, works: Works) {
    crate::chapter_only!("it reads the chapter's log");
    const NO_ACCESS: &str = "exec setpriv --bounding-set=-dac_override,-dac_read_search";
    let terminal = || {
        let (screen, terminal) = open_terminal();
        fchown(&terminal, Some(1), None)?;
        terminal.set_permissions(Permissions::from_mode(0o600))?;
        Ok::<_, io::Error>((screen, terminal))
    };
    let may = Command::new("sh").args(["-c", &format!("{NO_ACCESS} true")]).status().unwrap();
    let (Ok((mut screen, tty)), true) = (terminal(), may.success()) else {
        eprintln!("not root: the terminal of another user is not tested");
        return;
    };
    let script = format!("{NO_ACCESS} \"$0\" --addr 192.0.2.1:7777");
    let mut command = Command::new("sh");
    let mut failing = command.args(["-c", &script, exe]).stderr(tty).spawn().unwrap();
    let (sender, shown) = mpsc::channel();
    thread::spawn(move || {
        let mut line = [0; 200];
        let n = screen.read(&mut line).unwrap();
        sender.send(String::from_utf8_lossy(&line[..n]).into_owned())
    });
    let shown = shown.recv_timeout(LIMIT).unwrap();
    assert!(shown.starts_with("error: "), "{shown}");
    assert_eq!(failing.wait().unwrap().code(), Some(1));

    let (_screen, tty) = terminal().unwrap();
    let (mut server, addr) = start_with_log(exe, NO_ACCESS, tty.into());
    wait_until("a thread writes the log", || server.log_threads() == 1);
    for _ in 0..1500 {
        works(&connect(addr));
    }
    kill(Pid::from_raw(server.0.id() as i32), Signal::SIGTERM).unwrap();
    let mut status = None;
    wait_until("it ends", || {
        status = server.0.try_wait().unwrap();
        status.is_some()
    });
    assert_ended_by(exe, Signal::SIGTERM, status.unwrap());
}

struct KillOnDrop(std::process::Child);

impl KillOnDrop {
    /// A server may have other threads, as in an answer to an exercise.
    fn log_threads(&self) -> usize {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let names = tasks.map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")));
        names.filter(|name| name.as_ref().is_ok_and(|name| name == "log\n")).count()
    }
}

/// Starts the server with the shell's `setup`, logging every step to `stderr`, and waits until it
/// listens.
fn start_with_log(exe: &str, setup: &str, stderr: Stdio) -> (KillOnDrop, SocketAddr) {
    let addr = Server::start(exe).addr();
    let script = format!("{setup} \"$0\" --addr {addr}");
    let mut command = Command::new("sh");
    command.args(["-c", &script, exe]).env("RUST_LOG", "trace");
    let child = KillOnDrop(command.stderr(stderr).spawn().unwrap());
    wait_until("it listens", || TcpStream::connect(addr).is_ok());
    (child, addr)
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn shows_every_step_on_request(exe: &str, works: Works) {
    crate::chapter_only!("it reads the chapter's trace");
    let mut command = Command::new(exe);
    let server = Server::from(command.args(["--addr", "127.0.0.1:0"]).env("RUST_LOG", "trace"));
    works(&server.connect());
    server.wait_for_log(" TRACE ");
    server.wait_for_log(": closed");
}

pub fn warns_about_an_invalid_rust_log(exe: &str, works: Works) {
    crate::chapter_only!("it reads the chapter's log");
    let mut command = Command::new(exe);
    let server = Server::from(command.args(["--addr", "127.0.0.1:0"]).env("RUST_LOG", "a=b=c"));
    server.wait_for_log("RUST_LOG is invalid");
    works(&server.connect());
}

pub fn sleeps_when_idle(exe: &str, works: Works) {
    let server = Server::start(exe);
    works(&server.connect());
    // This one stays, and says nothing.
    let _silent = server.connect();
    server.wait_until_asleep();
}

pub fn can_be_restarted_at_once(exe: &str, works: Works) {
    let mut server = Server::start(exe);
    let addr = server.addr().to_string();
    works(&server.connect());
    // This client does not close first, so that the server's side ends up in TIME_WAIT.
    let client = server.connect();
    wait_until_accepted(&client);
    server.signal(Signal::SIGTERM);
    server.wait();
    drop(client);
    works(&Server::start_on(exe, &addr).connect());
}

pub fn accepts_a_burst_of_clients(exe: &str, works: Works) {
    let server = Server::start(exe);
    // While the server is stopped, all of them have to wait in the kernel's accept queue.
    server.pause();
    let clients: Vec<TcpStream> = (0..1000).map(|_| server.connect()).collect();
    server.signal(Signal::SIGCONT);
    for client in clients {
        works(&client);
    }
}

pub fn survives_clients_that_reset(exe: &str, works: Works) {
    let server = Server::start(exe);
    server.pause();
    for n in 0..50 {
        let mut client = server.connect();
        if n % 2 == 0 {
            client.write_all(b"something").unwrap();
        }
        crate::reset(client);
    }
    server.signal(Signal::SIGCONT);
    works(&server.connect());
}
