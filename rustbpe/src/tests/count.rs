//! `fast::count` against `plain::count`.

use std::collections::HashMap;
use std::time::Duration;

use fancy_regex::Regex;

use super::{cases, draws, plain_split};
use crate::fast::count::{Counter, LOCAL_BITS};
use crate::fast::key::Key;
use crate::fast::split::{Splitter, DEFAULT_PATTERN};
use crate::fast::train::train;
use crate::plain::{self, Token};
use crate::{Error, Text};

fn count<T: Text + Send + Clone>(texts: &[T], threads: usize, batch: usize) -> Result<Counter, Error> {
    let counter = Counter::new(Splitter::new(DEFAULT_PATTERN)?);
    std::thread::scope(|scope| {
        let mut pool = counter.start(scope, threads);
        texts.chunks(batch).for_each(|batch| pool.add(batch.to_vec()));
        let mut result = Ok(());
        while !pool.is_idle() {
            if let Some((_, counted)) = pool.finished(Duration::from_secs(1)) {
                result = result.and(counted);
            }
        }
        result
    })?;
    Ok(counter)
}

fn counts_of(counter: Counter) -> HashMap<Token, u64> {
    let mut counts: HashMap<Token, u64> = HashMap::new();
    counter.for_each(|piece, count| assert_eq!(counts.insert(piece.into(), count), None, "{piece:?} is there twice"));
    counts
}

#[test]
#[cfg_attr(miri, ignore = "too many")]
fn counting_does_not_depend_on_threads_or_batches() {
    // Slots of all lengths around the key sizes, frequent and rare, more than a thread's table holds
    let mut draw = draws(5);
    let letters = |n: usize| n.to_string().bytes().map(|digit| (digit - b'0' + b'q') as char).collect::<String>();
    let word = |n: usize| "abcdefghijklmnop".repeat(4)[..1 + n % if n < 1_000 { 61 } else { 5 }].to_owned() + &letters(n);
    let texts: Vec<String> =
        (0..9_000).map(|i| (0..100).map(|_| format!(" {}", word(draw([50, 1_000, 400_000][i % 3])))).collect()).collect();
    let all: Vec<&str> = texts.iter().map(|text| &**text).collect();
    let expected = plain::count(&Regex::new(DEFAULT_PATTERN).unwrap(), &all).unwrap();
    assert!(expected.keys().filter(|piece| piece.len() <= Key::LONGEST).count() > 1 << (LOCAL_BITS - 1));
    let mut trained = None;
    for (threads, batch) in [(1, texts.len()), (2, 100), (5, 3)] {
        let counter = || count(&texts, threads, batch).unwrap();
        assert!(counts_of(counter()) == expected, "{threads} threads, batches of {batch}");
        let tokens = train(counter(), 400, |_| true).unwrap();
        assert!(tokens == *trained.get_or_insert(tokens.clone()), "{threads} threads, batches of {batch}");
    }
}

#[test]
fn texts_to_merges_as_plain_does() {
    let split = plain_split();
    let (mut draw, parts) = (draws(8), ["the", " cat", "é", "12", "\n", " a very-long_word", "abcdefghijklmno", "abcdefghijklmnop"]);
    for _ in 0..cases(200) / 10 + 1 {
        let texts: Vec<String> = (0..draw(20)).map(|_| (0..draw(60)).map(|_| parts[draw(parts.len())]).collect()).collect();
        let mut counts: HashMap<Token, u64> = HashMap::new();
        texts.iter().flat_map(|text| split(text)).for_each(|piece| *counts.entry(piece.as_bytes().into()).or_default() += 1);
        let expected = plain::train(&counts, 300);
        assert_eq!(train(count(&texts, 2, 3).unwrap(), 300, |_| true).unwrap(), expected);
    }
}

#[test]
fn pieces_of_all_lengths_are_told_apart() {
    let longest = if cfg!(miri) { 40 } else { 200 };
    let texts: Vec<String> = (1..longest).flat_map(|n| ["a".repeat(n), "a".repeat(n) + "\0", "!".repeat(n), "\0".repeat(n)]).collect();
    let counts = counts_of(count(&texts, 1, 7).unwrap());
    for n in 1..longest {
        assert_eq!(counts[&*b"a".repeat(n)], 2, "{n}");
        assert_eq!(counts[&*b"!".repeat(n)], 1, "{n}");
        assert_eq!(counts[&*b"\0".repeat(n)], if n == 1 { longest as u64 } else { 1 }, "{n}");
    }
}

#[test]
fn no_utf8_is_an_error() {
    assert!(matches!(count(&[&b"a\xff"[..]], 2, 1), Err(Error::Text(_))));
}
