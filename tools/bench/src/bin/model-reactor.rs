//! One reactor, one thread: chapter 7's server, with work to do for each message.

#[path = "../../../../reactor-v07/src/conns.rs"]
mod conns;
#[path = "../../../../reactor-v07/src/tcp_server.rs"]
mod tcp_server;

use clap::Parser;
use common::event_loop::EventLoop;
use common::hooks::Hooks;
use common::limit::Limits;
use common::router::MsgRouter;

use crate::conns::Service;
use crate::tcp_server::TcpServer;

#[derive(clap::Parser)]
struct Args {
    #[command(flatten)]
    limits: Limits,
}

fn main() -> anyhow::Result<()> {
    let _log = common::log::start()?;
    let mut event_loop = EventLoop::new()?;
    let mut router = MsgRouter::new();
    router.add_msg_router(
        1,
        Box::new(|conn, payload, id| {
            bench::work(payload);
            conn.send_message(payload, id)
        }),
    )?;
    let (service, limits) =
        (Service { router, hooks: Hooks::new() }, Args::parse_from(["model"]).limits);
    let addr = "127.0.0.1:0".parse().map_err(anyhow::Error::msg)?;
    let mut server = TcpServer::new(&mut event_loop, &addr, &limits, service)?;
    event_loop.event_process(&mut server)?;
    server.drain(&mut event_loop)
}
