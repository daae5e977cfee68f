//! Strings of Python, read where they lie, and the texts of an iterator, for counting: str, or Arrow arrays of strings.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::string::PyStringData;
use pyo3::types::{PyIterator, PyString};

use crate::arrow::Strings;
use crate::fast::count::Counter;
use crate::fast::pool::Pool;
use crate::{Error, Text};

/// A batch is counted once it has this many bytes, even with fewer than buffer_size documents. Longer texts are split into parts.
const BATCH_BYTES: usize = 1 << 20;
/// The interval at which a long computation checks for Ctrl-C and reports its progress.
pub const CALL_EVERY: Duration = Duration::from_millis(200);

/// A Python str, kept alive and read where it lies, by any thread. Asked for UTF-8, Python would keep a copy for the lifetime of the str.
pub struct Str {
    object: Py<PyString>,
    units: Units,
}

/// Code points in the smallest units that hold all of them.
enum Units {
    One(*const [u8]),
    Two(*const [u16]),
    Four(*const [u32]),
}

// SAFETY: the units of a str do not change, and live as long as `object`.
unsafe impl Send for Str {}
unsafe impl Sync for Str {}

impl Str {
    pub fn of(text: &Bound<'_, PyString>) -> PyResult<Self> {
        // SAFETY: this reads a bit field of CPython's, laid out like a C compiler does; tests compare the texts with Python's.
        let units = match unsafe { text.data()? } {
            PyStringData::Ucs1(units) => Units::One(units),
            PyStringData::Ucs2(units) => Units::Two(units),
            PyStringData::Ucs4(units) => Units::Four(units),
        };
        Ok(Str { object: text.clone().unbind(), units })
    }

    /// The exception for an error of these texts: UnicodeEncodeError, a ValueError, if it is a lone surrogate, which has no UTF-8.
    pub fn exception<'a>(py: Python<'_>, error: PyErr, texts: impl IntoIterator<Item = &'a Str>) -> PyErr {
        match error.is_instance_of::<PyValueError>(py) {
            true => texts.into_iter().find_map(|text| text.object.bind(py).encode_utf8().err()).unwrap_or(error),
            false => error,
        }
    }
}

impl Text for Str {
    fn size(&self) -> usize {
        match self.units {
            Units::One(units) => units.len(),
            Units::Two(units) => 2 * units.len(),
            Units::Four(units) => 4 * units.len(),
        }
    }

    fn utf8(&self) -> Result<Cow<'_, str>, Error> {
        // SAFETY: as above, and ASCII is UTF-8.
        let utf8 = unsafe {
            match self.units {
                Units::One(units) if (*units).is_ascii() => return Ok(Cow::Borrowed(std::str::from_utf8_unchecked(&*units))),
                Units::One(units) => converted(&*units),
                Units::Two(units) => converted(&*units),
                Units::Four(units) => converted(&*units),
            }
        };
        utf8.map(Cow::Owned).ok_or_else(|| Error::Text("a lone surrogate".to_owned()))
    }
}

/// Code points as UTF-8; None if one is a surrogate. Most are ASCII, and 16 of these are copied at once.
fn converted<U: Copy + Into<u32>>(units: &[U]) -> Option<String> {
    let mut utf8 = String::with_capacity(units.len() + units.len() / 8);
    for chunk in units.chunks(16) {
        match <&[U; 16]>::try_from(chunk) {
            Ok(units) if units.iter().fold(0, |all, &unit| all | unit.into()) < 0x80 => {
                let bytes = units.map(|unit| unit.into() as u8);
                // SAFETY: all are ASCII.
                utf8.push_str(unsafe { std::str::from_utf8_unchecked(&bytes) });
            }
            _ => chunk.iter().try_for_each(|&unit| char::from_u32(unit.into()).map(|c| utf8.push(c)))?,
        }
    }
    Some(utf8)
}

/// A text, or a part of one.
enum Part {
    Str(Str),
    Slice(Shared, Range<usize>),
}

type Shared = Arc<dyn AsRef<[u8]> + Send + Sync>;

impl Text for Part {
    fn size(&self) -> usize {
        match self {
            Part::Str(text) => text.size(),
            Part::Slice(_, range) => range.len(),
        }
    }

    fn utf8(&self) -> Result<Cow<'_, str>, Error> {
        match self {
            Part::Str(text) => text.utf8(),
            Part::Slice(owner, range) => (**owner).as_ref()[range.clone()].utf8(),
        }
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
    pool: Pool<'scope, Part>,
    batch: Vec<Part>,
    bytes: usize,
    texts: usize, // read so far
    buffer_size: usize,
}

impl<'py> Reader<'_, 'py> {
    fn read(&mut self, item: Bound<'py, PyAny>) -> PyResult<()> {
        if let Ok(text) = item.cast::<PyString>() {
            self.texts += 1;
            let text = Str::of(text)?;
            if text.size() <= 2 * BATCH_BYTES {
                return self.put(Part::Str(text));
            }
            let utf8 = text.utf8().map_err(|error| Str::exception(self.py, error.into(), [&text]))?.into_owned();
            let all = 0..utf8.len();
            return self.cut(Arc::new(utf8), all);
        }
        let Some(arrays) = Strings::import(&item)? else {
            let kind = item.get_type().name()?;
            return Err(PyTypeError::new_err(format!("text {} is a {kind}, not a str or an Arrow array of them", self.texts)));
        };
        for strings in arrays.into_iter().map(Arc::new) {
            self.texts += strings.rows.len();
            strings.rows.iter().try_for_each(|row| self.cut(strings.clone(), row.clone()))?;
        }
        Ok(())
    }

    fn cut(&mut self, owner: Shared, range: Range<usize>) -> PyResult<()> {
        let parts = self.counter.splitter().cut(&(*owner).as_ref()[range.clone()], BATCH_BYTES);
        parts.map(|part| range.start + part.start..range.start + part.end).try_for_each(|part| self.put(Part::Slice(owner.clone(), part)))
    }

    fn put(&mut self, text: Part) -> PyResult<()> {
        self.bytes += text.size();
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
            Some((_, Ok(()))) => Ok(()),
            Some((batch, Err(error))) => {
                let texts = batch.iter().filter_map(|part| if let Part::Str(text) = part { Some(text) } else { None });
                Err(Str::exception(self.py, error.into(), texts))
            }
            None => self.py.check_signals(),
        }
    }
}
