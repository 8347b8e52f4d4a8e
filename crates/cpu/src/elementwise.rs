//! Operations on numbers one by one, and norms of rows.

use super::exp::exp;
use super::simd::{BASELINE_FMA, WIDTH, dispatch, join, mul_add};

#[inline(always)]
fn norm_scale<const FMA: bool>(x: &[f32], eps: f32) -> f32 {
    let (whole, rest) = x.as_chunks::<WIDTH>();
    let mut lanes = [0f32; WIDTH];
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = mul_add::<FMA>(*x, *x, *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = mul_add::<FMA>(*x, *x, *lane);
    }
    1.0 / (join(lanes) / x.len() as f32 + eps).sqrt()
}

#[inline(always)]
fn norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let scale = norm_scale::<FMA>(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

dispatch! {
    /// Each row divided by the root of its mean square, times `weight`.
    fn norm_rows<>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
    baseline: norm_body::<BASELINE_FMA>(x, weight, eps, out);
    avx2: norm_body::<true>(x, weight, eps, out);
    avx512: norm_body::<true>(x, weight, eps, out);
    neon: norm_body::<true>(x, weight, eps, out);
}

#[inline(always)]
fn add_norm_body<const FMA: bool>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
        let scale = norm_scale::<FMA>(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out += x * scale * weight;
        }
    }
}

dispatch! {
    /// The same, added.
    fn add_norm_rows<>(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]);
    baseline: add_norm_body::<BASELINE_FMA>(x, weight, eps, out);
    avx2: add_norm_body::<true>(x, weight, eps, out);
    avx512: add_norm_body::<true>(x, weight, eps, out);
    neon: add_norm_body::<true>(x, weight, eps, out);
}

#[inline(always)]
fn norm_inplace_body<const FMA: bool>(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_exact_mut(weight.len()) {
        let scale = norm_scale::<FMA>(row, eps);
        for (x, weight) in row.iter_mut().zip(weight) {
            *x = *x * scale * weight;
        }
    }
}

dispatch! {
    /// The same in place.
    fn norm_rows_inplace<>(x: &mut [f32], weight: &[f32], eps: f32);
    baseline: norm_inplace_body::<BASELINE_FMA>(x, weight, eps);
    avx2: norm_inplace_body::<true>(x, weight, eps);
    avx512: norm_inplace_body::<true>(x, weight, eps);
    neon: norm_inplace_body::<true>(x, weight, eps);
}

#[inline(always)]
fn cap_body<const FMA: bool>(cap: f32, x: &mut [f32]) {
    let factor = 2.0 / cap;
    for x in x {
        // tanh(y) is 1 - 2 / (exp(2 y) + 1), of the magnitude of y: no power overflows.
        let power = exp::<FMA>(-(*x * factor).abs());
        let magnitude = cap * ((1.0 - power) / (1.0 + power));
        *x = if *x < 0.0 { -magnitude } else { magnitude };
    }
}

dispatch! {
    /// `x <- cap tanh(x / cap)`.
    fn cap<>(cap: f32, x: &mut [f32]);
    baseline: cap_body::<BASELINE_FMA>(cap, x);
    avx2: cap_body::<true>(cap, x);
    avx512: cap_body::<true>(cap, x);
    neon: cap_body::<true>(cap, x);
}

#[inline(always)]
fn turn_body(heads: &mut [f32], cosines: &[f32], sines: &[f32]) {
    for head in heads.chunks_exact_mut(2 * cosines.len()) {
        let (low, high) = head.split_at_mut(cosines.len());
        for (((a, b), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            (*a, *b) = (*a * cosine - *b * sine, *b * cosine + *a * sine);
        }
    }
}

dispatch! {
    /// Turns the pairs of each head, numbers of its first and second half, by angles: the rotary embedding.
    fn turn<>(heads: &mut [f32], cosines: &[f32], sines: &[f32]);
    baseline: turn_body(heads, cosines, sines);
    avx2: turn_body(heads, cosines, sines);
    avx512: turn_body(heads, cosines, sines);
    neon: turn_body(heads, cosines, sines);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use proptest::prelude::*;

    /// Whether `got` is within `tolerance` of `exact`, as a share of it.
    fn close(got: f32, exact: f64, tolerance: f64) -> bool {
        (f64::from(got) - exact).abs() <= tolerance * exact.abs()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn norms_are_those_of_the_formula(x in prop::collection::vec(-50f32..50.0, 1..700), rows in 1usize..4) {
            let width = x.len();
            let weight: Vec<f32> = (0..width).map(|i| (i as f32 * 0.7).sin()).collect();
            let all: Vec<f32> = (0..rows).flat_map(|row| x.iter().map(move |x| x * (row + 1) as f32)).collect();
            for isa in Isa::available() {
                let mut out = vec![0.0; all.len()];
                norm_rows(isa, &all, &weight, 1e-5, &mut out);
                let mut inplace = all.clone();
                norm_rows_inplace(isa, &mut inplace, &weight, 1e-5);
                prop_assert_eq!(&inplace, &out);
                let mut added = vec![1.0; all.len()];
                add_norm_rows(isa, &all, &weight, 1e-5, &mut added);
                prop_assert!(added.iter().zip(&out).all(|(added, out)| *added == 1.0 + out), "{:?}", isa);
                for (x, out) in all.chunks(width).zip(out.chunks(width)) {
                    let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
                    let scale = 1.0 / (squares / width as f64 + 1e-5).sqrt();
                    for ((x, weight), out) in x.iter().zip(&weight).zip(out) {
                        prop_assert!(close(*out, f64::from(*x) * scale * f64::from(*weight), 1e-6), "{:?}", isa);
                    }
                }
            }
        }

        #[test]
        fn pairs_are_turned_alike_everywhere(half in 1usize..80, heads in 1usize..4, seed in 0u32..1000) {
            let number = |i: usize| ((i as u32 * 7919 + seed) as f32).sin() * 3.0;
            let x: Vec<f32> = (0..2 * half * heads).map(number).collect();
            let (sines, cosines): (Vec<f32>, Vec<f32>) = (0..half).map(|i| number(i).sin_cos()).unzip();
            for isa in Isa::available() {
                let mut turned = x.clone();
                turn(isa, &mut turned, &cosines, &sines);
                for (at, got) in turned.iter().enumerate() {
                    let (first, c) = (at / (2 * half) * 2 * half, at % half);
                    let (a, b) = (x[first + c], x[first + c + half]);
                    let expected = match at % (2 * half) < half {
                        true => a * cosines[c] - b * sines[c],
                        false => b * cosines[c] + a * sines[c],
                    };
                    prop_assert_eq!(got.to_bits(), expected.to_bits(), "{:?}", isa);
                }
            }
        }
    }

    #[test]
    fn caps_are_those_of_the_formula() {
        let x: Vec<f32> = (-40_000..40_000).map(|i| i as f32 * 7e-3).collect();
        for isa in Isa::available() {
            let mut capped = x.clone();
            cap(isa, 30.0, &mut capped);
            for (x, got) in x.iter().zip(capped) {
                let exact = 30.0 * (f64::from(*x) / 30.0).tanh();
                assert!((f64::from(got) - exact).abs() < 1e-5, "{isa:?}: {x} gives {got}");
            }
        }
    }
}
