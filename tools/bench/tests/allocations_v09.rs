//! In steady state, no thread of chapter 9's server allocates anything.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

#[path = "../../../reactor-v09/src/conns.rs"]
mod conns;
#[path = "allocations/pool.rs"]
mod pool;
#[expect(dead_code, reason = "no settings change")]
#[path = "../../../reactor-v09/src/tcp_server.rs"]
mod tcp_server;
#[path = "../../../reactor-v09/src/worker.rs"]
mod worker;

use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;
use conns::Service;

/// There is none yet.
type Session = ();

fn service(router: MsgRouter, hooks: Hooks, limits: &Limits) -> Service {
    Service { router, hooks, timeouts: limits.timeouts }
}
