//! How long one wait takes, among so many idle sockets of which one is readable: `select`, `poll` and
//! `epoll_wait`. Run it with `cargo run --release -p bench --example readiness`.

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::select::{FD_SETSIZE, FdSet, select};

fn main() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    println!("{:>10}  {:>10}  {:>10}  {:>10}", "sockets", "select", "poll", "epoll_wait");
    for idle in [9, 99, 999, 9_999] {
        let mut sockets =
            (0..idle).map(|_| UnixDatagram::unbound()).collect::<Result<Vec<_>, _>>()?;
        let (ready, peer) = UnixDatagram::pair()?;
        // Nothing ever reads it, so that each wait finds it.
        peer.send(b"x")?;
        sockets.push(ready);
        let times = [by_select(&sockets)?, Some(by_poll(&sockets)?), Some(by_epoll(&sockets)?)];
        let times = times.map(|time| time.map_or("-".to_owned(), |time| format!("{time:.1?}")));
        println!("{:>10}  {:>10}  {:>10}  {:>10}", sockets.len(), times[0], times[1], times[2]);
    }
    Ok(())
}

/// `None` if a file descriptor is too large for `select`.
fn by_select(sockets: &[UnixDatagram]) -> Result<Option<Duration>> {
    if sockets.iter().any(|socket| socket.as_raw_fd() as usize >= FD_SETSIZE) {
        return Ok(None);
    }
    let mut all = FdSet::new();
    sockets.iter().for_each(|socket| all.insert(socket.as_fd()));
    // The call overwrites its set, so each one needs a copy.
    let time = time_of(|| Ok(select(None, &mut all.clone(), None, None, None)?))?;
    Ok(Some(time))
}

fn by_poll(sockets: &[UnixDatagram]) -> Result<Duration> {
    let of = |socket| PollFd::new(AsFd::as_fd(socket), PollFlags::POLLIN);
    let mut all: Vec<PollFd> = sockets.iter().map(of).collect();
    time_of(|| Ok(poll(&mut all, PollTimeout::NONE)?))
}

fn by_epoll(sockets: &[UnixDatagram]) -> Result<Duration> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (n, socket) in sockets.iter().enumerate() {
        epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLIN, n as u64))?;
    }
    let mut events = vec![EpollEvent::empty(); 1024];
    time_of(|| Ok(epoll.wait(&mut events, EpollTimeout::NONE)? as i32))
}

/// The average over a fifth of a second. Each wait has to find the one socket that is readable.
fn time_of(mut wait: impl FnMut() -> Result<i32>) -> Result<Duration> {
    let (start, mut waits) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(200) {
        anyhow::ensure!(wait()? == 1, "not one socket is readable");
        waits += 1;
    }
    Ok(start.elapsed() / waits)
}
