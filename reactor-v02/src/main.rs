//! The program of chapter 2: an echo through buffers, one client at a time.

mod tcp_server;

use std::process::ExitCode;

use common::cli::{self, ServerArgs};

use crate::tcp_server::TcpServer;

/// Chapter 2: a blocking echo through pooled buffers; a second client waits for the first.
/// Try it: nc 127.0.0.1 7777, in two terminals
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| TcpServer::new(&args.server.addr)?.do_accept())
}
