//! In steady state, a server of chapter 4 allocates nothing.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

mod allocations;
#[path = "../../../reactor-v04/src/tcp_conn.rs"]
mod tcp_conn;
#[path = "../../../reactor-v04/src/tcp_server.rs"]
mod tcp_server;

use allocations::Chapter;
use tcp_conn::TcpConn;
use tcp_server::TcpServer;

fn callback_busi(conn: &mut TcpConn, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

const CHAPTER: Chapter<TcpServer> = Chapter { new: TcpServer::new, drain: TcpServer::drain };

#[test]
fn one_client_costs_no_allocation() {
    allocations::assert_one_client_costs_none(&CHAPTER);
}

#[test]
fn many_clients_and_all_sizes_cost_no_more_than_their_blocks() {
    allocations::assert_many_clients_cost_no_more_than_their_blocks(&CHAPTER);
}
