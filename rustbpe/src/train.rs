//! Training: count the pieces of a corpus, then give the most frequent pair of neighbours a new id, again and again.
//!
//! Of equally frequent pairs the smallest (left id, right id) goes first, so the result depends on the multiset of
//! pieces alone, not on their order or on the number of threads.
//!
//! Performance notes. The distinct pieces lie end to end in one array, one slot per byte: the first and the last slot
//! of a token hold its id, so the neighbours of a position are found from token lengths, without links. A pair gains
//! occurrences only while its newer member is being created, i.e. in a single merge, in which positions are visited
//! in ascending order: each pair's positions are one plain vector, written once, and counts only fall afterwards. So
//! an entry of the heap can be too high but never too low, and is corrected when it reaches the top. Changes are added
//! up per neighbour in dense arrays, so the hash table is asked once per distinct pair, not once per occurrence.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasher, BuildHasherDefault};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use rustc_hash::{FxHashMap, FxHasher};

use crate::split::Splitter;
use crate::{in_parallel, runs_of, Error};

const SHARDS: usize = 64;
/// Around every word, so that no pair spans two.
const BORDER: u32 = u32::MAX;
/// Inside a merged token.
const INSIDE: u32 = u32::MAX - 1;
/// Merges between two calls of `keep_going`.
const MERGES_PER_CALL: usize = 64;

/// Counts the distinct pieces of a corpus, batch by batch. Holds each distinct piece once.
pub struct PieceCounter {
    splitter: Splitter,
    threads: usize,
    shards: Vec<Mutex<FxHashMap<Box<str>, u64>>>,
}

impl PieceCounter {
    pub fn new(splitter: Splitter, threads: usize) -> Self {
        PieceCounter { splitter, threads, shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Every thread counts runs of documents in a table of its own, then adds it to the shared shards.
    pub fn add<S: AsRef<str> + Sync>(&self, texts: &[S]) -> Result<(), Error> {
        let runs = runs_of(texts.iter().map(|text| text.as_ref().len()));
        let next = AtomicUsize::new(0);
        let hasher = BuildHasherDefault::<FxHasher>::default();
        in_parallel(self.threads.min(runs.len()), || -> Result<Vec<()>, Error> {
            let splitter = self.splitter.clone();
            let mut counts: FxHashMap<&str, u64> = FxHashMap::default();
            while let Some(&(start, end)) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                for text in &texts[start..end] {
                    splitter.for_each(text.as_ref(), |piece| *counts.entry(piece).or_default() += 1)?;
                }
            }
            let mut by_shard: Vec<Vec<(&str, u64)>> = vec![Vec::new(); SHARDS];
            for (piece, count) in counts {
                by_shard[(hasher.hash_one(piece) >> 32) as usize % SHARDS].push((piece, count));
            }
            for (shard, pieces) in self.shards.iter().zip(by_shard) {
                let mut shard = shard.lock().expect("no thread panics while it holds a shard");
                for (piece, count) in pieces {
                    match shard.get_mut(piece) {
                        Some(total) => *total += count,
                        None => drop(shard.insert(piece.into(), count)),
                    }
                }
            }
            Ok(Vec::new())
        })?;
        Ok(())
    }

    /// The distinct pieces and how often each occurred, in no particular order.
    pub fn into_counts(self) -> impl Iterator<Item = (Box<str>, u64)> {
        self.shards.into_iter().flat_map(|shard| shard.into_inner().expect("no thread panics while it holds a shard"))
    }
}

/// The tokens of a vocabulary of at most `vocab_size`, bytes first, then in the order of their merges: fewer where no
/// pair is left. `keep_going(merges done)` is asked now and then; false ends with `Error::Interrupted`.
pub fn train(
    counts: impl Iterator<Item = (Box<str>, u64)>,
    vocab_size: usize,
    mut keep_going: impl FnMut(usize) -> bool,
) -> Result<Vec<Box<[u8]>>, Error> {
    check_vocab_size(vocab_size)?;
    let mut merger = Merger::new(counts, vocab_size)?;
    let mut tokens: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
    while tokens.len() < vocab_size {
        if tokens.len() % MERGES_PER_CALL == 0 && !keep_going(tokens.len() - 256) {
            return Err(Error::Interrupted);
        }
        let Some((left, right)) = merger.merge_best() else { break };
        tokens.push([&*tokens[left as usize], &*tokens[right as usize]].concat().into());
    }
    Ok(tokens)
}

pub fn check_vocab_size(vocab_size: usize) -> Result<(), Error> {
    match vocab_size {
        0..=255 => Err(Error::Setting(format!("vocab_size must be at least 256 (one token per byte), not {vocab_size}"))),
        _ if vocab_size >= INSIDE as usize => Err(Error::Setting(format!("vocab_size {vocab_size} is too large"))),
        _ => Ok(()),
    }
}

struct Pair {
    left: u32,
    right: u32,
    count: u64,
    /// Where it occurs or once occurred (slot of its first byte), ascending.
    positions: Vec<u32>,
}

/// Entries of the heap: the most frequent first, then the smallest pair.
type Candidate = (u64, Reverse<(u32, u32)>, usize);

struct Merger {
    slots: Vec<u32>,   // token ids, BORDER or INSIDE
    weights: Vec<u32>, // per slot: how often its word occurs
    lengths: Vec<u32>, // of each token, in slots
    pairs: Vec<Pair>,
    index: FxHashMap<(u32, u32), usize>, // into pairs
    heap: BinaryHeap<Candidate>,
    left: Neighbours,
    right: Neighbours,
}

impl Merger {
    fn new(counts: impl Iterator<Item = (Box<str>, u64)>, vocab_size: usize) -> Result<Self, Error> {
        let (mut slots, mut weights) = (vec![BORDER], vec![0]);
        for (word, mut count) in counts {
            // A count beyond 32 bits becomes several copies of the word: the sums are the same.
            while word.len() > 1 && count > 0 {
                let weight = count.min(u32::MAX as u64);
                slots.extend(word.bytes().map(u32::from));
                slots.push(BORDER);
                weights.resize(slots.len(), weight as u32);
                count -= weight;
            }
            if slots.len() >= INSIDE as usize {
                return Err(Error::Setting("the distinct pieces exceed 4 GiB: train on less text".into()));
            }
        }
        let mut merger = Merger {
            slots,
            weights,
            lengths: vec![1; 256],
            pairs: Vec::new(),
            index: FxHashMap::default(),
            heap: BinaryHeap::new(),
            left: Neighbours::new(vocab_size),
            right: Neighbours::new(vocab_size),
        };
        for at in 1..merger.slots.len() {
            let (left, right) = (merger.slots[at - 1], merger.slots[at]);
            if left != BORDER && right != BORDER {
                let weight = merger.weights[at] as u64;
                let pair = match merger.index.get(&(left, right)) {
                    Some(&pair) => &mut merger.pairs[pair],
                    None => merger.add_pair(left, right, 0, Vec::new()),
                };
                pair.count += weight;
                pair.positions.push(at as u32 - 1);
            }
        }
        merger.heap = merger.pairs.iter().enumerate().map(|(i, p)| (p.count, Reverse((p.left, p.right)), i)).collect();
        Ok(merger)
    }

    fn add_pair(&mut self, left: u32, right: u32, count: u64, positions: Vec<u32>) -> &mut Pair {
        self.index.insert((left, right), self.pairs.len());
        self.pairs.push(Pair { left, right, count, positions });
        self.pairs.last_mut().expect("just pushed")
    }

    /// Merges the best pair into the next id and returns it; None when no pair is left.
    fn merge_best(&mut self) -> Option<(u32, u32)> {
        let best = loop {
            let (count, key, pair) = self.heap.pop()?;
            let now = self.pairs[pair].count;
            if now == count {
                break pair;
            }
            if now > 0 {
                self.heap.push((now, key, pair));
            }
        };
        let (left, right) = (self.pairs[best].left, self.pairs[best].right);
        let positions = std::mem::take(&mut self.pairs[best].positions);
        self.replace(left, right, &positions);
        self.book(left, right);
        self.pairs[best].count = 0;
        Some((left, right))
    }

    /// Puts the new token wherever `a b` stands, and notes in `self.left` and `self.right` what that changes.
    fn replace(&mut self, a: u32, b: u32, positions: &[u32]) {
        let new = self.lengths.len() as u32;
        let (len_a, len_b) = (self.lengths[a as usize] as usize, self.lengths[b as usize] as usize);
        self.lengths.push((len_a + len_b) as u32);
        for &position in positions {
            let at = position as usize;
            if self.slots[at] != a || self.slots[at + len_a] != b {
                continue; // one of the two has become part of another token
            }
            let end = at + len_a + len_b;
            self.slots[at + len_a - 1] = INSIDE;
            self.slots[at + len_a] = INSIDE;
            self.slots[at] = new;
            self.slots[end - 1] = new;
            let weight = self.weights[at] as u64;
            let before = self.slots[at - 1];
            if before == new {
                // `(a b) a b`: the pair (new, a) noted a moment ago is gone again.
                self.right.lose_gain(a, weight);
            }
            if before != BORDER {
                self.left.note(before, weight, at as u32 - self.lengths[before as usize]);
            }
            let after = self.slots[end];
            if after != BORDER {
                self.right.note(after, weight, position);
            }
        }
    }

    /// Enters what `replace` noted: (x, a) and (b, y) become rarer, (x, new) and (new, y) are new pairs.
    fn book(&mut self, a: u32, b: u32) {
        let new = self.lengths.len() as u32 - 1;
        for (side, notes) in [(0, self.left.take()), (1, self.right.take())] {
            for note in notes {
                let (old, fresh) = match side {
                    0 => ((note.token, a), (note.token, new)),
                    _ => ((b, note.token), (new, note.token)),
                };
                // (new, a) was never in the table; (a, b) itself is set to zero by the caller.
                if note.token != new && old != (a, b) {
                    self.pairs[self.index[&old]].count -= note.lost;
                }
                if note.gained > 0 {
                    self.heap.push((note.gained, Reverse(fresh), self.pairs.len()));
                    self.add_pair(fresh.0, fresh.1, note.gained, note.positions);
                }
            }
        }
    }
}

/// What one merge changes on one side of the merged pair, per neighbouring token.
struct Neighbours {
    note_of: Vec<u32>, // token -> index into notes, or NO_NOTE
    notes: Vec<Note>,
}

struct Note {
    token: u32,
    lost: u64,   // occurrences of its pair with the old token
    gained: u64, // occurrences of its pair with the new token
    positions: Vec<u32>,
}

const NO_NOTE: u32 = u32::MAX;

impl Neighbours {
    fn new(vocab_size: usize) -> Self {
        Neighbours { note_of: vec![NO_NOTE; vocab_size], notes: Vec::new() }
    }

    fn note(&mut self, token: u32, weight: u64, position: u32) {
        if self.note_of[token as usize] == NO_NOTE {
            self.note_of[token as usize] = self.notes.len() as u32;
            self.notes.push(Note { token, lost: 0, gained: 0, positions: Vec::new() });
        }
        let note = &mut self.notes[self.note_of[token as usize] as usize];
        note.lost += weight;
        note.gained += weight;
        note.positions.push(position);
    }

    fn lose_gain(&mut self, token: u32, weight: u64) {
        self.notes[self.note_of[token as usize] as usize].gained -= weight;
    }

    fn take(&mut self) -> Vec<Note> {
        for note in &self.notes {
            self.note_of[note.token as usize] = NO_NOTE;
        }
        std::mem::take(&mut self.notes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;

    fn tokens(words: &[(&str, u64)], vocab_size: usize) -> Vec<Box<[u8]>> {
        let counts = words.iter().map(|&(word, count)| (word.into(), count));
        train(counts, vocab_size, |_| true).unwrap()
    }

    /// Count all pairs afresh for every merge.
    fn by_recounting(words: &[(&str, u64)], vocab_size: usize) -> Vec<Box<[u8]>> {
        let mut words: Vec<(Vec<u32>, u64)> = words.iter().map(|&(w, n)| (w.bytes().map(u32::from).collect(), n)).collect();
        let mut tokens: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
        while tokens.len() < vocab_size {
            let mut counts: FxHashMap<(u32, u32), u64> = FxHashMap::default();
            for (ids, n) in &words {
                for pair in ids.windows(2) {
                    *counts.entry((pair[0], pair[1])).or_default() += n;
                }
            }
            let Some((&(a, b), _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
            let new = tokens.len() as u32;
            tokens.push([&*tokens[a as usize], &*tokens[b as usize]].concat().into());
            for (ids, _) in &mut words {
                let mut at = 0;
                while at + 1 < ids.len() {
                    if (ids[at], ids[at + 1]) == (a, b) {
                        ids[at] = new;
                        ids.remove(at + 1);
                    }
                    at += 1;
                }
            }
        }
        tokens
    }

    #[test]
    fn merges_as_recounting_does() {
        let mut state = 3u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for round in 0..400 {
            let letters = 1 + round % 4;
            let mut words: Vec<(String, u64)> = (0..1 + draw(12))
                .map(|_| ((0..1 + draw(24)).map(|_| (b'a' + draw(letters) as u8) as char).collect(), 1 + draw(3)))
                .collect();
            words.sort();
            words.dedup_by(|a, b| a.0 == b.0);
            let words: Vec<(&str, u64)> = words.iter().map(|(word, count)| (word.as_str(), *count)).collect();
            assert_eq!(tokens(&words, 300), by_recounting(&words, 300), "{words:?}");
        }
    }

    #[test]
    fn ties_go_to_the_smallest_pair_of_ids() {
        assert_eq!(*tokens(&[("zy", 1), ("ab", 1), ("ba", 1)], 257)[256], *b"ab");
    }

    #[test]
    fn counts_beyond_32_bits() {
        assert_eq!(*tokens(&[("ab", 1 << 33), ("cd", (1 << 33) + 1)], 257)[256], *b"cd");
    }

    #[test]
    fn nothing_to_merge_leaves_the_bytes() {
        assert_eq!(tokens(&[], 300).len(), 256);
        assert_eq!(tokens(&[("a", 5)], 300).len(), 256);
        assert_eq!(tokens(&[("ab", 5)], 300).len(), 257);
        assert!(matches!(train(std::iter::empty(), 255, |_| true), Err(Error::Setting(_))));
    }

    #[test]
    fn training_can_be_interrupted() {
        let words = [("abcdefgh".into(), 1u64)];
        assert_eq!(train(words.into_iter(), 300, |_| false), Err(Error::Interrupted));
    }

    #[test]
    fn counting_does_not_depend_on_threads_or_batches() {
        let texts: Vec<String> = (0..3_000).map(|i| format!("word{} and the number {} again\n", i % 50, i)).collect();
        let count = |threads: usize, batch: usize| {
            let counter = PieceCounter::new(Splitter::new(DEFAULT_PATTERN).unwrap(), threads);
            texts.chunks(batch).for_each(|batch| counter.add(batch).unwrap());
            let mut counts: Vec<_> = counter.into_counts().collect();
            counts.sort();
            counts
        };
        let expected = count(1, texts.len());
        assert!(expected.contains(&(" the".into(), 3_000)));
        assert_eq!(count(3, 17), expected);
    }
}
