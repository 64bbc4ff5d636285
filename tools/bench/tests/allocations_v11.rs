//! In steady state, no thread of chapter 11's server allocates anything.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

#[path = "../../../reactor-v11/src/conns.rs"]
mod conns;
#[path = "allocations/pool.rs"]
mod pool;
#[expect(dead_code, reason = "no settings change")]
#[path = "../../../reactor-v11/src/tcp_server.rs"]
mod tcp_server;
#[path = "../../../reactor-v11/src/worker.rs"]
mod worker;

use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;
use common::task::{Publisher, PublisherCallback};
use conns::Service;

/// There is none yet.
type Session = ();

fn service(router: MsgRouter, hooks: Hooks, limits: &Limits) -> Service {
    let mut publishers = MsgRouter::<PublisherCallback<Session>>::default();
    let call = move |conn: &mut Publisher<Session>, payload: &[u8], id| {
        router.get(id).map_or(Ok(()), |callback| callback(conn, payload, id))
    };
    publishers.set_default(Box::new(call));
    Service { router: publishers, hooks, timeouts: limits.timeouts }
}
