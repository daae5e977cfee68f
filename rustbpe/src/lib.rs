//! Byte-level byte-pair encoding: training on a stream of text, and encoding with the result.
//!
//! - [`split`]: text to pieces (pretokens), which merges never cross;
//! - [`count`]: the distinct pieces of a corpus;
//! - [`train`]: merge the most frequent pair of neighbours in them, again and again;
//! - [`encode`]: text to token ids, by the same rules as tiktoken.
//!
//! The Python module (`py.rs`, `reader.rs` and `arrow.rs`, behind the feature `python`) only converts arguments and releases the GIL.

#[cfg(feature = "python")]
mod arrow;
pub mod count;
pub mod encode;
#[cfg(feature = "python")]
mod py;
#[cfg(feature = "python")]
mod reader;
pub mod split;
pub mod train;

use std::fmt;
use std::sync::Mutex;

/// What can go wrong; every variant is the caller's data, not a bug.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The split pattern does not compile.
    Pattern(String),
    /// The split pattern failed on a text, e.g. because it backtracks too much.
    Split(String),
    /// Ranks that make no tokenizer.
    Ranks(String),
    /// A text that is no UTF-8.
    Text(String),
    /// A training setting out of range.
    Setting(String),
    /// A token id that the vocabulary does not have.
    UnknownId(u32),
    /// The caller asked to stop.
    Interrupted,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Pattern(why) => write!(f, "invalid split pattern: {why}"),
            Error::Split(why) => write!(f, "the split pattern failed on this text: {why}"),
            Error::Ranks(why) => write!(f, "invalid ranks: {why}"),
            Error::Text(why) => write!(f, "a text is not UTF-8: {why}"),
            Error::Setting(why) => f.write_str(why),
            Error::UnknownId(id) => write!(f, "unknown token id: {id}"),
            Error::Interrupted => f.write_str("interrupted"),
        }
    }
}

impl std::error::Error for Error {}

/// Threads worth using: `wanted`, but at least one and no more than the machine runs at once.
pub fn worker_threads(wanted: Option<usize>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    wanted.unwrap_or(cores).clamp(1, cores)
}

/// Pieces of up to this many bytes are their own keys in tables.
const KEY_BYTES: usize = 15;

/// The first `len` bytes of a window, at most KEY_BYTES, then zeros, and `len` in the last byte.
#[inline]
fn key_of(window: &[u8; 16], len: usize) -> [u64; 2] {
    const MASKS: [u128; KEY_BYTES + 1] = {
        let mut masks = [0; KEY_BYTES + 1];
        let mut len = 1;
        while len <= KEY_BYTES {
            masks[len] = masks[len - 1] << 8 | 0xff;
            len += 1;
        }
        masks
    };
    let both = u128::from_le_bytes(*window) & MASKS[len];
    [both as u64, (both >> 64) as u64 | (len as u64) << 56]
}

/// A hash of 16 bytes.
#[inline]
fn mix([a, b]: [u64; 2]) -> u64 {
    let product = (a ^ 0x9e37_79b9_7f4a_7c15) as u128 * (b ^ 0xd1b5_4a32_d192_ed03) as u128;
    product as u64 ^ (product >> 64) as u64
}

/// Asks for memory that will be read soon.
#[inline]
fn prefetch<T>(place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it changes nothing, and nothing is read.
    unsafe {
        use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
        _mm_prefetch::<_MM_HINT_T0>((place as *const T).cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// Memory that is read here and there is found faster in pages of 2 MiB. A system that has none to give ignores the advice.
fn ask_for_huge_pages<T>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        use std::ffi::{c_int, c_void};
        extern "C" {
            fn madvise(address: *mut c_void, length: usize, advice: c_int) -> c_int;
        }
        const PAGE: usize = 2 << 20;
        const MADV_HUGEPAGE: c_int = 14;
        let range = memory.as_mut_ptr_range();
        let first = (range.start as usize).next_multiple_of(PAGE);
        if let Some(length) = (range.end as usize).checked_sub(first) {
            // SAFETY: whole pages of this slice; the advice does not change what they hold.
            unsafe { madvise(first as *mut c_void, length / PAGE * PAGE, MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Documents are handed to threads in runs of about this many bytes.
const RUN_BYTES: usize = 1 << 18;

/// Consecutive documents as (start, end) indices, each run at least one document and about RUN_BYTES long.
fn runs_of(lengths: impl ExactSizeIterator<Item = usize>) -> Vec<(usize, usize)> {
    let documents = lengths.len();
    let mut runs = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, length) in lengths.enumerate() {
        bytes += length;
        if bytes >= RUN_BYTES {
            runs.push((start, index + 1));
            (start, bytes) = (index + 1, 0);
        }
    }
    if start < documents {
        runs.push((start, documents));
    }
    runs
}

/// Does the work for each item on a thread of its own, for the first on this one, and returns the results in this order. Items for
/// which the system gives no thread are worked on here, too. The threads end with the call: a pool that lives on would deadlock in a
/// forked child, and starting a thread costs microseconds.
fn in_parallel<I: Send, T: Send>(items: impl IntoIterator<Item = I>, work: impl Fn(I) -> Result<T, Error> + Sync) -> Result<Vec<T>, Error> {
    let items: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    let work = |item: &Mutex<Option<I>>| work(item.lock().expect("taken once").take().expect("taken once"));
    let (work, Some((first, others))) = (&work, items.split_first()) else { return Ok(Vec::new()) };
    std::thread::scope(|scope| {
        let start = |item| (item, std::thread::Builder::new().spawn_scoped(scope, move || work(item)));
        let others: Vec<_> = others.iter().map(start).collect();
        let first = work(first);
        let others = others.into_iter().map(|(item, thread)| match thread {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(_) => work(item),
        });
        std::iter::once(first).chain(others).collect()
    })
}

/// Random numbers below the argument, for tests.
#[cfg(test)]
fn draws(seed: u64) -> impl FnMut(usize) -> usize {
    let mut state = seed;
    move |n| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    }
}
