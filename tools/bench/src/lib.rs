//! The benchmarks: what each chapter costs and gains, next to other servers (peers).
//!
//! A closed-loop load generator, the servers that are compared, and the tables. No chapter depends
//! on it.

pub mod accept;
pub mod calls;
pub mod idle;
pub mod load;
pub mod report;
pub mod target;

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use anyhow::Context;

/// The root of the workspace when this was built.
pub const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

/// The packages of the chapters in their order: the folders `reactor-*` of the workspace.
///
/// # Errors
/// The root of the workspace cannot be read.
pub fn chapters(root: &Path) -> anyhow::Result<Vec<String>> {
    let mut chapters = Vec::new();
    for entry in fs::read_dir(root).with_context(|| root.display().to_string())? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name.starts_with("reactor-") {
            chapters.push(name);
        }
    }
    chapters.sort();
    Ok(chapters)
}

/// Listens on a free port, and logs the address in the same way as the chapters.
///
/// # Errors
/// Any bind(2) or listen(2) error.
pub fn listener() -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    // std's own backlog is too small for a burst of a thousand clients.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::MAXCONN)?;
    eprintln!("listening on {}", listener.local_addr()?);
    Ok(listener)
}
