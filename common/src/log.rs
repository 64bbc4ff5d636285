//! The log: writes lines to stderr without ever blocking a server (since v01).

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
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

use crate::cli::Stdout;

/// A pipe that has any room takes this many bytes at once (PIPE_BUF in pipe(7)).
const PIPE_BUF: usize = 4096;

/// How many bytes may queue for the thread of a [`Writer`]; lines beyond that are dropped.
const MAX_QUEUED: usize = 1 << 20;

/// How long the process may wait at its end for queued lines to be written.
const LAST_LINES: Duration = Duration::from_millis(100);

/// Starts logging to stderr, at the levels in RUST_LOG (`trace`, or `info,reactor_v03=trace`), by
/// default at info (since v01). Call it once.
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
        warn!("RUST_LOG is invalid ({err}), logging at info");
    }
    Ok(log)
}

/// How lines get to stderr (since v01). The log must never stop a server, so a line that cannot be
/// written is dropped.
pub enum Log {
    /// Lines are written at once or dropped. Only one thread at a time may ask whether there is room.
    Direct(Mutex<File>),
    /// A thread writes the lines, and may block.
    Thread(Writer),
}

impl Log {
    fn open() -> io::Result<Self> {
        let stderr = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let kind = stderr.metadata()?.file_type();
        if !kind.is_fifo() && !kind.is_char_device() {
            return Ok(Self::Direct(stderr.into()));
        }
        // Opened again, because O_NONBLOCK is set on an open file description: other processes with
        // this pipe or terminal share stderr's, but not this one.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        match File::options().write(true).custom_flags(flags.bits()).open("/proc/self/fd/2") {
            Ok(own) => Ok(Self::Direct(own.into())),
            // Another user's terminal. poll(2) reports room for as little as 1 byte, and write(2)
            // then blocks for the rest of the line; a pipe with room takes PIPE_BUF bytes.
            Err(_) if kind.is_char_device() => Ok(Self::Thread(Writer::start("log", stderr)?)),
            Err(_) => Ok(Self::Direct(stderr.into())),
        }
    }

    /// Writes a whole line, or as much of it as stderr takes at once.
    pub fn put(&self, line: &[u8]) {
        let stderr = match self {
            Self::Direct(stderr) => &*stderr.lock().unwrap_or_else(PoisonError::into_inner),
            Self::Thread(writer) => return writer.put(line),
        };
        for part in line.chunks(PIPE_BUF) {
            // If it could not be opened again, as with a socket, stderr may block: poll first.
            let mut room = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
            if poll(&mut room, PollTimeout::ZERO) != Ok(1) {
                return;
            }
            let _ = nix::unistd::write(stderr, part);
        }
    }

    /// Waits until all lines are written, for at most 100 ms. Call it before the process ends.
    pub fn finish(&self) {
        if let Self::Thread(writer) = self {
            writer.finish();
        }
    }
}

/// Lines for a thread to write, which may block (since v01). They are written whole, or dropped if
/// the thread is a mebibyte behind.
#[derive(Clone)]
pub struct Writer {
    lines: Sender<Vec<u8>>,
    unwritten: Arc<AtomicUsize>,
}

impl Writer {
    /// Writes to standard output (since v06).
    ///
    /// # Errors
    /// Any fcntl(2) error, typically EBADF: standard output is closed; the thread cannot be started.
    pub fn stdout() -> io::Result<Self> {
        Self::start("stdout", Stdout::new()?)
    }

    fn start(name: &str, mut file: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, receiver) = mpsc::channel::<Vec<u8>>();
        let unwritten = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&unwritten);
        // The thread inherits the mask: it must take no signal, as it may never get to act on it.
        let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let thread = thread::Builder::new().name(name.to_owned()).spawn(move || {
            for line in receiver {
                let _ = file.write_all(&line);
                counter.fetch_sub(line.len(), Ordering::Release);
            }
        });
        mask.thread_set_mask()?;
        thread?;
        Ok(Self { lines, unwritten })
    }

    /// Queues a whole line, or drops it.
    pub fn put(&self, line: &[u8]) {
        if self.unwritten.load(Ordering::Relaxed) + line.len() <= MAX_QUEUED {
            self.unwritten.fetch_add(line.len(), Ordering::Relaxed);
            // The thread lives as long as this does.
            let _ = self.lines.send(line.to_vec());
        }
    }

    fn finish(&self) {
        let start = Instant::now();
        while self.unwritten.load(Ordering::Acquire) > 0 && start.elapsed() < LAST_LINES {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Writer {
    /// The last clone waits until all lines are written, for at most 100 ms.
    fn drop(&mut self) {
        // The thread has the other one.
        if Arc::strong_count(&self.unwritten) == 2 {
            self.finish();
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
