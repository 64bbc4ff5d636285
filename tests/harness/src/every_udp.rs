//! The promises of every server that also serves UDP, from chapter 10 on, and of its client.
//! [`every_udp!`](crate::every_udp!) turns each promise into a test.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{env, fs, iter, process};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, sendto, socket,
};

use crate::every_config::Done;
use crate::every_reactor::{Chapter, wait_until_idle};
use crate::every_router::{assert_one_line, assert_printed, start_printing};
use crate::every_server::name;
use crate::{
    LIMIT, Server, Signal, assert_bytes, assert_echo, frame, is_other, narrow, pattern, read,
    read_to_end, reset, run, run_command, served, wait_until, write,
};

/// One test per promise, for the [`Chapter`] `$chapter` and the binary of its client `$client`.
#[macro_export]
macro_rules! every_udp {
    ($chapter:expr, $client:expr, [$($promise:ident),* $(,)?]) => {
        mod every_udp {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_udp::$promise($chapter, $client);
                }
            )*
        }
    };
    ($chapter:expr, $client:expr) => {
        harness::every_udp!($chapter, $client, [
            the_same_port_serves_both_with_the_same_callbacks,
            a_datagram_of_any_length_is_echoed,
            a_datagram_that_is_not_one_message_is_dropped,
            drops_are_logged_once_a_second,
            a_reply_that_cannot_be_sent_is_counted,
            the_server_does_not_answer_itself,
            the_answer_comes_from_the_address_that_was_asked,
            a_busy_port_ends_the_start_over_udp_too,
            a_name_does_not_get_past_a_busy_address,
            its_port_is_free_for_the_next_server_at_once,
            port_0_picks_a_number_that_is_free_for_both,
            senders_that_are_gone_hurt_nobody,
            a_flood_delays_neither_clients_nor_the_stop,
            datagrams_have_no_hooks_and_take_no_place,
            the_udp_client_prints_its_reply_and_has_it_printed,
            the_udp_client_asks_again,
            the_udp_client_gives_up,
            only_the_same_message_from_the_server_is_a_reply,
            replies_may_come_twice,
            the_tcp_client_connects_again,
            the_tcp_client_gives_up,
            the_tcp_client_waits_for_its_reply_and_no_longer,
            once_it_has_its_reply_the_tcp_client_does_not_connect_again,
            the_client_refuses_invalid_arguments,
        ]);
    };
}

/// What the client sends first, and expects back.
const HELLO: &[u8] = b"hello lars!";

/// A socket that gets datagrams only from `addr`. Reads that take longer than [`LIMIT`] fail.
#[track_caller]
pub fn connect_udp(addr: SocketAddr) -> UdpSocket {
    let any = if addr.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).unwrap();
    socket.connect(addr).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    socket
}

/// The next datagram, and its sender.
#[track_caller]
fn receive_from(socket: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut datagram = vec![0; 65_536];
    match socket.recv_from(&mut datagram) {
        Ok((n, peer)) => (datagram[..n].to_vec(), peer),
        Err(err) => panic!("no datagram: {err}"),
    }
}

/// The next datagram.
#[track_caller]
pub fn receive(socket: &UdpSocket) -> Vec<u8> {
    receive_from(socket).0
}

/// How many datagrams have arrived and not been read. Reads them.
#[track_caller]
pub fn received(socket: &UdpSocket) -> usize {
    socket.set_nonblocking(true).unwrap();
    let count = (0..).take_while(|_| socket.recv(&mut [0; 65_536]).is_ok()).count();
    socket.set_nonblocking(false).unwrap();
    count
}

/// Sends `payload` with id 1, and expects it back: no earlier datagram has been answered.
#[track_caller]
pub fn assert_udp_echo(socket: &UdpSocket, payload: &[u8]) {
    let message = frame(1, payload);
    socket.send(&message).unwrap();
    assert_bytes(receive(socket), &message);
}

/// The numbers of dropped datagrams and replies in each line of the log that has them.
fn drops(server: &Server) -> Vec<(usize, usize)> {
    let log = server.log();
    let numbers = log.lines().filter_map(|line| line.split("INFO datagrams dropped: ").nth(1));
    let pairs = numbers.map(|numbers| numbers.split_once("; replies dropped: ").unwrap());
    pairs
        .map(|(datagrams, replies)| (datagrams.parse().unwrap(), replies.parse().unwrap()))
        .collect()
}

/// Passes for another program.
#[track_caller]
fn wait_for_drops(server: &Server, datagrams: usize, replies: usize) {
    if is_other() {
        return;
    }
    wait_until("all drops are counted", || {
        let drops = drops(server);
        let sum = |of: fn(&(usize, usize)) -> usize| drops.iter().map(of).sum::<usize>();
        sum(|it| it.0) == datagrams && sum(|it| it.1) == replies
    });
}

pub fn the_same_port_serves_both_with_the_same_callbacks(chapter: Chapter, _: &str) {
    let (server, stdout) = start_printing(chapter);
    let (udp, tcp) = (connect_udp(server.addr()), server.connect());
    for n in 0..10 {
        assert_udp_echo(&udp, &pattern(1000, n));
        assert_echo(&tcp, &frame(1, &pattern(1000, n)));
    }
    udp.send(&frame(2, b"a datagram")).unwrap();
    assert_udp_echo(&udp, b"the only reply");
    assert_printed(&stdout, "id=2 len=10 a datagram\n");
    let others = [(); 20].map(|()| connect_udp(server.addr()));
    for (n, other) in others.iter().enumerate() {
        other.send(&frame(1, &[n as u8])).unwrap();
    }
    for (n, other) in others.iter().enumerate() {
        assert_bytes(receive(other), frame(1, &[n as u8]));
    }
}

/// Over IPv4 the longest datagram has 65,507 bytes, 8 of which are the message's header.
pub fn a_datagram_of_any_length_is_echoed(chapter: Chapter, _: &str) {
    let server = Server::start(chapter.exe);
    let udp = connect_udp(server.addr());
    for n in [0, 1, 8, 1464, 1465, 4088, 40_000, 65_498, 65_499] {
        assert_udp_echo(&udp, &pattern(n, n as u64));
    }
    assert_eq!(drops(&server), []);
}

pub fn a_datagram_that_is_not_one_message_is_dropped(chapter: Chapter, _: &str) {
    let server = Server::start(chapter.exe);
    let udp = connect_udp(server.addr());
    let message = frame(1, b"hello");
    let with_length = |length: i32| [1_i32.to_le_bytes(), length.to_le_bytes()].concat();
    let bad = [
        vec![],
        message[..7].to_vec(),
        message[..8].to_vec(),
        message[..12].to_vec(),
        [&message[..], b"x"].concat(),
        message.repeat(2),
        [frame(1, b""), frame(1, b"")].concat(),
        with_length(-1),
        with_length(i32::MIN),
        [with_length(65_528), vec![0; 60_000]].concat(),
        with_length(i32::MAX),
        frame(0, b""),
        frame(77, b"hello"),
        frame(-1, b"server is full"),
    ];
    for datagram in &bad {
        udp.send(datagram).unwrap();
        assert_udp_echo(&udp, b"the only reply");
    }
    wait_for_drops(&server, bad.len(), 0);
    assert_eq!(received(&udp), 0);
    server.assert_not_logged("WARN");
}

/// Each line has the number since the one before, and the last one comes on shutdown.
pub fn drops_are_logged_once_a_second(chapter: Chapter, _: &str) {
    crate::chapter_only!("it reads the chapter's log");
    let mut server = Server::start(chapter.exe);
    let (udp, start, mut sent) = (connect_udp(server.addr()), Instant::now(), 0);
    let mut drop = || {
        udp.send(b"what is this?").unwrap();
        assert_udp_echo(&udp, b"");
        sent += 1;
    };
    wait_until("there are two lines", || {
        drop();
        drops(&server).len() >= 2
    });
    let seconds = start.elapsed().as_secs() + 1;
    assert!(drops(&server).len() as u64 <= seconds, "{}", server.log());
    drop();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    server.wait_for_log("stopped; ");
    let log = server.log();
    assert_eq!(drops(&server).iter().map(|it| it.0).sum::<usize>(), sent, "{log}");
    assert!(drops(&server).iter().all(|it| it.0 > 0), "{log}");
}

/// Sends a message from 127.0.0.1 and any port, if this process may.
fn forge(port: u16, to: SocketAddr, message: &[u8]) -> bool {
    let (family, protocol) = (AddressFamily::Inet, SockProtocol::Udp);
    let Ok(raw) = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol) else {
        eprintln!("not root: forged datagrams are not tested");
        return false;
    };
    // Source port, destination port and length in network byte order (RFC 768); no checksum.
    let header = [port, to.port(), 8 + message.len() as u16, 0].map(u16::to_be_bytes);
    let datagram = [header.as_flattened(), message].concat();
    let sent = sendto(raw.as_raw_fd(), &datagram, &SockaddrStorage::from(to), MsgFlags::empty());
    assert_eq!(sent, Ok(datagram.len()));
    true
}

/// Nothing can be sent to port 0: this stands for a full send buffer, which loopback never has.
pub fn a_reply_that_cannot_be_sent_is_counted(chapter: Chapter, _: &str) {
    let server = Server::start(chapter.exe);
    if (0..3).all(|_| forge(0, server.addr(), &frame(1, b"hello"))) {
        wait_for_drops(&server, 0, 3);
        assert_udp_echo(&connect_udp(server.addr()), b"served");
        server.assert_not_logged("WARN");
    }
}

/// Or it would answer itself forever.
pub fn the_server_does_not_answer_itself(chapter: Chapter, _: &str) {
    for (addr, ips) in
        [("127.0.0.1:0", &["127.0.0.1"][..]), ("0.0.0.0:0", &["127.0.0.1", "127.0.0.5"])]
    {
        let server = Server::start_on(chapter.exe, addr);
        let port = server.addr().port();
        for (n, ip) in (1..).zip(ips) {
            let to = SocketAddr::new(ip.parse().unwrap(), port);
            if forge(port, to, &frame(1, b"hello")) {
                wait_for_drops(&server, n, 0);
                assert_udp_echo(&connect_udp(to), b"served");
                wait_until_idle(&server);
            }
        }
    }
}

/// A connected socket takes no other.
pub fn the_answer_comes_from_the_address_that_was_asked(chapter: Chapter, _: &str) {
    for (addr, asked) in [
        ("0.0.0.0:0", ["127.0.0.1", "127.0.0.5"]),
        ("127.0.0.5:0", ["127.0.0.5", "127.0.0.5"]),
        ("[::1]:0", ["::1", "::1"]),
        ("[::]:0", ["::1", "127.0.0.5"]),
        ("[::ffff:0.0.0.0]:0", ["127.0.0.1", "127.0.0.5"]),
    ] {
        if addr.starts_with('[') && TcpListener::bind(addr).is_err() {
            eprintln!("no IPv6 on this machine: {addr} is not tested");
            continue;
        }
        let server = Server::start_on(chapter.exe, addr);
        for ip in asked {
            let to = SocketAddr::new(ip.parse().unwrap(), server.addr().port());
            assert_udp_echo(&connect_udp(to), b"from where?");
        }
        assert_eq!(drops(&server), []);
    }
}

/// Though it still waits for a client to read.
pub fn its_port_is_free_for_the_next_server_at_once(chapter: Chapter, _: &str) {
    let mut server = Server::start(chapter.exe);
    let slow = server.connect();
    narrow(&slow);
    chapter.stuff(&slow);
    server.signal(Signal::SIGTERM);
    wait_until("its UDP socket is closed", || UdpSocket::bind(server.addr()).is_ok());
    assert!(server.is_running());
}

pub fn a_busy_port_ends_the_start_over_udp_too(chapter: Chapter, _: &str) {
    // Its port is free for TCP.
    let is_free = |udp: &UdpSocket| TcpListener::bind(udp.local_addr().unwrap()).is_ok();
    let mut sockets = iter::repeat_with(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    let udp = sockets.find(is_free).unwrap();
    let addr = udp.local_addr().unwrap().to_string();
    let reason = format!("cannot listen on {addr} over UDP: Address already in use");
    assert_no_start(chapter, &addr, &reason);
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = tcp.local_addr().unwrap().to_string();
    let reason = format!("cannot listen on {addr}: Address already in use");
    assert_no_start(chapter, &addr, &reason);
}

#[track_caller]
fn assert_no_start(chapter: Chapter, addr: &str, reason: &str) {
    let stderr = Server::fail(chapter.exe, addr, &[], 1);
    let is_one_line = stderr == format!("error: {reason} (os error 98)\n");
    assert!(is_one_line || is_other(), "{stderr}");
}

/// The name has two addresses. A port in use is a mistake to report.
pub fn a_name_does_not_get_past_a_busy_address(chapter: Chapter, _: &str) {
    crate::chapter_only!("it reads the chapter's error messages");
    const NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--mount"];
    let can = run_command(Command::new("unshare").args(NAMESPACE).arg("true")).status.success();
    if !can {
        eprintln!("no namespaces: a name with two addresses is not tested");
        return;
    }
    let file = format!("{}-{}.hosts", name(chapter.exe), process::id());
    let hosts = env::temp_dir().join(file);
    fs::write(&hosts, "127.0.0.1 both\n127.0.0.2 both\n").unwrap();
    let assert_fails = |port: u16, over: &str| {
        let script = "mount --bind \"$1\" /etc/hosts && exec \"$0\" --addr \"$2\"";
        let addr = format!("both:{port}");
        let mut command = Command::new("unshare");
        command.args(NAMESPACE).args(["sh", "-c", script, chapter.exe]).arg(&hosts).arg(&addr);
        let reason = format!("cannot listen on {addr}{over}: Address already in use");
        assert_one_line(&run_command(&mut command), &reason);
    };
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert_fails(udp.local_addr().unwrap().port(), " over UDP");
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_fails(tcp.local_addr().unwrap().port(), "");
    fs::remove_file(hosts).unwrap();
}

/// In a network with four ports, three of which TCP has taken.
pub fn port_0_picks_a_number_that_is_free_for_both(chapter: Chapter, _: &str) {
    crate::chapter_only!("how to pick a port is up to each program");
    let thread = thread::spawn(move || {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() {
            eprintln!("not root: a port that is free for UDP only is not tested");
            return;
        }
        // Of the network of the thread that opens the file; the server inherits it.
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "50000 50003").unwrap();
        let any = Ipv4Addr::UNSPECIFIED;
        let mut taken: Vec<TcpListener> =
            (50_000..50_003).map(|port| TcpListener::bind((any, port)).unwrap()).collect();
        // The kernel picks at random.
        for _ in 0..10 {
            let server = Server::start_on(chapter.exe, "0.0.0.0:0");
            assert_eq!(server.addr().port(), 50_003);
            let table = fs::read_to_string(format!("/proc/{}/net/udp", server.pid())).unwrap();
            // One line is the title.
            let only = table.lines().count() == 2 && table.contains(": 00000000:C353 ");
            assert!(only, "{table}");
        }
        taken.push(TcpListener::bind((any, 50_003)).unwrap());
        let reason = "cannot listen on 0.0.0.0:0 over UDP: Address already in use";
        assert_one_line(&run(chapter.exe, &["--addr", "0.0.0.0:0"]), reason);
    });
    thread.join().unwrap();
}

/// The kernel reports each of them (ECONNREFUSED), but only to a connected socket.
pub fn senders_that_are_gone_hurt_nobody(chapter: Chapter, _: &str) {
    let server = Server::start(chapter.exe);
    let udp = connect_udp(server.addr());
    for _ in 0..3 {
        server.pause();
        for _ in 0..50 {
            connect_udp(server.addr()).send(&frame(1, b"answer me")).unwrap();
        }
        server.signal(Signal::SIGCONT);
        assert_udp_echo(&udp, b"still here");
        served(server.addr());
    }
    server.assert_not_logged("WARN");
}

pub fn a_flood_delays_neither_clients_nor_the_stop(chapter: Chapter, _: &str) {
    let mut server = Server::start(chapter.exe);
    assert_udp_echo(&connect_udp(server.addr()), b"before");
    let (addr, done, sent) = (server.addr(), AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let _done = Done(&done);
        for datagram in [frame(1, b"hello"), frame(77, b"hello"), b"hello".to_vec()] {
            let (done, sent) = (&done, &sent);
            scope.spawn(move || {
                let udp = connect_udp(addr);
                while !done.load(Ordering::Relaxed) {
                    // Fails once the server has gone.
                    let _ = udp.send(&datagram);
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        wait_until("it is flooded", || sent.load(Ordering::Relaxed) > 100_000);
        (0..50).for_each(|_| drop(served(addr)));
        server.signal(Signal::SIGTERM);
        assert_eq!(server.wait().code(), Some(0));
    });
    server.assert_nothing_left();
}

pub fn datagrams_have_no_hooks_and_take_no_place(chapter: Chapter, _: &str) {
    let options = ["--max-conns", "1", "--welcome", "hello there"];
    let server = Server::start_talkative(chapter.exe, &options);
    assert_udp_echo(&connect_udp(server.addr()), b"no welcome");
    let client = server.connect();
    assert_bytes(read(&client, 19), frame(101, b"hello there"));
    assert_bytes(read_to_end(&server.connect()), frame(-1, b"server is full"));
    let senders = [(); 20].map(|()| connect_udp(server.addr()));
    senders.iter().for_each(|udp| assert_udp_echo(udp, b"no place"));
    assert_echo(&client, &frame(1, b"hello"));
    drop((client, senders));
    server.wait_for_log("on_conn_close: connections: 0");
    server.assert_logged_once("on_conn_start: ");
    server.assert_logged_once("on_conn_close: ");
}

pub fn the_udp_client_prints_its_reply_and_has_it_printed(chapter: Chapter, client: &str) {
    let (server, stdout) = start_printing(chapter);
    let output = run(client, &["--addr", &server.addr().to_string(), "--udp", "--timeout", "30"]);
    assert_prints(&output);
    assert_printed(&stdout, "id=2 len=11 hello lars!\n");
}

#[track_caller]
fn assert_prints(output: &Output) {
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "id=1 len=11 hello lars!\ngoodbye\n");
    assert_eq!(output.status.code(), Some(0));
}

/// A socket for the part of the server, and the client's run with these options.
fn serve_udp(client: &str, options: &[&'static str]) -> (UdpSocket, JoinHandle<Output>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    let (client, addr) = (client.to_owned(), socket.local_addr().unwrap().to_string());
    let options = [&["--udp"], options].concat();
    let run = move || run(&client, &[&options[..], &["--addr", &addr]].concat());
    (socket, thread::spawn(run))
}

/// The client's second message. It may have sent its first one again before it got its reply.
#[track_caller]
fn assert_done(server: &UdpSocket, client: JoinHandle<Output>) {
    let mut message = frame(1, HELLO);
    while message == frame(1, HELLO) {
        message = receive(server);
    }
    assert_eq!(message, frame(2, HELLO));
    assert_prints(&client.join().unwrap());
    assert_eq!(received(server), 0);
}

pub fn the_udp_client_asks_again(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    let (server, client) = serve_udp(client, &["--timeout", "0.5", "--retry", "3"]);
    let (first, peer) = receive_from(&server);
    assert_eq!(first, frame(1, HELLO));
    for _ in 0..2 {
        assert_eq!(receive_from(&server), (frame(1, HELLO), peer));
    }
    server.send_to(&frame(1, HELLO), peer).unwrap();
    assert_done(&server, client);
}

/// Also if the kernel knows at once that there is no server (ECONNREFUSED).
pub fn the_udp_client_gives_up(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    for (options, requests) in [
        (&["--timeout", "0.2", "--retry", "2"][..], 3),
        (&["--timeout", "0.2", "--retry", "0"], 1),
        (&["--timeout", "0.2"], 4),
    ] {
        let start = Instant::now();
        let (server, client) = serve_udp(client, options);
        let addr = server.local_addr().unwrap();
        let output = client.join().unwrap();
        let line = format!("error: no reply from {addr}; requests sent: {requests}\n");
        assert_one_line(&output, &line);
        assert_eq!(output.stdout, b"");
        assert!(start.elapsed() >= requests as u32 * Duration::from_millis(200));
        for _ in 0..requests {
            assert_bytes(receive(&server), frame(1, HELLO));
        }
        assert_eq!(received(&server), 0);
        drop(server);
    }
    let gone = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let options = ["--addr", &gone, "--udp", "--timeout", "0.1", "--retry", "1"];
    let line = format!("error: no reply from {gone}; requests sent: 2\n");
    assert_one_line(&run(client, &options), &line);
}

pub fn only_the_same_message_from_the_server_is_a_reply(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    let (server, client) = serve_udp(client, &["--timeout", "0.5"]);
    let (request, peer) = receive_from(&server);
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(&request, peer).unwrap();
    let wrong = [
        vec![],
        request[..18].to_vec(),
        [&request[..], b"x"].concat(),
        request.repeat(2),
        frame(2, HELLO),
        frame(1, b"hello LARS!"),
        vec![0; 65_507],
    ];
    for wrong in &wrong {
        server.send_to(wrong, peer).unwrap();
    }
    assert_bytes(receive(&server), &request);
    server.send_to(&request, peer).unwrap();
    assert_done(&server, client);
}

/// One of them late.
pub fn replies_may_come_twice(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    let (server, client) = serve_udp(client, &["--timeout", "0.5"]);
    let (request, peer) = receive_from(&server);
    assert_bytes(receive(&server), &request);
    for _ in 0..4 {
        server.send_to(&request, peer).unwrap();
    }
    assert_done(&server, client);
}

/// What the client logs before each further attempt.
fn pauses(output: &Output) -> Vec<String> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let warnings = stderr.lines().filter(|line| line.contains(" WARN "));
    warnings.map(|line| line.split("; connecting again in ").nth(1).unwrap().to_owned()).collect()
}

/// Answers the client's first message.
fn reply(client: &TcpStream) {
    client.set_read_timeout(Some(LIMIT)).unwrap();
    assert_bytes(read(client, 19), frame(1, HELLO));
    write(client, &frame(1, HELLO));
}

pub fn the_tcp_client_connects_again(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        drop(listener.accept().unwrap());
        reset(listener.accept().unwrap().0);
        let (last, _) = listener.accept().unwrap();
        reply(&last);
        assert_bytes(read_to_end(&last), frame(2, HELLO));
    });
    let output = run(client, &["--addr", &addr, "--retry", "2", "--timeout", "30"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(pauses(&output), ["100ms", "200ms"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.ends_with("id=1 len=11 hello lars!\ngoodbye\n"), "{stdout}");
    server.join().unwrap();
}

pub fn the_tcp_client_gives_up(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let start = Instant::now();
    let output = run(client, &["--addr", &gone]);
    // The pauses matter: without them, retries would make a server's trouble worse.
    assert!(start.elapsed() >= Duration::from_millis(100 + 200 + 400));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(pauses(&output), ["100ms", "200ms", "400ms"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().next_back().unwrap();
    assert_eq!(stderr.lines().count(), 4, "{stderr}");
    assert!(last.starts_with(&format!("error: cannot connect to {gone}: Connection refused")));
}

pub fn the_tcp_client_waits_for_its_reply_and_no_longer(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    // The kernel accepts its connections, and nothing answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let output = run(client, &["--addr", &addr, "--timeout", "0.2", "--retry", "1"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(pauses(&output), ["100ms"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.matches("the server has not replied in time").count(), 2, "{stderr}");
    // Each was established.
    (0..2).for_each(|_| drop(listener.accept().unwrap()));
    // The reply comes in time, the end much later.
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        reply(&stream);
        thread::sleep(Duration::from_millis(1500));
        assert_bytes(read_to_end(&stream), frame(2, HELLO));
    });
    assert_prints(&run(client, &["--addr", &addr, "--timeout", "1", "--retry", "0"]));
    server.join().unwrap();
}

pub fn once_it_has_its_reply_the_tcp_client_does_not_connect_again(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        reply(&stream);
        // Its second message shows that it has read the reply.
        assert_bytes(read(&stream, 19), frame(2, HELLO));
        reset(stream);
        listener.set_nonblocking(true).unwrap();
        listener
    });
    let output = run(client, &["--addr", &addr, "--timeout", "30"]);
    assert_one_line(&output, "the connection failed while it was closing");
    let again = server.join().unwrap().accept();
    assert_eq!(again.unwrap_err().kind(), ErrorKind::WouldBlock);
}

pub fn the_client_refuses_invalid_arguments(_: Chapter, client: &str) {
    crate::chapter_only!("it tests the chapter's client");
    for args in [
        ["--timeout", "0"],
        ["--timeout", "86401"],
        ["--retry", "-1"],
        ["--retry", "x"],
        ["--addr", "nonsense"],
    ] {
        for udp in [&[][..], &["--udp"]] {
            assert_eq!(run(client, &[&args, udp].concat()).status.code(), Some(2), "{args:?}");
        }
    }
}
