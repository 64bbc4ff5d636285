//! Chapter 2: buffers, and an echo through them. One client after the other.

mod tcp_server;

use std::process::ExitCode;

use common::cli::{self, ServerArgs};

use crate::tcp_server::TcpServer;

/// Chapter 2: a blocking echo through pooled buffers; the second client waits for the first one.
/// Try it: nc 127.0.0.1 7777, and the same in another terminal
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| TcpServer::new(&args.server.addr)?.do_accept())
}
