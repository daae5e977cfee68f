//! Pieces to ids. Replaces `plain::encode_piece`.
//! Faster: parts are ids, and the token that two of them join to is read from a table; no bytes are hashed. The lowest rank among at most
//! 256 is found without a queue. Gain: cold +96 %, fresh +50 %; with a Chinese vocabulary 4 times.

use super::characters::Characters;
use super::key::Key;
use super::{without, Idea};
use crate::plain::{self, Ranks, Token};
use crate::Error;

/// Which two tokens join to which.
///
/// Up to the moment at which a token arises in a piece, no join crosses its borders, so the joins within it are those of its own bytes.
/// A token that arises from older ones thus does so from the same two in every piece, and the table has only those two.
pub struct Joins {
    characters: Characters,
    slots: Vec<u64>, // left, right and the joined token, ID_BITS each; open addressing, at most half full
    bits: Vec<u64>,  // eight for each slot: most requested pairs do not join, and this set, which fits in the cache, rejects them
    used: usize,
    pairs: Box<[u32]>, // what every two ASCII characters join to, without a search
    ranks: Ranks,
    /// The length of the shortest token that is not found by joining, or is longer than a key: joining many bytes takes long.
    shortest: usize,
}

/// Three ids fit in 64 bits, and no ids set all bits.
pub const MAX_TOKENS: usize = (1 << ID_BITS) - 1;
const ID_BITS: u32 = 21;
const EMPTY: u64 = u64::MAX;
const NONE: u32 = u32::MAX;
/// Ids and 256 places fit in 32 bits.
const PLACE_BITS: u32 = 8;
const EIGHT: usize = 8;

impl Joins {
    pub fn new(tokens: &[Token]) -> Result<Self, Error> {
        if tokens.len() > MAX_TOKENS {
            return Err(Error::Ranks(format!("ids up to {} are too large, {} is the largest possible", tokens.len() - 1, MAX_TOKENS - 1)));
        }
        let mut ranks = Ranks::with_capacity_and_hasher(tokens.len(), Default::default());
        for (token, id) in tokens.iter().zip(0..).filter(|(token, _)| !token.is_empty()) {
            if let Some(first) = ranks.insert(token.clone(), id) {
                return Err(Error::Ranks(format!("tokens {first} and {id} are the same bytes")));
            }
        }
        if let Some(byte) = (0..=255).find(|&byte| !ranks.contains_key(&[byte][..])) {
            return Err(Error::Ranks(format!("the single byte {byte} is no token")));
        }
        let (characters, slots, bits) = (Characters::new(|byte| ranks[&[byte][..]]), vec![EMPTY; 16], vec![0; 2]);
        let pairs = [NONE].repeat(1 << 14).into();
        let mut joins = Joins { characters, slots, bits, used: 0, pairs, ranks, shortest: Key::LONGEST + 1 };
        let (mut parts, mut ordered) = (Vec::new(), true);
        for (token, id) in tokens.iter().zip(0..).filter(|(token, _)| token.len() > 1) {
            parts.clear();
            joins.join_few(token, &mut parts);
            if let [left, right] = parts[..] {
                joins.insert(left, right, id);
            } else {
                // It is long, or arises from younger tokens, or never: it may be joined from any two that have its bytes.
                for cut in 1..token.len() {
                    if let [Some(&left), Some(&right)] = [&token[..cut], &token[cut..]].map(|half| joins.ranks.get(half)) {
                        if ordered && left.max(right) > id {
                            ordered = false;
                            joins.characters.forget();
                        }
                        joins.insert(left, right, id);
                    }
                }
                joins.shortest = joins.shortest.min(token.len());
            }
            joins.characters.add(token, id, ordered && parts.len() == 2);
            if let [first @ ..0x80, second @ ..0x80] = token[..] {
                joins.pairs[Self::pair(first, second)] = id;
            }
        }
        Ok(joins)
    }

    #[inline]
    fn hash(&self, key: u64) -> u64 {
        key.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (61 - self.slots.len().trailing_zeros())
    }

    /// The slot of a pair, or the free slot for it.
    #[inline]
    fn place(&self, key: u64, hash: u64) -> usize {
        let mut place = (hash >> 3) as usize;
        while self.slots[place] >> ID_BITS != key && self.slots[place] != EMPTY {
            place = (place + 1) & (self.slots.len() - 1);
        }
        place
    }

    fn insert(&mut self, left: u32, right: u32, joined: u32) {
        if self.used == self.slots.len() / 2 {
            let size = 2 * self.slots.len();
            let old = std::mem::replace(&mut self.slots, vec![EMPTY; size]);
            (self.bits, self.used) = (vec![0; size / 8], 0);
            old.into_iter().filter(|&slot| slot != EMPTY).for_each(|slot| self.put(slot));
        }
        self.put(((left as u64) << ID_BITS | right as u64) << ID_BITS | joined as u64);
    }

    fn put(&mut self, slot: u64) {
        let hash = self.hash(slot >> ID_BITS);
        let place = self.place(slot >> ID_BITS, hash);
        self.bits[hash as usize / 64] |= 1 << (hash % 64);
        self.used += (self.slots[place] == EMPTY) as usize;
        self.slots[place] = slot;
    }

    #[inline]
    fn pair(first: u8, second: u8) -> usize {
        (first as usize) << 7 | second as usize
    }

    /// The token that two tokens join to, or NONE.
    #[inline]
    fn get(&self, left: u32, right: u32) -> u32 {
        let key = (left as u64) << ID_BITS | right as u64;
        let hash = self.hash(key);
        if self.bits[hash as usize / 64] >> (hash % 64) & 1 == 0 {
            return NONE;
        }
        match self.slots[self.place(key, hash)] {
            EMPTY => NONE,
            slot => (slot & ((1 << ID_BITS) - 1)) as u32,
        }
    }

    /// Appends the ids of a piece to `out`.
    #[inline(never)]
    pub fn encode(&self, piece: &[u8], out: &mut Vec<u32>) {
        let whole = if piece.len() < self.shortest { None } else { self.ranks.get(piece) };
        match whole {
            Some(&id) => out.push(id),
            None if without(Idea::Joins) => out.extend(plain::join(&self.ranks, piece)),
            None if self.join_few(piece, out) => {}
            None => out.extend(plain::join(&self.ranks, piece)),
        }
    }

    /// Joins a piece of at most 256 parts; false if it has more.
    fn join_few(&self, piece: &[u8], out: &mut Vec<u32>) -> bool {
        match piece.len() {
            ..=32 => self.join::<{ 32 + EIGHT }>(lowest, piece, out),
            _ => self.join::<{ 256 + EIGHT }>(lowest_of_many, piece, out),
        }
    }

    /// Joins a piece of at most SIZE - EIGHT parts; false if it has more.
    #[inline(always)]
    fn join<const SIZE: usize>(&self, lowest: impl Fn(&[u32; SIZE], usize) -> (u32, usize), piece: &[u8], out: &mut Vec<u32>) -> bool {
        let (mut ids, mut ranks, mut length, mut at) = ([0; SIZE], [NONE; SIZE], 0, 0);
        if piece.len() <= SIZE - EIGHT && piece.is_ascii() {
            // most pieces, without a branch for each character
            (length, at) = (piece.len(), piece.len());
            piece.iter().zip(&mut ids).for_each(|(&byte, id)| *id = self.characters.bytes[byte as usize]);
            piece.windows(2).zip(&mut ranks).for_each(|(two, rank)| *rank = self.pairs[Self::pair(two[0], two[1])]);
        }
        while at < piece.len() {
            if length == SIZE - EIGHT {
                return false;
            }
            let (id, width) = self.characters.first(piece, at);
            ids[length] = id;
            if length > 0 {
                ranks[length - 1] = self.get(ids[length - 1], id);
            }
            (length, at) = (length + 1, at + width);
        }
        while length > 1 {
            let (rank, at) = lowest(&ranks, length);
            if rank == NONE {
                break;
            }
            for from in (at + 2..length).step_by(EIGHT) {
                // of a constant length, which needs no call; beyond the parts there are NONEs
                ids.copy_within(from..from + EIGHT, from - 1);
                ranks.copy_within(from..from + EIGHT, from - 1);
            }
            ids[at] = rank;
            length -= 1;
            ranks[at] = if at + 1 < length { self.get(rank, ids[at + 1]) } else { NONE };
            if at > 0 {
                ranks[at - 1] = self.get(ids[at - 1], rank);
            }
        }
        out.extend_from_slice(&ids[..length]);
        true
    }
}

/// The lowest of the first ranks, NONE if no two parts join, and the leftmost place that has it.
#[inline(always)]
fn lowest<const SIZE: usize>(ranks: &[u32; SIZE], length: usize) -> (u32, usize) {
    let (mut best, mut place) = (NONE, 0);
    for (at, &rank) in ranks[..length].iter().enumerate() {
        if rank < best {
            (best, place) = (rank, at);
        }
    }
    (best, place)
}

/// The same, EIGHT at a time: rank and place are compared as one number.
#[inline(always)]
fn lowest_of_many<const SIZE: usize>(ranks: &[u32; SIZE], length: usize) -> (u32, usize) {
    let lowest = |eight: &[u32], at: u32| eight.iter().zip(at..).map(|(&rank, at)| rank << PLACE_BITS | at).fold(u32::MAX, u32::min);
    let eights = ranks.chunks_exact(EIGHT).zip((0..).step_by(EIGHT)).take(length.div_ceil(EIGHT));
    match eights.map(|(eight, at)| lowest(eight, at)).fold(u32::MAX, u32::min) {
        best if best >> PLACE_BITS == NONE >> PLACE_BITS => (NONE, 0),
        best => (best >> PLACE_BITS, best as usize & ((1 << PLACE_BITS) - 1)),
    }
}
