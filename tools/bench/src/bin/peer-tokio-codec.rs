//! An echo of chapter 4's messages on tokio, with the codec of tokio-util.

use bytes::BytesMut;
use futures_util::{FutureExt, SinkExt, StreamExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::codec::{BytesCodec, FramedRead, FramedWrite, LengthDelimitedCodec};

fn main() -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_io().build()?.block_on(async {
        let listener = bench::listener()?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        loop {
            let (stream, _) = listener.accept().await?;
            tokio::spawn(serve(stream));
        }
    })
}

async fn serve(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let codec = LengthDelimitedCodec::builder()
        .little_endian()
        .length_field_offset(4)
        .length_field_length(4)
        .length_adjustment(8)
        .num_skip(0)
        .max_frame_length(65_535)
        .new_codec();
    let (reader, writer) = stream.split();
    // The same read size as the other servers. The default is 8 KiB, less than some messages.
    let mut messages = FramedRead::with_capacity(reader, codec, 64 * 1024);
    // The frames keep their headers, so that they can be sent back unchanged.
    let mut replies: FramedWrite<_, BytesCodec> = FramedWrite::new(writer, BytesCodec::new());
    replies.set_backpressure_boundary(256 * 1024);
    while let Some(message) = messages.next().await {
        replies.feed(message?).await?;
        // Everything that has arrived already is sent back in the same write.
        while let Some(Some(message)) = messages.next().now_or_never() {
            replies.feed(message?).await?;
        }
        SinkExt::<BytesMut>::flush(&mut replies).await?;
    }
    Ok(())
}
