//! `fast::encode` against `plain::encode`: the tokens and the text are the input.
//!
//!     cargo +nightly fuzz run encode -- -max_total_time=300 -max_len=400
#![no_main]

use std::sync::LazyLock;

use fancy_regex::Regex;
use libfuzzer_sys::fuzz_target;
use rustbpe::fast::encode::{Encoder, Scratch};
use rustbpe::fast::split::DEFAULT_PATTERN;
use rustbpe::plain::{self, Ranks, Token};

static REGEX: LazyLock<Regex> = LazyLock::new(|| Regex::new(DEFAULT_PATTERN).expect("known"));

fuzz_target!(|input: (Vec<Vec<u8>>, String)| {
    let (merged, text) = input;
    let mut tokens: Vec<Token> = (0..=255u8).map(|byte| Token::from([byte])).collect();
    for token in merged {
        // An empty one is an id without a token.
        if token.is_empty() || !tokens.iter().any(|other| **other == *token) {
            tokens.push(token.into());
        }
    }
    let ranks: Ranks = tokens.iter().cloned().zip(0..).filter(|(token, _)| !token.is_empty()).collect();
    let encoder = Encoder::new(&tokens, DEFAULT_PATTERN).expect("a vocabulary");
    let expected = plain::encode(&ranks, &REGEX, &text).expect("no backtracking");
    let (mut scratch, mut out) = (Scratch::default(), Vec::new());
    encoder.encode_into(&text, &mut out, &mut scratch).expect("a text");
    encoder.encode_into(&text, &mut out, &mut scratch).expect("a text"); // from the cache
    assert_eq!(out, [expected.clone(), expected].concat());
    assert_eq!(encoder.decode(&out).expect("known ids"), [text.as_bytes(), text.as_bytes()].concat());
});
