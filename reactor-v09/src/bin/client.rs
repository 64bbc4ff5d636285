//! The client of chapter 9: hooks send its first message, and say goodbye.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, ensure};
use common::cli::{self, Addr};
use common::event_loop::EventLoop;
use common::message::Message;
use common::router::{MsgRouter, NetConnection};
use common::tcp_client::TcpClient;

/// Chapter 9, the client: one message to reactor-v09 and back, and its reply to be printed there.
/// Try it: cargo run -p reactor-v09 --bin reactor-v09-client
#[derive(clap::Parser)]
#[command(name = "reactor-v09-client", version, verbatim_doc_comment)]
struct Args {
    /// The server: an IPv4 address, an IPv6 address in brackets or a name
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7777")]
    addr: Addr,
}

fn main() -> ExitCode {
    cli::run(|args: Args| {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let mut router = MsgRouter::new();
        router.add_msg_router(1, Box::new(reply_busi))?;
        router.set_default(Box::new(print_busi));
        let mut client = TcpClient::new(&mut event_loop, args.addr, router)?;
        client.hooks.set_conn_start(Box::new(|conn| conn.send_message(b"hello lars!", 1)));
        client.hooks.set_conn_close(Box::new(goodbye));
        while event_loop.registered() > 0 {
            event_loop.poll_once(&mut client, None)?;
        }
        ensure!(event_loop.failed_closes == 0, "the connection failed while it was closing");
        Ok(())
    })
}

fn goodbye(_: &mut dyn NetConnection) -> anyhow::Result<()> {
    writeln!(io::stdout(), "goodbye").context("cannot print")
}

fn print_busi(_: &mut dyn NetConnection, payload: &[u8], id: i32) -> anyhow::Result<()> {
    writeln!(io::stdout(), "{}", Message { id, payload }).context("cannot print")
}

fn reply_busi(conn: &mut dyn NetConnection, payload: &[u8], id: i32) -> anyhow::Result<()> {
    print_busi(conn, payload, id)?;
    conn.send_message(payload, 2)?;
    conn.close();
    Ok(())
}
