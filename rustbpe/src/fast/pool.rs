//! The threads that count. Replaces the loop of `plain::count` over texts.
//! Faster: the calling thread reads texts while others count, and counts, too, when there are enough. Gain: see NOTES.md (two threads
//! beside one).

use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use super::count::{Counter, LocalCounter};
use crate::{Error, Text};

impl Counter {
    /// Starts the threads that count, besides the calling one.
    pub fn start<'scope, T: Text + Send + 'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, threads: usize) -> Pool<'scope, T> {
        let (send, batches) = channel();
        let (finish, finished) = channel();
        let batches = Arc::new(Mutex::new(batches));
        let threads = (1..threads).map_while(|_| {
            let (batches, finish) = (batches.clone(), finish.clone());
            let thread = std::thread::Builder::new().spawn_scoped(scope, move || {
                let mut local = LocalCounter::new(self);
                loop {
                    let batch = batches.lock().expect("no thread panics while it waits").recv();
                    let Ok(batch) = batch else { break };
                    if finish.send(counted(batch, &mut local)).is_err() {
                        break;
                    }
                }
            });
            thread.ok() // the system may refuse more threads
        });
        Pool { threads: threads.collect(), own: LocalCounter::new(self), send, batches, finished, under_way: 0 }
    }
}

/// A batch and the result of counting it.
type Counted<T> = (Vec<T>, Result<(), Error>);

fn counted<T: Text>(batch: Vec<T>, local: &mut LocalCounter) -> Counted<T> {
    let result = batch.iter().try_for_each(|text| local.add(&text.utf8()?));
    (batch, result)
}

/// Threads that count batches while the next ones are read. When it is dropped, all that was counted is in the counter.
pub struct Pool<'scope, T> {
    threads: Vec<ScopedJoinHandle<'scope, ()>>,
    own: LocalCounter<'scope>,
    send: Sender<Vec<T>>,
    batches: Arc<Mutex<Receiver<Vec<T>>>>,
    finished: Receiver<Counted<T>>,
    under_way: usize,
}

impl<T: Text> Pool<'_, T> {
    /// Submits texts for one thread to count together. If they are not UTF-8, `finished` returns an error.
    pub fn add(&mut self, batch: Vec<T>) {
        self.under_way += 1;
        self.send.send(batch).expect("the receiver is ours");
    }

    /// Whether every other thread has work, and more is queued.
    pub fn is_full(&self) -> bool {
        self.under_way > 2 * self.threads.len()
    }

    pub fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    /// A finished batch, for its owner to drop. Counts one here if none is finished; waits at most `patience` if none is queued, either.
    pub fn finished(&mut self, patience: Duration) -> Option<Counted<T>> {
        // While the lock is held, another thread waits for a batch.
        let queued = || self.batches.try_lock().ok()?.try_recv().ok();
        let finished = match self.finished.try_recv().ok().or_else(|| Some(counted(queued()?, &mut self.own))) {
            Some(finished) => Ok(finished),
            None => self.finished.recv_timeout(patience),
        };
        match finished {
            Ok(finished) => {
                self.under_way -= 1;
                Some(finished)
            }
            Err(RecvTimeoutError::Timeout) if !self.threads.iter().any(|thread| thread.is_finished()) => None,
            Err(_) => panic!("a counting thread has panicked"),
        }
    }
}
