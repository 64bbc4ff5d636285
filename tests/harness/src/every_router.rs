//! The promises of every server with a router, from chapter 6 on, and of its client.
//! [`every_router!`](crate::every_router!) turns each promise into a test.

use std::fs::File;
use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Output;
use std::sync::mpsc;
use std::thread;

use nix::unistd::pipe;

use crate::every_reactor::Chapter;
use crate::{
    LIMIT, QUIET, Server, Signal, assert_bytes, frame, read, read_to_end, reset, run_client,
    send_fin, served, wait_until, write,
};

/// One test per promise, for the [`Chapter`] `$chapter` and the binary of its client `$client`, with
/// options for it if there are any.
#[macro_export]
macro_rules! every_router {
    ($chapter:expr, $client:expr, [$($promise:ident),* $(,)?]) => {
        mod every_router {
            use super::*;

            $(
                #[test]
                fn $promise() {
                    harness::every_router::$promise($chapter, $client);
                }
            )*
        }
    };
    ($chapter:expr, $client:expr $(, $option:literal)*) => {
        harness::every_router!($chapter, &[$client $(, $option)*], [
            messages_with_id_2_are_printed_and_not_answered,
            messages_without_a_callback_are_skipped,
            survives_a_standard_output_that_takes_nothing,
            the_client_prints_its_reply_and_has_it_printed,
            the_client_tries_every_address_of_a_name,
            the_client_closes_without_losing_its_last_message,
            a_failure_of_the_client_is_one_line,
        ]);
    };
}

/// Starts the server with its standard output in a pipe, and returns the other end of that.
#[track_caller]
pub(crate) fn start_printing(chapter: Chapter) -> (Server, OwnedFd) {
    let (reader, writer) = pipe().unwrap();
    (Server::start_printing(chapter.exe, writer), reader)
}

/// Waits for `text` in the pipe.
#[track_caller]
pub(crate) fn assert_printed(reader: &OwnedFd, text: &str) {
    let (mut printed, mut stdout) = (vec![0; text.len()], File::from(reader.try_clone().unwrap()));
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        stdout.read_exact(&mut printed).unwrap();
        sender.send(printed).unwrap();
    });
    let printed = receiver.recv_timeout(LIMIT).expect("it is printed");
    assert_eq!(String::from_utf8_lossy(&printed), text);
}

pub fn messages_with_id_2_are_printed_and_not_answered(chapter: Chapter, _: &[&str]) {
    let (server, stdout) = start_printing(chapter);
    let client = server.connect();
    let printed = [frame(2, b"hello"), frame(2, b""), frame(2, b"two\nlines \xff\\")].concat();
    assert_echo_after(&client, &printed);
    assert_printed(&stdout, "id=2 len=5 hello\nid=2 len=0\nid=2 len=12 two\\nlines \\xff\\\\\n");
}

/// Sends `bytes`, to which there is no reply, and then something that is echoed.
#[track_caller]
fn assert_echo_after(client: &TcpStream, bytes: &[u8]) {
    let echo = frame(1, b"the only reply");
    write(client, &[bytes, &echo].concat());
    assert_bytes(read(client, echo.len()), &echo);
}

pub fn messages_without_a_callback_are_skipped(chapter: Chapter, _: &[&str]) {
    let server = Server::start(chapter.exe);
    let (client, other) = (server.connect(), server.connect());
    let peer = client.local_addr().unwrap();
    for id in [0, -1, i32::MIN, i32::MAX] {
        assert_echo_after(&client, &frame(id, b"what is this?"));
    }
    assert_echo_after(&client, &frame(77_777, b"?").repeat(100_000));
    assert_echo_after(&other, &frame(77_777, b"served"));
    server.wait_for_log(&format!("{peer}: no callback for message id 0"));
    send_fin(&client);
    assert_bytes(read_to_end(&client), b"");
    server.wait_for_log(&format!("{peer}: messages skipped: 100004"));
    server.assert_logged_once("no callback for message id 0");
    server.assert_logged_once(&format!("{peer}: messages skipped"));
    let peer = other.local_addr().unwrap();
    reset(other);
    server.wait_for_log(&format!("{peer}: messages skipped: 1"));
}

/// It is full, and then closed.
pub fn survives_a_standard_output_that_takes_nothing(chapter: Chapter, _: &[&str]) {
    let (mut server, stdout) = start_printing(chapter);
    let client = server.connect();
    let before = server.status("VmRSS");
    for _ in 0..100 {
        assert_echo_after(&client, &frame(2, &[b'x'; 50_000]));
    }
    let grown = server.status("VmRSS").saturating_sub(before);
    assert!(grown < 4096, "by {grown} KiB");
    drop(stdout);
    assert_echo_after(&client, &frame(2, b"unread").repeat(1000));
    drop(client);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
}

pub fn the_client_prints_its_reply_and_has_it_printed(chapter: Chapter, client: &[&str]) {
    let (server, stdout) = start_printing(chapter);
    let output = run_client(client, &server.addr().to_string());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("id=1 len=11 hello lars!\n"));
    assert_eq!(output.stderr, b"");
    assert_printed(&stdout, "id=2 len=11 hello lars!\n");
}

/// `localhost` may be ::1 first, where nothing listens.
pub fn the_client_tries_every_address_of_a_name(chapter: Chapter, client: &[&str]) {
    crate::chapter_only!("it tests the chapter's client");
    let server = Server::start(chapter.exe);
    let name = format!("localhost:{}", server.addr().port());
    assert_eq!(run_client(client, &name).status.code(), Some(0));
}

/// Unread input must not reset the connection before the server has read that message.
pub fn the_client_closes_without_losing_its_last_message(_: Chapter, client: &[&str]) {
    crate::chapter_only!("it tests the chapter's client");
    let (sender, receiver) = mpsc::channel();
    let addr = serve(move |stream| {
        read(&stream, 19);
        write(&stream, &[frame(1, b"hello lars!"), frame(1, &[0; 60_000])].concat());
        thread::sleep(QUIET);
        sender.send(read_to_end(&stream)).unwrap();
    });
    let output = run_client(client, &addr.to_string());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(receiver.recv_timeout(LIMIT).unwrap(), frame(2, b"hello lars!"));
}

/// A server that does `action` to its only client.
fn serve(action: impl FnOnce(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        action(stream);
    });
    addr
}

#[track_caller]
pub(crate) fn assert_one_line(output: &Output, text: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.starts_with("error: ") && stderr.contains(text), "{stderr:?} has no {text:?}");
    assert_eq!(stderr.matches('\n').count(), 1, "{stderr:?}");
}

pub fn a_failure_of_the_client_is_one_line(chapter: Chapter, client: &[&str]) {
    crate::chapter_only!("it tests the chapter's client");
    let at = |addr: SocketAddr| run_client(client, &addr.to_string());
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert_one_line(&at(free), "cannot connect to");
    let resets = serve(|stream| {
        read(&stream, 4);
        reset(stream);
    });
    assert_one_line(&at(resets), "reset");
    let ends = serve(|stream| {
        read(&stream, 19);
        drop(stream);
    });
    assert_one_line(&at(ends), "the server has closed the connection");
    let ends_inside = serve(|stream| {
        read(&stream, 19);
        write(&stream, &frame(1, b"hello lars!")[..12]);
    });
    assert_one_line(&at(ends_inside), "closed inside a message");
    let bad = serve(|stream| {
        write(&stream, &[1_i32.to_le_bytes(), (-1_i32).to_le_bytes()].concat());
        read_to_end(&stream);
    });
    assert_one_line(&at(bad), "message length -1");
    // The hooks of later clients print too.
    let no_space = [&["sh", "-c", "exec \"$0\" \"$@\" >/dev/full"], client].concat();
    let server = Server::start(chapter.exe);
    assert_one_line(&run_client(&no_space, &server.addr().to_string()), "cannot print");
    let full = Server::start_with(chapter.exe, &["--max-conns", "1"]);
    let _only = served(full.addr());
    wait_until("it is refused", || at(full.addr()).status.code() == Some(1));
    assert_one_line(&at(full.addr()), "the server is full");
}
