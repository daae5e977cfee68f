//! Many texts at once. Replaces a loop over `plain::encode`, or `plain::decode`.
//! Faster: threads take runs of documents of 256 KiB, and parts of long ones. Gain: see NOTES.md, two threads beside one.

use std::borrow::Cow;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::encode::{Encoder, Scratch};
use super::threads::{in_parallel, worker_threads};
use crate::{Error, Text};

/// Documents are handed to threads in runs of about this many bytes.
pub const RUN_BYTES: usize = 1 << 18;

/// The concatenated ids (or bytes) of the documents of all runs, and the number for each document.
pub struct Documents<T> {
    pub runs: Vec<Vec<T>>,
    pub lengths: Vec<usize>,
}

impl Encoder {
    /// Encodes the documents on up to `threads` threads; several share a long one if the pattern allows it.
    ///
    /// Each thread calls `keep_going` after every 256 KiB or so; if it returns false, the call ends with `Error::Interrupted`.
    pub fn encode_documents<T: Text>(
        &self,
        texts: &[T],
        threads: usize,
        keep_going: impl Fn() -> bool + Sync,
    ) -> Result<Documents<u32>, Error> {
        let utf8 = |index: usize| {
            texts[index].utf8().map_err(|error| match error {
                Error::Text(why) => Error::Text(format!("text {index}, {why}")),
                other => other,
            })
        };
        // Long ones are converted first, to be cut.
        let long = texts.iter().enumerate().map(|(index, text)| (text.size() > 2 * RUN_BYTES).then(|| utf8(index)).transpose());
        let long = long.collect::<Result<Vec<_>, _>>()?;
        let (mut parts, mut ends) = (Vec::with_capacity(texts.len()), Vec::with_capacity(texts.len()));
        for (index, text) in long.iter().enumerate() {
            match text.as_deref() {
                Some(text) => parts.extend(self.splitter.cut(text.as_bytes(), RUN_BYTES).map(|part| (index, Some(&text[part])))),
                None => parts.push((index, None)), // the whole text
            }
            ends.push(parts.len());
        }
        let size = |(index, part): (usize, Option<&str>)| part.map_or(texts[index].size(), str::len) / 4;
        let Documents { runs, lengths } = self.in_runs(&parts, size, threads, &keep_going, |(index, part), out, scratch| {
            self.encode_into(&part.map_or_else(|| utf8(index), |part| Ok(Cow::Borrowed(part)))?, out, scratch)
        })?;
        let starts = std::iter::once(&0).chain(&ends);
        let lengths = starts.zip(&ends).map(|(&start, &end)| lengths[start..end].iter().sum()).collect();
        Ok(Documents { runs, lengths })
    }

    /// The bytes of `ids`, which need not be whole UTF-8 characters.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        self.tokens.decode_into(ids, &mut out).and(Ok(out))
    }

    /// Decodes the documents on up to `threads` threads.
    pub fn decode_documents(
        &self,
        documents: &[&[u32]],
        threads: usize,
        keep_going: impl Fn() -> bool + Sync,
    ) -> Result<Documents<u8>, Error> {
        self.in_runs(documents, |ids| 5 * ids.len(), threads, keep_going, |ids, out, _| self.tokens.decode_into(ids, out))
    }
    /// Calls `work` with every document, in runs on the next free thread. A document yields about the given number of items.
    fn in_runs<D: Copy + Sync, T: Send>(
        &self,
        documents: &[D],
        expected: impl Fn(D) -> usize + Sync,
        threads: usize,
        keep_going: impl Fn() -> bool + Sync,
        work: impl Fn(D, &mut Vec<T>, &mut Scratch) -> Result<(), Error> + Sync,
    ) -> Result<Documents<T>, Error> {
        let mut bytes = 0;
        let runs = documents.chunk_by(|&document, _| {
            bytes += expected(document) * size_of::<T>();
            let is_within = bytes < RUN_BYTES;
            bytes *= is_within as usize;
            is_within
        });
        let (runs, next): (Vec<&[D]>, _) = (runs.collect(), AtomicUsize::new(0));
        let done = in_parallel(self.take_scratches(threads.min(runs.len())), |mut scratch| {
            let mut done = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                let Some(&run) = runs.get(index) else { return Ok((done, scratch)) };
                let mut items = Vec::with_capacity(run.iter().map(|&document| expected(document)).sum());
                let mut lengths = Vec::with_capacity(run.len());
                for &document in run {
                    let before = items.len();
                    work(document, &mut items, &mut scratch)?;
                    lengths.push(items.len() - before);
                }
                done.push((index, items, lengths));
                if !keep_going() {
                    return Err(Error::Interrupted);
                }
            }
        });
        let (done, scratches): (Vec<_>, _) = done?.into_iter().unzip();
        self.keep_scratches(scratches);
        let mut done: Vec<_> = done.into_iter().flatten().collect();
        done.sort_unstable_by_key(|(index, ..)| *index);
        let lengths = done.iter().flat_map(|(_, _, lengths)| lengths).copied().collect();
        Ok(Documents { runs: done.into_iter().map(|(_, items, _)| items).collect(), lengths })
    }

    /// The requested number of workspaces, used ones first. Nothing waits for the lock: a forked child could find it held forever.
    pub(super) fn take_scratches(&self, wanted: usize) -> Vec<Scratch> {
        let mut taken = match self.scratches.try_lock() {
            Ok(mut kept) => {
                let rest = kept.len().saturating_sub(wanted);
                kept.split_off(rest)
            }
            Err(_) => Vec::new(),
        };
        taken.resize_with(wanted, Scratch::default);
        taken
    }

    pub(super) fn keep_scratches(&self, scratches: Vec<Scratch>) {
        if let Ok(mut kept) = self.scratches.try_lock() {
            kept.extend(scratches);
            kept.truncate(worker_threads(None)); // up to 25 MB each
        }
    }
}
