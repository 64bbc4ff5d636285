//! Chapter 4's server with another application: its replies are 200 times as long as the requests.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod high_water;
#[path = "../reactor-v04/src/tcp_conn.rs"]
mod tcp_conn;
#[path = "../reactor-v04/src/tcp_server.rs"]
mod tcp_server;

use common::cli::Addr;
use common::event_loop::EventLoop;

use crate::tcp_conn::TcpConn;
use crate::tcp_server::TcpServer;

fn callback_busi(conn: &mut TcpConn, _: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(&high_water::reply(id), id)
}

fn serve(addr: &Addr) -> anyhow::Result<()> {
    let mut event_loop = EventLoop::new()?;
    let mut server = TcpServer::new(&mut event_loop, addr)?;
    event_loop.event_process(&mut server)?;
    server.drain(&mut event_loop)
}
