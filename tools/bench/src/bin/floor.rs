//! The floor: the minimum that any echo on epoll costs. One buffer for all connections, no state,
//! blocking writes: not a usable server.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

fn main() -> anyhow::Result<()> {
    let listener = bench::listener()?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let listener_fd = listener.as_raw_fd() as u64;
    epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, listener_fd))?;
    // Indexed by fd, which is what the events carry.
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let mut events = vec![EpollEvent::empty(); 1024];
    let mut buf = vec![0; 64 * 1024];
    loop {
        let n = match epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(n) => n,
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(errno.into()),
        };
        for event in &events[..n] {
            if event.data() == listener_fd {
                let (stream, _) = listener.accept()?;
                // Like chapter 4 and the other peers.
                stream.set_nodelay(true)?;
                let fd = stream.as_raw_fd() as usize;
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, fd as u64))?;
                if streams.len() <= fd {
                    streams.resize_with(fd + 1, || None);
                }
                streams[fd] = Some(stream);
                continue;
            }
            let slot = &mut streams[event.data() as usize];
            let stream = slot.as_mut().context("an event for a stream that is gone")?;
            if !echo(stream, &mut buf) {
                epoll.delete(&*stream)?;
                *slot = None;
            }
        }
    }
}

/// Echoes once. Returns whether the connection is still open.
fn echo(stream: &mut TcpStream, buf: &mut [u8]) -> bool {
    match stream.read(buf) {
        Ok(0) => false,
        Ok(n) => stream.write_all(&buf[..n]).is_ok(),
        Err(err) => err.kind() == io::ErrorKind::Interrupted,
    }
}
