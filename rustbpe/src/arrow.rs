//! Arrow arrays of strings from Python, by the C data interface: the memory stays where it is, and is kept until dropped.
//!
//! <https://arrow.apache.org/docs/format/CDataInterface.html> and CStreamInterface, CDataInterface/PyCapsuleInterface there.

use std::ffi::{c_char, c_int, c_void, CStr};
use std::ops::Range;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

#[repr(C)]
struct ArrowSchema {
    format: *const c_char,
    name: *const c_char,
    metadata: *const c_char,
    flags: i64,
    n_children: i64,
    children: *mut *mut ArrowSchema,
    dictionary: *mut ArrowSchema,
    release: Option<unsafe extern "C" fn(*mut ArrowSchema)>,
    private_data: *mut c_void,
}

#[repr(C)]
struct ArrowArray {
    length: i64,
    null_count: i64,
    offset: i64,
    n_buffers: i64,
    n_children: i64,
    buffers: *const *const c_void,
    children: *mut *mut ArrowArray,
    dictionary: *mut ArrowArray,
    release: Option<unsafe extern "C" fn(*mut ArrowArray)>,
    private_data: *mut c_void,
}

#[repr(C)]
struct ArrowArrayStream {
    get_schema: Option<unsafe extern "C" fn(*mut ArrowArrayStream, *mut ArrowSchema) -> c_int>,
    get_next: Option<unsafe extern "C" fn(*mut ArrowArrayStream, *mut ArrowArray) -> c_int>,
    get_last_error: Option<unsafe extern "C" fn(*mut ArrowArrayStream) -> *const c_char>,
    release: Option<unsafe extern "C" fn(*mut ArrowArrayStream)>,
    private_data: *mut c_void,
}

/// The three structs, as their owner: taken out of a capsule or filled by a producer, released when dropped.
struct Owned<T: Released>(T);

trait Released: Sized {
    const NAME: &'static CStr;
    fn release(&mut self) -> &mut Option<unsafe extern "C" fn(*mut Self)>;
}

macro_rules! released {
    ($($name:ident $capsule:literal)*) => {$(
        impl Released for $name {
            const NAME: &'static CStr = $capsule;
            fn release(&mut self) -> &mut Option<unsafe extern "C" fn(*mut Self)> {
                &mut self.release
            }
        }
    )*};
}
released!(ArrowSchema c"arrow_schema" ArrowArray c"arrow_array" ArrowArrayStream c"arrow_array_stream");

impl<T: Released> Owned<T> {
    /// Released already: what a producer may fill.
    fn empty() -> Self {
        // SAFETY: the structs hold integers, pointers and optional functions, all of which may be zero.
        Owned(unsafe { std::mem::zeroed() })
    }

    fn take(capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        let place = capsule.cast::<PyCapsule>()?.pointer_checked(Some(T::NAME))?.cast::<T>().as_ptr();
        // SAFETY: a capsule of this name holds this struct. Moving it means to copy it and to mark the original as released;
        // one that is released already owns nothing, and its pointers lead to freed memory.
        unsafe {
            if (*place).release().is_none() {
                return Err(PyValueError::new_err(format!("the Arrow capsule {:?} was read before: each can be read once", T::NAME)));
            }
            let taken = Owned(std::ptr::read(place));
            *(*place).release() = None;
            Ok(taken)
        }
    }
}

impl<T: Released> Drop for Owned<T> {
    fn drop(&mut self) {
        if let Some(release) = *self.0.release() {
            // SAFETY: a struct that is not marked as released may be released, once.
            unsafe { release(&mut self.0) }
        }
    }
}

/// An array of strings: where each lies in `data`, nulls left out.
pub struct Strings {
    pub rows: Vec<Range<usize>>,
    data: *const u8,
    data_len: usize,
    _owner: Owned<ArrowArray>,
}

// SAFETY: the memory of an Arrow array does not change, and any thread may read and release it.
unsafe impl Send for Strings {}
unsafe impl Sync for Strings {}

impl Strings {
    /// The arrays of an object that has __arrow_c_array__ or __arrow_c_stream__; None for another object.
    pub fn import(object: &Bound<'_, PyAny>) -> PyResult<Option<Vec<Strings>>> {
        if object.hasattr("__arrow_c_array__")? {
            let (schema, array): (Bound<'_, PyAny>, Bound<'_, PyAny>) = object.call_method0("__arrow_c_array__")?.extract()?;
            return Ok(Some(vec![Strings::of(Owned::take(&array)?, offset_bytes(&Owned::take(&schema)?)?)?]));
        }
        if !object.hasattr("__arrow_c_stream__")? {
            return Ok(None);
        }
        let mut stream = Owned::<ArrowArrayStream>::take(&object.call_method0("__arrow_c_stream__")?)?;
        let mut schema = Owned::empty();
        stream.ask(|stream| stream.get_schema, &mut schema)?;
        let (wide, mut arrays) = (offset_bytes(&schema)?, Vec::new());
        loop {
            let mut array = Owned::empty();
            stream.ask(|stream| stream.get_next, &mut array)?;
            if array.0.release.is_none() {
                return Ok(Some(arrays)); // the end of the stream
            }
            arrays.push(Strings::of(array, wide)?);
        }
    }

    /// Checks what can be checked: the interface does not say how long a buffer is.
    fn of(owner: Owned<ArrowArray>, offset_bytes: usize) -> PyResult<Self> {
        let damaged = || PyValueError::new_err("the Arrow array is damaged: its offsets do not ascend, or its buffers are missing");
        let array = &owner.0;
        let (Ok(first), Ok(length)) = (usize::try_from(array.offset), usize::try_from(array.length)) else { return Err(damaged()) };
        let mut strings = Strings { rows: Vec::with_capacity(length), data: std::ptr::null(), data_len: 0, _owner: owner };
        if length == 0 {
            return Ok(strings);
        }
        let array = &strings._owner.0;
        if array.n_buffers != 3 || array.buffers.is_null() {
            return Err(damaged());
        }
        // SAFETY: an array of strings has three buffers: a bit per row or nothing, offsets, bytes up to the last offset.
        let (valid, offsets, data) = unsafe {
            let buffer = |i: usize| (*array.buffers.add(i)).cast::<u8>();
            (buffer(0), buffer(1), buffer(2))
        };
        if offsets.is_null() {
            return Err(damaged());
        }
        let offset = |row: usize| {
            // SAFETY: rows are from the array's first to one behind its last, which is how many offsets there are.
            let signed = unsafe {
                match offset_bytes {
                    4 => offsets.cast::<i32>().add(row).read_unaligned() as i64,
                    _ => offsets.cast::<i64>().add(row).read_unaligned(),
                }
            };
            usize::try_from(signed).map_err(|_| damaged())
        };
        let mut start = offset(first)?;
        for row in first..first + length {
            let end = offset(row + 1)?;
            if end < start {
                return Err(damaged());
            }
            // SAFETY: there is a bit for every row.
            if valid.is_null() || unsafe { *valid.add(row / 8) } >> (row % 8) & 1 == 1 {
                strings.rows.push(start..end);
            }
            start = end;
        }
        if start > 0 && data.is_null() {
            return Err(damaged());
        }
        (strings.data, strings.data_len) = (data, start);
        Ok(strings)
    }

    /// How many were left out.
    pub fn nulls(&self) -> usize {
        self._owner.0.length as usize - self.rows.len()
    }

    /// The bytes of all strings: UTF-8, if the producer has checked them.
    pub fn data(&self) -> &[u8] {
        match self.data_len {
            0 => &[],
            // SAFETY: the array, kept alive here, has bytes up to its last offset.
            length => unsafe { std::slice::from_raw_parts(self.data, length) },
        }
    }
}

type Get<T> = Option<unsafe extern "C" fn(*mut ArrowArrayStream, *mut T) -> c_int>;

impl Owned<ArrowArrayStream> {
    fn ask<T: Released>(&mut self, get: impl Fn(&ArrowArrayStream) -> Get<T>, answer: &mut Owned<T>) -> PyResult<()> {
        let Some(get) = get(&self.0) else { return Err(PyValueError::new_err("the Arrow stream has been read already")) };
        // SAFETY: a stream that is not released has its functions, which fill what they are given or return an error.
        if unsafe { get(&mut self.0, &mut answer.0) } == 0 {
            return Ok(());
        }
        // SAFETY: the message, if there is one, is valid until the next call.
        let reason = unsafe {
            let message = self.0.get_last_error.map_or(std::ptr::null(), |get| get(&mut self.0));
            (!message.is_null()).then(|| CStr::from_ptr(message).to_string_lossy().into_owned())
        };
        Err(PyValueError::new_err(format!("the Arrow stream failed: {}", reason.unwrap_or_default())))
    }
}

/// 4 for Arrow's string, 8 for its large_string.
fn offset_bytes(schema: &Owned<ArrowSchema>) -> PyResult<usize> {
    let format = match schema.0.format.is_null() {
        true => c"",
        // SAFETY: a format is a C string that lives as long as the schema.
        false => unsafe { CStr::from_ptr(schema.0.format) },
    };
    match format.to_bytes() {
        b"u" if schema.0.dictionary.is_null() => Ok(4),
        b"U" if schema.0.dictionary.is_null() => Ok(8),
        b"vu" => Err(PyTypeError::new_err("Arrow's string_view is not read: cast the column to large_string")),
        _ => Err(PyTypeError::new_err(format!("an Arrow array of strings is needed, not of the format {format:?}"))),
    }
}
