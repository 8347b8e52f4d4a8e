//! Groups that are quantised within a part of their range.
//!
//! Two bits are four steps: a group is often served better by smaller ones that do not reach its ends. Of some shares of
//! the range, around its middle, the one that misses least is taken.

use crate::affine::range;
use crate::{Bits, Parameters, QuantError, Quantizer};

/// Which part of a group's range its codes span.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Clip {
    /// All of it.
    #[default]
    None,
    /// That one of [`Clip::SHARES`] that leaves the least squared error; of equals the largest.
    Mse,
}

impl Clip {
    /// Shares of a range that are tried, the largest first.
    pub const SHARES: [f32; 7] = [1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5];

    /// Ends of a share of a range, around its middle. All of it is the range itself.
    #[inline]
    pub fn ends(min: f32, max: f32, share: f32) -> (f32, f32) {
        let (middle, half) = (0.5 * (min + max), 0.5 * (max - min));
        if share == 1.0 { (min, max) } else { (middle - share * half, middle + share * half) }
    }
}

impl Quantizer {
    /// Fits scale and zero to the part of a group's range that `clip` says. The squared error is a sum in f32, value after
    /// value, of what the stored fp16 scale and zero miss. Shares that fp16 cannot hold are left out.
    ///
    /// # Errors
    /// Those of [`Quantizer::fit`].
    pub fn fit_clipped(self, clip: Clip, group: &[f32], bits: Bits) -> Result<Parameters, QuantError> {
        let (min, max) = range(group)?;
        let mut best = self.fit_range(min, max, bits)?;
        if clip == Clip::None {
            return Ok(best);
        }
        let mut least = self.squared_error(best, group, bits);
        for share in &Clip::SHARES[1..] {
            let (min, max) = Clip::ends(min, max, *share);
            let Ok(tried) = self.fit_range(min, max, bits) else { continue };
            let error = self.squared_error(tried, group, bits);
            if error < least {
                (best, least) = (tried, error);
            }
        }
        Ok(best)
    }

    fn squared_error(self, parameters: Parameters, group: &[f32], bits: Bits) -> f32 {
        group.iter().fold(0.0, |sum, value| {
            let missed = value - self.value(parameters, self.code(parameters, *value, bits));
            sum + missed * missed
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const QUANTIZERS: [Quantizer; 3] = [
        Quantizer::FloatMin,
        Quantizer::IntegerZero { clip: 1.0, include_zero: false },
        Quantizer::IntegerZero { clip: 1.0, include_zero: true },
    ];

    /// The share of the range that was taken, by the step.
    fn share(group: &[f32], bits: Bits) -> f32 {
        let step = |clip| Quantizer::FloatMin.fit_clipped(clip, group, bits).unwrap().scale.to_f32();
        step(Clip::Mse) / step(Clip::None)
    }

    #[test]
    fn outliers_are_cut_off() {
        // Four steps serve values that are spread evenly best where each is the middle of a quarter.
        let mut group: Vec<f32> = (0..128).map(|i| (i * 37 % 128) as f32 / 64.0 - 1.0).collect();
        assert!((share(&group, Bits::Two) - 0.76).abs() < 1e-3, "{}", share(&group, Bits::Two));
        assert_eq!(share(&group, Bits::Eight), 1.0);
        (group[5], group[6]) = (-1.8, 1.8);
        assert!((share(&group, Bits::Two) - 0.5).abs() < 1e-3, "{}", share(&group, Bits::Two));
    }

    #[test]
    fn of_equals_the_larger_range_is_taken() {
        // Four values at four codes are exact, and so is what has no range.
        assert_eq!(share(&[0.0, 1.0, 2.0, 3.0], Bits::Two), 1.0);
        for quantizer in QUANTIZERS {
            for group in [[7.5f32; 4], [0.0; 4], [-0.0; 4]] {
                let fitted = [Clip::None, Clip::Mse].map(|clip| quantizer.fit_clipped(clip, &group, Bits::Three));
                assert_eq!(fitted[0], fitted[1]);
            }
        }
    }

    #[test]
    fn shares_are_around_the_middle() {
        assert_eq!(Clip::ends(2.0, 6.0, 0.5), (3.0, 5.0));
        assert_eq!(Clip::ends(-0.1, 0.7, 1.0), (-0.1, 0.7));
        assert!(Clip::SHARES.is_sorted_by(|a, b| a > b) && Clip::SHARES[0] == 1.0);
    }

    #[test]
    fn bad_groups_are_refused_and_shares_beyond_fp16_left_out() {
        let fit = |group: &[f32]| Quantizer::FloatMin.fit_clipped(Clip::Mse, group, Bits::Eight);
        assert_eq!(fit(&[]), Err(QuantError::Empty));
        assert!(matches!(fit(&[1.0, f32::INFINITY]), Err(QuantError::NonFinite { index: 1, .. })));
        assert!(matches!(fit(&[-1e6, 0.0]), Err(QuantError::Range { .. })));
        // The middle of this range is no minimum that fp16 holds; the range itself has one.
        assert_eq!(fit(&[0.0, 4e6, 4e6]), Quantizer::FloatMin.fit(&[0.0, 4e6, 4e6], Bits::Eight));
    }

    proptest! {
        #[test]
        fn no_share_misses_less(
            group in prop::collection::vec(-50f32..50.0, 1..130), offset in -300f32..300.0,
            bits in prop::sample::select(Bits::ALL.to_vec()), quantizer in prop::sample::select(QUANTIZERS.to_vec()),
        ) {
            let group: Vec<f32> = group.iter().map(|x| half::f16::from_f32(x + offset).to_f32()).collect();
            let taken = quantizer.fit_clipped(Clip::Mse, &group, bits).unwrap();
            let error = quantizer.squared_error(taken, &group, bits);
            let (min, max) = range(&group).unwrap();
            let tried = Clip::SHARES.map(|share| {
                let (min, max) = Clip::ends(min, max, share);
                quantizer.fit_range(min, max, bits).unwrap()
            });
            let errors = tried.map(|own| quantizer.squared_error(own, &group, bits));
            let first = errors.iter().position(|own| *own == error);
            prop_assert_eq!(first.map(|index| tried[index]), Some(taken));
            prop_assert!(errors.iter().all(|own| error <= *own), "{} of {:?}", error, errors);
        }
    }
}
