//! The client of chapter 12: the same exchange over TCP or UDP.

use std::fmt;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use common::cli::{self, Addr};
use common::event_loop::{EventLoop, Token};
use common::message::Message;
use common::router::{MsgRouter, NetConnection};
use common::tcp_client::TcpClient;
use common::udp::UdpClient;
use tracing::warn;

/// What the client sends, with id 1.
const HELLO: &[u8] = b"hello lars!";

/// The first pause before it connects again; each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Chapter 12, the client: one message to reactor-v12 and back, and its reply to be printed there.
/// Try it: cargo run -p reactor-v12 --bin reactor-v12-client -- --udp
#[derive(clap::Parser)]
#[command(name = "reactor-v12-client", version, verbatim_doc_comment)]
struct Args {
    /// The server: an IPv4 address, an IPv6 address in brackets or a name
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    addr: Addr,

    /// Use UDP instead of TCP
    #[arg(long)]
    udp: bool,

    /// How long to wait for the reply
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = cli::parse_seconds)]
    timeout: Duration,

    /// How many times to try again: over UDP at once, over TCP after 0.1 s, then doubling the pause
    /// up to a minute
    #[arg(long, value_name = "N", default_value_t = 3)]
    retry: u32,
}

fn main() -> ExitCode {
    cli::run(|args: Args| if args.udp { over_udp(args) } else { over_tcp(&args) })
}

fn over_udp(args: Args) -> Result<()> {
    let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
    let mut client = UdpClient::new(&mut event_loop, args.addr, args.timeout, args.retry)?;
    client.request(&mut event_loop, HELLO, 1)?;
    print(Message { id: 1, payload: HELLO })?;
    client.send_message(HELLO, 2)?;
    print("goodbye")
}

/// Tries again after a failure, unless the reply has come.
fn over_tcp(args: &Args) -> Result<()> {
    let (replied, mut pause) = (Arc::new(AtomicBool::new(false)), FIRST_PAUSE);
    for _ in 0..args.retry {
        match exchange(args, &replied) {
            Err(err) if !replied.load(Ordering::Relaxed) => {
                warn!("{err:#}; connecting again in {pause:?}");
                thread::sleep(pause);
                pause = (2 * pause).min(LONGEST_PAUSE);
            }
            result => return result,
        }
    }
    exchange(args, &replied)
}

/// What chapter 7's client does.
fn exchange(args: &Args, replied: &Arc<AtomicBool>) -> Result<()> {
    let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
    let mut router = MsgRouter::new();
    let has_reply = Arc::clone(replied);
    let reply_busi = move |conn: &mut dyn NetConnection, payload: &[u8], id| {
        has_reply.store(true, Ordering::Relaxed);
        print(Message { id, payload })?;
        conn.send_message(payload, 2)?;
        conn.close();
        Ok(())
    };
    router.add_msg_router(1, Box::new(reply_busi))?;
    router.set_default(Box::new(|_, payload, id| print(Message { id, payload })));
    let mut client = TcpClient::new(&mut event_loop, args.addr.clone(), router)?;
    client.hooks.set_conn_start(Box::new(|conn| conn.send_message(HELLO, 1)));
    client.hooks.set_conn_close(Box::new(|_| print("goodbye")));
    let timer = event_loop.run_after(args.timeout, Token::default(), |_, _, _| {
        bail!("the server has not replied in time")
    })?;
    while event_loop.registered() > 0 {
        event_loop.poll_once(&mut client, None)?;
        if replied.load(Ordering::Relaxed) {
            event_loop.cancel_timer(timer);
        }
    }
    ensure!(event_loop.failed_closes == 0, "the connection failed while it was closing");
    Ok(())
}

fn print(line: impl fmt::Display) -> Result<()> {
    writeln!(io::stdout(), "{line}").context("cannot print")
}
