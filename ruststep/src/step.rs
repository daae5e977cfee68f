//! The step: one new token in each of some rows -> the logits of the next one.
//!
//! ```text
//! embedding -> norm -> layers x [ x += out(attention(norm(x))); x += down(relu(up(norm(x)))^2) ] -> norm -> head -> cap
//! ```
//!
//! as zangchat.engine.model.InferenceGPT computes it. The threads share the outputs of each product and wait for each other after
//! it; what is cheap (norms) each of them computes for itself.

use std::ops::Range;

use crate::kernel::{aligned, attention, exp, products, Bf16, Element, Rows, Stored, F16, GROUP};
use crate::team::{together, Barrier};

/// The weights of a product (outputs, inputs), row by row.
#[derive(Clone, Copy)]
pub enum Weights<'a> {
    F32(&'a [f32]),
    Bf16(&'a [Bf16]),
    F16(&'a [F16]),
    Int8(&'a [i8], &'a [f32]), // with one scale for each output
}

impl Weights<'_> {
    /// Adds row `index` to as many numbers.
    fn add_row(&self, index: usize, to: &mut [f32]) {
        fn add<E: Element>(table: &[E], index: usize, to: &mut [f32]) {
            let size = to.len();
            to.iter_mut().zip(&table[index * size..][..size]).for_each(|(to, w)| *to += w.value());
        }
        match *self {
            Weights::F32(w) => add(w, index, to),
            Weights::Bf16(w) => add(w, index, to),
            Weights::F16(w) => add(w, index, to),
            Weights::Int8(..) => unreachable!("Step::new refuses it"),
        }
    }

    /// These `outputs` of all rows. `unpacked`: see kernel::products.
    ///
    /// # Safety
    /// As kernel::products.
    unsafe fn times(&self, x: &[f32], size: usize, outputs: Range<usize>, unpacked: &mut [f32], out: Common, stride: usize) {
        let rows = Rows { x, size, out: out.0, stride };
        match *self {
            Weights::F32(w) => products(w.as_ptr(), &rows, outputs, unpacked),
            Weights::Bf16(w) => products(w.as_ptr(), &rows, outputs, unpacked),
            Weights::F16(w) => products(w.as_ptr(), &rows, outputs, unpacked),
            Weights::Int8(w, scales) => {
                products(w.as_ptr(), &rows, outputs.clone(), unpacked);
                for row in 0..x.len() / size {
                    let part = out.columns(row, stride, &outputs);
                    part.iter_mut().zip(&scales[outputs.clone()]).for_each(|(x, scale)| *x *= scale);
                }
            }
        }
    }
}

pub struct Shape {
    pub width: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub hidden: usize,
    pub vocab_size: usize,
    pub eps: f32,
    pub cap: f32,
    pub key_offset: bool, // the second half of a key goes one position further: zangchat.nn.attention.offset_keys
}

pub struct Model<'a> {
    pub shape: &'a Shape,
    pub embedding: Weights<'a>,
    pub layers: Vec<[Weights<'a>; 4]>,    // qkv, out, up, down
    pub values: Vec<Option<Weights<'a>>>, // of each layer: what a token's values get in addition (embeddings, kv_heads x head_dim)
    pub head: Weights<'a>,
    pub rotary: &'a [f32], // cos and -sin (positions, head_dim / 2, 2), for pairs of neighbouring channels
}

/// Memory that the threads share: between two barriers each writes to its own part, or all only read.
#[derive(Clone, Copy)]
struct Common<T = f32>(*mut T);

// SAFETY: see above; `step` has the barriers.
unsafe impl<T> Send for Common<T> {}
unsafe impl<T> Sync for Common<T> {}

impl<T> Common<T> {
    /// # Safety
    /// They are there, and nobody writes to them meanwhile.
    unsafe fn read<'a>(&self, start: usize, size: usize) -> &'a [T] {
        std::slice::from_raw_parts(self.0.add(start), size)
    }

    /// # Safety
    /// They are there, and nobody else uses them meanwhile.
    unsafe fn part<'a>(&self, start: usize, size: usize) -> &'a mut [T] {
        std::slice::from_raw_parts_mut(self.0.add(start), size)
    }

    /// # Safety
    /// As `part`.
    unsafe fn columns<'a>(&self, row: usize, stride: usize, columns: &Range<usize>) -> &'a mut [T] {
        self.part(row * stride + columns.start, columns.len())
    }
}

/// The part of 0..size of one of `of` threads, which begins at a multiple of 8.
fn share(size: usize, thread: usize, of: usize) -> Range<usize> {
    let cut = |i: usize| (size * i / of).next_multiple_of(8).min(size);
    cut(thread)..cut(thread + 1)
}

/// Divides each row of `width` by its root mean square.
fn normalise(x: &[f32], width: usize, eps: f32, out: &mut [f32]) {
    for (from, to) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mut lanes = [0f32; 8];
        from.chunks(8).for_each(|part| part.iter().zip(&mut lanes).for_each(|(x, sum)| *sum += x * x));
        let scale = 1.0 / (lanes.iter().sum::<f32>() / width as f32 + eps).sqrt();
        from.iter().zip(to).for_each(|(x, to)| *to = x * scale);
    }
}

/// A head of a query or key, turned by the angles of its position and normalised.
fn turn(from: &[f32], angles: &[f32], eps: f32, turned: &mut [f32], out: &mut [f32]) {
    for ((pair, angle), to) in from.chunks_exact(2).zip(angles.chunks_exact(2)).zip(turned.chunks_exact_mut(2)) {
        to[0] = pair[0] * angle[0] - pair[1] * angle[1];
        to[1] = pair[0] * angle[1] + pair[1] * angle[0];
    }
    normalise(turned, from.len(), eps, out);
}

fn store<K: Stored>(from: &[f32], to: &mut [K]) {
    from.iter().zip(to).for_each(|(&from, to)| *to = K::of(from));
}

/// A token, the row of the cache that it is appended to, and how many tokens that holds.
pub type Row = (usize, usize, usize);

/// Appends the tokens to their rows of the cache -> logits (rows, vocab_size), on up to `threads` threads.
///
/// The cache holds keys and values (layers, 2 x kv_heads, *places, head_dim), first the heads of the keys; places are (rows, capacity).
///
/// # Safety
/// kernel::is_fast. Tokens are below the number of embeddings; each row is one of the cache's with room for one more token, and none
/// is there twice; all these positions have angles; the weights are those of the shape.
pub unsafe fn step<K: Stored>(threads: usize, model: &Model, cache: &mut [K], places: (usize, usize), rows: &[Row], logits: &mut [f32]) {
    let (&Shape { width, heads, kv_heads, head_dim, hidden, vocab_size, eps, cap, key_offset }, n) = (model.shape, rows.len());
    let (q_size, qkv_size, group) = (heads * head_dim, (heads + 2 * kv_heads) * head_dim, heads / kv_heads);
    let mut memory = Vec::new();
    let (embedded, rest) = aligned(&mut memory, n * (2 * width + qkv_size + q_size + hidden)).split_at_mut(n * width);
    for (&(token, ..), to) in rows.iter().zip(embedded.chunks_exact_mut(width)) {
        model.embedding.add_row(token, to);
    }
    let (x, rest) = rest.split_at_mut(n * width);
    normalise(embedded, width, eps, x);
    let (qkv, rest) = rest.split_at_mut(n * qkv_size);
    let (attended, up) = rest.split_at_mut(n * q_size);
    let [x, qkv, attended, up, logits] = [x, qkv, attended, up, logits].map(|part| Common(part.as_mut_ptr()));
    let stored = Common(cache.as_mut_ptr());
    let ((cache_rows, capacity), most) = (places, rows.iter().map(|(.., length)| length + 1).max().unwrap_or(0));

    together(threads, &|thread: usize, of: usize, barrier: &Barrier| {
        let mut memory: [Vec<f32>; 5] = Default::default();
        let [a, b, c, d, e] = memory.each_mut();
        let (normed, unpacked, scores) = (aligned(a, n * width), aligned(b, GROUP * width.max(hidden)), aligned(c, most));
        let (turned, query) = (aligned(d, head_dim), aligned(e, head_dim));
        let share = |size| share(size, thread, of);
        for (i, [qkv_weights, out_weights, up_weights, down_weights]) in model.layers.iter().enumerate() {
            normalise(x.read(0, n * width), width, eps, normed);
            qkv_weights.times(normed, width, share(qkv_size), unpacked, qkv, qkv_size);
            barrier.wait();
            // a head of keys of a row at a time, with its queries
            for task in (thread..n * kv_heads).step_by(of) {
                let (row, g) = (task / kv_heads, task % kv_heads);
                let (token, index, length) = rows[row];
                let start = |head: usize| ((i * 2 * kv_heads + head) * cache_rows + index) * capacity * head_dim;
                let (keys, values) = (start(g), start(kv_heads + g));
                let angles = &model.rotary[length * head_dim..(length + 1) * head_dim];
                let new = |head: usize| qkv.read(row * qkv_size + head * head_dim, head_dim);
                turn(new(heads + g), angles, eps, turned, query);
                let own = if key_offset && length > 0 { head_dim / 2 } else { head_dim };
                store(&query[..own], stored.part(keys + length * head_dim, own));
                if key_offset {
                    let next = stored.part(keys + (length + 1) * head_dim + head_dim / 2, head_dim / 2);
                    store(&query[head_dim / 2..], next);
                }
                let value = qkv.part(row * qkv_size + (heads + kv_heads + g) * head_dim, head_dim);
                if let Some(table) = model.values[i] {
                    table.add_row(token * kv_heads + g, value);
                }
                store(value, stored.part(values + length * head_dim, head_dim));
                for head in g * group..(g + 1) * group {
                    turn(new(head), angles, eps, turned, query);
                    let out = attended.part(row * q_size + head * head_dim, head_dim);
                    attention(query, stored.0.add(keys), stored.0.add(values), length + 1, scores, out);
                }
            }
            barrier.wait();
            let outputs = share(width);
            out_weights.times(attended.read(0, n * q_size), q_size, outputs.clone(), unpacked, Common(normed.as_mut_ptr()), width);
            add(x, width, &outputs, normed);
            barrier.wait();
            normalise(x.read(0, n * width), width, eps, normed);
            let outputs = share(hidden);
            up_weights.times(normed, width, outputs.clone(), unpacked, up, hidden);
            for row in 0..n {
                up.columns(row, hidden, &outputs).iter_mut().for_each(|x| *x = x.max(0.0) * x.max(0.0));
            }
            barrier.wait();
            let outputs = share(width);
            down_weights.times(up.read(0, n * hidden), hidden, outputs.clone(), unpacked, Common(normed.as_mut_ptr()), width);
            add(x, width, &outputs, normed);
            barrier.wait();
        }
        normalise(x.read(0, n * width), width, eps, normed);
        let outputs = share(vocab_size);
        model.head.times(normed, width, outputs.clone(), unpacked, logits, vocab_size);
        for row in 0..n {
            let part = logits.columns(row, vocab_size, &outputs);
            part.iter_mut().for_each(|z| *z = cap * (1.0 - 2.0 / (exp(2.0 * *z / cap) + 1.0)));
            // cap * tanh(z / cap)
        }
    });
}

/// Adds the `outputs` of each row of `sums` (rows, width) to x.
///
/// # Safety
/// Nobody else uses these outputs of x.
unsafe fn add(x: Common, width: usize, outputs: &Range<usize>, sums: &[f32]) {
    for (row, sums) in sums.chunks_exact(width).enumerate() {
        x.columns(row, width, outputs).iter_mut().zip(&sums[outputs.clone()]).for_each(|(x, sum)| *x += sum);
    }
}
