//! Hooks: callbacks for the start and the end of each connection (since v07).

use crate::router::NetConnection;

/// Called with a connection that has just started or is about to end (since v07). An error closes
/// that connection.
pub type ConnHook = dyn Fn(&mut dyn NetConnection) -> anyhow::Result<()> + Send + Sync;

/// The same with what the server keeps for that connection, `S` (since v12).
pub type SessionHook<S> =
    dyn Fn(&mut dyn NetConnection, &mut S) -> anyhow::Result<()> + Send + Sync;

/// What to call when a connection starts, and when it ends (since v07).
pub struct Hooks<F: ?Sized = ConnHook> {
    start: Option<Box<F>>,
    close: Option<Box<F>>,
}

impl<F: ?Sized> Hooks<F> {
    /// Sets the start hook. It is called once per connection, before its first message is handled;
    /// what it sends goes before any reply.
    pub fn set_conn_start(&mut self, hook: Box<F>) {
        self.start = Some(hook);
    }

    /// Sets the close hook. It is called once for each connection whose start hook was called, no
    /// matter how the connection ends. If the peer can still read, it gets what the hook sends.
    pub fn set_conn_close(&mut self, hook: Box<F>) {
        self.close = Some(hook);
    }

    /// The start hook.
    pub fn conn_start(&self) -> Option<&F> {
        self.start.as_deref()
    }

    /// The close hook.
    pub fn conn_close(&self) -> Option<&F> {
        self.close.as_deref()
    }
}

impl<F: ?Sized> Default for Hooks<F> {
    fn default() -> Self {
        Self { start: None, close: None }
    }
}

impl Hooks {
    /// Creates a pair without hooks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls the start hook.
    ///
    /// # Errors
    /// Any error of the hook.
    pub fn on_conn_start(&self, conn: &mut dyn NetConnection) -> anyhow::Result<()> {
        self.conn_start().map_or(Ok(()), |hook| hook(conn))
    }

    /// Calls the close hook.
    ///
    /// # Errors
    /// Any error of the hook.
    pub fn on_conn_close(&self, conn: &mut dyn NetConnection) -> anyhow::Result<()> {
        self.conn_close().map_or(Ok(()), |hook| hook(conn))
    }
}

impl<S> Hooks<SessionHook<S>> {
    /// Calls the start hook (since v12).
    ///
    /// # Errors
    /// Any error of the hook.
    pub fn on_session_start(
        &self,
        conn: &mut dyn NetConnection,
        session: &mut S,
    ) -> anyhow::Result<()> {
        self.conn_start().map_or(Ok(()), |hook| hook(conn, session))
    }

    /// Calls the close hook (since v12).
    ///
    /// # Errors
    /// Any error of the hook.
    pub fn on_session_close(
        &self,
        conn: &mut dyn NetConnection,
        session: &mut S,
    ) -> anyhow::Result<()> {
        self.conn_close().map_or(Ok(()), |hook| hook(conn, session))
    }
}
