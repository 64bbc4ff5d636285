//! Chapter 11's server with callbacks that block, panic, fail or close, with new settings, over UDP, and
//! with callbacks that publish.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

mod callbacks;
mod config_callbacks;
#[path = "../reactor-v11/src/conns.rs"]
mod conns;
mod pool_callbacks;
mod publish_callbacks;
#[path = "../reactor-v11/src/tcp_server.rs"]
mod tcp_server;
mod udp_callbacks;
#[path = "../reactor-v11/src/worker.rs"]
mod worker;

use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;
use common::task::PublisherCallback;

use crate::conns::Service;
use crate::pool_callbacks::start;
use crate::publish_callbacks::for_publishers;

/// There is none yet.
type Session = ();

fn service(router: MsgRouter, hooks: Hooks, limits: &Limits) -> Service {
    publisher_service(for_publishers(router), hooks, limits)
}

fn publisher_service(
    router: MsgRouter<PublisherCallback<Session>>,
    hooks: Hooks,
    limits: &Limits,
) -> Service {
    Service { router, hooks, timeouts: limits.timeouts }
}
