//! The exchange: which messages the client sends, and what it does with the replies.

use std::collections::VecDeque;
use std::io::{self, BufWriter, IsTerminal, Write};
use std::mem;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStringExt;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use bytes::Bytes;
use common::buf_pool::BufPool;
use common::cli::Stdout;
use common::event_loop::{EventLoop, TimerId, Token};
use common::lines::Lines;
use common::message::{HEADER_LEN, MAX_PAYLOAD};
use tracing::{debug, trace, warn};

use crate::Args;
use crate::tcp_client::TcpClient;

/// The limit on all buffers together, in bytes.
const POOL_CAP: usize = 16 << 20;

/// No more messages are sent while this many bytes of them are unsent or unanswered.
const WINDOW: usize = 1 << 20;

/// The pause before the first reconnection. It doubles each time,
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// up to this one.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Sends messages without waiting for each reply, and prints the replies.
pub struct Exchange {
    args: Args,
    pool: BufPool,
    client: Option<TcpClient>,
    peer: SocketAddr,
    /// The other addresses of the name, in case `peer` cannot be reached.
    untried: VecDeque<SocketAddr>,
    retries: u32,
    /// Messages to send before reading more lines.
    waiting: VecDeque<Bytes>,
    /// Messages sent but not answered yet: a new connection starts with them.
    unanswered: VecDeque<Bytes>,
    /// The size of the frames of `unanswered`, in bytes.
    in_flight: usize,
    /// `None` if the messages are on the command line.
    lines: Option<Lines<Self>>,
    stdout: BufWriter<Stdout>,
    /// Runs while the connection or a reply is outstanding.
    reply_timer: Option<TimerId>,
}

impl Exchange {
    pub fn new(event_loop: &mut EventLoop<Self>, mut args: Args) -> Result<Self> {
        let pool = BufPool::new(POOL_CAP);
        let mut waiting = VecDeque::new();
        for (number, message) in (1..).zip(args.messages.drain(..)) {
            let message = Bytes::from(message.into_vec());
            let (len, limit) = (message.len(), MAX_PAYLOAD);
            ensure!(len <= limit, "message {number} is {len} bytes long, the limit is {limit}");
            waiting.push_back(message);
        }
        let stdin = || Lines::new(event_loop, &pool, Self::stdin_callback);
        let lines = waiting.is_empty().then(stdin).transpose()?;
        // On a terminal, show a reply before the first line is typed.
        if lines.is_some() && io::stdin().is_terminal() {
            waiting.push_back(Bytes::from_static(b"hello lars!"));
        }
        let mut exchange = Self {
            client: None,
            peer: args.addr.resolved()[0],
            untried: VecDeque::new(),
            retries: 0,
            args,
            pool,
            waiting,
            unanswered: VecDeque::new(),
            in_flight: 0,
            lines,
            stdout: BufWriter::new(Stdout::new()?),
            reply_timer: None,
        };
        exchange.connect_callback(event_loop, Token::default())?;
        Ok(exchange)
    }

    /// Called at startup, and when the pause before a reconnection is over.
    fn connect_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("connect_callback");
        if self.untried.is_empty() {
            self.untried.extend(self.args.addr.resolved());
        }
        self.peer = self.untried.pop_front().unwrap_or(self.peer);
        match TcpClient::new(event_loop, self.peer, &self.pool) {
            Ok(client) => self.client = Some(client),
            Err(err) => return self.on_disconnect(event_loop, &err.to_string()),
        }
        self.restart_reply_timer(event_loop)
    }

    pub fn connected_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("connected_callback");
        let Some(client) = &mut self.client else { return Ok(()) };
        if let Err(err) = client.do_connected(event_loop) {
            return self.on_disconnect(event_loop, &err.to_string());
        }
        self.untried.clear();
        self.send_waiting(event_loop)?;
        self.restart_reply_timer(event_loop)
    }

    pub fn conn_rd_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("conn_rd_callback");
        let Some(client) = &mut self.client else { return Ok(()) };
        let result = client.do_read(|reply| {
            if let Some(message) = self.unanswered.pop_front() {
                self.in_flight -= HEADER_LEN + message.len();
            }
            writeln!(self.stdout, "{reply}").context("cannot write to standard output")
        });
        self.stdout.flush().context("cannot write to standard output")?;
        if let ControlFlow::Break(reason) = result? {
            return self.on_disconnect(event_loop, &reason);
        }
        self.send_waiting(event_loop)?;
        // Last, so that waiting for standard output does not count against the server.
        self.restart_reply_timer(event_loop)
    }

    pub fn conn_wt_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("conn_wt_callback");
        self.send_waiting(event_loop)
    }

    fn stdin_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("stdin_callback");
        if let Some(lines) = &mut self.lines {
            lines.read();
        }
        self.send_waiting(event_loop)
    }

    fn reply_timeout_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("reply_timeout_callback");
        let silent = format!("silent for {:?}", self.args.timeout);
        let connected = self.client.as_ref().is_some_and(|client| client.connected);
        self.on_disconnect(event_loop, if connected { &silent } else { "timed out" })
    }

    /// Restarts the reply timer, or stops it if nothing is outstanding.
    fn restart_reply_timer(&mut self, event_loop: &mut EventLoop<Self>) -> Result<()> {
        self.reply_timer.take().inspect(|timer| event_loop.cancel_timer(*timer));
        if self.is_outstanding() {
            let (timeout, callback) = (self.args.timeout, Self::reply_timeout_callback);
            self.reply_timer = Some(event_loop.run_after(timeout, Token::default(), callback)?);
        }
        Ok(())
    }

    /// Whether the client waits for the server: to accept, to reply, or first to read.
    fn is_outstanding(&self) -> bool {
        let Some(client) = &self.client else { return false };
        !client.connected || !self.unanswered.is_empty() || !client.output.is_empty()
    }

    /// Without a connection: tries the next address, or all of them again later, or gives up.
    fn on_disconnect(&mut self, event_loop: &mut EventLoop<Self>, reason: &str) -> Result<()> {
        let (peer, n) = (self.peer, self.unanswered.len());
        let mut error = anyhow!("cannot connect to {peer}: {reason}");
        if let Some(client) = self.client.take() {
            if client.connected {
                error = anyhow!("{peer}: {reason}; messages unanswered: {n}");
            }
            event_loop.del_io_event(&client.stream, client.token)?;
        }
        self.restart_reply_timer(event_loop)?;
        if let Some(lines) = &mut self.lines {
            lines.watch(event_loop, false)?;
        }
        // The next connection starts with the unanswered messages.
        self.unanswered.append(&mut self.waiting);
        self.waiting = mem::take(&mut self.unanswered);
        self.in_flight = 0;
        if !self.untried.is_empty() {
            debug!("{error}");
            return self.connect_callback(event_loop, Token::default());
        }
        if self.retries == self.args.retry {
            return Err(error);
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << self.retries.min(16)).min(MAX_PAUSE);
        self.retries += 1;
        warn!("{error}; connecting again in {pause:?}");
        event_loop.run_after(pause, Token::default(), Self::connect_callback)?;
        Ok(())
    }

    /// Sends what the window allows, and stops the loop when everything is done.
    fn send_waiting(&mut self, event_loop: &mut EventLoop<Self>) -> Result<()> {
        let Some(client) = self.client.as_mut().filter(|client| client.connected) else {
            return Ok(());
        };
        // Until nothing is added: writing may open the window again.
        loop {
            client.do_write(event_loop)?;
            let before = client.output.len();
            // Unsent bytes count too: replies to what the server has not read must not open it.
            while self.in_flight.max(client.output.len()) < WINDOW {
                let line = || self.lines.as_mut().and_then(Lines::next_line);
                let Some(message) = self.waiting.pop_front().or_else(line) else { break };
                client.send_message(&message, self.args.id)?;
                self.in_flight += HEADER_LEN + message.len();
                self.unanswered.push_back(message);
            }
            if client.output.len() == before {
                break;
            }
        }
        let mut done = self.waiting.is_empty();
        if let Some(lines) = &mut self.lines {
            lines.watch(event_loop, self.in_flight.max(client.output.len()) < WINDOW)?;
            done &= lines.is_done();
        }
        if self.reply_timer.is_none() {
            self.restart_reply_timer(event_loop)?;
        }
        if done && !self.is_outstanding() {
            event_loop.stop();
            return self.lines.as_mut().and_then(Lines::take_error).map_or(Ok(()), Err);
        }
        Ok(())
    }
}
