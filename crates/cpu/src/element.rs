//! Numbers of 16 and 32 bit.

use super::simd::{Lanes, WIDTH};
use half::{bf16, f16};

/// A storage type of weights and 16-bit cache rows.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// The number as f32. Exact for every finite number.
    fn widen(self) -> f32;
    /// Sixteen numbers, widened.
    fn load<L: Lanes>(values: &[Self; WIDTH]) -> L;
    /// The same numbers, where they are bf16.
    #[cfg(target_arch = "x86_64")]
    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn load<L: Lanes>(values: &[Self; WIDTH]) -> L {
        L::load(values)
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn load<L: Lanes>(values: &[Self; WIDTH]) -> L {
        L::load_bf16(values)
    }

    #[cfg(target_arch = "x86_64")]
    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }
}

impl Element for f16 {
    /// Shifts exponent and mantissa into place and multiplies by 2^112, the difference of the exponents' biases;
    /// this is exact for subnormal numbers too. Infinity and NaN do not occur: they are refused when stored.
    #[inline(always)]
    fn widen(self) -> f32 {
        let bits = u32::from(self.to_bits());
        let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
        f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
    }

    #[inline(always)]
    fn load<L: Lanes>(values: &[Self; WIDTH]) -> L {
        L::load_f16(values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_finite_number() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            if half.is_finite() {
                assert_eq!(half.widen().to_bits(), half.to_f32().to_bits(), "{bits:#x}");
            }
            if !brain.is_nan() {
                assert_eq!(brain.widen().to_bits(), brain.to_f32().to_bits(), "{bits:#x}");
            }
        }
    }
}
