//! Counting the distinct pieces of a corpus, on several threads, in memory that grows with the distinct pieces alone.
//!
//! Performance notes. Half the time went into waiting for a slot: a thread's table is bigger than the 1 MB of cache that a core
//! has. CPU time of 286 MB of English on one busy core of a 2.5 GHz Xeon, medians of 5: slot after slot 113 MB/s; asking for 64
//! slots before the first is needed 139 MB/s. Pages of 2 MiB (madvise) gave nothing that could be told from noise.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{Scope, ScopedJoinHandle};
use std::time::Duration;

use crate::split::{Splitter, WINDOW};
use crate::train::Words;
use crate::{in_parallel, key_of, mix, prefetch, Error, KEY_BYTES};

/// Tables that all threads share are cut in this many parts by the first bits of the hash, each under a lock of its own.
const SHARD_BITS: u32 = 6;
/// A thread's own table: 3 MB, given to the shared ones when it is half full.
const LOCAL_BITS: u32 = 17;
/// So many pieces are worth a thread that sorts them.
const WORTH_A_THREAD: usize = 1 << 14;
/// So many pieces' slots are asked for before the first of them is looked at, and at most a window's more.
const WAITING: usize = 64;

/// A table of pieces and counts with open addressing. A slot follows from the hash's first bits, so that two tables
/// have their pieces in nearly the same order, and emptying one into another walks through both from begin to end.
struct Table {
    slots: Vec<Slot>,
    bits: u32,
    skip: u32, // leading bits of the hash that do not matter here: they chose the shard
    used: usize,
    long: Vec<u8>, // pieces that are no key, each after its length in 8 bytes
}

#[derive(Clone, Copy, Default)]
struct Slot {
    key: Key,
    count: u64, // 0: free
}

/// A piece of up to 15 bytes is its own key: the bytes, zeros, and the length in the last byte. Of a longer one it is the
/// hash, and behind LONG the place in `Table::long`.
type Key = [u64; 2];
const LONG: u64 = 0xff << 56;

/// A short piece whose slot is on its way from memory.
#[derive(Clone, Copy, Default)]
struct Waiting {
    hash: u64,
    key: Key,
}

#[inline]
fn word_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(*bytes[at..].first_chunk().expect("8 bytes"))
}

fn hash_long(piece: &[u8]) -> u64 {
    let last = piece.len() - 16;
    let chunks = (0..last).step_by(16).chain([last]);
    chunks.fold(piece.len() as u64, |hash, at| mix([hash ^ word_at(piece, at), word_at(piece, at + 8)]))
}

impl Table {
    fn new(bits: u32, skip: u32) -> Self {
        Table { slots: vec![Slot::default(); 1 << bits], bits, skip, used: 0, long: Vec::new() }
    }

    /// Where a key of this hash is looked for first.
    #[inline]
    fn place(&self, hash: u64) -> usize {
        (hash << self.skip >> (64 - self.bits)) as usize
    }

    /// The slot of a key that `same` recognises, else the free one where it belongs.
    #[inline]
    fn find(&self, hash: u64, same: impl Fn(Key) -> bool) -> usize {
        let mut at = self.place(hash);
        loop {
            let slot = &self.slots[at];
            if slot.count == 0 || same(slot.key) {
                return at;
            }
            at = (at + 1) & (self.slots.len() - 1);
        }
    }

    #[inline]
    fn add_short(&mut self, hash: u64, key: Key, count: u64) {
        let at = self.find(hash, |found| found == key);
        let slot = &mut self.slots[at];
        self.used += (slot.count == 0) as usize;
        slot.key = key;
        slot.count += count;
    }

    fn add_long(&mut self, hash: u64, piece: &[u8], count: u64) {
        let at = self.find(hash, |key| key[0] == hash && key[1] >= LONG && long_piece(&self.long, key[1]) == piece);
        let slot = &mut self.slots[at];
        if slot.count == 0 {
            slot.key = [hash, LONG | self.long.len() as u64];
            self.used += 1;
            self.long.extend((piece.len() as u64).to_le_bytes());
            self.long.extend(piece);
        }
        slot.count += count;
    }

    fn grow(&mut self) {
        let old = std::mem::take(&mut self.slots);
        self.bits += 1;
        self.slots = vec![Slot::default(); 1 << self.bits];
        for slot in old.into_iter().filter(|slot| slot.count > 0) {
            let at = self.find(hash_of(slot.key), |_| false);
            self.slots[at] = slot;
        }
    }
}

fn long_piece(long: &[u8], place: u64) -> &[u8] {
    let at = (place & !LONG) as usize;
    &long[at + 8..][..word_at(long, at) as usize]
}

/// The piece of a key; a short one is put into `buffer`.
fn piece_of<'a>(key: Key, long: &'a [u8], buffer: &'a mut [u8; 16]) -> &'a [u8] {
    if key[1] >= LONG {
        return long_piece(long, key[1]);
    }
    *buffer = ((key[1] as u128) << 64 | key[0] as u128).to_le_bytes();
    &buffer[..buffer[15] as usize]
}

#[inline]
fn hash_of(key: Key) -> u64 {
    if key[1] >= LONG {
        key[0]
    } else {
        mix(key)
    }
}

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

    /// Makes the threads end what they do with `Error::Interrupted`, as soon as they can.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// The counts, for training: a part for each thread, in the order of the pieces' bytes as far as their first 8 tell.
    pub fn into_words(self, threads: usize) -> Result<Vec<Words>, Error> {
        let tables = self.shards.into_iter().map(|shard| shard.into_inner().expect("no thread panics while it holds a shard"));
        let tables: Vec<Table> = tables.collect();
        let mut long = Vec::new();
        let long_at = tables.iter().map(|table| {
            long.extend_from_slice(&table.long);
            (long.len() - table.long.len()) as u64
        });
        let long_at: Vec<u64> = long_at.collect();
        // What is sorted is all that is known of a piece, so that the tables are not asked again.
        let pieces_of = |number: usize| {
            let (table, long_at) = (&tables[number], long_at[number]);
            table.slots.iter().filter(|slot| slot.count > 0).map(move |slot| {
                let (beginning, rest) = match slot.key {
                    [_, place] if place >= LONG => (word_at(long_piece(&table.long, place), 0), place + long_at),
                    [low, high] => (low, high),
                };
                (beginning.swap_bytes(), rest, slot.count)
            })
        };
        let threads = threads.min(1 + tables.iter().map(|table| table.used).sum::<usize>() / WORTH_A_THREAD);
        // One table has pieces of all kinds, and tells how to share them.
        let mut sample: Vec<u64> = pieces_of(0).map(|(beginning, ..)| beginning).collect();
        sample.sort_unstable();
        let cuts: Vec<u64> = (1..threads).filter_map(|number| sample.get(sample.len() * number / threads).copied()).collect();
        in_parallel(0..threads, |number| {
            let all = (0..tables.len()).flat_map(pieces_of);
            let mut pieces: Vec<_> = all.filter(|piece| cuts.partition_point(|&cut| cut <= piece.0) == number).collect();
            pieces.sort_unstable();
            let mut words = Words::default();
            for (beginning, rest, count) in pieces {
                words.push(piece_of([beginning.swap_bytes(), rest], &long, &mut [0; 16]), count);
            }
            Ok(words)
        })
    }

    /// Starts the threads that count.
    pub fn start<'scope, T: AsRef<[u8]> + Send + 'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        threads: usize,
    ) -> Pool<'scope, T> {
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
                    let counted = batch.iter().try_for_each(|text| local.add(text.as_ref()));
                    if finish.send((batch, counted)).is_err() {
                        break;
                    }
                }
                self.take(&mut local.table);
            });
            thread.ok() // a system that gives no more threads is left in peace
        });
        let threads: Vec<_> = threads.collect();
        let own = threads.is_empty().then(|| (LocalCounter::new(self), finish));
        Pool { threads, own, send, finished, under_way: 0 }
    }
}

/// Threads that count batches while others are read.
pub struct Pool<'scope, T> {
    threads: Vec<ScopedJoinHandle<'scope, ()>>,
    /// Counts here if no thread could be started.
    own: Option<(LocalCounter<'scope>, Sender<Counted<T>>)>,
    send: Sender<Vec<T>>,
    finished: Receiver<Counted<T>>,
    under_way: usize,
}

/// A batch, and how counting it ended.
type Counted<T> = (Vec<T>, Result<(), Error>);

impl<T: AsRef<[u8]>> Pool<'_, T> {
    /// Texts that one thread counts, in one go. They are UTF-8; where they are not, `finished` returns an error.
    pub fn add(&mut self, batch: Vec<T>) {
        self.under_way += 1;
        let Some((own, finish)) = &mut self.own else { return self.send.send(batch).expect("the threads live as long as the pool") };
        let counted = batch.iter().try_for_each(|text| own.add(text.as_ref()));
        own.counter.take(&mut own.table);
        finish.send((batch, counted)).expect("the receiver is ours");
    }

    /// Whether every thread has work, and the next.
    pub fn is_full(&self) -> bool {
        self.under_way > 2 * self.threads.len()
    }

    pub fn is_idle(&self) -> bool {
        self.under_way == 0
    }

    /// Waits for a batch to be finished, but no longer than `patience`. It is returned, for its owner to drop.
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

/// One thread's counts.
struct LocalCounter<'c> {
    counter: &'c Counter,
    splitter: Splitter,
    table: Table,
}

impl<'c> LocalCounter<'c> {
    fn new(counter: &'c Counter) -> Self {
        LocalCounter { counter, splitter: counter.splitter.clone(), table: Table::new(LOCAL_BITS, 0) }
    }

    fn add(&mut self, text: &[u8]) -> Result<(), Error> {
        let LocalCounter { counter, splitter, table } = self;
        let text = std::str::from_utf8(text).map_err(|e| Error::Text(e.to_string()))?;
        let bytes = text.as_bytes();
        let mut waiting = [Waiting::default(); WAITING + WINDOW];
        let mut number = 0;
        splitter.for_each_batch(text, |borders| {
            let mut start = borders[0];
            for &end in &borders[1..] {
                let (from, len) = (&bytes[start..], end - start);
                start = end;
                if len > KEY_BYTES {
                    table.add_long(hash_long(&from[..len]), &from[..len], 1);
                    continue;
                }
                let mut padded = [0; 16];
                let around = from.first_chunk().unwrap_or_else(|| {
                    padded[..len].copy_from_slice(&from[..len]);
                    &padded
                });
                let key = key_of(around, len);
                let hash = mix(key);
                prefetch(&table.slots[table.place(hash)]);
                waiting[number] = Waiting { hash, key };
                number += 1;
            }
            if number < WAITING {
                return counter.make_room(table);
            }
            waiting[..number].iter().for_each(|piece| table.add_short(piece.hash, piece.key, 1));
            number = 0;
            counter.make_room(table)
        })?;
        waiting[..number].iter().for_each(|piece| table.add_short(piece.hash, piece.key, 1));
        counter.make_room(table)
    }
}

impl Counter {
    fn make_room(&self, local: &mut Table) -> Result<(), Error> {
        if local.used > local.slots.len() / 2 {
            self.take(local);
        }
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }

    /// Empties a thread's table into the shared ones.
    fn take(&self, local: &mut Table) {
        let mut open: Option<(usize, MutexGuard<Table>)> = None;
        for slot in local.slots.iter().filter(|slot| slot.count > 0) {
            let hash = hash_of(slot.key);
            let shard = (hash >> (64 - SHARD_BITS)) as usize;
            if open.as_ref().is_none_or(|(number, _)| *number != shard) {
                drop(open.take()); // the lock is given back before the next is taken
                open = Some((shard, self.shards[shard].lock().expect("no thread panics while it holds a shard")));
            }
            let (_, table) = open.as_mut().expect("just locked");
            if slot.key[1] >= LONG {
                table.add_long(hash, long_piece(&local.long, slot.key[1]), slot.count);
            } else {
                table.add_short(hash, slot.key, slot.count);
            }
            if table.used > table.slots.len() / 4 * 3 {
                table.grow();
            }
        }
        drop(open);
        local.slots.fill(Slot::default());
        local.long.clear();
        local.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;
    use crate::train::train;
    use std::collections::BTreeMap;

    fn count<T: AsRef<[u8]> + Send + Clone>(texts: &[T], threads: usize, batch: usize) -> Result<Counter, Error> {
        let counter = Counter::new(Splitter::new(DEFAULT_PATTERN)?);
        std::thread::scope(|scope| {
            let mut pool = counter.start(scope, threads);
            texts.chunks(batch).for_each(|batch| pool.add(batch.to_vec()));
            let mut result = Ok(());
            while !pool.is_idle() {
                if let Some((_, counted)) = pool.finished(Duration::from_secs(1)) {
                    result = result.and(counted);
                }
            }
            result
        })?;
        Ok(counter)
    }

    fn counts_of(counter: &Counter) -> BTreeMap<Vec<u8>, u64> {
        let mut counts = BTreeMap::new();
        for shard in &counter.shards {
            let table = shard.lock().unwrap();
            for slot in table.slots.iter().filter(|slot| slot.count > 0) {
                let piece = piece_of(slot.key, &table.long, &mut [0; 16]).to_vec();
                assert_eq!(counts.insert(piece.clone(), slot.count), None, "{piece:?} is there twice");
            }
        }
        counts
    }

    #[test]
    fn counting_does_not_depend_on_threads_or_batches() {
        // Words of every length around the borders of the keys, often and rarely, more than a thread's table holds
        let mut draw = crate::draws(5);
        let letters = |n: usize| n.to_string().bytes().map(|digit| (digit - b'0' + b'q') as char).collect::<String>();
        let word = |n: usize| "abcdefghijklmnop".repeat(4)[..1 + n % 61].to_owned() + &letters(n);
        let texts: Vec<String> =
            (0..3_000).map(|i| (0..100).map(|_| format!(" {}", word(draw([50, 1_000, 200_000][i % 3])))).collect()).collect();
        let mut expected = BTreeMap::new();
        for text in &texts {
            let pieces = Splitter::with_regex(DEFAULT_PATTERN).unwrap();
            pieces.for_each(text, |piece| *expected.entry(piece.as_bytes().to_vec()).or_insert(0) += 1).unwrap();
        }
        assert!(expected.len() > 1 << (LOCAL_BITS - 1));
        let mut trained = None;
        for (threads, batch) in [(1, texts.len()), (2, 100), (5, 3)] {
            let counter = count(&texts, threads, batch).unwrap();
            assert!(counts_of(&counter) == expected, "{threads} threads, batches of {batch}");
            let words = counter.into_words(threads).unwrap();
            assert_eq!(words.len(), threads);
            let tokens = train(words, 400, |_| true).unwrap();
            assert!(tokens == *trained.get_or_insert(tokens.clone()), "{threads} threads, batches of {batch}");
        }
    }

    #[test]
    fn pieces_of_all_lengths_are_told_apart() {
        let texts: Vec<String> = (1..200).flat_map(|n| ["a".repeat(n), "a".repeat(n) + "\0", "!".repeat(n), "\0".repeat(n)]).collect();
        let counts = counts_of(&count(&texts, 1, 7).unwrap());
        for n in 1..200 {
            assert_eq!(counts[&b"a".repeat(n)], 2, "{n}");
            assert_eq!(counts[&b"!".repeat(n)], 1, "{n}");
            assert_eq!(counts[&b"\0".repeat(n)], if n == 1 { 200 } else { 1 }, "{n}");
        }
    }

    #[test]
    fn no_utf8_is_an_error() {
        assert!(matches!(count(&[&b"a\xff"[..]], 2, 1), Err(Error::Text(_))));
    }
}
