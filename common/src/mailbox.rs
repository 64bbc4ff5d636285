//! A mailbox: how other threads reach an event loop (since v08).
//!
//! It is a queue, and a bell that rings when something was put into the queue. So the loop waits for
//! letters where it waits for everything else, and sleeps while there are none.

use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bell::Bell;
use crate::event_loop::{Callbacks, EventLoop, Interest, IoCallback, Token};

/// How many letters fit a mailbox (since v08). More of them would only wait longer.
pub const CAPACITY: usize = 1024;

/// How many letters the loop takes per event, or fewer, so that its fds get their turn.
const LETTERS_PER_EVENT: usize = 64;

/// The sending end (since v08), for letters `M` and, since v09, notices `N`. Clones lead to the same
/// inbox.
pub struct Mailbox<M, N = ()> {
    letters: SyncSender<M>,
    shared: Arc<Shared<N>>,
}

/// The receiving end, in the thread of the loop (since v08).
pub struct Inbox<M, N = ()> {
    letters: Receiver<M>,
    shared: Arc<Shared<N>>,
    token: Token,
    /// How many letters are taken per event.
    limit: usize,
}

struct Shared<N> {
    bell: Bell,
    /// Not a letter, because a stop has to get past a full queue.
    stopped: AtomicBool,
    /// Beside the queue too, and only the latest.
    notice: Mutex<Option<N>>,
    /// How many letters are in the queue, because std's channel does not tell.
    queued: AtomicUsize,
}

/// A letter that the mailbox has not taken: it is full, or the loop has ended (since v08).
pub struct NotPosted<M>(pub M);

/// A reserved place for one letter (since v11). Dropping it gives it back.
pub struct Place<'a, M, N>(&'a Mailbox<M, N>);

/// Creates both ends of a mailbox (since v08).
///
/// # Errors
/// Any eventfd(2) error, typically EMFILE.
pub fn mailbox<M, N>() -> io::Result<(Mailbox<M, N>, Inbox<M, N>)> {
    let (notice, stopped, queued) = Default::default();
    let shared = Arc::new(Shared { bell: Bell::new()?, notice, stopped, queued });
    let (sender, receiver) = sync_channel(CAPACITY);
    let (token, limit) = (Token::default(), LETTERS_PER_EVENT);
    let inbox = Inbox { letters: receiver, shared: Arc::clone(&shared), token, limit };
    Ok((Mailbox { letters: sender, shared }, inbox))
}

impl<N> Shared<N> {
    /// The notice is replaced as a whole, so a thread that panicked has not left half of one.
    fn notice(&self) -> MutexGuard<'_, Option<N>> {
        self.notice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M, N> Mailbox<M, N> {
    /// Posts a letter. Never waits: two loops that waited for each other would do so forever.
    ///
    /// # Errors
    /// The mailbox is full, or the loop has ended. The letter comes back in the error.
    pub fn post(&self, letter: M) -> Result<(), NotPosted<M>> {
        match self.reserve(CAPACITY) {
            Some(place) => place.post(letter),
            None => Err(NotPosted(letter)),
        }
    }

    /// Reserves a place for one letter, if fewer than `limit` places are taken (since v11). It is at
    /// most [`CAPACITY`].
    pub fn reserve(&self, limit: usize) -> Option<Place<'_, M, N>> {
        // Before the letter is posted, because the loop may take it at once.
        let free = |n: usize| (n < limit.min(CAPACITY)).then_some(n + 1);
        self.shared.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok()?;
        Some(Place(self))
    }

    /// How many letters are in the queue, and how many places are reserved, as far as this thread
    /// can know.
    pub fn queued(&self) -> usize {
        self.shared.queued.load(Ordering::Relaxed)
    }

    /// Whether the next letter would not be taken, as far as this thread can know.
    pub fn is_full(&self) -> bool {
        self.queued() >= CAPACITY
    }

    /// Puts up a notice (since v09). It gets past a full mailbox: it is not put into the queue, but in
    /// place of an earlier notice that the loop has not taken.
    pub fn put_up(&self, notice: N) {
        // An earlier one is dropped at the end, when the lock is free.
        let _old = self.shared.notice().replace(notice);
        self.shared.bell.ring();
    }

    /// Tells the loop to stop once it has taken all letters. Gets past a full mailbox.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.bell.ring();
    }
}

impl<M, N> Place<'_, M, N> {
    /// Posts a letter to this place. Never waits.
    ///
    /// # Errors
    /// The loop has ended. The letter comes back in the error.
    pub fn post(self, letter: M) -> Result<(), NotPosted<M>> {
        // On an error the place is given back, when it is dropped.
        self.0.letters.try_send(letter).map_err(|err| {
            let (TrySendError::Full(letter) | TrySendError::Disconnected(letter)) = err;
            NotPosted(letter)
        })?;
        // After the letter: a loop that woke up before would find nothing, and sleep on.
        self.0.shared.bell.ring();
        // The letter has the place now.
        mem::forget(self);
        Ok(())
    }
}

impl<M, N> Drop for Place<'_, M, N> {
    fn drop(&mut self) {
        self.0.shared.queued.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<M, N> Clone for Mailbox<M, N> {
    fn clone(&self) -> Self {
        Self { letters: self.letters.clone(), shared: Arc::clone(&self.shared) }
    }
}

/// Stops the loop of its mailbox when it is dropped, even by a panic (since v08).
pub struct StopOnDrop<M>(pub Mailbox<M>);

impl<M> Drop for StopOnDrop<M> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

impl<M, N> Inbox<M, N> {
    /// From now on `callback` is called when letters may have arrived, or when the loop is to stop.
    ///
    /// # Errors
    /// Any epoll_ctl(2) error.
    pub fn register<S>(
        &mut self,
        event_loop: &mut EventLoop<S>,
        callback: IoCallback<S>,
    ) -> io::Result<()> {
        let callbacks = Callbacks { read: Some(callback), write: None };
        self.token = event_loop.add_io_event(&self.shared.bell, Interest::READ, callbacks)?;
        Ok(())
    }

    /// Stops calling the callback.
    ///
    /// # Errors
    /// NotFound if it is not registered; any epoll_ctl(2) error.
    pub fn deregister<S>(&self, event_loop: &mut EventLoop<S>) -> io::Result<()> {
        event_loop.del_io_event(&self.shared.bell, self.token)
    }

    /// Sets how many letters are taken per event, from 1 to 64: the more each costs, the fewer (since v11).
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit.clamp(1, LETTERS_PER_EVENT);
    }

    /// Silences the bell and takes the letters that have arrived, at most 64 of them; if there may be
    /// more, the bell rings again. Returns `None` if the loop is to stop and all letters are taken.
    ///
    /// # Errors
    /// Any read(2) error; none is known.
    pub fn take(&self) -> io::Result<Option<Vec<M>>> {
        // Before the queue is emptied: a letter posted in between then rings once too often. The
        // other way round its ring would be silenced, and the letter would lie there.
        self.shared.bell.silence()?;
        // Also before: what was posted before the stop is in the queue by now.
        let stopped = self.shared.stopped.load(Ordering::Acquire);
        let letters: Vec<M> = self.letters.try_iter().take(self.limit).collect();
        self.shared.queued.fetch_sub(letters.len(), Ordering::Relaxed);
        if stopped && letters.is_empty() {
            return Ok(None);
        }
        if stopped || letters.len() == self.limit {
            self.shared.bell.ring();
        }
        Ok(Some(letters))
    }

    /// Whether the loop is to stop, though there may be letters to take (since v11).
    pub fn is_stopped(&self) -> bool {
        self.shared.stopped.load(Ordering::Acquire)
    }

    /// Takes the notice, if there is a new one (since v09). Call it after [`take`](Self::take), which
    /// silences the bell.
    pub fn take_notice(&self) -> Option<N> {
        self.shared.notice().take()
    }
}
