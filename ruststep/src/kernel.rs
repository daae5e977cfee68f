//! Products of a matrix with a few vectors, and attention of one query.
//!
//! A step reads every weight once, and few rows share it: a tile of four outputs is multiplied with all rows before the next one is
//! read, and no copy of the weights is laid out otherwise. Each sum has one order of its terms, however many rows there are: a
//! sequence gets the same numbers by itself as among others.
//!
//! The inner loops are plain Rust over `Lanes`, which the compiler turns into vectors: `versions!` compiles them for those of
//! AVX-512 and AVX2, and for what each machine of the target has.

use std::ops::Range;

const LINE: usize = 64; // bytes
const AHEAD: usize = 2; // tiles of weights that are on their way from memory
const BLOCK: usize = 12; // rows that stay in the first level of caches
pub const GROUP: usize = 16; // outputs that these are multiplied with
const ROWS: usize = 3; // of a tile: 4 x 3 sums, 3 parts of x and one of w are AVX2's 16 registers

/// Whether this machine has vectors that make a step worth its own code.
pub fn is_fast() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    return cfg!(target_arch = "aarch64"); // NEON belongs to each
}

/// A function, and the generic one that it calls with the machine's number of lanes as the last parameter.
macro_rules! versions {
    ($(#[$doc:meta])* pub unsafe fn $name:ident[$($E:ident: $bound:ident)?]($($x:ident: $type:ty),*) by $of:ident) => {
        $(#[$doc])*
        pub unsafe fn $name$(<$E: $bound>)?($($x: $type),*) {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma")]
                unsafe fn avx512$(<$E: $bound>)?($($x: $type),*) {
                    $of::<$($E,)? 16>($($x),*)
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2$(<$E: $bound>)?($($x: $type),*) {
                    $of::<$($E,)? 8>($($x),*)
                }
                return match is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl") {
                    true => avx512($($x),*),
                    false => avx2($($x),*),
                };
            }
            #[cfg(not(target_arch = "x86_64"))]
            $of::<$($E,)? 8>($($x),*)
        }
    };
}

/// A weight as it is stored.
pub trait Element: Copy + Send + Sync {
    const IS_F32: bool = false;

    fn value(self) -> f32;
}

impl Element for f32 {
    const IS_F32: bool = true;

    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

/// The upper half of an f32.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Bf16(pub u16);

impl Element for Bf16 {
    #[inline(always)]
    fn value(self) -> f32 {
        f32::from_bits((self.0 as u32) << 16)
    }
}

/// What a key or value is stored as.
pub trait Stored: Element {
    fn of(value: f32) -> Self;
}

impl Stored for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }
}

impl Stored for Bf16 {
    /// The nearest one, of two the even one.
    #[inline(always)]
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        Bf16((bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }
}

/// IEEE's half precision, finite.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct F16(pub u16);

impl Element for F16 {
    #[inline(always)]
    fn value(self) -> f32 {
        const REBIAS: f32 = f32::from_bits((127 + 112) << 23); // an f32's exponent begins 112 lower
        let size = f32::from_bits((self.0 as u32 & 0x7fff) << 13) * REBIAS;
        f32::from_bits(size.to_bits() | (self.0 as u32 & 0x8000) << 16)
    }
}

impl Element for i8 {
    #[inline(always)]
    fn value(self) -> f32 {
        self as f32
    }
}

/// Partial sums, or what they are made of: in registers, for the loops are short and unrolled.
#[derive(Clone, Copy)]
struct Lanes<const L: usize>([f32; L]);

impl<const L: usize> Lanes<L> {
    /// # Safety
    /// L elements are there.
    #[inline(always)]
    unsafe fn read<E: Element>(from: *const E) -> Self {
        Lanes(from.cast::<[E; L]>().read_unaligned().map(E::value))
    }

    #[inline(always)]
    fn add_product(&mut self, a: Self, b: Self) {
        (0..L).for_each(|i| self.0[i] = a.0[i].mul_add(b.0[i], self.0[i]));
    }

    /// Of four parts, then of these four.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut four = [0f32; 4];
        for part in self.0.chunks_exact(4) {
            (0..4).for_each(|i| four[i] += part[i]);
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: SSE belongs to every x86-64. Left to itself the compiler shuffles the sums of a whole tile among each other.
        unsafe {
            use std::arch::x86_64::*;
            let four = _mm_loadu_ps(four.as_ptr());
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
        #[cfg(not(target_arch = "x86_64"))]
        return (four[0] + four[2]) + (four[1] + four[3]);
    }
}

/// `size` zeros from the beginning of a line of the cache on: vectors that cross lines take twice the time.
pub fn aligned(memory: &mut Vec<f32>, size: usize) -> &mut [f32] {
    memory.resize(size + LINE / size_of::<f32>(), 0.0);
    let start = memory.as_ptr().align_offset(LINE);
    &mut memory[start..start + size]
}

/// Asks for the line at `place`, at the first of its elements, to be on its way to the second level of caches: of the first one the
/// rows in between would drive it out again.
#[inline(always)]
unsafe fn prefetch<E>(place: *const E, at: usize) {
    if at * size_of::<E>() % LINE == 0 {
        let place = place.wrapping_add(at);
        #[cfg(target_arch = "x86_64")]
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(place.cast());
        #[cfg(target_arch = "aarch64")]
        std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) place, options(nostack, readonly, preserves_flags));
        let _ = place;
    }
}

/// Products of R rows of weights with M rows of x. `ahead`: whether rows of weights follow that are to be prefetched.
///
/// # Safety
/// Each of them has `size` elements.
#[inline(always)]
unsafe fn tile<E: Element, const R: usize, const M: usize, const L: usize>(
    w: [*const E; R],
    x: [*const f32; M],
    size: usize,
    ahead: bool,
) -> [[f32; M]; R] {
    let whole = size - size % L;
    let mut lanes = [[Lanes([0.0; L]); M]; R];
    for at in (0..whole).step_by(L) {
        let x = x.map(|x| Lanes::read(x.add(at)));
        for r in 0..R {
            let part = Lanes::read(w[r].add(at));
            if ahead {
                prefetch(w[r].wrapping_add(AHEAD * R * size), at);
            }
            for m in 0..M {
                lanes[r][m].add_product(part, x[m]);
            }
        }
    }
    let mut sums = lanes.map(|row| row.map(Lanes::sum));
    for (r, row) in sums.iter_mut().enumerate() {
        for (m, sum) in row.iter_mut().enumerate() {
            *sum += (whole..size).map(|i| (*w[r].add(i)).value() * *x[m].add(i)).sum::<f32>();
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
unsafe fn all_rows<E: Element, const R: usize, const L: usize>(w: [*const E; R], rows: &Rows, at: usize, block: Range<usize>, ahead: bool) {
    let mut first = block.start;
    while first < block.end {
        first += match block.end - first {
            1 => some_rows::<E, R, 1, L>(w, rows, at, first, ahead),
            2 | 4 => some_rows::<E, R, 2, L>(w, rows, at, first, ahead),
            _ => some_rows::<E, R, ROWS, L>(w, rows, at, first, ahead),
        };
    }
}

#[inline(always)]
unsafe fn some_rows<E: Element, const R: usize, const M: usize, const L: usize>(
    w: [*const E; R],
    rows: &Rows,
    at: usize,
    first: usize,
    ahead: bool,
) -> usize {
    let x = std::array::from_fn(|m| rows.x.as_ptr().add((first + m) * rows.size));
    let found = tile::<E, R, M, L>(w, x, rows.size, ahead && first == 0);
    (0..R).for_each(|r| (0..M).for_each(|m| *rows.out.add((first + m) * rows.stride + at + r) = found[r][m]));
    M
}

versions! {
    /// The `outputs` of w (outputs, size) for all rows. `unpacked` has room for GROUP x size: for weights that several tiles of rows
    /// read.
    ///
    /// # Safety
    /// w and the rows have these outputs, which nobody else uses; `is_fast`.
    pub unsafe fn products[E: Element](w: *const E, rows: &Rows, outputs: Range<usize>, unpacked: &mut [f32]) by products_by
}

/// With L lanes.
///
/// # Safety
/// As `products`.
#[inline(always)]
pub unsafe fn products_by<E: Element, const L: usize>(w: *const E, rows: &Rows, outputs: Range<usize>, unpacked: &mut [f32]) {
    let (size, count, mut at) = (rows.size, rows.x.len() / rows.size, outputs.start);
    while count <= ROWS && at + 4 <= outputs.end {
        all_rows::<E, 4, L>(std::array::from_fn(|r| w.add((at + r) * size)), rows, at, 0..count, true);
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
                all_rows::<f32, 4, L>(part, rows, at + four, block, E::IS_F32);
            }
        }
        at += group;
    }
    for at in at..outputs.end {
        all_rows::<E, 1, L>([w.add(at * size)], rows, at, 0..count, false);
    }
}

versions! {
    /// Softmax attention of one query (D) over keys and values (count, D) -> out (D). D is a multiple of 8. `scores` has room for
    /// `count`.
    ///
    /// # Safety
    /// There are `count` keys and values, at least one; `is_fast`.
    pub unsafe fn attention[E: Element](q: &[f32], keys: *const E, values: *const E, count: usize, scores: &mut [f32], out: &mut [f32])
        by attention_by
}

/// With L lanes.
///
/// # Safety
/// As `attention`.
#[inline(always)]
pub unsafe fn attention_by<E: Element, const L: usize>(
    q: &[f32],
    keys: *const E,
    values: *const E,
    count: usize,
    scores: &mut [f32],
    out: &mut [f32],
) {
    let (d, scale) = (q.len(), 1.0 / (q.len() as f32).sqrt());
    let scores = &mut scores[..count];
    for (i, part) in scores.chunks_mut(8).enumerate() {
        // of fewer than eight the last one is taken several times
        let eight = std::array::from_fn(|r| keys.add((8 * i + r.min(part.len() - 1)) * d));
        // the values are needed next
        (0..part.len() * d).step_by(LINE / size_of::<E>()).for_each(|at| prefetch(values.add(8 * i * d), at));
        let found = tile::<E, 8, 1, L>(eight, [q.as_ptr()], d, true);
        part.iter_mut().zip(found).for_each(|(score, [sum])| *score = sum * scale);
    }
    let most = scores.iter().fold(f32::NEG_INFINITY, |a, &b| a.max(b));
    scores.iter_mut().for_each(|score| *score = exp(*score - most));
    let total: f32 = scores.iter().sum();
    let mut at = 0;
    while at < d {
        // a row of values is read in long pieces: short ones, all positions for each, take three times as long
        at += match (d - at) / 8 {
            8.. => mean::<E, 8>(scores, values, d, at, total, out),
            4..8 => mean::<E, 4>(scores, values, d, at, total, out),
            _ => mean::<E, 1>(scores, values, d, at, total, out),
        };
    }
}

/// The mean of C x 8 channels of the values (count, d), from channel `at` on, weighted by the scores.
#[inline(always)]
unsafe fn mean<E: Element, const C: usize>(scores: &[f32], values: *const E, d: usize, at: usize, total: f32, out: &mut [f32]) -> usize {
    let mut sums = [Lanes([0.0; 8]); C];
    for (i, &score) in scores.iter().enumerate() {
        let from = values.add(i * d + at);
        (0..C).for_each(|c| sums[c].add_product(Lanes([score; 8]), Lanes::read(from.add(c * 8))));
    }
    for (sum, to) in sums.iter().zip(out[at..].chunks_exact_mut(8)) {
        to.iter_mut().zip(sum.0).for_each(|(to, sum)| *to = sum / total);
    }
    C * 8
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
