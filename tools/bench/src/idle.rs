//! Measures the memory that an idle connection costs.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::slice;

use anyhow::{Context, ensure};
use common::message;

use crate::target::Target;

/// A server's resident memory, in bytes.
pub struct Memory {
    /// Before any client has connected.
    pub start: u64,
    /// With all clients connected; one reply shows that all of them have been accepted.
    pub connected: u64,
    /// After each client, one after another, has sent a message and got it back.
    pub echoed: u64,
    /// After all clients together have sent a message, and then got it back.
    pub burst: u64,
}

/// Connects `count` clients to `target`, which send messages of 64 bytes.
///
/// # Errors
/// A connection fails, or a reply differs from its request.
pub fn run(target: &Target, count: usize) -> anyhow::Result<Memory> {
    let start = target.memory()?;
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        streams.push(TcpStream::connect(target.addr).context("cannot connect to the server")?);
    }
    // The last client to connect is accepted last: its reply shows that all others are accepted.
    let last = streams.len().saturating_sub(1);
    echo(&mut streams[last..])?;
    let connected = target.memory()?;
    for stream in &mut streams {
        echo(slice::from_mut(stream))?;
    }
    let echoed = target.memory()?;
    echo(&mut streams)?;
    Ok(Memory { start, connected, echoed, burst: target.memory()? })
}

/// First all clients send, then all receive.
fn echo(streams: &mut [TcpStream]) -> anyhow::Result<()> {
    let mut request = [7; 64];
    let header = message::encode_header(1, request.len() - message::HEADER_LEN)?;
    request[..message::HEADER_LEN].copy_from_slice(&header);
    for stream in &mut *streams {
        stream.write_all(&request).context("sending a request")?;
    }
    for stream in streams {
        let mut reply = [0; 64];
        stream.read_exact(&mut reply).context("reading a reply")?;
        ensure!(reply == request, "a reply differs from its request");
    }
    Ok(())
}
