//! The program of chapter 1: it says hello and closes, one client at a time.

mod tcp_server;

use std::process::ExitCode;

use common::cli::{self, ServerArgs};

use crate::tcp_server::TcpServer;

/// Chapter 1: a blocking server says hello; a client that does not close delays the next by 1 s.
/// Try it: nc 127.0.0.1 7777
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    #[command(flatten)]
    server: ServerArgs,
}

fn main() -> ExitCode {
    cli::run_server(|args: Args| TcpServer::new(&args.server.addr)?.do_accept())
}
