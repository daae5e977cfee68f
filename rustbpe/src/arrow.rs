//! Arrow arrays of strings from Python, through the C data interface, without a copy; dropping them releases the memory.
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

/// Owner of one of the three structs, moved out of a capsule or filled by a producer. Released when dropped.
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
    /// A struct marked as released, for a producer to fill.
    fn empty() -> Self {
        // SAFETY: the structs hold integers, pointers and optional functions, all of which may be zero.
        Owned(unsafe { std::mem::zeroed() })
    }

    fn take(capsule: &Bound<'_, PyAny>) -> PyResult<Self> {
        let place = capsule.cast::<PyCapsule>()?.pointer_checked(Some(T::NAME))?.cast::<T>().as_ptr();
        // SAFETY: a capsule of this name holds this struct. Moving it means to copy it and to mark the original as released;
        // a released one owns nothing, and its pointers refer to freed memory.
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

/// An array of strings: the position of each in `data`, without nulls.
pub struct Strings {
    pub rows: Vec<Range<usize>>,
    data: *const u8,
    data_len: usize,
    copied: Vec<u8>, // the strings of an array of views, which lie here and there
    owner: Owned<ArrowArray>,
}

// SAFETY: the memory of an Arrow array does not change, and any thread may read and release it.
unsafe impl Send for Strings {}
unsafe impl Sync for Strings {}

impl Strings {
    /// The arrays of an object that has __arrow_c_array__ or __arrow_c_stream__; None for another object.
    pub fn import(object: &Bound<'_, PyAny>) -> PyResult<Option<Vec<Strings>>> {
        if object.hasattr("__arrow_c_array__")? {
            let (schema, array): (Bound<'_, PyAny>, Bound<'_, PyAny>) = object.call_method0("__arrow_c_array__")?.extract()?;
            return Ok(Some(vec![Strings::of(Owned::take(&array)?, layout_of(&Owned::take(&schema)?)?)?]));
        }
        if !object.hasattr("__arrow_c_stream__")? {
            return Ok(None);
        }
        let mut stream = Owned::<ArrowArrayStream>::take(&object.call_method0("__arrow_c_stream__")?)?;
        let mut schema = Owned::empty();
        stream.ask(|stream| stream.get_schema, &mut schema)?;
        let (layout, mut arrays) = (layout_of(&schema)?, Vec::new());
        loop {
            let mut array = Owned::empty();
            stream.ask(|stream| stream.get_next, &mut array)?;
            if array.0.release.is_none() {
                return Ok(Some(arrays)); // the end of the stream
            }
            arrays.push(Strings::of(array, layout)?);
        }
    }

    fn of(owner: Owned<ArrowArray>, layout: Layout) -> PyResult<Self> {
        let (Ok(first), Ok(length)) = (usize::try_from(owner.0.offset), usize::try_from(owner.0.length)) else { return Err(damaged()) };
        let rows = Vec::with_capacity(length);
        let mut strings = Strings { rows, data: std::ptr::null(), data_len: 0, copied: Vec::new(), owner };
        if length == 0 {
            return Ok(strings);
        }
        let array = &strings.owner.0;
        let buffers = match usize::try_from(array.n_buffers) {
            Ok(number @ 3..) if !array.buffers.is_null() => {
                // SAFETY: there are so many pointers to buffers.
                unsafe { std::slice::from_raw_parts(array.buffers.cast::<*const u8>(), number) }
            }
            _ => return Err(damaged()),
        };
        let rows = first..first.checked_add(length).ok_or_else(damaged)?;
        if buffers[1].is_null() {
            return Err(damaged());
        }
        // SAFETY: the buffers are those of an array of this layout, which has these rows; the interface gives no lengths to check.
        unsafe {
            match layout {
                Layout::Views => strings.copy_views(buffers, rows),
                Layout::Offsets(_) if buffers.len() != 3 => Err(damaged()),
                Layout::Offsets(width) => strings.set_offsets(buffers[0], buffers[1], buffers[2], rows, width),
            }?;
        }
        Ok(strings)
    }

    /// Checks the offsets, and leaves the bytes in place.
    ///
    /// # Safety
    /// `valid` is null or has a bit for each row, `offsets` has one offset of `width` bytes for each row and one more, `data` has bytes up
    /// to the last offset, and all of it lives as long as the owner.
    unsafe fn set_offsets(
        &mut self,
        valid: *const u8,
        offsets: *const u8,
        data: *const u8,
        rows: Range<usize>,
        width: usize,
    ) -> PyResult<()> {
        let offset = |row: usize| {
            // SAFETY: by the contract above; the offsets need not be aligned.
            let signed = unsafe {
                match width {
                    4 => offsets.cast::<i32>().add(row).read_unaligned() as i64,
                    _ => offsets.cast::<i64>().add(row).read_unaligned(),
                }
            };
            usize::try_from(signed).map_err(|_| damaged())
        };
        let mut start = offset(rows.start)?;
        for row in rows {
            let end = offset(row + 1)?;
            if end < start {
                return Err(damaged());
            }
            // SAFETY: by the contract above.
            if unsafe { is_valid(valid, row) } {
                self.rows.push(start..end);
            }
            start = end;
        }
        if start > 0 && data.is_null() {
            return Err(damaged());
        }
        (self.data, self.data_len) = (data, start);
        Ok(())
    }

    /// Copies the strings of views. A view has 16 bytes: the length (i32), then the string if it has at most 12 bytes, else its first
    /// four bytes, the number of its buffer and its start there (i32).
    ///
    /// # Safety
    /// `buffers` are the bits of rows (or null), views for all rows, the buffers of long strings, and the lengths of these (i64).
    unsafe fn copy_views(&mut self, buffers: &[*const u8], rows: Range<usize>) -> PyResult<()> {
        let [valid, views, data @ .., lengths] = buffers else { return Err(damaged()) };
        if lengths.is_null() && !data.is_empty() {
            return Err(damaged());
        }
        for row in rows {
            // SAFETY: by the contract above, for this row.
            if !unsafe { is_valid(*valid, row) } {
                continue;
            }
            // SAFETY: as above; views need not be aligned.
            let view = unsafe { views.add(16 * row).cast::<[u8; 16]>().read_unaligned() };
            let number = |at: usize| i32::from_le_bytes(*view[at..].first_chunk().expect("4 bytes"));
            let length = usize::try_from(number(0)).map_err(|_| damaged())?;
            let before = self.copied.len();
            if length <= 12 {
                self.copied.extend_from_slice(&view[4..4 + length]);
            } else {
                let (Ok(buffer), Ok(start)) = (usize::try_from(number(8)), usize::try_from(number(12))) else { return Err(damaged()) };
                let &from = data.get(buffer).filter(|from| !from.is_null()).ok_or_else(damaged)?;
                // SAFETY: one length for each buffer.
                let room = unsafe { lengths.cast::<i64>().add(buffer).read_unaligned() };
                if start + length > usize::try_from(room).map_err(|_| damaged())? {
                    return Err(damaged());
                }
                // SAFETY: within the length of this buffer.
                self.copied.extend_from_slice(unsafe { std::slice::from_raw_parts(from.add(start), length) });
            }
            self.rows.push(before..self.copied.len());
        }
        (self.data, self.data_len) = (self.copied.as_ptr(), self.copied.len());
        Ok(())
    }

    /// The number of nulls.
    pub fn nulls(&self) -> usize {
        self.owner.0.length as usize - self.rows.len()
    }
}

impl AsRef<[u8]> for Strings {
    /// The bytes of all strings: UTF-8, if the producer has checked them.
    fn as_ref(&self) -> &[u8] {
        match self.data_len {
            0 => &[],
            // SAFETY: the array, kept alive here, has bytes up to its last offset; or these are `copied`, which no longer changes.
            length => unsafe { std::slice::from_raw_parts(self.data, length) },
        }
    }
}

type Get<T> = Option<unsafe extern "C" fn(*mut ArrowArrayStream, *mut T) -> c_int>;

impl Owned<ArrowArrayStream> {
    fn ask<T: Released>(&mut self, get: impl Fn(&ArrowArrayStream) -> Get<T>, answer: &mut Owned<T>) -> PyResult<()> {
        let Some(get) = get(&self.0) else { return Err(PyValueError::new_err("the Arrow stream has been read already")) };
        // SAFETY: a stream that is not released has its functions, which fill their argument or return an error.
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

fn damaged() -> PyErr {
    PyValueError::new_err("the Arrow array is damaged: its offsets do not ascend, or its buffers are missing")
}

/// # Safety
/// `bits` is null, or has a bit for the row.
unsafe fn is_valid(bits: *const u8, row: usize) -> bool {
    // SAFETY: by the contract above.
    bits.is_null() || unsafe { *bits.add(row / 8) } >> (row % 8) & 1 == 1
}

#[derive(Clone, Copy)]
enum Layout {
    /// Of Arrow's string, 4 bytes, and of its large_string, 8.
    Offsets(usize),
    /// Of its string_view, which polars uses.
    Views,
}

fn layout_of(schema: &Owned<ArrowSchema>) -> PyResult<Layout> {
    let format = match schema.0.format.is_null() {
        true => c"",
        // SAFETY: a format is a C string that lives as long as the schema.
        false => unsafe { CStr::from_ptr(schema.0.format) },
    };
    match format.to_bytes() {
        b"u" if schema.0.dictionary.is_null() => Ok(Layout::Offsets(4)),
        b"U" if schema.0.dictionary.is_null() => Ok(Layout::Offsets(8)),
        b"vu" if schema.0.dictionary.is_null() => Ok(Layout::Views),
        _ => Err(PyTypeError::new_err(format!("an Arrow array of strings is needed, not of the format {format:?}"))),
    }
}
