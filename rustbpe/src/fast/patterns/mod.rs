//! The patterns that are split by hand. `tests/` compares each with its regex, on every code point in many neighbourhoods.

pub mod gpt2;
pub mod gpt4;
pub mod o200k;
pub mod spellings;

use super::classes::Class;
use super::scan::Text;
use super::window::{Window, WINDOW};

/// A split pattern. A piece never depends on the text before it, so a window begins at the start of a piece and no state is carried on.
pub trait Pattern {
    /// The sets of characters that the pattern tells apart, as regexes.
    const CLASSES: &'static [(&'static str, Class)];

    /// The starts of pieces in the first `len` bytes (1 to 64, all ASCII) given that one starts at 0. Starts that depend on
    /// later bytes are left out: the bits, including the last start, are the ends of whole pieces.
    fn starts(&self, window: Window, len: u32, bytes: &[u8; WINDOW]) -> u64;

    /// The end of the piece that starts at `start`. The alternatives are tried in the pattern's order.
    fn piece_end(&self, text: &Text, start: usize) -> usize;

    /// Whether a text can be cut between these two bytes without changing its pieces: perhaps not everywhere it could be.
    fn may_cut(before: u8, next: u8) -> bool;
}
