//! Text to pieces. Replaces `plain::split`.
//! Faster: the patterns of `patterns` are split by hand, ASCII by masks (window.rs), other text a character at a time (scan.rs).
//! Gain: 15 times on fresh text, 16 times in counting. Any other pattern goes through the regex engine.

use std::ops::Range;
use std::sync::Arc;

use fancy_regex::Regex;

use super::classes::Classes;
use super::machine::prefetch;
use super::patterns::gpt2::Gpt2;
use super::patterns::gpt4::Gpt4;
use super::patterns::o200k::O200k;
use super::patterns::{spellings, Pattern};
use super::scan::Text;
use super::window::Window;
pub use super::window::WINDOW;
use super::{without, Idea};
use crate::Error;

/// The pattern of the package `rustbpe` on PyPI: GPT-4's, with digits in groups of up to three.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Splits a text into the pieces that a pattern matches, in order.
#[derive(Clone)]
pub struct Splitter(pub(crate) Kind);

/// Each splitter has its own classes: a shared table would be initialised at an unknown time, and a process forked at that
/// moment would wait for it forever.
#[derive(Clone)]
pub(crate) enum Kind {
    Gpt4(Gpt4, Arc<Classes>),
    Gpt2(Gpt2, Arc<Classes>),
    O200k(O200k, Arc<Classes>),
    Other(Box<Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        fn classes<P: Pattern>(_: &P) -> Arc<Classes> {
            Arc::new(Classes::new(P::CLASSES))
        }
        if without(Idea::Patterns) {
            return Self::with_regex(pattern);
        }
        Ok(Splitter(match Gpt4::known(pattern) {
            Some(gpt4) => Kind::Gpt4(gpt4, classes(&gpt4)),
            None if spellings::GPT2.contains(&pattern) => Kind::Gpt2(Gpt2, classes(&Gpt2)),
            None if pattern == spellings::O200K => Kind::O200k(O200k, classes(&O200k)),
            None => return Self::with_regex(pattern),
        }))
    }

    /// Always uses the regex engine.
    pub fn with_regex(pattern: &str) -> Result<Self, Error> {
        let regex = Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        Ok(Splitter(Kind::Other(Box::new(regex))))
    }

    pub fn is_by_hand(&self) -> bool {
        !matches!(self.0, Kind::Other(_))
    }

    /// Calls `f` with every non-empty piece. Text that the pattern does not match is dropped, as in tiktoken.
    #[inline]
    pub fn for_each<'t>(&self, text: &'t str, mut f: impl FnMut(&'t str)) -> Result<(), Error> {
        self.for_each_batch(text, |borders| {
            borders.windows(2).for_each(|ends| f(&text[ends[0]..ends[1]]));
            Ok(())
        })
    }

    /// Calls `f` with one to WINDOW pieces at a time, until it returns an error. Its argument is the list of their boundaries.
    #[inline]
    pub fn for_each_batch(&self, text: &str, f: impl FnMut(&[usize]) -> Result<(), Error>) -> Result<(), Error> {
        match &self.0 {
            Kind::Gpt4(pattern, classes) => by_hand(pattern, classes, text, f),
            Kind::Gpt2(pattern, classes) => by_hand(pattern, classes, text, f),
            Kind::O200k(pattern, classes) => by_hand(pattern, classes, text, f),
            Kind::Other(regex) => by_regex(regex, text, f),
        }
    }

    /// The parts of a text, of `size` bytes or a little more, that have the same pieces; all of it if it is not longer than two of them.
    pub fn cut<'t>(&'t self, text: &'t [u8], size: usize) -> impl Iterator<Item = Range<usize>> + 't {
        let mut end = 0;
        std::iter::from_fn(move || {
            let (start, rest) = (end, &text[end..]);
            end += if rest.len() > 2 * size { self.border(rest, size) } else { rest.len() };
            (start < end).then_some(start..end)
        })
    }

    /// The first position, at least `at` bytes from the start, at which the text can be cut without changing its pieces, or its
    /// length if none is known.
    pub fn border(&self, text: &[u8], at: usize) -> usize {
        let may_cut = match self.0 {
            Kind::Gpt4(..) => Gpt4::may_cut,
            Kind::Gpt2(..) => Gpt2::may_cut,
            Kind::O200k(..) => O200k::may_cut,
            Kind::Other(_) => return text.len(),
        };
        (at.max(1)..text.len()).find(|&i| may_cut(text[i - 1], text[i])).unwrap_or(text.len())
    }
}

fn by_regex(regex: &Regex, text: &str, mut f: impl FnMut(&[usize]) -> Result<(), Error>) -> Result<(), Error> {
    for found in regex.find_iter(text) {
        let piece = found.map_err(|e| Error::Split(e.to_string()))?.range();
        if !piece.is_empty() {
            f(&[piece.start, piece.end])?;
        }
    }
    Ok(())
}

#[inline]
fn by_hand<P: Pattern>(pattern: &P, classes: &Classes, text: &str, mut f: impl FnMut(&[usize]) -> Result<(), Error>) -> Result<(), Error> {
    let mut borders = [0; WINDOW + 1];
    let text = Text { bytes: text.as_bytes(), classes };
    while borders[0] < text.bytes.len() {
        let [start, rest @ ..] = &mut borders;
        let pieces = match piece_ends(pattern, text.bytes, *start) {
            0 => {
                rest[0] = pattern.piece_end(&text, *start);
                1
            }
            ends => spread(ends, *start, rest),
        };
        f(&borders[..pieces + 1])?;
        borders[0] = borders[pieces];
    }
    Ok(())
}

/// Text is prefetched this many bytes ahead.
const AHEAD: usize = 512;

/// The ends of the pieces that begin at `start` or later within a window: bit i for `start + i`. None if the text is
/// not ASCII, nearly at its end, or one long piece.
#[inline]
fn piece_ends<P: Pattern>(pattern: &P, text: &[u8], start: usize) -> u64 {
    let rest = &text[start..];
    prefetch(rest.get(AHEAD).unwrap_or(&0));
    if without(Idea::Window) || !rest.first_chunk::<8>().is_some_and(|bytes| bytes.is_ascii()) {
        return 0;
    }
    let mut padded = [0; WINDOW];
    let bytes = rest.first_chunk().unwrap_or_else(|| {
        padded[..rest.len()].copy_from_slice(rest);
        &padded
    });
    let window = Window::read(bytes);
    let len = window.beyond.trailing_zeros().min(rest.len() as u32);
    pattern.starts(window, len, bytes) & !1
}

/// Writes `start` plus the index of each set bit, in ascending order, and returns their number. It always writes whole groups of
/// eight: a loop that ends with the last bit would be mispredicted in nearly every window.
#[inline]
fn spread(mut bits: u64, start: usize, out: &mut [usize; WINDOW]) -> usize {
    let count = bits.count_ones() as usize;
    for group in out.chunks_exact_mut(8).take(count.div_ceil(8)) {
        for place in group {
            *place = start + (bits | 1 << 63).trailing_zeros() as usize;
            bits &= bits.wrapping_sub(1);
        }
    }
    count
}
