//! What each chapter costs and buys, measured beside its peers.
//!
//! A closed-loop load generator, the servers that are compared, and the table. Not a part of any
//! chapter, and not built with one.

pub mod accept;
pub mod calls;
pub mod idle;
pub mod load;
pub mod report;
pub mod target;

use std::net::{Ipv4Addr, TcpListener};

/// A listening socket on a free port, announced as the chapters announce theirs.
///
/// # Errors
/// What bind(2) and listen(2) say.
pub fn listener() -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // std's own backlog is too short for a thousand clients in a burst.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXCONN)?;
    eprintln!("listening on {}", listener.local_addr()?);
    Ok(listener)
}
