//! In steady state, a server of chapter 13 allocates nothing.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

#[allow(dead_code, reason = "this server is not built around an event loop")]
mod allocations;
#[path = "../../../reactor-v13/src/tcp_server.rs"]
mod tcp_server;

use std::os::unix::net::UnixStream;
use std::rc::Rc;

use allocations::Serve;
use common::cli::Addr;
use common::event_loop::Interest;
use common::executor::Runtime;
use tcp_server::{Conn, TcpServer};

fn callback_busi(conn: &mut Conn, payload: &[u8], id: i32) -> anyhow::Result<()> {
    conn.send_message(payload, id)
}

struct Chapter;

impl Serve for Chapter {
    type Server = (Rc<Runtime>, Rc<TcpServer>);
    /// The tasks to poll, and those that the loop has woken: two lists for as long as it runs.
    const BEGIN: u64 = 2;

    fn start(&self, addr: &Addr) -> anyhow::Result<Self::Server> {
        let runtime = Runtime::new()?;
        let server = TcpServer::new(&runtime, addr)?;
        Ok((runtime, server))
    }

    fn serve(&self, (runtime, _): &mut Self::Server, stop: &UnixStream) -> anyhow::Result<()> {
        let callbacks = allocations::stop_callbacks();
        let token = runtime.reactor.borrow_mut().0.add_io_event(stop, Interest::READ, callbacks)?;
        runtime.run()?;
        Ok(runtime.reactor.borrow_mut().0.del_io_event(stop, token)?)
    }

    fn drain(&self, (_, server): Self::Server) -> anyhow::Result<()> {
        server.drain()
    }
}

#[test]
fn one_client_costs_no_allocation() {
    allocations::assert_one_client_costs_none(&Chapter);
}

#[test]
fn many_clients_and_all_sizes_cost_no_more_than_their_blocks() {
    allocations::assert_many_clients_cost_no_more_than_their_blocks(&Chapter);
}
