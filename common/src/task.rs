//! Tasks: closures that one thread sends to the loop of another, and what they are for here: to
//! publish a message to all clients of all threads (since v11).

use std::cell::OnceCell;
use std::error::Error;
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Result, ensure};

use crate::event_loop::{EventLoop, Token};
use crate::limit::Permit;
use crate::mailbox::{CAPACITY, Inbox, Mailbox, NotPosted, mailbox};
use crate::message;
use crate::router::{MsgRouter, NetConnection};
use crate::tcp_conn::TcpConn;

/// A letter to a worker whose loop has the state `S` (since v11).
pub enum Task<S> {
    /// A client to serve.
    NewConn(NewConn),
    /// A closure to run.
    Run(Run<S>),
}

/// A closure that a loop runs between two events (since v11). An error ends the loop.
pub type Run<S> = Box<dyn FnOnce(&mut S, &mut EventLoop<S>) -> Result<()> + Send>;

/// A client on its way from the thread that accepts to the one that serves (since v11, before that
/// the chapter's own).
pub struct NewConn {
    /// Its right to a connection.
    pub permit: Permit,
    /// Its socket.
    pub stream: TcpStream,
    /// Its address.
    pub peer: SocketAddr,
}

/// Called on each worker with a message for all its clients but the publisher, if that is one of them
/// (since v11).
pub type PublishCallback<S> =
    fn(&mut S, &mut EventLoop<S>, payload: &[u8], id: i32, publisher: Option<Token>) -> Result<()>;

/// The mailboxes of all workers, for any thread (since v11). `N` are their notices.
pub struct Tasks<S, N> {
    mailboxes: Vec<Mailbox<Task<S>, N>>,
    publish: PublishCallback<S>,
    /// Tasks for loops that had ended.
    late: AtomicUsize,
}

/// The inboxes of all workers (since v11).
pub type Inboxes<S, N> = Vec<Inbox<Task<S>, N>>;

impl<S, N> Tasks<S, N> {
    /// Creates the mailboxes of `n` workers.
    ///
    /// # Errors
    /// Any eventfd(2) error, typically EMFILE.
    pub fn new(n: usize, publish: PublishCallback<S>) -> io::Result<(Self, Inboxes<S, N>)> {
        let pairs: io::Result<Vec<_>> = (0..n).map(|_| mailbox()).collect();
        let (mailboxes, inboxes) = pairs?.into_iter().unzip();
        Ok((Self { mailboxes, publish, late: AtomicUsize::new(0) }, inboxes))
    }

    /// The mailboxes, in the order of the workers.
    pub fn mailboxes(&self) -> &[Mailbox<Task<S>, N>] {
        &self.mailboxes
    }

    /// Sends a task to one worker. Never waits.
    ///
    /// # Errors
    /// The mailbox is full, or the loop has ended. The task comes back in the error.
    pub fn send_task(&self, worker: usize, run: Run<S>) -> Result<(), NotPosted<Task<S>>> {
        self.mailboxes[worker].post(Task::Run(run))
    }

    /// Sends a task to each worker, or to none if one of their mailboxes is half full; then it returns
    /// false. Never waits. The other half is for clients: a storm of tasks must not keep them out.
    pub fn send_task_to_all(&self, run: impl Fn() -> Run<S>) -> bool {
        let places = self.mailboxes.iter().map(|mailbox| mailbox.reserve(CAPACITY / 2));
        let Some(places) = places.collect::<Option<Vec<_>>>() else { return false };
        for place in places {
            if place.post(Task::Run(run())).is_err() {
                self.late.fetch_add(1, Ordering::Relaxed);
            }
        }
        true
    }

    /// How many tasks have not been run. Once all workers have ended, the number is final.
    pub fn not_run(&self) -> usize {
        let queued: usize = self.mailboxes.iter().map(Mailbox::queued).sum();
        queued + self.late.load(Ordering::Relaxed)
    }
}

/// How a callback publishes, whatever the state of the loops (since v11).
pub trait Publish {
    /// Sends a message to all clients of all threads but the publisher, a client of this thread.
    /// Returns false if a mailbox has no room; then nothing is sent.
    fn publish(&self, payload: &[u8], id: i32, publisher: Option<Token>) -> bool;
}

impl<S: 'static, N> Publish for Tasks<S, N> {
    fn publish(&self, payload: &[u8], id: i32, publisher: Option<Token>) -> bool {
        let shared = OnceCell::<Arc<[u8]>>::new();
        let (callback, sender) = (self.publish, thread::current().id());
        self.send_task_to_all(|| {
            // Copied once, and only if there is room: the publisher may try again often.
            let payload = Arc::clone(shared.get_or_init(|| payload.into()));
            Box::new(move |state, event_loop| {
                // On another thread's loop the token may be a different client's.
                let publisher = publisher.filter(|_| thread::current().id() == sender);
                callback(state, event_loop, &payload, id, publisher)
            })
        })
    }
}

/// Why nothing was published: a mailbox has no room (since v11).
#[derive(Debug)]
pub struct NoRoom;

impl fmt::Display for NoRoom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mailbox has no room")
    }
}

impl Error for NoRoom {}

/// The sender of a message, as a callback sees it: it can publish (since v11).
pub struct Publisher<'a, S = ()> {
    /// What the server keeps for this connection (since v12).
    pub session: &'a mut S,
    conn: &'a mut dyn NetConnection,
    /// `None` for a datagram.
    token: Option<Token>,
    tasks: &'a dyn Publish,
}

/// Called with the sender, the payload and the id of a message (since v11). An error closes the
/// connection.
pub type PublisherCallback<S = ()> =
    dyn Fn(&mut Publisher<S>, &[u8], i32) -> Result<()> + Send + Sync;

impl<S> Publisher<'_, S> {
    /// Sends a message to all clients of all threads, the sender included; or to none of them. Call it
    /// once, before anything that must not happen twice.
    ///
    /// # Errors
    /// [`NoRoom`] if a mailbox is half full. Pass it on: the callback is called again later, with the same
    /// message. (A datagram is dropped instead.) And as [`send_message`](NetConnection::send_message), for
    /// the sender's own copy.
    pub fn publish(&mut self, payload: &[u8], id: i32) -> Result<()> {
        // Too long a message is this client's mistake, and must not reach the others.
        message::encode_header(id, payload.len())?;
        ensure!(self.tasks.publish(payload, id, self.token), NoRoom);
        // Not by a task: the connection may be closing by the time it is run.
        self.token.map_or(Ok(()), |_| self.conn.send_message(payload, id))
    }
}

impl<S> NetConnection for Publisher<'_, S> {
    fn send_message(&mut self, payload: &[u8], id: i32) -> Result<()> {
        self.conn.send_message(payload, id)
    }

    fn close(&mut self) {
        self.conn.close();
    }
}

impl<S> MsgRouter<PublisherCallback<S>> {
    /// Calls the callback for a message of a connection (since v11). Without a callback the message is
    /// skipped, and after [`NoRoom`] the connection is paused.
    ///
    /// # Errors
    /// Any other error of the callback.
    pub fn call_publisher(
        &self,
        conn: &mut TcpConn,
        session: &mut S,
        payload: &[u8],
        id: i32,
        tasks: &dyn Publish,
    ) -> Result<()> {
        let Some(callback) = self.get(id) else {
            conn.skip_message(id);
            return Ok(());
        };
        let token = Some(conn.token);
        match callback(&mut Publisher { session, conn, token, tasks }, payload, id) {
            Err(err) if err.is::<NoRoom>() => {
                conn.pause();
                Ok(())
            }
            result => result,
        }
    }

    /// The same for a datagram, which cannot wait (since v11). `None` if it is to be dropped.
    pub fn call_sender(
        &self,
        conn: &mut dyn NetConnection,
        session: &mut S,
        payload: &[u8],
        id: i32,
        tasks: &dyn Publish,
    ) -> Option<Result<()>> {
        let result =
            self.get(id)?(&mut Publisher { session, conn, token: None, tasks }, payload, id);
        Some(result).filter(|result| !result.as_ref().is_err_and(|err| err.is::<NoRoom>()))
    }
}
