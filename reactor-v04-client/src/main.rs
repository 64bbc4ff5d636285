//! The program of chapter 4's client, on the same event loop.

mod exchange;
mod tcp_client;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use common::cli::{self, Addr};
use common::event_loop::EventLoop;

use crate::exchange::Exchange;

/// Chapter 4, the client: sends messages to reactor-v04 and prints the replies.
/// Try it: cargo run -p reactor-v04-client -- 'hello lars!' (without a message, type lines)
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    /// The server: an IPv4 address, an IPv6 address in brackets or a name
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    addr: Addr,

    /// The id of every message: any 32-bit signed number
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    id: i32,

    /// How long to wait for the next reply while one is outstanding
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = cli::parse_seconds)]
    timeout: Duration,

    /// How many times to reconnect after a failure, first after 0.1 s, then doubling the pause up
    /// to a minute; unanswered messages are sent again
    #[arg(long, value_name = "N", default_value_t = 0)]
    retry: u32,

    /// The messages to send [default: the lines of standard input]
    #[arg(value_name = "MESSAGE")]
    messages: Vec<OsString>,
}

fn main() -> ExitCode {
    cli::run(|args: Args| {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let mut exchange = Exchange::new(&mut event_loop, args)?;
        event_loop.event_process(&mut exchange)
    })
}
