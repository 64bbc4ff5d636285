//! Counts the allocations of a server while it serves. The server is built from the chapter's own
//! files and runs in this process, because the counter sees nothing outside of it.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::cli::Addr;
use common::event_loop::{Callbacks, EventLoop, Interest};
use common::message;
use nix::sys::resource::{UsageWho, getrusage};
use tracing_subscriber::util::SubscriberInitExt;

/// What the server logs at info level, as its binary would.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn addr(&self) -> SocketAddr {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let (_, addr) = log.trim().rsplit_once(' ').unwrap();
        addr.parse().unwrap()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// How to start and stop a chapter's server.
pub struct Chapter<S> {
    pub new: fn(&mut EventLoop<S>, &Addr) -> anyhow::Result<S>,
    pub drain: fn(&mut S, &mut EventLoop<S>) -> anyhow::Result<()>,
}

/// The same for a server that need not have its own event loop at hand.
pub trait Serve {
    type Server;
    /// How many allocations it costs to begin to serve.
    const BEGIN: u64;
    fn start(&self, addr: &Addr) -> anyhow::Result<Self::Server>;
    /// Serves until `stop` is readable.
    fn serve(&self, server: &mut Self::Server, stop: &UnixStream) -> anyhow::Result<()>;
    fn drain(&self, server: Self::Server) -> anyhow::Result<()>;
}

impl<S> Serve for Chapter<S> {
    type Server = (EventLoop<S>, S);
    const BEGIN: u64 = 0;

    fn start(&self, addr: &Addr) -> anyhow::Result<Self::Server> {
        let mut event_loop = EventLoop::new()?;
        let server = (self.new)(&mut event_loop, addr)?;
        Ok((event_loop, server))
    }

    fn serve(&self, server: &mut Self::Server, stop: &UnixStream) -> anyhow::Result<()> {
        let (event_loop, server) = server;
        let token = event_loop.add_io_event(stop, Interest::READ, stop_callbacks())?;
        event_loop.event_process(server)?;
        Ok(event_loop.del_io_event(stop, token)?)
    }

    fn drain(&self, (mut event_loop, mut server): Self::Server) -> anyhow::Result<()> {
        (self.drain)(&mut server, &mut event_loop)
    }
}

pub fn stop_callbacks<S>() -> Callbacks<S> {
    Callbacks { read: Some(EventLoop::stop_callback), write: None }
}

#[track_caller]
pub fn assert_one_client_costs_none<C: Serve>(chapter: &C) {
    for rounds in [100, 1_000] {
        let n = count(chapter, 1, &[64], rounds);
        assert!(n <= C::BEGIN, "{n} allocations during {rounds} messages");
    }
}

/// How many blocks are in use at a time depends on which bytes arrive together. So the pool's lists may
/// still grow in the second run, but by no more blocks than all connections can hold.
#[track_caller]
pub fn assert_many_clients_cost_no_more_than_their_blocks<C: Serve>(chapter: &C) {
    let (clients, sizes, rounds) = (20, [0, 100, 4_096, 1, 60_000], 200);
    let n = count(chapter, clients, &sizes, rounds);
    let blocks = clients as u64 * 2 + C::BEGIN;
    assert!(n <= blocks, "{n} allocations during {} messages", clients * 5 * rounds);
}

/// Counts the server's allocations during `rounds` of messages of these sizes on each of `clients`
/// connections, after as many rounds to warm up. New blocks are not among them, as they are mapped. But the
/// first bytes in a new block are a page fault, and there must be fewer faults than messages.
#[track_caller]
fn count<C: Serve>(chapter: &C, clients: usize, sizes: &[usize], rounds: usize) -> u64 {
    let log = Log::default();
    let writer = log.clone();
    let _guard = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::INFO)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .set_default();
    let mut server = chapter.start(&"127.0.0.1:0".parse().unwrap()).unwrap();

    let mut streams = Vec::new();
    for _ in 0..clients {
        let stream = TcpStream::connect(log.addr()).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        streams.push(stream);
    }
    let page_faults = || getrusage(UsageWho::RUSAGE_THREAD).unwrap().minor_page_faults();
    let (mut allocations, mut faults) = (0, 0);
    // The first run warms up the pool: its blocks are reused in the second run.
    for _ in 0..2 {
        let (stop, stopped) = UnixStream::pair().unwrap();
        let (sizes, mut lent) = (sizes.to_vec(), streams);
        let client = thread::spawn(move || {
            for _ in 0..rounds {
                echo(&mut lent, &sizes);
            }
            // The end of this stream stops the server.
            drop(stop);
            lent
        });
        let before = page_faults();
        let measured = allocation_counter::measure(|| {
            chapter.serve(&mut server, &stopped).unwrap();
        });
        streams = client.join().unwrap();
        allocations = measured.count_total;
        faults = page_faults() - before;
    }
    let messages = clients * sizes.len() * rounds;
    assert!(faults < messages as i64, "{faults} page faults during {messages} messages");
    drop(streams);
    chapter.drain(server).unwrap();
    allocations
}

/// Every client sends a message of each size, in one piece, and then receives the echo.
fn echo(streams: &mut [TcpStream], sizes: &[usize]) {
    let mut request = Vec::new();
    for &size in sizes {
        request.extend(message::encode_header(1, size).unwrap());
        request.resize(request.len() + size, 7);
    }
    for stream in &mut *streams {
        stream.write_all(&request).unwrap();
    }
    let mut reply = vec![0; request.len()];
    for stream in streams {
        stream.read_exact(&mut reply).unwrap();
        assert!(reply == request);
    }
}
