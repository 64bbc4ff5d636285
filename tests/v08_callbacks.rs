//! Chapter 8's server with callbacks that block, panic, fail or close.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod callbacks;
#[path = "../reactor-v08/src/conns.rs"]
mod conns;
mod pool_callbacks;
#[path = "../reactor-v08/src/tcp_server.rs"]
mod tcp_server;
#[path = "../reactor-v08/src/worker.rs"]
mod worker;

use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;

use crate::conns::Service;
use crate::pool_callbacks::start;

fn service(router: MsgRouter, hooks: Hooks, _: &Limits) -> Service {
    Service { router, hooks }
}
