//! The client of chapter 4.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, BufWriter, IsTerminal, Stdout, Write};
use std::net::{SocketAddr, TcpStream};
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

/// The pause before the first reconnection.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// The longest pause before a reconnection.
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

impl TcpClient {
    pub fn new(event_loop: &mut EventLoop<Self>, mut args: Args) -> anyhow::Result<Self> {
        let pool = BufPool::new(POOL_CAP);
        let mut waiting = VecDeque::new();
        for (number, message) in (1..).zip(args.messages.drain(..)) {
            let message = Bytes::from(message.into_vec());
            let len = message.len();
            if len > MAX_PAYLOAD {
                bail!("message {number} is {len} bytes long, the limit is {MAX_PAYLOAD}");
            }
            waiting.push_back(message);
        }
        let lines = waiting.is_empty().then(|| Lines::new(&pool)).transpose()?;
        if lines.is_some() && io::stdin().is_terminal() {
            waiting.push_back(Bytes::from_static(b"hello lars!"));
        }
        let mut client = Self {
            conn: None,
            address: 0,
            retries_left: args.retry,
            pause: FIRST_PAUSE,
            args,
            pool,
            waiting,
            unanswered: VecDeque::new(),
            in_flight: 0,
            lines,
            stdin: StdinWatch::Off,
            stdin_error: None,
            stdout: BufWriter::new(io::stdout()),
            heard: Instant::now(),
            silence_timer: None,
        };
        client.do_connect(event_loop)?;
        Ok(client)
    }

    /// Starts to connect. The socket becomes writable when that has succeeded or failed.
    fn do_connect(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let peer = self.args.addr.resolved()[self.address];
        match Conn::new(event_loop, peer, &self.pool) {
            Ok(conn) => self.conn = Some(conn),
            Err(err) => return self.connect_failed(event_loop, peer, err),
        }
        self.heard = Instant::now();
        self.watch_for_silence(event_loop)
    }

    /// Connecting has succeeded or failed.
    fn do_connected(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let Some(conn) = &mut self.conn else { return Ok(()) };
        let peer = conn.peer;
        match conn.finish(event_loop) {
            Ok(()) => self.do_write(event_loop),
            Err(err) => self.connect_failed(event_loop, peer, err),
        }
    }

    /// Goes on to the next address that the name has, if there is one.
    fn connect_failed(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        peer: SocketAddr,
        err: io::Error,
    ) -> anyhow::Result<()> {
        if self.address + 1 < self.args.addr.resolved().len() {
            debug!("cannot connect to {peer}: {err}");
            self.address += 1;
            self.clean_conn(event_loop)?;
            return self.do_connect(event_loop);
        }
        self.lost(event_loop, anyhow!("cannot connect to {peer}: {err}"))
    }

    /// The connection is lost: tries again later, or gives up with `why`.
    fn lost(&mut self, event_loop: &mut EventLoop<Self>, why: anyhow::Error) -> anyhow::Result<()> {
        self.clean_conn(event_loop)?;
        self.address = 0;
        if self.retries_left == 0 {
            return Err(why);
        }
        self.retries_left -= 1;
        warn!("{why:#}; connecting again in {:?}", self.pause);
        event_loop.run_after(self.pause, Token::default(), connect_callback)?;
        self.pause = (self.pause * 2).min(MAX_PAUSE);
        Ok(())
    }

    /// Drops the connection. What has no reply yet is to be sent again.
    fn clean_conn(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        if let Some(conn) = self.conn.take() {
            event_loop.del_io_event(&conn.stream, conn.token)?;
        }
        if let Some(timer) = self.silence_timer.take() {
            event_loop.cancel_timer(timer);
        }
        self.in_flight = 0;
        while let Some(message) = self.unanswered.pop_back() {
            self.waiting.push_front(message);
        }
        self.watch_stdin(event_loop)
    }

    /// Prints the replies that have come, and sends more now that fewer are owed.
    fn do_read(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let Some(conn) = &mut self.conn else { return Ok(()) };
        let what = match conn.input.read_from(&conn.stream) {
            Ok(None) => return Ok(()),
            Ok(Some(0)) if conn.write_error.is_none() && !conn.input.is_empty() => {
                format!("closed the connection {} bytes into a message", conn.input.len())
            }
            Ok(Some(0)) => match conn.write_error.take() {
                None => "closed the connection".to_owned(),
                Some(err) => format!("connection lost: {err}"),
            },
            Err(err) => format!("connection lost: {err}"),
            Ok(Some(_)) => {
                let handled = self.handle_messages();
                self.stdout.flush().context("cannot write to standard output")?;
                handled?;
                // Only now: standard output may have kept this program waiting, and not the server.
                self.heard = Instant::now();
                return self.do_write(event_loop);
            }
        };
        let why = anyhow!("{}: {what}; messages unanswered: {}", conn.peer, self.unanswered.len());
        self.lost(event_loop, why)
    }

    /// Prints the replies that are whole.
    fn handle_messages(&mut self) -> anyhow::Result<()> {
        let Some(conn) = &mut self.conn else { return Ok(()) };
        let Some(mut block) = conn.input.take() else { return Ok(()) };
        while let Some(reply) = message::decode(block.data())
            .with_context(|| format!("{} has sent a bad frame", conn.peer))?
        {
            print(&mut self.stdout, reply).context("cannot write to standard output")?;
            if let Some(message) = self.unanswered.pop_front() {
                self.in_flight -= HEADER_LEN + message.len();
            }
            let frame_len = reply.frame_len();
            block.pop(frame_len);
        }
        conn.input.put_back(block);
        Ok(())
    }

    /// Sends what may be sent, and settles what the client waits for next.
    fn do_write(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let owed = self.is_owed();
        let Some(conn) = self.conn.as_mut().filter(|conn| conn.connected) else { return Ok(()) };
        if !owed {
            self.heard = Instant::now();
        }
        // A server that replies to what it has not read must not open the window by that.
        while self.in_flight.max(conn.output.len()) < WINDOW {
            let Some(message) = self.waiting.pop_front() else { break };
            conn.send_message(&message, self.args.id)?;
            self.in_flight += HEADER_LEN + message.len();
            self.unanswered.push_back(message);
        }
        conn.flush(event_loop)?;
        self.watch_stdin(event_loop)?;
        if self.waiting.is_empty() && !self.is_owed() && self.lines.is_none() {
            event_loop.stop();
            return self.stdin_error.take().map_or(Ok(()), Err);
        }
        self.watch_for_silence(event_loop)
    }

    /// Whether the server has something to do: to reply, or first to read.
    fn is_owed(&self) -> bool {
        !self.unanswered.is_empty()
            || self.conn.as_ref().is_some_and(|conn| !conn.output.is_empty())
    }

    /// Takes in the next lines of standard input.
    fn do_stdin(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let Some(lines) = &mut self.lines else { return Ok(()) };
        match lines.read(&mut self.waiting) {
            Ok(true) => {}
            Ok(false) => self.lines = None,
            Err(err) => {
                self.lines = None;
                self.stdin_error = Some(err);
            }
        }
        self.do_write(event_loop)
    }

    /// Has standard input watched just while its lines can be sent: it could not be masked, a pipe
    /// that its writer has closed reports EPOLLHUP for ever.
    fn watch_stdin(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let wanted = self.lines.is_some()
            && self.in_flight < WINDOW
            && self.conn.as_ref().is_some_and(|conn| conn.connected);
        match self.stdin {
            StdinWatch::Off if wanted => {
                let callbacks = Callbacks { read: Some(stdin_callback), write: None };
                self.stdin = match event_loop.add_io_event(io::stdin(), Interest::READ, callbacks) {
                    Ok(token) => StdinWatch::Registered(token),
                    Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                        let now = Duration::ZERO;
                        event_loop.run_after(now, Token::default(), stdin_timer_callback)?;
                        StdinWatch::Timer
                    }
                    Err(err) => return Err(err).context("cannot watch standard input"),
                };
            }
            StdinWatch::Registered(token) if !wanted => {
                event_loop.del_io_event(io::stdin(), token)?;
                self.stdin = StdinWatch::Off;
            }
            _ => {}
        }
        Ok(())
    }

    /// Sets the timer while the server owes something, unless it is set already.
    fn watch_for_silence(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        let connecting = self.conn.as_ref().is_some_and(|conn| !conn.connected);
        if self.silence_timer.is_none() && (connecting || self.is_owed()) {
            let left = self.args.timeout.saturating_sub(self.heard.elapsed());
            let timer = event_loop.run_after(left, Token::default(), silence_callback)?;
            self.silence_timer = Some(timer);
        }
        Ok(())
    }

    /// The timer has run out, which only says that it is time to look.
    fn do_silence(&mut self, event_loop: &mut EventLoop<Self>) -> anyhow::Result<()> {
        self.silence_timer = None;
        // This program may have been stopped for a while: what has come meanwhile counts.
        if self.conn.as_ref().is_some_and(|conn| conn.connected) {
            self.do_read(event_loop)?;
        }
        let Some(conn) = &self.conn else { return Ok(()) };
        let (timeout, n) = (self.args.timeout, self.unanswered.len());
        if self.heard.elapsed() < timeout || (conn.connected && !self.is_owed()) {
            return self.watch_for_silence(event_loop);
        }
        if conn.connected {
            let why = anyhow!("{}: silent for {timeout:?}; messages unanswered: {n}", conn.peer);
            return self.lost(event_loop, why);
        }
        let (peer, timed_out) = (conn.peer, io::ErrorKind::TimedOut.into());
        self.connect_failed(event_loop, peer, timed_out)
    }
}

impl Conn {
    /// Starts to connect.
    fn new(
        event_loop: &mut EventLoop<TcpClient>,
        peer: SocketAddr,
        pool: &BufPool,
    ) -> io::Result<Self> {
        let stream = net::connect(peer)?;
        stream.set_nodelay(true)?;
        let callbacks = Callbacks { read: None, write: Some(connected_callback) };
        let token = event_loop.add_io_event(&stream, Interest::WRITE, callbacks)?;
        let (input, output) = (InputBuf::new(pool), OutputBuf::new(pool));
        Ok(Self { stream, peer, token, connected: false, input, output, write_error: None })
    }

    /// Finds out how connecting went, and swaps the callbacks if it went well.
    fn finish(&mut self, event_loop: &mut EventLoop<TcpClient>) -> io::Result<()> {
        if let Some(err) = self.stream.take_error()? {
            return Err(err);
        }
        debug!("connected to {}", self.peer);
        event_loop.del_io_event(&self.stream, self.token)?;
        let callbacks = Callbacks { read: Some(conn_rd_callback), write: Some(conn_wt_callback) };
        self.token = event_loop.add_io_event(&self.stream, Interest::READ, callbacks)?;
        self.connected = true;
        Ok(())
    }

    fn send_message(&mut self, payload: &[u8], id: i32) -> anyhow::Result<()> {
        let header = message::encode_header(id, payload.len())?;
        self.output.send_data(header.chain(payload))?;
        Ok(())
    }

    fn flush(&mut self, event_loop: &mut EventLoop<TcpClient>) -> io::Result<()> {
        if self.write_error.is_none() {
            self.write_error = self.output.write_to(&self.stream).err();
        }
        let write = !self.output.is_empty() && self.write_error.is_none();
        event_loop.set_interest(&self.stream, self.token, Interest { read: true, write })
    }
}

/// Prints one reply as one line, whatever its bytes are.
fn print(out: &mut impl Write, reply: Message) -> io::Result<()> {
    let (id, len) = (reply.id, reply.payload.len());
    write!(out, "id={id} len={len}")?;
    if len > 0 {
        write!(out, " {}", Escaped(reply.payload))?;
    }
    writeln!(out)
}

/// Bytes as text; what is no UTF-8 or not printable, and the backslash, as escapes.
struct Escaped<'a>(&'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            // Quotes are the only printable characters that `escape_debug` would escape.
            for part in chunk.valid().split_inclusive(['"', '\'']) {
                let text = part.trim_end_matches(['"', '\'']);
                write!(f, "{}{}", text.escape_debug(), &part[text.len()..])?;
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

fn connect_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("connect_callback");
    client.do_connect(event_loop).map_err(io::Error::other)
}

fn connected_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("connected_callback");
    client.do_connected(event_loop).map_err(io::Error::other)
}

fn conn_rd_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("conn_rd_callback");
    client.do_read(event_loop).map_err(io::Error::other)
}

fn conn_wt_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("conn_wt_callback");
    client.do_write(event_loop).map_err(io::Error::other)
}

fn stdin_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("stdin_callback");
    client.do_stdin(event_loop).map_err(io::Error::other)
}

fn stdin_timer_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("stdin_timer_callback");
    client.stdin = StdinWatch::Off;
    client.do_stdin(event_loop).map_err(io::Error::other)
}

fn silence_callback(
    event_loop: &mut EventLoop<TcpClient>,
    client: &mut TcpClient,
    _: Token,
) -> io::Result<()> {
    trace!("silence_callback");
    client.do_silence(event_loop).map_err(io::Error::other)
}
