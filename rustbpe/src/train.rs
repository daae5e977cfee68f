//! Training: repeatedly give the most frequent pair of neighbours a new id.
//!
//! Among equally frequent pairs the smallest (left id, right id) goes first, so the result depends only on the multiset
//! of words, not on their order.
//!
//! Performance notes. The words are concatenated in one array, one slot per byte. The first and the last slot of a token
//! hold its id, so the neighbours of a position are found from token lengths, without links. A pair gains occurrences
//! only while its newer member is being created, i.e. in a single merge, in which positions are visited in ascending
//! order. Each pair's places are therefore a range of one array, written once, and counts only fall afterwards. A candidate
//! can be too high but never too low, and is corrected when it reaches the top. Changes are summed per neighbour in dense
//! arrays, so the hash table is accessed once per distinct pair, not once per occurrence. Pairs too rare to be merged,
//! which are most of them, are not tracked at first.
//!
//! The remaining time is spent waiting for scattered slots. So slots have two bytes up to 65,536 tokens, and the weights are next to
//! the positions, which are read in order. The places of a pair are first read 256 at a time without a branch, to have
//! many loads in flight. Words with the same beginning are adjacent, since they share pairs.
//! CPU time of merging 20 MB of English with a vocabulary of 32,768 (in parentheses 286 MB with 65,536) on a busy core of a 2.5 GHz Xeon,
//! best of 15 (of 1), alternating. Slots of 8 bytes with weights, a vector for each pair's positions, one heap, all pairs in one hash
//! table: 0.254 s (1.89 s). Current code: 0.127 s (1.17 s); with slots of 4 bytes (1.43 s). With words sorted, pairs counted and places
//! noted on two threads, and slots and places in pages of 2 MiB, the longer thread takes 208 ms from the end of counting, 240 before
//! (20 MB, a slow and busy machine, medians of 30, alternating). No gain: prefetching the slots of the pair table before `book` needs
//! them (0.134 to 0.142 s, 0.135 to 0.150 s without).

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::slice::IterMut;

use rustc_hash::FxHashMap;

use crate::{ask_for_huge_pages, in_parallel, Error};

/// If the words have at most this many slots, all pairs are tracked.
const SMALL: usize = 1 << 20;
/// Pairs with less than 1 / FLOOR_DIVISOR of the words' bytes per token are expected to be rarer than the last merge.
const FLOOR_DIVISOR: u64 = 64;
/// Words to count between calls of `keep_going`, for whose answers threads would wait.
const CHECK_EVERY: usize = 256;
/// Positions whose memory is prefetched together.
const AT_ONCE: usize = 256;

/// Distinct words with their counts.
#[derive(Default)]
pub struct Words {
    bytes: Vec<u8>, // of all words, each after a byte for the border
    words: Vec<Word>,
}

struct Word {
    length: u32,
    weight: u32, // how often it occurs
}

impl Words {
    pub fn push(&mut self, word: &[u8], mut count: u64) {
        // A count above 32 bits becomes several copies of the word, with the same sum.
        while word.len() > 1 && count > 0 {
            let weight = count.min(u32::MAX as u64) as u32;
            self.bytes.push(0);
            self.bytes.extend_from_slice(word);
            self.words.push(Word { length: word.len() as u32, weight });
            count -= weight as u64;
        }
    }
}

/// The tokens of a vocabulary of at most `vocab_size`: the bytes, then the merges in order; fewer if no pair is left.
/// Pairs are counted on one thread for each part of the words. `keep_going(merges done)` is called regularly; if it
/// returns false, the result is `Error::Interrupted`.
pub fn train(words: Vec<Words>, vocab_size: usize, keep_going: impl Fn(usize) -> bool + Sync) -> Result<Vec<Box<[u8]>>, Error> {
    check_vocab_size(vocab_size)?;
    let slots = words.iter().map(|part| part.bytes.len()).sum::<usize>() + 1;
    if slots > u32::MAX as usize {
        return Err(Error::Setting("the distinct pieces exceed 4 GiB: train on less text".into()));
    }
    let floor = match slots {
        0..=SMALL => 1,
        _ => {
            let text: u64 = words.iter().flat_map(|part| &part.words).map(|word| word.length as u64 * word.weight as u64).sum();
            1 + text / (FLOOR_DIVISOR * vocab_size as u64)
        }
    };
    match vocab_size {
        ..=0x10000 => train_above::<u16>(floor, words, vocab_size, keep_going),
        _ => train_above::<u32>(floor, words, vocab_size, keep_going),
    }
}

/// `floor` only decides which pairs are tracked at first.
fn train_above<S: Slot>(
    floor: u64,
    words: Vec<Words>,
    vocab_size: usize,
    keep_going: impl Fn(usize) -> bool + Sync,
) -> Result<Vec<Box<[u8]>>, Error> {
    let mut tokens: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
    let mut merger = Merger::<S, _>::new(words, floor, keep_going)?;
    while tokens.len() < vocab_size {
        let Some(best) = merger.best()? else { break };
        let (left, right) = parts(merger.pairs[best].key);
        tokens.push([&*tokens[left as usize], &*tokens[right as usize]].concat().into());
        // The last id is never written to a slot, since it equals the border there.
        if tokens.len() < vocab_size {
            merger.merge(best);
        }
    }
    Ok(tokens)
}

pub fn check_vocab_size(vocab_size: usize) -> Result<(), Error> {
    match vocab_size {
        0..=255 => Err(Error::Setting(format!("vocab_size must be at least 256 (one token per byte), not {vocab_size}"))),
        _ if vocab_size >= u32::MAX as usize => Err(Error::Setting(format!("vocab_size {vocab_size} is too large"))),
        _ => Ok(()),
    }
}

/// A token's id in its first and its last slot; BORDER between them and between words, so that no pair spans two.
trait Slot: Copy + PartialEq + Send + Sync {
    const BORDER: Self;
    fn of(token: u32) -> Self;
    fn token(self) -> u32;
}

macro_rules! slot {
    ($number:ty) => {
        impl Slot for $number {
            const BORDER: Self = <$number>::MAX;

            fn of(token: u32) -> Self {
                token as $number
            }

            fn token(self) -> u32 {
                self as u32
            }
        }
    };
}
slot!(u16);
slot!(u32);

/// (left id, right id), in the order of pairs.
type Key = u64;

#[inline]
fn key(left: u32, right: u32) -> Key {
    (left as u64) << 32 | right as u64
}

fn parts(key: Key) -> (u32, u32) {
    ((key >> 32) as u32, key as u32)
}

struct Pair {
    key: Key,
    count: u64,
    /// The start in `Merger::places` of the places at which it occurs or once occurred, ascending, and their number.
    start: usize,
    places: u32,
}

/// The slot of a pair's first byte, and the count of its word.
#[derive(Clone, Copy, Default)]
struct Place {
    at: u32,
    weight: u32,
}

struct Merger<S, F> {
    slots: Vec<S>,
    /// For each part, the slot before its first word, and its words.
    parts: Vec<(usize, Vec<Word>)>,
    lengths: Vec<u32>, // of each token, in slots
    /// Pairs that were this frequent when last counted or created are tracked; rarer ones are not.
    floor: u64,
    pairs: Vec<Pair>,
    places: Vec<Place>,
    index: Index,
    queue: Queue,
    left: Neighbours,
    right: Neighbours,
    keep_going: F,
}

impl<S: Slot, F: Fn(usize) -> bool + Sync> Merger<S, F> {
    fn new(words: Vec<Words>, floor: u64, keep_going: F) -> Result<Self, Error> {
        let mut slots = Vec::with_capacity(words.iter().map(|part| part.bytes.len()).sum::<usize>() + 1);
        ask_for_huge_pages(slots.spare_capacity_mut());
        let mut parts = Vec::with_capacity(words.len());
        for Words { bytes, words } in words {
            let mut at = slots.len();
            slots.extend(bytes.into_iter().map(|byte| S::of(byte as u32)));
            parts.push((at, words));
            for word in &parts.last().expect("just pushed").1 {
                slots[at] = S::BORDER;
                at += word.length as usize + 1;
            }
        }
        slots.push(S::BORDER);
        let mut merger = Merger {
            slots,
            parts,
            lengths: vec![1; 256],
            floor,
            pairs: Vec::new(),
            places: Vec::new(),
            index: Index::default(),
            queue: Queue::default(),
            left: Neighbours::default(),
            right: Neighbours::default(),
            keep_going,
        };
        merger.track()?;
        Ok(merger)
    }

    fn check(&self) -> Result<(), Error> {
        match (self.keep_going)(self.lengths.len() - 256) {
            true => Ok(()),
            false => Err(Error::Interrupted),
        }
    }

    /// Calls `f` for all pairs of neighbours in a part of the words, with their places.
    fn for_each_pair(&self, (border, words): &(usize, Vec<Word>), mut f: impl FnMut(Key, Place)) -> Result<(), Error> {
        let mut start = border + 1;
        for (number, &Word { length, weight }) in words.iter().enumerate() {
            if number % CHECK_EVERY == 0 {
                self.check()?;
            }
            let (mut at, mut token) = (start, self.slots[start].token());
            loop {
                let next = at + self.lengths[token as usize] as usize;
                if self.slots[next] == S::BORDER {
                    break;
                }
                let right = self.slots[next].token();
                f(key(token, right), Place { at: at as u32, weight });
                (at, token) = (next, right);
            }
            start += length as usize + 1;
        }
        Ok(())
    }

    /// Counts all pairs and notes the places of those that reach the floor.
    fn track(&mut self) -> Result<(), Error> {
        (self.index, self.pairs, self.places, self.queue) = Default::default();
        let counted = in_parallel(&self.parts, |part| {
            let mut counted = Counted::default();
            self.for_each_pair(part, |key, place| counted.add(key, place.weight as u64, 1))?;
            Ok(counted.pairs)
        })?;
        let together = |mut all: Counted, pair: &Pair| {
            all.add(pair.key, pair.count, pair.places);
            all
        };
        let (mut index, mut pairs) = (Index::default(), counted.iter().flatten().fold(Counted::default(), together).pairs);
        pairs.retain(|pair| pair.count >= self.floor);
        let mut end = 0;
        for (number, pair) in pairs.iter_mut().enumerate() {
            index.find_or_add(pair.key, number);
            self.queue.push((pair.count, Reverse(pair.key), number as u32));
            pair.start = end;
            end += pair.places as usize;
        }
        let mut places = Vec::with_capacity(2 * end);
        ask_for_huge_pages(places.spare_capacity_mut());
        places.resize(end, Place::default());
        // Each part fills a range of a pair's places, in the order of the parts.
        let mut lengths = vec![vec![0; pairs.len()]; counted.len()];
        for (lengths, counted) in lengths.iter_mut().zip(counted) {
            counted.iter().for_each(|pair| index.find(pair.key).into_iter().for_each(|number| lengths[number] = pair.places as usize));
        }
        let mut stretches: Vec<Vec<IterMut<Place>>> = lengths.iter().map(|lengths| Vec::with_capacity(lengths.len())).collect();
        let mut rest = &mut places[..];
        for number in 0..pairs.len() {
            for (stretches, lengths) in stretches.iter_mut().zip(&lengths) {
                let stretch;
                (stretch, rest) = rest.split_at_mut(lengths[number]);
                stretches.push(stretch.iter_mut());
            }
        }
        in_parallel(self.parts.iter().zip(stretches), |(part, mut stretches)| {
            self.for_each_pair(part, |key, place| {
                if let Some(number) = index.find(key) {
                    *stretches[number].next().expect("as many as were counted") = place;
                }
            })
        })?;
        (self.index, self.pairs, self.places) = (index, pairs, places);
        Ok(())
    }

    /// The pair to merge next; None when none is left.
    fn best(&mut self) -> Result<Option<usize>, Error> {
        self.check()?;
        loop {
            if let Some(best) = self.queue.pop(&self.pairs, self.floor) {
                return Ok(Some(best));
            }
            if self.floor == 1 {
                return Ok(None);
            }
            // An untracked pair may be more frequent than the remaining ones.
            self.floor = self.floor / 16 + 1;
            self.track()?;
        }
    }

    /// Merges a pair into the next id.
    fn merge(&mut self, best: usize) {
        let (a, b) = parts(self.pairs[best].key);
        self.replace(a, b, best);
        self.book(a, b);
        self.pairs[best].count = 0;
    }

    /// Replaces every `a b` by the new token, and notes the changes in `self.left` and `self.right`.
    fn replace(&mut self, a: u32, b: u32, best: usize) {
        let new = self.lengths.len() as u32;
        let (len_a, len_b) = (self.lengths[a as usize] as usize, self.lengths[b as usize] as usize);
        self.lengths.push((len_a + len_b) as u32);
        self.left.note_of.push(NO_NOTE);
        self.right.note_of.push(NO_NOTE);
        let Merger { slots, lengths, left, right, .. } = self;
        let Pair { start, places, .. } = self.pairs[best];
        let (a_slot, b_slot, new_slot) = (S::of(a), S::of(b), S::of(new));
        let mut live = [Place::default(); AT_ONCE];
        for places in self.places[start..start + places as usize].chunks(AT_ONCE) {
            let mut count = 0;
            for &place in places {
                let at = place.at as usize;
                live[count] = place;
                count += ((slots[at] == a_slot) & (slots[at + len_a] == b_slot)) as usize;
            }
            for &place in &live[..count] {
                let at = place.at as usize;
                if slots[at] != a_slot || slots[at + len_a] != b_slot {
                    continue; // `a a a`: the middle one belongs to the previous token
                }
                let end = at + len_a + len_b;
                slots[at + len_a - 1] = S::BORDER;
                slots[at + len_a] = S::BORDER;
                slots[at] = new_slot;
                slots[end - 1] = new_slot;
                let before = slots[at - 1];
                if before == new_slot {
                    // `(a b) a b`: the pair (new, a) that was just noted no longer exists.
                    right.lose_gain(a, place.weight);
                }
                if before != S::BORDER {
                    let before = before.token();
                    left.note(before, Place { at: place.at - lengths[before as usize], ..place });
                }
                if slots[end] != S::BORDER {
                    right.note(slots[end].token(), place);
                }
            }
        }
    }

    /// Applies the notes of `replace`: (x, a) and (b, y) become rarer, (x, new) and (new, y) are new pairs.
    fn book(&mut self, a: u32, b: u32) {
        let new = self.lengths.len() as u32 - 1;
        let Merger { pairs, places, index, queue, left, right, floor, .. } = self;
        for (is_left, side) in [(true, left), (false, right)] {
            let mut end = places.len();
            for note in &mut side.notes {
                let x = note.token;
                side.note_of[x as usize] = NO_NOTE;
                let (old, fresh) = if is_left { (key(x, a), key(x, new)) } else { (key(b, x), key(new, x)) };
                // (new, a) was never in the table; (a, b) itself is set to zero by the caller.
                if x != new && old != key(a, b) {
                    if let Some(pair) = index.find(old) {
                        pairs[pair].count -= note.lost;
                    }
                }
                note.next = usize::MAX;
                if note.gained >= *floor {
                    index.find_or_add(fresh, pairs.len());
                    queue.push((note.gained, Reverse(fresh), pairs.len() as u32));
                    pairs.push(Pair { key: fresh, count: note.gained, start: end, places: note.places });
                    note.next = end;
                    end += note.places as usize;
                }
            }
            places.resize(end, Place::default());
            for &(note, place) in &side.places {
                let next = &mut side.notes[note as usize].next;
                if *next != usize::MAX {
                    places[*next] = place;
                    *next += 1;
                }
            }
            side.notes.clear();
            side.places.clear();
        }
    }
}

/// Pairs in the order of their first occurrence.
#[derive(Default)]
struct Counted {
    index: Index,
    pairs: Vec<Pair>,
}

impl Counted {
    #[inline]
    fn add(&mut self, key: Key, count: u64, places: u32) {
        let number = self.index.find_or_add(key, self.pairs.len());
        if number == self.pairs.len() {
            self.pairs.push(Pair { key, count: 0, start: 0, places: 0 });
        }
        self.pairs[number].count += count;
        self.pairs[number].places += places;
    }
}

/// Pair -> its number. Pairs of bytes have their own table.
struct Index {
    bytes: Box<[u32]>,
    others: FxHashMap<Key, u32>,
}

impl Default for Index {
    fn default() -> Self {
        Index { bytes: vec![Self::NONE; 1 << 16].into(), others: FxHashMap::default() }
    }
}

impl Index {
    const NONE: u32 = u32::MAX;

    #[inline]
    fn of_bytes(key: Key) -> Option<usize> {
        let (left, right) = parts(key);
        (left | right < 256).then_some((left << 8 | right) as usize)
    }

    #[inline]
    fn find(&self, key: Key) -> Option<usize> {
        match Self::of_bytes(key) {
            Some(place) => Some(self.bytes[place]).filter(|&number| number != Self::NONE),
            None => self.others.get(&key).copied(),
        }
        .map(|number| number as usize)
    }

    /// The number of a pair; `number` if it had none.
    #[inline]
    fn find_or_add(&mut self, key: Key, number: usize) -> usize {
        let place = match Self::of_bytes(key) {
            Some(place) => &mut self.bytes[place],
            None => self.others.entry(key).or_insert(Self::NONE),
        };
        if *place == Self::NONE {
            *place = number as u32;
        }
        *place as usize
    }
}

/// The most frequent first, then the smallest pair; and its number.
type Candidate = (u64, Reverse<Key>, u32);

/// Candidates in buckets by their counts; only the topmost bucket is sorted. Counts only fall, so a candidate may be too high but never
/// too low: it is corrected when its bucket, or the candidate itself, reaches the top.
struct Queue {
    buckets: Vec<Vec<Candidate>>,
    top: usize,
    heap: BinaryHeap<Candidate>, // of the bucket `top` and above
}

impl Default for Queue {
    fn default() -> Self {
        let buckets = Self::bucket_of(u64::MAX) + 1;
        Queue { buckets: vec![Vec::new(); buckets], top: buckets, heap: BinaryHeap::new() }
    }
}

impl Queue {
    /// Eight buckets between a power of two and the next.
    #[inline]
    fn bucket_of(count: u64) -> usize {
        let shift = (63 - (count | 8).leading_zeros()) - 3;
        (8 * shift as u64 + (count >> shift)) as usize
    }

    #[inline]
    fn push(&mut self, candidate: Candidate) {
        match Self::bucket_of(candidate.0) {
            bucket if bucket < self.top => self.buckets[bucket].push(candidate),
            _ => self.heap.push(candidate),
        }
    }

    /// The number of the pair with the highest count, if that is at least `floor`.
    fn pop(&mut self, pairs: &[Pair], floor: u64) -> Option<usize> {
        loop {
            while let Some((count, key, number)) = self.heap.pop() {
                match pairs[number as usize].count {
                    now if now == count => return Some(number as usize),
                    now if now >= floor => self.push((now, key, number)),
                    _ => {}
                }
            }
            let lowest = Self::bucket_of(floor);
            while self.top > lowest && self.heap.is_empty() {
                self.top -= 1;
                for (_, key, number) in std::mem::take(&mut self.buckets[self.top]) {
                    let now = pairs[number as usize].count;
                    if now >= floor {
                        self.push((now, key, number));
                    }
                }
            }
            if self.heap.is_empty() {
                return None;
            }
        }
    }
}

/// The changes of one merge on one side of the merged pair, per neighbouring token.
struct Neighbours {
    note_of: Vec<u32>, // token -> index into notes, or NO_NOTE
    notes: Vec<Note>,
    places: Vec<(u32, Place)>, // of the new pairs, each with its note
}

struct Note {
    token: u32,
    places: u32,
    lost: u64,   // occurrences of its pair with the old token
    gained: u64, // occurrences of its pair with the new token
    next: usize, // position of its next place
}

const NO_NOTE: u32 = u32::MAX;

impl Default for Neighbours {
    fn default() -> Self {
        Neighbours { note_of: vec![NO_NOTE; 256], notes: Vec::new(), places: Vec::new() }
    }
}

impl Neighbours {
    #[inline]
    fn note(&mut self, token: u32, place: Place) {
        let number = &mut self.note_of[token as usize];
        if *number == NO_NOTE {
            *number = self.notes.len() as u32;
            self.notes.push(Note { token, places: 0, lost: 0, gained: 0, next: 0 });
        }
        let note = &mut self.notes[*number as usize];
        note.places += 1;
        note.lost += place.weight as u64;
        note.gained += place.weight as u64;
        self.places.push((*number, place));
    }

    fn lose_gain(&mut self, token: u32, weight: u32) {
        self.notes[self.note_of[token as usize] as usize].gained -= weight as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Split into parts, perhaps more than there are words.
    fn words_of(words: &[(&str, u64)], parts: usize) -> Vec<Words> {
        let mut all: Vec<Words> = (0..parts).map(|_| Words::default()).collect();
        words.iter().enumerate().for_each(|(number, (word, count))| all[number % parts].push(word.as_bytes(), *count));
        all
    }

    fn tokens(words: &[(&str, u64)], vocab_size: usize) -> Vec<Box<[u8]>> {
        train(words_of(words, 2), vocab_size, |_| true).unwrap()
    }

    /// Recounts all pairs for every merge.
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
            let expected = by_recounting(&words, 300);
            let parts = 1 + draw(4);
            let why = format!("above {floor}, {parts} parts: {words:?}");
            assert_eq!(train_above::<u16>(floor, words_of(&words, parts), 300, |_| true).unwrap(), expected, "{why}");
            assert_eq!(train_above::<u32>(floor, words_of(&words, parts), 300, |_| true).unwrap(), expected, "{why}");
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
        assert!(matches!(train(words_of(&[], 1), 255, |_| true), Err(Error::Setting(_))));
    }

    #[test]
    fn training_can_be_interrupted() {
        assert_eq!(train(words_of(&[("abcdefgh", 1)], 1), 300, |_| false), Err(Error::Interrupted));
    }
}
