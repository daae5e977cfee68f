//! `fast::train` against `plain::train`, and that against counting all pairs again for every merge.

use std::cmp::Reverse;
use std::collections::HashMap;

use super::{cases, draws};
use crate::fast::slots::{Slot, Slots};
use crate::fast::train::{check_vocab_size, train_above};
use crate::plain::{self, Token};
use crate::Error;

fn slots_of<S: Slot>(words: &[(&str, u64)]) -> Slots<S> {
    let mut all = Slots::default();
    words.iter().for_each(|(word, count)| all.push(word.as_bytes(), *count));
    all
}

fn tokens(words: &[(&str, u64)], vocab_size: usize) -> Vec<Token> {
    train_above::<u16>(1, slots_of(words), vocab_size, |_| true).unwrap()
}

fn by_recounting(words: &[(&str, u64)], vocab_size: usize) -> Vec<Token> {
    let mut words: Vec<(Vec<u32>, u64)> = words.iter().map(|&(w, n)| (w.bytes().map(u32::from).collect(), n)).collect();
    let mut tokens: Vec<Token> = (0..=255u8).map(|byte| Box::from([byte])).collect();
    while tokens.len() < vocab_size {
        let mut counts: HashMap<(u32, u32), u64> = HashMap::new();
        for (ids, n) in &words {
            for pair in ids.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += n;
            }
        }
        let Some((&(a, b), _)) = counts.iter().max_by_key(|&(&pair, &count)| (count, Reverse(pair))) else { break };
        let new = tokens.len() as u32;
        tokens.push([&*tokens[a as usize], &*tokens[b as usize]].concat().into());
        for (ids, _) in &mut words {
            let mut at = 0;
            while at + 1 < ids.len() {
                if (ids[at], ids[at + 1]) == (a, b) {
                    ids[at] = new;
                    ids.remove(at + 1);
                }
                at += 1;
            }
        }
    }
    tokens
}

#[test]
fn merges_as_plain_does_and_as_recounting_does() {
    let mut draw = draws(3);
    for case in 0..cases(4_000) {
        let letters = 1 + case % 4;
        let mut words: Vec<(String, u64)> = (0..1 + draw(12))
            .map(|_| ((0..1 + draw(24)).map(|_| (b'a' + draw(letters) as u8) as char).collect(), 1 + draw(3) as u64))
            .collect();
        words.sort();
        words.dedup_by(|a, b| a.0 == b.0);
        let words: Vec<(&str, u64)> = words.iter().map(|(word, count)| (word.as_str(), *count)).collect();
        let floor = [1, 2, 1 + draw(40) as u64][case % 3];
        let expected = plain::train(&words.iter().map(|&(word, count)| (word.as_bytes().into(), count)).collect(), 300);
        assert_eq!(by_recounting(&words, 300), expected, "{words:?}");
        let found = match draw(2) {
            0 => train_above::<u16>(floor, slots_of(&words), 300, |_| true),
            _ => train_above::<u32>(floor, slots_of(&words), 300, |_| true),
        };
        assert_eq!(found.unwrap(), expected, "above {floor}: {words:?}");
    }
}

#[test]
fn ties_go_to_the_smallest_pair_of_ids() {
    assert_eq!(*tokens(&[("zy", 1), ("ab", 1), ("ba", 1)], 257)[256], *b"ab");
}

#[test]
fn counts_beyond_32_bits() {
    assert_eq!(*tokens(&[("ab", 1 << 33), ("cd", (1 << 33) + 1)], 257)[256], *b"cd");
}

#[test]
fn nothing_to_merge_leaves_the_bytes() {
    assert_eq!(tokens(&[], 300).len(), 256);
    assert_eq!(tokens(&[("a", 5)], 300).len(), 256);
    assert_eq!(tokens(&[("ab", 5)], 300).len(), 257);
    assert!(matches!(check_vocab_size(255), Err(Error::Setting(_))));
}

#[test]
fn training_can_be_interrupted() {
    assert_eq!(train_above::<u16>(1, slots_of(&[("abcdefgh", 1)]), 300, |_| false), Err(Error::Interrupted));
}
