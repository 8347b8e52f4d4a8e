//! The two quantisers of the methods, over one stored form: a scale and a zero in fp16 for each group.

use crate::affine::range;
use crate::{Affine, Bits, QuantError};
use half::f16;

/// How a group becomes codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Quantizer {
    /// `x^ = s code + min`: KIVI, KVLinC, GEAR. See [`Affine`].
    FloatMin,
    /// `x^ = s (code - z)` with an integer `z`: RotateKV, AKVQ-VL, QuaRot, ResQ.
    ///
    /// `mx = clip max`, `mn = clip min`, `s = (mx - mn) / (2^b - 1)`, `z = round(-mn / s)`, not clamped;
    /// `code = clamp(round(x / s) + z, 0, 2^b - 1)`. A group without range keeps `clip` times its value.
    IntegerZero {
        /// Both ends of the range are multiplied by this.
        clip: f32,
        /// Whether the range is widened to hold zero (QuaRot and ResQ outside of groups).
        include_zero: bool,
    },
}

/// Largest zero point: fp16 ends at 65504, and a scale may be rounded down.
const MAX_ZERO: f32 = 65000.0;

/// What is stored of a group besides its codes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameters {
    /// Step between two codes.
    pub scale: f16,
    /// The minimum ([`Quantizer::FloatMin`]) or the zero point ([`Quantizer::IntegerZero`]).
    pub zero: f16,
}

impl Quantizer {
    /// Fits scale and zero to a group.
    ///
    /// # Errors
    /// Those of [`Affine::fit`].
    pub fn fit(self, group: &[f32], bits: Bits) -> Result<Parameters, QuantError> {
        let (min, max) = range(group)?;
        self.fit_range(min, max, bits)
    }

    /// Fits scale and zero to a group of which the ends of the range are known.
    ///
    /// # Errors
    /// Those of [`Affine::fit_range`].
    pub fn fit_range(self, min: f32, max: f32, bits: Bits) -> Result<Parameters, QuantError> {
        let affine = Affine::fit_range(min, max, bits)?;
        let Quantizer::IntegerZero { clip, include_zero } = self else {
            return Ok(Parameters { scale: affine.scale, zero: affine.min });
        };
        let (mut min, mut max) = (clip * (min + 0.0), clip * max);
        if include_zero {
            (min, max) = (min.min(0.0), max.max(0.0));
        }
        let step = (max - min) / f32::from(bits.max_code());
        if f16::from_f32(step) == f16::ZERO {
            // Code 0, which every value of the group gets, stands for the minimum.
            return Ok(Parameters { scale: f16::from_f32(-min), zero: f16::ONE });
        }
        // A narrow group far from zero takes a step that leaves its zero point within fp16.
        let scale = f16::from_f32(step.max(min.abs() / MAX_ZERO));
        let zero = f16::from_f32((-min / scale.to_f32()).round_ties_even());
        Ok(Parameters { scale, zero })
    }

    /// The code of `value` in a group with these parameters.
    #[inline]
    pub fn code(self, parameters: Parameters, value: f32, bits: Bits) -> u8 {
        let Parameters { scale, zero } = parameters;
        match self {
            Quantizer::FloatMin => Affine { scale, min: zero }.code(value, bits),
            Quantizer::IntegerZero { .. } if scale == f16::ZERO => 0,
            Quantizer::IntegerZero { .. } => {
                let code = (value / scale.to_f32()).round_ties_even() + zero.to_f32();
                code.clamp(0.0, f32::from(bits.max_code())) as u8
            }
        }
    }

    /// The value of code 0, so that `x^ = code * scale + offset`.
    #[inline]
    pub fn offset(self, parameters: Parameters) -> f32 {
        match self {
            Quantizer::FloatMin => parameters.zero.to_f32(),
            Quantizer::IntegerZero { .. } => -parameters.scale.to_f32() * parameters.zero.to_f32(),
        }
    }

    /// The value that `code` stands for.
    #[inline]
    pub fn value(self, parameters: Parameters, code: u8) -> f32 {
        f32::from(code) * parameters.scale.to_f32() + self.offset(parameters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROTATEKV: Quantizer = Quantizer::IntegerZero { clip: 0.8, include_zero: false };

    fn back(quantizer: Quantizer, group: &[f32], bits: Bits) -> (Parameters, Vec<u8>, Vec<f32>) {
        let parameters = quantizer.fit(group, bits).unwrap();
        let codes: Vec<u8> = group.iter().map(|&x| quantizer.code(parameters, x, bits)).collect();
        let values = codes.iter().map(|&code| quantizer.value(parameters, code)).collect();
        (parameters, codes, values)
    }

    #[test]
    fn worked_vector() {
        // 0.4 would be a tie for a scale of 0.8, and is none for the fp16 number next to it.
        let (parameters, codes, values) = back(ROTATEKV, &[-1.0, -0.2, 0.39, 2.0], Bits::Two);
        assert_eq!((parameters.scale, parameters.zero), (f16::from_f32(0.8), f16::from_f32(1.0)));
        assert_eq!(codes, [0, 1, 1, 3]);
        for (value, expected) in values.iter().zip([-0.8, 0.0, 0.0, 1.6]) {
            assert!((value - expected).abs() < 1e-3, "{values:?}");
        }
    }

    #[test]
    fn a_range_that_must_hold_zero_is_widened() {
        let quarot = Quantizer::IntegerZero { clip: 1.0, include_zero: true };
        let (parameters, _, values) = back(quarot, &[6.0, 9.0], Bits::Two);
        assert_eq!((parameters.scale.to_f32(), parameters.zero.to_f32()), (3.0, 0.0));
        assert_eq!(values, [6.0, 9.0]);
        // Zero points are no codes: far from zero they are large.
        let far = Quantizer::IntegerZero { clip: 1.0, include_zero: false }.fit(&[100.0, 103.0], Bits::Two).unwrap();
        assert_eq!((far.scale.to_f32(), far.zero.to_f32()), (1.0, -100.0));
    }

    #[test]
    fn groups_without_range_are_exact() {
        for value in [0.0, 3.5, -12.25] {
            for quantizer in [Quantizer::FloatMin, Quantizer::IntegerZero { clip: 1.0, include_zero: false }] {
                for bits in Bits::ALL {
                    assert_eq!(back(quantizer, &[value; 3], bits).2, [value; 3]);
                }
            }
        }
    }

    #[test]
    fn narrow_groups_far_from_zero_keep_their_place() {
        let quarot = Quantizer::IntegerZero { clip: 1.0, include_zero: false };
        for group in [[300.0f32, 301.0], [100.0, 100.25], [1.0, 1.000_976_6], [-6001.0, -6000.0]] {
            for bits in Bits::ALL {
                // fp16 holds eleven bits of a zero point, as it does of a minimum.
                let slack = (group[1] - group[0]) + group[0].abs() * 2f32.powi(-10);
                for (x, value) in group.iter().zip(back(quarot, &group, bits).2) {
                    assert!((x - value).abs() <= slack, "{group:?} at {bits:?}: {value}");
                }
            }
        }
    }

    #[test]
    fn clipped_groups_without_range_keep_that_share_of_their_value() {
        for clip in [0.3, 0.5, 0.8] {
            for value in [5.0, -5.0, 0.0] {
                let (_, codes, values) =
                    back(Quantizer::IntegerZero { clip, include_zero: false }, &[value; 2], Bits::Two);
                assert!((values[0] - clip * value).abs() < 3e-3 && codes == [0, 0], "{clip} {value}: {values:?}");
            }
        }
    }

    #[test]
    fn bad_groups_are_refused() {
        for quantizer in [Quantizer::FloatMin, ROTATEKV] {
            assert!(matches!(quantizer.fit(&[0.0, f32::NAN], Bits::Two), Err(QuantError::NonFinite { index: 1, .. })));
            assert_eq!(quantizer.fit(&[], Bits::Two), Err(QuantError::Empty));
        }
    }

    proptest! {
        #[test]
        fn errors_are_bounded_without_clipping(
            group in prop::collection::vec(-100f32..100.0, 2..100), which in 0usize..6, include_zero: bool,
        ) {
            let bits = Bits::ALL[which];
            let quantizer = Quantizer::IntegerZero { clip: 1.0, include_zero };
            let (parameters, codes, values) = back(quantizer, &group, bits);
            let step = parameters.scale.to_f32();
            // Half a step from rounding the value, half a step from rounding the zero point, and what the
            // rounded scale leaves outside of the range.
            let slack = step + step * f32::from(bits.max_code()) * 2f32.powi(-10) + step.abs() * 0.13 + 0.1;
            for ((x, value), code) in group.iter().zip(values).zip(codes) {
                prop_assert!(code <= bits.max_code());
                prop_assert!((x - value).abs() <= slack, "{x} became {value} in steps of {step}");
            }
        }
    }
}
