//! The pieces in order. Replaces the order of `words` of `plain::train`, which is any.
//! Faster: pieces with the same beginning are neighbours and have pairs in common, so the places of a pair are near each other.
//! Gain: within the noise so far, NOTES.md.

use super::key::Key;
use super::table::Table;
use super::{without, Idea};

/// Distinct words with their counts.
#[derive(Default)]
pub struct Words {
    pub bytes: Vec<u8>, // of all words, each after a byte for the border
    pub words: Vec<Word>,
}

pub struct Word {
    pub length: u32,
    pub weight: u32, // how often it occurs
}

impl Words {
    /// The pieces of all tables, ordered by their first 8 bytes.
    pub fn of(tables: &[Table]) -> Words {
        let mut pieces: Vec<(u64, u64, u64, u32)> = Vec::with_capacity(tables.iter().map(Table::len).sum());
        for (table, number) in tables.iter().zip(0..) {
            for (key, count) in table.pieces() {
                // The tuples contain everything about a short piece, so that its table is not read again.
                let (low, high) = match key.number() {
                    None => (key.low, key.high),
                    Some(_) => (table.beginning(key), key.high),
                };
                pieces.push((low.swap_bytes(), high, count, number));
            }
        }
        if !without(Idea::Order) {
            pieces.sort_unstable();
        }
        let mut words = Words::default();
        for (low, high, count, number) in pieces {
            let key = Key { low: low.swap_bytes(), high };
            words.push(tables[number as usize].piece(key, &mut [0; 16]), count);
        }
        words
    }

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
