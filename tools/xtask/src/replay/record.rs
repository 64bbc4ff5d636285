//! Runs a server under strace(1), and clients that do what a script says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrIn, setsockopt, sockopt};
use nix::unistd::Pid;

use super::script::{Act, Done, Script, now};
use super::strace::{self, Call};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Between two looks at whether a server sleeps.
const LOOK: Duration = Duration::from_millis(10);

/// A server under strace. Killed when dropped.
struct Traced {
    strace: Child,
    server: Pid,
    /// What the server says, each thread of it, when it sleeps.
    looks: Vec<String>,
}

impl Drop for Traced {
    fn drop(&mut self) {
        if self.server.as_raw() > 0 {
            let _ = kill(self.server, Signal::SIGKILL);
        } else {
            let _ = self.strace.kill();
        }
        let _ = self.strace.wait();
    }
}

/// What has been recorded.
pub struct Recording {
    pub calls: Vec<Call>,
    pub acts: Vec<Done>,
    pub clients: BTreeSet<char>,
    /// Whether the clients are not ours.
    pub is_derived: bool,
}

/// Runs the script's server, whose executables are in the folder `bin`, and does `acts`.
pub fn record(script: &Script, acts: &[(char, Act)], bin: &Path) -> Result<Recording> {
    let folder = tempfile::tempdir()?;
    let (report, log) = (folder.path().join("strace"), folder.path().join("log"));
    let mut command = Command::new("bash");
    // Inherited fds would change the server's fd numbers.
    let prologue = "for fd in {3..63}; do eval \"exec $fd>&-\"; done; exec \"$@\"";
    let strace = strace::command(&report);
    command.args(["-c", prologue, "bash"]).arg(strace.get_program()).args(strace.get_args());
    if script.delay > 0 {
        command.args(["-e", &format!("inject=epoll_wait:delay_enter={}", script.delay * 1000)]);
    }
    if let Some(fds) = script.fds {
        command.arg("prlimit").arg(format!("--nofile={fds}:{fds}"));
    }
    command.arg(bin.join(script.program())).args(script.server.split(' ').skip(1));
    command.args(["--addr", "127.0.0.1:0"]).env("RUST_LOG", "trace").env_remove("REACTOR_CMD");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&log)?);
    let mut traced = Traced::start(&mut command, script.program())?;
    let mut addr = None;
    wait_until("the server listens", || {
        let log = fs::read_to_string(&log).unwrap_or_default();
        let line = log.lines().find_map(|line| line.split_once("listening on "));
        addr = line.and_then(|(_, addr)| addr.parse().ok());
        ensure!(traced.strace.try_wait()?.is_none(), "the server has ended: {log}");
        Ok(addr.is_some())
    })?;
    let addr = addr.context("an address")?;
    traced.wait_until_asleep(&mut BTreeMap::new())?;

    let mut clients = BTreeMap::new();
    let mut done = Vec::new();
    let mut stopped = false;
    for (client, act) in acts {
        if *act == Act::ReadsOn {
            let reader: &mut Client = clients.get_mut(client).context("it is not connected")?;
            // While the server stands still, what a client gets does not depend on which of them is faster.
            loop {
                let (time, port) = (now(), reader.port);
                kill(traced.server, Signal::SIGSTOP)?;
                let has_read = reader.read_all()?;
                kill(traced.server, Signal::SIGCONT)?;
                if !has_read {
                    break;
                }
                done.push(Done { time, client: *client, port, act: Act::ReadsOn });
                traced.wait_until_asleep(&mut BTreeMap::new())?;
            }
            reader.reads = true;
            continue;
        }
        // Before it takes effect.
        let time = now();
        let port = traced.act(addr, &mut clients, *client, act)?;
        done.push(Done { time, client: *client, port, act: act.clone() });
        match act {
            Act::ServerStops => stopped = true,
            Act::ServerContinues => stopped = false,
            Act::TimePasses => thread::sleep(Duration::from_millis(250)),
            _ => {}
        }
        if stopped {
            thread::sleep(LOOK);
        } else if script.delay > 0 {
            // The server is held up now, so the next act is before its next epoll_wait.
            thread::sleep(Duration::from_millis(u64::from(script.delay / 3)));
        } else {
            traced.wait_until_asleep(&mut clients)?;
        }
    }
    if script.delay > 0 {
        thread::sleep(Duration::from_millis(u64::from(script.delay * 3)));
        traced.wait_until_asleep(&mut clients)?;
    }
    let end = now();
    drop(traced);
    let calls = strace::parse(&fs::read_to_string(&report)?)?;
    // What it does when it is ended is another story.
    let calls = calls.into_iter().filter(|call| call.start < end).collect();
    Ok(Recording { calls, acts: done, clients: script.clients(), is_derived: false })
}

/// A client: its connection, and whether it reads what arrives.
struct Client {
    stream: Option<TcpStream>,
    reads: bool,
    port: u16,
}

impl Traced {
    fn start(command: &mut Command, program: &str) -> Result<Self> {
        let strace = command.spawn().context("cannot start strace; is it installed?")?;
        let pid = strace.id();
        let mut traced = Self { strace, server: Pid::from_raw(0), looks: Vec::new() };
        wait_until("strace has started the server", || {
            let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
            // It has other children at first, by which it finds out what the kernel can do.
            let is_it = |pid: &&str| {
                fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.ends_with(program))
            };
            let child = children.split_whitespace().find(is_it).and_then(|pid| pid.parse().ok());
            traced.server = Pid::from_raw(child.unwrap_or(0));
            Ok(child.is_some())
        })?;
        Ok(traced)
    }

    /// Waits until each thread sleeps, and has done so for a while. Meanwhile clients read.
    fn wait_until_asleep(&mut self, clients: &mut BTreeMap<char, Client>) -> Result<()> {
        self.looks.clear();
        wait_until("the server sleeps", || {
            let has_read = clients.values_mut().map(Client::read).collect::<Result<Vec<_>>>()?;
            let mut look = String::new();
            let mut asleep = !has_read.contains(&true);
            for task in fs::read_dir(format!("/proc/{}/task", self.server))? {
                let status = fs::read_to_string(task?.path().join("status")).unwrap_or_default();
                asleep &= status.contains("\nState:\tS");
                let counts = status.lines().filter(|line| line.contains("voluntary_ctxt_switches"));
                look.extend(counts);
            }
            self.looks.push(look);
            let [.., a, b, c] = &self.looks[..] else { return Ok(false) };
            Ok(asleep && a == b && b == c)
        })
    }

    /// Does it, and returns the client's port.
    fn act(
        &self,
        addr: SocketAddr,
        clients: &mut BTreeMap<char, Client>,
        name: char,
        act: &Act,
    ) -> Result<u16> {
        match act {
            Act::ServerStops => {
                kill(self.server, Signal::SIGSTOP)?;
                return Ok(0);
            }
            Act::ServerContinues => {
                kill(self.server, Signal::SIGCONT)?;
                return Ok(0);
            }
            Act::TimePasses => return Ok(0),
            Act::Connects | Act::ConnectsSmall => {
                let stream = connect(addr, *act == Act::ConnectsSmall)?;
                let port = stream.local_addr()?.port();
                clients.insert(name, Client { stream: Some(stream), reads: true, port });
                return Ok(port);
            }
            _ => {}
        }
        let client = clients.get_mut(&name).with_context(|| format!("{name} is not connected"))?;
        let stream = client.stream.as_mut().with_context(|| format!("{name} has closed"))?;
        match act {
            Act::Sends(bytes) => {
                let mut rest = &bytes[..];
                // So that the server sees all of it at once.
                let is_long = rest.len() > 4096;
                if is_long {
                    kill(self.server, Signal::SIGSTOP)?;
                }
                wait_until("the client has sent", || {
                    match stream.write(rest) {
                        Ok(n) => rest = &rest[n..],
                        Err(err) if err.kind() == ErrorKind::WouldBlock => {}
                        Err(err) => return Err(err.into()),
                    }
                    Ok(rest.is_empty())
                })?;
                if is_long {
                    thread::sleep(LOOK);
                    kill(self.server, Signal::SIGCONT)?;
                }
            }
            Act::ShutsDown => stream.shutdown(std::net::Shutdown::Write)?,
            Act::Resets => socket::setsockopt(
                stream,
                sockopt::Linger,
                &nix::libc::linger { l_onoff: 1, l_linger: 0 },
            )?,
            Act::StopsReading => client.reads = false,
            _ => {}
        }
        if matches!(act, Act::Closes | Act::Resets) {
            client.stream = None;
        }
        Ok(client.port)
    }
}

impl Client {
    /// Reads until nothing has come for a while. Returns whether there was anything.
    fn read_all(&mut self) -> Result<bool> {
        self.reads = true;
        let (mut has_read, mut silent) = (false, 0);
        while silent < 5 {
            if self.read()? {
                (has_read, silent) = (true, 0);
            } else {
                silent += 1;
                thread::sleep(LOOK);
            }
        }
        self.reads = false;
        Ok(has_read)
    }

    /// Reads what has arrived, if it reads. Returns whether there was anything.
    fn read(&mut self) -> Result<bool> {
        let Some(stream) = self.stream.as_mut().filter(|_| self.reads) else { return Ok(false) };
        match stream.read(&mut [0; 65_536]) {
            Ok(n) => Ok(n > 0),
            Err(err) if err.kind() == ErrorKind::WouldBlock => Ok(false),
            // A server may reset it.
            Err(err) if err.kind() == ErrorKind::ConnectionReset => Ok(false),
            Err(err) => Err(err.into()),
        }
    }
}

/// With short segments and a small buffer, few bytes of a server's output fit into the kernel.
fn connect(addr: SocketAddr, small: bool) -> Result<TcpStream> {
    let SocketAddr::V4(v4) = addr else { bail!("not an IPv4 address: {addr}") };
    let socket =
        socket::socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if small {
        setsockopt(&socket, sockopt::TcpMaxSeg, &536)?;
        setsockopt(&socket, sockopt::RcvBuf, &4096)?;
    }
    socket::connect(std::os::fd::AsRawFd::as_raw_fd(&socket), &SockaddrIn::from(v4))?;
    let stream = TcpStream::from(socket);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn wait_until(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !condition()? {
        ensure!(start.elapsed() < LIMIT, "waited in vain until {what}");
        thread::sleep(LOOK);
    }
    Ok(())
}

/// Runs `command` until it ends, as a person ends it with Ctrl-C, and returns its calls.
pub fn watch(command: &Command, report: &Path) -> Result<Vec<Call>> {
    let mut strace = strace::command(report);
    strace.arg(command.get_program()).args(command.get_args());
    let mut child = strace.env("RUST_LOG", "trace").spawn().context("cannot start strace")?;
    // Ctrl-C is for the server. Not before it has started, as it would inherit this.
    let ends = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    ends.into_iter().collect::<SigSet>().thread_block()?;
    child.wait()?;
    strace::parse(&fs::read_to_string(report).context("strace has not run the server")?)
}

impl Recording {
    /// What clients that are not ours have done, by what the server has accepted and read. They may have done it
    /// before; here it is just before the server learns of it.
    pub fn derived(calls: Vec<Call>) -> Self {
        let mut acts: Vec<Done> = Vec::new();
        let mut clients: BTreeMap<i64, (char, u16)> = BTreeMap::new();
        let mut names = ('A'..='Z').chain('a'..='z').cycle();
        // When each thread last learned of something.
        let mut woken: BTreeMap<&str, f64> = BTreeMap::new();
        for call in &calls {
            let thread = call.thread.as_str();
            let ready = woken.get(thread).copied().unwrap_or(call.end);
            if call.is_wait() || call.is_poll() {
                woken.insert(thread, call.end - 1e-6);
            } else if call.is_accept() {
                let Some(fd) = call.number() else { continue };
                // Many servers do not ask for the address.
                let (client, port) = (names.next().unwrap_or('A'), call.port().unwrap_or(0));
                clients.insert(fd, (client, port));
                let time = ready.min(call.end - 1e-6);
                acts.push(Done { time, client, port, act: Act::Connects });
            } else if call.is_read() {
                let Some((client, port)) = clients.get(&call.fd()).copied() else { continue };
                let act = match (call.number(), call.error()) {
                    (Some(0), _) => Act::ShutsDown,
                    (Some(_), _) => Act::Sends(call.data()),
                    (_, Some("ECONNRESET")) => Act::Resets,
                    _ => continue,
                };
                let last = acts.iter().rev().find(|done| done.client == client);
                if act == Act::ShutsDown && last.is_some_and(|done| done.act == act) {
                    continue;
                }
                // A connection that was just accepted sends after that.
                let time = ready.min(call.end - 1e-6);
                let time = time.max(last.map_or(0.0, |done| done.time + 1e-7));
                acts.push(Done { time, client, port, act });
            } else if call.name == "close" {
                clients.remove(&call.fd());
            }
        }
        acts.sort_by(|a, b| a.time.total_cmp(&b.time));
        let clients = acts.iter().map(|done| done.client).collect();
        Self { calls, acts, clients, is_derived: true }
    }
}
