//! An echo of chapter 4's messages on tokio's multi-thread runtime, with work to do for each.

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn main() -> anyhow::Result<()> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(bench::threads()?).enable_io().build()?.block_on(async {
        let listener = bench::listener()?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(serve(stream));
        }
    })
}

async fn serve(mut stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let (mut input, mut replies) = (BytesMut::with_capacity(64 * 1024), BytesMut::new());
    while stream.read_buf(&mut input).await? > 0 {
        while let Some(message) = common::message::decode(&input)? {
            bench::work(message.payload);
            let frame_len = message.frame_len();
            replies.extend_from_slice(&input[..frame_len]);
            input.advance(frame_len);
        }
        stream.write_all(&replies).await?;
        replies.clear();
        input.reserve(64 * 1024);
    }
    Ok(())
}
