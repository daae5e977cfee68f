//! Products of a matrix with a few vectors, and attention of one query, for x86 with AVX2, FMA and F16C.
//!
//! A step reads every weight once, and few rows share it: a tile of four outputs is multiplied with all rows before the next one is
//! read, and no copy of the weights is laid out otherwise. Each sum has one order of its terms, however many rows there are: a
//! sequence gets the same numbers by itself as among others.

use std::arch::x86_64::*;
use std::ops::Range;

const LANES: usize = 8; // partial sums of a product of two vectors
const LINE: usize = 64; // bytes
const AHEAD: usize = 2; // tiles of weights that are on their way from memory
const BLOCK: usize = 12; // rows that stay in the first level of caches
pub const GROUP: usize = 16; // outputs that these are multiplied with
const ROWS: usize = 3; // of a tile: 4 x 3 sums, 3 parts of x and one of w are the 16 registers

/// Whether this machine has what the functions of this module need.
pub fn is_fast() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// A weight as it is stored.
pub trait Element: Copy + Sync {
    const IS_F32: bool = false;

    fn value(self) -> f32;

    /// LANES of them.
    ///
    /// # Safety
    /// They are there, and `is_fast`.
    unsafe fn lanes(from: *const Self) -> __m256;
}

impl Element for f32 {
    const IS_F32: bool = true;

    fn value(self) -> f32 {
        self
    }
    #[inline(always)]
    unsafe fn lanes(from: *const Self) -> __m256 {
        _mm256_loadu_ps(from)
    }
}

/// The upper half of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for Bf16 {
    fn value(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
    #[inline(always)]
    unsafe fn lanes(from: *const Self) -> __m256 {
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())), 16))
    }
}

/// IEEE's half precision.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(pub u16);

impl Element for F16 {
    #[inline(always)]
    fn value(self) -> f32 {
        // SAFETY: `is_fast`, as for all that is called here
        unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(self.0 as i32))) }
    }
    #[inline(always)]
    unsafe fn lanes(from: *const Self) -> __m256 {
        _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))
    }
}

impl Element for i8 {
    fn value(self) -> f32 {
        self as f32
    }
    #[inline(always)]
    unsafe fn lanes(from: *const Self) -> __m256 {
        _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast())))
    }
}

/// Asks for the line at `place`, at the first of its elements, to be on its way to the second level of caches: of the first one the
/// rows in between would drive it out again.
#[inline(always)]
unsafe fn prefetch<E>(place: *const E, at: usize) {
    if at * size_of::<E>() % LINE == 0 {
        _mm_prefetch(place.wrapping_add(at).cast(), _MM_HINT_T1);
    }
}

/// Products of R rows of weights with M rows of x. `ahead`: whether rows of weights follow that are to be prefetched.
///
/// # Safety
/// Each of them has `size` elements, and `is_fast`.
#[inline(always)]
unsafe fn tile<E: Element, const R: usize, const M: usize>(
    w: [*const E; R],
    x: [*const f32; M],
    size: usize,
    ahead: bool,
) -> [[f32; M]; R] {
    let whole = size - size % LANES;
    let mut lanes = [[_mm256_setzero_ps(); M]; R];
    for at in (0..whole).step_by(LANES) {
        let x = x.map(|x| _mm256_loadu_ps(x.add(at)));
        for r in 0..R {
            let part = E::lanes(w[r].add(at));
            if ahead {
                prefetch(w[r].wrapping_add(AHEAD * R * size), at);
            }
            for m in 0..M {
                lanes[r][m] = _mm256_fmadd_ps(part, x[m], lanes[r][m]);
            }
        }
    }
    let mut sums = [[0f32; M]; R];
    for r in 0..R {
        for m in 0..M {
            let mut parts = [0f32; LANES];
            _mm256_storeu_ps(parts.as_mut_ptr(), lanes[r][m]);
            let [a, b, c, d, e, f, g, h] = parts;
            let rest = (whole..size).map(|i| (*w[r].add(i)).value() * *x[m].add(i)).sum::<f32>();
            sums[r][m] = ((a + e) + (c + g)) + ((b + f) + (d + h)) + rest;
        }
    }
    sums
}

/// The rows of x (rows, size), and where their products go (rows, stride).
pub struct Rows<'a> {
    pub x: &'a [f32],
    pub size: usize,
    pub out: *mut f32,
    pub stride: usize,
}

/// The outputs from `at` on: R rows of weights with all rows of x, in tiles.
#[inline(always)]
unsafe fn all_rows<E: Element, const R: usize>(w: [*const E; R], rows: &Rows, at: usize, block: Range<usize>, ahead: bool) {
    let mut first = block.start;
    while first < block.end {
        first += match block.end - first {
            1 => some_rows::<E, R, 1>(w, rows, at, first, ahead),
            2 | 4 => some_rows::<E, R, 2>(w, rows, at, first, ahead),
            _ => some_rows::<E, R, ROWS>(w, rows, at, first, ahead),
        };
    }
}

#[inline(always)]
unsafe fn some_rows<E: Element, const R: usize, const M: usize>(
    w: [*const E; R],
    rows: &Rows,
    at: usize,
    first: usize,
    ahead: bool,
) -> usize {
    let x = std::array::from_fn(|m| rows.x.as_ptr().add((first + m) * rows.size));
    let found = tile::<E, R, M>(w, x, rows.size, ahead && first == 0);
    (0..R).for_each(|r| (0..M).for_each(|m| *rows.out.add((first + m) * rows.stride + at + r) = found[r][m]));
    M
}

/// The `outputs` of w (outputs, size) for all rows. `unpacked` has room for GROUP x size: for weights that several tiles of rows read.
///
/// # Safety
/// w and the rows have these outputs, which nobody else uses; `is_fast`.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn products<E: Element>(w: *const E, rows: &Rows, outputs: Range<usize>, unpacked: &mut [f32]) {
    let (size, count, mut at) = (rows.size, rows.x.len() / rows.size, outputs.start);
    while count <= ROWS && at + 4 <= outputs.end {
        all_rows::<E, 4>(std::array::from_fn(|r| w.add((at + r) * size)), rows, at, 0..count, true);
        at += 4;
    }
    while at + 4 <= outputs.end {
        let (group, mut weights) = (GROUP.min((outputs.end - at) / 4 * 4), w.add(at * size).cast::<f32>());
        if !E::IS_F32 {
            for (i, to) in unpacked[..group * size].chunks_mut(LINE / size_of::<E>()).enumerate() {
                let from = w.add(at * size + i * LINE / size_of::<E>());
                prefetch(from.wrapping_add(4 * AHEAD * size), 0);
                to.iter_mut().enumerate().for_each(|(i, to)| *to = (*from.add(i)).value());
            }
            weights = unpacked.as_ptr();
        }
        for first in (0..count).step_by(BLOCK) {
            for four in (0..group).step_by(4) {
                let (part, block) = (std::array::from_fn(|r| weights.add((four + r) * size)), first..count.min(first + BLOCK));
                all_rows::<f32, 4>(part, rows, at + four, block, E::IS_F32);
            }
        }
        at += group;
    }
    for at in at..outputs.end {
        all_rows::<E, 1>([w.add(at * size)], rows, at, 0..count, false);
    }
}

/// Softmax attention of one query (D) over keys and values (count, D) -> out (D). D is a multiple of 8. `scores` has room for `count`.
///
/// # Safety
/// There are `count` keys and values, at least one; `is_fast`.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn attention(q: &[f32], keys: *const f32, values: *const f32, count: usize, scores: &mut [f32], out: &mut [f32]) {
    let (d, scale) = (q.len(), 1.0 / (q.len() as f32).sqrt());
    let scores = &mut scores[..count];
    for (i, part) in scores.chunks_mut(8).enumerate() {
        // of fewer than eight the last one is taken several times
        let eight = std::array::from_fn(|r| keys.add((8 * i + r.min(part.len() - 1)) * d));
        // the values are needed next
        (0..part.len() * d).step_by(LINE / size_of::<f32>()).for_each(|at| prefetch(values.add(8 * i * d), at));
        let found = tile::<f32, 8, 1>(eight, [q.as_ptr()], d, true);
        part.iter_mut().zip(found).for_each(|(score, [sum])| *score = sum * scale);
    }
    let most = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    scores.iter_mut().for_each(|score| *score = exp(*score - most));
    let total: f32 = scores.iter().sum();
    let mut at = 0;
    while at < d {
        // a row of values is read in long pieces: short ones, all positions for each, take three times as long
        at += match (d - at) / LANES {
            8.. => mean::<8>(scores, values, d, at, total, out),
            4..8 => mean::<4>(scores, values, d, at, total, out),
            _ => mean::<1>(scores, values, d, at, total, out),
        };
    }
}

/// The mean of C x LANES channels of the values (count, d), from channel `at` on, weighted by the scores.
#[inline(always)]
unsafe fn mean<const C: usize>(scores: &[f32], values: *const f32, d: usize, at: usize, total: f32, out: &mut [f32]) -> usize {
    let mut sums = [_mm256_setzero_ps(); C];
    for (i, &score) in scores.iter().enumerate() {
        let (score, from) = (_mm256_set1_ps(score), values.add(i * d + at));
        (0..C).for_each(|c| sums[c] = _mm256_fmadd_ps(score, _mm256_loadu_ps(from.add(c * LANES)), sums[c]));
    }
    for (sum, to) in sums.iter().zip(out[at..].chunks_exact_mut(LANES)) {
        _mm256_storeu_ps(to.as_mut_ptr(), _mm256_div_ps(*sum, _mm256_set1_ps(total)));
    }
    C * LANES
}

/// e^x to about the precision of an f32, for x from -87 to 88; smaller x count as -87.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 x 2^23: adding it leaves an integer
    let x = x.clamp(-87.0, 88.0);
    let n = x * std::f32::consts::LOG2_E + ROUND - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4; // ln 2 in two parts
    let terms = [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
    let series = terms.iter().fold(0.0, |sum, term| sum * r + term);
    (series * r * r + r + 1.0) * f32::from_bits(((n as i32 + 127) << 23) as u32)
}
