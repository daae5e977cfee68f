//! Text to token ids and back.
//!
//! The rules are tiktoken's: a piece that is a token is that token; otherwise start from single bytes and join
//! the neighbours whose joined bytes have the lowest rank, the leftmost first, until no two neighbours join.
//!
//! Performance notes. Parts are always tokens, so "the rank of the joined bytes" is a function of two ids, and one
//! table of id pairs, built from every way to cut a token in two tokens, answers it without touching bytes; ids and
//! ranks are the same numbers. Short pieces keep their parts in an array that is scanned for the minimum; long
//! ones (a megabyte of one letter is a single piece) use a linked list and a heap, O(n log n). Each thread
//! remembers the ids of the pieces it had to merge.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustc_hash::FxHashMap;

use crate::split::Splitter;
use crate::{in_parallel, runs_of, Error};

const NONE: u32 = u32::MAX;
/// Pieces up to this many bytes are merged by scanning.
const SCAN_LIMIT: usize = 128;
/// What a thread remembers: pieces up to this many bytes, and this many of them.
const CACHE_PIECE: usize = 64;
const CACHE_PIECES: usize = 1 << 16;

/// A vocabulary and its pattern, ready to encode. Immutable: any number of threads may share it.
pub struct Encoder {
    pattern: String,
    splitter: Splitter,
    tokens: Vec<Box<[u8]>>,
    ids: FxHashMap<Box<[u8]>, u32>,
    byte_ids: [u32; 256],
    pairs: FxHashMap<u64, u32>,
}

/// One thread's working memory.
#[derive(Default)]
pub struct Scratch {
    ids: Vec<u32>,
    ranks: Vec<u32>,
    cache: FxHashMap<Box<[u8]>, (u32, u32)>,
    cached_ids: Vec<u32>,
}

/// The ids of a run of documents, end to end, and how many belong to each.
pub struct EncodedRun {
    pub ids: Vec<u32>,
    pub lengths: Vec<usize>,
}

fn pair_key(left: u32, right: u32) -> u64 {
    (left as u64) << 32 | right as u64
}

impl Encoder {
    /// `tokens[id]` are the bytes of a token, and its id is its rank. All 256 single bytes must be there.
    pub fn new(tokens: Vec<Box<[u8]>>, pattern: &str) -> Result<Self, Error> {
        if tokens.len() >= NONE as usize {
            return Err(Error::Ranks(format!("{} tokens are too many", tokens.len())));
        }
        let mut ids = FxHashMap::with_capacity_and_hasher(tokens.len(), Default::default());
        for (id, token) in tokens.iter().enumerate() {
            if token.is_empty() {
                return Err(Error::Ranks(format!("token {id} is empty")));
            }
            if let Some(first) = ids.insert(token.clone(), id as u32) {
                return Err(Error::Ranks(format!("tokens {first} and {id} are the same bytes")));
            }
        }
        let mut byte_ids = [0; 256];
        for (byte, slot) in byte_ids.iter_mut().enumerate() {
            *slot = *ids.get(&[byte as u8][..]).ok_or_else(|| Error::Ranks(format!("the single byte {byte} is no token")))?;
        }
        let mut pairs = FxHashMap::default();
        for (id, token) in tokens.iter().enumerate() {
            for cut in 1..token.len() {
                if let (Some(&left), Some(&right)) = (ids.get(&token[..cut]), ids.get(&token[cut..])) {
                    pairs.insert(pair_key(left, right), id as u32);
                }
            }
        }
        Ok(Encoder { pattern: pattern.to_owned(), splitter: Splitter::new(pattern)?, tokens, ids, byte_ids, pairs })
    }

    /// The vocabulary before any merge: the 256 bytes.
    pub fn bytes_only(pattern: &str) -> Result<Self, Error> {
        Self::new((0..=255u8).map(|byte| Box::from([byte])).collect(), pattern)
    }

    pub fn pattern(&self) -> &str {
        &self.pattern
    }

    pub fn tokens(&self) -> &[Box<[u8]>] {
        &self.tokens
    }

    pub fn split<'t>(&self, text: &'t str) -> Result<Vec<&'t str>, Error> {
        let mut pieces = Vec::new();
        self.splitter.for_each(text, |piece| pieces.push(piece))?;
        Ok(pieces)
    }

    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        let mut out = Vec::new();
        self.encode_into(text, &mut out, &mut Scratch::default())?;
        Ok(out)
    }

    /// Appends the ids of `text` to `out`.
    pub fn encode_into(&self, text: &str, out: &mut Vec<u32>, scratch: &mut Scratch) -> Result<(), Error> {
        self.splitter.for_each(text, |piece| self.encode_piece(piece.as_bytes(), out, scratch))
    }

    /// Appends the ids of one piece.
    pub fn encode_piece(&self, piece: &[u8], out: &mut Vec<u32>, scratch: &mut Scratch) {
        if let Some(&id) = self.ids.get(piece) {
            out.push(id);
            return;
        }
        if piece.len() > SCAN_LIMIT {
            self.merge_long(piece, out);
            return;
        }
        if let Some(&(start, len)) = scratch.cache.get(piece) {
            out.extend_from_slice(&scratch.cached_ids[start as usize..][..len as usize]);
            return;
        }
        self.merge_short(piece, scratch);
        out.extend_from_slice(&scratch.ids);
        if piece.len() <= CACHE_PIECE {
            if scratch.cache.len() >= CACHE_PIECES {
                scratch.cache.clear();
                scratch.cached_ids.clear();
            }
            scratch.cache.insert(piece.into(), (scratch.cached_ids.len() as u32, scratch.ids.len() as u32));
            scratch.cached_ids.extend_from_slice(&scratch.ids);
        }
    }

    #[inline]
    fn joined(&self, left: u32, right: u32) -> u32 {
        self.pairs.get(&pair_key(left, right)).copied().unwrap_or(NONE)
    }

    /// Leaves the ids in `scratch.ids`. O(n^2), with a small constant.
    fn merge_short(&self, piece: &[u8], scratch: &mut Scratch) {
        let Scratch { ids, ranks, .. } = scratch;
        ids.clear();
        ids.extend(piece.iter().map(|&byte| self.byte_ids[byte as usize]));
        ranks.clear(); // ranks[i]: of joining parts i and i+1
        ranks.extend(ids.windows(2).map(|pair| self.joined(pair[0], pair[1])));
        // min_by_key gives the first of equal ranks: the leftmost.
        while let Some((at, &rank)) = ranks.iter().enumerate().min_by_key(|&(_, &rank)| rank) {
            if rank == NONE {
                break;
            }
            ids[at] = rank;
            ids.remove(at + 1);
            ranks.remove(at);
            if at > 0 {
                ranks[at - 1] = self.joined(ids[at - 1], rank);
            }
            if at < ranks.len() {
                ranks[at] = self.joined(rank, ids[at + 1]);
            }
        }
    }

    fn merge_long(&self, piece: &[u8], out: &mut Vec<u32>) {
        let end = piece.len(); // pieces come from a str in memory; positions fit in usize
        let mut ids: Vec<u32> = piece.iter().map(|&byte| self.byte_ids[byte as usize]).collect();
        let mut next: Vec<usize> = (1..=end).collect(); // of each part's first byte
        let mut previous: Vec<usize> = (0..end).map(|at| at.wrapping_sub(1)).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = BinaryHeap::with_capacity(end);
        for at in 1..end {
            let rank = self.joined(ids[at - 1], ids[at]);
            if rank != NONE {
                heap.push(Reverse((rank, at - 1)));
            }
        }
        while let Some(Reverse((rank, left))) = heap.pop() {
            // An entry is out of date when a neighbour has merged since: a part that was swallowed has id NONE.
            let right = next[left];
            if ids[left] == NONE || right >= end || self.joined(ids[left], ids[right]) != rank {
                continue;
            }
            ids[left] = rank;
            ids[right] = NONE;
            let after = next[right];
            next[left] = after;
            if after < end {
                previous[after] = left;
                let rank = self.joined(ids[left], ids[after]);
                if rank != NONE {
                    heap.push(Reverse((rank, left)));
                }
            }
            if left > 0 {
                let before = previous[left];
                let rank = self.joined(ids[before], ids[left]);
                if rank != NONE {
                    heap.push(Reverse((rank, before)));
                }
            }
        }
        out.extend(ids.into_iter().filter(|&id| id != NONE));
    }

    /// Encodes the documents on up to `threads` threads; the runs come back in the documents' order.
    pub fn encode_documents<S: AsRef<str> + Sync>(&self, texts: &[S], threads: usize) -> Result<Vec<EncodedRun>, Error> {
        let runs = runs_of(texts);
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, EncodedRun)>, Error> {
            let mut scratch = Scratch::default();
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&(start, end)) = runs.get(index) else { return Ok(done) };
                let mut run = EncodedRun { ids: Vec::new(), lengths: Vec::with_capacity(end - start) };
                for text in &texts[start..end] {
                    let before = run.ids.len();
                    self.encode_into(text.as_ref(), &mut run.ids, &mut scratch)?;
                    run.lengths.push(run.ids.len() - before);
                }
                done.push((index, run));
            }
        };
        let mut done = in_parallel(threads.min(runs.len()), work)?;
        done.sort_unstable_by_key(|(index, _)| *index);
        Ok(done.into_iter().map(|(_, run)| run).collect())
    }

    /// The bytes that `ids` stand for: not always whole UTF-8 characters.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.tokens.get(id as usize).ok_or(Error::UnknownId(id))?);
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::split::DEFAULT_PATTERN;

    fn encoder(merged: &[&str]) -> Encoder {
        let bytes = (0..=255u8).map(|byte| Box::from([byte]));
        Encoder::new(bytes.chain(merged.iter().map(|token| token.as_bytes().into())).collect(), DEFAULT_PATTERN).unwrap()
    }

    /// The rule, word for word, on bytes.
    fn by_the_rule(encoder: &Encoder, piece: &[u8]) -> Vec<u32> {
        let rank = |bytes: &[u8]| encoder.tokens.iter().position(|token| **token == *bytes);
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
            let (mut out, mut scratch) = (Vec::new(), Scratch::default());
            encoder.encode_piece(&piece, &mut out, &mut scratch);
            assert_eq!(out, expected, "{piece:?}");
            encoder.encode_piece(&piece, &mut out, &mut scratch);
            assert_eq!(out[expected.len()..], expected, "remembered {piece:?}");
            if expected.len() > 1 {
                let mut long = Vec::new();
                encoder.merge_long(&piece, &mut long);
                assert_eq!(long, expected, "heap {piece:?}");
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
        let encoder = encoder(&["ab", "abab"]);
        let texts: Vec<String> = (0..5_000).map(|i| "ab ".repeat(i % 97)).collect();
        for threads in [1, 2, 7] {
            let runs = encoder.encode_documents(&texts, threads).unwrap();
            let lengths: Vec<usize> = runs.iter().flat_map(|run| run.lengths.clone()).collect();
            let ids: Vec<u32> = runs.into_iter().flat_map(|run| run.ids).collect();
            let mut start = 0;
            assert_eq!(lengths.len(), texts.len());
            for (text, len) in texts.iter().zip(lengths) {
                assert_eq!(ids[start..start + len], encoder.encode(text).unwrap());
                start += len;
            }
        }
    }

    #[test]
    fn ranks_that_make_no_tokenizer_are_errors() {
        let bytes: Vec<Box<[u8]>> = (0..=255u8).map(|byte| Box::from([byte])).collect();
        let with = |extra: &[u8]| Encoder::new([bytes.clone(), vec![extra.into()]].concat(), DEFAULT_PATTERN);
        assert!(matches!(with(b""), Err(Error::Ranks(_))));
        assert!(matches!(with(b"a"), Err(Error::Ranks(_))));
        assert!(matches!(Encoder::new(bytes[1..].to_vec(), DEFAULT_PATTERN), Err(Error::Ranks(_))));
        assert_eq!(with(b"ab").unwrap().decode(&[300]), Err(Error::UnknownId(300)));
    }
}
