//! `'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,n}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+`
//! as masks. Replaces `plain::split` for the pattern of GPT-4, Llama 3, Qwen and zangchat.
//! Faster and gain: see window.rs.

use super::Pattern;
use crate::fast::classes::Class;
use crate::fast::scan::{contraction_length, Text};
use crate::fast::window::{Window, WINDOW};

#[derive(Clone, Copy)]
pub struct Gpt4 {
    pub max_digits: usize,
    pub end_is_one: bool,
}

/// The starts without those of contractions, the runs of symbols that are pieces from their first symbol on, and the line breaks
/// that belong to symbols before them.
#[inline]
pub fn starts_of(window: &Window, others: u64, max_digits: usize) -> (u64, u64, u64) {
    let Window { letters, digits, spaces, newlines, blanks, .. } = *window;
    let gaps = spaces & !newlines; // these may precede a word

    // ` ?[^\s\p{L}\p{N}]++[\r\n]*`: a run of symbols, with the space before it and the line breaks after it.
    let runs = others & !(others << 1) & !(blanks << 1);
    let behind = newlines & (others << 1);
    let taken = newlines & !newlines.wrapping_add(behind); // the sum clears the runs of line breaks that begin `behind`

    // `[^\r\n\p{L}\p{N}]?+\p{L}+`: words, which take a gap or a lone symbol that has no space before it.
    let words = letters & !(letters << 1);
    let mut starts = 1 | runs | (words & !((gaps | runs) << 1));

    // `\p{N}{1,n}`
    let mut group = digits & !(digits << 1);
    while group != 0 {
        starts |= group;
        for _ in 0..max_digits {
            group = (group << 1) & digits;
        }
    }

    // White space not taken by symbols: one piece up to its last line break, then one of all gaps but the last,
    // which starts the next piece.
    let free = spaces & !taken;
    starts |= (free & !(free << 1)) | (gaps & !(spaces >> 1));
    let mut indents = gaps & ((newlines & !taken) << 1);
    while indents != 0 {
        let indent = indents & indents.wrapping_neg();
        indents ^= indent;
        let end = gaps.wrapping_add(indent) & !gaps; // the bit after these gaps
        if end & newlines == 0 {
            starts |= indent;
        }
    }
    (starts, runs, taken)
}

impl Pattern for Gpt4 {
    const CLASSES: &'static [(&'static str, Class)] = &[(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)];

    #[inline]
    fn starts(&self, window: Window, len: u32, bytes: &[u8; WINDOW]) -> u64 {
        let (window, others) = window.cut(len);
        let (mut starts, runs, _) = starts_of(&window, others, self.max_digits);
        // `'(?i:[sdmt]|ll|ve|re)` ends inside a word.
        let mut quotes = runs & window.quotes & (window.letters >> 1);
        while quotes != 0 {
            let next = quotes.trailing_zeros() as usize + 1;
            quotes &= quotes - 1;
            if let Some(length) = contraction_length(&bytes[next..]) {
                starts |= 1u64.checked_shl((next + length) as u32).unwrap_or(0);
            }
        }
        window.certain(starts, len)
    }

    #[inline]
    fn piece_end(&self, text: &Text, start: usize) -> usize {
        let (class, width) = text.look(start);
        let next = start + width;
        match class {
            Class::Letter => return text.run_end(next, |class| class == Class::Letter),
            Class::Number => return text.digits_end(next, self.max_digits),
            Class::Space if text.is_newline(start) => {}
            _ => {
                let contraction = (text.bytes[start] == b'\'').then(|| contraction_length(&text.bytes[next..])).flatten();
                if let Some(length) = contraction {
                    return next + length;
                }
                let after = text.look(next).0;
                if after == Class::Letter {
                    return text.run_end(next, |class| class == Class::Letter);
                }
                if class == Class::Other || after == Class::Other && text.bytes[start] == b' ' {
                    let mut at = text.run_end(next, |class| class == Class::Other);
                    while text.is_newline(at) {
                        at += 1;
                    }
                    return at;
                }
            }
        }
        match text.spaces(start) {
            (end, ..) if self.end_is_one && end == text.bytes.len() => end,
            _ => text.spaces_end(start),
        }
    }

    /// Between a letter and a space, and between a line feed and a character other than white space.
    #[inline]
    fn may_cut(before: u8, next: u8) -> bool {
        match before {
            // The other white space is U+0085 and U+00A0, and U+1680 to U+3000, which begin with these bytes.
            b'\n' => !matches!(next, b'\t'..=b'\r' | b' ' | 0xc2 | 0xe1..=0xe3),
            _ => next == b' ' && before.is_ascii_alphabetic(),
        }
    }
}
