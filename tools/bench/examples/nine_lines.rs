//! The echo that chapter 2 does not build: nine lines, one fixed array, and two faults.
//! `cargo run --example nine_lines -p bench`

use std::io::{self, Read, Write};
use std::net::TcpListener;

#[allow(clippy::unused_io_amount)] // One of the faults.
fn serve(listener: &TcpListener) -> io::Result<()> {
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut buf = [0; 65536];
        loop {
            let n = stream.read(&mut buf)?;
            if n == 0 {
                break;
            }
            stream.write(&buf[..n])?;
        }
    }
}

fn main() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:7777")?;
    println!("listening on {}", listener.local_addr()?);
    serve(&listener)
}
