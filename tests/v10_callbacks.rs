//! Chapter 10's server with callbacks that block, panic, fail or close, with new settings, and over UDP.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod callbacks;
mod config_callbacks;
#[path = "../reactor-v10/src/conns.rs"]
mod conns;
mod pool_callbacks;
#[path = "../reactor-v10/src/tcp_server.rs"]
mod tcp_server;
mod udp_callbacks;
#[path = "../reactor-v10/src/worker.rs"]
mod worker;

use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;

use crate::conns::Service;
use crate::pool_callbacks::start;

fn service(router: MsgRouter, hooks: Hooks, limits: &Limits) -> Service {
    Service { router, hooks, timeouts: limits.timeouts }
}
