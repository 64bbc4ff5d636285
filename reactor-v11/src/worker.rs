//! The workers: a thread each, with a loop, a pool of buffers and connections of its own.

use std::mem;
use std::net::TcpStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use common::buf_pool::BufPool;
use common::event_loop::{EventLoop, Token};
use common::mailbox::{Inbox, Mailbox, NotPosted, StopOnDrop};
use common::task::{NewConn, Task, Tasks};
use tracing::{debug, info, trace};

use crate::conns::{Conns, Service, publish_callback};
use crate::tcp_server::GRACE;

/// About how many messages tasks send per event, so that the other fds get their turn.
const SENDS_PER_EVENT: usize = 4096;

/// The state of a worker's loop.
pub struct Worker {
    inbox: Inbox<Task<Self>, Arc<Service>>,
    draining: bool,
    pub conns: Conns,
}

impl Worker {
    /// The whole life of a worker, in its own thread: a loop and a pool never leave theirs.
    fn run(inbox: Inbox<Task<Self>, Arc<Service>>, conns: impl FnOnce() -> Conns) -> Result<()> {
        let mut event_loop = EventLoop::new().context("cannot create the event loop")?;
        let mut worker = Self { inbox, draining: false, conns: conns() };
        worker.inbox.register(&mut event_loop, Self::inbox_callback)?;
        event_loop.event_process(&mut worker)?;
        worker.drain(&mut event_loop)
    }

    /// Step 3: clients, tasks or new settings have arrived in the mailbox, or it is time to stop.
    fn inbox_callback(&mut self, event_loop: &mut EventLoop<Self>, _: Token) -> Result<()> {
        trace!("inbox_callback");
        // A task sends to each client.
        self.inbox.set_limit(SENDS_PER_EVENT / (self.conns.count() + 1));
        let letters = self.inbox.take()?;
        if let Some(service) = self.inbox.take_notice() {
            self.conns.set_service(event_loop, service)?;
        }
        let Some(letters) = letters else {
            event_loop.stop();
            return Ok(());
        };
        for letter in letters {
            match letter {
                Task::NewConn(NewConn { permit, stream, peer }) => {
                    self.conns.add_conn(event_loop, stream, peer, permit)?;
                }
                Task::Run(run) => run(self, event_loop)?,
            }
        }
        // Not only when all letters are taken: clients may publish without end.
        if self.inbox.is_stopped() && !mem::replace(&mut self.draining, true) {
            event_loop.stop();
        }
        Ok(())
    }

    /// Serves what has arrived, and closes all connections, within [`GRACE`].
    fn drain(&mut self, event_loop: &mut EventLoop<Self>) -> Result<()> {
        let end = Instant::now() + GRACE;
        // Until then other threads publish what their clients have sent.
        event_loop.drain_input(self, end - GRACE / 2)?;
        self.inbox.deregister(event_loop)?;
        self.conns.close_all(event_loop)?;
        let cut_off = event_loop.drain_output(self, end)?;
        let name = thread::current().name().unwrap_or_default().to_owned();
        let (registered, buffers) = (event_loop.registered(), self.conns.pool.stats());
        info!(
            "{name} stopped; cut off: {cut_off}; still registered: {registered}; buffers: {buffers}"
        );
        Ok(())
    }
}

/// How the workers are reached: clients and tasks are letters, and a new service is a notice.
pub type WorkerTasks = Tasks<Worker, Arc<Service>>;
type WorkerMailbox = Mailbox<Task<Worker>, Arc<Service>>;

/// All workers.
pub struct Workers {
    pub tasks: Arc<WorkerTasks>,
    threads: Vec<(WorkerMailbox, JoinHandle<Result<()>>)>,
    /// Which of them gets the next client.
    next: usize,
}

impl Workers {
    /// Starts `n` threads, which share `pool_cap`. When one ends, it stops the loop of `ended`.
    pub fn start(
        n: usize,
        pool_cap: usize,
        service: &Arc<Service>,
        ended: &Mailbox<()>,
    ) -> Result<Self> {
        let (all_tasks, inboxes) =
            Tasks::new(n, publish_callback).context("cannot create a mailbox")?;
        let (all_tasks, mut threads) = (Arc::new(all_tasks), Vec::new());
        for (number, inbox) in inboxes.into_iter().enumerate() {
            let (service, farewell) = (Arc::clone(service), StopOnDrop(ended.clone()));
            let tasks = Arc::clone(&all_tasks);
            let thread = thread::Builder::new().name(format!("worker-{number}"));
            let thread = thread.spawn(move || {
                let _farewell = farewell;
                Worker::run(inbox, || Conns::new(BufPool::new(pool_cap / n), service, tasks))
            });
            let mailbox = all_tasks.mailboxes()[number].clone();
            threads.push((mailbox, thread.context("cannot start a thread")?));
        }
        Ok(Self { tasks: all_tasks, threads, next: 0 })
    }

    /// Replaces the service on all threads, even if their mailboxes are full.
    pub fn set_service(&self, service: &Arc<Service>) {
        self.threads.iter().for_each(|(mailbox, _)| mailbox.put_up(Arc::clone(service)));
    }

    /// Whether all mailboxes are full.
    pub fn are_full(&self) -> bool {
        self.threads.iter().all(|(mailbox, _)| mailbox.is_full())
    }

    /// Hands a client over to the next worker, or if its mailbox is full, to the one after it. If all
    /// are full, the client comes back.
    pub fn hand_over(&mut self, mut client: NewConn) -> Option<TcpStream> {
        for _ in 0..self.threads.len() {
            let number = self.next;
            self.next = (number + 1) % self.threads.len();
            debug!("{}: handing over to worker-{number}", client.peer);
            match self.threads[number].0.post(Task::NewConn(client)) {
                Err(NotPosted(Task::NewConn(back))) => client = back,
                _ => return None,
            }
        }
        Some(client.stream)
    }

    /// Tells all workers to stop.
    pub fn stop(&self) {
        self.threads.iter().for_each(|(mailbox, _)| mailbox.stop());
    }

    /// Waits for all workers to end. Returns the first error.
    pub fn join(&mut self) -> Result<()> {
        let mut result = Ok(());
        for (number, (_, thread)) in self.threads.drain(..).enumerate() {
            let ended = thread.join().unwrap_or_else(|_| Err(anyhow!("panicked")));
            result = result.and(ended.with_context(|| format!("worker-{number}")));
        }
        if self.tasks.not_run() > 0 {
            info!("tasks not run: {}", self.tasks.not_run());
        }
        result
    }
}
