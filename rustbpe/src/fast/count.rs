//! Texts to counts. Replaces `plain::count`.
//! Faster: each thread counts into a table of its own, small enough to stay near its core, and moves it into shared tables when it is half
//! full; 64 slots are prefetched before the first of them is used. Gain: see table.rs. Memory grows only with the distinct pieces.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use rustc_hash::FxHashMap;

use super::key::Key;
use super::split::{Splitter, WINDOW};
use super::table::Table;
use super::words::Words;
use super::{without, Idea};
use crate::{plain::Token, Error};

/// The first SHARD_BITS bits of the hash choose the shared table. Each has its own lock.
const SHARD_BITS: u32 = 6;
/// A thread's own table has 2^LOCAL_BITS slots (3 MB).
pub const LOCAL_BITS: u32 = 17;
/// Slots that are prefetched before the first of them is read; at most a window's worth more.
const WAITING: usize = 64;

/// The distinct pieces of a corpus and how often each occurred.
pub struct Counter {
    splitter: Splitter,
    shards: Vec<Mutex<Table>>,
    stop: AtomicBool,
}

impl Counter {
    pub fn new(splitter: Splitter) -> Self {
        let shards = (0..1 << SHARD_BITS).map(|_| Mutex::new(Table::new(6, SHARD_BITS))).collect();
        Counter { splitter, shards, stop: AtomicBool::new(false) }
    }

    pub fn splitter(&self) -> &Splitter {
        &self.splitter
    }

    /// Makes the threads stop with `Error::Interrupted` as soon as they can.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn into_tables(self) -> Vec<Table> {
        let tables = self.shards.into_iter().map(|shard| shard.into_inner().expect("no thread panics while it holds a shard"));
        tables.collect()
    }

    /// The counts for training.
    pub fn into_words(self) -> Words {
        Words::of(&self.into_tables())
    }

    /// Moves a thread's table into the shared tables.
    fn take(&self, local: &mut Table) {
        let mut open: Option<(usize, MutexGuard<Table>)> = None;
        for (key, count) in local.pieces() {
            let shard = (key.hash() >> (64 - SHARD_BITS)) as usize;
            if open.as_ref().is_none_or(|(number, _)| *number != shard) {
                drop(open.take()); // release the lock before taking the next one
                open = Some((shard, self.shards[shard].lock().expect("no thread panics while it holds a shard")));
            }
            let (_, table) = open.as_mut().expect("just locked");
            table.take(local, key, count);
        }
        drop(open);
        local.clear();
    }
}

/// One thread's counts. `finish` moves them into the counter.
pub struct LocalCounter<'c> {
    counter: &'c Counter,
    splitter: Splitter,
    table: Table,
    plain: FxHashMap<Token, u64>,
}

impl<'c> LocalCounter<'c> {
    pub fn new(counter: &'c Counter) -> Self {
        let (splitter, table) = (counter.splitter.clone(), Table::new(LOCAL_BITS, 0));
        LocalCounter { counter, splitter, table, plain: FxHashMap::default() }
    }

    pub fn add(&mut self, text: &[u8]) -> Result<(), Error> {
        let text = std::str::from_utf8(text).map_err(|e| Error::Text(e.to_string()))?;
        if without(Idea::Table) {
            return self.add_plain(text);
        }
        let LocalCounter { counter, splitter, table, .. } = self;
        let bytes = text.as_bytes();
        let mut waiting = [(0, Key::default()); WAITING + WINDOW];
        let mut number = 0;
        splitter.for_each_batch(text, |borders| {
            let mut start = borders[0];
            for &end in &borders[1..] {
                let (from, len) = (&bytes[start..], end - start);
                start = end;
                if len > Key::SHORT {
                    table.add_long(&from[..len], 1);
                    continue;
                }
                let key = Key::short(from, len);
                let hash = key.hash();
                table.prefetch(hash);
                waiting[number] = (hash, key);
                number += 1;
            }
            if number >= WAITING || without(Idea::Waiting) {
                waiting[..number].iter().for_each(|&(hash, key)| table.add_short(hash, key, 1));
                number = 0;
            }
            counter.make_room(table)
        })?;
        waiting[..number].iter().for_each(|&(hash, key)| table.add_short(hash, key, 1));
        counter.make_room(table)
    }

    /// As `plain::count` does, for the ablation bench.
    #[cold]
    fn add_plain(&mut self, text: &str) -> Result<(), Error> {
        let LocalCounter { counter, splitter, table, plain } = self;
        splitter.for_each(text, |piece| *plain.entry(piece.as_bytes().into()).or_default() += 1)?;
        counter.make_room(table)
    }

    pub fn finish(&mut self) {
        for (piece, count) in self.plain.drain() {
            let key = Key::short(&piece, piece.len().min(Key::SHORT));
            match piece.len() {
                ..=Key::SHORT => self.table.add_short(key.hash(), key, count),
                _ => self.table.add_long(&piece, count),
            }
            if self.table.is_half_full() {
                self.counter.take(&mut self.table);
            }
        }
        self.counter.take(&mut self.table);
    }
}

impl Counter {
    fn make_room(&self, local: &mut Table) -> Result<(), Error> {
        if local.is_half_full() {
            self.take(local);
        }
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }
}
