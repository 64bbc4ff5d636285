//! In steady state, no thread of chapter 12's server allocates anything.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

#[path = "../../../reactor-v12/src/conns.rs"]
mod conns;
#[path = "allocations/pool.rs"]
mod pool;
#[expect(dead_code, reason = "no settings change")]
#[path = "../../../reactor-v12/src/tcp_server.rs"]
mod tcp_server;
#[path = "../../../reactor-v12/src/worker.rs"]
mod worker;

use common::hooks::{Hooks, SessionHook};
use common::limit::Limits;
use common::router::MsgRouter;
use common::task::{Publisher, PublisherCallback};
use conns::Service;

/// As large as the chapter's own.
#[derive(Default)]
pub struct Session {
    messages: u64,
    _nickname: Option<Box<str>>,
}

fn service(router: MsgRouter, _: Hooks, limits: &Limits) -> Service {
    let mut publishers = MsgRouter::<PublisherCallback<Session>>::default();
    let call = move |conn: &mut Publisher<Session>, payload: &[u8], id| {
        router.get(id).map_or(Ok(()), |callback| callback(conn, payload, id))
    };
    publishers.set_default(Box::new(call));
    let hooks = Hooks::<SessionHook<Session>>::default();
    Service { router: publishers, hooks, timeouts: limits.timeouts }
}
