//! The patterns of other tokenizers, in all spellings that match the same.

use super::gpt4::Gpt4;

/// Spellings of the parts before and after the numbers, which match the same.
pub const BEFORE: [&str; 3] = [
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
];
pub const NUMBERS: [(&str, usize); 7] = [
    (r"\p{N}", 1),
    (r"\p{N}{1,1}", 1),
    (r"\p{N}{1,2}", 2),
    (r"\p{N}{1,3}", 3),
    (r"\p{N}{1,1}+", 1),
    (r"\p{N}{1,2}+", 2),
    (r"\p{N}{1,3}+", 3),
];
/// In the last, cl100k's, white space at the end of the text is one piece.
pub const AFTER: [(&str, bool); 3] = [
    (r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+", false),
    (r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", false),
    (r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s", true),
];

/// Of GPT-2, r50k and p50k.
pub const GPT2: [&str; 3] = [
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
];

pub const O200K: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);

impl Gpt4 {
    pub fn known(pattern: &str) -> Option<Gpt4> {
        let middle = |before: &str, after: &str| pattern.strip_prefix(before).and_then(|rest| rest.strip_suffix(after));
        BEFORE.iter().find_map(|before| {
            AFTER.iter().find_map(|&(after, end_is_one)| {
                let numbers = middle(before, after)?;
                let &(_, max_digits) = NUMBERS.iter().find(|(spelling, _)| *spelling == numbers)?;
                Some(Gpt4 { max_digits, end_is_one })
            })
        })
    }
}
