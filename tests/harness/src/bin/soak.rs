//! The soak test: keeps servers under churn and verifies every byte that comes back. Usually run by
//! scripts/soak.sh.

// Any failure here is a finding, and a panic shows where.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use clap::Parser;
use harness::{
    Random, Server, connect, frame, raise_fd_limit, read, read_slowly, read_to_end, reset,
    send_fin, wait_until, write,
};
use nix::sys::signal::Signal;

/// Keeps servers under churn: clients talk, half-close, stall, reset and send garbage. Then stops
/// the servers again and again.
#[derive(Parser)]
struct Args {
    /// The chapters' binaries, from chapter 3 on
    #[arg(required = true)]
    servers: Vec<String>,
    /// How long to keep the churn up
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// How many clients each server has at a time
    #[arg(long, default_value_t = 150)]
    clients: u64,
    /// How many times to stop each server then, while its clients keep sending
    #[arg(long, default_value_t = 500)]
    stops: usize,
    /// Repeats a run: the clients do the same for the same seed [default: the time]
    #[arg(long)]
    seed: Option<u64>,
}

/// What the server reads, and how it answers.
#[derive(Clone, Copy)]
enum Protocol {
    /// Chapter 3: all bytes come back.
    Bytes,
    /// From chapter 4 on: complete messages come back, and a bad one ends the connection. Chapter 6
    /// echoes only those with id 1.
    Messages,
}

/// The totals of all clients.
#[derive(Default)]
struct Totals {
    connections: AtomicU64,
    bytes: AtomicU64,
    stop: AtomicBool,
}

impl std::fmt::Display for Totals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let connections = self.connections.load(Ordering::Relaxed);
        let megabytes = self.bytes.load(Ordering::Relaxed) / 1_000_000;
        write!(f, "{connections} connections, {megabytes} MB echoed")
    }
}

impl Protocol {
    fn of(exe: &str) -> Self {
        if exe.ends_with("reactor-v03") { Self::Bytes } else { Self::Messages }
    }
}

/// A server, observed from outside.
struct Target {
    name: String,
    server: Server,
    protocol: Protocol,
    idle_fds: usize,
    most_fds: usize,
    /// Resident memory, in KiB, once a second.
    memory: Vec<u64>,
}

impl Target {
    fn start(exe: &str) -> Self {
        let server = Server::start(exe);
        let (name, protocol) = (exe.rsplit('/').next().unwrap().to_owned(), Protocol::of(exe));
        // It may listen before each of its threads has a loop.
        server.wait_until_asleep();
        let idle_fds = server.fds();
        Self { name, server, protocol, idle_fds, most_fds: idle_fds, memory: Vec::new() }
    }

    /// Records fds and memory. Returns whether it is still running.
    fn sample(&mut self) -> bool {
        let running = self.server.is_running();
        if running {
            self.most_fds = self.most_fds.max(self.server.fds());
            self.memory.push(self.server.status("VmRSS"));
        }
        running
    }

    /// Checks that nothing is left behind and that memory has not kept growing.
    fn finish(&mut self) -> String {
        let Self { name, server, idle_fds, most_fds, memory, .. } = self;
        wait_until("all clients' fds are closed", || server.fds() == *idle_fds);
        let (early, late) = memory.split_at(memory.len().div_ceil(2));
        let early = early.iter().max().copied().unwrap_or(0);
        let late = late.iter().max().copied().unwrap_or(early);
        assert!(late <= early + early / 2 + 4096, "memory grows: {early} KiB, then {late} KiB");
        server.signal(Signal::SIGTERM);
        assert_eq!(server.wait().code(), Some(0));
        server.assert_nothing_left();
        let most = early.max(late);
        format!("{name}: peak {most_fds} fds and {most} KiB, {idle_fds} fds at the end")
    }
}

/// Prints the log if a check has failed.
impl Drop for Target {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("a server's log:\n{}", self.server.log());
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
    });
    eprintln!("seed {seed}, {} clients each, {} s", args.clients, args.seconds);
    raise_fd_limit();
    let mut targets: Vec<Target> = args.servers.iter().map(|exe| Target::start(exe)).collect();
    let totals = Totals::default();
    if !churn(&args, seed, &mut targets, &totals) {
        for Target { name, server, .. } in &targets {
            eprintln!("{name}'s log:\n{}", server.log());
        }
        eprintln!("failed with seed {seed}");
        return ExitCode::FAILURE;
    }
    println!("{} s, {totals} without a difference", args.seconds);
    for target in &mut targets {
        println!("{}", target.finish());
    }
    let mut all_lost = 0;
    for (exe, Target { name, .. }) in args.servers.iter().zip(&targets) {
        let lost = stop_often(exe, args.stops);
        println!("{name}: {} stops, {lost} clients lost replies", args.stops);
        all_lost += lost;
    }
    if all_lost == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Stops a server `stops` times, several at a time. Returns how many clients lost replies.
fn stop_often(exe: &str, stops: usize) -> usize {
    const AT_A_TIME: usize = 8;
    let (next, lost) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while next.fetch_add(1, Ordering::Relaxed) < stops {
                    lost.fetch_add(stop_once(exe), Ordering::Relaxed);
                }
            });
        }
    });
    lost.into_inner()
}

/// Stops a server while four clients send without waiting for replies. They must receive a prefix
/// of what they have sent, and then the end of the stream. A reset counts as lost replies.
fn stop_once(exe: &str) -> usize {
    let mut server = Server::start(exe);
    let message = match Protocol::of(exe) {
        Protocol::Bytes => vec![b'x'; 100],
        Protocol::Messages => frame(1, &[b'x'; 92]),
    };
    let begun = AtomicUsize::new(0);
    let lost = thread::scope(|scope| {
        let clients = [(); 4].map(|()| {
            let (mut client, message, begun) = (connect(server.addr()), &message, &begun);
            scope.spawn(move || {
                let mut writer = client.try_clone().unwrap();
                scope.spawn(move || {
                    while writer.write_all(message).is_ok() {
                        thread::sleep(Duration::from_millis(1));
                    }
                });
                let mut received = read(&client, message.len());
                begun.fetch_add(1, Ordering::Relaxed);
                let result = client.read_to_end(&mut received);
                // Ends the writer.
                let _ = client.shutdown(Shutdown::Both);
                result.is_err() || !received.chunks(message.len()).all(|it| message.starts_with(it))
            })
        });
        wait_until("all clients are served", || begun.load(Ordering::Relaxed) == 4);
        server.signal(Signal::SIGTERM);
        clients.map(|client| usize::from(client.join().unwrap())).iter().sum()
    });
    assert_eq!(server.wait().code(), Some(0));
    lost
}

/// Returns whether all clients got what they should and all servers are still running.
fn churn(args: &Args, seed: u64, targets: &mut [Target], totals: &Totals) -> bool {
    let start = Instant::now();
    let end = Duration::from_secs(args.seconds);
    let addrs: Vec<_> =
        targets.iter().map(|target| (target.server.addr(), target.protocol)).collect();
    thread::scope(|scope| {
        let mut clients = Vec::new();
        for n in 0..args.clients {
            for &(addr, protocol) in &addrs {
                let random = Random::new(seed.wrapping_mul(1_000_003).wrapping_add(n));
                let client = Client { addr, protocol, totals };
                clients.push(scope.spawn(move || client.run(random)));
            }
        }
        let mut running = true;
        // A client ends early only by a panic, which has reported why.
        while start.elapsed() < end && running && clients.iter().all(|client| !client.is_finished())
        {
            thread::sleep(Duration::from_secs(1).min(end.saturating_sub(start.elapsed())));
            running = targets.iter_mut().all(|target| target.sample());
            eprint!("\r{:5} s, {totals} ", start.elapsed().as_secs());
        }
        eprintln!();
        if !running {
            eprintln!("a server has ended");
        }
        totals.stop.store(true, Ordering::Relaxed);
        let failed = clients.into_iter().map(|client| client.join()).filter(Result::is_err).count();
        running && failed == 0
    })
}

/// One of many clients that connect and leave.
#[derive(Clone, Copy)]
struct Client<'a> {
    addr: SocketAddr,
    protocol: Protocol,
    totals: &'a Totals,
}

impl Client<'_> {
    fn run(self, mut random: Random) {
        while !self.totals.stop.load(Ordering::Relaxed) {
            let stream = connect(self.addr);
            self.totals.connections.fetch_add(1, Ordering::Relaxed);
            match random.below(10) {
                0 => drop(stream),
                1 => reset(stream),
                2 => self.talk(&stream, &mut random),
                3 => self.pipeline(&stream, &mut random),
                4 => self.half_close(&stream, &mut random),
                5 => self.stall(&stream, &mut random),
                6 => self.reset_midway(stream, &mut random),
                7 => self.go_without_reading(stream, &mut random),
                8 => self.read_late(&stream, &mut random),
                _ => self.send_garbage(&stream, &mut random),
            }
        }
    }

    fn message(self, random: &mut Random) -> Vec<u8> {
        let n = match random.below(10) {
            0 => random.below(60_000),
            1 => 0,
            _ => random.below(2_000),
        };
        match self.protocol {
            Protocol::Bytes => random.bytes(n),
            Protocol::Messages => frame(1, &random.bytes(n)),
        }
    }

    fn messages(self, random: &mut Random) -> Vec<u8> {
        (0..random.below(20)).flat_map(|_| self.message(random)).collect()
    }

    fn expect(self, received: &[u8], sent: &[u8]) {
        assert!(received == sent, "of {} bytes {} came back", sent.len(), received.len());
        self.totals.bytes.fetch_add(sent.len() as u64, Ordering::Relaxed);
    }

    fn talk(self, stream: &TcpStream, random: &mut Random) {
        for _ in 0..random.below(50) {
            let message = self.message(random);
            write(stream, &message);
            self.expect(&read(stream, message.len()), &message);
        }
    }

    fn pipeline(self, stream: &TcpStream, random: &mut Random) {
        let messages = self.messages(random);
        write(stream, &messages);
        self.expect(&read(stream, messages.len()), &messages);
    }

    fn half_close(self, stream: &TcpStream, random: &mut Random) {
        let messages = self.messages(random);
        write(stream, &messages);
        send_fin(stream);
        self.expect(&read_to_end(stream), &messages);
    }

    fn stall(self, stream: &TcpStream, random: &mut Random) {
        let messages = self.messages(random);
        let (first, second) = messages.split_at(random.below(messages.len() + 1));
        write(stream, first);
        thread::sleep(Duration::from_millis(random.below(200) as u64));
        write(stream, second);
        thread::sleep(Duration::from_millis(random.below(200) as u64));
        self.expect(&read(stream, messages.len()), &messages);
    }

    fn reset_midway(self, stream: TcpStream, random: &mut Random) {
        let messages = self.messages(random);
        write(&stream, &messages[..random.below(messages.len() + 1)]);
        reset(stream);
    }

    /// Sends more than the server reads before its replies are read, as much as the socket takes.
    fn go_without_reading(self, mut stream: TcpStream, random: &mut Random) {
        let messages = self.messages(random).repeat(20);
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let _ = stream.write_all(&messages);
    }

    /// Sends everything and the end of the stream before it reads a byte, and then reads slowly.
    fn read_late(self, stream: &TcpStream, random: &mut Random) {
        let mut messages = self.messages(random);
        while messages.len() < 300_000 {
            messages.extend(self.message(random));
        }
        write(stream, &messages);
        send_fin(stream);
        thread::sleep(Duration::from_millis(random.below(200) as u64));
        self.expect(&read_slowly(stream), &messages);
    }

    fn send_garbage(self, stream: &TcpStream, random: &mut Random) {
        let messages = self.messages(random);
        let n = 100 + random.below(10_000);
        let mut garbage = random.bytes(n);
        // A length that no message has: negative.
        garbage[7] |= 0x80;
        write(stream, &[&messages[..], &garbage].concat());
        match self.protocol {
            Protocol::Messages => self.expect(&read_to_end(stream), &messages),
            Protocol::Bytes => {
                let sent = [messages, garbage].concat();
                self.expect(&read(stream, sent.len()), &sent);
            }
        }
    }
}
