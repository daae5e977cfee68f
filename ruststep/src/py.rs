//! The Python module: checks the arguments, releases the GIL. Arrays are NumPy's views of torch's tensors, never copies.

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::kernel::{is_fast, Bf16, Stored};
use crate::step::{step, Model, Row, Shape, Weights};

/// To be raised, here and in zangchat/engine/native.py, with every change of what Python passes or gets: so an older build is noticed.
const VERSION: u32 = 1;

/// An array of weights (outputs, inputs): f32, bf16 as int16, fp16 as uint16, or int8 with scales.
enum Array {
    F32(PyBuffer<f32>),
    Bf16(PyBuffer<i16>),
    F16(PyBuffer<u16>),
    Int8(PyBuffer<i8>, PyBuffer<f32>),
}

fn bad<T>(message: &str) -> PyResult<T> {
    Err(PyValueError::new_err(message.to_owned()))
}

fn buffer<T: Element>(array: &Bound<'_, PyAny>, shape: &[usize]) -> PyResult<PyBuffer<T>> {
    let found = PyBuffer::<T>::get(array)?;
    match found.is_c_contiguous() && found.shape() == shape {
        true => Ok(found),
        false => bad(&format!("an array is not one of shape {shape:?}, but {:?}", found.shape())),
    }
}

/// # Safety
/// U is a T, and nobody writes to the array meanwhile.
unsafe fn items<T: Element, U>(found: &PyBuffer<T>) -> &[U] {
    std::slice::from_raw_parts(found.buf_ptr() as *const U, found.item_count())
}

/// # Safety
/// As `items`, and nobody reads it, either.
unsafe fn writable<T: Element, U>(found: &mut PyBuffer<T>) -> PyResult<&mut [U]> {
    match found.readonly() {
        true => bad("an array to write into is read-only"),
        false => Ok(std::slice::from_raw_parts_mut(found.buf_ptr() as *mut U, found.item_count())),
    }
}

impl Array {
    fn of(given: &Bound<'_, PyAny>, outputs: usize, inputs: usize) -> PyResult<Self> {
        let shape = [outputs, inputs];
        if let Ok((weights, scales)) = given.extract::<(Bound<'_, PyAny>, Bound<'_, PyAny>)>() {
            return Ok(Array::Int8(buffer(&weights, &shape)?, buffer(&scales, &shape[..1])?));
        }
        let half = buffer(given, &shape).map(Array::Bf16).or_else(|_| buffer(given, &shape).map(Array::F16));
        half.or_else(|_| buffer(given, &shape).map(Array::F32))
    }

    /// # Safety
    /// Nobody writes to the array meanwhile.
    unsafe fn weights(&self) -> Weights<'_> {
        match self {
            Array::F32(w) => Weights::F32(items(w)),
            Array::Bf16(w) => Weights::Bf16(items(w)),
            Array::F16(w) => Weights::F16(items(w)),
            Array::Int8(w, scales) => Weights::Int8(items(w), items(scales)),
        }
    }
}

/// The step of a model whose weights stay where they are: what changes them changes the next step.
#[pyclass(module = "ruststep", frozen)]
struct Step {
    shape: Shape,
    embeddings: usize,
    embedding: Array,
    layers: Vec<[Array; 4]>,
    values: Vec<Option<Array>>,
    head: Array,
    rotary: PyBuffer<f32>,
}

#[pymethods]
impl Step {
    /// embedding (embeddings, width); `layers`: qkv, out, up and down of each; `values` of each: None, or (embeddings, kv_heads x
    /// head_dim); head (outputs, width), of which the first vocab_size count; rotary (positions, head_dim / 2, 2): cos and -sin.
    /// ValueError if they do not fit together, or for a machine without the vectors.
    #[new]
    #[pyo3(signature = (*, heads, kv_heads, head_dim, hidden, vocab_size, outputs, eps, cap, key_offset, embedding, layers, values, head, rotary))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        hidden: usize,
        vocab_size: usize,
        outputs: usize,
        eps: f32,
        cap: f32,
        key_offset: bool,
        embedding: Bound<'_, PyAny>,
        layers: Vec<[Bound<'_, PyAny>; 4]>,
        values: Vec<Option<Bound<'_, PyAny>>>,
        head: Bound<'_, PyAny>,
        rotary: Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let (embeddings, width): (usize, usize) = embedding.getattr("shape")?.extract()?;
        let grouped = kv_heads > 0 && heads % kv_heads == 0 && head_dim > 0 && head_dim % 8 == 0;
        let embedding = Array::of(&embedding, embeddings, width)?;
        let table =
            |given: &Option<Bound<'_, PyAny>>| given.as_ref().map(|given| Array::of(given, embeddings, kv_heads * head_dim)).transpose();
        let values = values.iter().map(table).collect::<PyResult<Vec<_>>>()?;
        if !grouped
            || width == 0
            || values.len() != layers.len()
            || values.iter().flatten().chain([&embedding]).any(|table| matches!(table, Array::Int8(..)))
            || vocab_size > outputs
            || !is_fast()
        {
            return bad("no step for this shape, or on this machine");
        }
        let layers = layers.iter().map(|[qkv, out, up, down]| {
            let (q_size, qkv_size) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim);
            let (qkv, out) = (Array::of(qkv, qkv_size, width)?, Array::of(out, width, q_size)?);
            Ok([qkv, out, Array::of(up, hidden, width)?, Array::of(down, width, hidden)?])
        });
        Ok(Step {
            values,
            layers: layers.collect::<PyResult<_>>()?,
            embedding,
            head: Array::of(&head, outputs, width)?,
            rotary: buffer(&rotary, &[rotary.len()?, head_dim / 2, 2])?,
            embeddings,
            shape: Shape { width, heads, kv_heads, head_dim, hidden, vocab_size, eps, cap, key_offset },
        })
    }

    /// Appends a token to each of some rows of a cache (layers, 2 x kv_heads, rows, capacity, head_dim), f32 or bf16 as int16, which
    /// hold `lengths` tokens, and writes the logits into `out` (rows, vocab_size).
    #[allow(clippy::too_many_arguments)]
    fn __call__(
        &self,
        py: Python<'_>,
        tokens: Vec<usize>,
        rows: Vec<usize>,
        lengths: Vec<usize>,
        storage: Bound<'_, PyAny>,
        out: Bound<'_, PyAny>,
        threads: usize,
    ) -> PyResult<()> {
        let Shape { kv_heads, head_dim, vocab_size, key_offset, .. } = self.shape;
        let (.., cache_rows, capacity, _): (usize, usize, usize, usize, usize) = storage.getattr("shape")?.extract()?;
        let shape = [self.layers.len(), 2 * kv_heads, cache_rows, capacity, head_dim];
        let mut out: PyBuffer<f32> = buffer(&out, &[rows.len(), vocab_size])?;
        let mut seen = vec![false; cache_rows];
        let longest = capacity.saturating_sub(key_offset.into()).min(self.rotary.shape()[0]);
        let mut fits = |(&row, &length): (&usize, &usize)| row < cache_rows && length < longest && !std::mem::replace(&mut seen[row], true);
        let whole = tokens.len() == rows.len() && lengths.len() == rows.len() && threads > 0;
        if !whole || !rows.iter().zip(&lengths).all(&mut fits) || tokens.iter().any(|&token| token >= self.embeddings) {
            return bad("a token or row that is not there, one without room, or one that is there twice");
        }
        let rows: Vec<Row> = tokens.into_iter().zip(rows).zip(lengths).map(|((token, row), length)| (token, row, length)).collect();
        // SAFETY: checked above. The arrays are the engine's, which waits for this call; nobody else has them.
        unsafe {
            let logits = writable(&mut out)?;
            match buffer::<i16>(&storage, &shape) {
                Ok(mut half) => self.run::<Bf16>(py, threads, writable(&mut half)?, (cache_rows, capacity), &rows, logits),
                Err(_) => {
                    self.run::<f32>(py, threads, writable(&mut buffer::<f32>(&storage, &shape)?)?, (cache_rows, capacity), &rows, logits)
                }
            }
        }
        Ok(())
    }
}

impl Step {
    /// # Safety
    /// As step.
    unsafe fn run<K: Stored>(
        &self,
        py: Python<'_>,
        threads: usize,
        cache: &mut [K],
        places: (usize, usize),
        rows: &[Row],
        logits: &mut [f32],
    ) {
        let model = Model {
            shape: &self.shape,
            embedding: self.embedding.weights(),
            layers: self.layers.iter().map(|four| [0, 1, 2, 3].map(|i| four[i].weights())).collect(),
            values: self.values.iter().map(|table| table.as_ref().map(|table| table.weights())).collect(),
            head: self.head.weights(),
            rotary: items(&self.rotary),
        };
        py.detach(|| step(threads, &model, cache, places, rows, logits));
    }
}

#[pymodule]
fn ruststep(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("VERSION", VERSION)?;
    module.add("IS_FAST", is_fast())?; // whether there is a step for the vectors of this machine
    module.add_class::<Step>()
}
