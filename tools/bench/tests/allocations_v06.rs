//! In steady state, a server of chapter 6 allocates nothing.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

mod allocations;
#[path = "../../../reactor-v06/src/conns.rs"]
mod conns;
#[path = "../../../reactor-v06/src/tcp_server.rs"]
mod tcp_server;

use std::num::NonZeroUsize;
use std::time::Duration;

use allocations::Chapter;
use common::limit::{Limits, Timeouts, WhenFull};
use common::router::MsgRouter;
use conns::Service;
use tcp_server::TcpServer;

const LIMITS: Limits = Limits {
    max_conns: NonZeroUsize::new(100).unwrap(),
    when_full: WhenFull::Refuse,
    timeouts: Timeouts { idle_timeout: Duration::ZERO, frame_timeout: Duration::from_secs(30) },
};

/// One callback, which echoes.
fn router() -> anyhow::Result<MsgRouter> {
    let mut router = MsgRouter::new();
    router.add_msg_router(1, Box::new(|conn, payload, id| conn.send_message(payload, id)))?;
    Ok(router)
}

const CHAPTER: Chapter<TcpServer> = Chapter {
    new: |event_loop, addr| {
        TcpServer::new(event_loop, addr, &LIMITS, Service { router: router()? })
    },
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
