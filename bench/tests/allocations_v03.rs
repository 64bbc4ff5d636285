//! A server of chapter 3 in its stride allocates nothing.

// A test fails by a panic.
#![allow(clippy::unwrap_used)]

mod allocations;
#[path = "../../reactor-v03/src/tcp_server.rs"]
mod tcp_server;

use tcp_server::TcpServer;

/// The loop's room for one batch of events.
const BATCH: u64 = 1;

#[test]
fn one_client_in_its_stride_costs_no_allocation() {
    for rounds in [10, 1_000] {
        let n = allocations::count(TcpServer::new, TcpServer::drain, 1, &[64], rounds);
        assert_eq!(n, BATCH, "allocations during {rounds} messages");
    }
}

/// How many blocks are in use at a time depends on what arrives together, so that the second time
/// may need some that the first one did not: but not one more than all connections can hold.
#[test]
fn many_clients_and_all_sizes_cost_no_more_than_their_blocks() {
    let (clients, sizes, rounds) = (20, [0, 100, 4_096, 1, 60_000], 200);
    let n = allocations::count(TcpServer::new, TcpServer::drain, clients, &sizes, rounds);
    let blocks = clients as u64 * 2;
    assert!(n <= BATCH + blocks, "{n} allocations during {} messages", clients * 5 * rounds);
}
