//! The message router: finds the callback for each kind of message (since v06).

use std::collections::HashMap;

use anyhow::ensure;

use crate::tcp_conn::TcpConn;

/// The sender of a message, as a callback sees it (since v06). It may be a datagram's (since v10): that
/// is sent at once, may get lost, and has no connection to close.
pub trait NetConnection {
    /// Queues one message for it.
    ///
    /// # Errors
    /// The payload is too long, or there is no memory for it. Nothing is queued then.
    fn send_message(&mut self, payload: &[u8], id: i32) -> anyhow::Result<()>;

    /// Closes the connection gracefully, once what is queued has been sent. Further messages from
    /// it are ignored.
    fn close(&mut self);
}

/// Called with the sender, the payload and the id of a message (since v06). An error closes the
/// connection. What C passes as `void *user_data`, a closure captures.
pub type MsgCallback =
    dyn Fn(&mut dyn NetConnection, &[u8], i32) -> anyhow::Result<()> + Send + Sync;

/// Maps the id of a message to its callback (since v06).
pub struct MsgRouter<F: ?Sized = MsgCallback> {
    callbacks: HashMap<i32, Box<F>>,
    default: Option<Box<F>>,
}

impl<F: ?Sized> MsgRouter<F> {
    /// Sets the callback for messages with this id.
    ///
    /// # Errors
    /// The id has a callback already.
    pub fn add_msg_router(&mut self, id: i32, callback: Box<F>) -> anyhow::Result<()> {
        ensure!(!self.callbacks.contains_key(&id), "two callbacks for message id {id}");
        self.callbacks.insert(id, callback);
        Ok(())
    }

    /// Sets the callback for all messages whose id has none of its own (since v07).
    pub fn set_default(&mut self, callback: Box<F>) {
        self.default = Some(callback);
    }

    /// The callback for messages with this id.
    pub fn get(&self, id: i32) -> Option<&F> {
        self.callbacks.get(&id).or(self.default.as_ref()).map(Box::as_ref)
    }
}

impl<F: ?Sized> Default for MsgRouter<F> {
    fn default() -> Self {
        Self { callbacks: HashMap::new(), default: None }
    }
}

impl MsgRouter {
    /// Creates a router without callbacks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls the callback for a message. Without one the message is skipped.
    ///
    /// # Errors
    /// Any error of the callback.
    pub fn call(&self, conn: &mut TcpConn, payload: &[u8], id: i32) -> anyhow::Result<()> {
        match self.get(id) {
            Some(callback) => callback(conn, payload, id),
            None => {
                conn.skip_message(id);
                Ok(())
            }
        }
    }
}

impl NetConnection for TcpConn {
    fn send_message(&mut self, payload: &[u8], id: i32) -> anyhow::Result<()> {
        Self::send_message(self, payload, id)
    }

    fn close(&mut self) {
        Self::close(self);
    }
}
