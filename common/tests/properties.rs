//! Properties that hold for any input and any order of operations, tested with random ones.

// A test fails by a panic, in its helpers too.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::buf_pool::{BufPool, SIZE_CLASSES};
use common::event_loop::{Callbacks, EventLoop, Interest, Token};
use common::message::{self, BadLength, MAX_PAYLOAD};
use common::reactor_buf::{InputBuf, OutputBuf};
use proptest::collection::vec;
use proptest::prelude::*;

const MIB: usize = 1 << 20;

fn pair() -> (UnixStream, UnixStream) {
    let (a, b) = UnixStream::pair().unwrap();
    a.set_nonblocking(true).unwrap();
    b.set_nonblocking(true).unwrap();
    (a, b)
}

/// Bytes that differ from place to place, and from call to call.
fn bytes(n: usize, seed: &mut u8) -> Vec<u8> {
    *seed = seed.wrapping_add(1);
    (0..n).map(|i| (i.wrapping_mul(31) ^ (i >> 8)) as u8 ^ *seed).collect()
}

#[derive(Clone, Debug)]
enum BlockOp {
    Append(usize),
    Pop(usize),
    Adjust,
    Clear,
}

fn block_ops() -> impl Strategy<Value = Vec<BlockOp>> {
    vec(
        prop_oneof![
            4 => (0..6000_usize).prop_map(BlockOp::Append),
            4 => (0..6000_usize).prop_map(BlockOp::Pop),
            1 => Just(BlockOp::Adjust),
            1 => Just(BlockOp::Clear),
        ],
        0..60,
    )
}

proptest! {
    /// A block is a bounded `Vec<u8>`, in which popped bytes at the front take up room.
    #[test]
    fn a_block_holds_what_was_appended_and_not_popped(size in 0..40_000_usize, ops in block_ops()) {
        let pool = BufPool::new(MIB);
        let mut block = pool.alloc(size).unwrap();
        let mut model: Vec<u8> = Vec::new();
        let mut head = 0;
        let mut seed = 0;
        for op in ops {
            match op {
                BlockOp::Append(n) => {
                    let data = bytes(n, &mut seed);
                    let fits = n.min(block.capacity() - head - model.len());
                    prop_assert_eq!(block.append(&data), fits);
                    model.extend_from_slice(&data[..fits]);
                }
                BlockOp::Pop(n) => {
                    let n = n.min(model.len());
                    block.pop(n);
                    model.drain(..n);
                    head = if model.is_empty() { 0 } else { head + n };
                }
                BlockOp::Adjust => {
                    block.adjust();
                    head = 0;
                }
                BlockOp::Clear => {
                    block.clear();
                    model.clear();
                    head = 0;
                }
            }
            prop_assert_eq!(block.data(), &model[..]);
            prop_assert_eq!((block.head(), block.len()), (head, model.len()));
            prop_assert_eq!(block.room(), block.capacity() - head - model.len());
        }
        drop(block);
        prop_assert_eq!(pool.stats().in_use, 0);
    }

    /// After any allocations and drops, the bytes in use and free add up, and the cap holds.
    #[test]
    fn the_figures_of_a_pool_add_up(
        cap in 0..3 * MIB,
        ops in vec((any::<bool>(), 0..2 * MIB), 0..80),
    ) {
        let pool = BufPool::new(cap);
        let mut blocks = Vec::new();
        let mut peak = 0;
        for (take, n) in ops {
            if take {
                match pool.alloc(n) {
                    Ok(block) => blocks.push(block),
                    Err(_) => {
                        let class = SIZE_CLASSES.into_iter().find(|&class| class >= n).unwrap();
                        let in_use: usize = blocks.iter().map(|block| block.capacity()).sum();
                        prop_assert!(in_use + class > cap, "refused {} of {}", class, cap - in_use);
                    }
                }
            } else if !blocks.is_empty() {
                blocks.swap_remove(n % blocks.len());
            }
            let stats = pool.stats();
            let in_use = blocks.iter().map(|block| block.capacity()).sum();
            peak = peak.max(in_use);
            prop_assert_eq!(stats.in_use, in_use);
            prop_assert_eq!(stats.peak, peak);
            prop_assert!(stats.in_use + stats.free <= cap);
        }
    }
}

#[derive(Clone, Debug)]
enum StreamOp {
    /// The peer sends this many bytes.
    PeerSends(usize),
    /// One read from the socket.
    Read,
    /// Takes the input, pops this many bytes and puts the rest back.
    Pop(usize),
    /// Moves all of the input to the output.
    Move,
    /// Adds this many bytes to the output.
    Send(usize),
    /// Writes as much as the socket takes.
    Write,
    /// The peer reads at most this many bytes.
    PeerReads(usize),
}

fn stream_ops() -> impl Strategy<Value = Vec<StreamOp>> {
    let some = || prop_oneof![0..100_usize, 0..300_000_usize];
    let op = prop_oneof![
        some().prop_map(StreamOp::PeerSends),
        Just(StreamOp::Read),
        some().prop_map(StreamOp::Pop),
        Just(StreamOp::Move),
        some().prop_map(StreamOp::Send),
        Just(StreamOp::Write),
        some().prop_map(StreamOp::PeerReads),
    ];
    vec(op, 0..80)
}

fn read_up_to(stream: &mut UnixStream, n: usize) -> Vec<u8> {
    let mut received = vec![0; n];
    match stream.read(&mut received) {
        Ok(n) => received.truncate(n),
        Err(err) if err.kind() == io::ErrorKind::WouldBlock => received.clear(),
        Err(err) => panic!("{err}"),
    }
    received
}

proptest! {
    /// Both buffers are queues of bytes: nothing is lost, duplicated or reordered, and no empty
    /// block is held, whatever partial reads and writes come in between.
    #[test]
    fn bytes_go_through_the_buffers_as_through_queues(ops in stream_ops()) {
        let pool = BufPool::new(64 * MIB);
        let (socket, mut peer) = pair();
        let (mut input, mut output) = (InputBuf::new(&pool), OutputBuf::new(&pool));
        // In the sockets, and in the buffers.
        let (mut coming, mut going) = (VecDeque::<u8>::new(), VecDeque::<u8>::new());
        let (mut input_model, mut output_model) = (VecDeque::<u8>::new(), VecDeque::<u8>::new());
        let mut seed = 0;
        for op in ops {
            match op {
                StreamOp::PeerSends(n) => {
                    let data = bytes(n, &mut seed);
                    let sent = peer.write(&data).unwrap_or(0);
                    coming.extend(&data[..sent]);
                }
                StreamOp::Read => {
                    let n = input.read_from(&socket).unwrap();
                    prop_assert_eq!(n.is_none(), coming.is_empty());
                    input_model.extend(coming.drain(..n.unwrap_or(0)));
                }
                StreamOp::Pop(n) => {
                    if let Some(mut block) = input.take() {
                        prop_assert!(input_model.iter().eq(block.data()));
                        let n = n.min(block.len());
                        block.pop(n);
                        input_model.drain(..n);
                        input.put_back(block);
                    }
                }
                StreamOp::Move => {
                    if let Some(block) = input.take() {
                        output.send_block(block).unwrap();
                        output_model.append(&mut input_model);
                    }
                }
                StreamOp::Send(n) => {
                    // Beyond 8 MiB no block is large enough; another test covers that.
                    if output.len() + n <= 8 * MIB {
                        let data = bytes(n, &mut seed);
                        output.send_data(&data[..]).unwrap();
                        output_model.extend(data);
                    }
                }
                StreamOp::Write => {
                    let n = output.write_to(&socket).unwrap();
                    going.extend(output_model.drain(..n));
                }
                StreamOp::PeerReads(n) => {
                    let received = read_up_to(&mut peer, n);
                    prop_assert!(going.drain(..received.len()).eq(received));
                }
            }
            prop_assert_eq!((input.len(), output.len()), (input_model.len(), output_model.len()));
            let held = usize::from(!input.is_empty()) + usize::from(!output.is_empty());
            let in_use = pool.stats().in_use;
            prop_assert!(in_use >= held * SIZE_CLASSES[0] && (held > 0 || in_use == 0));
        }
    }
}

fn frame(id: i32, payload: &[u8]) -> Vec<u8> {
    let header = message::encode_header(id, payload.len()).unwrap();
    [&header[..], payload].concat()
}

type Messages = Vec<(i32, Vec<u8>)>;

/// Receives bytes in pieces as a connection does. Returns the messages, the error that ended it, if
/// any, and the peak of the memory in use.
fn receive(pieces: &[&[u8]]) -> (Messages, Option<BadLength>, usize) {
    let pool = BufPool::new(MIB);
    let (socket, mut peer) = pair();
    let mut input = InputBuf::new(&pool);
    let mut messages = Messages::new();
    for piece in pieces {
        peer.write_all(piece).unwrap();
        while let Some(1..) = input.read_from(&socket).unwrap() {
            let mut block = input.take().unwrap();
            loop {
                match message::decode(block.data()) {
                    Ok(None) => break,
                    Ok(Some(message)) => {
                        messages.push((message.id, message.payload.to_vec()));
                        let n = message.frame_len();
                        block.pop(n);
                    }
                    Err(err) => return (messages, Some(err), pool.stats().peak),
                }
            }
            input.put_back(block);
        }
    }
    (messages, None, pool.stats().peak)
}

/// Cuts `stream` at these places, and into pieces small enough for the buffer of a socket.
fn cut(stream: &[u8], at: &[prop::sample::Index]) -> Vec<Vec<u8>> {
    let mut cuts: BTreeSet<usize> = at.iter().map(|at| at.index(stream.len() + 1)).collect();
    cuts.extend((0..stream.len()).step_by(60_000));
    cuts.insert(stream.len());
    let cuts: Vec<usize> = cuts.into_iter().collect();
    cuts.windows(2).map(|ends| stream[ends[0]..ends[1]].to_vec()).collect()
}

proptest! {
    #[test]
    fn any_stream_cut_anywhere_decodes_to_the_same_messages(
        messages in vec((any::<i32>(), prop_oneof![0..40_usize, 0..=MAX_PAYLOAD]), 0..12),
        at in vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut seed = 0;
        let messages: Messages =
            messages.into_iter().map(|(id, n)| (id, bytes(n, &mut seed))).collect();
        let stream: Vec<u8> =
            messages.iter().flat_map(|(id, payload)| frame(*id, payload)).collect();
        let pieces = cut(&stream, &at);
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let (received, error, _) = receive(&pieces);
        prop_assert_eq!(error, None);
        prop_assert!(received == messages);
    }

    /// No input makes the codec panic, or hold more than a block of 64 KiB and its predecessor.
    #[test]
    fn arbitrary_bytes_are_decoded_or_refused_in_bounded_memory(
        good in vec((any::<i32>(), 0..=MAX_PAYLOAD), 0..3),
        garbage in vec(any::<u8>(), 0..200_000),
        at in vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let mut stream: Vec<u8> =
            good.iter().flat_map(|(id, n)| frame(*id, &bytes(*n, &mut 0))).collect();
        stream.extend(garbage);
        let pieces = cut(&stream, &at);
        let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
        let (received, error, peak) = receive(&pieces);
        prop_assert!(received.len() >= good.len());
        if let Some(BadLength(length)) = error {
            prop_assert!(!(0..=MAX_PAYLOAD as i64).contains(&length));
        }
        prop_assert!(peak <= SIZE_CLASSES[2] + SIZE_CLASSES[1], "{}", peak);
    }
}

#[derive(Clone, Debug)]
enum LoopOp {
    Add(Interest),
    /// The number of a live registration, modulo how many there are.
    Change(usize, Interest),
    Delete(usize),
    PeerSends(usize),
    PeerCloses(usize),
    /// Deletes one, closes its socket and adds another, which typically has the same fd number.
    Replace(usize, Interest),
    /// Uses a token whose registration is gone.
    Stale(usize),
}

fn interest() -> impl Strategy<Value = Interest> {
    (any::<bool>(), any::<bool>()).prop_map(|(read, write)| Interest { read, write })
}

fn loop_ops() -> impl Strategy<Value = Vec<LoopOp>> {
    let op = prop_oneof![
        3 => interest().prop_map(LoopOp::Add),
        2 => (any::<usize>(), interest()).prop_map(|(n, interest)| LoopOp::Change(n, interest)),
        1 => any::<usize>().prop_map(LoopOp::Delete),
        2 => any::<usize>().prop_map(LoopOp::PeerSends),
        1 => any::<usize>().prop_map(LoopOp::PeerCloses),
        2 => (any::<usize>(), interest()).prop_map(|(n, interest)| LoopOp::Replace(n, interest)),
        1 => any::<usize>().prop_map(LoopOp::Stale),
    ];
    vec(op, 0..40)
}

struct Entry {
    socket: UnixStream,
    peer: Option<UnixStream>,
    token: Token,
    interest: Interest,
    readable: bool,
}

impl Entry {
    /// Which callbacks are due.
    fn due(&self) -> (bool, bool) {
        let hung_up = self.peer.is_none();
        let read = self.interest.read && (self.readable || hung_up)
            || self.interest == Interest::NONE && hung_up;
        (read, self.interest.write)
    }
}

/// The calls so far: `false` for reading, `true` for writing.
type Calls = Vec<(Token, bool)>;

fn add(event_loop: &mut EventLoop<Calls>, interest: Interest) -> Entry {
    let (socket, peer) = pair();
    let callbacks = Callbacks {
        read: Some(|calls: &mut Calls, _: &mut EventLoop<Calls>, token| {
            calls.push((token, false));
            Ok(())
        }),
        write: Some(|calls: &mut Calls, _: &mut EventLoop<Calls>, token| {
            calls.push((token, true));
            Ok(())
        }),
    };
    let token = event_loop.add_io_event(&socket, interest, callbacks).unwrap();
    Entry { socket, peer: Some(peer), token, interest, readable: false }
}

/// Runs one iteration, which reports everything that is ready now.
fn run(event_loop: &mut EventLoop<Calls>) -> Calls {
    let mut calls = Calls::new();
    event_loop.poll_once(&mut calls, Some(Duration::ZERO)).unwrap();
    calls
}

proptest! {
    /// After any change, exactly the callbacks of ready, watched fds are called, with their tokens.
    #[test]
    fn the_loop_calls_what_is_ready_and_nothing_else(ops in loop_ops()) {
        let mut event_loop = EventLoop::new().unwrap();
        let mut live: Vec<Entry> = Vec::new();
        let mut gone: Vec<Token> = Vec::new();
        for op in ops {
            let n = live.len().max(1);
            match op {
                LoopOp::Add(interest) => live.push(add(&mut event_loop, interest)),
                LoopOp::Change(which, interest) => {
                    if let Some(entry) = live.get_mut(which % n) {
                        event_loop.set_interest(&entry.socket, entry.token, interest).unwrap();
                        entry.interest = interest;
                    }
                }
                LoopOp::Delete(which) => {
                    if which % n < live.len() {
                        let entry = live.swap_remove(which % n);
                        event_loop.del_io_event(&entry.socket, entry.token).unwrap();
                        gone.push(entry.token);
                    }
                }
                LoopOp::PeerSends(which) => {
                    if let Some(entry) = live.get_mut(which % n)
                        && let Some(peer) = &mut entry.peer
                    {
                        peer.write_all(b"x").unwrap();
                        entry.readable = true;
                    }
                }
                LoopOp::PeerCloses(which) => {
                    if let Some(entry) = live.get_mut(which % n) {
                        entry.peer = None;
                    }
                }
                LoopOp::Replace(which, interest) => {
                    if which % n < live.len() {
                        let entry = live.swap_remove(which % n);
                        event_loop.del_io_event(&entry.socket, entry.token).unwrap();
                        gone.push(entry.token);
                        drop(entry);
                        live.push(add(&mut event_loop, interest));
                    }
                }
                LoopOp::Stale(which) => {
                    if let (Some(entry), Some(token)) =
                        (live.first(), gone.get(which % gone.len().max(1)))
                    {
                        let changed = event_loop.set_interest(&entry.socket, *token, Interest::NONE);
                        prop_assert_eq!(changed.unwrap_err().kind(), io::ErrorKind::NotFound);
                        let deleted = event_loop.del_io_event(&entry.socket, *token);
                        prop_assert_eq!(deleted.unwrap_err().kind(), io::ErrorKind::NotFound);
                    }
                }
            }
            let calls = run(&mut event_loop);
            for entry in &live {
                let called = |write| calls.contains(&(entry.token, write));
                prop_assert_eq!((called(false), called(true)), entry.due());
            }
            prop_assert_eq!(event_loop.registered(), live.len());
            let known = |token: &Token| live.iter().any(|entry| entry.token == *token);
            prop_assert!(calls.iter().all(|(token, _)| known(token)));
        }
    }
}

/// The callbacks' model of the loop, and what they will do next.
struct Batch {
    live: Vec<Entry>,
    plan: std::vec::IntoIter<LoopOp>,
    /// Calls that should not have happened.
    wrong: Vec<(Token, bool)>,
}

fn add_to_batch(event_loop: &mut EventLoop<Batch>, interest: Interest) -> Entry {
    let (socket, peer) = pair();
    let callbacks = Callbacks {
        read: Some(|batch: &mut Batch, event_loop: &mut EventLoop<Batch>, token| {
            batch.called(event_loop, token, false)
        }),
        write: Some(|batch: &mut Batch, event_loop: &mut EventLoop<Batch>, token| {
            batch.called(event_loop, token, true)
        }),
    };
    let token = event_loop.add_io_event(&socket, interest, callbacks).unwrap();
    Entry { socket, peer: Some(peer), token, interest, readable: false }
}

impl Batch {
    /// Checks whether this call is due in the current state, and applies the next operation.
    fn called(
        &mut self,
        event_loop: &mut EventLoop<Self>,
        token: Token,
        write: bool,
    ) -> anyhow::Result<()> {
        let due = self.live.iter().find(|entry| entry.token == token).map(Entry::due);
        if !due.is_some_and(|(to_read, to_write)| if write { to_write } else { to_read }) {
            self.wrong.push((token, write));
        }
        let Some(op) = self.plan.next() else { return Ok(()) };
        let n = self.live.len().max(1);
        match op {
            LoopOp::Change(which, interest) => {
                if let Some(entry) = self.live.get_mut(which % n) {
                    event_loop.set_interest(&entry.socket, entry.token, interest)?;
                    entry.interest = interest;
                }
            }
            LoopOp::Delete(which) | LoopOp::Replace(which, _) if which % n < self.live.len() => {
                let entry = self.live.swap_remove(which % n);
                event_loop.del_io_event(&entry.socket, entry.token)?;
                // Closed, so that the next socket gets the same fd.
                drop(entry);
                if let LoopOp::Replace(_, interest) = op {
                    self.live.push(add_to_batch(event_loop, interest));
                }
            }
            _ => {}
        }
        Ok(())
    }
}

proptest! {
    /// A callback's changes apply to the rest of the batch: a deregistered callback is no longer
    /// called, and neither is the callback of a new registration with the same fd.
    #[test]
    fn changes_by_a_callback_take_effect_at_once(
        interests in vec((interest(), any::<bool>(), any::<bool>()), 2..12),
        plan in loop_ops(),
    ) {
        let mut event_loop = EventLoop::new().unwrap();
        let (plan, wrong) = (plan.into_iter(), Vec::new());
        let mut batch = Batch { live: Vec::new(), plan, wrong };
        for (interest, sends, closes) in interests {
            let mut entry = add_to_batch(&mut event_loop, interest);
            if let Some(peer) = entry.peer.as_mut().filter(|_| sends) {
                peer.write_all(b"x").unwrap();
                entry.readable = true;
            }
            entry.peer.take_if(|_| closes);
            batch.live.push(entry);
        }
        event_loop.poll_once(&mut batch, Some(Duration::ZERO)).unwrap();
        prop_assert_eq!(batch.wrong, []);
        prop_assert_eq!(event_loop.registered(), batch.live.len());
    }
}
