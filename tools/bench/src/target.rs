//! The server under test: starts it, pins it to a processor, observes it through /proc.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// How long a program may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(10);

/// One of the programs that are compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// The name of its executable, which is in the same directory as this program.
    pub name: String,
}

impl Server {
    /// The names of all servers. The floor is the first, because ratios are to it.
    ///
    /// # Errors
    /// The chapters cannot be listed.
    pub fn all() -> anyhow::Result<Vec<String>> {
        let mut names = vec!["floor".to_owned()];
        // A second hyphen marks a client, as in reactor-v04-client.
        let chapters = crate::chapters(Path::new(crate::ROOT))?;
        names.extend(chapters.into_iter().filter(|name| name.matches('-').count() == 1));
        names.extend(["peer-mio", "peer-tokio", "peer-tokio-codec"].map(str::to_owned));
        Ok(names)
    }

    /// Chapter 1 does not echo: it says hello and reads nothing.
    pub fn echoes(&self) -> bool {
        self.name != "reactor-v01"
    }

    /// Chapters 1 and 2 serve one client at a time.
    pub fn serves_many(&self) -> bool {
        self.echoes() && self.name != "reactor-v02"
    }

    /// Chapter 10 and later serve UDP too; chapter 13 is chapter 4 again.
    pub fn serves_udp(&self) -> bool {
        self.name == "floor" || ("reactor-v10".."reactor-v13").contains(&self.name.as_str())
    }

    /// Chapter 5 and later limit the number of clients, which no peer does. Chapter 8 and later have
    /// several threads, of which the processor that they are pinned to could only run one. Chapter 13 is
    /// chapter 4 again.
    pub fn args(&self) -> &[&str] {
        const ARGS: [&str; 6] =
            ["--addr", "127.0.0.1:0", "--max-conns", "1000000", "--threads", "1"];
        match self.name.strip_prefix("reactor-") {
            None => &[],
            Some(chapter) if chapter < "v05" || chapter == "v13" => &ARGS[..2],
            Some(chapter) if chapter < "v08" => &ARGS[..4],
            Some(_) => &ARGS,
        }
    }

    /// The command that runs it on a free port.
    ///
    /// # Errors
    /// There is no such program in the directory of this one.
    pub fn command(&self) -> anyhow::Result<Command> {
        let exe = std::env::current_exe()?.with_file_name(&self.name);
        ensure!(exe.is_file(), "no such server: {:?}", self.name);
        let mut command = Command::new(exe);
        command.args(self.args());
        Ok(command)
    }

    /// The same for a load over UDP: the floor has a mode for that.
    ///
    /// # Errors
    /// There is no such program in the directory of this one.
    pub fn command_udp(&self) -> anyhow::Result<Command> {
        let mut command = self.command()?;
        if self.name == "floor" {
            command.arg("udp");
        }
        Ok(command)
    }
}

/// `command` under strace(1), which writes how often it made each call to `report` at the end.
pub fn counted(command: &Command, report: &Path) -> Command {
    let mut strace = Command::new("strace");
    // -D: strace runs as a detached grandchild, so that the child process is the server.
    strace.args(["-D", "-f", "-c", "-o"]).arg(report);
    strace.arg(command.get_program()).args(command.get_args());
    if let Some(folder) = command.get_current_dir() {
        strace.current_dir(folder);
    }
    strace
}

/// A running server. Killed when dropped.
pub struct Target {
    child: Child,
    /// Where it listens.
    pub addr: SocketAddr,
}

impl Target {
    /// Starts a server, waits until it listens and pins it to the processor `cpu`, if any.
    ///
    /// # Errors
    /// It cannot be started, or does not log where it listens.
    pub fn start(mut command: Command, cpu: Option<usize>) -> anyhow::Result<Self> {
        let program = PathBuf::from(command.get_program());
        let mut child = command
            // Logs where it listens, but not the clients that the load resets: no peer logs those.
            .env("RUST_LOG", "common=info")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut stderr = BufReader::new(child.stderr.take().context("stderr is a pipe")?);
        let mut line = String::new();
        stderr.read_line(&mut line)?;
        let addr = line.trim().rsplit(' ').next().and_then(|addr| addr.parse().ok());
        let Some(addr) = addr else {
            let _ = child.kill();
            let _ = child.wait();
            bail!("{} does not log where it listens: {line}", program.display());
        };
        // The rest of its log must not fill the pipe.
        thread::spawn(move || stderr.read_to_end(&mut Vec::new()));
        Self { child, addr }.pinned(cpu)
    }

    /// Starts a program that says nothing and is to listen on `addr`, and waits until it does. Pins it to the
    /// processor `cpu`, if any.
    ///
    /// # Errors
    /// It cannot be started, or takes no connections.
    pub fn start_silent(
        mut command: Command,
        addr: SocketAddr,
        cpu: Option<usize>,
    ) -> anyhow::Result<Self> {
        let command = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let target = Self { child: command.spawn().context("cannot start the server")?, addr };
        let start = Instant::now();
        while let Err(err) = TcpStream::connect(addr) {
            ensure!(start.elapsed() < START_LIMIT, "the server does not listen on {addr}: {err}");
            thread::sleep(Duration::from_millis(10));
        }
        target.pinned(cpu)
    }

    fn pinned(self, cpu: Option<usize>) -> anyhow::Result<Self> {
        if let Some(cpu) = cpu {
            // sched_setaffinity(2) is about one thread, and threads inherit it only from then on.
            for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
                let id = task?.file_name().to_string_lossy().parse()?;
                pin(Pid::from_raw(id), cpu)?;
            }
        }
        Ok(self)
    }

    /// The CPU time that all its threads have used.
    ///
    /// # Errors
    /// It has ended, or the kernel keeps no schedstat.
    pub fn cpu(&self) -> anyhow::Result<Duration> {
        let mut nanos = 0;
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            let stat = fs::read_to_string(task?.path().join("schedstat"))?;
            let field = stat.split(' ').next().context("an empty schedstat")?;
            nanos += field.parse::<u64>()?;
        }
        Ok(Duration::from_nanos(nanos))
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory(&self) -> anyhow::Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.split_whitespace().nth(1).context("no figure")?.parse()?;
        Ok(kib * 1024)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Binds a thread, or this one if `pid` is 0, to one processor.
///
/// # Errors
/// The process may not use this processor.
pub fn pin(pid: Pid, cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(pid, &set).with_context(|| format!("cannot use processor {cpu}"))
}

/// Picks two processors: one for the server, one for the load.
///
/// # Errors
/// This process may use only one.
pub fn processors() -> anyhow::Result<(usize, usize)> {
    let allowed = nix::sched::sched_getaffinity(Pid::from_raw(0))?;
    let cpus: Vec<usize> =
        (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)).collect();
    ensure!(cpus.len() >= 2, "two processors are needed, but this process may use {}", cpus.len());
    // Two threads of one core would slow each other down. The kernel lists them as 0,4 or 0-1.
    let path = format!("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", cpus[0]);
    let siblings = fs::read_to_string(path).unwrap_or_default();
    let is_sibling = |cpu: usize| siblings.trim().split([',', '-']).any(|it| it == cpu.to_string());
    let other = cpus[1..].iter().find(|&&cpu| !is_sibling(cpu)).unwrap_or(&cpus[1]);
    Ok((cpus[0], *other))
}
