//! Chapter 4, the other end: a client on the same event loop.

mod lines;
mod tcp_client;

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use common::cli::{self, Addr};
use common::event_loop::EventLoop;

use crate::tcp_client::TcpClient;

/// Chapter 4, the other end: sends messages to reactor-v04 and prints the replies.
/// Try it: cargo run -p reactor-v04-client -- 'hello lars!', or without a message, and type lines
#[derive(clap::Parser)]
#[command(version, verbatim_doc_comment)]
struct Args {
    /// The server: an IPv4 address, an IPv6 address in brackets or a name
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    addr: Addr,

    /// The id of every message, any 32-bit number
    #[arg(long, default_value_t = 1, allow_negative_numbers = true)]
    id: i32,

    /// How long the server may be silent while it owes a reply
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = parse_seconds)]
    timeout: Duration,

    /// How often to connect again after a failure, at first after 0.1 s and then after twice the
    /// pause before, up to a minute; messages without a reply are sent again
    #[arg(long, value_name = "N", default_value_t = 0)]
    retry: u32,

    /// What to send, one message each [default: the lines of standard input]
    #[arg(value_name = "MESSAGE")]
    messages: Vec<OsString>,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    // A day is past any use, and far from what a timer cannot count any more.
    seconds
        .filter(|timeout| !timeout.is_zero() && *timeout <= Duration::from_secs(24 * 60 * 60))
        .ok_or_else(|| "expected a number of seconds, above 0 and up to 86400".to_owned())
}

fn main() -> ExitCode {
    cli::run(|args: Args| {
        let mut event_loop = EventLoop::new().context("cannot make an event loop")?;
        let mut client = TcpClient::new(&mut event_loop, args)?;
        Ok(event_loop.event_process(&mut client)?)
    })
}
