//! The threads that count. Replaces the loop of `plain::count` over texts.
//! Faster: the calling thread reads the next texts meanwhile. Gain: see NOTES.md (two threads beside one).

use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use super::count::{Counter, LocalCounter};
use crate::{Error, Text};

impl Counter {
    /// Starts the threads that count.
    pub fn start<'scope, T: Text + Send + 'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, threads: usize) -> Pool<'scope, T> {
        let (send, batches) = channel::<Vec<T>>();
        let (finish, finished) = channel();
        let batches = Arc::new(Mutex::new(batches));
        let threads = (0..threads).map_while(|_| {
            let (batches, finish) = (batches.clone(), finish.clone());
            let thread = std::thread::Builder::new().spawn_scoped(scope, move || {
                let mut local = LocalCounter::new(self);
                loop {
                    let batch = batches.lock().expect("no thread panics while it waits").recv();
                    let Ok(batch) = batch else { break };
                    let counted = batch.iter().try_for_each(|text| local.add(&text.utf8()?));
                    if finish.send((batch, counted)).is_err() {
                        break;
                    }
                }
                local.finish();
            });
            thread.ok() // the system may refuse more threads
        });
        let threads: Vec<_> = threads.collect();
        let own = threads.is_empty().then(|| (LocalCounter::new(self), finish));
        Pool { threads, own, send, finished, under_way: 0 }
    }
}

/// Threads that count batches while the next ones are read.
pub struct Pool<'scope, T> {
    threads: Vec<ScopedJoinHandle<'scope, ()>>,
    /// Counts here if no thread could be started.
    own: Option<(LocalCounter<'scope>, Sender<Counted<T>>)>,
    send: Sender<Vec<T>>,
    finished: Receiver<Counted<T>>,
    under_way: usize,
}

/// A batch and the result of counting it.
type Counted<T> = (Vec<T>, Result<(), Error>);

impl<T: Text> Pool<'_, T> {
    /// Submits texts for one thread to count together. If they are not UTF-8, `finished` returns an error.
    pub fn add(&mut self, batch: Vec<T>) {
        self.under_way += 1;
        let Some((own, finish)) = &mut self.own else { return self.send.send(batch).expect("the threads live as long as the pool") };
        let counted = batch.iter().try_for_each(|text| own.add(&text.utf8()?));
        own.finish();
        finish.send((batch, counted)).expect("the receiver is ours");
    }

    /// Whether every thread has work, and more is queued.
    pub fn is_full(&self) -> bool {
        self.under_way > 2 * self.threads.len()
    }

    pub fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    /// Waits at most `patience` for a finished batch, and returns it for its owner to drop.
    pub fn finished(&mut self, patience: Duration) -> Option<Counted<T>> {
        match self.finished.recv_timeout(patience) {
            Ok(finished) => {
                self.under_way -= 1;
                Some(finished)
            }
            Err(RecvTimeoutError::Timeout) if !self.threads.iter().any(|thread| thread.is_finished()) => None,
            Err(_) => panic!("a counting thread has panicked"),
        }
    }
}
