//! The floor: the minimum that any echo on epoll costs. One buffer for all connections, no state,
//! blocking writes: not a usable server. `floor udp` is the same for datagrams.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;

use anyhow::Context;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

fn main() -> anyhow::Result<()> {
    if std::env::args().nth(1).is_some_and(|mode| mode == "udp") {
        return udp();
    }
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

/// Echoes datagrams: those that there are, and then it waits for more.
fn udp() -> anyhow::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.set_nonblocking(true)?;
    eprintln!("listening on {}", socket.local_addr()?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    let mut buf = vec![0; 64 * 1024];
    loop {
        match epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        while let Ok((n, peer)) = socket.recv_from(&mut buf) {
            // One that cannot be sent is lost.
            let _ = socket.send_to(&buf[..n], peer);
        }
    }
}
