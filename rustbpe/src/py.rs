//! The Python module: converts arguments, releases the GIL, maps errors. It contains no other logic.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::Mutex;
use std::thread::{current, ThreadId};
use std::time::Instant;

use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyList, PyString};

use crate::arrow::Strings;
use crate::fast::count::Counter;
use crate::fast::documents::{Documents, RUN_BYTES};
use crate::fast::encode::{Encoder, MAX_TOKENS};
use crate::fast::split::{Splitter, DEFAULT_PATTERN};
use crate::fast::threads::{in_parallel, worker_threads};
use crate::fast::train::{check_vocab_size, train};
use crate::plain::Token;
use crate::reader::{count_all, Str, CALL_EVERY};
use crate::{Error, Text};

/// To be raised, here and in zangchat/bpe.py, with every change of what Python passes or gets: so an older build is noticed.
const VERSION: u32 = 1;

impl From<Error> for PyErr {
    fn from(error: Error) -> PyErr {
        PyValueError::new_err(error.to_string())
    }
}

/// A byte-pair encoding tokenizer. A new one has only the 256 bytes; train it, or load ranks with `from_ranks`.
#[pyclass(module = "rustbpe")]
struct Tokenizer {
    tokens: Vec<Token>, // by id; empty for an id without a token
    pattern: String,
    /// Made on first use, since training may need only the tokens; with the GIL held, so that no forked child finds it half made.
    encoder: PyOnceLock<Encoder>,
    /// The ids as Python ints, made on first use: a list of ids then costs a reference for each, not an object.
    ints: PyOnceLock<Vec<Py<PyAny>>>,
}

#[pymethods]
impl Tokenizer {
    #[new]
    fn new() -> Self {
        Tokenizer::of((0..=255u8).map(|byte| Box::from([byte])).collect(), DEFAULT_PATTERN.to_owned())
    }

    /// A tokenizer from (token bytes, rank) pairs and a split pattern. A rank is a token's id. Every single byte must be a token;
    /// ranks may have gaps (p50k has one for a special token). ValueError for tokens or ranks that are there twice.
    #[staticmethod]
    #[pyo3(signature = (ranks, pattern=None))]
    fn from_ranks(py: Python<'_>, ranks: Vec<(PyBackedBytes, u32)>, pattern: Option<String>) -> PyResult<Self> {
        let pattern = pattern.unwrap_or_else(|| DEFAULT_PATTERN.to_owned());
        let (tokens, encoder) = py.detach(|| {
            let size = ranks.iter().map(|(_, rank)| *rank as usize + 1).max().unwrap_or(0);
            if size > MAX_TOKENS {
                return Err(Error::Ranks(format!("{} is too large, {} is the largest possible", size - 1, MAX_TOKENS - 1)));
            }
            let mut tokens: Vec<Token> = vec![Token::default(); size];
            for (token, rank) in &ranks {
                let slot = &mut tokens[*rank as usize];
                if token.is_empty() || !slot.is_empty() {
                    let why = if token.is_empty() { "a token that is empty" } else { "two tokens" };
                    return Err(Error::Ranks(format!("{rank} has {why}")));
                }
                *slot = token[..].into();
            }
            let encoder = Encoder::new(&tokens, &pattern)?;
            Ok((tokens, encoder))
        })?;
        let tokenizer = Tokenizer::of(tokens, pattern);
        let _ = tokenizer.encoder.set(py, encoder); // not set before
        Ok(tokenizer)
    }

    /// Trains on the strings of an iterator. An item may also be an Arrow array of strings (anything with __arrow_c_array__ or
    /// __arrow_c_stream__); each string is a document. Texts are read in batches of at most buffer_size, counted on num_threads
    /// threads (all cores by default) and merged, without the GIL. `progress(merges_done)`, if given, is called a few times a
    /// second while merging. The result depends only on the texts.
    ///
    /// The vocabulary is smaller than vocab_size if no pair is left to merge. Exceptions of the iterator propagate. Raises
    /// TypeError for an item that is neither, and ValueError for a lone surrogate, a bad pattern or a bad size.
    #[pyo3(signature = (iterator, vocab_size, buffer_size=8192, pattern=None, progress=None, num_threads=None))]
    #[allow(clippy::too_many_arguments)]
    fn train_from_iterator(
        &mut self,
        py: Python<'_>,
        iterator: &Bound<'_, PyAny>,
        vocab_size: usize,
        buffer_size: usize,
        pattern: Option<String>,
        progress: Option<Py<PyAny>>,
        num_threads: Option<usize>,
    ) -> PyResult<()> {
        if buffer_size == 0 {
            return Err(PyValueError::new_err("buffer_size must be at least 1"));
        }
        check_vocab_size(vocab_size)?;
        let pattern = pattern.unwrap_or_else(|| DEFAULT_PATTERN.to_owned());
        let counter = Counter::new(Splitter::new(&pattern)?);
        let threads = worker_threads(num_threads);
        count_all(py, &counter, iterator.try_iter()?, buffer_size, threads)?;

        let merges = AtomicUsize::new(0);
        let look = |py: Python<'_>| {
            progress.as_ref().map_or(Ok(()), |call| call.call1(py, (merges.load(Relaxed),)).map(drop))?;
            py.check_signals()
        };
        let tokens = Watch::calling(py, &look, |watch| {
            train(counter, vocab_size, |number| {
                merges.store(number, Relaxed);
                watch.keep_going()
            })
        })?;
        *self = Tokenizer::of(tokens, pattern);
        Ok(())
    }

    /// The ids of a text.
    fn encode<'py>(&self, py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyList>> {
        let encoder = self.encoder(py)?;
        let ids = match text.len() {
            0..=RUN_BYTES => py.detach(|| encoder.encode(text))?,
            _ => Watch::over(py, |watch| encoder.encode_documents(&[text], 1, || watch.keep_going()))?.runs.concat(),
        };
        self.list(py, &ids)
    }

    /// The ids of each text, computed on num_threads threads (all cores by default).
    #[pyo3(signature = (texts, num_threads=None))]
    fn batch_encode<'py>(&self, py: Python<'py>, texts: &Bound<'py, PyAny>, num_threads: Option<usize>) -> PyResult<Bound<'py, PyList>> {
        let Documents { runs, lengths } = self.encode_all(py, texts, num_threads)?;
        let (mut runs, mut ids, mut start) = (runs.into_iter(), Vec::new(), 0);
        // The garbage collector would traverse all these lists repeatedly (a quarter of the time), but numbers form no cycles.
        // SAFETY: the GIL is held.
        let collected = unsafe { ffi::PyGC_Disable() } == 1;
        let documents = lengths.into_iter().map(|length| {
            while ids.len() < start + length {
                // A run at a time, so that lists take the memory of the runs before it.
                ids.drain(..std::mem::take(&mut start));
                ids.extend(runs.next().expect("the lengths add up to all ids"));
            }
            start += length;
            self.list(py, &ids[start - length..start])
        });
        let documents = documents.collect::<PyResult<Vec<_>>>().and_then(|documents| PyList::new(py, documents));
        if collected {
            // SAFETY: the GIL is held.
            unsafe { ffi::PyGC_Enable() };
        }
        documents
    }

    /// All texts in two numpy arrays: the concatenated ids (uint32), and the start of each text plus the end of the last one
    /// (int64, one more than texts). The texts are str, or an Arrow array of strings, or with `offsets` a buffer of UTF-8 (bytes, an array
    /// of uint8) that is split in the same way. The GIL is released.
    #[pyo3(signature = (texts, num_threads=None, offsets=None))]
    fn encode_documents<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyAny>,
        num_threads: Option<usize>,
        offsets: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Arrays<'py>> {
        let Some(offsets) = offsets else { return arrays_of(py, self.encode_all(py, texts, num_threads)?, "uint32", num_threads) };
        let bytes = match texts.hasattr("__array_interface__")? {
            true => converted(texts, "uint8")?,
            false => py.import("numpy")?.call_method1("frombuffer", (texts, "uint8"))?,
        };
        let offsets = converted(offsets, "int64")?;
        // SAFETY: of these types; as everywhere in numpy, the caller must not write to them from another thread meanwhile.
        let (bytes, offsets) = unsafe { (&*memory_of::<u8>(&bytes)?, &*memory_of::<i64>(&offsets)?) };
        let runs = self.encode_texts(py, &cut(bytes, offsets)?, num_threads)?;
        arrays_of(py, runs, "uint32", num_threads)
    }

    /// The reverse of encode_documents: the concatenated bytes of all documents (uint8), and the start of each plus the end of
    /// the last one (int64). Takes any arrays of integers; ValueError for offsets that do not ascend from 0 to the number of ids.
    #[pyo3(signature = (ids, offsets, num_threads=None))]
    fn decode_documents<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        offsets: &Bound<'py, PyAny>,
        num_threads: Option<usize>,
    ) -> PyResult<Arrays<'py>> {
        let (ids, offsets) = (converted(ids, "uint32")?, converted(offsets, "int64")?);
        // SAFETY: as in encode_documents.
        let (ids, offsets) = unsafe { (&*memory_of::<u32>(&ids)?, &*memory_of::<i64>(&offsets)?) };
        let encoder = self.encoder(py)?;
        let threads = worker_threads(num_threads);
        let runs = Watch::over(py, |watch| encoder.decode_documents(&cut(ids, offsets)?, threads, || watch.keep_going()))?;
        arrays_of(py, runs, "uint8", num_threads)
    }

    /// The text of some ids. Raises UnicodeDecodeError (a ValueError) if they end inside a character; see decode_bytes.
    fn decode<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.decode_bytes(py, ids)?.call_method1("decode", ("utf-8",))
    }

    /// The bytes of some ids: a sequence of int or an array of integers.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let encoder = self.encoder(py)?;
        let bytes = if ids.hasattr("__array_interface__")? {
            let ids = converted(ids, "uint32")?;
            // SAFETY: as in encode_documents.
            let ids = unsafe { &*memory_of::<u32>(&ids)? };
            py.detach(|| encoder.decode(ids))
        } else {
            encoder.decode(&ids_of(ids)?)
        };
        Ok(PyBytes::new(py, &bytes?))
    }

    /// The pieces into which the pattern splits a text; merges never cross their boundaries.
    fn split<'t>(&self, py: Python<'_>, text: &'t str) -> PyResult<Vec<&'t str>> {
        Ok(self.encoder(py)?.split(text)?)
    }

    /// For pickle and copy: the bytes of all tokens and the pattern, no code.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<(Bound<'py, PyAny>, (), State)> {
        let this = slf.borrow();
        let tokens = this.tokens.iter().map(|token| PyBackedBytes::from(PyBytes::new(slf.py(), token)));
        Ok((slf.get_type().into_any(), (), (tokens.collect(), this.pattern.clone())))
    }

    fn __setstate__(&mut self, state: State) {
        let (tokens, pattern) = state;
        *self = Tokenizer::of(tokens.iter().map(|token| Box::from(&token[..])).collect(), pattern);
    }

    /// One more than the largest id.
    #[getter]
    fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    fn get_pattern(&self) -> &str {
        &self.pattern
    }

    /// (token bytes, id) of every token, in the order of the ids.
    fn get_mergeable_ranks<'py>(&self, py: Python<'py>) -> Vec<(Bound<'py, PyBytes>, u32)> {
        let tokens = self.tokens.iter().zip(0..).filter(|(token, _)| !token.is_empty());
        tokens.map(|(token, id)| (PyBytes::new(py, token), id)).collect()
    }
}

impl Tokenizer {
    fn of(tokens: Vec<Token>, pattern: String) -> Self {
        Tokenizer { tokens, pattern, encoder: PyOnceLock::new(), ints: PyOnceLock::new() }
    }

    fn encoder(&self, py: Python<'_>) -> PyResult<&Encoder> {
        self.encoder.get_or_try_init(py, || Ok(Encoder::new(&self.tokens, &self.pattern)?))
    }

    fn list<'py>(&self, py: Python<'py>, ids: &[u32]) -> PyResult<Bound<'py, PyList>> {
        let make = || (0..self.tokens.len()).map(|id| Ok(id.into_pyobject(py)?.into_any().unbind())).collect::<PyResult<_>>();
        let ints = self.ints.get_or_try_init(py, make)?;
        PyList::new(py, ids.iter().map(|&id| ints[id as usize].bind(py)))
    }

    fn encode_all(&self, py: Python<'_>, texts: &Bound<'_, PyAny>, num_threads: Option<usize>) -> PyResult<Documents<u32>> {
        if texts.is_instance_of::<PyString>() {
            return Err(PyTypeError::new_err("texts must be a list of str, not one str"));
        }
        if let Some(arrays) = Strings::import(texts)? {
            if arrays.iter().any(|strings| strings.nulls() > 0) {
                return Err(PyValueError::new_err("the Arrow array has nulls, which are no texts: leave them out (drop_null)"));
            }
            let texts = arrays.iter().flat_map(|strings| strings.rows.iter().map(|row| &strings.as_ref()[row.clone()]));
            return self.encode_texts(py, &texts.collect::<Vec<_>>(), num_threads);
        }
        let texts = texts.try_iter()?.enumerate().map(|(index, text)| str_of(index, &text?)).collect::<PyResult<Vec<_>>>()?;
        self.encode_texts(py, &texts, num_threads).map_err(|error| Str::exception(py, error, &texts))
    }

    fn encode_texts<T: Text>(&self, py: Python<'_>, texts: &[T], num_threads: Option<usize>) -> PyResult<Documents<u32>> {
        let encoder = self.encoder(py)?;
        Watch::over(py, |watch| encoder.encode_documents(texts, worker_threads(num_threads), || watch.keep_going()))
    }
}

type State = (Vec<PyBackedBytes>, String);
type Arrays<'py> = (Bound<'py, PyAny>, Bound<'py, PyAny>);

/// The parts of `items` between neighbouring offsets.
fn cut<'a, T>(items: &'a [T], offsets: &[i64]) -> Result<Vec<&'a [T]>, Error> {
    let part = |ends: &[i64]| items.get(usize::try_from(ends[0]).ok()?..usize::try_from(ends[1]).ok()?);
    match offsets.windows(2).map(part).collect() {
        Some(parts) if offsets.first() == Some(&0) && offsets.last() == Some(&(items.len() as i64)) => Ok(parts),
        _ => Err(Error::Setting(format!("offsets must ascend from 0 to {}, the length of what they cut", items.len()))),
    }
}

/// Two numpy arrays, the concatenated items and the offsets, filled without the GIL.
fn arrays_of<'py, T: Copy + Send + Sync>(
    py: Python<'py>,
    documents: Documents<T>,
    dtype: &str,
    num_threads: Option<usize>,
) -> PyResult<Arrays<'py>> {
    let (Documents { runs, lengths }, threads) = (documents, worker_threads(num_threads));
    let empty = |len: usize, dtype: &str| py.import("numpy")?.call_method1("empty", (len, dtype));
    let items = empty(runs.iter().map(Vec::len).sum(), dtype)?;
    let offsets = empty(lengths.len() + 1, "int64")?;
    // SAFETY: both arrays were made here, so they are contiguous, of this type, and not shared.
    let (mut places, ends) = unsafe { (&mut *memory_of::<T>(&items)?, &mut *memory_of::<i64>(&offsets)?) };
    py.detach(|| {
        ends[0] = 0;
        for (index, length) in lengths.iter().enumerate() {
            ends[index + 1] = ends[index] + *length as i64;
        }
        let places = runs.iter().map(|run| {
            let here;
            (here, places) = std::mem::take(&mut places).split_at_mut(run.len());
            here
        });
        let mut copies: Vec<_> = places.zip(&runs).collect();
        let share = copies.len().div_ceil(threads).max(1);
        in_parallel(copies.chunks_mut(share), |copies| {
            copies.iter_mut().for_each(|(place, run)| place.copy_from_slice(run));
            Ok(())
        })
    })?;
    Ok((items, offsets))
}

/// `array` with that dtype, contiguous. ValueError for more than one dimension and for values that do not fit the dtype.
fn converted<'py>(array: &Bound<'py, PyAny>, dtype: &str) -> PyResult<Bound<'py, PyAny>> {
    let numpy = array.py().import("numpy")?;
    let given = numpy.call_method1("asarray", (array,))?;
    let array = numpy.call_method1("require", (&given, dtype, "CA"))?;
    let same = array.is(&given) || numpy.call_method1("array_equal", (&array, &given))?.extract()?;
    if !same || array.getattr("ndim")?.extract::<usize>()? != 1 {
        return Err(PyValueError::new_err(format!("the array must have one dimension and values of {dtype}")));
    }
    Ok(array)
}

/// The items of a numpy array that is contiguous and aligned and has the type T.
fn memory_of<T>(array: &Bound<'_, PyAny>) -> PyResult<*mut [T]> {
    let address: usize = array.getattr("__array_interface__")?.get_item("data")?.get_item(0)?.extract()?;
    Ok(match array.len()? {
        0 => &mut [],
        len => std::ptr::slice_from_raw_parts_mut(address as *mut T, len),
    })
}

fn str_of(index: usize, text: &Bound<'_, PyAny>) -> PyResult<Str> {
    let Ok(text) = text.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("text {index} is a {}, not a str", text.get_type().name()?)));
    };
    Str::of(text)
}

/// The ids of a sequence of int; ValueError for an int that cannot be an id.
fn ids_of(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    ids.extract().map_err(|error: PyErr| match error.is_instance_of::<PyOverflowError>(ids.py()) {
        true => PyValueError::new_err(format!("an id is negative or above {}", u32::MAX)),
        false => error,
    })
}

/// Makes a computation without the GIL interruptible: the calling thread looks for Ctrl-C a few times a second.
struct Watch<'a> {
    look: &'a Look<'a>,
    caller: ThreadId,
    looked: Mutex<(Instant, PyResult<()>)>, // the last time, and how that ended
    stop: AtomicBool,
}

type Look<'a> = dyn Fn(Python<'_>) -> PyResult<()> + Sync + 'a;

impl Watch<'_> {
    /// The result of `compute`, which calls `keep_going` now and then and returns an error if that is false.
    fn over<T: Send>(py: Python<'_>, compute: impl FnOnce(&Watch<'_>) -> Result<T, Error> + Send) -> PyResult<T> {
        Watch::calling(py, &|py| py.check_signals(), compute)
    }

    /// Calls `look` at first and then a few times a second.
    fn calling<T: Send>(py: Python<'_>, look: &Look<'_>, compute: impl FnOnce(&Watch<'_>) -> Result<T, Error> + Send) -> PyResult<T> {
        look(py)?;
        let looked = Mutex::new((Instant::now(), Ok(())));
        let watch = Watch { look, caller: current().id(), looked, stop: AtomicBool::new(false) };
        let result = py.detach(|| compute(&watch));
        watch.looked.into_inner().expect("only the caller takes it").1?;
        Ok(result?)
    }

    fn keep_going(&self) -> bool {
        if current().id() == self.caller {
            let (when, ended) = &mut *self.looked.lock().expect("only the caller takes it");
            if ended.is_ok() && when.elapsed() > CALL_EVERY {
                (*when, *ended) = (Instant::now(), Python::attach(self.look));
                self.stop.store(ended.is_err(), Relaxed);
            }
        }
        !self.stop.load(Relaxed)
    }
}

#[pymodule(gil_used = true)]
fn rustbpe(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("VERSION", VERSION)?;
    module.add_class::<Tokenizer>()
}
