//! The benchmarks: what each chapter costs and gains, next to other servers (peers).
//!
//! A closed-loop load generator, the servers that are compared, and the tables. No chapter depends
//! on it.

pub mod accept;
pub mod calls;
pub mod idle;
pub mod latency;
pub mod load;
pub mod report;
pub mod target;
pub mod udp;

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::hint::black_box;
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

/// Some work for a callback: hashes `payload` again and again, for about 20 µs if it has 56 bytes.
pub fn work(payload: &[u8]) {
    const TIMES: usize = 2100;
    let mut hasher = DefaultHasher::new();
    (0..TIMES).for_each(|_| hasher.write(black_box(payload)));
    black_box(hasher.finish());
}

/// How many threads a model is to have: its only argument, or the number of cores.
///
/// # Errors
/// It is not a number.
pub fn threads() -> anyhow::Result<usize> {
    match std::env::args().nth(1) {
        Some(n) => n.parse().with_context(|| format!("not a number of threads: {n:?}")),
        None => Ok(std::thread::available_parallelism()?.get()),
    }
}
