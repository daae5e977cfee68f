//! Byte-level BPE in its plainest form: read this first.
//!
//! 1. A pattern cuts a text into pieces (" the", "'s", "42"); no token ever spans two pieces.
//! 2. Training counts the distinct pieces, starts with the 256 bytes as tokens, and repeatedly turns the most frequent pair of
//!    neighbouring tokens into a new token, until the vocabulary is large enough.
//! 3. Encoding joins the neighbours of a piece that became a token earliest, until none join. A token's id is its rank.
//!
//! Everything in `fast` computes the same and is tested against this file.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use fancy_regex::Regex;
use rustc_hash::FxHashMap;

use crate::Error;

pub type Token = Box<[u8]>;
pub type Ranks = FxHashMap<Token, u32>; // a map with a faster hash
type Pair = (u32, u32);

/// The non-empty matches of the pattern. Text that it does not match is dropped, as in tiktoken.
pub fn split<'t>(pattern: &Regex, text: &'t str) -> Result<Vec<&'t str>, Error> {
    let pieces = pattern.find_iter(text).map(|found| found.map(|piece| piece.as_str()));
    let pieces = pieces.filter(|piece| !matches!(piece, Ok("")));
    pieces.collect::<Result<_, _>>().map_err(|e| Error::Split(e.to_string()))
}

/// How often each distinct piece occurs.
pub fn count(pattern: &Regex, texts: &[&str]) -> Result<HashMap<Token, u64>, Error> {
    let mut counts = HashMap::new();
    for text in texts {
        for piece in split(pattern, text)? {
            *counts.entry(piece.as_bytes().into()).or_insert(0) += 1;
        }
    }
    Ok(counts)
}

/// The tokens in the order of their ids: the bytes, then the merges; fewer than `vocab_size` if no pair is left. Among equally
/// frequent pairs, the smallest pair of ids is merged first.
pub fn train(counts: &HashMap<Token, u64>, vocab_size: usize) -> Vec<Token> {
    let mut tokens: Vec<Token> = (0..=255u8).map(|byte| Box::from([byte])).collect();
    let mut words: Vec<(Vec<u32>, u64)> = counts.iter().map(|(word, &n)| (word.iter().map(|&b| b.into()).collect(), n)).collect();
    let mut frequency: HashMap<Pair, u64> = HashMap::new();
    let mut found_in: HashMap<Pair, HashSet<usize>> = HashMap::new();
    for (number, (ids, n)) in words.iter().enumerate() {
        for pair in pairs_of(ids) {
            *frequency.entry(pair).or_default() += n;
            found_in.entry(pair).or_default().insert(number);
        }
    }
    let mut queue: BinaryHeap<(u64, Reverse<Pair>)> = frequency.iter().map(|(&pair, &n)| (n, Reverse(pair))).collect();
    while tokens.len() < vocab_size {
        let Some((n, Reverse(pair))) = queue.pop() else { break };
        // The queue is corrected only here: other merges may have made the pair rarer in the meantime, but never more frequent.
        let now = frequency[&pair];
        if n > now {
            queue.extend((now > 0).then_some((now, Reverse(pair))));
            continue;
        }
        let new = tokens.len() as u32;
        tokens.push([&*tokens[pair.0 as usize], &*tokens[pair.1 as usize]].concat().into());
        let mut added = HashSet::new();
        for number in found_in.remove(&pair).unwrap_or_default() {
            let (ids, n) = &mut words[number];
            for pair in pairs_of(ids) {
                *frequency.get_mut(&pair).expect("counted before") -= *n;
            }
            merge(ids, pair, new);
            for pair in pairs_of(ids) {
                *frequency.entry(pair).or_default() += *n;
                if pair.0 == new || pair.1 == new {
                    found_in.entry(pair).or_default().insert(number);
                    added.insert(pair);
                }
            }
        }
        queue.extend(added.into_iter().map(|pair| (frequency[&pair], Reverse(pair))));
    }
    tokens
}

fn pairs_of(ids: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    ids.windows(2).map(|pair| (pair[0], pair[1]))
}

/// Replaces every occurrence of `pair`, from the left.
fn merge(ids: &mut Vec<u32>, pair: Pair, new: u32) {
    let mut at = 0;
    while at + 1 < ids.len() {
        if (ids[at], ids[at + 1]) == pair {
            ids[at] = new;
            ids.remove(at + 1);
        }
        at += 1;
    }
}

/// The ids of a text.
pub fn encode(ranks: &Ranks, pattern: &Regex, text: &str) -> Result<Vec<u32>, Error> {
    Ok(split(pattern, text)?.into_iter().flat_map(|piece| encode_piece(ranks, piece.as_bytes())).collect())
}

/// A piece that is a token is that token; otherwise its bytes are joined.
pub fn encode_piece(ranks: &Ranks, piece: &[u8]) -> Vec<u32> {
    match ranks.get(piece) {
        Some(&id) => vec![id],
        None => join(ranks, piece),
    }
}

/// Starts with single bytes, and joins the neighbours whose joined bytes have the lowest rank, the leftmost first, until no two
/// neighbours join.
pub fn join(ranks: &Ranks, piece: &[u8]) -> Vec<u32> {
    // The end of the part that starts at each position, and the start of the part that ends there.
    let mut end: Vec<usize> = (1..=piece.len()).collect();
    let mut start: Vec<usize> = (0..=piece.len()).map(|at| at.saturating_sub(1)).collect();
    let candidate = |left, middle, right| Some(Reverse((*ranks.get(&piece[left..right])?, left, middle, right)));
    let mut queue: BinaryHeap<_> = (2..=piece.len()).filter_map(|right| candidate(right - 2, right - 1, right)).collect();
    while let Some(Reverse((_, left, middle, right))) = queue.pop() {
        if end[left] != middle || end[middle] != right {
            continue; // one of the two parts has been joined with another
        }
        (end[left], end[middle], start[right]) = (right, usize::MAX, left);
        if left > 0 {
            queue.extend(candidate(start[left], left, right));
        }
        if right < piece.len() {
            queue.extend(candidate(left, right, end[right]));
        }
    }
    let (mut ids, mut at) = (Vec::new(), 0);
    while at < piece.len() {
        ids.push(ranks[&piece[at..end[at]]]);
        at = end[at];
    }
    ids
}

/// The bytes of some ids. An id without a token has no bytes in `tokens`.
pub fn decode(tokens: &[Token], ids: &[u32]) -> Result<Vec<u8>, Error> {
    let token_of = |id| tokens.get(id as usize).filter(|token| !token.is_empty());
    let tokens = ids.iter().map(|&id| token_of(id).ok_or(Error::UnknownId(id)));
    Ok(tokens.collect::<Result<Vec<_>, _>>()?.into_iter().flat_map(|token| token.iter().copied()).collect())
}
