//! Interrupted system calls (EINTR) are repeated. Alone in its file, because it stops and continues
//! the whole process: without a signal handler, which would need `unsafe`, nothing else interrupts
//! a system call (signal(7)).

#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;

use common::buf_pool::{BufPool, MAX_BLOCK};
use common::event_loop::{Callbacks, EventLoop, Interest};
use common::net::close_gracefully;
use common::reactor_buf::{InputBuf, OutputBuf};
use nix::unistd::{Pid, gettid};

/// Stops process `$0` when its thread `$1` is blocked, and continues it. After three rounds, runs
/// `$2`.
const SCRIPT: &str = r#"
    wait_for() {
        while read -r _ _ state _ </proc/$1/task/$2/stat && [ "$state" != $3 ]; do :; done
    }
    for round in 1 2 3; do
        wait_for $0 $1 S
        kill -STOP $0
        wait_for $0 $1 T
        kill -CONT $0
    done
    eval "$2"
"#;

/// Runs [`SCRIPT`] with the other end of a socket as stdin and stdout.
fn interrupt_and_then(last: &str, theirs: impl Into<OwnedFd>) -> Child {
    let theirs = theirs.into();
    Command::new("sh")
        .args(["-c", SCRIPT])
        .args([Pid::this(), gettid()].map(|id| id.to_string()))
        .arg(last)
        .stdin(theirs.try_clone().unwrap())
        .stdout(theirs)
        .spawn()
        .unwrap()
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Without a timeout the kernel itself would restart the calls on a socket.
    ours.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    ours.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
    (ours, theirs)
}

#[test]
fn an_interrupted_system_call_is_repeated() {
    let pool = BufPool::new(MAX_BLOCK);

    let (socket, theirs) = pair();
    let mut child = interrupt_and_then("echo done", theirs);
    let mut input = InputBuf::new(&pool);
    assert_eq!(input.read_from(&socket).unwrap(), Some(5));
    assert!(child.wait().unwrap().success());

    let (socket, theirs) = pair();
    let mut child = interrupt_and_then("head -c 1000000 >/dev/null", theirs);
    let mut output = OutputBuf::new(&pool);
    output.send_data(&[b'x'; 1_000_000][..]).unwrap();
    assert_eq!(output.write_to(&socket).unwrap(), 1_000_000);
    assert!(child.wait().unwrap().success());

    let (socket, theirs) = pair();
    let mut child = interrupt_and_then("echo done", theirs);
    let mut event_loop = EventLoop::new().unwrap();
    let callbacks = Callbacks { read: Some(EventLoop::stop_callback), write: None };
    event_loop.add_io_event(&socket, Interest::READ, callbacks).unwrap();
    event_loop.event_process(&mut ()).unwrap();
    assert!(child.wait().unwrap().success());

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (socket, _) = listener.accept().unwrap();
    let mut child = interrupt_and_then("true", theirs);
    close_gracefully(socket, Duration::from_secs(20)).unwrap();
    // It has waited until the peer has closed.
    assert!(child.wait().unwrap().success());
}
