//! `'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+` as masks.
//! Replaces `plain::split` for the pattern of GPT-2, r50k and p50k. Faster and gain: see window.rs.

use super::Pattern;
use crate::fast::classes::Class;
use crate::fast::scan::Text;
use crate::fast::window::{from, Window, WINDOW};

#[derive(Clone, Copy)]
pub struct Gpt2;

/// After the apostrophe: the number of bytes.
#[inline]
fn contraction_length(rest: &[u8]) -> Option<u32> {
    match rest {
        [b's' | b'd' | b'm' | b't', ..] => Some(1),
        [b'l', b'l', ..] | [b'v', b'e', ..] | [b'r', b'e', ..] => Some(2),
        _ => None,
    }
}

impl Pattern for Gpt2 {
    const CLASSES: &'static [(&'static str, Class)] = &[(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)];

    #[inline]
    fn starts(&self, window: Window, len: u32, bytes: &[u8; WINDOW]) -> u64 {
        let (window, others) = window.cut(len);
        let Window { letters, digits, spaces, blanks, quotes, .. } = window;
        let firsts = (letters & !(letters << 1)) | (digits & !(digits << 1)) | (others & !(others << 1));
        let alone = firsts & !(blanks << 1); // runs that take no space before them
        let mut starts = 1 | alone | (spaces & !(spaces << 1)) | (spaces & !(spaces >> 1));
        let mut quotes = quotes & alone & others;
        while quotes != 0 {
            let quote = quotes.trailing_zeros();
            quotes &= quotes - 1;
            if quote + 3 > len {
                starts &= !from(quote + 1); // what follows may or may not be a contraction
            } else if let Some(length) = contraction_length(&bytes[quote as usize + 1..]) {
                starts = starts & !(2 << quote) | 1u64.checked_shl(quote + 1 + length).unwrap_or(0);
            }
        }
        window.certain(starts, len)
    }

    #[inline]
    fn piece_end(&self, text: &Text, start: usize) -> usize {
        let (class, width) = text.look(start);
        let next = start + width;
        if text.bytes[start] == b'\'' {
            if let Some(length) = contraction_length(&text.bytes[next..]) {
                return next + length as usize;
            }
        }
        let run = if text.bytes[start] == b' ' { text.look(next).0 } else { class };
        match run {
            Class::Letter => return text.run_end(next, |class| class == Class::Letter),
            Class::Number | Class::Other => return text.run_end(next, |class| class == run),
            _ => {}
        }
        match text.spaces(start) {
            (end, _, last) if end == text.bytes.len() || last == start => end,
            (_, _, last) => last,
        }
    }

    /// Between a letter and a space.
    #[inline]
    fn may_cut(before: u8, next: u8) -> bool {
        next == b' ' && before.is_ascii_alphabetic()
    }
}
