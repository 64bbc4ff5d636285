//! The program of chapter 6: a callback for each kind of message.

mod conns;
mod tcp_server;

use std::process::ExitCode;

use anyhow::Context;
use common::cli::{self, ServerArgs};
use common::event_loop::EventLoop;
use common::limit::Limits;
use common::log::Writer;
use common::message::Message;
use common::router::{MsgRouter, NetConnection};
use common::signal::StopSignals;

use crate::conns::Service;
use crate::tcp_server::TcpServer;

/// Chapter 6: messages with id 1 are echoed, those with id 2 printed; others are skipped.
/// Try it: cargo run -p reactor-v06 --bin reactor-v06-client
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    limits: Limits,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let signals = StopSignals::register(&mut event_loop).context("cannot watch for signals")?;
        let stdout = Writer::stdout().context("cannot write to standard output")?;
        let mut router = MsgRouter::new();
        router.add_msg_router(1, Box::new(callback_busi))?;
        router
            .add_msg_router(2, Box::new(move |_, payload, id| print_busi(&stdout, payload, id)))?;
        let service = Service { router };
        let mut server = TcpServer::new(&mut event_loop, &args.server.addr, &args.limits, service)?;
        event_loop.event_process(&mut server)?;
        signals.restore_default(&mut event_loop)?;
        server.drain(&mut event_loop)
    })
}

/// Sends the message back.
fn callback_busi(conn: &mut dyn NetConnection, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

/// Prints the message to standard output.
fn print_busi(stdout: &Writer, payload: &[u8], id: i32) -> anyhow::Result<()> {
    stdout.put(format!("{}\n", Message { id, payload }).as_bytes());
    Ok(())
}
