//! In steady state, a server of chapter 5 allocates nothing.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

mod allocations;
#[path = "../../../reactor-v05/src/conns.rs"]
mod conns;
#[path = "../../../reactor-v05/src/tcp_server.rs"]
mod tcp_server;

use std::num::NonZeroUsize;
use std::time::Duration;

use allocations::Chapter;
use common::limit::{Limits, Timeouts, WhenFull};
use common::tcp_conn::TcpConn;
use tcp_server::TcpServer;

const LIMITS: Limits = Limits {
    max_conns: NonZeroUsize::new(100).unwrap(),
    when_full: WhenFull::Refuse,
    timeouts: Timeouts { idle_timeout: Duration::ZERO, frame_timeout: Duration::from_secs(30) },
};

fn callback_busi(conn: &mut TcpConn, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

const CHAPTER: Chapter<TcpServer> = Chapter {
    new: |event_loop, addr| TcpServer::new(event_loop, addr, &LIMITS),
    drain: TcpServer::drain,
};

#[test]
fn one_client_costs_no_allocation() {
    allocations::assert_one_client_costs_none(&CHAPTER);
}

#[test]
fn many_clients_and_all_sizes_cost_no_more_than_their_blocks() {
    allocations::assert_many_clients_cost_no_more_than_their_blocks(&CHAPTER);
}
