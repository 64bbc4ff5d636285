//! Chapter 13's server with another application: its replies are 200 times as long as the requests.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod high_water;
#[path = "../reactor-v13/src/tcp_server.rs"]
mod tcp_server;

use common::cli::Addr;
use common::executor::Runtime;

use crate::tcp_server::{Conn, TcpServer};

fn callback_busi(conn: &mut Conn, _: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(&high_water::reply(id), id)
}

fn serve(addr: &Addr) -> anyhow::Result<()> {
    let runtime = Runtime::new()?;
    let server = TcpServer::new(&runtime, addr)?;
    runtime.run()?;
    server.drain()
}
