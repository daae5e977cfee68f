//! `fast::encode` and `fast::documents` against `plain`.

use fancy_regex::Regex;

use super::{bytes_and, cases, draws, plain_ids, plain_split, ranks_of};
use crate::fast::documents::Documents;
use crate::fast::encode::{Encoder, Scratch};
use crate::fast::split::DEFAULT_PATTERN;
use crate::plain::{self, Token};
use crate::Error;

fn encoder(merged: &[&str]) -> Encoder {
    Encoder::new(&bytes_and(merged.iter().map(|token| token.as_bytes().to_vec())), DEFAULT_PATTERN).unwrap()
}

const LETTERS: [char; 12] = ['a', 'b', 'c', 'd', 'é', 'è', '中', '丬', '下', '가', 'ม', '😀'];

/// Vocabularies of three kinds: trained, trained with tokens between that do not arise by joining, and any. Some of their tokens
/// begin and end within characters.
fn random_tokens(draw: &mut impl FnMut(usize) -> usize, case: usize) -> Vec<Token> {
    let letters = 1 + draw(4);
    let word = |draw: &mut dyn FnMut(usize) -> usize, longest: usize| -> Vec<u8> {
        let word: String = (0..2 + draw(longest)).map(|_| LETTERS[(case + draw(letters)) % LETTERS.len()]).collect();
        word.into_bytes()
    };
    let words = (0..1 + draw(12)).map(|_| (word(draw, 20).into(), 1 + draw(5) as u64)).collect();
    let mut tokens = match case % 3 {
        2 => bytes_and([]),
        _ => plain::train(&words, 256 + draw(60)),
    };
    for _ in 0..if case % 3 == 0 { 0 } else { draw(9) } {
        let word = word(draw, 6);
        let start = draw(word.len() - 1);
        let new: Token = word[start..start + 2 + draw(word.len() - start - 1)].into();
        if !tokens.contains(&new) {
            let at = 256 + draw(tokens.len() - 255);
            tokens.insert(at, new);
        }
    }
    if draw(3) == 0 {
        tokens.insert(256 + draw(tokens.len() - 255), Token::default()); // an id without a token, as in p50k
    }
    tokens
}

#[test]
fn random_pieces_with_random_vocabularies_as_plain_does() {
    let (mut draw, split) = (draws(7), plain_split());
    for case in 0..cases(20_000) / 20 {
        let tokens = random_tokens(&mut draw, case);
        let (ranks, encoder) = (ranks_of(&tokens), Encoder::new(&tokens, DEFAULT_PATTERN).unwrap());
        let mut scratch = Scratch::default();
        for _ in 0..20 {
            let longest = [4, 14, 20, 100, 900][draw(5)];
            let text: String = (0..draw(longest))
                .map(|_| if draw([12, 1_000][case % 2]) == 0 { ' ' } else { LETTERS[(case + draw(5)) % LETTERS.len()] })
                .collect();
            let expected = plain_ids(&ranks, split(&text));
            let mut out = Vec::new();
            encoder.encode_into(&text, &mut out, &mut scratch).unwrap();
            assert_eq!(out, expected, "{text:?} with {:?}", &tokens[256..]);
            encoder.encode_into(&text, &mut out, &mut scratch).unwrap();
            assert_eq!(out[expected.len()..], expected, "remembered {text:?} with {:?}", &tokens[256..]);
            assert_eq!(encoder.decode(&out[..expected.len()]).unwrap(), text.as_bytes());
            assert_eq!(plain::decode(&tokens, &expected).unwrap(), text.as_bytes());
        }
    }
}

/// Ranks without order between halves and wholes, with whole-piece tokens, and with bytes that come last.
#[test]
fn odd_vocabularies_as_plain_does() {
    let split = plain_split();
    let mut bytes_last: Vec<Token> = vec![Token::from(*b"ab"), Token::from(*b"abab")];
    bytes_last.extend(bytes_and([]));
    let of = |merged: &[&str]| bytes_and(merged.iter().map(|token| token.as_bytes().to_vec()));
    let vocabularies = [
        of(&["aa", "bc", "ab", "aaa", "abc", "aaaa", "ca", "abcab"]), // "abc" is only ever a whole piece
        of(&["abc", "ab"]),
        of(&["aa", "aaaa", "aaa"]),
        bytes_last,
    ];
    for tokens in vocabularies {
        let (ranks, encoder) = (ranks_of(&tokens), Encoder::new(&tokens, DEFAULT_PATTERN).unwrap());
        for number in 0..3usize.pow(if cfg!(miri) { 4 } else { 8 }) {
            let text: String = std::iter::successors(Some(number), |n| (*n > 0).then_some(n / 3)).map(|n| ['a', 'b', 'c'][n % 3]).collect();
            assert_eq!(encoder.encode(&text).unwrap(), plain_ids(&ranks, split(&text)), "{text:?}");
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long")]
fn a_cache_that_overflows_forgets_without_error() {
    let tokens = bytes_and(["aa", "ab", "ba", "bab"].map(|token| token.as_bytes().to_vec()));
    let (ranks, engine) = (ranks_of(&tokens), Regex::new(DEFAULT_PATTERN).unwrap());
    let (encoder, mut scratch, mut draw) = (Encoder::new(&tokens, DEFAULT_PATTERN).unwrap(), Scratch::default(), draws(9));
    for _ in 0..60 {
        // 1,000 pieces of 20 to 220 bytes, some of them again
        let words: Vec<String> = (0..800).map(|_| (0..20 + draw(200)).map(|_| ['a', 'b'][draw(2)]).collect()).collect();
        let text: String = (0..1_000).map(|_| format!(" {}", words[draw(800)])).collect();
        let mut out = Vec::new();
        encoder.encode_into(&text, &mut out, &mut scratch).unwrap();
        assert!(out == plain::encode(&ranks, &engine, &text).unwrap());
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long")]
fn a_megabyte_of_one_letter() {
    for (merged, last) in [(&["aa", "aaaa", "aaaaaaaa"][..], [256, b'a' as u32]), (&["aaaaaaaa", "aaaa", "aa"][..], [258, b'a' as u32])] {
        let ids = encoder(merged).encode(&"a".repeat(1_000_003)).unwrap();
        assert_eq!(ids.len(), 125_000 + 2);
        assert_eq!(&ids[125_000..], last);
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long")]
fn documents_come_back_in_order_from_any_number_of_threads() {
    let encoder = encoder(&["ab", "abab", " a", "\n\n"]);
    let mut texts: Vec<String> = (0..5_000).map(|i| "ab ".repeat(i % 97)).collect();
    // Long ones, which threads share, with and without places to cut them
    let (mut draw, parts) = (draws(7), ["ab", " ", "\n", "é", "1", "\u{a0}", "abab"]);
    texts.extend((0..8).map(|_| (0..600_000).map(|_| parts[draw(parts.len())]).collect()));
    texts.push("ab".repeat(600_000));
    let texts: Vec<&str> = texts.iter().map(|text| &text[..]).collect();
    for threads in [1, 2, 7] {
        let Documents { runs, lengths } = encoder.encode_documents(&texts, threads, || true).unwrap();
        let ids = runs.concat();
        let mut start = 0;
        assert_eq!(lengths.len(), texts.len());
        for (text, len) in texts.iter().zip(lengths) {
            assert!(ids[start..start + len] == encoder.encode(text).unwrap());
            start += len;
        }
        assert_eq!(start, ids.len());
    }
}

#[test]
fn ranks_that_make_no_tokenizer_are_errors() {
    let with = |extra: &[u8]| Encoder::new(&bytes_and([extra.to_vec()]), DEFAULT_PATTERN);
    assert!(matches!(with(b"a"), Err(Error::Ranks(_))));
    assert!(matches!(Encoder::new(&bytes_and([])[1..], DEFAULT_PATTERN), Err(Error::Ranks(_))));
    assert_eq!(with(b"ab").unwrap().decode(&[300]), Err(Error::UnknownId(300)));
    assert_eq!(with(b"").unwrap().decode(&[256]), Err(Error::UnknownId(256)));
}
