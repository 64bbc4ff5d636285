//! How many bytes a task of chapter 13 holds, written in two ways.

use std::io;
use std::net::{SocketAddr, TcpStream};

use common::executor::Async;
use common::reactor_buf::{InputBuf, OutputBuf};

/// What the connection of the server has.
#[allow(dead_code)]
struct Conn {
    stream: Async<TcpStream>,
    peer: SocketAddr,
    input: InputBuf,
    output: OutputBuf,
}

impl Conn {
    async fn talk(&mut self) -> io::Result<()> {
        self.stream.readable().await
    }
}

/// The first way: a function with an argument.
async fn serve(mut conn: Conn) -> io::Result<()> {
    conn.talk().await
}

fn main() {
    println!("Conn                  {:4}", size_of::<Conn>());
    println!("async fn talk(&mut)   {:4}", size_of_output(Conn::talk));
    println!("async fn serve(conn)  {:4}", size_of_output(serve));
    // The second way: a block that captures it.
    let serve = |mut conn: Conn| async move { conn.talk().await };
    println!("async move block      {:4}", size_of_output(serve));
}

/// The size of the future that a function returns. None has to be made for that.
fn size_of_output<A, F: Future>(_: impl FnOnce(A) -> F) -> usize {
    size_of::<F>()
}
