//! Counts to merges. Replaces `plain::train`.
//! Faster: by candidates.rs, neighbours.rs, pairs.rs and slots.rs, which it puts together.
//! Gain: see NOTES.md.

use super::candidates::Candidates;
use super::count::Counter;
use super::neighbours::Neighbours;
use super::pairs::{tokens_of, Pairs};
use super::slots::{Slot, Slots};
use super::{without, Idea};
use crate::plain::Token;
use crate::Error;

/// If the words have at most this many slots, all pairs are tracked.
const SMALL: usize = 1 << 20;

pub fn check_vocab_size(vocab_size: usize) -> Result<(), Error> {
    match vocab_size {
        0..=255 => Err(Error::Setting(format!("vocab_size must be at least 256 (one token per byte), not {vocab_size}"))),
        _ if vocab_size >= u32::MAX as usize => Err(Error::Setting(format!("vocab_size {vocab_size} is too large"))),
        _ => Ok(()),
    }
}

/// The tokens of a vocabulary of at most `vocab_size`: the bytes, then the merges in order; fewer if no pair is left.
/// `keep_going(merges done)` is called regularly; if it returns false, the result is `Error::Interrupted`.
pub fn train(counter: Counter, vocab_size: usize, keep_going: impl Fn(usize) -> bool) -> Result<Vec<Token>, Error> {
    check_vocab_size(vocab_size)?;
    match vocab_size {
        ..=0x10000 if !without(Idea::TwoBytes) => train_on::<u16>(counter.into_slots(), vocab_size, keep_going),
        _ => train_on::<u32>(counter.into_slots(), vocab_size, keep_going),
    }
}

fn train_on<S: Slot>(slots: Slots<S>, vocab_size: usize, keep_going: impl Fn(usize) -> bool) -> Result<Vec<Token>, Error> {
    if slots.size() >= u32::MAX as usize {
        return Err(Error::Setting("the distinct pieces exceed 4 GiB: train on less text".into()));
    }
    let floor = match slots.size() {
        0..SMALL => 1,
        _ if without(Idea::Floor) => 1,
        // In text, the n-th merge occurs 2 to 8 times as often as bytes / n^1.5: rarer pairs will hardly be needed.
        _ => 1 + 2 * slots.text_bytes() / (vocab_size as u64 * vocab_size.isqrt() as u64),
    };
    train_above(floor, slots, vocab_size, keep_going)
}

/// `floor` only decides which pairs are tracked at first: those that are at least as frequent when last counted or made.
pub fn train_above<S: Slot>(
    mut floor: u64,
    mut slots: Slots<S>,
    vocab_size: usize,
    keep_going: impl Fn(usize) -> bool,
) -> Result<Vec<Token>, Error> {
    let mut tokens: Vec<Token> = (0..=255u8).map(|byte| Box::from([byte])).collect();
    let (mut left, mut right) = (Neighbours::default(), Neighbours::default());
    let (mut pairs, mut candidates) = track(&slots, floor, || keep_going(0))?;
    while tokens.len() < vocab_size {
        let merges = tokens.len() - 256;
        if !keep_going(merges) {
            return Err(Error::Interrupted);
        }
        let Some(best) = candidates.pop(&pairs.list, floor) else {
            if floor == 1 {
                break;
            }
            // An untracked pair may be more frequent than the remaining ones.
            floor = floor / 4 + 1;
            (pairs, candidates) = track(&slots, floor, || keep_going(merges))?;
            continue;
        };
        let (a, b) = tokens_of(pairs.list[best].key);
        let new = tokens.len() as u32;
        tokens.push([&*tokens[a as usize], &*tokens[b as usize]].concat().into());
        // The last id is written to no slot: of two bytes, it would be the border.
        if tokens.len() < vocab_size {
            slots.replace(a, b, pairs.places(best), [&mut left, &mut right]);
            pairs.apply(best, new, [&mut left, &mut right], floor, &mut candidates);
        }
    }
    Ok(tokens)
}

/// The pairs that reach the floor, and a queue of them.
fn track<S: Slot>(slots: &Slots<S>, floor: u64, keep_going: impl Fn() -> bool) -> Result<(Pairs, Candidates), Error> {
    let (pairs, mut candidates) = (Pairs::of(slots, floor, keep_going).ok_or(Error::Interrupted)?, Candidates::default());
    pairs.list.iter().enumerate().for_each(|(number, pair)| candidates.push(pair, number));
    Ok((pairs, candidates))
}
