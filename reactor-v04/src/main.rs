//! Chapter 4: one object per connection, and messages instead of a stream of bytes.

mod tcp_conn;
mod tcp_server;

use std::process::ExitCode;

use common::cli::{self, ServerArgs};
use common::event_loop::EventLoop;
use common::signal::StopSignals;

use crate::tcp_server::TcpServer;

/// Chapter 4: an echo of messages (id, length, payload) on the event loop, one TcpConn per client.
/// Try it: cargo run -p reactor-v04-client -- 'hello lars!' (nc does not speak in messages)
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| {
        let mut event_loop = EventLoop::new()?;
        let signals = StopSignals::register(&mut event_loop)?;
        let mut server = TcpServer::new(&mut event_loop, &args.server.addr)?;
        event_loop.event_process(&mut server)?;
        signals.take(&mut event_loop)?;
        server.drain(&mut event_loop)
    })
}
