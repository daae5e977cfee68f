//! The parts; the whole step is compared with torch's in tests/unit/test_native.py.

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use crate::kernel::{attention, attention_by, exp, is_fast, products, products_by, Bf16, Element, Rows, Stored, F16, GROUP};
use crate::team::together;

fn numbers(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 + 13) % 2003) as f32 / 1000.0 - 1.0).collect()
}

/// The products agree with plain sums in f64, for sizes that fill no tile.
fn check<E: Element>(weights: impl Fn(f32) -> E) {
    for (rows, size, outputs) in [(1, 1, 1), (1, 24, 17), (2, 7, 9), (3, 64, 12), (4, 33, 5), (7, 96, 30)] {
        let x = numbers(rows * size);
        let w: Vec<E> = numbers(outputs * size).into_iter().map(&weights).collect();
        for products in [products, products_by::<E, 8>, products_by::<E, 16>] {
            let (mut out, mut unpacked) = (vec![f32::NAN; rows * outputs], vec![0.0; GROUP * size]);
            // SAFETY: the sizes are those of the arrays, and the machine was asked for its vectors.
            unsafe { products(w.as_ptr(), &Rows { x: &x, size, out: out.as_mut_ptr(), stride: outputs }, 0..outputs, &mut unpacked) };
            for row in 0..rows {
                for output in 0..outputs {
                    let terms = (0..size).map(|i| w[output * size + i].value() as f64 * x[row * size + i] as f64);
                    let (sum, most) = terms.fold((0.0, 1.0), |(sum, most), term| (sum + term, most + term.abs()));
                    let found = out[row * outputs + output] as f64;
                    assert!((found - sum).abs() <= 1e-6 * most, "{found} is not {sum} ({rows} rows of {size})");
                }
            }
        }
    }
}

#[test]
fn products_are_sums_of_products() {
    assert!(is_fast(), "these tests need AVX2 or NEON");
    check(|x| x);
    check(|x| Bf16((x.to_bits() >> 16) as u16));
    check(|x| F16(if x < 0.0 { 0xb800 } else { 0x3c00 + (x * 512.0) as u16 })); // -0.5, or from 1 up
    check(|x| (x * 127.0) as i8);
}

fn check_attention<E: Stored>() {
    for (count, d) in [(1, 8), (8, 16), (21, 40)] {
        let stored = |count: usize| numbers(count).into_iter().map(E::of).collect::<Vec<_>>();
        let (q, keys, values) = (numbers(d), stored(count * d), stored(count * d + 5));
        let dot = |s: usize| (0..d).map(|i| q[i] as f64 * keys[s * d + i].value() as f64).sum::<f64>();
        let weights: Vec<f64> = (0..count).map(|s| (dot(s) / (d as f64).sqrt()).exp()).collect();
        for attention in [attention, attention_by::<E, 8>, attention_by::<E, 16>] {
            let (mut scores, mut out) = (vec![0.0; count], vec![f32::NAN; d]);
            // SAFETY: as above
            unsafe { attention(&q, keys.as_ptr(), values.as_ptr(), count, &mut scores, &mut out) };
            for (i, found) in out.iter().enumerate() {
                let sum: f64 = (0..count).map(|s| weights[s] * values[s * d + i].value() as f64).sum();
                let expected = sum / weights.iter().sum::<f64>();
                assert!((*found as f64 - expected).abs() < 1e-5, "{found} is not {expected}");
            }
        }
    }
}

#[test]
fn attention_is_a_mean_of_values_by_the_softmax_of_scores() {
    check_attention::<f32>();
    check_attention::<Bf16>();
}

#[test]
fn bf16_is_the_nearest_one() {
    let one = f32::from_bits(0x3f80_0000);
    for (above, expected) in [(0, 0x3f80), (0x7fff, 0x3f80), (0x8000, 0x3f80), (0x8001, 0x3f81), (0x1_7fff, 0x3f81), (0x1_8000, 0x3f82)] {
        assert_eq!(Bf16::of(f32::from_bits(one.to_bits() + above)).0, expected);
    }
    assert_eq!(Bf16::of(-1.0).value(), -1.0);
}

#[test]
fn exp_is_exact_to_two_units_in_the_last_place() {
    for x in (-8700..8800).map(|x| x as f32 / 100.0) {
        let (found, expected) = (exp(x) as f64, (x as f64).exp());
        assert!((found / expected - 1.0).abs() < 2.5e-7, "exp({x}) is {found}, not {expected}");
    }
    assert!(exp(f32::NEG_INFINITY) < 1e-37 && exp(0.0) == 1.0);
}

#[test]
fn threads_wait_for_all() {
    for threads in [1, 2, 5] {
        let arrived: [AtomicUsize; 50] = std::array::from_fn(|_| AtomicUsize::new(0));
        together(threads, &|_, of, barrier| {
            assert_eq!(of, threads);
            for round in &arrived {
                round.fetch_add(1, SeqCst);
                barrier.wait();
                assert_eq!(round.load(SeqCst), threads);
            }
        });
    }
}
