//! The promises of `net`.

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::anyhow;
use common::event_loop::{Callbacks, EventLoop, Interest};
use common::net::{Accepted, Listener, close_gracefully, connect, connect_result, raise_fd_limit};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, getsockname, getsockopt, socket, sockopt,
};

/// The time limit of every wait.
const LIMIT: Duration = Duration::from_secs(20);

const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn listener() -> (Listener, SocketAddr) {
    let listener = Listener::bind(&[ANY_PORT]).unwrap();
    let addr = local_addr(&listener);
    (listener, addr)
}

fn local_addr(listener: &Listener) -> SocketAddr {
    let fd = listener.as_fd().try_clone_to_owned().unwrap();
    TcpListener::from(fd).local_addr().unwrap()
}

/// Both ends of a connection, blocking.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let (mut listener, addr) = listener();
    let client = TcpStream::connect(addr).unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    (listener.accept_blocking().0, client)
}

/// Returns the result of `f`, if it returns in time.
#[track_caller]
fn within_limit<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(f()));
    receiver.recv_timeout(LIMIT).unwrap()
}

/// An address in TEST-NET-1 (RFC 5737), which no machine has.
const ELSEWHERE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 0);

#[test]
fn binds_the_first_address_that_is_local() {
    let listener = Listener::bind(&[ELSEWHERE, ANY_PORT]).unwrap();
    assert_eq!(local_addr(&listener).ip(), ANY_PORT.ip());
    let kind = |addrs: &[SocketAddr]| Listener::bind(addrs).err().map(|err| err.kind());
    assert_eq!(kind(&[ELSEWHERE, ELSEWHERE]), Some(ErrorKind::AddrNotAvailable));
    assert_eq!(kind(&[]), Some(ErrorKind::InvalidInput));
}

/// If the server listened elsewhere, its user would talk to another server without noticing.
#[test]
fn an_address_in_use_is_an_error_even_if_another_is_free() {
    let (_taken, addr) = listener();
    for addrs in [&[addr, ANY_PORT][..], &[ELSEWHERE, addr]] {
        let err = Listener::bind(addrs).err().unwrap();
        assert_eq!(err.kind(), ErrorKind::AddrInUse);
    }
}

#[test]
fn a_port_can_be_bound_again_while_old_connections_are_in_time_wait() {
    let (mut listener, addr) = listener();
    let mut client = TcpStream::connect(addr).unwrap();
    let (server, _) = listener.accept_blocking();
    // The side that closes first ends up in TIME_WAIT.
    drop((server, listener));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    drop(client);
    Listener::bind(&[addr]).unwrap();
}

#[test]
fn accept_takes_the_pending_clients_and_would_then_block() {
    let (mut listener, addr) = listener();
    listener.set_nonblocking().unwrap();
    assert!(matches!(listener.accept(), Accepted::WouldBlock));
    let clients = [(); 2].map(|()| TcpStream::connect(addr).unwrap());
    for client in clients {
        let Accepted::Client(_, peer) = listener.accept() else {
            panic!("no client, although connect has returned");
        };
        assert_eq!(peer, client.local_addr().unwrap());
    }
    assert!(matches!(listener.accept(), Accepted::WouldBlock));
}

#[test]
fn the_queue_takes_a_thousand_clients_in_one_burst() {
    let (_listener, addr) = listener();
    raise_fd_limit();
    // None is accepted. Once the backlog is full, connecting blocks.
    let clients: Vec<_> = (0..1000)
        .map_while(|_| TcpStream::connect_timeout(&addr, Duration::from_secs(5)).ok())
        .collect();
    assert_eq!(clients.len(), 1000);
}

#[test]
fn a_dropped_listener_resets_pending_clients_and_frees_its_port() {
    let (listener, addr) = listener();
    let mut pending = TcpStream::connect(addr).unwrap();
    pending.set_read_timeout(Some(LIMIT)).unwrap();
    drop(listener);
    let err = pending.read(&mut [0]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionReset);
    let err = TcpStream::connect(addr).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionRefused);
    Listener::bind(&[addr]).unwrap();
}

/// Otherwise a connection whose link is cut would stay open forever.
#[test]
fn accepted_connections_have_keep_alive() {
    let (server, _client) = tcp_pair();
    assert!(getsockopt(&server, sockopt::KeepAlive).unwrap());
    assert_eq!(getsockopt(&server, sockopt::TcpKeepIdle).unwrap(), 60);
    assert_eq!(getsockopt(&server, sockopt::TcpKeepInterval).unwrap(), 20);
    assert_eq!(getsockopt(&server, sockopt::TcpKeepCount).unwrap(), 3);
}

/// Connects to `addr` on an event loop, and returns the outcome.
#[track_caller]
fn connect_in_loop(addr: SocketAddr) -> (TcpStream, io::Result<()>) {
    let stream = connect(addr).unwrap();
    let mut event_loop = EventLoop::<()>::new().unwrap();
    let callbacks = Callbacks { read: None, write: Some(EventLoop::stop_callback) };
    let registered = event_loop.add_io_event(&stream, Interest::WRITE, callbacks);
    let token = registered.unwrap();
    let time_out = |_: &mut _, _: &mut _, _| Err(anyhow!("timed out"));
    event_loop.run_after(LIMIT, token, time_out).unwrap();
    event_loop.event_process(&mut ()).unwrap();
    let outcome = connect_result(&stream);
    (stream, outcome)
}

#[test]
fn a_connection_is_established_when_its_socket_becomes_writable() {
    let (mut listener, addr) = listener();
    let (mut stream, outcome) = connect_in_loop(addr);
    outcome.unwrap();
    let (_server, peer) = listener.accept_blocking();
    assert_eq!(stream.local_addr().unwrap(), peer);
    let err = within_limit(move || stream.read(&mut [0])).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_refused_connection_becomes_writable_and_has_an_error() {
    // Bound but not listening, so that no other socket gets the port.
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    let bound = TcpListener::from(socket);
    let addr = bound.local_addr().unwrap();
    let err = connect_in_loop(addr).1.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionRefused);
}

/// This can happen to a client whose server is gone, if the port is in the kernel's range for
/// clients.
#[test]
fn a_socket_connected_to_itself_counts_as_refused() {
    let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::empty(), None).unwrap();
    bind(socket.as_raw_fd(), &SockaddrIn::new(127, 0, 0, 1, 0)).unwrap();
    let addr: SockaddrIn = getsockname(socket.as_raw_fd()).unwrap();
    nix::sys::socket::connect(socket.as_raw_fd(), &addr).unwrap();
    let err = connect_result(&TcpStream::from(socket)).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_graceful_close_delivers_the_reply_despite_unread_input() {
    let (mut server, mut client) = tcp_pair();
    client.write_all(&[b'?'; 100_000]).unwrap();
    server.write_all(b"hello Lars\n").unwrap();
    thread::scope(|scope| {
        let closing = scope.spawn(|| close_gracefully(server, LIMIT));
        // A reset would make this write fail, and destroy the reply.
        client.write_all(&[b'?'; 100_000]).unwrap();
        let mut reply = String::new();
        client.read_to_string(&mut reply).unwrap();
        assert_eq!(reply, "hello Lars\n");
        client.shutdown(Shutdown::Write).unwrap();
        closing.join().unwrap().unwrap();
    });
}

#[test]
fn a_graceful_close_reports_a_reset() {
    let (server, client) = tcp_pair();
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::Linger, &at_once).unwrap();
    let reset = thread::spawn(move || {
        // Only after the FIN, or the server could not send the FIN any more.
        assert_eq!((&client).read(&mut [0]).unwrap(), 0);
        drop(client);
    });
    let closing = close_gracefully(server, LIMIT);
    assert_eq!(closing.unwrap_err().kind(), ErrorKind::ConnectionReset);
    reset.join().unwrap();
}

#[test]
fn a_graceful_close_ends_even_if_the_peer_never_closes() {
    let limit = Duration::from_millis(20);
    let (server, _silent) = tcp_pair();
    within_limit(move || close_gracefully(server, limit)).unwrap();

    let (server, mut talkative) = tcp_pair();
    thread::spawn(move || while talkative.write_all(&[b'!'; 4096]).is_ok() {});
    within_limit(move || close_gracefully(server, limit)).unwrap();
}
