//! `fast::split` and the patterns against `plain::split`.

use fancy_regex::Regex;

use super::{cases, draws, pieces};
use crate::fast::classes::Classes;
use crate::fast::patterns::o200k::O200k;
use crate::fast::patterns::{spellings, Pattern};
use crate::fast::scan::Text;
use crate::fast::split::{Kind, Splitter, DEFAULT_PATTERN};
use crate::fast::threads::in_parallel;
use crate::fast::window::Window;
use crate::{plain, Error};

/// The pieces, without windows.
fn slowly<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
    fn pieces<'t>(pattern: &impl Pattern, classes: &Classes, text: &'t str) -> Vec<&'t str> {
        let (all, mut start, mut found) = (Text { bytes: text.as_bytes(), classes }, 0, Vec::new());
        while start < text.len() {
            let end = pattern.piece_end(&all, start);
            found.push(&text[start..end]);
            start = end;
        }
        found
    }
    match &splitter.0 {
        Kind::Gpt4(pattern, classes) => pieces(pattern, classes, text),
        Kind::Gpt2(pattern, classes) => pieces(pattern, classes, text),
        Kind::O200k(pattern, classes) => pieces(pattern, classes, text),
        Kind::Other(_) => unreachable!("no pattern that is split by hand"),
    }
}

/// Every spelling of every pattern that is split by hand.
fn patterns() -> Vec<String> {
    let gpt4 = spellings::BEFORE.iter().flat_map(|before| {
        spellings::AFTER
            .iter()
            .flat_map(move |(after, _)| spellings::NUMBERS.iter().map(move |(numbers, _)| format!("{before}{numbers}{after}")))
    });
    gpt4.chain(spellings::GPT2.map(String::from)).chain([spellings::O200K.to_owned()]).collect()
}

/// One spelling of each behaviour.
fn distinct() -> Vec<String> {
    let gpt4 = |numbers: &str, after: usize| format!("{}{numbers}{}", spellings::BEFORE[0], spellings::AFTER[after].0);
    let ours = [r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,3}"].map(|numbers| gpt4(numbers, 0));
    ours.into_iter().chain([gpt4(r"\p{N}{1,3}", 2), spellings::GPT2[0].to_owned(), spellings::O200K.to_owned()]).collect()
}

#[test]
#[cfg_attr(miri, ignore = "too many")]
fn known_patterns_are_split_by_hand() {
    assert_eq!(patterns().len(), 67);
    assert!(patterns().iter().all(|pattern| Splitter::new(pattern).unwrap().is_by_hand()));
    assert!(patterns().contains(&DEFAULT_PATTERN.to_owned()));
    assert!(!Splitter::new(r"\w+").unwrap().is_by_hand());
}

/// Many neighbourhoods: those of white space, words, contractions, numbers and symbols, and the ends of the text.
const AROUND: [(&str, &str); 12] = [
    ("", ""),
    ("a", "b"),
    ("A", "Bc"),
    (" ", "a"),
    ("'", "1"),
    ("1 ", " \n"),
    ("!", "\r\n/"),
    ("x'", "S"),
    ("\u{301}", "A"),
    ("中", "\u{301}"),
    ("\n \t", "  "),
    (" !'", "'lL"),
];

fn splits_alike(pattern: &str, around: &[(&str, &str)], characters: &[char]) {
    let (hand, engine) = (Splitter::new(pattern).unwrap(), Regex::new(pattern).unwrap());
    for &(before, after) in around {
        // Texts hold many characters, far enough apart not to interact: a call for each would take minutes.
        for characters in characters.chunks(256) {
            let text: String = characters.iter().map(|c| format!("{before}{c}{after}\n-a")).collect();
            assert_eq!(pieces(&hand, &text), plain::split(&engine, &text).unwrap(), "{before:?} {after:?}, {pattern}");
        }
    }
}

/// The lengths of its pieces tell the class of a character.
fn in_revealing_places(character: char) -> String {
    format!("a{character}b\n!!{character}!\n{character}Aa\n{character}\n-a")
}

#[test]
fn revealing_places_tell_all_classes_apart() {
    let hand = Splitter::new(spellings::O200K).unwrap();
    let of_each = ['Ა', 'ა', 'ꙮ', '\u{20dd}', '⑴', '\u{2003}', '→'];
    let lengths =
        of_each.map(|character| pieces(&hand, &in_revealing_places(character)).iter().map(|piece| piece.len()).collect::<Vec<_>>());
    assert!((0..7).all(|i| !lengths[..i].contains(&lengths[i])), "{lengths:?}");
}

/// Both sides know a character above U+017F only by the sets that contain it. So every code point is put once, for each table of sets,
/// where the pieces tell its set; then all characters up to U+017F, and one of each class from every 256 code points, in all
/// neighbourhoods and patterns.
#[test]
#[cfg_attr(miri, ignore = "too many")]
fn every_code_point_in_every_neighbourhood_as_the_regex_engine_does() {
    let all: Vec<char> = (0..=char::MAX as u32).filter_map(char::from_u32).collect();
    let classes = Classes::new(O200k::CLASSES);
    let mut some: Vec<char> = all[..0x180].to_vec();
    for block in all[0x180..].chunks(256) {
        let mut seen = Vec::new();
        for &character in block {
            let class = classes.of(character as u32);
            if !seen.contains(&class) {
                seen.push(class);
                some.push(character);
            }
        }
    }
    let (patterns, tables) = (distinct(), [DEFAULT_PATTERN, spellings::O200K]);
    in_parallel(0..2, |half| {
        let (hand, engine) = (Splitter::new(tables[half]).unwrap(), Regex::new(tables[half]).unwrap());
        for characters in all.chunks(256) {
            let text: String = characters.iter().map(|&character| in_revealing_places(character)).collect();
            assert_eq!(pieces(&hand, &text), plain::split(&engine, &text).unwrap(), "{:?} {}", characters[0], tables[half]);
        }
        patterns.iter().skip(half).step_by(2).for_each(|pattern| splits_alike(pattern, &AROUND, &some));
        Ok(())
    })
    .unwrap();
}

fn random_text(draw: &mut impl FnMut(usize) -> usize, case: usize) -> String {
    // Short texts of odd characters, and long, mostly ASCII ones that windows cut at every position.
    let odd: Vec<char> =
        "aAZſéÉǅʰ中한1٣²½ \t\n\r\u{a0}\u{3000}\u{85}'lLvVeErRsStTdDmMkK!?.-_/\"\u{301}\u{903}😀\u{200d}\0".chars().collect();
    let plain: Vec<char> = "abcdefghlvestmABCS  \n\n\t\r'''..!/(1234".chars().collect();
    let mut text = String::new();
    let (length, one_odd_in) = if case % 4 > 0 { (draw(14), 1) } else { (draw(170), 1 + draw(100)) };
    while text.len() < length {
        let alphabet = if draw(one_odd_in) == 0 { &odd } else { &plain };
        let times = [1, 1, 1, 1, 1, 1, 2, 3, 5, draw(80)][draw(10)]; // runs, some as long as a window
        text.extend(std::iter::repeat_n(alphabet[draw(alphabet.len())], times));
    }
    text
}

#[test]
#[cfg_attr(miri, ignore = "too slow")]
fn random_texts_as_the_regex_engine_does() {
    let mut draw = draws(1);
    let patterns = patterns();
    for pattern in &patterns {
        let (hand, engine) = (Splitter::new(pattern).unwrap(), Regex::new(pattern).unwrap());
        let usual = if distinct().contains(pattern) { 10_000 } else { 1_000 };
        for case in 0..cases(usual) / if usual == 1_000 { 10 } else { 1 } {
            let text = random_text(&mut draw, case);
            assert_eq!(pieces(&hand, &text), plain::split(&engine, &text).unwrap(), "{text:?}, {pattern}");
        }
    }
}

#[test]
fn a_character_at_a_time_as_in_windows() {
    let mut draw = draws(4);
    for pattern in distinct() {
        let hand = Splitter::new(&pattern).unwrap();
        for case in 0..cases(5_000) {
            let text = random_text(&mut draw, case);
            assert_eq!(pieces(&hand, &text), slowly(&hand, &text), "{text:?}, {pattern}");
        }
    }
}

#[test]
fn a_text_cut_at_a_border_has_the_same_pieces() {
    let alphabet: Vec<char> = "aBabab'sab     '\n\n\n\r\t!/1é中\u{85}\u{a0}\u{1680}\u{2003}\u{3000}\u{301}😀".chars().collect();
    let mut draw = draws(2);
    for pattern in distinct() {
        let hand = Splitter::new(&pattern).unwrap();
        let mut cuts = 0;
        for _ in 0..cases(20_000) {
            let text: String = (0..draw(20)).map(|_| alphabet[draw(alphabet.len())]).collect();
            let cut = hand.border(text.as_bytes(), draw(8));
            cuts += (cut < text.len()) as usize;
            assert_eq!([pieces(&hand, &text[..cut]), pieces(&hand, &text[cut..])].concat(), pieces(&hand, &text), "{text:?} at {cut}");
        }
        assert!(cuts > cases(20_000) / 10, "{cuts} {pattern}");
    }
    assert_eq!(Splitter::with_regex(DEFAULT_PATTERN).unwrap().border(b"a b", 0), 3);
}

#[test]
fn windows_tell_the_classes_of_their_bytes() {
    for byte in (0..=255u8).step_by(if cfg!(miri) { 37 } else { 1 }) {
        for place in 0..64 {
            let mut bytes = [b'a'.wrapping_add(byte); 64];
            bytes[place] = byte;
            let of = |is: fn(u8) -> bool| (0..64).filter(|&at| is(bytes[at])).fold(0, |mask, at| mask | 1 << at);
            let expected = Window {
                letters: of(|byte| byte.is_ascii_alphabetic()),
                uppers: of(|byte| byte.is_ascii_uppercase()),
                digits: of(|byte| byte.is_ascii_digit()),
                spaces: of(|byte| byte.is_ascii() && char::from(byte).is_whitespace()),
                newlines: of(|byte| matches!(byte, b'\r' | b'\n')),
                blanks: of(|byte| byte == b' '),
                quotes: of(|byte| byte == b'\''),
                beyond: of(|byte| !byte.is_ascii()),
            };
            assert_eq!(Window::read(&bytes), expected, "{byte} at {place}");
        }
    }
}

#[test]
fn a_bad_pattern_is_an_error() {
    assert!(matches!(Splitter::new("("), Err(Error::Pattern(_))));
}
