//! Steps of Adam.

use crate::simd::{WIDTH, dispatch};
use dibit_device::AdamStep;

#[inline(always)]
fn adam_body(step: AdamStep, gradient: &[f32], first: &mut [f32], second: &mut [f32], x: &mut [f32]) {
    let AdamStep { rate, betas: [beta1, beta2], epsilon, scale, corrections } = step;
    let [correction1, correction2] = corrections;
    for (((gradient, first), second), x) in gradient.iter().zip(first).zip(second).zip(x) {
        let gradient = gradient * scale;
        *first = beta1 * *first + (1.0 - beta1) * gradient;
        *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
        *x -= rate * (*first / correction1) / ((*second / correction2).sqrt() + epsilon);
    }
}

dispatch! {
    /// [`dibit_device::Train::adam`] of some numbers.
    fn adam<>(step: AdamStep, gradient: &[f32], first: &mut [f32], second: &mut [f32], x: &mut [f32]);
    baseline: adam_body(step, gradient, first, second, x);
    avx2: adam_body(step, gradient, first, second, x);
    avx512: adam_body(step, gradient, first, second, x);
    neon: adam_body(step, gradient, first, second, x);
}

#[inline(always)]
fn squares_body(x: &[f32]) -> f64 {
    let (whole, rest) = x.as_chunks::<WIDTH>();
    let mut lanes = [0f64; WIDTH];
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += f64::from(*x) * f64::from(*x);
        }
    }
    let rest: f64 = rest.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    lanes.iter().sum::<f64>() + rest
}

dispatch! {
    /// The sum of squares.
    fn squares<>(x: &[f32]) -> f64;
    baseline: squares_body(x);
    avx2: squares_body(x);
    avx512: squares_body(x);
    neon: squares_body(x);
}
