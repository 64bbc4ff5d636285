//! The client: a connection like the server's, and a router for the messages it receives (since v06).

use std::io;
use std::net::SocketAddr;
use std::ops::ControlFlow;
use std::{mem, vec};

use anyhow::{Context, Error, Result, anyhow, ensure};
use tracing::debug;

use crate::buf_pool::BufPool;
use crate::cli::Addr;
use crate::event_loop::{Callbacks, EventLoop, Interest, Token};
use crate::hooks::Hooks;
use crate::limit::FULL;
use crate::net;
use crate::router::MsgRouter;
use crate::tcp_conn::{Progress, TcpConn};

/// The limit on all buffers of a client together, in bytes.
const POOL_CAP: usize = 1 << 30;

/// One connection to a server, on a loop whose state contains this client (since v06).
///
/// Until the client closes the connection, any failure is an error of the loop: the server cannot be
/// reached, has closed or reset the connection, or has sent a bad frame; or a callback has failed.
/// Later failures are counted in [`EventLoop::failed_closes`].
pub struct TcpClient {
    addr: Addr,
    /// The addresses still to be tried.
    peers: vec::IntoIter<SocketAddr>,
    router: MsgRouter,
    /// Called when the connection is established, and when it ends (since v07).
    pub hooks: Hooks,
    /// `None` once it is closing.
    conn: Option<TcpConn>,
    /// Whether the start hook has been called.
    started: bool,
}

impl TcpClient {
    /// Starts connecting. Messages may be queued before the connection is established; they go out
    /// before those of the start hook.
    ///
    /// # Errors
    /// No address can be connected to, as far as that is known at once.
    pub fn new<S: AsMut<Self>>(
        event_loop: &mut EventLoop<S>,
        addr: Addr,
        router: MsgRouter,
    ) -> Result<Self> {
        let peers = addr.resolved().to_vec().into_iter();
        let mut client =
            Self { addr, peers, router, hooks: Hooks::new(), conn: None, started: false };
        client.connect(event_loop, io::ErrorKind::AddrNotAvailable.into())?;
        Ok(client)
    }

    /// Connects to the next address. `err` is why the one before has failed.
    fn connect<S: AsMut<Self>>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        mut err: io::Error,
    ) -> Result<()> {
        let pool = BufPool::new(POOL_CAP);
        for peer in &mut self.peers {
            let callbacks =
                Callbacks { read: None, write: Some(Self::connected_callback::<S> as _) };
            let conn = net::connect(peer)
                .and_then(|stream| TcpConn::new(event_loop, stream, peer, &pool, callbacks));
            match conn {
                Ok(mut conn) => {
                    event_loop.set_interest(&conn.stream, conn.token, Interest::WRITE)?;
                    if let Some(old) = &mut self.conn {
                        mem::swap(&mut conn.output, &mut old.output);
                    }
                    self.conn = Some(conn);
                    return Ok(());
                }
                Err(this) => err = this,
            }
        }
        Err(err).with_context(|| format!("cannot connect to {}", self.addr))
    }

    fn connected_callback<S: AsMut<Self>>(
        state: &mut S,
        event_loop: &mut EventLoop<S>,
        token: Token,
    ) -> Result<()> {
        let client = state.as_mut();
        let Some(conn) = &mut client.conn else { return Ok(()) };
        if let Err(err) = net::connect_result(&conn.stream) {
            event_loop.del_io_event(&conn.stream, token)?;
            return client.connect(event_loop, err);
        }
        debug!("connected to {}", conn.peer);
        let callbacks = Callbacks {
            read: Some(Self::conn_rd_callback::<S> as _),
            write: Some(Self::conn_wt_callback::<S> as _),
        };
        event_loop.set_callbacks(token, callbacks);
        client.started = true;
        let progress = conn.do_start(event_loop, |conn| client.hooks.on_conn_start(conn));
        client.go_on(event_loop, progress)
    }

    fn conn_rd_callback<S: AsMut<Self>>(
        state: &mut S,
        event_loop: &mut EventLoop<S>,
        _: Token,
    ) -> Result<()> {
        let Self { conn: Some(conn), router, .. } = state.as_mut() else { return Ok(()) };
        let progress =
            conn.do_read(event_loop, |conn, payload, id| call(router, conn, payload, id));
        state.as_mut().go_on(event_loop, progress)
    }

    fn conn_wt_callback<S: AsMut<Self>>(
        state: &mut S,
        event_loop: &mut EventLoop<S>,
        _: Token,
    ) -> Result<()> {
        let Self { conn: Some(conn), router, .. } = state.as_mut() else { return Ok(()) };
        let progress =
            conn.do_write(event_loop, |conn, payload, id| call(router, conn, payload, id));
        state.as_mut().go_on(event_loop, progress)
    }

    fn go_on<S>(&mut self, event_loop: &mut EventLoop<S>, progress: Progress) -> Result<()> {
        let is_closed = self.conn.as_ref().is_some_and(TcpConn::is_closed);
        let why = match progress {
            Ok(ControlFlow::Continue(())) => return Ok(()),
            Ok(ControlFlow::Break(None)) if is_closed => return self.close(event_loop),
            Ok(ControlFlow::Break(why)) => {
                why.unwrap_or_else(|| anyhow!("the server has closed the connection"))
            }
            Err(err) => Error::from(err),
        };
        if let Some(mut conn) = self.conn.take() {
            // A failure is one line, and what came first is the reason.
            if let Err(err) = self.on_close(&mut conn) {
                debug!("{}: at its end: {err:#}", conn.peer);
            }
            event_loop.del_io_event(&conn.stream, conn.token)?;
        }
        Err(why.context(self.addr.to_string()))
    }

    /// Queues one message.
    ///
    /// # Errors
    /// The payload is too long, there is no memory for it, or the connection is closing.
    pub fn send_message(&mut self, payload: &[u8], id: i32) -> Result<()> {
        self.conn.as_mut().context("the connection is closing")?.send_message(payload, id)
    }

    fn on_close(&self, conn: &mut TcpConn) -> Result<()> {
        if self.started { self.hooks.on_conn_close(conn) } else { Ok(()) }
    }

    /// Closes the connection gracefully. When that is done, the loop has nothing registered for it.
    ///
    /// # Errors
    /// Any error of the close hook or of epoll_ctl(2).
    pub fn close<S>(&mut self, event_loop: &mut EventLoop<S>) -> Result<()> {
        let Some(mut conn) = self.conn.take() else { return Ok(()) };
        let result = self.on_close(&mut conn);
        event_loop.close_gracefully(conn.stream, conn.token, conn.output)?;
        result
    }
}

fn call(router: &MsgRouter, conn: &mut TcpConn, payload: &[u8], id: i32) -> Result<()> {
    ensure!((id, payload) != FULL, "the server is full");
    let Some(callback) = router.get(id) else {
        debug!("{}: no callback for message id {id}", conn.peer);
        return Ok(());
    };
    callback(conn, payload, id)
}

impl AsMut<Self> for TcpClient {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}
