//! Text to token ids and back.
//!
//! The rules are tiktoken's: a piece that is a token is that token; otherwise start from single bytes and join
//! the neighbours whose joined bytes have the lowest rank, the leftmost first, until no two neighbours join.
//!
//! Parts are always tokens, so "the rank of the joined bytes" is a function of two ids, and one table of id pairs,
//! built from every way to cut a token in two tokens, answers it without touching bytes; ids and ranks are the same
//! numbers. Short pieces keep their parts in an array that is scanned for the minimum, long ones (a megabyte of one
//! letter is a single piece) use buckets of positions. Each thread remembers the ids of pieces in a cache of fixed size.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::Hasher;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use rustc_hash::{FxHashMap, FxHasher};

use crate::split::{Splitter, WINDOW};
use crate::{ask_for_huge_pages, in_parallel, key_of, mix, prefetch, runs_of, worker_threads, Error, KEY_BYTES, RUN_BYTES};

const NONE: u32 = u32::MAX;
/// Three ids fit in 64 bits, and all bits set are no ids.
pub const MAX_TOKENS: usize = (1 << PairTable::ID_BITS) - 1;
/// Pieces up to this many bytes are merged by scanning.
const SCAN_LIMIT: usize = 96;
/// Pieces up to this many bytes are in the cache; the key of those beyond KEY_BYTES is their hash.
const CACHED_BYTES: usize = 255;
/// The cache has 2^SET_BITS sets of four pieces, 128 bytes each: 16 MB a thread, when it is full.
const SET_BITS: u32 = 17;
const SETS: usize = 1 << SET_BITS;
/// Room for the ids (and the bytes) of pieces that do not fit in their entry; the cache starts anew when it is used up.
const SPILLED: usize = 1 << 20;
/// So many pieces are cut off before the first of them is looked up, and at most a window's more.
const WAITING: usize = 64;
/// Ids of a piece that fit in its entry.
const INLINE_IDS: usize = 3;
/// Parts for which memory is kept for the next piece.
const KEPT_PARTS: usize = 1 << 20;

/// A vocabulary and its pattern, ready to encode. Immutable but for its caches: any number of threads may share it.
pub struct Encoder {
    splitter: Splitter,
    tokens: TokenTable,
    byte_ids: [u32; 256],
    /// What two single bytes join to, at 256 x left + right: the first look at a piece goes here.
    byte_pairs: Box<[u32]>,
    pairs: PairTable,
    scratches: Mutex<Vec<Scratch>>,
}

/// One thread's working memory.
pub struct Scratch {
    waiting: [Waiting; WAITING + WINDOW],
    cache: Cache,
    parts: Parts,
}

/// A piece whose place in the cache is on its way from memory.
#[derive(Clone, Copy, Default)]
struct Waiting {
    key: Key,
    set: u32,
    start: u32,
    len: u32,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch { waiting: [Waiting::default(); WAITING + WINDOW], cache: Cache::default(), parts: Parts::default() }
    }
}

/// The ids (or bytes) of documents, end to end through all the runs, and how many belong to each document.
pub struct Documents<T> {
    pub runs: Vec<Vec<T>>,
    pub lengths: Vec<usize>,
}

impl Encoder {
    /// `tokens[id]` are the bytes of a token, and its id is its rank. All 256 single bytes must be there.
    pub fn new(tokens: &[Box<[u8]>], pattern: &str) -> Result<Self, Error> {
        if tokens.len() > MAX_TOKENS {
            return Err(Error::Ranks(format!("{} tokens are too many, {MAX_TOKENS} are possible", tokens.len())));
        }
        let tokens = TokenTable::new(tokens)?;
        let mut byte_ids = [0; 256];
        for (byte, slot) in byte_ids.iter_mut().enumerate() {
            *slot = tokens.id(&[byte as u8]).ok_or_else(|| Error::Ranks(format!("the single byte {byte} is no token")))?;
        }
        let mut pairs = Vec::new();
        let mut byte_pairs = vec![NONE; 1 << 16].into_boxed_slice();
        for (id, token) in tokens.iter().enumerate() {
            if let &[left, right] = token {
                byte_pairs[(left as usize) << 8 | right as usize] = id as u32;
            }
            for cut in 1..token.len() {
                let Some(left) = tokens.id(&token[..cut]) else { continue };
                pairs.extend(tokens.id(&token[cut..]).map(|right| (left, right, id as u32)));
            }
        }
        let (splitter, pairs) = (Splitter::new(pattern)?, PairTable::new(&pairs));
        Ok(Encoder { splitter, tokens, byte_ids, byte_pairs, pairs, scratches: Mutex::default() })
    }

    pub fn split<'t>(&self, text: &'t str) -> Result<Vec<&'t str>, Error> {
        let mut pieces = Vec::new();
        self.splitter.for_each(text, |piece| pieces.push(piece))?;
        Ok(pieces)
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let (mut out, mut scratch) = (Vec::new(), self.take_scratches(1));
        let encoded = self.encode_into(text, &mut out, &mut scratch[0]);
        self.keep_scratches(scratch);
        encoded.and(Ok(out))
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode_into(&self, text: &str, out: &mut Vec<u32>, scratch: &mut Scratch) -> Result<(), Error> {
        let bytes = text.as_bytes();
        if bytes.len() > u32::MAX as usize {
            return Err(Error::Split(format!("a text of {} bytes is too long: cut it into texts below 4 GiB", bytes.len())));
        }
        let Scratch { waiting, cache, parts } = scratch;
        cache.prepare();
        let mut count = 0;
        let split = self.splitter.for_each_batch(text, |borders| {
            let (sets, mut start) = (cache.sets(), borders[0]);
            for (slot, &end) in waiting[count..].iter_mut().zip(&borders[1..]) {
                let (from, len) = (&bytes[start..], end - start);
                let key = match from.first_chunk() {
                    Some(window) if len <= KEY_BYTES => Key::of_window(window, len),
                    _ => Key::of(&from[..len]),
                };
                let set = key.set();
                prefetch(&sets[set]);
                *slot = Waiting { key, set: set as u32, start: start as u32, len: len as u32 };
                start = end;
            }
            count += borders.len() - 1;
            if count >= WAITING {
                self.encode_pieces(bytes, &waiting[..count], out, cache, parts);
                count = 0;
            }
            Ok(())
        });
        self.encode_pieces(bytes, &waiting[..count], out, cache, parts);
        split
    }

    /// Their places in the cache are on the way from memory while the next pieces are cut off.
    ///
    /// Performance notes, 20 MB of English, vocabulary 32,768, one core of a 2.5 GHz Xeon whose other core was not idle: a look-up for each
    /// piece as it is cut off 90 to 130 MB/s; with the keys of 64 first 165; with a cache so large that 0.4 % of the pieces are merged
    /// again, not 2 %, 200; 0.05 %, 221; with all memory of the process in pages of 2 MiB 256 (the first time 112, 104, 120), for the cache
    /// alone not timed. A later machine load, in turns: 239 to 247 as it was; keys made window by window, both entries of a line compared
    /// without a branch 238 to 245, which is noise; text asked for ahead as well (split.rs) 249 to 258. Keys in batches of 130 instead,
    /// through `windows(2)`, 203. A piece that the cache does not know costs about 0.7 microseconds, most of it waiting for memory:
    /// 110 MB/s the first time, 115 to 121 since the second half of a set is left alone and the other pair's slot asked for in `join`.
    /// By simulation: with one place for a piece 4 % are merged again; moving what is found to the very front is no better.
    #[inline(never)]
    fn encode_pieces(&self, bytes: &[u8], pieces: &[Waiting], out: &mut Vec<u32>, cache: &mut Cache, parts: &mut Parts) {
        let mut pieces = pieces.iter();
        loop {
            out.reserve((INLINE_IDS + 1) * (WAITING + WINDOW));
            let (sets, free, mut len) = (cache.sets(), out.spare_capacity_mut(), 0);
            let other = loop {
                let Some(piece) = pieces.next() else { break None };
                let [first, second, ..] = &sets[piece.set as usize].0;
                let entry = [first, second][(second.key == piece.key) as usize];
                if entry.key != piece.key || entry.count() > INLINE_IDS {
                    break Some(piece);
                }
                // SAFETY: `free` begins with room for this many of every piece. Only the ids are kept.
                unsafe { free.as_mut_ptr().add(len).cast::<[u32; INLINE_IDS + 1]>().write_unaligned(entry.value) };
                len += entry.count();
            };
            // SAFETY: so many have been written.
            unsafe { out.set_len(out.len() + len) };
            let Some(piece) = other else { break };
            self.encode_piece(&bytes[piece.start as usize..][..piece.len as usize], piece.key, out, cache, parts);
        }
    }

    /// Any piece, from anywhere in the cache or anew; the cache knows it afterwards, if it has a key.
    #[inline(never)]
    fn encode_piece(&self, piece: &[u8], key: Key, out: &mut Vec<u32>, cache: &mut Cache, parts: &mut Parts) {
        if let Some(ids) = cache.find(key, piece) {
            return out.extend_from_slice(ids);
        }
        let start = out.len();
        if let Some(id) = self.tokens.id(piece) {
            out.push(id);
        } else {
            self.start(piece, parts);
            if piece.len() <= SCAN_LIMIT {
                self.merge_short(parts);
            } else {
                self.merge_long(parts);
            }
            let mut at = 0;
            while let Some(part) = parts.get(at) {
                out.push(part.id);
                at += part.length as usize;
            }
            parts.clear();
            parts.shrink_to(KEPT_PARTS);
        }
        cache.insert(key, piece, &out[start..]);
    }

    /// A part for each byte.
    fn start(&self, piece: &[u8], parts: &mut Parts) {
        parts.clear();
        parts.extend(piece.windows(2).map(|pair| Part {
            id: self.byte_ids[pair[0] as usize],
            rank: self.byte_pairs[(pair[0] as usize) << 8 | pair[1] as usize],
            length: 1,
        }));
        parts.extend(piece.last().map(|&byte| Part { id: self.byte_ids[byte as usize], rank: NONE, length: 1 }));
    }

    /// Joins the part at `left` with the next one. Returns where the part before them is, if there is one.
    #[inline]
    fn join(&self, parts: &mut Parts, left: usize) -> Option<usize> {
        let joined = parts[left].rank;
        let right = left + parts[left].length as usize;
        let length = (right - left) as u32 + parts[right].length;
        let after = left + length as usize;
        let before = parts.get(left.wrapping_sub(1)).map(|last| left - last.length as usize);
        if let Some(before) = before {
            self.pairs.ask_for(parts[before].id, joined);
        }
        let rank = parts.get(after).map_or(NONE, |next| self.pairs.get(joined, next.id));
        parts[right] = Part::INSIDE;
        parts[after - 1].length = length;
        parts[left] = Part { id: joined, rank, length };
        let before = before?;
        parts[before].rank = self.pairs.get(parts[before].id, joined);
        Some(before)
    }

    /// O(n^2), with a small constant.
    fn merge_short(&self, parts: &mut Parts) {
        loop {
            // Of equal ranks the leftmost: rank and position are compared as one number.
            let ranked = parts.iter().enumerate().map(|(at, part)| (part.rank as u64) << 32 | at as u64);
            let best = ranked.fold(u64::MAX, u64::min);
            if (best >> 32) as u32 == NONE {
                break;
            }
            self.join(parts, best as u32 as usize);
        }
    }

    /// O(n log n), and O(n) where positions come in order, as in a run of one letter. A queued pair is out of date when
    /// its rank is no longer what stands there.
    fn merge_long(&self, parts: &mut Parts) {
        let (mut queue, mut start) = (Queue::default(), 0);
        for same in parts.chunk_by(|a, b| a.rank == b.rank) {
            queue.push_run(same[0].rank, start..start + same.len());
            start += same.len();
        }
        while let Some((rank, left)) = queue.pop() {
            if parts[left].rank == rank {
                let before = self.join(parts, left);
                queue.push(parts[left].rank, left);
                if let Some(before) = before {
                    queue.push(parts[before].rank, before);
                }
            }
        }
    }

    /// Encodes the documents on up to `threads` threads; several share a long one where the pattern allows it.
    ///
    /// `keep_going` is asked by each thread after every 256 KiB or so; an answer of false ends the call with `Error::Interrupted`.
    pub fn encode_documents(&self, texts: &[&str], threads: usize, keep_going: impl Fn() -> bool + Sync) -> Result<Documents<u32>, Error> {
        let (mut parts, mut ends) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for &text in texts {
            let mut rest = text;
            while rest.len() > 2 * RUN_BYTES {
                let (part, others) = rest.split_at(self.splitter.border(rest.as_bytes(), RUN_BYTES));
                parts.push(part);
                rest = others;
            }
            parts.push(rest);
            ends.push(parts.len());
        }
        let Documents { runs, lengths } =
            self.in_runs(&parts, |text| text.len() / 4, threads, &keep_going, |text, out, scratch| self.encode_into(text, out, scratch))?;
        let starts = std::iter::once(&0).chain(&ends);
        let lengths = starts.zip(&ends).map(|(&start, &end)| lengths[start..end].iter().sum()).collect();
        Ok(Documents { runs, lengths })
    }

    /// The bytes that `ids` stand for: not always whole UTF-8 characters.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        self.decode_into(ids, &mut out)?;
        Ok(out)
    }

    /// Appends the bytes of `ids` to `out`.
    pub fn decode_into(&self, ids: &[u32], out: &mut Vec<u8>) -> Result<(), Error> {
        for &id in ids {
            let (window, token) = self.tokens.get(id).ok_or(Error::UnknownId(id))?;
            if token.len() <= COPIED {
                out.reserve(COPIED);
                // SAFETY: there is room for the window, which begins with the token.
                unsafe {
                    out.as_mut_ptr().add(out.len()).cast::<[u8; COPIED]>().write(*window);
                    out.set_len(out.len() + token.len());
                }
            } else {
                out.extend_from_slice(token);
            }
        }
        Ok(())
    }

    /// Decodes the documents on up to `threads` threads.
    pub fn decode_documents(
        &self,
        documents: &[&[u32]],
        threads: usize,
        keep_going: impl Fn() -> bool + Sync,
    ) -> Result<Documents<u8>, Error> {
        self.in_runs(documents, |ids| 4 * ids.len(), threads, keep_going, |ids, out, _| self.decode_into(ids, out))
    }

    /// Calls `work` with every document, which will give about so many items, in runs of them, wherever a thread is free.
    fn in_runs<D: Copy + Sync, T: Send>(
        &self,
        documents: &[D],
        expected: impl Fn(D) -> usize + Sync,
        threads: usize,
        keep_going: impl Fn() -> bool + Sync,
        work: impl Fn(D, &mut Vec<T>, &mut Scratch) -> Result<(), Error> + Sync,
    ) -> Result<Documents<T>, Error> {
        let runs = runs_of(documents.iter().map(|&document| expected(document) * size_of::<T>()));
        let threads = threads.min(runs.len());
        let scratches = Mutex::new(self.take_scratches(threads));
        let next = AtomicUsize::new(0);
        let done = in_parallel(0..threads, |_| {
            let mut scratch = scratches.lock().expect("held for a moment only").pop().unwrap_or_default();
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(start, end)) = runs.get(index) else { break };
                let documents = &documents[start..end];
                let mut items = Vec::with_capacity(documents.iter().map(|&document| expected(document)).sum());
                let mut lengths = Vec::with_capacity(documents.len());
                for &document in documents {
                    let before = items.len();
                    work(document, &mut items, &mut scratch)?;
                    lengths.push(items.len() - before);
                }
                done.push((index, items, lengths));
                if !keep_going() {
                    return Err(Error::Interrupted);
                }
            }
            scratches.lock().expect("held for a moment only").push(scratch);
            Ok(done)
        });
        self.keep_scratches(scratches.into_inner().expect("held for a moment only"));
        let mut done: Vec<_> = done?.into_iter().flatten().collect();
        done.sort_unstable_by_key(|(index, ..)| *index);
        let lengths = done.iter().flat_map(|(_, _, lengths)| lengths).copied().collect();
        Ok(Documents { runs: done.into_iter().map(|(_, items, _)| items).collect(), lengths })
    }

    /// As many as wanted, warm ones first. Nothing waits for the lock, so that a forked child cannot find it held for ever.
    fn take_scratches(&self, wanted: usize) -> Vec<Scratch> {
        let mut taken = match self.scratches.try_lock() {
            Ok(mut kept) => {
                let rest = kept.len().saturating_sub(wanted);
                kept.split_off(rest)
            }
            Err(_) => Vec::new(),
        };
        taken.resize_with(wanted, Scratch::default);
        taken
    }

    fn keep_scratches(&self, scratches: Vec<Scratch>) {
        if let Ok(mut kept) = self.scratches.try_lock() {
            kept.extend(scratches);
            kept.truncate(worker_threads(None)); // 16 MB each
        }
    }
}

// ---- merging

/// A piece in parts, one entry for each byte. A part is known by the position of its first byte.
type Parts = Vec<Part>;

#[derive(Clone, Copy)]
struct Part {
    /// NONE where no part begins.
    id: u32,
    /// What it joins to with the next part, or NONE; ids and ranks are the same numbers.
    rank: u32,
    /// Also at its last byte, so that both neighbours are found.
    length: u32,
}

impl Part {
    const INSIDE: Part = Part { id: NONE, rank: NONE, length: 0 };
}

/// What two tokens join to. Most pairs that are asked for join to nothing, and a set of bits, eight or more for each pair, small
/// enough to stay in the processor, says so of most of them: without it merging takes half as long again. Behind it a table with
/// open addressing, at most half full.
struct PairTable {
    bits: Vec<u64>,
    slots: Vec<u64>, // left, right and what they join to, ID_BITS each
    shift: u32,
}

impl PairTable {
    const EMPTY: u64 = u64::MAX;
    const ID_BITS: u32 = 21;

    fn new(pairs: &[(u32, u32, u32)]) -> Self {
        let size = (2 * pairs.len()).next_power_of_two().max(16);
        let mut table = PairTable { bits: vec![0; size / 16], slots: vec![Self::EMPTY; size], shift: 64 - size.trailing_zeros() };
        for &(left, right, id) in pairs {
            let (key, hash) = Self::key(left, right);
            let bit = hash >> (table.shift - 2);
            table.bits[bit as usize / 64] |= 1 << (bit % 64);
            let place = table.place(key, hash);
            table.slots[place] = key << Self::ID_BITS | id as u64;
        }
        table
    }

    #[inline]
    fn key(left: u32, right: u32) -> (u64, u64) {
        let key = (left as u64) << Self::ID_BITS | right as u64;
        (key, key.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Where a pair stands, or else would stand.
    fn place(&self, key: u64, hash: u64) -> usize {
        let mut place = (hash >> self.shift) as usize;
        while self.slots[place] >> Self::ID_BITS != key && self.slots[place] != Self::EMPTY {
            place = (place + 1) & (self.slots.len() - 1);
        }
        place
    }

    #[inline]
    fn ask_for(&self, left: u32, right: u32) {
        let (_, hash) = Self::key(left, right);
        prefetch(&self.slots[(hash >> self.shift) as usize]);
    }

    /// NONE if there is nothing.
    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        let (key, hash) = Self::key(left, right);
        let bit = hash >> (self.shift - 2);
        if self.bits[bit as usize / 64] >> (bit % 64) & 1 == 0 {
            return NONE;
        }
        match self.slots[self.place(key, hash)] {
            Self::EMPTY => NONE,
            slot => (slot & ((1 << Self::ID_BITS) - 1)) as u32,
        }
    }
}

// ---- the cache of pieces

/// A piece of up to KEY_BYTES bytes and its length, or the hash of a longer piece and its length.
#[derive(Clone, Copy, Default, Eq)]
struct Key {
    low: u64,
    high: u64, // the highest byte is the length, 0xff for a hash; all 0 in an empty entry
}

impl PartialEq for Key {
    /// One branch, not two.
    #[inline]
    fn eq(&self, other: &Self) -> bool {
        (self.low ^ other.low) | (self.high ^ other.high) == 0
    }
}

impl Key {
    /// Of the first `len` bytes.
    #[inline]
    fn of_window(window: &[u8; 16], len: usize) -> Self {
        let [low, high] = key_of(window, len);
        Key { low, high }
    }

    /// No piece's: of what the cache does not take.
    const NONE: Key = Key { low: 0, high: u64::MAX };

    fn of(piece: &[u8]) -> Self {
        if piece.len() <= KEY_BYTES {
            let mut window = [0; 16];
            window[..piece.len()].copy_from_slice(piece);
            Self::of_window(&window, piece.len())
        } else if piece.len() <= CACHED_BYTES {
            Key { low: hash_of(piece), high: 0xff << 56 | piece.len() as u64 }
        } else {
            Self::NONE
        }
    }

    #[inline]
    fn set(self) -> usize {
        mix([self.low, self.high]) as usize >> (64 - SET_BITS)
    }
}

/// What the cache knows of a piece: its key, and its ids and their number if they are at most INLINE_IDS of a short piece.
/// Otherwise where they start in `Cache::ids`, how many they are, where the bytes of a longer piece start in `Cache::bytes`, and ELSEWHERE.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Entry {
    key: Key,
    value: [u32; INLINE_IDS + 1],
}

impl Entry {
    const ELSEWHERE: u32 = u32::MAX;

    #[inline]
    fn count(&self) -> usize {
        self.value[INLINE_IDS] as usize
    }
}

/// The first two lie in one line of memory and hold what was needed more than once, the others what is new.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Set([Entry; 4]);

/// The ids of pieces seen lately. Its size is fixed.
#[derive(Default)]
struct Cache {
    memory: Vec<u64>, // of the sets: zeros cost nothing before they are used, but only as plain numbers
    ids: Vec<u32>,
    bytes: Vec<u8>,
}

impl Cache {
    fn prepare(&mut self) {
        if self.memory.is_empty() {
            self.memory = vec![0; (SETS + 1) * size_of::<Set>() / size_of::<u64>()];
            ask_for_huge_pages(&mut self.memory);
        }
    }

    #[inline]
    fn sets(&self) -> &[Set; SETS] {
        // SAFETY: a set consists of integers without gaps between them, so any memory is one.
        unsafe { self.memory.align_to::<Set>() }.1.first_chunk().expect("prepared")
    }

    #[inline]
    fn set_mut(&mut self, set: usize) -> &mut Set {
        // SAFETY: the same, and any set is memory.
        &mut unsafe { self.memory.align_to_mut::<Set>() }.1[set]
    }

    /// What is found moves up.
    fn find(&mut self, key: Key, piece: &[u8]) -> Option<&[u32]> {
        let set = self.set_mut(key.set());
        // Behind a free entry there is nothing: for a new piece the second half need not come from memory.
        let place = set.0.iter().position(|entry| entry.key == key || entry.key == Key::default())?;
        if set.0[place].key != key {
            return None;
        }
        let better = place.min(2).saturating_sub(1);
        set.0.swap(place, better);
        let [start, count, bytes, here] = set.0[better].value;
        if here != Entry::ELSEWHERE {
            return Some(&self.sets()[key.set()].0[better].value[..here as usize]);
        }
        let same = piece.len() <= KEY_BYTES || &self.bytes[bytes as usize..][..piece.len()] == piece;
        same.then(|| &self.ids[start as usize..][..count as usize])
    }

    fn insert(&mut self, key: Key, piece: &[u8], ids: &[u32]) {
        if key == Key::NONE {
            return;
        }
        if self.ids.len() + ids.len() > SPILLED || self.bytes.len() + piece.len() > SPILLED {
            self.memory.fill(0);
            self.ids.clear();
            self.bytes.clear();
        }
        let mut value = [self.ids.len() as u32, ids.len() as u32, self.bytes.len() as u32, Entry::ELSEWHERE];
        if piece.len() <= KEY_BYTES && ids.len() <= INLINE_IDS {
            value[..ids.len()].copy_from_slice(ids);
            value[INLINE_IDS] = ids.len() as u32;
        } else {
            self.ids.extend_from_slice(ids);
            if piece.len() > KEY_BYTES {
                self.bytes.extend_from_slice(piece);
            }
        }
        let set = &mut self.set_mut(key.set()).0;
        let place = set[..2].iter().position(|entry| entry.key == Key::default()).unwrap_or(2);
        if place == 2 {
            set[3] = set[2];
        }
        set[place] = Entry { key, value };
    }
}

// ---- the queue of long pieces

/// Positions by rank: the lowest rank first, and in it the lowest position.
#[derive(Default)]
struct Queue {
    buckets: Vec<Bucket>,
    bucket_of: FxHashMap<u32, usize>,         // by rank
    last: usize,                              // pushed to; the next push is often to the same
    ranks: BinaryHeap<Reverse<(u32, usize)>>, // and buckets, of those that may hold something
    lowest: usize,                            // of those buckets
}

/// Positions mostly come in ascending order, in which they also leave; the others go through a heap.
struct Bucket {
    rank: u32,
    queued: bool,
    ascending: Vec<u32>,
    taken: usize, // of those
    late: BinaryHeap<Reverse<u32>>,
}

impl Queue {
    /// Positions of one rank, behind all that were pushed before.
    fn push_run(&mut self, rank: u32, positions: Range<usize>) {
        self.push(rank, positions.start);
        if rank != NONE {
            self.buckets[self.last].ascending.extend(positions.start as u32 + 1..positions.end as u32);
        }
    }

    #[inline(always)]
    fn push(&mut self, rank: u32, position: usize) {
        let position = position as u32;
        match self.buckets.get_mut(self.last) {
            _ if rank == NONE => {}
            Some(Bucket { rank: last, queued: true, ascending, .. }) if *last == rank && ascending.last() < Some(&position) => {
                ascending.push(position)
            }
            _ => self.push_elsewhere(rank, position),
        }
    }

    fn push_elsewhere(&mut self, rank: u32, position: u32) {
        self.last = *self.bucket_of.entry(rank).or_insert(self.buckets.len());
        if self.last == self.buckets.len() {
            let (ascending, late) = Default::default();
            self.buckets.push(Bucket { rank, queued: false, ascending, taken: 0, late });
        }
        if !self.buckets[self.last].queued {
            self.buckets[self.last].queued = true;
            self.ranks.push(Reverse((rank, self.last)));
            self.find_lowest();
        }
        let bucket = &mut self.buckets[self.last];
        if bucket.ascending.last() <= Some(&position) {
            bucket.ascending.push(position);
        } else {
            bucket.late.push(Reverse(position));
        }
    }

    fn find_lowest(&mut self) {
        self.lowest = self.ranks.peek().map_or(usize::MAX, |&Reverse((_, bucket))| bucket);
    }

    fn pop(&mut self) -> Option<(u32, usize)> {
        while let Some(bucket) = self.buckets.get_mut(self.lowest) {
            let (first, late) = (bucket.ascending.get(bucket.taken), bucket.late.peek());
            let position = match (first, late) {
                (Some(&first), Some(&Reverse(late))) => first.min(late),
                (Some(&first), None) => first,
                (None, Some(&Reverse(late))) => late,
                (None, None) => {
                    bucket.ascending.clear();
                    (bucket.taken, bucket.queued) = (0, false);
                    self.ranks.pop();
                    self.find_lowest();
                    continue;
                }
            };
            if first == Some(&position) {
                bucket.taken += 1;
            } else {
                bucket.late.pop();
            }
            return Some((bucket.rank, position as usize));
        }
        None
    }
}

// ---- bytes of tokens

/// The bytes of tokens that are at most this long are copied as if they were exactly this long: a copy of constant size.
const COPIED: usize = 16;

/// The bytes of all tokens, end to end, and where to find a token by its bytes.
struct TokenTable {
    bytes: Vec<u8>, // and COPIED more
    starts: Vec<u32>,
    /// Open addressing: half of a token's hash, and its id below. Most look-ups fail, and fail at the first empty slot.
    slots: Vec<u64>,
}

impl TokenTable {
    const EMPTY: u64 = u64::MAX;

    fn new(tokens: &[Box<[u8]>]) -> Result<Self, Error> {
        let mut bytes = Vec::with_capacity(tokens.iter().map(|token| token.len()).sum::<usize>() + COPIED);
        let mut starts = vec![0];
        for token in tokens {
            bytes.extend_from_slice(token);
            starts.push(u32::try_from(bytes.len()).map_err(|_| Error::Ranks("the tokens have more than 4 GiB".to_owned()))?);
        }
        bytes.extend([0; COPIED]);
        let mut table = TokenTable { bytes, starts, slots: vec![Self::EMPTY; (4 * tokens.len()).next_power_of_two()] };
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(Error::Ranks(format!("token {id} is empty")));
            }
            match table.find(token) {
                Ok(first) => return Err(Error::Ranks(format!("tokens {first} and {id} are the same bytes"))),
                Err(place) => table.slots[place] = hash_of(token) >> 32 << 32 | id as u64,
            }
        }
        Ok(table)
    }

    /// The token of these bytes, or the empty slot where it would stand.
    fn find(&self, bytes: &[u8]) -> Result<u32, usize> {
        let hash = hash_of(bytes);
        let mut place = hash as usize & (self.slots.len() - 1);
        loop {
            let slot = self.slots[place];
            if slot == Self::EMPTY {
                return Err(place);
            }
            if slot >> 32 == hash >> 32 && self.get(slot as u32).is_some_and(|(_, token)| token == bytes) {
                return Ok(slot as u32);
            }
            place = (place + 1) & (self.slots.len() - 1);
        }
    }

    fn id(&self, bytes: &[u8]) -> Option<u32> {
        self.find(bytes).ok()
    }

    /// A token, and as many bytes as a window has from its first on.
    #[inline]
    fn get(&self, id: u32) -> Option<(&[u8; COPIED], &[u8])> {
        let &[start, end] = self.starts.get(id as usize..)?.first_chunk()?;
        let from = &self.bytes[start as usize..];
        Some((from.first_chunk()?, &from[..(end - start) as usize]))
    }

    fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        self.starts.windows(2).map(|ends| &self.bytes[ends[0] as usize..ends[1] as usize])
    }
}

fn hash_of(bytes: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;

    fn encoder(merged: &[&str]) -> Encoder {
        let bytes = (0..=255u8).map(|byte| Box::from([byte]));
        Encoder::new(&bytes.chain(merged.iter().map(|token| token.as_bytes().into())).collect::<Vec<_>>(), DEFAULT_PATTERN).unwrap()
    }

    /// The rule, word for word, on bytes.
    fn by_the_rule(encoder: &Encoder, piece: &[u8]) -> Vec<u32> {
        let rank = |bytes: &[u8]| encoder.tokens.iter().position(|token| token == bytes);
        if let Some(id) = rank(piece) {
            return vec![id as u32];
        }
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&byte| vec![byte]).collect();
        loop {
            let ranked = parts.windows(2).enumerate().filter_map(|(i, pair)| Some((rank(&pair.concat())?, i)));
            let Some((_, at)) = ranked.min() else { break };
            let right = parts.remove(at + 1);
            parts[at].extend(right);
        }
        parts.iter().map(|part| rank(part).unwrap() as u32).collect()
    }

    #[test]
    fn short_and_long_pieces_follow_the_rule() {
        // "abc" cannot be reached by merging (no "bc" before "ab"...), only as a whole piece: the order of ranks matters.
        let encoder = encoder(&["aa", "bc", "ab", "aaa", "abc", "aaaa", "ca", "abcab"]);
        let mut state = 7u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for _ in 0..3_000 {
            let piece: Vec<u8> = (0..1 + draw(14)).map(|_| b'a' + draw(3) as u8).collect();
            let expected = by_the_rule(&encoder, &piece);
            let (text, mut out, mut scratch) = (std::str::from_utf8(&piece).unwrap(), Vec::new(), Scratch::default());
            encoder.encode_into(text, &mut out, &mut scratch).unwrap();
            assert_eq!(out, expected, "{text:?}");
            encoder.encode_into(text, &mut out, &mut scratch).unwrap();
            assert_eq!(out[expected.len()..], expected, "remembered {text:?}");
            if expected.len() > 1 {
                let mut parts = Parts::new();
                encoder.start(&piece, &mut parts);
                encoder.merge_long(&mut parts);
                let ids: Vec<u32> = parts.iter().map(|part| part.id).filter(|&id| id != NONE).collect();
                assert_eq!(ids, expected, "in buckets {text:?}");
            }
        }
    }

    #[test]
    fn a_megabyte_of_one_letter() {
        let encoder = encoder(&["aa", "aaaa", "aaaaaaaa"]);
        let ids = encoder.encode(&"a".repeat(1_000_003)).unwrap();
        assert_eq!(ids.len(), 125_000 + 2);
        assert_eq!(&ids[125_000..], [256, b'a' as u32]);
    }

    #[test]
    fn documents_come_back_in_order_from_any_number_of_threads() {
        let encoder = encoder(&["ab", "abab", " a", "\n\n"]);
        let mut texts: Vec<String> = (0..5_000).map(|i| "ab ".repeat(i % 97)).collect();
        // Long ones, which threads share, with and without places where they may be cut
        let (mut draw, parts) = (crate::draws(7), ["ab", " ", "\n", "é", "1", "\u{a0}", "abab"]);
        texts.extend((0..8).map(|_| (0..600_000).map(|_| parts[draw(parts.len())]).collect()));
        texts.push("ab".repeat(600_000));
        let texts: Vec<&str> = texts.iter().map(|text| &text[..]).collect();
        for threads in [1, 2, 7] {
            let Documents { runs, lengths } = encoder.encode_documents(&texts, threads, || true).unwrap();
            let ids = runs.concat();
            let mut start = 0;
            assert_eq!(lengths.len(), texts.len());
            for (text, len) in texts.iter().zip(lengths) {
                assert!(ids[start..start + len] == encoder.encode(text).unwrap());
                start += len;
            }
            assert_eq!(start, ids.len());
        }
    }

    #[test]
    fn ranks_that_make_no_tokenizer_are_errors() {
        let bytes: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
        let with = |extra: &[u8]| Encoder::new(&[bytes.clone(), vec![extra.into()]].concat(), DEFAULT_PATTERN);
        assert!(matches!(with(b""), Err(Error::Ranks(_))));
        assert!(matches!(with(b"a"), Err(Error::Ranks(_))));
        assert!(matches!(Encoder::new(&bytes[1..], DEFAULT_PATTERN), Err(Error::Ranks(_))));
        assert_eq!(with(b"ab").unwrap().decode(&[300]), Err(Error::UnknownId(300)));
    }
}
