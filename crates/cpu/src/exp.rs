//! The exponential of softmax and of the gated activation, in a form that compilers vectorise.

use super::simd::mul_add;

/// Below this the result is zero; `exp` is already smaller than 1e-38 there.
const UNDERFLOW: f32 = -87.0;
const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts, the first with few enough bits for `n * LN_2_HIGH` to be exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Adding it to a number between -2^22 and 2^22 leaves that number, rounded half to even, in the low bits; subtracting it
/// again gives the rounded number.
pub(super) const ROUND: f32 = 12_582_912.0;
/// Coefficients of the series (exp(r) - 1 - r) / r^2 = 1/2! + r/3! + ..., from r^5 down. What is left out is below
/// r^8 / 8! < 6e-9 for |r| <= ln 2 / 2.
const SERIES: [f32; 6] = [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5];

/// `exp(x)` for `x <= 0`, within 2 units in the last place, exactly 1 at 0 and exactly 0 below -87.
#[inline(always)]
pub(super) fn exp<const FMA: bool>(x: f32) -> f32 {
    let clamped = if x > UNDERFLOW { x } else { UNDERFLOW };
    // The integer is in the low bits of what was rounded.
    let rounded = mul_add::<FMA>(clamped, LOG2_E, ROUND);
    let n = rounded - ROUND;
    let r = mul_add::<FMA>(n, -LN_2_LOW, mul_add::<FMA>(n, -LN_2_HIGH, clamped));
    let mut series = SERIES[0];
    for coefficient in &SERIES[1..] {
        series = mul_add::<FMA>(series, r, *coefficient);
    }
    let value = mul_add::<FMA>(series, r * r, r) + 1.0;
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(127 << 23));
    if x >= UNDERFLOW { value * power } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{BASELINE_FMA, Isa, dispatch};

    #[inline(always)]
    fn body<const FMA: bool>(values: &mut [f32], offset: f32) {
        for value in values {
            *value = exp::<FMA>(*value - offset);
        }
    }

    dispatch! {
        fn exp_shifted<>(values: &mut [f32], offset: f32);
        baseline: body::<BASELINE_FMA>(values, offset);
        avx2: body::<true>(values, offset);
        avx512: body::<true>(values, offset);
        neon: body::<true>(values, offset);
    }

    #[test]
    fn close_to_the_library_everywhere() {
        for isa in Isa::available() {
            let x: Vec<f32> = (0..200_000).map(|i| -(i as f32) * 4.3e-4).collect();
            let mut y = x.clone();
            exp_shifted(isa, &mut y, 0.0);
            for (x, y) in x.iter().zip(y) {
                let exact = f64::from(*x).exp();
                assert!(((f64::from(y) - exact) / exact).abs() < 3e-7, "{isa:?}: exp({x}) = {y}");
            }
        }
    }

    #[test]
    fn the_ends_are_exact() {
        for isa in Isa::available() {
            let mut y = [3.0, 3.0 - 88.0, f32::NEG_INFINITY];
            exp_shifted(isa, &mut y, 3.0);
            assert_eq!(y, [1.0, 0.0, 0.0], "{isa:?}");
        }
    }
}
