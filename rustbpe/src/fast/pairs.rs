//! The pairs of neighbours and their places. Replaces `frequency` and `found_in` of `plain::train`.
//! Faster: a pair gains occurrences only while its newer token is being made, in ascending order. So its places are a range of one array,
//! written once, and not a set of its own. Pairs too rare to be merged, which are most, are not tracked. Gain: merging +65 %.

use rustc_hash::FxHashMap;

use super::candidates::Candidates;
use super::machine::ask_for_huge_pages;
use super::neighbours::Neighbours;
use super::slots::{Slot, Slots};

/// (left id, right id), in the order of pairs.
pub type Key = u64;

#[inline]
pub fn key(left: u32, right: u32) -> Key {
    (left as u64) << 32 | right as u64
}

pub fn tokens_of(key: Key) -> (u32, u32) {
    ((key >> 32) as u32, key as u32)
}

pub struct Pair {
    pub key: Key,
    pub count: u64,
    /// The start in `Pairs::places` of the places at which it occurs or once occurred, ascending, and their number.
    start: usize,
    places: u32,
}

/// The slot of a pair's first byte, and the count of its word.
#[derive(Clone, Copy, Default)]
pub struct Place {
    pub at: u32,
    pub weight: u32,
}

/// The number of each pair, or NONE. Pairs of bytes, at first all, need no hash.
struct Numbers {
    bytes: Box<[u32]>,
    others: FxHashMap<Key, u32>,
}

const NONE: u32 = u32::MAX;

impl Default for Numbers {
    fn default() -> Self {
        Numbers { bytes: [NONE].repeat(1 << 16).into(), others: FxHashMap::default() }
    }
}

impl Numbers {
    #[inline]
    fn of(&mut self, key: Key) -> &mut u32 {
        match tokens_of(key) {
            (a @ 0..256, b @ 0..256) => &mut self.bytes[(a << 8 | b) as usize],
            _ => self.others.entry(key).or_insert(NONE),
        }
    }
}

/// Pairs in the order of their first occurrence.
#[derive(Default)]
pub struct Pairs {
    index: FxHashMap<Key, u32>, // the number of each in `list`
    pub list: Vec<Pair>,
    places: Vec<Place>,
}

impl Pairs {
    /// All pairs that occur at least `floor` times. None if `keep_going` ended it.
    pub fn of<S: Slot>(slots: &Slots<S>, floor: u64, keep_going: impl Fn() -> bool) -> Option<Pairs> {
        let (mut pairs, mut numbers) = (Pairs::default(), Numbers::default());
        slots.for_each_pair(&keep_going, |key, place| {
            let number = numbers.of(key);
            if *number == NONE {
                *number = pairs.list.len() as u32;
                pairs.list.push(Pair { key, count: 0, start: 0, places: 0 });
            }
            let pair = &mut pairs.list[*number as usize];
            pair.count += place.weight as u64;
            pair.places += 1;
        })?;
        pairs.list.retain(|pair| pair.count >= floor);
        numbers = Numbers::default();
        let mut end = 0;
        for (number, pair) in pairs.list.iter_mut().enumerate() {
            *numbers.of(pair.key) = number as u32;
            pairs.index.insert(pair.key, number as u32);
            (pair.start, end) = (end, end + pair.places as usize);
        }
        let mut next: Vec<usize> = pairs.list.iter().map(|pair| pair.start).collect();
        pairs.places = Vec::with_capacity(2 * end);
        ask_for_huge_pages(pairs.places.spare_capacity_mut());
        pairs.places.resize(end, Place::default());
        slots.for_each_pair(keep_going, |key, place| {
            if let Some(next) = next.get_mut(*numbers.of(key) as usize) {
                pairs.places[*next] = place;
                *next += 1;
            }
        })?;
        Some(pairs)
    }

    pub fn places(&self, number: usize) -> &[Place] {
        let Pair { start, places, .. } = self.list[number];
        &self.places[start..start + places as usize]
    }

    /// Applies the changes on both sides of a merge of (a, b): (x, a) and (b, y) become rarer, (x, new) and (new, y) are new pairs.
    pub fn apply(&mut self, merged: usize, new: u32, sides: [&mut Neighbours; 2], floor: u64, candidates: &mut Candidates) {
        let (a, b) = tokens_of(self.list[merged].key);
        for (side, is_left) in sides.into_iter().zip([true, false]) {
            let mut end = self.places.len();
            for change in &mut side.changes {
                let x = change.token;
                let (old, fresh) = if is_left { (key(x, a), key(x, new)) } else { (key(b, x), key(new, x)) };
                // (new, a) was never in the table; (a, b) itself is set to zero below.
                if x != new && old != key(a, b) {
                    if let Some(&number) = self.index.get(&old) {
                        self.list[number as usize].count -= change.lost;
                    }
                }
                if change.gained >= floor {
                    let number = self.list.len();
                    self.index.insert(fresh, number as u32);
                    self.list.push(Pair { key: fresh, count: change.gained, start: end, places: change.places });
                    candidates.push(&self.list[number], number);
                    change.next = end;
                    end += change.places as usize;
                }
            }
            self.places.resize(end, Place::default());
            for &(change, place) in &side.places {
                let next = &mut side.changes[change as usize].next;
                if *next != usize::MAX {
                    self.places[*next] = place;
                    *next += 1;
                }
            }
            side.clear();
        }
        self.list[merged].count = 0;
    }
}
