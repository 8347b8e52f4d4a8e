//! Weights as integers of 16 bit.

use super::{QUAD, Weights};
use crate::exp::ROUND;
use crate::scales::{Scales, fold};
#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{BASELINE_FMA, Isa, Lanes, Portable, dispatch};
use dibit_cache::Planes;

/// The largest number whose high byte, rounded, is at most 127.
const LARGEST: f32 = 127.0 * 256.0 + 127.0;

/// Rows of weights, each in integer multiples of a step of its own.
///
/// The step is `W / 32639`, `W` being the largest magnitude of the row, and the error at most half of it. That is less
/// than what the weights carry already: each has an fp16 scale folded in, whose rounding moves it by up to 2^-11 of
/// itself. With `n` weights the root mean square of these bounds is `2^-11 W / sqrt(n)` at least, which for the 256
/// channels of the largest head is `2^-15 W`, and half a step is below `2^-15.9 W`.
#[derive(Default)]
pub(crate) struct IntegerWeights {
    /// `[row][high bytes, low bytes][four weights]`
    numbers: Vec<i32>,
    /// Numbers that hold the high, or low, bytes of a row.
    quads: usize,
    steps: Vec<f32>,
    /// A row with scales folded in.
    folded: Vec<f32>,
}

impl IntegerWeights {
    /// Rounds `count` rows of `len` weights, which are `stride` numbers apart.
    pub(crate) fn load(&mut self, isa: Isa, values: &[f32], count: usize, stride: usize, len: usize) {
        self.resize(count, len);
        if len > 0 {
            let rows = self.numbers.chunks_exact_mut(2 * self.quads).zip(&mut self.steps);
            for ((numbers, step), values) in rows.zip(values.chunks(stride)) {
                let (high, low) = numbers.split_at_mut(self.quads);
                let [high, low] = [high, low].map(bytemuck::cast_slice_mut);
                round(isa, &values[..len], high, low, step);
            }
        }
    }

    /// Rounds rows as [`IntegerWeights::load`] does, with the scales of their groups folded in; `offsets` gets the product
    /// of each row with the offsets. Where there are planes, each has the first weights, four times as large from plane
    /// to plane; those without a plane have nothing but an offset.
    pub(crate) fn load_folded(
        &mut self,
        isa: Isa,
        values: &[f32],
        count: usize,
        stride: usize,
        own: Scales,
        offsets: &mut Vec<f32>,
    ) {
        let len = own.planes.map_or(own.scales.len(), Planes::count);
        self.folded.resize(len.max(own.scales.len()), 0.0);
        offsets.resize(count, 0.0);
        self.resize(count, len);
        let rows = self.numbers.chunks_exact_mut(2 * self.quads).zip(&mut self.steps).zip(offsets);
        for (((numbers, step), offset), values) in rows.zip(values.chunks(stride)) {
            let (high, low) = numbers.split_at_mut(self.quads);
            let [high, low] = [high, low].map(bytemuck::cast_slice_mut);
            let values = &values[..own.scales.len()];
            *offset = fold_and_round(isa, values, own, &mut self.folded, high, low, step);
        }
    }

    fn resize(&mut self, count: usize, len: usize) {
        self.quads = len.div_ceil(QUAD);
        self.numbers.resize(2 * count * self.quads, 0);
        self.steps.resize(count, 0.0);
    }

    /// Rows.
    pub(crate) fn count(&self) -> usize {
        self.steps.len()
    }

    /// What 1 is worth in a row.
    pub(super) fn step(&self, row: usize) -> f32 {
        self.steps[row]
    }

    /// The bytes of `M` rows from `first` on.
    #[inline(always)]
    pub(super) fn bytes<const M: usize>(&self, first: usize) -> Weights<'_, M> {
        let plane = |row: usize, plane: usize| &self.numbers[(2 * row + plane) * self.quads..][..self.quads];
        Weights {
            high: std::array::from_fn(|i| plane(first + i, 0)),
            low: std::array::from_fn(|i| plane(first + i, 1)),
        }
    }

    /// Weight `index` of a row.
    #[cfg(test)]
    pub(super) fn number(&self, row: usize, index: usize) -> i32 {
        let Weights { high: [high], low: [low] } = self.bytes::<1>(row);
        let byte = |bytes: &[i32]| i32::from(bytemuck::cast_slice::<i32, i8>(bytes)[index]);
        256 * byte(high) + byte(low)
    }
}

dispatch! {
    /// Rounds a row. Bytes behind its end become zero.
    fn round<>(values: &[f32], high: &mut [i8], low: &mut [i8], step: &mut f32);
    baseline: body(values, high, low, step);
    avx2: body(values, high, low, step);
    avx512: body(values, high, low, step);
    neon: body(values, high, low, step);
}

dispatch! {
    /// Folds scales into a row and rounds it; returns its product with the offsets.
    fn fold_and_round<>(
        values: &[f32],
        own: Scales,
        folded: &mut [f32],
        high: &mut [i8],
        low: &mut [i8],
        step: &mut f32,
    ) -> f32;
    baseline: folding_body::<Portable, BASELINE_FMA>(values, own, folded, high, low, step);
    avx2: folding_body::<Avx2, true>(values, own, folded, high, low, step);
    avx512: folding_body::<Avx512, true>(values, own, folded, high, low, step);
    neon: folding_body::<Neon, true>(values, own, folded, high, low, step);
}

#[inline(always)]
fn folding_body<L: Lanes, const FMA: bool>(
    values: &[f32],
    own: Scales,
    folded: &mut [f32],
    high: &mut [i8],
    low: &mut [i8],
    step: &mut f32,
) -> f32 {
    let offset = fold::<L, FMA>(values, own, folded);
    let mut len = values.len();
    if let Some(planes) = own.planes {
        for (value, place) in planes.further() {
            let (first, behind) = folded.split_at_mut(place.start);
            first.iter().zip(&mut behind[..place.len()]).for_each(|(first, weight)| *weight = value * first);
        }
        len = planes.count();
    }
    body(&folded[..len], high, low, step);
    offset
}

#[inline(always)]
fn body(values: &[f32], high: &mut [i8], low: &mut [i8], step: &mut f32) {
    // Magnitudes compare like their bits.
    let largest = f32::from_bits(values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7fff_ffff)));
    let inverse = LARGEST / largest;
    // Weights too small for that are nothing beside any others.
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    *step = largest / LARGEST;
    for ((value, high), low) in values.iter().zip(&mut *high).zip(&mut *low) {
        let number = (value * inverse + ROUND).to_bits().wrapping_sub(ROUND.to_bits()) as i32;
        *low = number as i8;
        *high = ((number + 128) >> 8) as i8;
    }
    high[values.len()..].fill(0);
    low[values.len()..].fill(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_at_most_half_a_step() {
        let values: Vec<f32> = (0..257).map(|i| ((i * i) as f32 * 0.37).sin() * 1.7f32.powi(i % 20)).collect();
        for isa in Isa::available() {
            let mut weights = IntegerWeights::default();
            weights.load(isa, &values, 1, 257, 257);
            let largest = values.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(weights.step(0) <= largest / 32_638.0);
            for (index, value) in values.iter().enumerate() {
                let error = (weights.number(0, index) as f32 * weights.step(0) - value).abs();
                assert!(error <= 0.5001 * weights.step(0), "{isa:?}: {error}");
            }
        }
    }

    #[test]
    fn rows_of_nothing_stay_nothing() {
        for isa in Isa::available() {
            let mut weights = IntegerWeights::default();
            weights.load(isa, &[0.0, 0.0, 0.0, 1e-42, -1e-42, 0.0], 2, 3, 3);
            for row in 0..2 {
                assert!((0..3).all(|i| (weights.number(row, i) as f32 * weights.step(row)).abs() <= 1e-42));
            }
        }
    }
}
