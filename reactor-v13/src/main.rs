//! The program of chapter 13: chapter 4 as async functions, on the same event loop.

mod tcp_server;

use std::process::ExitCode;

use anyhow::Context;
use common::cli::{self, ServerArgs};
use common::executor::Runtime;
use common::signal::StopSignals;

use crate::tcp_server::{Conn, TcpServer};

/// Chapter 13: an echo of messages (id, length, payload), written with async and await.
/// Try it: cargo run -p reactor-v04-client -- 'hello lars!' (nc does not speak this protocol)
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| {
        let runtime = Runtime::new().context("cannot create the event loop")?;
        let signals = StopSignals::register(&mut runtime.reactor.borrow_mut().0);
        let signals = signals.context("cannot watch for signals")?;
        let server = TcpServer::new(&runtime, &args.server.addr)?;
        runtime.run()?;
        signals.restore_default(&mut runtime.reactor.borrow_mut().0)?;
        server.drain()
    })
}

/// The application: an echo. The framework does not need to know what a message means.
fn callback_busi(conn: &mut Conn, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}
