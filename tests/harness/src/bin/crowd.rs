//! Connects a crowd of clients to one server, keeps all of them connected, and verifies that each of
//! them is served. Usually run by scripts/crowd.sh.

// A failure here is a finding, and a panic says where.
#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, ExitCode};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use harness::{Server, frame, raise_fd_limit};

/// How long a connect may take. It waits when the server's accept queue is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// How long all the clients together may wait for their echoes.
const ECHO_LIMIT: Duration = Duration::from_secs(5);

/// The fds that a process needs besides those of the connections, rounded up.
const OTHER_FDS: usize = 64;

/// Connects clients to a server, all of them at the same time, and verifies their echoes.
#[derive(Parser)]
struct Args {
    /// The binary of a chapter, from chapter 2 on
    server: String,
    /// How many clients
    clients: usize,
    /// How often each of them sends a message and reads its echo
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let limit = raise_fd_limit();
    let needed = args.clients.saturating_add(OTHER_FDS);
    if limit < needed {
        let most = limit.saturating_sub(OTHER_FDS);
        eprintln!("{} clients need {needed} open files, but the limit is {limit}.", args.clients);
        eprintln!("Raise the limit as root (ulimit -n {needed}), or try at most {most} clients.");
        return ExitCode::FAILURE;
    }

    let name = args.server.rsplit('/').next().unwrap_or_default();
    let mut command = Command::new(&args.server);
    command.args(["--addr", "127.0.0.1:0"]).env_remove("RUST_LOG");
    // Chapter 5 and later have a limit of their own; chapter 13 is chapter 4 again.
    if ("reactor-v05".."reactor-v13").contains(&name) {
        command.args(["--max-conns", &args.clients.to_string()]);
    }
    let server = Server::from(&mut command);
    let (fds, alone) = (server.fds(), server.status("VmRSS"));

    let start = Instant::now();
    let clients = connect(server.addr(), args.clients);
    let n = clients.len();
    println!("connected  {n} clients at the same time, in {:.2?}", start.elapsed());
    if n < args.clients {
        println!(
            "           the next one has to wait, for more than {CONNECT_LIMIT:?}: the backlog is full"
        );
    }
    println!("accepted   {}", wait_until_accepted(n, || server.fds() - fds));
    let connected = server.status("VmRSS");

    let start = Instant::now();
    for round in 1..=args.rounds {
        let served = echo_all(&clients, |client| message(name, client, round));
        if served < n {
            println!("echoed     {served} of {n} within {ECHO_LIMIT:?}");
            return ExitCode::FAILURE;
        }
    }
    let (rounds, time) = (args.rounds, start.elapsed());
    println!("echoed     {n} of {n}, {rounds} times, every byte right, in {time:.2?}");
    println!("threads    {}", server.status("Threads"));
    let each = connected.saturating_sub(alone) * 1024 / (n as u64).max(1);
    let memory = [alone, connected, server.status("VmRSS")].map(|kib| kib as f64 / 1024.0);
    let [alone, connected, echoed] = memory.map(|mib| format!("{mib:.1} MiB"));
    println!("memory     {alone} at startup, {connected} with all connected: {each} bytes each");
    println!("           {echoed} after all have sent at the same time");
    if n == args.clients { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Waits until the server has `n` connections, or for a while, and returns how many it has.
fn wait_until_accepted(n: usize, connections: impl Fn() -> usize) -> usize {
    let end = Instant::now() + CONNECT_LIMIT;
    loop {
        let accepted = connections();
        if accepted >= n || Instant::now() >= end {
            return accepted;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Connects `count` clients, or as many as the server lets in.
fn connect(addr: SocketAddr, count: usize) -> Vec<TcpStream> {
    let mut clients = Vec::with_capacity(count);
    for _ in 0..count {
        match TcpStream::connect_timeout(&addr, CONNECT_LIMIT) {
            Ok(client) => clients.push(client),
            Err(err) if err.kind() == ErrorKind::TimedOut => break,
            Err(err) => panic!("client {} cannot connect: {err}", clients.len() + 1),
        }
    }
    clients
}

/// What a client sends in a round: a line, or the line in a frame from chapter 4 on.
fn message(name: &str, client: usize, round: usize) -> Vec<u8> {
    let line = format!("client {client}, round {round}\n").into_bytes();
    if matches!(name, "reactor-v02" | "reactor-v03") { line } else { frame(1, &line) }
}

/// All clients send, and then all of them read. Returns how many got the same bytes back in time.
fn echo_all(clients: &[TcpStream], message: impl Fn(usize) -> Vec<u8>) -> usize {
    for (n, mut client) in clients.iter().enumerate() {
        client.write_all(&message(n)).unwrap();
    }
    let end = Instant::now() + ECHO_LIMIT;
    let mut served = 0;
    for (n, mut client) in clients.iter().enumerate() {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            client.set_nonblocking(true).unwrap();
        } else {
            client.set_read_timeout(Some(left)).unwrap();
        }
        let sent = message(n);
        let mut received = vec![0; sent.len()];
        match client.read_exact(&mut received) {
            Ok(()) => assert!(received == sent, "client {n} got {received:?} back for {sent:?}"),
            Err(err) if err.kind() == ErrorKind::WouldBlock => continue,
            Err(err) => panic!("client {n}: {err}"),
        }
        served += 1;
    }
    served
}
