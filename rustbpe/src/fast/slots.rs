//! The words. Replaces `words` and `merge` of `plain::train`.
//! Faster: all words lie end to end, a slot for each byte, and nothing moves when tokens are merged, so a place stays valid for good.
//! Gain: of 256 places at once and of slots of two bytes, within the noise so far.
//!
//! ```text
//! slots of " the", " cat":   | .   ' ' t   h   e   .   ' ' c   a   t   .   |   a border before, between and after the words
//! "th" becomes token 256:    | .   ' ' 256 256 e   .   ' ' c   a   t   .   |
//! "the" becomes token 257:   | .   ' ' 257 .   257 .   ' ' c   a   t   .   |   a token's id in its first and its last slot
//! ```
//!
//! So the token before a place is read from the slot before it, and the one after it from the slot at its end.

use super::machine::ask_for_huge_pages;
use super::neighbours::Neighbours;
use super::pairs::{key, Key, Place};
use super::words::Words;
use super::{without, Idea};

/// Words to count between calls of `keep_going`.
const CHECK_EVERY: usize = 256;
/// Places that are read together, without a branch, to have many loads in flight.
const AT_ONCE: usize = 256;

/// A token's id; BORDER inside tokens and between words, so that no pair spans two. Two bytes are enough up to 65,536 tokens.
pub trait Slot: Copy + PartialEq {
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

pub struct Slots<S> {
    slots: Vec<S>,
    words: Words,
    lengths: Vec<u32>, // of each token, in slots
}

impl<S: Slot> Slots<S> {
    pub fn new(mut words: Words) -> Self {
        let mut slots = Vec::with_capacity(words.bytes.len() + 1);
        ask_for_huge_pages(slots.spare_capacity_mut());
        slots.extend(std::mem::take(&mut words.bytes).into_iter().map(|byte| S::of(byte as u32)));
        let mut at = 0;
        for word in &words.words {
            slots[at] = S::BORDER;
            at += word.length as usize + 1;
        }
        slots.push(S::BORDER);
        Slots { slots, words, lengths: vec![1; 256] }
    }

    /// Calls `f` for all pairs of neighbours, with their places. None if `keep_going` ended it.
    pub fn for_each_pair(&self, keep_going: impl Fn() -> bool, mut f: impl FnMut(Key, Place)) -> Option<()> {
        let mut start = 1;
        for (number, word) in self.words.words.iter().enumerate() {
            if number % CHECK_EVERY == 0 && !keep_going() {
                return None;
            }
            let (mut at, mut token) = (start, self.slots[start].token());
            loop {
                let next = at + self.lengths[token as usize] as usize;
                if self.slots[next] == S::BORDER {
                    break;
                }
                let right = self.slots[next].token();
                f(key(token, right), Place { at: at as u32, weight: word.weight });
                (at, token) = (next, right);
            }
            start += word.length as usize + 1;
        }
        Some(())
    }

    /// Replaces `a b` by the next token at all of these places where it still is, and sums up what that changes on both sides.
    pub fn replace(&mut self, a: u32, b: u32, places: &[Place], [left, right]: [&mut Neighbours; 2]) {
        let Slots { slots, lengths, .. } = self;
        let new = lengths.len() as u32;
        let (len_a, len_b) = (lengths[a as usize] as usize, lengths[b as usize] as usize);
        lengths.push((len_a + len_b) as u32);
        left.add_token();
        right.add_token();
        let (a, b, new) = (S::of(a), S::of(b), S::of(new));
        let mut live = [Place::default(); AT_ONCE];
        for places in places.chunks(if without(Idea::AtOnce) { 1 } else { AT_ONCE }) {
            let mut count = 0;
            for &place in places {
                let at = place.at as usize;
                live[count] = place;
                count += ((slots[at] == a) & (slots[at + len_a] == b)) as usize;
            }
            for &place in &live[..count] {
                let at = place.at as usize;
                if slots[at] != a || slots[at + len_a] != b {
                    continue; // `a a a`: the middle one belongs to the previous token
                }
                let end = at + len_a + len_b;
                slots[at + len_a - 1] = S::BORDER;
                slots[at + len_a] = S::BORDER;
                slots[at] = new;
                slots[end - 1] = new;
                let before = slots[at - 1];
                if before == new {
                    // `(a b) a b`: the pair (new, a) that was just added no longer exists.
                    right.lose_gain(a.token(), place.weight);
                }
                if before != S::BORDER {
                    let before = before.token();
                    left.add(before, Place { at: place.at - lengths[before as usize], ..place });
                }
                if slots[end] != S::BORDER {
                    right.add(slots[end].token(), place);
                }
            }
        }
    }
}
