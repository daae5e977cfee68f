//! The pattern of o200k (GPT-4o) as masks. Replaces `plain::split` for it. Faster and gain: see window.rs.
//!
//! It differs from GPT-4's: a word is capitals, then small letters (a capital after a small one starts the next word); combining marks
//! are letters of both kinds, and symbols too; a contraction belongs to the word before it; slashes follow symbols like line breaks.

use super::gpt4::starts_of;
use super::Pattern;
use crate::fast::classes::Class;
use crate::fast::scan::{contraction_length, Text};
use crate::fast::window::{from, Window, WINDOW};

#[derive(Clone, Copy)]
pub struct O200k;

impl Pattern for O200k {
    const CLASSES: &'static [(&'static str, Class)] = &[
        (r"[\p{Lu}\p{Lt}]", Class::Upper),
        (r"\p{Ll}", Class::Lower),
        (r"[\p{Lm}\p{Lo}]", Class::Letter),
        (r"\p{M}", Class::Mark),
        (r"\p{N}", Class::Number),
        (r"\s", Class::Space),
    ];

    #[inline]
    fn starts(&self, window: Window, len: u32, bytes: &[u8; WINDOW]) -> u64 {
        let (window, others) = window.cut(len);
        let (mut starts, runs, taken) = starts_of(&window, others, 3);
        let uppers = window.letters & window.uppers;
        starts |= uppers & ((window.letters & !uppers) << 1);
        let (mut quotes, mut contracted) = (runs & window.quotes & (window.letters << 1), 0);
        while quotes != 0 {
            let quote = quotes.trailing_zeros();
            quotes &= quotes - 1;
            if quote == contracted {
                continue; // the letter before it ends a contraction, not a word
            }
            if quote + 3 > len {
                starts &= !from(quote); // what follows may or may not be a contraction
            } else if let Some(length) = contraction_length(&bytes[quote as usize + 1..]) {
                contracted = quote + 1 + length as u32;
                starts = starts & (!from(quote) | from(contracted)) | 1u64.checked_shl(contracted).unwrap_or(0);
            }
        }
        // A slash after the line breaks of symbols, left to `piece_end`.
        let slashes = others & (taken << 1);
        if slashes != 0 && bytes[slashes.trailing_zeros() as usize..].contains(&b'/') {
            starts &= !from(slashes.trailing_zeros());
        }
        window.certain(starts, len)
    }

    #[inline]
    fn piece_end(&self, text: &Text, start: usize) -> usize {
        let (class, width) = text.look(start);
        let next = start + width;
        let word = match class {
            Class::Letter | Class::Upper | Class::Lower => mixed_end(text, start).or_else(|| capitals_end(text, start)),
            Class::Number => return text.digits_end(next, 3),
            Class::Mark => mixed_end(text, next).or_else(|| mixed_end(text, start)),
            Class::Space if text.is_newline(start) => None,
            _ => mixed_end(text, next).or_else(|| capitals_end(text, next)),
        };
        if let Some(end) = word {
            let contraction = (text.bytes.get(end) == Some(&b'\'')).then(|| contraction_length(&text.bytes[end + 1..])).flatten();
            return contraction.map_or(end, |length| end + 1 + length);
        }
        if class == Class::Other || text.bytes[start] == b' ' && text.look(next).0 == Class::Other {
            let mut at = text.run_end(next, |class| matches!(class, Class::Other | Class::Mark));
            while matches!(text.bytes.get(at), Some(b'\r' | b'\n' | b'/')) {
                at += 1;
            }
            return at;
        }
        text.spaces_end(start)
    }

    /// Between a letter and a space, and between a line feed and a character other than white space and a slash.
    #[inline]
    fn may_cut(before: u8, next: u8) -> bool {
        super::gpt4::Gpt4::may_cut(before, next) && next != b'/'
    }
}

/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+` from `at` on: the first part leaves its last character of both sets
/// to the second if no small letter follows.
#[inline]
fn mixed_end(text: &Text, at: usize) -> Option<usize> {
    let (mut end, mut last) = (at, None);
    loop {
        let (class, width) = text.look(end);
        end += width;
        match class {
            Class::Letter | Class::Mark => last = Some(end),
            Class::Upper => {}
            Class::Lower => return Some(text.run_end(end, |class| matches!(class, Class::Lower | Class::Letter | Class::Mark))),
            _ => return last,
        }
    }
}

/// `[\p{Lu}\p{Lt}]+`, all that is left for the second alternative where the first fails.
#[inline]
fn capitals_end(text: &Text, at: usize) -> Option<usize> {
    let end = text.run_end(at, |class| class == Class::Upper);
    (end > at).then_some(end)
}
