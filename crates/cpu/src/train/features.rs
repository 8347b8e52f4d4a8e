//! Feature maps: softmax of each half of a row, and the way back.

use crate::exp::exp;
use crate::simd::{BASELINE_FMA, WIDTH, dispatch, join, mul_add};
use crate::softmax::largest;

#[inline(always)]
fn features_body<const FMA: bool>(x: &mut [f32], half: usize, gate: f32) {
    for x in x.chunks_exact_mut(half) {
        let offset = largest(x);
        let mut lanes = [0f32; WIDTH];
        let (whole, rest) = x.as_chunks_mut::<WIDTH>();
        for x in whole {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *x = exp::<FMA>(*x - offset);
                *lane += *x;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *x = exp::<FMA>(*x - offset);
            *lane += *x;
        }
        let scale = gate / join(lanes);
        x.iter_mut().for_each(|x| *x *= scale);
    }
}

dispatch! {
    /// [`dibit_device::Train::features`] of some rows.
    fn features<>(x: &mut [f32], half: usize, gate: f32);
    baseline: features_body::<BASELINE_FMA>(x, half, gate);
    avx2: features_body::<true>(x, half, gate);
    avx512: features_body::<true>(x, half, gate);
    neon: features_body::<true>(x, half, gate);
}

#[inline(always)]
fn backward_body<const FMA: bool>(y: &[f32], dy: &mut [f32], half: usize, gate: f32) -> f32 {
    let mut total = 0.0;
    for (y, dy) in y.chunks_exact(half).zip(dy.chunks_exact_mut(half)) {
        let (whole, rest) = y.as_chunks::<WIDTH>();
        let (dy_whole, dy_rest) = dy.as_chunks_mut::<WIDTH>();
        let mut lanes = [0f32; WIDTH];
        for (y, dy) in whole.iter().zip(dy_whole.iter()) {
            for ((lane, y), dy) in lanes.iter_mut().zip(y).zip(dy) {
                *lane = mul_add::<FMA>(*y, *dy, *lane);
            }
        }
        for ((lane, y), dy) in lanes.iter_mut().zip(rest).zip(dy_rest.iter()) {
            *lane = mul_add::<FMA>(*y, *dy, *lane);
        }
        // y = gate p: the derivative by the gate is p . dy, that by what p was made of is y (dy - p . dy).
        let mean = join(lanes) / gate;
        for (y, dy) in y.iter().zip(dy) {
            *dy = y * (*dy - mean);
        }
        total += mean;
    }
    total
}

dispatch! {
    /// [`dibit_device::Train::features_backward`] of one row; returns the derivative by the gate.
    fn features_backward<>(y: &[f32], dy: &mut [f32], half: usize, gate: f32) -> f32;
    baseline: backward_body::<BASELINE_FMA>(y, dy, half, gate);
    avx2: backward_body::<true>(y, dy, half, gate);
    avx512: backward_body::<true>(y, dy, half, gate);
    neon: backward_body::<true>(y, dy, half, gate);
}
