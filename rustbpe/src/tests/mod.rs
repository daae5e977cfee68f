//! Everything in `fast` against `plain`, on random and on odd input. FUZZ_CASES=1000000 runs that many cases of each kind.

mod count;
mod encode;
mod split;
mod train;

use crate::plain::{Ranks, Token};

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

pub fn bytes_and(merged: impl IntoIterator<Item = Vec<u8>>) -> Vec<Token> {
    (0..=255u8).map(|byte| vec![byte]).chain(merged).map(Token::from).collect()
}

pub fn ranks_of(tokens: &[Token]) -> Ranks {
    tokens.iter().cloned().zip(0..).filter(|(token, _)| !token.is_empty()).collect()
}
