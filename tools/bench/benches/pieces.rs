//! Microbenchmarks of the pieces of a reply: the pool, the buffers, the codec, the loop.

// A benchmark that cannot get a socket or a block has failed, so it may panic.
#![allow(clippy::unwrap_used)]

use std::hint::black_box;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message::{self, HEADER_LEN};
use common::reactor_buf::{InputBuf, OutputBuf};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// Takes a block from the pool and returns it.
fn pool(c: &mut Criterion) {
    let pool = BufPool::new(1 << 30);
    let mut group = c.benchmark_group("pool: alloc and drop");
    for n in [4096, 65_536, 1 << 20] {
        group.bench_with_input(BenchmarkId::from_parameter(n), &n, |b, &n| {
            b.iter(|| black_box(pool.alloc(black_box(n))));
        });
    }
}

/// Appends bytes to a block and pops them.
fn io_buf(c: &mut Criterion) {
    let pool = BufPool::new(1 << 30);
    let mut group = c.benchmark_group("IoBuf: append and pop");
    for n in [64, 4096, 65_536] {
        let bytes = vec![7; n];
        let mut block = pool.alloc(n).unwrap();
        group.throughput(Throughput::Bytes(n as u64));
        group.bench_with_input(BenchmarkId::from_parameter(n), &bytes, |b, bytes| {
            b.iter(|| {
                block.append(black_box(bytes));
                black_box(block.data());
                block.pop(n);
            });
        });
    }
}

/// Sends bytes through a socket with the two buffers: one system call each.
fn reactor_buf(c: &mut Criterion) {
    let pool = BufPool::new(1 << 30);
    let (mut input, mut output) = (InputBuf::new(&pool), OutputBuf::new(&pool));
    let (near, far) = UnixStream::pair().unwrap();
    let mut group = c.benchmark_group("OutputBuf to InputBuf");
    for n in [64, 4096, 16_384] {
        let bytes = vec![7; n];
        group.throughput(Throughput::Bytes(n as u64));
        group.bench_with_input(BenchmarkId::from_parameter(n), &bytes, |b, bytes| {
            b.iter(|| {
                output.send_data(&bytes[..]).unwrap();
                output.write_to(&near).unwrap();
                while input.len() < n {
                    input.read_from(&far).unwrap();
                }
                input.take()
            });
        });
    }
}

/// Encodes and decodes messages.
fn codec(c: &mut Criterion) {
    c.bench_function("encode a header", |b| {
        b.iter(|| message::encode_header(black_box(1), black_box(56)));
    });
    let mut frames = Vec::new();
    while frames.len() < 1024 {
        frames.extend(message::encode_header(1, 64 - HEADER_LEN).unwrap());
        frames.resize(frames.len() + 64 - HEADER_LEN, 7);
    }
    c.bench_function("decode 16 messages of 64 bytes", |b| {
        b.iter(|| {
            let mut rest = black_box(&frames[..]);
            while let Some(message) = message::decode(rest).unwrap() {
                black_box(message.payload);
                rest = &rest[message.frame_len()..];
            }
        });
    });
}

/// From epoll_wait(2) to the callback and back, for one fd that is always ready and for batches.
fn dispatch(c: &mut Criterion) {
    let mut group = c.benchmark_group("dispatch one event, ready at a time");
    for ready in [1, 50, 1000] {
        let mut event_loop = EventLoop::new().unwrap();
        let mut pairs = Vec::new();
        for _ in 0..ready {
            let (near, far) = UnixStream::pair().unwrap();
            let callbacks = Callbacks { read: None, write: Some(count_down) };
            event_loop.add_io_event(&near, Interest::WRITE, callbacks).unwrap();
            pairs.push((near, far));
        }
        group.bench_function(BenchmarkId::from_parameter(ready), |b| {
            b.iter_custom(|mut left| {
                let start = Instant::now();
                event_loop.event_process(&mut left).unwrap();
                start.elapsed()
            });
        });
    }
}

fn count_down(left: &mut u64, event_loop: &mut EventLoop<u64>, _: Token) -> anyhow::Result<()> {
    *left -= 1;
    if *left == 0 {
        event_loop.stop();
    }
    Ok(())
}

criterion_group!(benches, pool, io_buf, reactor_buf, codec, dispatch);
criterion_main!(benches);
