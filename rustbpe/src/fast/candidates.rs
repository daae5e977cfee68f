//! The queue of pairs. Replaces the heap of `plain::train`, whose lazy correction it keeps.
//! Faster: most candidates are never needed in order, so they wait unsorted in buckets by their counts, and only the topmost bucket is
//! a heap. Gain: merging +19 %.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::pairs::{Key, Pair};
use super::{without, Idea};

/// The most frequent first, then the smallest pair; and its number.
type Candidate = (u64, Reverse<Key>, u32);

/// Counts only fall, so a candidate may be too high but never too low: it is corrected when its bucket, or the candidate itself,
/// reaches the top.
pub struct Candidates {
    buckets: Vec<Vec<Candidate>>,
    top: usize,
    heap: BinaryHeap<Candidate>, // of the bucket `top` and above
}

impl Default for Candidates {
    fn default() -> Self {
        let buckets = Self::bucket_of(u64::MAX) + 1;
        let top = if without(Idea::Buckets) { 0 } else { buckets };
        Candidates { buckets: vec![Vec::new(); buckets], top, heap: BinaryHeap::new() }
    }
}

impl Candidates {
    /// Eight buckets between a power of two and the next.
    #[inline]
    fn bucket_of(count: u64) -> usize {
        let shift = (63 - (count | 8).leading_zeros()) - 3;
        (8 * shift as u64 + (count >> shift)) as usize
    }

    #[inline]
    pub fn push(&mut self, pair: &Pair, number: usize) {
        let candidate = (pair.count, Reverse(pair.key), number as u32);
        match Self::bucket_of(pair.count) {
            bucket if bucket < self.top => self.buckets[bucket].push(candidate),
            _ => self.heap.push(candidate),
        }
    }

    /// The number of the pair with the highest count, if that is at least `floor`.
    pub fn pop(&mut self, pairs: &[Pair], floor: u64) -> Option<usize> {
        loop {
            while let Some((count, _, number)) = self.heap.pop() {
                match &pairs[number as usize] {
                    pair if pair.count == count => return Some(number as usize),
                    pair if pair.count >= floor => self.push(pair, number as usize),
                    _ => {}
                }
            }
            while self.top > Self::bucket_of(floor) && self.heap.is_empty() {
                self.top -= 1;
                for (_, _, number) in std::mem::take(&mut self.buckets[self.top]) {
                    let pair = &pairs[number as usize];
                    if pair.count >= floor {
                        self.push(pair, number as usize);
                    }
                }
            }
            if self.heap.is_empty() {
                return None;
            }
        }
    }
}
