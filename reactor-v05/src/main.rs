//! The program of chapter 5: an echo for a limited number of clients, which may take limited time.

mod conns;
mod tcp_server;

use std::process::ExitCode;

use anyhow::Context;
use common::cli::{self, ServerArgs};
use common::event_loop::EventLoop;
use common::limit::Limits;
use common::signal::StopSignals;
use common::tcp_conn::TcpConn;

use crate::tcp_server::TcpServer;

/// Chapter 5: an echo of messages, for a limited number of clients at a time.
/// Try it: cargo run -p reactor-v04-client -- 'hello lars!' (nc does not speak this protocol)
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
        let mut server = TcpServer::new(&mut event_loop, &args.server.addr, &args.limits)?;
        event_loop.event_process(&mut server)?;
        signals.restore_default(&mut event_loop)?;
        server.drain(&mut event_loop)
    })
}

/// The application: an echo. The framework does not need to know what a message means.
fn callback_busi(conn: &mut TcpConn, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}
