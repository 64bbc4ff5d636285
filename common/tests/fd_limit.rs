//! The promises of `net` under fd exhaustion. Alone in its file, because all tests in a process
//! share its fds.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use common::net::{Accepted, Listener, raise_fd_limit};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

#[test]
fn a_listener_recovers_from_fd_exhaustion() {
    let mut listener = Listener::bind(&[SocketAddr::from(([127, 0, 0, 1], 0))]).unwrap();
    listener.set_nonblocking().unwrap();
    let fd = listener.as_fd().try_clone_to_owned().unwrap();
    let addr = TcpListener::from(fd).local_addr().unwrap();
    let client = TcpStream::connect(addr).unwrap();

    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
    let mut files: Vec<File> = std::iter::from_fn(|| File::open("/dev/null").ok()).collect();
    for _ in 0..3 {
        assert!(matches!(listener.accept(), Accepted::Exhausted));
    }
    files.pop();
    let Accepted::Client(_stream, peer) = listener.accept() else {
        panic!("a client is pending, and there is an fd for it");
    };
    assert_eq!(peer, client.local_addr().unwrap());

    raise_fd_limit();
    assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    assert!(matches!(listener.accept(), Accepted::WouldBlock));
}
