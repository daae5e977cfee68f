//! Everything in `fast` against `plain`, on random and on odd input. FUZZ_CASES=1000000 runs that many cases of each kind.

mod count;
mod encode;
mod split;
mod train;

use fancy_regex::Regex;

use crate::fast::split::{Splitter, DEFAULT_PATTERN};
use crate::plain::{self, Ranks, Token};

/// Random numbers below the argument.
pub fn draws(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    }
}

/// The number of cases of a test: under Miri, which is slow, a few.
pub fn cases(usual: usize) -> usize {
    let usual = if cfg!(miri) { usual / 200 + 1 } else { usual };
    std::env::var("FUZZ_CASES").map_or(usual, |cases| cases.parse().expect("a number"))
}

pub fn pieces<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    let mut found = Vec::new();
    splitter.for_each(text, |piece| found.push(piece)).unwrap();
    found
}

pub type Split = Box<dyn Fn(&str) -> Vec<&str>>;

/// `plain::split` by the default pattern; under Miri, for which the regex engine is too slow, by hand, which gives the same pieces
/// (split.rs).
pub fn plain_split() -> Split {
    if cfg!(miri) {
        let hand = Splitter::new(DEFAULT_PATTERN).unwrap();
        return Box::new(move |text| pieces(&hand, text));
    }
    let engine = Regex::new(DEFAULT_PATTERN).unwrap();
    Box::new(move |text| plain::split(&engine, text).unwrap())
}

pub fn plain_ids(ranks: &Ranks, pieces: Vec<&str>) -> Vec<u32> {
    pieces.into_iter().flat_map(|piece| plain::encode_piece(ranks, piece.as_bytes())).collect()
}

pub fn bytes_and(merged: impl IntoIterator<Item = Vec<u8>>) -> Vec<Token> {
    (0..=255u8).map(|byte| vec![byte]).chain(merged).map(Token::from).collect()
}

pub fn ranks_of(tokens: &[Token]) -> Ranks {
    tokens.iter().cloned().zip(0..).filter(|(token, _)| !token.is_empty()).collect()
}
