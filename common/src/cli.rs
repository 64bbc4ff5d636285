//! What a program needs around its chapter: arguments, log, exit code (since v01).

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use clap::Parser;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use tracing::{level_filters::LevelFilter, warn};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// A pipe that has any room takes this many bytes at once (PIPE_BUF in pipe(7)).
const PIPE_BUF: usize = 4096;

/// The arguments of every server (since v01).
#[derive(clap::Args)]
pub struct ServerArgs {
    /// Where to listen: an IPv4 address, an IPv6 address in brackets or a name; port 0 takes a free
    /// one
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    pub addr: Addr,
}

/// A `HOST:PORT` of the command line with the socket addresses that it stands for, at least one
/// (since v01).
#[derive(Clone, Debug)]
pub struct Addr {
    text: String,
    resolved: Vec<SocketAddr>,
}

impl Addr {
    /// The socket addresses, in the order in which they should be tried.
    pub fn resolved(&self) -> &[SocketAddr] {
        &self.resolved
    }
}

impl FromStr for Addr {
    type Err = String;

    /// Resolves the name too, so that a mistake is found before anything starts.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hint = "expected HOST:PORT, as in 127.0.0.1:7777, [::1]:7777 or localhost:7777";
        let resolved: Vec<_> =
            text.to_socket_addrs().map_err(|err| format!("{err}; {hint}"))?.collect();
        if resolved.is_empty() {
            return Err(format!("the name has no address; {hint}"));
        }
        Ok(Self { text: text.to_owned(), resolved })
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The `main` of every server: [`run`], but neither a closed terminal (SIGHUP) nor its log can end
/// or stop it (since v01).
pub fn run_server<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    run(|args| {
        // To write to a file that is as large as it may be, or from the background to a terminal
        // that has `stty tostop` set, raises the other two. A blocked signal is as good as ignored,
        // and nix has that without `unsafe`.
        let survived = [Signal::SIGHUP, Signal::SIGXFSZ, Signal::SIGTTOU];
        SigSet::from_iter(survived).thread_block()?;
        main(args)
    })
}

/// Parses the arguments, starts the log, runs `main` and turns its error into one line and exit
/// code 1 (since v01).
///
/// Wrong arguments end the process here, with exit code 2 and a usage line.
pub fn run<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    let args = A::parse();
    let log = match LogWriter::new() {
        Ok(log) => Arc::new(log),
        Err(err) => {
            let _ = writeln!(io::stderr(), "error: cannot open the log: {err}");
            return ExitCode::FAILURE;
        }
    };
    start_log(Arc::clone(&log));
    match main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            log.put(format!("error: {err:#}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// Logs to stderr at the levels that RUST_LOG names (`trace`, or `info,reactor_v03=trace`), else at
/// info.
fn start_log(log: Arc<LogWriter>) {
    let spec = std::env::var("RUST_LOG").ok().filter(|spec| !spec.is_empty());
    let parsed = spec.as_deref().map(str::parse::<Targets>).transpose();
    let default = Targets::new().with_default(LevelFilter::INFO);
    let (levels, mistake) = match parsed {
        Ok(levels) => (levels.unwrap_or(default), None),
        Err(err) => (default, Some(err)),
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(log)
        .with_ansi(io::stderr().is_terminal() && !no_color)
        .with_timer(uptime())
        .with_target(false)
        .log_internal_errors(false);
    tracing_subscriber::registry().with(lines).with(levels).init();
    if let Some(err) = mistake {
        warn!("RUST_LOG is not understood ({err}), logging at info");
    }
}

/// stderr for the log. A server must outlive its log, so a line that cannot be written at once is
/// lost.
struct LogWriter(File);

impl LogWriter {
    fn new() -> io::Result<Self> {
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let kind = stderr.metadata()?.file_type();
        if kind.is_fifo() || kind.is_char_device() {
            // Opened once more, so that O_NONBLOCK is not forced upon all who have the same pipe or
            // terminal: they share stderr with this process, but not this.
            let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            let own =
                File::options().write(true).custom_flags(flags.bits()).open("/proc/self/fd/2");
            return Ok(Self(own.unwrap_or(stderr)));
        }
        Ok(Self(stderr))
    }

    fn put(&self, line: &[u8]) {
        for part in line.chunks(PIPE_BUF) {
            // What is not opened once more, a socket for one, may still block: ask first.
            let mut room = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut room, PollTimeout::ZERO) != Ok(1) {
                return;
            }
            let _ = nix::unistd::write(&self.0, part);
        }
    }
}

impl Write for &LogWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
