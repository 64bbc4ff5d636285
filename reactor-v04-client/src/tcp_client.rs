//! The client of chapter 4.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use bytes::{Buf, Bytes};
use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, TimerId, Token};
use common::message::{self, HEADER_LEN, MAX_PAYLOAD, Message};
use common::net;
use common::reactor_buf::{InputBuf, OutputBuf};
use tracing::{debug, trace, warn};

use crate::Args;
use crate::lines::Lines;

/// The most that all buffers together may take, in bytes.
const POOL_CAP: usize = 16 << 20;

/// With so many bytes of messages sent and not answered yet, no more are sent.
const WINDOW: usize = 1 << 20;

/// The pause before the first reconnection, and the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Sends messages, one after the other and without waiting for each reply, and prints the replies.
pub struct TcpClient {
    args: Args,
    pool: BufPool,
    conn: Option<Conn>,
    /// The index of the address that is connected to, of those that the name has.
    address: usize,
    retries_left: u32,
    pause: Duration,
    /// Not sent yet.
    waiting: VecDeque<Bytes>,
    /// Sent, and kept until the reply has come: a new connection starts with them.
    unanswered: VecDeque<Bytes>,
    /// The bytes of the frames of `unanswered`.
    in_flight: usize,
    /// `None` when there are no more.
    lines: Option<Lines>,
    stdin: StdinWatch,
    /// Why standard input ended early. What came before it is still sent.
    stdin_error: Option<anyhow::Error>,
    stdout: BufWriter<Stdout>,
    /// When the server last sent something, or a reply was first owed.
    heard: Instant,
    silence_timer: Option<TimerId>,
}

/// How the loop is told of standard input.
#[derive(Clone, Copy)]
enum StdinWatch {
    Off,
    Registered(Token),
    /// A regular file cannot be registered, and always has something to read: a timer that is due
    /// at once takes the place of its readiness.
    Timer,
}

/// The connection, or the attempt at one.
struct Conn {
    stream: TcpStream,
    peer: SocketAddr,
    token: Token,
    connected: bool,
    input: InputBuf,
    output: OutputBuf,
    /// Why nothing can be written any more. What the server sent before that is still read.
    write_error: Option<io::Error>,
}
