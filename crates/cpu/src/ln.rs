//! The natural logarithm, in a form that compilers vectorise.

use super::simd::mul_add;

/// ln 2 in two parts, the first with few enough bits for `n * LN_2_HIGH` to be exact.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;
/// Coefficients of the series ln(x) = 2 (s + s^3 / 3 + s^5 / 5 + ...) with s = (x - 1) / (x + 1), from s^9 down. What is
/// left out is below 2 s^11 / 11 < 1e-9 for |s| <= 0.172, as it is between sqrt(1/2) and sqrt(2).
const SERIES: [f32; 4] = [2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0];
/// The bits of sqrt(1/2).
const ROOT_HALF: u32 = 0x3f35_04f3;

/// `ln(x)` for normal `x > 0`, within 1e-7 or 2 units in the last place.
#[inline(always)]
pub(super) fn ln<const FMA: bool>(x: f32) -> f32 {
    // The exponent that brings x between sqrt(1/2) and sqrt(2).
    let shifted = x.to_bits().wrapping_sub(ROOT_HALF);
    let exponent = shifted as i32 >> 23;
    let mantissa = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(ROOT_HALF));
    let n = exponent as f32;
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let mut series = SERIES[0];
    for coefficient in &SERIES[1..] {
        series = mul_add::<FMA>(series, square, *coefficient);
    }
    let low = mul_add::<FMA>(n, LN_2_LOW, mul_add::<FMA>(series * square, s, 2.0 * s));
    mul_add::<FMA>(n, LN_2_HIGH, low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{BASELINE_FMA, Isa, dispatch};

    #[inline(always)]
    fn body<const FMA: bool>(values: &mut [f32]) {
        for value in values {
            *value = ln::<FMA>(*value);
        }
    }

    dispatch! {
        fn ln_all<>(values: &mut [f32]);
        baseline: body::<BASELINE_FMA>(values);
        avx2: body::<true>(values);
        avx512: body::<true>(values);
        neon: body::<true>(values);
    }

    #[test]
    fn every_instruction_set_is_within_two_units() {
        let mut x: Vec<f32> = (-860..860).map(|i| (i as f32 * 0.1).exp()).collect();
        x.extend((0..200_000).map(|i| 0.5 + i as f32 * 1e-5));
        x.extend([1.0, f32::MIN_POSITIVE, 1e-12, f32::MAX, 0.5, 2.0, 1.0 - f32::EPSILON, 1.0 + f32::EPSILON]);
        for isa in Isa::available() {
            let mut y = x.clone();
            ln_all(isa, &mut y);
            for (x, y) in x.iter().zip(y) {
                let exact = f64::from(*x).ln();
                let error = (f64::from(y) - exact).abs();
                assert!(error <= (2.4e-7 * exact.abs()).max(1e-7 * (*x - 1.0).abs() as f64), "{isa:?}: ln({x}) = {y}");
            }
        }
    }

    #[test]
    fn one_is_exact() {
        for isa in Isa::available() {
            let mut y = [1.0];
            ln_all(isa, &mut y);
            assert_eq!(y, [0.0], "{isa:?}");
        }
    }
}
