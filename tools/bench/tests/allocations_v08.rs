//! In steady state, no thread of chapter 8's server allocates anything.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

#[path = "../../../reactor-v08/src/conns.rs"]
mod conns;
#[path = "allocations/pool.rs"]
mod pool;
#[path = "../../../reactor-v08/src/tcp_server.rs"]
mod tcp_server;
#[path = "../../../reactor-v08/src/worker.rs"]
mod worker;

use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;
use conns::Service;

/// There is none yet.
type Session = ();

fn service(router: MsgRouter, hooks: Hooks, _: &Limits) -> Service {
    Service { router, hooks }
}
