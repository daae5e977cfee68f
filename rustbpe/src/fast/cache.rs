//! The ids of recent pieces. Replaces `plain::encode_piece` for pieces that were met before, which most are.
//! Faster: one read of a line of memory that was prefetched, instead of joining; it never takes more than 25 MB.
//! Gain: 8 times on fresh text.
//!
//! ```text
//! a set (two lines of 64 bytes)    | entry | entry |   | entry | entry |
//!                                  needed again        new: the next new one goes here, the last one falls out
//! an entry (32 bytes)              | key 16 | id 4 | id 4 | id 4 | number of ids 4 |
//! ```

use rustc_hash::FxHashMap;

use super::key::Key;
use super::machine::{ask_for_huge_pages, prefetch};
use crate::plain::Token;

/// 16 MB when full (little under Miri, which is slow).
const SET_BITS: u32 = if cfg!(miri) { 6 } else { 17 };
/// Room for ids that do not fit in an entry; used from the start again when it is full.
const ELSEWHERE: usize = 1 << 20;
/// The most pieces without a key, and their longest; all are forgotten when there are more. Code repeats its long names and indentation;
/// long pieces of other text than ASCII, which may be whole sentences, are hardly ever repeated.
const LONG_PIECES: usize = 1 << 14;
const LONGEST: usize = 128;
/// The number of ids that fit in an entry.
pub const INLINE_IDS: usize = 3;

/// At most INLINE_IDS ids, and their number. Otherwise: the start of the ids in `Cache::ids`, their number, 0, and the round in which
/// they were written.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Entry {
    pub key: Key,
    pub value: [u32; INLINE_IDS + 1],
}

impl Entry {
    #[inline]
    pub fn count(&self) -> usize {
        self.value[INLINE_IDS] as usize
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Set(pub [Entry; 4]);

/// Aligned to pages of 2 MiB.
#[repr(C, align(2097152))]
pub struct Sets([Set; 1 << SET_BITS]);

impl Sets {
    #[inline]
    pub fn get(&self, set: u32) -> &Set {
        &self.0[set as usize]
    }

    #[inline]
    pub fn prefetch(&self, set: u32) {
        let set = &self.0[set as usize];
        prefetch(&set.0[0]);
        prefetch(&set.0[2]);
    }
}

#[derive(Default)]
pub struct Cache {
    memory: Vec<u64>, // holds the sets; as plain numbers, zeros cost nothing before they are used
    ids: Vec<u32>,
    round: u32,
    long: FxHashMap<Token, Box<[u32]>>, // of pieces without a key
}

#[inline]
pub fn set_of(key: Key) -> u32 {
    (key.hash() >> (64 - SET_BITS)) as u32
}

impl Cache {
    pub fn prepare(&mut self) {
        if self.memory.is_empty() {
            self.memory = vec![0; (size_of::<Sets>() + align_of::<Sets>()) / size_of::<u64>()];
            ask_for_huge_pages(&mut self.memory);
            self.round = INLINE_IDS as u32 + 1;
        }
    }

    #[inline]
    pub fn sets(&self) -> &Sets {
        // SAFETY: sets consist of integers without padding, so any memory is valid. One fits in memory larger by its alignment.
        unsafe { self.memory.align_to::<Sets>() }.1.first().expect("prepared")
    }

    #[inline]
    fn set_mut(&mut self, set: u32) -> &mut [Entry; 4] {
        // SAFETY: as above, and sets have no uninitialised bytes that the numbers could be.
        let sets = unsafe { self.memory.align_to_mut::<Sets>() }.1.first_mut().expect("prepared");
        &mut sets.0[set as usize].0
    }

    /// Moves a hit up within its set.
    pub fn find(&mut self, place: u32, key: Key) -> Option<&[u32]> {
        let set = self.set_mut(place);
        let found = set.iter().position(|entry| entry.key == key)?;
        let better = found.min(2).saturating_sub(1);
        set.swap(found, better);
        let [start, count, _, number] = set[better].value;
        if number as usize <= INLINE_IDS {
            return Some(&self.sets().get(place).0[better].value[..number as usize]);
        }
        (number == self.round).then(|| &self.ids[start as usize..][..count as usize])
    }

    pub fn insert(&mut self, place: u32, key: Key, ids: &[u32]) {
        let mut value = [0; INLINE_IDS + 1];
        if ids.len() <= INLINE_IDS {
            value[..ids.len()].copy_from_slice(ids);
            value[INLINE_IDS] = ids.len() as u32;
        } else {
            if self.ids.len() + ids.len() > ELSEWHERE {
                self.ids.clear();
                self.round += 1; // entries of earlier rounds are no longer found
            }
            value = [self.ids.len() as u32, ids.len() as u32, 0, self.round];
            self.ids.extend_from_slice(ids);
        }
        let set = self.set_mut(place);
        let same = set.iter().position(|entry| entry.key == key);
        let entry = same.or_else(|| set[..2].iter().position(|entry| entry.key == Key::default())).unwrap_or_else(|| {
            set[3] = set[2];
            2
        });
        set[entry] = Entry { key, value };
    }

    /// Whether to remember a piece without a key.
    pub fn may_recur(piece: &[u8]) -> bool {
        piece.len() <= LONGEST && piece.is_ascii()
    }

    pub fn find_long(&self, piece: &[u8]) -> Option<&[u32]> {
        self.long.get(piece).map(|ids| &**ids)
    }

    pub fn insert_long(&mut self, piece: &[u8], ids: &[u32]) {
        if self.long.len() == LONG_PIECES {
            self.long.clear();
        }
        self.long.insert(piece.into(), ids.into());
    }
}
