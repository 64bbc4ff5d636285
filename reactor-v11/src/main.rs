//! The program of chapter 11: tasks for other loops, by which a client publishes a message.

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
use common::hooks::Hooks;
use common::limit::Limits;
use common::log::Writer;
use common::message::{self, Message};
use common::router::{MsgRouter, NetConnection};
use common::signal::StopSignals;
use common::task::{Publisher, PublisherCallback};
use tracing::debug;

use crate::conns::Service;
use crate::tcp_server::TcpServer;

/// The id of the message that greets a client.
const WELCOME_ID: i32 = 101;

/// Chapter 11: chapter 10 that sends each message with id 3 to all clients.
/// Try it: cargo run -p reactor-v11 --bin reactor-v11-client
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
    let mut router = MsgRouter::<PublisherCallback>::default();
    router.add_msg_router(1, Box::new(callback_busi))?;
    router.add_msg_router(2, Box::new(move |_, payload, id| print_busi(&stdout, payload, id)))?;
    router.add_msg_router(3, Box::new(publish_busi))?;
    let hooks = hooks(args.welcome.clone(), count);
    Ok(Service { router, hooks, timeouts: args.limits.timeouts })
}

/// Hooks that count the connections, and greet each client.
fn hooks(welcome: Option<String>, count: &Arc<AtomicUsize>) -> Hooks {
    let mut hooks = Hooks::new();
    let (count, counter) = (Arc::clone(count), Arc::clone(count));
    hooks.set_conn_start(Box::new(move |conn| {
        let n = counter.fetch_add(1, Ordering::Relaxed) + 1;
        debug!("on_conn_start: connections: {n}");
        welcome.iter().try_for_each(|text| conn.send_message(text.as_bytes(), WELCOME_ID))
    }));
    hooks.set_conn_close(Box::new(move |_| {
        let n = count.fetch_sub(1, Ordering::Relaxed) - 1;
        debug!("on_conn_close: connections: {n}");
        Ok(())
    }));
    hooks
}

/// Sends the message back.
fn callback_busi(conn: &mut Publisher, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

/// Sends the message to all clients.
fn publish_busi(conn: &mut Publisher, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.publish(payload, id)
}

/// Prints the message to standard output.
fn print_busi(stdout: &Writer, payload: &[u8], id: i32) -> anyhow::Result<()> {
    stdout.put(format!("{}\n", Message { id, payload }).as_bytes());
    Ok(())
}
