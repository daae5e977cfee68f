//! Texts from a Python iterator, for counting: str, or Arrow arrays of strings. Their memory is not copied.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::{PyBackedBytes, PyBackedStr};
use pyo3::types::{PyIterator, PyString};

use crate::arrow::Strings;
use crate::fast::count::Counter;
use crate::fast::pool::Pool;

/// A batch is counted once it has this many bytes, even with fewer than buffer_size documents. Longer texts are split into parts.
const BATCH_BYTES: usize = 1 << 20;
/// The interval at which a long computation checks for Ctrl-C and reports its progress.
pub const CALL_EVERY: Duration = Duration::from_millis(200);

/// The UTF-8 of a Python str, kept alive. A lone surrogate has none and raises UnicodeEncodeError, a ValueError.
pub enum Utf8 {
    Str(PyBackedStr),
    Bytes(PyBackedBytes),
}

impl Utf8 {
    /// A copy unless the text is ASCII: Python would keep its own UTF-8 copy for the lifetime of the text.
    pub fn of(text: &Bound<'_, PyString>) -> PyResult<Self> {
        Ok(match text.call_method0(intern!(text.py(), "isascii"))?.is_truthy()? {
            true => Utf8::Str(PyBackedStr::try_from(text.clone())?),
            false => Utf8::Bytes(text.encode_utf8()?.into()),
        })
    }

    pub fn bytes(&self) -> &[u8] {
        match self {
            Utf8::Str(text) => text.as_bytes(),
            Utf8::Bytes(bytes) => bytes,
        }
    }
}

/// A text, or a part of one.
pub struct Text {
    owner: Owner,
    start: usize,
    end: usize,
}

enum Owner {
    Python(Utf8),
    Strings(Arc<Strings>),
    Shared(Arc<Owner>), // among the parts of a long text
}

impl Owner {
    fn bytes(&self) -> &[u8] {
        match self {
            Owner::Python(text) => text.bytes(),
            Owner::Strings(strings) => strings.data(),
            Owner::Shared(owner) => owner.bytes(),
        }
    }
}

impl AsRef<[u8]> for Text {
    fn as_ref(&self) -> &[u8] {
        &self.owner.bytes()[self.start..self.end]
    }
}

/// Counts the pieces of all texts of an iterator on `threads` threads, while this one reads. Returns an exception of the iterator.
pub fn count_all(py: Python<'_>, counter: &Counter, iterator: Bound<'_, PyIterator>, buffer_size: usize, threads: usize) -> PyResult<()> {
    std::thread::scope(|scope| {
        let pool = counter.start(scope, threads);
        let mut reader = Reader { py, counter, pool, batch: Vec::new(), bytes: 0, texts: 0, buffer_size };
        let mut result = iterator.into_iter().try_for_each(|item| reader.read(item?)).and_then(|()| reader.send());
        // Wait for the threads in any case: they hold memory of Python objects.
        while !reader.pool.is_idle() {
            if result.is_err() {
                counter.stop();
            }
            result = result.and(reader.wait());
        }
        result
    })
}

struct Reader<'scope, 'py> {
    py: Python<'py>,
    counter: &'scope Counter,
    pool: Pool<'scope, Text>,
    batch: Vec<Text>,
    bytes: usize,
    texts: usize, // read so far
    buffer_size: usize,
}

impl<'py> Reader<'_, 'py> {
    fn read(&mut self, item: Bound<'py, PyAny>) -> PyResult<()> {
        match item.cast::<PyString>() {
            Ok(text) => {
                let owner = Owner::Python(Utf8::of(text)?);
                let end = owner.bytes().len();
                self.push(owner, 0, end)
            }
            Err(_) => {
                let Some(arrays) = Strings::import(&item)? else {
                    let kind = item.get_type().name()?;
                    return Err(PyTypeError::new_err(format!("text {} is a {kind}, not a str or an Arrow array of them", self.texts)));
                };
                for strings in arrays.into_iter().map(Arc::new) {
                    for row in &strings.rows {
                        self.push(Owner::Strings(strings.clone()), row.start, row.end)?;
                    }
                }
                Ok(())
            }
        }
    }

    fn push(&mut self, owner: Owner, start: usize, end: usize) -> PyResult<()> {
        self.texts += 1;
        if end - start <= 2 * BATCH_BYTES {
            return self.put(Text { owner, start, end });
        }
        let owner = Arc::new(owner);
        let mut from = start;
        while from < end {
            let cut = self.counter.splitter().border(&owner.bytes()[from..end], BATCH_BYTES);
            self.put(Text { owner: Owner::Shared(owner.clone()), start: from, end: from + cut })?;
            from += cut;
        }
        Ok(())
    }

    fn put(&mut self, text: Text) -> PyResult<()> {
        self.bytes += text.end - text.start;
        self.batch.push(text);
        match self.bytes >= BATCH_BYTES || self.batch.len() >= self.buffer_size {
            true => self.send(),
            false => Ok(()),
        }
    }

    fn send(&mut self) -> PyResult<()> {
        self.py.check_signals()?;
        self.pool.add(std::mem::take(&mut self.batch));
        self.bytes = 0;
        while self.pool.is_full() {
            self.wait()?;
        }
        Ok(())
    }

    /// Waits a moment for a batch to be counted, without the GIL, and drops it with the GIL.
    fn wait(&mut self) -> PyResult<()> {
        let pool = &mut self.pool;
        match self.py.detach(|| pool.finished(CALL_EVERY)) {
            Some((_, counted)) => Ok(counted?),
            None => self.py.check_signals(),
        }
    }
}
