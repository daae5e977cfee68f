//! ASCII text to masks, 64 bytes at a time. Replaces the regex engine under `plain::split` for ASCII text.
//! Faster: the ends of 64 bytes' pieces are computed at once, with no branch for each word, whose end is hard to predict.
//! Gain: fresh +156 %, counting +162 %.

use wide::{i8x16, CmpEq, CmpGt, CmpLt};

/// The number of bytes examined, and of pieces passed on, at a time.
pub const WINDOW: usize = 64;

/// Bit sets of the bytes (bit i for byte i of 64) in each class of ASCII characters.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Window {
    pub letters: u64,
    pub uppers: u64, // capital letters, which are letters, too
    pub digits: u64,
    pub spaces: u64, // all white space, including line breaks
    pub newlines: u64,
    pub blanks: u64, // only ' '
    pub quotes: u64, // the apostrophe
    pub beyond: u64, // not ASCII
}

impl Window {
    #[inline]
    pub fn read(bytes: &[u8; WINDOW]) -> Self {
        let mut masks = Window::default();
        for start in (0..WINDOW).step_by(16) {
            let x = i8x16::from(std::array::from_fn(|i| bytes[start + i] as i8)); // what is not ASCII is negative
            let equal = |to: u8| x.cmp_eq(i8x16::splat(to as i8));
            let among = |x: i8x16, first: u8, last: u8| x.cmp_gt(i8x16::splat(first as i8 - 1)) & x.cmp_lt(i8x16::splat(last as i8 + 1));
            let mask = |found: i8x16| (found.move_mask() as u64) << start;
            masks.letters |= mask(among(x | i8x16::splat(0x20), b'a', b'z'));
            masks.uppers |= mask(among(x, b'A', b'Z'));
            masks.digits |= mask(among(x, b'0', b'9'));
            masks.spaces |= mask(equal(b' ') | among(x, b'\t', b'\r'));
            masks.newlines |= mask(equal(b'\n') | equal(b'\r'));
            masks.blanks |= mask(equal(b' '));
            masks.quotes |= mask(equal(b'\''));
            masks.beyond |= mask(x);
        }
        masks
    }

    /// Only the first `len` bytes (1 to 64, all ASCII): the classes that rules are made of, and the symbols, which have no other class.
    #[inline]
    pub fn cut(self, len: u32) -> (Window, u64) {
        let valid = u64::MAX >> (64 - len);
        let others = valid & !(self.letters | self.digits | self.spaces);
        let (letters, digits, spaces) = (self.letters & valid, self.digits & valid, self.spaces & valid);
        let (newlines, blanks) = (self.newlines & valid, self.blanks & valid);
        (Window { letters, digits, spaces, newlines, blanks, ..self }, others)
    }

    /// Those of the starts that are certain: white space at the end may continue after it, so only the first start in it is.
    #[inline]
    pub fn certain(&self, starts: u64, len: u32) -> u64 {
        let open = (self.spaces << (64 - len)).leading_ones().max(1);
        starts & u64::MAX >> (63 - (len - open))
    }
}

/// The bits from `at` on; none if `at` is 64.
#[inline]
pub fn from(at: u32) -> u64 {
    u64::MAX.checked_shl(at).unwrap_or(0)
}
