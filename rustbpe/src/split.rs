//! Splitting text into pieces.
//!
//! The GPT-4-style pattern is split by hand, in one of two ways that agree on every text; any other pattern goes through
//! fancy-regex. The character classes come from regex-syntax, the tables that fancy-regex itself uses, so all ways
//! agree on every code point.
//!
//! - `Scanner::piece_end` reads a character at a time and finds the end of one piece. It can do all texts.
//! - `Window` classifies up to 64 bytes of ASCII at once, a bit per byte in a mask per class, and computes from the masks where
//!   pieces start in it. A window begins where a piece begins and the pattern never looks back, so nothing is carried
//!   from one window to the next; what the bytes behind its end could change is left to the next window.
//!
//! Performance notes, English text on one core of a 2.5 GHz Xeon:
//! a character at a time 155 MB/s, a mispredicted branch at the end of every word; with windows 700 MB/s; without the
//! check that each piece begins and ends at a character 950 MB/s (Python source 1.3 GB/s). Asking for text 512 bytes ahead makes
//! encoding 4 % faster; bits are spread in groups of eight, which alone gave nothing. Text that is not ASCII goes a
//! character at a time, 300 to 600 MB/s; there a flat table of the first 65,536 code points is a third faster on Chinese than
//! blocks found through an index.
use std::sync::Arc;

use fancy_regex::Regex;

use crate::{prefetch, Error};

/// The pattern of the package `rustbpe` on PyPI: GPT-4's, with digits in groups of up to three.
pub const DEFAULT_PATTERN: &str =
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";
const BEFORE_DIGITS: &str = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,";
const AFTER_DIGITS: &str = r"}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+";

/// Cuts a text into the pieces that a pattern matches, in order.
#[derive(Clone)]
pub struct Splitter(Kind);

#[derive(Clone)]
enum Kind {
    /// The classes belong to the splitter: a table that all share would be made at an unknown moment, and a process forked at that
    /// moment would wait for it forever.
    Gpt4 {
        max_digits: usize,
        classes: Arc<Classes>,
    },
    Other(Box<Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let digits = pattern.strip_prefix(BEFORE_DIGITS).and_then(|rest| rest.strip_suffix(AFTER_DIGITS));
        Ok(Splitter(match digits {
            Some(digits @ ("1" | "2" | "3")) => {
                Kind::Gpt4 { max_digits: digits.parse().expect("a digit"), classes: Arc::new(Classes::build()) }
            }
            _ => return Self::with_regex(pattern),
        }))
    }

    /// Always through the regex engine: the slow twin of the hand-written splitter.
    pub fn with_regex(pattern: &str) -> Result<Self, Error> {
        let regex = Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        Ok(Splitter(Kind::Other(Box::new(regex))))
    }

    /// Calls `f` with every non-empty piece. What the pattern does not match is dropped, as tiktoken does.
    #[inline]
    pub fn for_each<'t>(&self, text: &'t str, mut f: impl FnMut(&'t str)) -> Result<(), Error> {
        self.for_each_batch(text, |borders| {
            borders.windows(2).for_each(|ends| f(&text[ends[0]..ends[1]]));
            Ok(())
        })
    }

    /// Calls `f` with one to WINDOW pieces at a time, until it returns an error: they lie between neighbours of the positions it is given.
    #[inline]
    pub fn for_each_batch(&self, text: &str, mut f: impl FnMut(&[usize]) -> Result<(), Error>) -> Result<(), Error> {
        let mut borders = [0; WINDOW + 1];
        match &self.0 {
            Kind::Gpt4 { max_digits, classes } => {
                let scanner = Scanner { bytes: text.as_bytes(), classes, max_digits: *max_digits };
                while borders[0] < text.len() {
                    let [start, rest @ ..] = &mut borders;
                    let pieces = match scanner.piece_ends(*start) {
                        0 => {
                            rest[0] = scanner.piece_end(*start);
                            1
                        }
                        ends => spread(ends, *start, rest),
                    };
                    f(&borders[..pieces + 1])?;
                    borders[0] = borders[pieces];
                }
            }
            Kind::Other(regex) => {
                let mut pieces = 0;
                for found in regex.find_iter(text) {
                    let piece = found.map_err(|e| Error::Split(e.to_string()))?.range();
                    if piece.is_empty() {
                        continue;
                    }
                    if piece.start != borders[pieces] || pieces == WINDOW {
                        if pieces > 0 {
                            f(&borders[..pieces + 1])?;
                        }
                        (borders[0], pieces) = (piece.start, 0);
                    }
                    pieces += 1;
                    borders[pieces] = piece.end;
                }
                if pieces > 0 {
                    f(&borders[..pieces + 1])?;
                }
            }
        }
        Ok(())
    }
}

/// Bytes that are looked at, and pieces that are handed over, at a time.
pub const WINDOW: usize = 64;
/// Bytes between what is looked at and what is asked for.
const AHEAD: usize = 512;

/// Writes `start` plus the number of each bit that is set, in ascending order, and returns how many there are. Groups of eight are
/// written whole: a loop that ends with the last bit would be mispredicted in nearly every window.
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

impl Splitter {
    /// Where a text may be cut without changing its pieces, `at` bytes from its start or later: its length, if there is
    /// no such place. Known for the pattern that is split by hand: between a letter and a space, and between a line
    /// feed and what is no white space.
    pub fn border(&self, text: &[u8], at: usize) -> usize {
        let borders = |i: &usize| match (text[i - 1], text[*i]) {
            // The other white space is U+0085 and U+00A0, and U+1680 to U+3000, which begin with these bytes.
            (b'\n', next) => !matches!(next, b'\t'..=b'\r' | b' ' | 0xc2 | 0xe1..=0xe3),
            (before, b' ') => before.is_ascii_alphabetic(),
            _ => false,
        };
        match self.0 {
            Kind::Gpt4 { .. } => (at.max(1)..text.len()).find(borders).unwrap_or(text.len()),
            Kind::Other(_) => text.len(),
        }
    }
}

/// Which of 64 bytes belong to a class of ASCII characters: bit i for byte i.
#[derive(Default, Debug, PartialEq, Eq)]
struct Window {
    letters: u64,
    digits: u64,
    spaces: u64, // all white space, line breaks included
    newlines: u64,
    blanks: u64, // ' ' alone
    quotes: u64, // the apostrophe
    beyond: u64, // no ASCII
}

impl Window {
    /// SSE2 belongs to every x86-64.
    #[cfg(target_arch = "x86_64")]
    #[inline]
    fn read(bytes: &[u8; WINDOW]) -> Self {
        use std::arch::x86_64::*;
        let mut masks = Window::default();
        for part in 0..4 {
            // SAFETY: the 16 bytes read are within the 64, at any alignment; the rest is arithmetic on registers.
            unsafe {
                let x = _mm_loadu_si128(bytes.as_ptr().add(16 * part).cast());
                let equal = |to: u8| _mm_cmpeq_epi8(x, _mm_set1_epi8(to as i8));
                // Unsigned y - first < count, by the signed comparison that SSE2 has.
                let among = |y, first: u8, count: u8| {
                    let shifted = _mm_add_epi8(y, _mm_set1_epi8(0x80u8.wrapping_sub(first) as i8));
                    _mm_cmpgt_epi8(_mm_set1_epi8(0x80u8.wrapping_add(count) as i8), shifted)
                };
                let mask = |y| (_mm_movemask_epi8(y) as u32 as u64) << (16 * part);
                let blank = equal(b' ');
                masks.letters |= mask(among(_mm_or_si128(x, _mm_set1_epi8(0x20)), b'a', 26));
                masks.digits |= mask(among(x, b'0', 10));
                masks.spaces |= mask(_mm_or_si128(blank, among(x, b'\t', 5)));
                masks.newlines |= mask(_mm_or_si128(equal(b'\n'), equal(b'\r')));
                masks.blanks |= mask(blank);
                masks.quotes |= mask(equal(b'\''));
                masks.beyond |= mask(x);
            }
        }
        masks
    }

    #[cfg(not(target_arch = "x86_64"))]
    #[inline]
    fn read(bytes: &[u8; WINDOW]) -> Self {
        Self::read_words(bytes)
    }

    /// Eight bytes at a time in a 64-bit register, for other machines.
    #[cfg(any(test, not(target_arch = "x86_64")))]
    fn read_words(bytes: &[u8; WINDOW]) -> Self {
        const ONES: u64 = u64::MAX / 255;
        const HIGH: u64 = 0x80 * ONES;
        let mut masks = Window::default();
        for (part, word) in bytes.chunks_exact(8).enumerate() {
            let x = u64::from_le_bytes(word.try_into().expect("8 bytes"));
            let ascii = !x & HIGH;
            // The high bit of each byte of y (at most 0x7f) that is at least `least`: the sums stay below 0x100.
            let from = |y: u64, least: u8| y + (0x80 - least as u64) * ONES;
            let among = |y: u64, first: u8, count: u8| from(y & !HIGH, first) & !from(y & !HIGH, first + count) & ascii;
            // Gathers the high bits: the products meet in the top byte, each in its own place.
            let mask = |y: u64| ((y & HIGH) >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56 << (8 * part);
            masks.letters |= mask(among(x | (0x20 * ONES), b'a', 26));
            masks.digits |= mask(among(x, b'0', 10));
            masks.spaces |= mask(among(x, b' ', 1) | among(x, b'\t', 5));
            masks.newlines |= mask(among(x, b'\n', 1) | among(x, b'\r', 1));
            masks.blanks |= mask(among(x, b' ', 1));
            masks.quotes |= mask(among(x, b'\'', 1));
            masks.beyond |= mask(x);
        }
        masks
    }

    /// Where pieces start in the first `len` bytes (1 to 64, all ASCII) given that one starts at 0. What the bytes behind
    /// them decide is left out: together with the last start the bits are the ends of whole pieces.
    #[inline]
    fn starts(&self, len: u32, max_digits: usize, bytes: &[u8; WINDOW]) -> u64 {
        let valid = u64::MAX >> (64 - len);
        let (letters, digits, spaces) = (self.letters & valid, self.digits & valid, self.spaces & valid);
        let (newlines, blanks) = (self.newlines & valid, self.blanks & valid);
        let others = valid & !(letters | digits | spaces);
        let gaps = spaces & !newlines; // what may stand in front of a word

        // ` ?[^\s\p{L}\p{N}]++[\r\n]*`: a run of symbols, with the space before it and the line breaks after it.
        let runs = others & !(others << 1);
        let behind = newlines & (others << 1);
        let taken = newlines & !newlines.wrapping_add(behind); // the sum clears the runs of line breaks that begin `behind`

        // `[^\r\n\p{L}\p{N}]?+\p{L}+`: words, which take a gap or a lone symbol that has no space before it.
        let words = letters & !(letters << 1);
        let prefixes = runs & !(blanks << 1) & (letters >> 1);
        let mut starts = 1 | (runs & !(blanks << 1)) | (words & !((gaps | prefixes) << 1));

        // `\p{N}{1,n}`
        let mut group = digits & !(digits << 1);
        while group != 0 {
            starts |= group;
            for _ in 0..max_digits {
                group = (group << 1) & digits;
            }
        }

        // White space: what symbols have not taken is one piece up to its last line break; then all gaps but the last,
        // which starts the next piece.
        let free = spaces & !taken;
        starts |= (free & !(free << 1)) | (gaps & !(spaces >> 1));
        let mut indents = gaps & ((newlines & !taken) << 1);
        while indents != 0 {
            let indent = indents & indents.wrapping_neg();
            indents ^= indent;
            let end = gaps.wrapping_add(indent) & !gaps; // the bit behind these gaps
            if end & newlines == 0 {
                starts |= indent;
            }
        }

        // `'(?i:[sdmt]|ll|ve|re)` ends inside a word.
        let mut quotes = prefixes & self.quotes;
        while quotes != 0 {
            let next = quotes.trailing_zeros() as usize + 1;
            quotes &= quotes - 1;
            if let Some(length) = contraction_length(&bytes[next..]) {
                starts |= 1u64.checked_shl((next + length) as u32).unwrap_or(0);
            }
        }

        // White space at the end may go on behind it: of its starts only the first is certain.
        let open = (spaces << (64 - len)).leading_ones().max(1);
        starts & u64::MAX >> (63 - (len - open))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Other,
    Letter,
    Number,
    Space,
    End,
}

/// Code point -> class.
struct Classes {
    plane: Vec<Class>,              // of the first 65,536, one by one
    ranges: Vec<(u32, u32, Class)>, // first and last code point, of the others; ascending
}

impl Classes {
    fn build() -> Self {
        let mut classes = Classes { plane: vec![Class::Other; 0x10000], ranges: Vec::new() };
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
            let hir = regex_syntax::parse(pattern).expect("a constant pattern");
            let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) = hir.kind() else {
                unreachable!("{pattern} is a Unicode class");
            };
            for range in set.ranges() {
                let (first, last) = (range.start() as u32, range.end() as u32);
                for code_point in first..=last.min(0xffff) {
                    classes.plane[code_point as usize] = class;
                }
                if last > 0xffff {
                    classes.ranges.push((first, last, class));
                }
            }
        }
        classes.ranges.sort_unstable_by_key(|range| range.0);
        classes
    }

    #[inline]
    fn of(&self, code_point: u32) -> Class {
        match self.plane.get(code_point as usize) {
            Some(class) => *class,
            None => self.beyond(code_point),
        }
    }

    #[cold]
    fn beyond(&self, code_point: u32) -> Class {
        match self.ranges[..self.ranges.partition_point(|range| range.0 <= code_point)].last() {
            Some(&(_, last, class)) if code_point <= last => class,
            _ => Class::Other,
        }
    }
}

/// `'(?i:[sdmt]|ll|ve|re)` after the apostrophe: how many bytes. Case folding makes the long s (U+017F) an s.
fn contraction_length(rest: &[u8]) -> Option<usize> {
    let lower = |i: usize| rest.get(i).map_or(0, u8::to_ascii_lowercase);
    match (lower(0), lower(1)) {
        (b's' | b'd' | b'm' | b't', _) => Some(1),
        (b'l', b'l') | (b'v', b'e') | (b'r', b'e') | (0xc5, 0xbf) => Some(2),
        _ => None,
    }
}

struct Scanner<'t> {
    bytes: &'t [u8], // valid UTF-8, and positions are always on a character boundary
    classes: &'t Classes,
    max_digits: usize,
}

impl Scanner<'_> {
    /// Where pieces end that begin at `start` or behind it, as far as a window shows: bit i for `start + i`. None where
    /// the text is not ASCII, nearly at its end, or one long piece.
    #[inline]
    fn piece_ends(&self, start: usize) -> u64 {
        let rest = &self.bytes[start..];
        prefetch(rest.get(AHEAD).unwrap_or(&0));
        if !rest.first_chunk::<8>().is_some_and(|bytes| bytes.is_ascii()) {
            return 0;
        }
        let mut padded = [0; WINDOW];
        let bytes = rest.first_chunk().unwrap_or_else(|| {
            padded[..rest.len()].copy_from_slice(rest);
            &padded
        });
        let window = Window::read(bytes);
        let len = window.beyond.trailing_zeros().min(rest.len() as u32);
        window.starts(len, self.max_digits, bytes) & !1
    }

    /// The class of the character at `at`, and its length in bytes (End and 0 after the text).
    #[inline]
    fn look(&self, at: usize) -> (Class, usize) {
        let Some(&first) = self.bytes.get(at) else { return (Class::End, 0) };
        if first < 0x80 {
            return (self.classes.of(first as u32), 1);
        }
        let tail = |i: usize| (self.bytes[at + i] & 0x3f) as u32;
        let first = first as u32;
        if first < 0xe0 {
            (self.classes.of((first & 0x1f) << 6 | tail(1)), 2)
        } else if first < 0xf0 {
            (self.classes.of((first & 0x0f) << 12 | tail(1) << 6 | tail(2)), 3)
        } else {
            (self.classes.of((first & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3)), 4)
        }
    }

    #[inline]
    fn is_newline(&self, at: usize) -> bool {
        matches!(self.bytes.get(at), Some(b'\r' | b'\n'))
    }

    #[inline]
    fn run_end(&self, class: Class, mut at: usize) -> usize {
        loop {
            let (found, width) = self.look(at);
            if found != class {
                return at;
            }
            at += width;
        }
    }

    /// Where the piece that starts at `start` ends. The alternatives are tried in the pattern's order.
    #[inline]
    fn piece_end(&self, start: usize) -> usize {
        let (class, width) = self.look(start);
        let next = start + width;
        match class {
            Class::Letter => self.run_end(Class::Letter, self.skip_letters(next)),
            Class::Number => self.digits_end(next),
            Class::Other => {
                if self.bytes[start] == b'\'' {
                    if let Some(length) = contraction_length(&self.bytes[next..]) {
                        return next + length;
                    }
                }
                match self.look(next).0 {
                    Class::Letter => self.run_end(Class::Letter, next),
                    _ => self.symbols_end(next),
                }
            }
            Class::Space => {
                if !self.is_newline(start) {
                    match self.look(next).0 {
                        Class::Letter => return self.run_end(Class::Letter, next),
                        Class::Other if self.bytes[start] == b' ' => return self.symbols_end(next),
                        _ => {}
                    }
                }
                self.spaces_end(start)
            }
            Class::End => unreachable!("pieces start inside the text"),
        }
    }

    /// Behind whole windows of ASCII letters: for words that are longer than any word.
    fn skip_letters(&self, mut at: usize) -> usize {
        while self.bytes[at..].first_chunk().is_some_and(|bytes| Window::read(bytes).letters == u64::MAX) {
            at += WINDOW;
        }
        at
    }

    /// `\p{N}{1,n}` after the first.
    fn digits_end(&self, mut at: usize) -> usize {
        for _ in 1..self.max_digits {
            let (class, width) = self.look(at);
            if class != Class::Number {
                break;
            }
            at += width;
        }
        at
    }

    /// The rest of `[^\s\p{L}\p{N}]++[\r\n]*`.
    fn symbols_end(&self, at: usize) -> usize {
        let mut at = self.run_end(Class::Other, at);
        while self.is_newline(at) {
            at += 1;
        }
        at
    }

    /// `\s*[\r\n]|\s+(?!\S)|\s+`: up to the run's last line break; without one, all but the last character (which
    /// goes with the next word), unless the text ends here or that character is all there is.
    fn spaces_end(&self, start: usize) -> usize {
        let (mut at, mut last, mut after_newline) = (start, start, None);
        loop {
            let (class, width) = self.look(at);
            if class != Class::Space {
                break;
            }
            last = at;
            at += width;
            if self.is_newline(last) {
                after_newline = Some(at);
            }
        }
        match after_newline {
            Some(end) => end,
            None if at == self.bytes.len() || last == start => at,
            None => last,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut found = Vec::new();
        splitter.for_each(text, |piece| found.push(piece)).unwrap();
        found
    }

    #[test]
    fn the_default_pattern_is_split_by_hand() {
        assert!(matches!(Splitter::new(DEFAULT_PATTERN).unwrap().0, Kind::Gpt4 { max_digits: 3, .. }));
        let two = DEFAULT_PATTERN.replace("{1,3}", "{1,2}");
        assert!(matches!(Splitter::new(&two).unwrap().0, Kind::Gpt4 { max_digits: 2, .. }));
        assert!(matches!(Splitter::new(r"\w+").unwrap().0, Kind::Other(_)));
    }

    #[test]
    fn every_code_point_in_every_neighbourhood_as_the_regex_engine_does() {
        let hand = Splitter::new(DEFAULT_PATTERN).unwrap();
        let engine = Splitter::with_regex(DEFAULT_PATTERN).unwrap();
        let around = [("", ""), ("a", "b"), (" ", "a"), ("'", "1"), ("1 ", " \n"), ("!", "\r\n")];
        // Texts hold many code points, far enough apart not to meet: a call for each would take minutes.
        let planes_in_use = |block: u32| matches!(block >> 8, 0..=3 | 14);
        for (before, after) in around {
            for block in (0..0x1100u32).filter(|&block| before.is_empty() || planes_in_use(block)) {
                let text: String =
                    (block << 8..(block + 1) << 8).filter_map(char::from_u32).map(|c| format!("{before}{c}{after}\n-a")).collect();
                assert_eq!(pieces(&hand, &text), pieces(&engine, &text), "{before:?} {after:?} block {block:#x}");
            }
        }
    }

    #[test]
    fn random_texts_as_the_regex_engine_does() {
        // Short texts of odd characters, and long ones, nearly all ASCII, that windows cut at every place.
        let odd: Vec<char> = "aZſé中한1٣²½ \t\n\r\u{a0}\u{3000}\u{85}'lLvVeErRsStTdDmMkK!?.-_\"\u{301}😀\u{200d}\0".chars().collect();
        let plain: Vec<char> = "abcdefghlvestm  \n\n\t\r'''..!(1234".chars().collect();
        let cases = std::env::var("FUZZ_CASES").map_or(30_000, |cases| cases.parse().unwrap());
        let mut draw = crate::draws(1);
        for digits in ["{1,1}", "{1,2}", "{1,3}"] {
            let pattern = DEFAULT_PATTERN.replace("{1,3}", digits);
            let (hand, engine) = (Splitter::new(&pattern).unwrap(), Splitter::with_regex(&pattern).unwrap());
            let Kind::Gpt4 { max_digits, classes } = &hand.0 else { panic!("{pattern} is split by hand") };
            for case in 0..cases / 3 {
                let mut text = String::new();
                let (length, one_odd_in) = if case % 4 > 0 { (draw(14), 1) } else { (draw(170), 1 + draw(100)) };
                while text.len() < length {
                    let alphabet = if draw(one_odd_in) == 0 { &odd } else { &plain };
                    let times = [1, 1, 1, 1, 1, 1, 2, 3, 5, draw(80)][draw(10)]; // runs, some as long as a window
                    text.extend(std::iter::repeat_n(alphabet[draw(alphabet.len())], times));
                }
                let found = pieces(&hand, &text);
                assert_eq!(found, pieces(&engine, &text), "{text:?}");
                let scanner = Scanner { bytes: text.as_bytes(), classes, max_digits: *max_digits };
                let mut start = 0;
                for piece in found {
                    start += piece.len();
                    assert_eq!(scanner.piece_end(start - piece.len()), start, "{text:?}");
                }
            }
        }
    }

    #[test]
    fn a_text_cut_at_a_border_has_the_same_pieces() {
        let hand = Splitter::new(DEFAULT_PATTERN).unwrap();
        let alphabet: Vec<char> = "abababab     '\n\n\n\r\t!1é中\u{85}\u{a0}\u{1680}\u{2003}\u{3000}😀".chars().collect();
        let mut draw = crate::draws(2);
        let mut cuts = 0;
        for _ in 0..20_000 {
            let text: String = (0..draw(20)).map(|_| alphabet[draw(alphabet.len())]).collect();
            let cut = hand.border(text.as_bytes(), draw(8));
            cuts += (cut < text.len()) as usize;
            assert_eq!([pieces(&hand, &text[..cut]), pieces(&hand, &text[cut..])].concat(), pieces(&hand, &text), "{text:?} at {cut}");
        }
        assert!(cuts > 5_000);
        assert_eq!(Splitter::with_regex(DEFAULT_PATTERN).unwrap().border(b"a b", 0), 3);
    }

    #[test]
    fn windows_are_read_alike_on_all_machines() {
        for byte in 0..=255u8 {
            for place in 0..64 {
                let mut bytes = [b'a'.wrapping_add(byte); 64];
                bytes[place] = byte;
                assert_eq!(Window::read(&bytes), Window::read_words(&bytes), "{byte} at {place}");
            }
        }
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(matches!(Splitter::new("("), Err(Error::Pattern(_))));
    }
}
