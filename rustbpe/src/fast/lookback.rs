//! Long pieces to ids. Replaces `plain::encode_piece`.
//! Faster: takes the longest token that fits the one before it, a few steps for each token instead of a search for each join. Two
//! tokens fit if BPE would not join across their border; a piece whose neighbours all fit is what BPE yields, and only that one is.
//! Gain: none measured yet, see NOTES.md.

use super::joins::{Joins, NONE, SHORT};
use super::trie::Trie;
use super::{without, Idea};
use crate::plain;

/// Which tokens join to which.
///
/// Why fitting neighbours suffice: two parts are ever joined only if no earlier join crosses the border of their bytes, so a token
/// always arises from the same two tokens, its halves, as it does from its own bytes alone; a token that does not arise from its own
/// bytes never arises. If a join ever crosses a border between tokens, take the first that does: it joins a part at the end of the
/// left token with a part at the start of the right one, and neither depends on anything beyond those two. So looking at two
/// tokens at a time finds it. For a text there is one such sequence, so a position at which it cannot continue is met once.
///
/// All this needs halves that are older than the whole, which training ensures; other ranks go through `plain`.
pub struct LookBack {
    trie: Trie,
    info: Vec<Info>,
    joins: Joins,
}

/// Of a token.
#[derive(Clone, Copy)]
struct Info {
    halves: [u32; 2],
    shorter: u32, // the longest other token with which it begins, or NONE
    length: u32,
}

impl LookBack {
    /// None for ranks whose halves may be younger than the whole. The rare tokens that do not arise by joining are left out.
    pub fn new(tokens: &[plain::Token], ranks: &plain::Ranks) -> Option<LookBack> {
        if without(Idea::LookBack) || tokens.len() < 256 || tokens[..256].iter().any(|token| token.len() != 1) {
            return None;
        }
        let mut bytes = [0; 256];
        (0..256).for_each(|id| bytes[tokens[id][0] as usize] = id as u32);
        let unknown = Info { halves: [NONE; 2], shorter: NONE, length: 0 };
        let (info, joins) = (vec![unknown; tokens.len()], Joins::new(bytes, tokens.len()));
        let mut all = LookBack { trie: Trie::new(&[]), info, joins };
        for (id, token) in tokens.iter().enumerate() {
            let mut known = (id < 256).then_some([NONE; 2]);
            for cut in 1..token.len() {
                let [Some(&left), Some(&right)] = [&token[..cut], &token[cut..]].map(|half| ranks.get(half)) else { continue };
                let older = |half: u32| (half as usize) < id && all.info[half as usize].length > 0;
                if older(left) && older(right) && all.fit(left, right) {
                    known = Some([left, right]);
                    all.joins.insert(left, right, id as u32);
                    break;
                }
            }
            match known {
                Some(halves) => all.info[id] = Info { halves, shorter: NONE, length: token.len() as u32 },
                None if token.is_empty() || plain::join(ranks, token).len() > 1 => {}
                None => return None, // it arises, but from younger tokens
            }
        }
        let mut sorted: Vec<(&[u8], u32)> = tokens.iter().map(|token| &**token).zip(0..).collect();
        sorted.retain(|&(_, id)| all.info[id as usize].length > 0);
        sorted.sort_unstable();
        let mut beginnings: Vec<(&[u8], u32)> = Vec::new();
        for &(token, id) in &sorted {
            while beginnings.last().is_some_and(|(beginning, _)| !token.starts_with(beginning)) {
                beginnings.pop();
            }
            all.info[id as usize].shorter = beginnings.last().map_or(NONE, |last| last.1);
            beginnings.push((token, id));
        }
        all.trie = Trie::new(&sorted);
        Some(all)
    }

    /// Whether a token arises by joining.
    pub fn arises(&self, id: u32) -> bool {
        self.info[id as usize].length > 0
    }

    /// Whether the bytes of these two tokens, joined by BPE, become these two: undoes the last join on either side of the border
    /// until only bytes are left, and asks at each step whether the two parts at the border would have joined then.
    #[inline]
    fn fit(&self, mut left: u32, mut right: u32) -> bool {
        // When each part ceases to exist. Equal joins happen from left to right.
        let (mut left_until, mut right_until) = (NONE, NONE);
        loop {
            let joined = self.joins.get(left, right);
            if joined < left_until && joined <= right_until && joined != NONE {
                return false;
            }
            if left.max(right) < 256 {
                return true;
            }
            if left > right {
                left_until = left;
                left = self.info[left as usize].halves[1];
            } else {
                right_until = right;
                right = self.info[right as usize].halves[0];
            }
        }
    }

    /// Appends the ids of a piece to `out`. `dead` is memory to work in.
    pub fn encode(&self, piece: &[u8], out: &mut Vec<u32>, dead: &mut Vec<u64>) {
        match piece.len() {
            ..=SHORT if !without(Idea::Short) => self.joins.join_short(piece, out),
            _ => self.encode_long(piece, out, dead),
        }
    }

    pub fn encode_long(&self, piece: &[u8], out: &mut Vec<u32>, dead: &mut Vec<u64>) {
        dead.clear();
        dead.resize(piece.len() / 64 + 1, 0); // the positions at which no token fits
        let (first, mut at) = (out.len(), 0);
        let mut next = self.trie.longest(piece);
        loop {
            let end = at + self.info[next as usize].length as usize;
            let fits = dead[end / 64] >> (end % 64) & 1 == 0 && (at == 0 || self.fit(out[out.len() - 1], next));
            if fits {
                out.push(next);
                if end == piece.len() {
                    return;
                }
                (at, next) = (end, self.trie.longest(&piece[end..]));
                continue;
            }
            next = self.info[next as usize].shorter;
            while next == NONE {
                dead[at / 64] |= 1 << (at % 64);
                debug_assert!(out.len() > first, "every piece has its ids");
                let last = self.info[out.pop().expect("every piece has its ids") as usize];
                (at, next) = (at - last.length as usize, last.shorter);
            }
        }
    }
}
