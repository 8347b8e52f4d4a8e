//! The float-min asymmetric quantiser (QF) of KIVI and KVLinC.
//!
//! `s = (max - min) / (2^b - 1)`, `code = round_half_even(clamp((x - min) / s, 0, 2^b - 1))`,
//! `x^ = code * s + min` (KIVI, section 3; KVLinC, equation 2). Scale and minimum are stored in
//! fp16 and the codes are computed from the *stored* values, in f32, so that a group carries no
//! systematic offset.

use crate::{Bits, QuantError};
use half::f16;

/// Scale and minimum of one quantisation group, as stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Affine {
    /// Step between two codes; zero for a group without range.
    pub scale: f16,
    /// Value of code 0.
    pub min: f16,
}

impl Affine {
    /// Fits scale and minimum to a group.
    ///
    /// # Errors
    /// [`QuantError::Empty`], [`QuantError::NonFinite`] for NaN or infinity, and
    /// [`QuantError::Range`] where fp16 cannot hold the scale or the minimum.
    pub fn fit(group: &[f32], bits: Bits) -> Result<Self, QuantError> {
        let (min, max) = range(group)?;
        Self::fit_range(min, max, bits)
    }

    /// Fits scale and minimum to a group of which the ends of the range are known.
    ///
    /// # Errors
    /// [`QuantError::Range`] where fp16 cannot hold the scale or the minimum.
    pub fn fit_range(min: f32, max: f32, bits: Bits) -> Result<Self, QuantError> {
        // Which zero is the smaller one depends on the machine. Adding zero leaves one of them.
        let min = min + 0.0;
        let affine = Affine { scale: f16::from_f32((max - min) / f32::from(bits.max_code())), min: f16::from_f32(min) };
        if affine.scale.is_finite() && affine.min.is_finite() {
            Ok(affine)
        } else {
            Err(QuantError::Range { min, max })
        }
    }

    /// The code of `value`; 0 in a group without range.
    #[inline]
    pub fn code(self, value: f32, bits: Bits) -> u8 {
        let scale = self.scale.to_f32();
        if scale == 0.0 {
            return 0;
        }
        let steps = (value - self.min.to_f32()) / scale;
        steps.clamp(0.0, f32::from(bits.max_code())).round_ties_even() as u8
    }

    /// The value that `code` stands for.
    #[inline]
    pub fn value(self, code: u8) -> f32 {
        f32::from(code) * self.scale.to_f32() + self.min.to_f32()
    }

    /// Fits a group and writes the code of each of its values.
    ///
    /// # Errors
    /// Those of [`Affine::fit`]; `codes` is then left as it was.
    ///
    /// # Panics
    /// If `group` and `codes` differ in length.
    pub fn quantize(group: &[f32], bits: Bits, codes: &mut [u8]) -> Result<Self, QuantError> {
        assert_eq!(group.len(), codes.len(), "one code for each value");
        let affine = Self::fit(group, bits)?;
        for (code, &value) in codes.iter_mut().zip(group) {
            *code = affine.code(value, bits);
        }
        Ok(affine)
    }
}

/// Smallest and largest value of a group.
pub(crate) fn range(group: &[f32]) -> Result<(f32, f32), QuantError> {
    if group.is_empty() {
        return Err(QuantError::Empty);
    }
    let mut min = f32::INFINITY;
    let mut max = f32::NEG_INFINITY;
    for (index, &value) in group.iter().enumerate() {
        if !value.is_finite() {
            return Err(QuantError::NonFinite { index, value });
        }
        min = min.min(value);
        max = max.max(value);
    }
    Ok((min, max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quantize(group: &[f32], bits: Bits) -> (Affine, Vec<u8>) {
        let mut codes = vec![0; group.len()];
        let affine = Affine::quantize(group, bits, &mut codes).unwrap();
        (affine, codes)
    }

    #[test]
    fn worked_vector() {
        let (affine, codes) = quantize(&[-1.0, -0.2, 0.4, 2.0], Bits::Two);
        assert_eq!((affine.min.to_f32(), affine.scale.to_f32()), (-1.0, 1.0));
        assert_eq!(codes, [0, 1, 1, 3]);
        let back: Vec<f32> = codes.iter().map(|&c| affine.value(c)).collect();
        assert_eq!(back, [-1.0, 0.0, 0.0, 2.0]);
    }

    #[test]
    fn ties_go_to_even() {
        let (_, codes) = quantize(&[0.0, 0.5, 1.5, 2.5, 3.0], Bits::Two);
        assert_eq!(codes, [0, 0, 2, 2, 3]);
    }

    #[test]
    fn constant_group_is_exact() {
        for value in [0.0, -7.5, 400.25] {
            let (affine, codes) = quantize(&[value; 5], Bits::Two);
            assert_eq!(codes, [0; 5]);
            assert_eq!(affine.value(0), value);
        }
    }

    #[test]
    fn bad_groups_are_refused() {
        let fit = |group: &[f32]| Affine::fit(group, Bits::Two);
        assert_eq!(fit(&[]), Err(QuantError::Empty));
        assert!(matches!(fit(&[0.0, f32::NAN]), Err(QuantError::NonFinite { index: 1, .. })));
        assert!(matches!(fit(&[f32::NEG_INFINITY]), Err(QuantError::NonFinite { index: 0, .. })));
        assert!(matches!(fit(&[-1e6, 0.0]), Err(QuantError::Range { .. })));
        assert!(matches!(fit(&[0.0, 3e5]), Err(QuantError::Range { .. })));
    }

    #[test]
    fn codes_come_from_the_stored_scale() {
        // 1/3 is not an fp16 number: with the unrounded scale the tie at 0.5 steps falls elsewhere.
        let scale = f16::from_f32(1.0 / 3.0).to_f32();
        let below = scale * 0.5 * (1.0 - 1e-6);
        let (affine, codes) = quantize(&[0.0, below, 1.0], Bits::Two);
        assert_eq!(affine.scale.to_f32(), scale);
        assert_eq!(codes[1], 0);
        let above = scale * 0.5 * (1.0 + 1e-6);
        assert_eq!(quantize(&[0.0, above, 1.0], Bits::Two).1[1], 1);
    }

    proptest! {
        #[test]
        fn error_is_at_most_half_a_step(
            group in prop::collection::vec(-1000f32..1000.0, 1..200),
            bits in prop::sample::select(Bits::ALL.to_vec()),
        ) {
            // The cache quantises values that were stored in fp16.
            let group: Vec<f32> = group.iter().map(|&x| f16::from_f32(x).to_f32()).collect();
            let (affine, codes) = quantize(&group, bits);
            let step = affine.scale.to_f32();
            // A scale rounded down leaves the top of the range (2^b - 1) * 2^-11 steps outside.
            let slack = step * f32::from(bits.max_code()) * 2f32.powi(-11) + 1e-4;
            for (&x, &code) in group.iter().zip(&codes) {
                prop_assert!(code <= bits.max_code());
                prop_assert!((affine.value(code) - x).abs() <= step / 2.0 + slack);
            }
        }

        #[test]
        fn order_is_kept(a in -100f32..100.0, b in -100f32..100.0, c in -100f32..100.0) {
            let (affine, _) = quantize(&[a, b, c], Bits::Two);
            let (low, high) = if a <= b { (a, b) } else { (b, a) };
            prop_assert!(affine.code(low, Bits::Two) <= affine.code(high, Bits::Two));
        }
    }
}
