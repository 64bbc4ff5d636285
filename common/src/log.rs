//! The log: lines on stderr that never stall a server (since v01).

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use tracing::{level_filters::LevelFilter, warn};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::time::uptime;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// A pipe that has any room takes this many bytes at once (PIPE_BUF in pipe(7)).
const PIPE_BUF: usize = 4096;

/// How many lines wait for the thread of [`Log::Thread`]; the next one is lost.
const MAX_LINES: usize = 1024;

/// How long the end of the process may wait for lines to be written.
const LAST_LINES: Duration = Duration::from_millis(100);

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

/// stderr for the log (since v01). A server must outlive its log, so a line that cannot be written
/// is lost.
pub enum Log {
    /// Written at once or not at all.
    Direct(File),
    /// Written by a thread, which may block.
    Thread(Writer),
}

impl Log {
    fn open() -> io::Result<Self> {
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let kind = stderr.metadata()?.file_type();
        if !kind.is_fifo() && !kind.is_char_device() {
            return Ok(Self::Direct(stderr));
        }
        // Opened a second time, so that O_NONBLOCK does not apply to the other processes with this
        // pipe or terminal: they share stderr's open file description, but not this one.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        match File::options().write(true).custom_flags(flags.bits()).open("/proc/self/fd/2") {
            Ok(own) => Ok(Self::Direct(own)),
            // A terminal of another user. poll(2) finds room in it for 1 byte, and write(2) then
            // blocks for the rest of the line; a pipe with room takes PIPE_BUF bytes.
            Err(_) if kind.is_char_device() => Ok(Self::Thread(Writer::start(stderr)?)),
            Err(_) => Ok(Self::Direct(stderr)),
        }
    }

    /// Writes a whole line, or as much of it as stderr takes at once.
    pub fn put(&self, line: &[u8]) {
        let stderr = match self {
            Self::Direct(stderr) => stderr,
            Self::Thread(writer) => return writer.put(line),
        };
        for part in line.chunks(PIPE_BUF) {
            // What is not opened a second time, a socket for example, may block: ask first.
            let mut room = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut room, PollTimeout::ZERO) != Ok(1) {
                return;
            }
            let _ = nix::unistd::write(stderr, part);
        }
    }

    /// Waits until all lines are written, for at most 100 ms. Call it before the process ends.
    pub fn finish(&self) {
        let Self::Thread(writer) = self else { return };
        let start = Instant::now();
        while writer.unwritten.load(Ordering::Acquire) > 0 && start.elapsed() < LAST_LINES {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// The way to the thread of [`Log::Thread`] (since v01).
pub struct Writer {
    lines: SyncSender<Vec<u8>>,
    unwritten: Arc<AtomicUsize>,
}

impl Writer {
    fn start(mut stderr: File) -> io::Result<Self> {
        let (lines, receiver) = mpsc::sync_channel::<Vec<u8>>(MAX_LINES);
        let unwritten = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&unwritten);
        // The thread inherits the mask. It takes no signal, since it may never get to act on one.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let thread = thread::Builder::new().name("log".to_owned()).spawn(move || {
            for line in receiver {
                let _ = stderr.write_all(&line);
                counter.fetch_sub(1, Ordering::Release);
            }
        });
        mask.thread_set_mask()?;
        thread?;
        Ok(Self { lines, unwritten })
    }

    fn put(&self, line: &[u8]) {
        self.unwritten.fetch_add(1, Ordering::Relaxed);
        if self.lines.try_send(line.to_vec()).is_err() {
            self.unwritten.fetch_sub(1, Ordering::Relaxed);
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
