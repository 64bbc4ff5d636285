//! The program of chapter 12: a session for each connection.

mod conns;
mod tcp_server;
mod worker;

use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context;
use common::cli::{self, ServerArgs, Stdout, ThreadArgs};
use common::config::{Config, ConfigArgs};
use common::event_loop::EventLoop;
use common::hooks::{Hooks, SessionHook};
use common::limit::Limits;
use common::log::Writer;
use common::message::{self, MAX_PAYLOAD, Message};
use common::router::{MsgRouter, NetConnection};
use common::signal::StopSignals;
use common::task::{Publisher, PublisherCallback};
use tracing::debug;

use crate::conns::Service;
use crate::tcp_server::TcpServer;

/// What the server keeps for each connection.
#[derive(Default)]
pub struct Session {
    /// How many messages have come.
    messages: u64,
    nickname: Option<Box<str>>,
}

impl Session {
    fn name(&self) -> &str {
        self.nickname.as_deref().unwrap_or("anonymous")
    }
}

/// The id of the message that greets a client.
const WELCOME_ID: i32 = 101;

/// Chapter 12: chapter 11 with a session for each connection, which has a nickname.
/// Try it: cargo run -p reactor-v12 --bin reactor-v12-client
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    limits: Limits,

    /// Greet each client with this text, in a message with id 101
    #[arg(long, value_name = "TEXT", value_parser = message::parse_payload)]
    welcome: Option<String>,
    #[command(flatten)]
    pool: ThreadArgs,
    #[command(flatten)]
    config: ConfigArgs,
}

fn main() -> ExitCode {
    cli::run_server(|given: Args| {
        let mut config = Config::<Args>::load()?;
        if given.config.print {
            return write!(Stdout::new()?, "{config}").context("cannot print");
        }
        let has_file = given.config.file.is_some();
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let mut signals = StopSignals::with_reload(&mut event_loop, has_file)
            .context("cannot watch for signals")?;
        let stdout = Writer::stdout().context("cannot write to standard output")?;
        let count = Arc::new(AtomicUsize::new(0));
        let args = &config.args;
        let (addr, threads) = (&args.server.addr, args.pool.threads.into());
        let first = service(args, &stdout, &count)?;
        let mut server = TcpServer::new(&mut event_loop, addr, &args.limits, threads, first)?;
        event_loop.event_process(&mut server)?;
        while has_file && signals.are_hangups()? {
            if config.reload() {
                let args = &config.args;
                server.apply(&args.limits, service(args, &stdout, &count)?)?;
            }
            event_loop.event_process(&mut server)?;
        }
        signals.restore_default(&mut event_loop)?;
        server.drain(&mut event_loop)
    })
}

/// What the server does for every client with these settings.
fn service(args: &Args, stdout: &Writer, count: &Arc<AtomicUsize>) -> anyhow::Result<Service> {
    let stdout = stdout.clone();
    let mut router = MsgRouter::<PublisherCallback<Session>>::default();
    router.add_msg_router(1, Box::new(callback_busi))?;
    router.add_msg_router(2, Box::new(move |_, payload, id| print_busi(&stdout, payload, id)))?;
    router.add_msg_router(3, Box::new(publish_busi))?;
    router.add_msg_router(4, Box::new(nickname_busi))?;
    router.add_msg_router(5, Box::new(session_busi))?;
    let hooks = hooks(args.welcome.clone(), count);
    Ok(Service { router, hooks, timeouts: args.limits.timeouts })
}

/// Hooks that count the connections, and greet each client.
fn hooks(welcome: Option<String>, count: &Arc<AtomicUsize>) -> Hooks<SessionHook<Session>> {
    let mut hooks = Hooks::<SessionHook<Session>>::default();
    let (count, counter) = (Arc::clone(count), Arc::clone(count));
    hooks.set_conn_start(Box::new(move |conn, _| {
        let n = counter.fetch_add(1, Ordering::Relaxed) + 1;
        debug!("on_conn_start: connections: {n}");
        welcome.iter().try_for_each(|text| conn.send_message(text.as_bytes(), WELCOME_ID))
    }));
    hooks.set_conn_close(Box::new(move |_, session| {
        let n = count.fetch_sub(1, Ordering::Relaxed) - 1;
        debug!("on_conn_close: connections: {n}; {} sent {}", session.name(), session.messages);
        Ok(())
    }));
    hooks
}

/// Sends the message back.
fn callback_busi(conn: &mut Publisher<Session>, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

/// Sends the message to all clients, with the name of its sender.
fn publish_busi(conn: &mut Publisher<Session>, payload: &[u8], id: i32) -> anyhow::Result<()> {
    let text = [conn.session.name().as_bytes(), b": ", payload].concat();
    if text.len() > MAX_PAYLOAD {
        return conn.send_message(b"too long with the name before it", -id);
    }
    conn.publish(&text, id)
}

/// Sets the sender's nickname: one line of 1 to 32 characters.
fn nickname_busi(conn: &mut Publisher<Session>, payload: &[u8], id: i32) -> anyhow::Result<()> {
    // U+2028 and U+2029 end a line and a paragraph.
    let ends_line = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}');
    let reason = match str::from_utf8(payload) {
        Err(_) => "a nickname is UTF-8",
        Ok(name) if !(1..=32).contains(&name.chars().count()) => {
            "a nickname has 1 to 32 characters"
        }
        Ok(name) if name.contains(ends_line) => "a nickname has no control characters",
        Ok(name) => {
            conn.session.nickname = Some(name.into());
            return conn.send_message(payload, id);
        }
    };
    conn.send_message(reason.as_bytes(), -id)
}

/// Sends the sender's name, and how many messages have come from it.
fn session_busi(conn: &mut Publisher<Session>, _: &[u8], id: i32) -> anyhow::Result<()> {
    let text = format!("{} {}", conn.session.name(), conn.session.messages);
    conn.send_message(text.as_bytes(), id)
}

/// Prints the message to standard output.
fn print_busi(stdout: &Writer, payload: &[u8], id: i32) -> anyhow::Result<()> {
    stdout.put(format!("{}\n", Message { id, payload }).as_bytes());
    Ok(())
}
