//! Times the crate on a file of documents that are separated by NUL, one thread, processor time. Prints JSON. For dev/bench_ablation.py.
//!
//!     cargo run --release --features ablation --example speed -- FILE MEGABYTES VOCAB_SIZE [plain | IDEA]
//!
//! Trains on the first MEGABYTES, then encodes them: `cold` is the first time, `warm` the second, and `fresh` follows the rest of the
//! file. With `plain`, the functions of `plain` instead, which have no memory. With an idea, the crate without it.

use std::time::{Duration, Instant};

use rustbpe::fast::count::{Counter, LocalCounter};
use rustbpe::fast::encode::{Encoder, Scratch};
use rustbpe::fast::split::{Splitter, DEFAULT_PATTERN};
use rustbpe::fast::train::train;
use rustbpe::fast::Idea;
use rustbpe::plain::{self, Token};

/// Processor time of this thread where the system tells it, else time.
fn now(start: Instant) -> Duration {
    let ran = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let nanoseconds = ran.and_then(|fields| fields.split(' ').next()?.parse().ok());
    nanoseconds.map_or_else(|| start.elapsed(), Duration::from_nanos)
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, file, megabytes, vocab_size, rest @ ..] = &arguments[..] else { panic!("FILE MEGABYTES VOCAB_SIZE [plain | IDEA]") };
    let in_plain = rest.first().is_some_and(|option| option == "plain");
    if let Some(idea) = rest.first().filter(|_| !in_plain) {
        let known = Idea::ALL.into_iter().find(|known| format!("{known:?}") == **idea);
        known.unwrap_or_else(|| panic!("the ideas are {:?}", Idea::ALL)).leave_out();
    }
    let text = std::fs::read_to_string(file).expect("a file of UTF-8");
    let (bytes, vocab_size) = (1_000_000 * megabytes.parse::<usize>().expect("a number"), vocab_size.parse().expect("a number"));
    let (mut ours, mut others, mut size) = (Vec::new(), Vec::new(), 0);
    for document in text.split('\0') {
        if size < bytes { &mut ours } else { &mut others }.push(document);
        size += document.len();
    }
    let (start, size) = (Instant::now(), ours.iter().map(|text| text.len()).sum::<usize>());
    let mut told = Vec::new();
    let mut tell = |what: &str, before: Duration| {
        told.push(format!("\"{what}\": {:.2}", size as f64 / 1e6 / (now(start) - before).as_secs_f64()));
    };

    let before = now(start);
    let tokens: Vec<Token> = if !in_plain {
        let counter = Counter::new(Splitter::new(DEFAULT_PATTERN).expect("a pattern"));
        let mut local = LocalCounter::new(&counter);
        ours.iter().for_each(|text| local.add(text).expect("a text"));
        local.finish();
        tell("count", before);
        let before = now(start);
        let tokens = train(counter, vocab_size, |_| true).expect("a size");
        tell("merge", before);
        tokens
    } else {
        let pattern = fancy_regex::Regex::new(DEFAULT_PATTERN).expect("a pattern");
        let counts = plain::count(&pattern, &ours).expect("texts");
        tell("count", before);
        let before = now(start);
        let tokens = plain::train(&counts, vocab_size);
        tell("merge", before);
        let ranks: plain::Ranks = tokens.iter().cloned().zip(0..).collect();
        let before = now(start);
        let ids: Vec<u32> = ours.iter().flat_map(|text| plain::encode(&ranks, &pattern, text).expect("a text")).collect();
        tell("fresh", before);
        let before = now(start);
        plain::decode(&tokens, &ids).expect("ids");
        tell("decode", before);
        tokens
    };
    tell("train", before);
    if !in_plain {
        let encoder = Encoder::new(&tokens, DEFAULT_PATTERN).expect("a vocabulary");
        let (mut scratch, mut out) = (Scratch::default(), Vec::with_capacity(size));
        let mut encode = |texts: &[&str], scratch: &mut Scratch| {
            out.clear();
            texts.iter().for_each(|text| encoder.encode_into(text, &mut out, scratch).expect("a text"));
            out.clone()
        };
        for what in ["cold", "warm"] {
            let before = now(start);
            encode(&ours, &mut scratch);
            tell(what, before);
        }
        let mut scratch = Scratch::default(); // the other one stays: its memory, used again, would not have huge pages
        others.iter().for_each(|text| drop(encode(&[text], &mut scratch)));
        let before = now(start);
        let ids = encode(&ours, &mut scratch);
        tell("fresh", before);
        let before = now(start);
        encoder.decode(&ids).expect("ids");
        tell("decode", before);
    }
    println!("{{{}}}", told.join(", "));
}
