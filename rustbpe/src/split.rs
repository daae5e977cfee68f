//! Splitting text into pieces.
//!
//! The GPT-4-style pattern is split by hand: one pass over the bytes, one table look-up per character, no
//! backtracking. Any other pattern goes through fancy-regex. The character classes come from regex-syntax, the
//! tables that fancy-regex itself uses, so both ways agree on every code point.

use std::sync::OnceLock;

use fancy_regex::Regex;

use crate::Error;

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
    Gpt4 { max_digits: usize },
    Other(Box<Regex>),
}

impl Splitter {
    pub fn new(pattern: &str) -> Result<Self, Error> {
        let digits = pattern.strip_prefix(BEFORE_DIGITS).and_then(|rest| rest.strip_suffix(AFTER_DIGITS));
        Ok(Splitter(match digits {
            Some("1") => Kind::Gpt4 { max_digits: 1 },
            Some("2") => Kind::Gpt4 { max_digits: 2 },
            Some("3") => Kind::Gpt4 { max_digits: 3 },
            _ => return Self::with_regex(pattern),
        }))
    }

    /// Always through the regex engine: the slow twin of the hand-written splitter.
    pub fn with_regex(pattern: &str) -> Result<Self, Error> {
        let regex = Regex::new(pattern).map_err(|e| Error::Pattern(e.to_string()))?;
        Ok(Splitter(Kind::Other(Box::new(regex))))
    }

    /// Calls `f` with every non-empty piece. What the pattern does not match is dropped, as tiktoken does.
    pub fn for_each<'t>(&self, text: &'t str, mut f: impl FnMut(&'t str)) -> Result<(), Error> {
        match &self.0 {
            Kind::Gpt4 { max_digits } => {
                let scanner = Scanner { bytes: text.as_bytes(), classes: classes(), max_digits: *max_digits };
                let mut start = 0;
                while start < text.len() {
                    let end = scanner.piece_end(start);
                    f(&text[start..end]);
                    start = end;
                }
            }
            Kind::Other(regex) => {
                for found in regex.find_iter(text) {
                    let piece = found.map_err(|e| Error::Split(e.to_string()))?.as_str();
                    if !piece.is_empty() {
                        f(piece);
                    }
                }
            }
        }
        Ok(())
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

/// Code point -> class in two steps: the block of 256 code points, then the place in it.
struct Classes {
    block_of: Vec<u16>,
    blocks: Vec<[Class; 256]>,
}

fn classes() -> &'static Classes {
    static TABLE: OnceLock<Classes> = OnceLock::new();
    TABLE.get_or_init(Classes::build)
}

impl Classes {
    fn build() -> Self {
        let mut flat = vec![Class::Other; 0x110000];
        for (pattern, class) in [(r"\p{L}", Class::Letter), (r"\p{N}", Class::Number), (r"\s", Class::Space)] {
            let hir = regex_syntax::parse(pattern).expect("a constant pattern");
            let regex_syntax::hir::HirKind::Class(regex_syntax::hir::Class::Unicode(set)) = hir.kind() else {
                unreachable!("{pattern} is a Unicode class");
            };
            for range in set.ranges() {
                flat[range.start() as usize..=range.end() as usize].fill(class);
            }
        }
        let mut blocks: Vec<[Class; 256]> = Vec::new();
        let mut block_of = Vec::with_capacity(flat.len() / 256);
        for chunk in flat.chunks_exact(256) {
            let block: [Class; 256] = chunk.try_into().expect("256 code points");
            let known = blocks.iter().position(|b| *b == block);
            block_of.push(known.unwrap_or(blocks.len()) as u16);
            if known.is_none() {
                blocks.push(block);
            }
        }
        Classes { block_of, blocks }
    }

    #[inline]
    fn of(&self, code_point: u32) -> Class {
        self.blocks[self.block_of[(code_point >> 8) as usize] as usize][(code_point & 0xff) as usize]
    }
}

struct Scanner<'t> {
    bytes: &'t [u8], // valid UTF-8, and positions are always on a character boundary
    classes: &'static Classes,
    max_digits: usize,
}

impl Scanner<'_> {
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
            Class::Letter => self.run_end(Class::Letter, next),
            Class::Number => self.digits_end(next),
            Class::Other => {
                if self.bytes[start] == b'\'' {
                    if let Some(end) = self.contraction_end(next) {
                        return end;
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

    /// `'(?i:[sdmt]|ll|ve|re)` after the apostrophe. Case folding makes the long s (U+017F) an s.
    fn contraction_end(&self, at: usize) -> Option<usize> {
        let lower = |i: usize| self.bytes.get(at + i).map_or(0, u8::to_ascii_lowercase);
        match (lower(0), lower(1)) {
            (b's' | b'd' | b'm' | b't', _) => Some(at + 1),
            (b'l', b'l') | (b'v', b'e') | (b'r', b'e') => Some(at + 2),
            (0xc5, 0xbf) => Some(at + 2),
            _ => None,
        }
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
        assert!(matches!(Splitter::new(DEFAULT_PATTERN).unwrap().0, Kind::Gpt4 { max_digits: 3 }));
        let two = DEFAULT_PATTERN.replace("{1,3}", "{1,2}");
        assert!(matches!(Splitter::new(&two).unwrap().0, Kind::Gpt4 { max_digits: 2 }));
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
        let alphabet: Vec<char> = "aZſé中한1٣²½ \t\n\r\u{a0}\u{3000}\u{85}'lLvVeErRsStTdDmMkK!?.-_\"\u{301}😀\u{200d}".chars().collect();
        let mut state = 1u64;
        let mut draw = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for digits in ["{1,1}", "{1,2}", "{1,3}"] {
            let pattern = DEFAULT_PATTERN.replace("{1,3}", digits);
            let (hand, engine) = (Splitter::new(&pattern).unwrap(), Splitter::with_regex(&pattern).unwrap());
            for _ in 0..20_000 {
                let text: String = (0..draw(12)).map(|_| alphabet[draw(alphabet.len())]).collect();
                assert_eq!(pieces(&hand, &text), pieces(&engine, &text), "{text:?}");
            }
        }
    }

    #[test]
    fn a_bad_pattern_is_an_error() {
        assert!(matches!(Splitter::new("("), Err(Error::Pattern(_))));
    }
}
