//! `fast::split` against `plain::split`, for all patterns that are split by hand:
//!
//!     cargo +nightly fuzz run split -- -max_total_time=300 -max_len=300
#![no_main]

use std::sync::LazyLock;

use fancy_regex::Regex;
use libfuzzer_sys::fuzz_target;
use rustbpe::fast::patterns::spellings;
use rustbpe::fast::split::Splitter;
use rustbpe::plain;

static PATTERNS: LazyLock<Vec<(Splitter, Regex)>> = LazyLock::new(|| {
    let gpt4 = spellings::AFTER.iter().map(|(after, _)| format!("{}{}{after}", spellings::BEFORE[0], spellings::NUMBERS[2].0));
    let patterns = gpt4.chain(spellings::GPT2.map(String::from)).chain([spellings::O200K.to_owned()]);
    patterns.map(|pattern| (Splitter::new(&pattern).expect("known"), Regex::new(&pattern).expect("known"))).collect()
});

fuzz_target!(|text: &str| {
    for (splitter, regex) in PATTERNS.iter() {
        let mut pieces = Vec::new();
        splitter.for_each(text, |piece| pieces.push(piece)).expect("split by hand");
        assert_eq!(pieces, plain::split(regex, text).expect("no backtracking"));
        let (before, after) = text.split_at(splitter.border(text.as_bytes(), text.len() / 2));
        let mut parts = Vec::new();
        splitter.for_each(before, |piece| parts.push(piece)).expect("split by hand");
        splitter.for_each(after, |piece| parts.push(piece)).expect("split by hand");
        assert_eq!(parts, pieces);
    }
});
