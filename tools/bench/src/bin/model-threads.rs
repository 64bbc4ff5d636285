//! A thread per client, blocking: an echo of chapter 4's messages, with work to do for each.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::thread;

use anyhow::Context;
use common::message;

fn main() -> anyhow::Result<()> {
    let listener = bench::listener()?;
    loop {
        let (stream, _) = listener.accept()?;
        // An error is the end of that client.
        thread::Builder::new().spawn(move || serve(&stream))?;
    }
}

fn serve(mut stream: &TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    // The same read size as the other servers.
    let mut input = BufReader::with_capacity(64 * 1024, stream);
    let (mut message, mut replies) = (Vec::new(), Vec::new());
    while !input.fill_buf()?.is_empty() {
        message.resize(8, 0);
        input.read_exact(&mut message)?;
        let length = i32::from_le_bytes(message[4..].try_into()?);
        message.resize(8 + usize::try_from(length)?, 0);
        input.read_exact(&mut message[8..])?;
        let decoded = message::decode(&message)?.context("the message is whole")?;
        bench::work(decoded.payload);
        replies.extend_from_slice(&message);
        // Replies to what has arrived together leave together.
        if input.buffer().is_empty() {
            stream.write_all(&replies)?;
            replies.clear();
        }
    }
    Ok(())
}
