//! The Python module: converts arguments, releases the GIL, maps errors. Nothing is decided here.

use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyByteArray, PyBytes, PyIterator, PyString};

use crate::encode::{EncodedRun, Encoder};
use crate::split::{Splitter, DEFAULT_PATTERN};
use crate::train::{check_vocab_size, train, PieceCounter};
use crate::{worker_threads, Error};

/// A batch is counted when it has this many bytes, even if it has fewer than buffer_size documents.
const BATCH_BYTES: usize = 16 << 20;
/// How often a long computation looks for Ctrl-C and reports its progress.
const CALL_EVERY: Duration = Duration::from_millis(200);

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte-pair encoding tokenizer. Fresh from the constructor it knows the 256 bytes; train it, or load ranks with
/// `from_ranks`.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    encoder: Encoder,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> PyResult<Self> {
        Ok(Tokenizer { encoder: Encoder::bytes_only(DEFAULT_PATTERN)? })
    }

    /// A tokenizer from (token bytes, rank) pairs and a split pattern. Ranks are 0, 1, 2, ... without gaps, and every
    /// single byte is a token; ValueError otherwise.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern=None))]
    fn from_ranks(py: Python<'_>, ranks: Vec<(PyBackedBytes, u32)>, pattern: Option<String>) -> PyResult<Self> {
        let encoder = py.detach(|| {
            let mut tokens: Vec<Box<[u8]>> = vec![Box::default(); ranks.len()];
            for (token, rank) in &ranks {
                let slot = tokens.get_mut(*rank as usize);
                let Some(slot) = slot.filter(|slot| slot.is_empty()) else {
                    return Err(Error::Ranks(format!("{rank} is twice there, or not below {}, the number of tokens", ranks.len())));
                };
                *slot = token[..].into();
            }
            Encoder::new(tokens, pattern.as_deref().unwrap_or(DEFAULT_PATTERN))
        })?;
        Ok(Tokenizer { encoder })
    }

    /// Trains on the strings of an iterator, read in batches of at most buffer_size; the GIL is released while pieces are
    /// counted and merged. `progress(merges_done)`, if given, is called a few times a second while merging.
    ///
    /// The vocabulary is smaller than vocab_size where no pair is left to merge. Raises what the iterator raises;
    /// TypeError for an item that is no str; ValueError for a lone surrogate, a bad pattern or a bad size.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None))]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<String>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size must be at least 1"));
        }
        check_vocab_size(vocab_size)?;
        let pattern = pattern.unwrap_or_else(|| DEFAULT_PATTERN.to_owned());
        let counter = PieceCounter::new(Splitter::new(&pattern)?, worker_threads(None));
        count_all(py, &counter, &iterator.try_iter()?, buffer_size)?;

        let mut stopped: Option<PyErr> = None;
        let mut last_call: Option<Instant> = None;
        let tokens = py.detach(|| {
            train(counter.into_counts(), vocab_size, |merges| {
                if last_call.is_some_and(|time| time.elapsed() < CALL_EVERY) {
                    return true;
                }
                last_call = Some(Instant::now());
                let answer = Python::attach(|py| {
                    py.check_signals()?;
                    progress.as_ref().map_or(Ok(()), |call| call.call1(py, (merges,)).map(drop))
                });
                stopped = answer.err();
                stopped.is_none()
            })
        });
        if let Some(error) = stopped {
            return Err(error);
        }
        self.encoder = Encoder::new(tokens?, &pattern)?;
        Ok(())
    }

    /// The ids of a text.
    fn encode(&self, py: Python<'_>, text: &str) -> PyResult<Vec<u32>> {
        Ok(py.detach(|| self.encoder.encode(text))?)
    }

    /// The ids of each text, computed on num_threads threads (all cores by default).
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode(&self, py: Python<'_>, texts: &Bound<'_, PyAny>, num_threads: Option<usize>) -> PyResult<Vec<Vec<u32>>> {
        let mut documents = Vec::new();
        for run in self.encode_runs(py, texts, num_threads)? {
            let mut ids = &run.ids[..];
            for length in run.lengths {
                let (document, rest) = ids.split_at(length);
                documents.push(document.to_vec());
                ids = rest;
            }
        }
        Ok(documents)
    }

    /// All texts in two numpy arrays: the ids end to end (uint32), and where each text starts and the last one ends
    /// (int64, one more than texts). The GIL is released.
    #[pyo3(signature = (texts, num_threads=None))]
    fn encode_documents<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<usize>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let runs = self.encode_runs(py, texts, num_threads)?;
        let ids = PyByteArray::new_with(py, 4 * runs.iter().map(|run| run.ids.len()).sum::<usize>(), |buffer| {
            let all = runs.iter().flat_map(|run| &run.ids);
            buffer.chunks_exact_mut(4).zip(all).for_each(|(place, id)| place.copy_from_slice(&id.to_ne_bytes()));
            Ok(())
        })?;
        let documents: usize = runs.iter().map(|run| run.lengths.len()).sum();
        let offsets = PyByteArray::new_with(py, 8 * (documents + 1), |buffer| {
            let mut end = 0i64;
            let lengths = runs.iter().flat_map(|run| &run.lengths);
            for (place, length) in buffer.chunks_exact_mut(8).skip(1).zip(lengths) {
                end += *length as i64;
                place.copy_from_slice(&end.to_ne_bytes());
            }
            Ok(())
        })?;
        let numpy = py.import("numpy")?;
        let array = |bytes: Bound<'py, PyByteArray>, dtype: &str| numpy.call_method1("frombuffer", (bytes, dtype));
        Ok((array(ids, "uint32")?, array(offsets, "int64")?))
    }

    /// The text of some ids; ValueError (UnicodeDecodeError) where they end inside a character, see decode_bytes.
    fn decode<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyAny>> {
        self.decode_bytes(py, ids)?.call_method1("decode", ("utf-8",))
    }

    /// The bytes of some ids.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<u32>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.encoder.decode(&ids)?))
    }

    /// The pieces that the pattern cuts a text into; merges never cross their borders.
    fn split<'t>(&self, text: &'t str) -> PyResult<Vec<&'t str>> {
        Ok(self.encoder.split(text)?)
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.encoder.tokens().len()
    }

    fn get_pattern(&self) -> &str {
        self.encoder.pattern()
    }

    /// (token bytes, id) of every token, in the order of the ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        self.encoder.tokens().iter().zip(0..).map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }
}

impl Tokenizer {
    fn encode_runs(&self, py: Python<'_>, texts: &Bound<'_, PyAny>, num_threads: Option<usize>) -> PyResult<Vec<EncodedRun>> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts must be a list of str, not one str"));
        }
        let texts = texts.try_iter()?.enumerate().map(|(index, text)| borrow(index, &text?)).collect::<PyResult<Vec<_>>>()?;
        Ok(py.detach(|| self.encoder.encode_documents(&texts, worker_threads(num_threads)))?)
    }
}

/// Reads the iterator on this thread while another counts the batch before.
fn count_all(py: Python<'_>, counter: &PieceCounter, iterator: &Bound<'_, PyIterator>, buffer_size: usize) -> PyResult<()> {
    std::thread::scope(|scope| {
        let (batches, received) = sync_channel::<Vec<String>>(1);
        let counting = scope.spawn(move || received.iter().try_for_each(|batch| counter.add(&batch)));
        let mut documents = iterator.clone().enumerate();
        let reading = loop {
            match read_batch(py, &mut documents, buffer_size) {
                Ok(batch) if batch.is_empty() => break Ok(()),
                // The other side hangs up only on an error, which it returns.
                Ok(batch) => match py.detach(|| batches.send(batch)) {
                    Ok(()) => {}
                    Err(_) => break Ok(()),
                },
                Err(error) => break Err(error),
            }
        };
        drop(batches);
        let counted = py.detach(|| counting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        reading.and(counted.map_err(PyErr::from))
    })
}

fn read_batch<'py>(
    py: Python<'py>,
    documents: &mut impl Iterator<Item = (usize, PyResult<Bound<'py, PyAny>>)>,
    buffer_size: usize,
) -> PyResult<Vec<String>> {
    let (mut batch, mut bytes) = (Vec::new(), 0);
    while batch.len() < buffer_size && bytes < BATCH_BYTES {
        let Some((index, document)) = documents.next() else { break };
        let document = document?;
        let text: &str = &borrow(index, &document)?;
        bytes += text.len();
        batch.push(text.to_owned());
        if batch.len() % 1024 == 0 {
            py.check_signals()?;
        }
    }
    py.check_signals()?;
    Ok(batch)
}

/// The UTF-8 of a Python str, kept alive. A lone surrogate has none: UnicodeEncodeError, which is a ValueError.
fn borrow(index: usize, text: &Bound<'_, PyAny>) -> PyResult<PyBackedStr> {
    let Ok(text) = text.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("text {index} is a {}, not a str", text.get_type().name()?)));
    };
    PyBackedStr::try_from(text.clone())
}

#[pymodule]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Tokenizer>()
}
