//! Training: give the most frequent pair of neighbours a new id, again and again.
//!
//! Of equally frequent pairs the smallest (left id, right id) goes first, so the result depends on the multiset of
//! words alone, not on their order.
//!
//! Performance notes. The words lie end to end in one array, one slot per byte: the first and the last slot of a token
//! hold its id, so the neighbours of a position are found from token lengths, without links. A pair gains occurrences
//! only while its newer member is being created, i.e. in a single merge, in which positions are visited in ascending
//! order: each pair's positions are one plain vector, written once, and counts only fall afterwards. So an entry of the
//! heap can be too high but never too low, and is corrected when it reaches the top. Changes are added up per neighbour
//! in dense arrays, so the hash table is asked once per distinct pair, not once per occurrence.
//! What is left is waiting for slots here and there in memory, hence: id and weight side by side; the positions of a pair
//! are first looked at 256 at a time without a branch, so that many are on their way at once; words with the same
//! beginning lie together, since they share pairs. The last took 286 MB of English with 65,536 tokens from 2.8 to 2.3 s
//! (CPU time on a busy core of a 2.5 GHz Xeon, medians of 5), the sorting of 0.2 s included. Pairs too rare to be merged, most of
//! them, are not tracked at first. Pages of 2 MiB (madvise) gave nothing that could be told from noise.

use std::cmp::Reverse;
use std::collections::binary_heap::{BinaryHeap, PeekMut};

use rustc_hash::FxHashMap;

use crate::Error;

/// Around every word, so that no pair spans two.
const BORDER: u32 = u32::MAX;
/// Inside a merged token.
const INSIDE: u32 = u32::MAX - 1;
/// Words of no more slots than this have all their pairs tracked.
const SMALL: usize = 1 << 20;
/// How many slots are looked at between two calls of `keep_going`.
const SLOTS_PER_CALL: usize = 1 << 22;
/// What of the words' bytes, shared out among the tokens, is expected to be rarer than the last merge.
const FLOOR_DIVISOR: u64 = 64;
/// Positions whose memory is asked for at the same time.
const AT_ONCE: usize = 256;

/// Distinct words with their counts.
pub struct Words {
    slots: Vec<Slot>,
}

#[derive(Clone, Copy)]
struct Slot {
    token: u32,  // a token's id in its first and last slot, INSIDE between them; BORDER between words
    weight: u32, // how often the word occurs
}

impl Words {
    /// With room for words of so many bytes and as many borders.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut slots = Vec::with_capacity(bytes + 1);
        slots.push(Slot { token: BORDER, weight: 0 });
        Words { slots }
    }

    pub fn push(&mut self, word: &[u8], mut count: u64) -> Result<(), Error> {
        // A count beyond 32 bits becomes several copies of the word: the sums are the same.
        while word.len() > 1 && count > 0 {
            let weight = count.min(u32::MAX as u64) as u32;
            if self.slots.len() + word.len() >= INSIDE as usize {
                return Err(Error::Setting("the distinct pieces exceed 4 GiB: train on less text".into()));
            }
            self.slots.extend(word.iter().map(|&byte| Slot { token: byte as u32, weight }));
            self.slots.push(Slot { token: BORDER, weight: 0 });
            count -= weight as u64;
        }
        Ok(())
    }
}

/// The tokens of a vocabulary of at most `vocab_size`, bytes first, then in the order of their merges: fewer where no
/// pair is left. `keep_going(merges done)` is asked again and again; false ends with `Error::Interrupted`.
pub fn train(words: Words, vocab_size: usize, keep_going: impl FnMut(usize) -> bool) -> Result<Vec<Box<[u8]>>, Error> {
    check_vocab_size(vocab_size)?;
    let floor = match words.slots.len() {
        0..=SMALL => 1,
        _ => 1 + words.slots.iter().map(|slot| slot.weight as u64).sum::<u64>() / (FLOOR_DIVISOR * vocab_size as u64),
    };
    train_above(floor, words, vocab_size, keep_going)
}

/// `floor` decides what is tracked at first, and nothing else.
fn train_above(floor: u64, words: Words, vocab_size: usize, keep_going: impl FnMut(usize) -> bool) -> Result<Vec<Box<[u8]>>, Error> {
    let mut tokens: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
    let mut merger = Merger::new(words, floor, keep_going)?;
    while tokens.len() < vocab_size {
        let Some((left, right)) = merger.merge_best()? else { break };
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
type Candidate = (u64, Reverse<(u32, u32)>, u32);

struct Merger<F> {
    slots: Vec<Slot>,
    lengths: Vec<u32>, // of each token, in slots
    /// Pairs that were this frequent when they were last counted or created. What is rarer is not tracked.
    floor: u64,
    pairs: Vec<Pair>,
    index: FxHashMap<(u32, u32), u32>, // into pairs
    heap: BinaryHeap<Candidate>,
    left: Neighbours,
    right: Neighbours,
    keep_going: F,
}

impl<F: FnMut(usize) -> bool> Merger<F> {
    fn new(words: Words, floor: u64, keep_going: F) -> Result<Self, Error> {
        let mut merger = Merger {
            slots: words.slots,
            lengths: vec![1; 256],
            floor,
            pairs: Vec::new(),
            index: FxHashMap::default(),
            heap: BinaryHeap::new(),
            left: Neighbours::default(),
            right: Neighbours::default(),
            keep_going,
        };
        merger.track()?;
        Ok(merger)
    }

    fn check(&mut self) -> Result<(), Error> {
        match (self.keep_going)(self.lengths.len() - 256) {
            true => Ok(()),
            false => Err(Error::Interrupted),
        }
    }

    /// Calls `f` for all pairs of neighbours with their positions and weights.
    fn for_each_pair(&mut self, mut f: impl FnMut((u32, u32), usize, u64)) -> Result<(), Error> {
        let (mut at, mut next_call) = (1, 0);
        while at < self.slots.len() {
            if at > next_call {
                self.check()?;
                next_call = at + SLOTS_PER_CALL;
            }
            let Slot { token, weight } = self.slots[at];
            if token == BORDER {
                at += 1;
                continue;
            }
            let next = at + self.lengths[token as usize] as usize;
            if self.slots[next].token != BORDER {
                f((token, self.slots[next].token), at, weight as u64);
            }
            at = next;
        }
        Ok(())
    }

    /// Counts all pairs and notes the positions of those that reach the floor.
    fn track(&mut self) -> Result<(), Error> {
        let mut counts: FxHashMap<(u32, u32), (u64, usize)> = FxHashMap::default();
        self.for_each_pair(|pair, _, weight| {
            let (count, positions) = counts.entry(pair).or_default();
            *count += weight;
            *positions += 1;
        })?;
        (self.pairs, self.index) = (Vec::new(), FxHashMap::default());
        for ((left, right), (count, positions)) in counts {
            if count >= self.floor {
                self.index.insert((left, right), self.pairs.len() as u32);
                self.pairs.push(Pair { left, right, count, positions: Vec::with_capacity(positions) });
            }
        }
        let (index, mut pairs) = (std::mem::take(&mut self.index), std::mem::take(&mut self.pairs));
        self.for_each_pair(|pair, at, _| {
            if let Some(&pair) = index.get(&pair) {
                pairs[pair as usize].positions.push(at as u32);
            }
        })?;
        self.heap = pairs.iter().zip(0..).map(|(p, i)| (p.count, Reverse((p.left, p.right)), i)).collect();
        (self.index, self.pairs) = (index, pairs);
        Ok(())
    }

    /// Merges the best pair into the next id and returns it; None when no pair is left.
    fn merge_best(&mut self) -> Result<Option<(u32, u32)>, Error> {
        self.check()?;
        let best = loop {
            let floor = self.floor;
            let Some(mut top) = self.heap.peek_mut().filter(|top| top.0 >= floor) else {
                if floor == 1 {
                    return Ok(None);
                }
                // A pair that is not tracked may be more frequent than those that are left.
                self.floor = floor / 16 + 1;
                self.track()?;
                continue;
            };
            match self.pairs[top.2 as usize].count {
                now if now == top.0 => break PeekMut::pop(top).2 as usize,
                now if now >= floor => top.0 = now,
                _ => drop(PeekMut::pop(top)),
            }
        };
        let (left, right) = (self.pairs[best].left, self.pairs[best].right);
        let positions = std::mem::take(&mut self.pairs[best].positions);
        self.replace(left, right, &positions);
        self.book(left, right);
        self.pairs[best].count = 0;
        Ok(Some((left, right)))
    }

    /// Puts the new token wherever `a b` stands, and notes in `self.left` and `self.right` what that changes.
    fn replace(&mut self, a: u32, b: u32, positions: &[u32]) {
        let new = self.lengths.len() as u32;
        let (len_a, len_b) = (self.lengths[a as usize] as usize, self.lengths[b as usize] as usize);
        self.lengths.push((len_a + len_b) as u32);
        self.left.add_token();
        self.right.add_token();
        let Merger { slots, lengths, left, right, .. } = self;
        let mut live = [0; AT_ONCE];
        for positions in positions.chunks(AT_ONCE) {
            let mut count = 0;
            for &position in positions {
                let at = position as usize;
                live[count] = position;
                count += ((slots[at].token == a) & (slots[at + len_a].token == b)) as usize;
            }
            for &position in &live[..count] {
                let at = position as usize;
                if slots[at].token != a || slots[at + len_a].token != b {
                    continue; // `a a a`: the middle one has gone into the token before
                }
                let end = at + len_a + len_b;
                slots[at + len_a - 1].token = INSIDE;
                slots[at + len_a].token = INSIDE;
                slots[at].token = new;
                slots[end - 1].token = new;
                let weight = slots[at].weight as u64;
                let before = slots[at - 1].token;
                if before == new {
                    // `(a b) a b`: the pair (new, a) noted a moment ago is gone again.
                    right.lose_gain(a, weight);
                }
                if before != BORDER {
                    left.note(before, weight, position - lengths[before as usize]);
                }
                let after = slots[end].token;
                if after != BORDER {
                    right.note(after, weight, position);
                }
            }
        }
    }

    /// Enters what `replace` noted: (x, a) and (b, y) become rarer, (x, new) and (new, y) are new pairs.
    fn book(&mut self, a: u32, b: u32) {
        let new = self.lengths.len() as u32 - 1;
        let Merger { pairs, index, heap, left, right, floor, .. } = self;
        for (is_left, side) in [(true, left), (false, right)] {
            side.take(|note| {
                let (old, fresh) = if is_left { ((note.token, a), (note.token, new)) } else { ((b, note.token), (new, note.token)) };
                // (new, a) was never in the table; (a, b) itself is set to zero by the caller.
                if note.token != new && old != (a, b) {
                    if let Some(&pair) = index.get(&old) {
                        pairs[pair as usize].count -= note.lost;
                    }
                }
                if note.gained >= *floor {
                    let pair = pairs.len() as u32;
                    heap.push((note.gained, Reverse(fresh), pair));
                    index.insert(fresh, pair);
                    pairs.push(Pair { left: fresh.0, right: fresh.1, count: note.gained, positions: note.positions.as_slice().into() });
                }
            });
        }
    }
}

/// What one merge changes on one side of the merged pair, per neighbouring token.
struct Neighbours {
    note_of: Vec<u32>, // token -> index into notes, or NO_NOTE
    notes: Vec<Note>,  // `used` of them, then old ones for their memory
    used: usize,
}

#[derive(Default)]
struct Note {
    token: u32,
    lost: u64,   // occurrences of its pair with the old token
    gained: u64, // occurrences of its pair with the new token
    positions: Vec<u32>,
}

const NO_NOTE: u32 = u32::MAX;

impl Default for Neighbours {
    fn default() -> Self {
        Neighbours { note_of: vec![NO_NOTE; 256], notes: Vec::new(), used: 0 }
    }
}

impl Neighbours {
    fn add_token(&mut self) {
        self.note_of.push(NO_NOTE);
    }

    #[inline]
    fn note(&mut self, token: u32, weight: u64, position: u32) {
        let place = &mut self.note_of[token as usize];
        if *place == NO_NOTE {
            *place = self.used as u32;
            if self.used == self.notes.len() {
                self.notes.push(Note::default());
            }
            let note = &mut self.notes[self.used];
            (note.token, note.lost, note.gained) = (token, 0, 0);
            note.positions.clear();
            self.used += 1;
        }
        let note = &mut self.notes[*place as usize];
        note.lost += weight;
        note.gained += weight;
        note.positions.push(position);
    }

    fn lose_gain(&mut self, token: u32, weight: u64) {
        self.notes[self.note_of[token as usize] as usize].gained -= weight;
    }

    /// Calls `f` with every note and forgets them.
    fn take(&mut self, mut f: impl FnMut(&Note)) {
        for note in &self.notes[..self.used] {
            self.note_of[note.token as usize] = NO_NOTE;
            f(note);
        }
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words_of(words: &[(&str, u64)]) -> Words {
        let mut all = Words::with_capacity(0);
        words.iter().for_each(|(word, count)| all.push(word.as_bytes(), *count).unwrap());
        all
    }

    fn tokens(words: &[(&str, u64)], vocab_size: usize) -> Vec<Box<[u8]>> {
        train(words_of(words), vocab_size, |_| true).unwrap()
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
        let cases = std::env::var("FUZZ_CASES").map_or(4_000, |cases| cases.parse().unwrap());
        let mut draw = crate::draws(3);
        for case in 0..cases {
            let letters = 1 + case % 4;
            let mut words: Vec<(String, u64)> = (0..1 + draw(12))
                .map(|_| ((0..1 + draw(24)).map(|_| (b'a' + draw(letters) as u8) as char).collect(), 1 + draw(3) as u64))
                .collect();
            words.sort();
            words.dedup_by(|a, b| a.0 == b.0);
            let words: Vec<(&str, u64)> = words.iter().map(|(word, count)| (word.as_str(), *count)).collect();
            let floor = [1, 2, 1 + draw(40) as u64][case % 3];
            let found = train_above(floor, words_of(&words), 300, |_| true).unwrap();
            assert_eq!(found, by_recounting(&words, 300), "above {floor}: {words:?}");
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
        assert!(matches!(train(words_of(&[]), 255, |_| true), Err(Error::Setting(_))));
    }

    #[test]
    fn training_can_be_interrupted() {
        assert_eq!(train(words_of(&[("abcdefgh", 1)]), 300, |_| false), Err(Error::Interrupted));
    }
}
