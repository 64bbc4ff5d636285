//! Callbacks that publish while a mailbox is full: from chapter 11 on. Each chapter's test has a
//! `Session` and a `publisher_service` of its own, with the chapter's modules.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::thread;
use std::time::Instant;

use common::hooks::Hooks;
use common::mailbox::CAPACITY;
use common::router::{MsgRouter, NetConnection};
use common::task::{Publisher, PublisherCallback};
use harness::every_udp::{assert_udp_echo, connect_udp};
use harness::{
    assert_echo, assert_silent, connect, frame, read, read_to_end, reset, send_fin, served,
    wait_until, wait_until_taken, write,
};

use crate::pool_callbacks::{Running, blocking};
use crate::{Session, publisher_service};

/// How many publications a mailbox takes; the other half is for clients.
pub const ROOM: usize = CAPACITY / 2;

/// More than there is room for.
pub const MANY: usize = ROOM + 100;

/// The router of earlier chapters, whose callbacks do not publish.
pub fn for_publishers(router: MsgRouter) -> MsgRouter<PublisherCallback<Session>> {
    let mut publishers = MsgRouter::<PublisherCallback<Session>>::default();
    let call = move |conn: &mut Publisher<Session>, payload: &[u8], id| {
        router.get(id).map_or(Ok(()), |callback| callback(conn, payload, id))
    };
    publishers.set_default(Box::new(call));
    publishers
}

/// A server with two workers, one of which is blocked by a callback.
pub struct Blocked {
    server: Running,
    /// The client of that callback.
    blocked: TcpStream,
    go_on: Sender<()>,
}

impl Blocked {
    /// Besides what [`blocking`] has, id 3 calls `publish`.
    #[track_caller]
    pub fn new(options: &[&str], hooks: Hooks, publish: Box<PublisherCallback<Session>>) -> Self {
        let (router, go_on) = blocking();
        let mut router = for_publishers(router);
        router.add_msg_router(3, publish).unwrap();
        let server = Running::with(2, options, |limits| publisher_service(router, hooks, limits));
        let blocked = served(server.addr);
        Self { server, blocked, go_on }
    }

    /// A new client of the blocked worker, and one of the other, which get their clients in turn.
    #[track_caller]
    pub fn clients(&self) -> [TcpStream; 2] {
        let other = served(self.server.addr);
        [served(self.server.addr), other]
    }

    #[track_caller]
    pub fn block(&self) {
        write(&self.blocked, &frame(5, b"blocks"));
        wait_until_taken(&self.blocked);
    }

    /// Lets the callback go on. Its client gets what was published meanwhile, and its own reply.
    #[track_caller]
    pub fn go_on(&self, published: &[u8]) {
        self.go_on.send(()).unwrap();
        let expected = [&frame(5, b"blocks"), published].concat();
        assert!(read(&self.blocked, expected.len()) == expected);
    }
}

fn publishing() -> Box<PublisherCallback<Session>> {
    Box::new(|conn, payload, id| conn.publish(payload, id))
}

pub fn numbered(numbers: std::ops::Range<usize>) -> Vec<u8> {
    numbers.flat_map(|n| frame(3, &n.to_le_bytes())).collect()
}

/// It is called again about every millisecond. Its client is not read meanwhile; all others are served.
#[test]
fn a_message_waits_until_every_mailbox_has_room_for_it() {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&calls);
    let publish = move |conn: &mut Publisher<Session>, payload: &[u8], id| {
        counter.fetch_add(1, Ordering::Relaxed);
        conn.publish(payload, id)
    };
    let server = Blocked::new(&[], Hooks::new(), Box::new(publish));
    let ([beside, publisher], [_, other]) = (server.clients(), server.clients());
    server.block();
    let echo = frame(1, b"in order");
    write(&publisher, &[numbered(0..MANY), echo.clone()].concat());
    for client in [&publisher, &other] {
        assert!(read(client, 16 * ROOM) == numbered(0..ROOM));
    }
    let (start, before) = (Instant::now(), calls.load(Ordering::Relaxed));
    [&publisher, &other].into_iter().for_each(assert_silent);
    let calls = calls.load(Ordering::Relaxed) - before;
    let elapsed = start.elapsed().as_millis();
    assert!(calls > 1 && calls as u128 <= elapsed + 2, "{calls} in {elapsed} ms");
    assert_echo(&other, &echo.repeat(100));
    server.go_on(&numbered(0..MANY));
    assert!(read(&beside, 16 * MANY) == numbered(0..MANY));
    for client in [&publisher, &other] {
        assert!(read(client, 16 * (MANY - ROOM)) == numbered(ROOM..MANY));
    }
    assert_eq!(read(&publisher, echo.len()), echo);
    drop((beside, publisher, other));
    drop(server.blocked);
    server.server.stop().unwrap();
}

/// While it waits, it is closed on one side, or altogether.
#[test]
fn a_publisher_that_waits_may_end() {
    let closed = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&closed);
    let mut hooks = Hooks::new();
    hooks.set_conn_close(Box::new(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }));
    let server = Blocked::new(&[], hooks, publishing());
    let ([_beside, publisher], [_, resets]) = (server.clients(), server.clients());
    server.block();
    write(&publisher, &numbered(0..MANY));
    send_fin(&publisher);
    assert!(read(&resets, 16 * ROOM) == numbered(0..ROOM));
    write(&resets, &frame(3, b"after all"));
    wait_until_taken(&resets);
    let before = closed.load(Ordering::Relaxed);
    reset(resets);
    wait_until("it is gone", || closed.load(Ordering::Relaxed) == before + 1);
    server.go_on(&numbered(0..MANY));
    assert!(read_to_end(&publisher) == numbered(0..MANY));
    assert_echo(&server.blocked, &frame(1, b"and nothing else"));
}

/// It is the server that makes it wait.
#[test]
fn a_publisher_that_waits_does_not_time_out() {
    let options = ["--idle-timeout", "2", "--frame-timeout", "2"];
    let server = Blocked::new(&options, Hooks::new(), publishing());
    server.block();
    let publisher = served(server.server.addr);
    let messages = numbered(0..MANY);
    // Its input ends inside a message.
    write(&publisher, &messages[..messages.len() - 3]);
    assert!(read(&publisher, 16 * ROOM) == numbered(0..ROOM));
    // The workers get their clients in turn.
    let _waits = connect(server.server.addr);
    // On the same worker, and idle for a shorter time.
    assert_eq!(read_to_end(&served(server.server.addr)), b"");
    server.go_on.send(()).unwrap();
    assert!(read(&publisher, 16 * (MANY - 1 - ROOM)) == numbered(ROOM..MANY - 1));
}

/// As the half of a mailbox that no message gets is for them.
#[test]
fn new_clients_are_handed_over_while_messages_wait() {
    let server = Blocked::new(&[], Hooks::new(), publishing());
    let [_beside, publisher] = server.clients();
    server.block();
    write(&publisher, &numbered(0..MANY));
    assert!(read(&publisher, 16 * ROOM) == numbered(0..ROOM));
    let clients: Vec<TcpStream> = (0..200).map(|_| connect(server.server.addr)).collect();
    clients.iter().for_each(|client| write(client, &frame(1, b"hello")));
    // The workers get them in turn, so the other one has not got them all.
    for (n, client) in clients.iter().enumerate() {
        if n % 2 == 0 {
            assert_eq!(read(client, 13), frame(1, b"hello"), "client {n}");
        } else if n < 3 {
            assert_silent(client);
        }
    }
    server.go_on.send(()).unwrap();
    for client in clients.iter().skip(1).step_by(2) {
        // They have come later than what was in the mailbox.
        let text = read(client, 4);
        assert!(text == 1_i32.to_le_bytes() || text == 3_i32.to_le_bytes());
    }
}

/// An echo waits for a number of messages that is the smaller the more clients each goes to.
#[test]
fn the_more_clients_get_a_message_the_fewer_are_sent_before_an_echo() {
    const CLIENTS: usize = 100;
    let server = Blocked::new(&[], Hooks::new(), publishing());
    let clients: Vec<_> = (0..CLIENTS).map(|_| server.clients()).collect();
    let [beside, publisher] = &clients[0];
    server.block();
    write(publisher, &numbered(0..ROOM));
    assert!(read(publisher, 16 * ROOM) == numbered(0..ROOM));
    let echo = frame(1, &7_usize.to_le_bytes());
    write(beside, &echo);
    server.go_on(&numbered(0..ROOM));
    let received = read(beside, 16 * (ROOM + 1));
    let before = received.chunks(16).position(|message| message == echo).unwrap();
    assert!(before <= 4096 / CLIENTS, "{before}");
}

#[test]
fn what_is_in_a_mailbox_when_the_server_stops_is_sent() {
    let server = Blocked::new(&[], Hooks::new(), publishing());
    let [beside, publisher] = server.clients();
    server.block();
    let messages = numbered(0..ROOM);
    write(&publisher, &messages);
    assert!(read(&publisher, messages.len()) == messages);
    let Blocked { server, blocked, go_on } = server;
    let (addr, thread) = (server.addr, thread::spawn(|| server.stop()));
    // The acceptor has closed its listening socket, and then tells the workers.
    wait_until("it no longer listens", || TcpStream::connect(addr).is_err());
    go_on.send(()).unwrap();
    assert!(read_to_end(&beside) == messages);
    assert!(read_to_end(&blocked) == [frame(5, b"blocks"), messages].concat());
    drop((beside, publisher, blocked));
    thread.join().unwrap().unwrap();
}

/// Or is dropped. It cannot wait.
#[test]
fn a_datagram_is_published_while_there_is_room() {
    let server = Blocked::new(&[], Hooks::new(), publishing());
    let ([beside, other], udp) = (server.clients(), connect_udp(server.server.addr));
    server.block();
    for n in 0..MANY {
        udp.send(&numbered(n..n + 1)).unwrap();
        assert_udp_echo(&udp, b"handled");
    }
    server.go_on(&numbered(0..ROOM));
    for client in [&beside, &other] {
        assert!(read(client, 16 * ROOM) == numbered(0..ROOM));
        assert_echo(client, &frame(1, b"and nothing else"));
    }
    udp.send(&numbered(77..78)).unwrap();
    assert_eq!(read(&beside, 16), numbered(77..78));
}

/// A callback that makes a message too long to publish is the end of its own client alone.
#[test]
fn a_message_that_is_too_long_to_publish_ends_its_sender_alone() {
    let longer = |conn: &mut Publisher<Session>, payload: &[u8], id| {
        conn.publish(&[payload, b"and more"].concat(), id)
    };
    let server = Blocked::new(&[], Hooks::new(), Box::new(longer));
    let ([beside, publisher], udp) = (server.clients(), connect_udp(server.server.addr));
    write(&publisher, &frame(3, &[7; 65_527]));
    assert_eq!(read_to_end(&publisher), b"");
    for client in [&server.blocked, &beside] {
        assert_echo(client, &frame(1, b"still here"));
    }
    udp.send(&frame(3, &[7; 65_499])).unwrap();
    assert_udp_echo(&udp, b"handled");
    assert!(read(&beside, 65_515)[8..].ends_with(b"\x07and more"));
}

/// Although it is called again for the same message.
#[test]
fn a_callback_that_waited_answers_once_and_closes_afterwards() {
    let publish_and_answer = |conn: &mut Publisher<Session>, payload: &[u8], id: i32| {
        conn.publish(payload, id)?;
        conn.send_message(payload, id + 1)?;
        if payload == b"close" {
            conn.close();
        }
        Ok(())
    };
    let server = Blocked::new(&[], Hooks::new(), Box::new(publish_and_answer));
    let [_beside, publisher] = server.clients();
    server.block();
    let answered = |text: &[u8]| [frame(3, text), frame(4, text)].concat();
    write(&publisher, &[frame(3, b"again").repeat(ROOM), frame(3, b"close")].concat());
    assert!(read(&publisher, 26 * ROOM) == answered(b"again").repeat(ROOM));
    assert_silent(&publisher);
    server.go_on(&[frame(3, b"again").repeat(ROOM), frame(3, b"close")].concat());
    assert_eq!(read_to_end(&publisher), answered(b"close"));
}
