//! Texts to counts. Replaces `plain::count`.
//! Faster: each thread counts into a table of its own, small enough to stay near its core, and moves it into shared ones when it is half
//! full; 64 slots are prefetched before the first of them is used. Gain: see table.rs. Memory grows only with the distinct pieces.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use rustc_hash::FxHashMap;

use super::key::Key;
use super::slots::{Slot, Slots};
use super::split::{Splitter, WINDOW};
use super::table::Table;
use super::{without, Idea};
use crate::{plain::Token, Error};

/// A thread's own table has 2^LOCAL_BITS slots (6 MB; few under Miri, which is slow).
pub const LOCAL_BITS: u32 = if cfg!(miri) { 8 } else { 18 };
/// The first SHARD_BITS bits of the hash choose the shared table. Each has its own lock.
const SHARD_BITS: u32 = 6;
/// Slots that are prefetched before the first of them is read; at most a window's worth more.
const WAITING: usize = 64;

const HELD: &str = "no thread panics while it holds counts";

/// The distinct pieces of a corpus and how often each occurred.
pub struct Counter {
    splitter: Splitter,
    shards: Vec<Mutex<Table>>,
    long: Mutex<Long>,
    stop: AtomicBool,
}

impl Counter {
    pub fn new(splitter: Splitter) -> Self {
        let shards = (0..1 << SHARD_BITS).map(|_| Mutex::new(Table::new(LOCAL_BITS - SHARD_BITS, SHARD_BITS))).collect();
        Counter { splitter, shards, long: Mutex::default(), stop: AtomicBool::new(false) }
    }

    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// Makes the threads stop with `Error::Interrupted` as soon as they can.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Calls `f` with every piece and its count.
    pub fn for_each(self, mut f: impl FnMut(&[u8], u64)) {
        for shard in self.shards {
            for (key, count) in shard.into_inner().expect(HELD).pieces() {
                let (bytes, length) = key.bytes();
                f(&bytes[..length], count);
            }
        }
        let long = self.long.into_inner().expect(HELD);
        long.iter().for_each(|(piece, &count)| f(piece, count));
    }

    /// The counts for training.
    pub fn into_slots<S: Slot>(self) -> Slots<S> {
        let mut slots = Slots::default();
        self.for_each(|piece, count| slots.push(piece, count));
        slots
    }

    /// Moves a thread's counts into the shared ones.
    fn take(&self, table: &mut Table, long: &mut Long) {
        let mut open: Option<(usize, MutexGuard<Table>)> = None;
        for (key, count) in table.pieces() {
            let (hash, shard) = (key.hash(), (key.hash() >> (64 - SHARD_BITS)) as usize);
            if open.as_ref().is_none_or(|(number, _)| *number != shard) {
                drop(open.take()); // release the lock before taking the next one
                open = Some((shard, self.shards[shard].lock().expect(HELD)));
            }
            let (_, shared) = open.as_mut().expect("just locked");
            shared.add(hash, key, count);
            shared.grow();
        }
        drop(open);
        table.clear();
        let mut shared = self.long.lock().expect(HELD);
        long.drain().for_each(|(piece, count)| *shared.entry(piece).or_default() += count);
    }
}

/// The pieces without a key.
type Long = FxHashMap<Token, u64>;

/// One thread's counts. `finish` moves them into the counter.
pub struct LocalCounter<'c> {
    counter: &'c Counter,
    splitter: Splitter,
    table: Table,
    long: Long,
}

impl<'c> LocalCounter<'c> {
    pub fn new(counter: &'c Counter) -> Self {
        LocalCounter { counter, splitter: counter.splitter.clone(), table: Table::new(LOCAL_BITS, 0), long: Long::default() }
    }

    pub fn add(&mut self, text: &str) -> Result<(), Error> {
        let LocalCounter { counter, splitter, table, long } = self;
        let bytes = text.as_bytes();
        let mut waiting = [(0, Key::default()); WAITING + WINDOW];
        let mut number = 0;
        splitter.for_each_batch(text, |borders| {
            let mut start = borders[0];
            for &end in &borders[1..] {
                let (from, len) = (&bytes[start..], end - start);
                start = end;
                if len > Key::LONGEST || without(Idea::Table) {
                    match long.get_mut(&from[..len]) {
                        Some(count) => *count += 1,
                        None => drop(long.insert(from[..len].into(), 1)),
                    }
                    continue;
                }
                let key = Key::of(from, len);
                let hash = key.hash();
                table.prefetch(hash);
                waiting[number] = (hash, key);
                number += 1;
            }
            if number >= WAITING || without(Idea::Waiting) {
                waiting[..number].iter().for_each(|&(hash, key)| table.add(hash, key, 1));
                number = 0;
            }
            if table.is_half_full() {
                counter.take(table, long);
            }
            match counter.stop.load(Ordering::Relaxed) {
                true => Err(Error::Interrupted),
                false => Ok(()),
            }
        })?;
        waiting[..number].iter().for_each(|&(hash, key)| table.add(hash, key, 1));
        Ok(())
    }

    pub fn finish(&mut self) {
        self.counter.take(&mut self.table, &mut self.long);
    }
}
