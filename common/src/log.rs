//! The log: lines on stderr that never stall a server (since v01).

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{level_filters::LevelFilter, warn};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// A pipe that has any room takes this many bytes at once (PIPE_BUF in pipe(7)).
const PIPE_BUF: usize = 4096;

/// Logs to stderr from now on, at the levels that RUST_LOG names (`trace`, or
/// `info,reactor_v03=trace`), else at info (since v01). Call it once.
///
/// # Errors
/// Any fcntl(2) or fstat(2) error, typically EBADF: stderr is closed.
pub fn start() -> io::Result<Arc<Log>> {
    let log = Arc::new(Log::open()?);
    let spec = std::env::var("RUST_LOG").ok().filter(|spec| !spec.is_empty());
    let parsed = spec.as_deref().map(str::parse::<Targets>).transpose();
    let default = Targets::new().with_default(LevelFilter::INFO);
    let (levels, mistake) = match parsed {
        Ok(levels) => (levels.unwrap_or(default), None),
        Err(err) => (default, Some(err)),
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(Arc::clone(&log))
        .with_ansi(io::stderr().is_terminal() && !no_color)
        .with_timer(uptime())
        .with_target(false)
        .log_internal_errors(false);
    tracing_subscriber::registry().with(lines).with(levels).init();
    if let Some(err) = mistake {
        warn!("RUST_LOG is not understood ({err}), logging at info");
    }
    Ok(log)
}

/// stderr as the log writes it (since v01). A server must outlive its log, so a line that cannot be
/// written at once is lost.
pub struct Log(File);

impl Log {
    fn open() -> io::Result<Self> {
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let kind = stderr.metadata()?.file_type();
        if kind.is_fifo() || kind.is_char_device() {
            // Opened a second time, so that O_NONBLOCK does not apply to the other processes with
            // this pipe or terminal: they share the first open file, but not this one.
            let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            let own =
                File::options().write(true).custom_flags(flags.bits()).open("/proc/self/fd/2");
            return Ok(Self(own.unwrap_or(stderr)));
        }
        Ok(Self(stderr))
    }

    /// Writes a whole line, or as much of it as stderr takes at once.
    pub fn put(&self, line: &[u8]) {
        for part in line.chunks(PIPE_BUF) {
            // Where stderr is the first open file, a socket for example, writing may block: ask
            // first.
            let mut room = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut room, PollTimeout::ZERO) != Ok(1) {
                return;
            }
            let _ = nix::unistd::write(&self.0, part);
        }
    }
}

impl Write for &Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.put(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
