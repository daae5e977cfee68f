//! The changes of a merge. Replaces the subtractions and additions of `plain::train`, one for each pair of each word.
//! Faster: changes are first summed for each neighbouring token, in arrays, so the table of pairs is read once for each pair that
//! changes and not once for each occurrence. Gain: see slots.rs, which needs it.

use super::pairs::Place;

/// The changes on one side of the merged pair.
pub struct Neighbours {
    of_token: Vec<u32>, // token -> its index in `changes`, or NONE
    pub changes: Vec<Change>,
    pub places: Vec<(u32, Place)>, // of the new pairs, each with its change
}

pub struct Change {
    pub token: u32, // the neighbour
    pub places: u32,
    pub lost: u64,   // occurrences of its pair with the old token
    pub gained: u64, // occurrences of its pair with the new token
    pub next: usize, // position of its next place
}

const NONE: u32 = u32::MAX;

impl Default for Neighbours {
    fn default() -> Self {
        Neighbours { of_token: vec![NONE; 256], changes: Vec::new(), places: Vec::new() }
    }
}

impl Neighbours {
    pub fn add_token(&mut self) {
        self.of_token.push(NONE);
    }

    #[inline]
    pub fn add(&mut self, token: u32, place: Place) {
        let number = &mut self.of_token[token as usize];
        if *number == NONE {
            *number = self.changes.len() as u32;
            self.changes.push(Change { token, places: 0, lost: 0, gained: 0, next: usize::MAX });
        }
        let change = &mut self.changes[*number as usize];
        change.places += 1;
        change.lost += place.weight as u64;
        change.gained += place.weight as u64;
        self.places.push((*number, place));
    }

    pub fn lose_gain(&mut self, token: u32, weight: u32) {
        self.changes[self.of_token[token as usize] as usize].gained -= weight as u64;
    }

    pub fn clear(&mut self) {
        self.changes.iter().for_each(|change| self.of_token[change.token as usize] = NONE);
        self.changes.clear();
        self.places.clear();
    }
}
