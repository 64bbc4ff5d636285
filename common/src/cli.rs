//! The command line: arguments, exit codes and standard output (since v01).

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use clap::Parser;
use nix::net::if_::if_nametoindex;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};

use crate::log;

/// The arguments of every server (since v01).
#[derive(clap::Args)]
pub struct ServerArgs {
    /// Where to listen: an IPv4 address, an IPv6 address in brackets or a name; port 0 picks a free
    /// port
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    pub addr: Addr,
}

/// The arguments of a server with a pool of threads (since v08).
#[derive(clap::Args)]
pub struct ThreadArgs {
    /// How many threads serve the clients, 1 to 1024; by default one per core
    #[arg(long, value_name = "N", default_value_t = cores())]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: u16,
}

/// The number of cores that this process may use.
fn cores() -> u16 {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    u16::try_from(cores).map_or(1024, |cores| cores.min(1024))
}

/// A `HOST:PORT` argument, resolved to at least one socket address (since v01).
#[derive(Clone, Debug)]
pub struct Addr {
    text: String,
    resolved: Vec<SocketAddr>,
}

impl Addr {
    /// The socket addresses, in the order to try them.
    pub fn resolved(&self) -> &[SocketAddr] {
        &self.resolved
    }

    /// Whether the port is 0, so that the kernel picks one (since v10).
    pub fn picks_port(&self) -> bool {
        self.resolved.iter().all(|addr| addr.port() == 0)
    }
}

impl FromStr for Addr {
    type Err = String;

    /// Also resolves the name, so a mistake shows before anything starts.
    ///
    /// # Errors
    /// One line with the reason and an example of what is expected.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let hint = "expected HOST:PORT, as in 127.0.0.1:7777, [::1]:7777 or localhost:7777";
        let resolved = resolve(text).map_err(|err| format!("{err}; {hint}"))?;
        Ok(Self { text: text.to_owned(), resolved })
    }
}

/// What has been resolved, by the text. A name is looked up once: reading a configuration again must
/// not wait for a name server (since v09).
static RESOLVED: Mutex<BTreeMap<String, Vec<SocketAddr>>> = Mutex::new(BTreeMap::new());

/// At least one address, or the reason why there is none.
pub(crate) fn resolve(text: &str) -> Result<Vec<SocketAddr>, String> {
    let mut known = RESOLVED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(resolved) = known.get(text) {
        return Ok(resolved.clone());
    }
    let resolved = with_scope_number(text)?.to_socket_addrs();
    let resolved: Vec<_> = resolved.map_err(|err| err.to_string())?.collect();
    if resolved.is_empty() {
        return Err("the name has no address".to_owned());
    }
    known.insert(text.to_owned(), resolved.clone());
    Ok(resolved)
}

/// Turns `[fe80::1%eth0]:7777` into `[fe80::1%2]:7777`: std takes a network interface by number
/// only.
fn with_scope_number(text: &str) -> Result<String, String> {
    let in_brackets = text.strip_prefix('[').and_then(|text| text.split_once(']'));
    let Some((addr, port)) = in_brackets else { return Ok(text.to_owned()) };
    let Some((addr, scope)) = addr.split_once('%') else { return Ok(text.to_owned()) };
    if scope.parse::<u32>().is_ok() {
        return Ok(text.to_owned());
    }
    let index = if_nametoindex(scope)
        .map_err(|errno| format!("no network interface {scope:?}: {}", errno.desc()))?;
    Ok(format!("[{addr}%{index}]{port}"))
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The `main` of every server: [`run`], without the signals by which writing the log could kill or
/// stop the process (since v01).
pub fn run_server<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    run(|args| {
        // SIGXFSZ is sent when a file would exceed its size limit (ulimit -f), SIGTTOU when a
        // background process writes to a terminal with `stty tostop`. Blocking them has the effect
        // of ignoring them, which would need `unsafe` in nix.
        SigSet::from_iter([Signal::SIGXFSZ, Signal::SIGTTOU]).thread_block()?;
        main(args)
    })
}

/// Parses the arguments, starts the log, runs `main` and turns its error into one line and exit
/// code 1 (since v01).
///
/// Invalid arguments end the process here, with an error message and exit code 2.
pub fn run<A: Parser>(main: impl FnOnce(A) -> anyhow::Result<()>) -> ExitCode {
    let args = A::parse();
    let log = match log::start() {
        Ok(log) => log,
        Err(err) => {
            let _ = writeln!(io::stderr(), "error: cannot open the log: {err}");
            return ExitCode::FAILURE;
        }
    };
    let code = match main(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            log.put(format!("error: {err:#}\n").as_bytes());
            ExitCode::FAILURE
        }
    };
    log.finish();
    code
}

/// Parses an option's time in seconds, above 0 and at most a day (since v04).
///
/// # Errors
/// One line that says what is expected.
pub fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A day is longer than any useful timeout, and far below what would overflow a timer.
    seconds
        .filter(|seconds| !seconds.is_zero() && *seconds <= Duration::from_secs(24 * 60 * 60))
        .ok_or_else(|| "expected a number of seconds, above 0 and up to 86400".to_owned())
}

/// Like [`parse_seconds`], but 0 is allowed too (since v05).
///
/// # Errors
/// One line that says what is expected.
pub fn parse_limit(text: &str) -> Result<Duration, String> {
    if text.parse() == Ok(0.0) {
        return Ok(Duration::ZERO);
    }
    parse_seconds(text).map_err(|_| "expected a number of seconds, 0 to 86400".to_owned())
}

/// Standard output without std's buffer (since v04). A write waits for room even in non-blocking
/// mode, which another process that shares it may have set.
pub struct Stdout(File);

impl Stdout {
    /// Duplicates this process's standard output.
    ///
    /// # Errors
    /// Any fcntl(2) error, typically EMFILE.
    pub fn new() -> io::Result<Self> {
        Ok(Self(io::stdout().as_fd().try_clone_to_owned()?.into()))
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.0.write(bytes) {
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    let mut room = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
                    poll(&mut room, PollTimeout::NONE)?;
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
