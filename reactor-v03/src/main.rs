//! The program of chapter 3: an echo by callbacks, for all clients at once on one thread.

mod tcp_conn;
mod tcp_server;

use std::process::ExitCode;

use anyhow::Context;
use common::cli::{self, ServerArgs};
use common::event_loop::EventLoop;
use common::signal::StopSignals;

use crate::tcp_server::TcpServer;

/// Chapter 3: an echo on an epoll event loop, with thousands of clients at once on one thread.
/// Try it: nc 127.0.0.1 7777, in two terminals
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let signals = StopSignals::register(&mut event_loop).context("cannot watch for signals")?;
        let mut server = TcpServer::new(&mut event_loop, &args.server.addr)?;
        event_loop.event_process(&mut server)?;
        signals.restore_default(&mut event_loop)?;
        server.drain(&mut event_loop)
    })
}
