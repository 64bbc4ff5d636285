//! The connections of one loop: their table, their callbacks and their time limits.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::ops::ControlFlow;
use std::sync::Arc;

use anyhow::Result;
use common::buf_pool::BufPool;
use common::event_loop::{Callbacks, EventLoop, Token};
use common::hooks::Hooks;
use common::limit::{Permit, Sweep, TimeUp, Timeouts};
use common::router::MsgRouter;
use common::task::PublisherCallback;
use common::tcp_conn::{Progress, TcpConn};
use tracing::{debug, info, trace, warn};

use crate::worker::{Worker, WorkerTasks};

/// The state that the loop lends to its callbacks, which contains these connections.
type State = Worker;
type Loop = EventLoop<State>;

/// What the server does for every client, on all threads.
pub struct Service {
    pub router: MsgRouter<PublisherCallback>,
    pub hooks: Hooks,
    pub timeouts: Timeouts,
}

/// All connections of one loop, and the pool for their buffers.
pub struct Conns {
    pub pool: BufPool,
    sweep: Sweep,
    service: Arc<Service>,
    tasks: Arc<WorkerTasks>,
    /// Boxed, because a hash map has empty slots, each the size of an entry.
    clients: HashMap<Token, Box<Client>>,
}

/// One client, and its permit, which goes back when this is dropped, before the socket is closed.
struct Client {
    permit: Permit,
    conn: TcpConn,
}

impl Conns {
    pub fn new(pool: BufPool, service: Arc<Service>, tasks: Arc<WorkerTasks>) -> Self {
        Self { pool, sweep: Sweep::new(service.timeouts), service, tasks, clients: HashMap::new() }
    }

    /// Replaces the service, for the clients that are connected too.
    pub fn set_service(&mut self, event_loop: &mut Loop, service: Arc<Service>) -> Result<()> {
        let timeouts = service.timeouts;
        self.service = service;
        Ok(self.sweep.set_timeouts(event_loop, timeouts, timer_callback)?)
    }

    pub fn count(&self) -> usize {
        self.clients.len()
    }

    /// Step 4: registers the connection, for reading at first.
    pub fn add_conn(
        &mut self,
        event_loop: &mut Loop,
        stream: TcpStream,
        peer: SocketAddr,
        permit: Permit,
    ) -> Result<()> {
        let callbacks = Callbacks { read: Some(conn_rd_callback), write: Some(conn_wt_callback) };
        match TcpConn::new(event_loop, stream, peer, &self.pool, callbacks) {
            Ok(conn) => {
                let token = conn.token;
                self.clients.insert(token, Box::new(Client { permit, conn }));
                self.with_conn(event_loop, token, |client, event_loop, service, _| {
                    client.conn.do_start(event_loop, |conn| service.hooks.on_conn_start(conn))
                })?;
            }
            Err(err) => warn!("{peer}: dropped: {err}"),
        }
        Ok(())
    }

    /// Calls `handler`. On `Break` the connection is closed gracefully, on an error dropped.
    fn with_conn(
        &mut self,
        event_loop: &mut Loop,
        token: Token,
        handler: impl FnOnce(&mut Client, &mut Loop, &Service, &WorkerTasks) -> Progress,
    ) -> Result<()> {
        let Some(mut client) = self.clients.remove(&token) else { return Ok(()) };
        match handler(&mut client, event_loop, &self.service, &self.tasks) {
            Ok(ControlFlow::Continue(())) => self.keep(event_loop, client),
            Ok(ControlFlow::Break(why)) => {
                why.inspect(|err| warn!("{}: {err:#}", client.conn.peer));
                client.close(event_loop, &self.service)
            }
            Err(err) => {
                info!("{}: dropped: {err}", client.conn.peer);
                client.end(&self.service);
                Ok(event_loop.del_io_event(&client.conn.stream, token)?)
            }
        }
    }

    fn keep(&mut self, event_loop: &mut Loop, client: Box<Client>) -> Result<()> {
        self.sweep.watch(event_loop, &client.conn, timer_callback)?;
        self.clients.insert(client.conn.token, client);
        Ok(())
    }

    /// Closes the connections that have exceeded a timeout.
    fn check_times(&mut self, event_loop: &mut Loop) -> Result<()> {
        let (timeouts, now, mut idle) = (self.sweep.start(), event_loop.now(), 0);
        let time_up = |_: &Token, client: &mut Box<Client>| {
            let time_up = timeouts.check(&client.conn, now);
            idle += u64::from(time_up == Some(TimeUp::Idle));
            time_up.is_some()
        };
        for (_, client) in self.clients.extract_if(time_up) {
            client.close(event_loop, &self.service)?;
        }
        if idle > 0 {
            info!("idle connections closed: {idle}");
        }
        let mut left = self.clients.values();
        left.try_for_each(|it| Ok(self.sweep.watch(event_loop, &it.conn, timer_callback)?))
    }

    pub fn close_all(&mut self, event_loop: &mut Loop) -> Result<()> {
        self.clients.drain().try_for_each(|(_, client)| client.close(event_loop, &self.service))
    }
}

impl Service {
    fn on_message(
        &self,
        tasks: &WorkerTasks,
    ) -> impl FnMut(&mut TcpConn, &[u8], i32) -> Result<()> {
        move |conn, payload, id| self.router.call_publisher(conn, &mut (), payload, id, tasks)
    }
}

impl Client {
    fn end(&mut self, service: &Service) {
        if let Err(err) = service.hooks.on_conn_close(&mut self.conn) {
            warn!("{}: at its end: {err:#}", self.conn.peer);
        }
        if self.conn.skipped() > 0 {
            info!("{}: messages skipped: {}", self.conn.peer, self.conn.skipped());
        }
    }

    /// Gives back the permit first: a client that reads the end may connect again at once.
    fn close(mut self, event_loop: &mut Loop, service: &Service) -> Result<()> {
        debug!("{}: closed", self.conn.peer);
        self.end(service);
        drop(self.permit);
        Ok(event_loop.close_gracefully(self.conn.stream, self.conn.token, self.conn.output)?)
    }
}

fn conn_rd_callback(state: &mut State, event_loop: &mut Loop, token: Token) -> Result<()> {
    trace!("conn_rd_callback");
    state.conns.with_conn(event_loop, token, |client, event_loop, service, tasks| {
        client.conn.do_read(event_loop, service.on_message(tasks))
    })
}

fn conn_wt_callback(state: &mut State, event_loop: &mut Loop, token: Token) -> Result<()> {
    trace!("conn_wt_callback");
    state.conns.with_conn(event_loop, token, |client, event_loop, service, tasks| {
        client.conn.do_write(event_loop, service.on_message(tasks))
    })
}

/// Sends what was published to all clients but the publisher, which has it already.
pub fn publish_callback(
    state: &mut State,
    event_loop: &mut Loop,
    payload: &[u8],
    id: i32,
    publisher: Option<Token>,
) -> Result<()> {
    trace!("publish_callback");
    // First the tokens: a client that reads too slowly is dropped, and leaves the table.
    let mut tokens: Vec<Token> = state.conns.clients.keys().copied().collect();
    tokens.retain(|token| Some(*token) != publisher);
    tokens.into_iter().try_for_each(|token| {
        state.conns.with_conn(event_loop, token, |client, event_loop, _, _| {
            client.conn.do_send(event_loop, payload, id)
        })
    })
}

fn timer_callback(state: &mut State, event_loop: &mut Loop, _: Token) -> Result<()> {
    trace!("timer_callback");
    state.conns.check_times(event_loop)
}
