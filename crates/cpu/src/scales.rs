//! Scales and zeros of groups: folded into weights, into sums, or applied to codes.
//!
//! A code `c` stands for `x^ = s c + o`, where the offset `o` is the zero itself ([`Quantizer::FloatMin`]) or `-s z`.

use super::element::Element;
#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{BASELINE_FMA, Lanes, Portable, WIDTH, dispatch, join, mul_add};
use dibit_cache::Planes;
use dibit_quant::Quantizer;
use half::f16;

/// Scales and zeros side by side.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scales<'a> {
    pub scales: &'a [f16],
    pub zeros: &'a [f16],
    pub quantizer: Quantizer,
    /// How many planes of codes each has; one where this says nothing. Scales of channels without a plane mean nothing.
    pub planes: Option<&'a Planes>,
}

impl Scales<'_> {
    fn integer(&self) -> bool {
        self.quantizer != Quantizer::FloatMin
    }

    /// Scale and offset of one group.
    pub(super) fn at(&self, index: usize) -> (f32, f32) {
        let (scale, zero) = (self.scales[index].widen(), self.zeros[index].widen());
        (scale, offset(self.integer(), scale, zero))
    }
}

/// What code 0 stands for.
#[inline(always)]
pub(super) fn offset(integer: bool, scale: f32, zero: f32) -> f32 {
    if integer { -scale * zero } else { zero }
}

/// `folded = weights * scales`; returns `weights . offsets`. `L` must be of the instruction set that this is inlined for.
#[inline(always)]
pub(super) fn fold<L: Lanes, const FMA: bool>(weights: &[f32], own: Scales, folded: &mut [f32]) -> f32 {
    let len = weights.len();
    let (folded, scales, zeros) = (&mut folded[..len], &own.scales[..len], &own.zeros[..len]);
    let integer = own.integer();
    let sign = if integer { L::splat(-1.0) } else { L::splat(1.0) };
    let none = L::splat(0.0);
    let mut sums = none;
    let whole = len - len % WIDTH;
    for start in (0..whole).step_by(WIDTH) {
        let of = start..start + WIDTH;
        let weight = L::load(weights[of.clone()].try_into().expect("WIDTH numbers"));
        let scale: L = f16::load(scales[of.clone()].try_into().expect("WIDTH numbers"));
        let zero: L = f16::load(zeros[of.clone()].try_into().expect("WIDTH numbers"));
        let scaled = weight.mul_add(scale, none);
        scaled.store((&mut folded[of]).try_into().expect("WIDTH numbers"));
        let of_zero = if integer { scaled } else { weight };
        sums = of_zero.mul_add(zero.mul_add(sign, none), sums);
    }
    let mut lanes = [0f32; WIDTH];
    sums.store(&mut lanes);
    for (lane, index) in lanes.iter_mut().zip(whole..len) {
        folded[index] = weights[index] * scales[index].widen();
        let zero = zeros[index].widen();
        let (of_zero, zero) = if integer { (folded[index], -zero) } else { (weights[index], zero) };
        *lane = mul_add::<FMA>(of_zero, zero, *lane);
    }
    join(lanes)
}

/// Rows of weighted codes, and rows of sums that they are added to.
pub(super) struct Unfolding<'a> {
    /// The sum of the weights of each row.
    pub totals: &'a [f32],
    /// `[row][mixed_stride]`: sums over planes, the first plane of all channels first; room for all channels. Zeros behind.
    pub mixed: &'a mut [f32],
    pub mixed_stride: usize,
    /// `[row][sum_stride]`
    pub sums: &'a mut [f32],
    pub sum_stride: usize,
}

#[inline(always)]
fn unfold_body<L: Lanes, const FMA: bool>(rows: Unfolding, own: Scales) {
    let Unfolding { totals, mixed, mixed_stride, sums, sum_stride } = rows;
    if let Some(planes) = own.planes {
        for mixed in mixed.chunks_exact_mut(mixed_stride) {
            for (value, place) in planes.further() {
                let (first, behind) = mixed.split_at_mut(place.start);
                first.iter_mut().zip(&behind[..place.len()]).for_each(|(sum, plane)| *sum += value * plane);
            }
            mixed[planes.with[0]..].fill(0.0);
        }
    }
    let (integer, channels) = (own.integer(), own.scales.len());
    let (none, minus) = (L::splat(0.0), L::splat(-1.0));
    let whole = channels - channels % WIDTH;
    for start in (0..whole).step_by(WIDTH) {
        let of = start..start + WIDTH;
        let scale: L = f16::load(own.scales[of.clone()].try_into().expect("WIDTH numbers"));
        let zero: L = f16::load(own.zeros[of.clone()].try_into().expect("WIDTH numbers"));
        let offset = if integer { scale.mul_add(zero.mul_add(minus, none), none) } else { zero };
        let rows = mixed.chunks_exact_mut(mixed_stride).zip(sums.chunks_mut(sum_stride)).zip(totals);
        for ((mixed, sums), total) in rows {
            let mixed: &mut [f32; WIDTH] = (&mut mixed[of.clone()]).try_into().expect("WIDTH numbers");
            let sums: &mut [f32; WIDTH] = (&mut sums[of.clone()]).try_into().expect("WIDTH numbers");
            let offsets = L::splat(*total).mul_add(offset, L::load(sums));
            L::load(mixed).mul_add(scale, offsets).store(sums);
            none.store(mixed);
        }
    }
    let rows = mixed.chunks_exact_mut(mixed_stride).zip(sums.chunks_mut(sum_stride)).zip(totals);
    for ((mixed, sums), total) in rows {
        for channel in whole..channels {
            let (scale, offset) = own.at(channel);
            let offsets = mul_add::<FMA>(*total, offset, sums[channel]);
            sums[channel] = mul_add::<FMA>(std::mem::take(&mut mixed[channel]), scale, offsets);
        }
    }
}

dispatch! {
    /// `sums += scales * mixed + offsets * total` for each row.
    fn unfold<>(rows: Unfolding, own: Scales);
    baseline: unfold_body::<Portable, BASELINE_FMA>(rows, own);
    avx2: unfold_body::<Avx2, true>(rows, own);
    avx512: unfold_body::<Avx512, true>(rows, own);
    neon: unfold_body::<Neon, true>(rows, own);
}

#[inline(always)]
fn total_body<L: Lanes>(values: &[f32]) -> f32 {
    let (whole, rest) = values.as_chunks::<WIDTH>();
    let mut sums = L::splat(0.0);
    for values in whole {
        sums = L::load(values).mul_add(L::splat(1.0), sums);
    }
    let mut lanes = [0f32; WIDTH];
    sums.store(&mut lanes);
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += value;
    }
    join(lanes)
}

dispatch! {
    /// The sum of all numbers, as 16 interleaved sums that a fixed tree joins.
    fn total<>(values: &[f32]) -> f32;
    baseline: total_body::<Portable>(values);
    avx2: total_body::<Avx2>(values);
    avx512: total_body::<Avx512>(values);
    neon: total_body::<Neon>(values);
}

/// One row of codes as numbers.
#[inline(always)]
fn apply_body(codes: &[u8], scale: &[f32], offset: &[f32], out: &mut [f32]) {
    for (((out, code), scale), offset) in out.iter_mut().zip(codes).zip(scale).zip(offset) {
        *out = f32::from(*code) * scale + offset;
    }
}

dispatch! {
    /// `out = scale * codes + offset`, each lane with its own.
    fn apply<>(codes: &[u8], scale: &[f32], offset: &[f32], out: &mut [f32]);
    baseline: apply_body(codes, scale, offset, out);
    avx2: apply_body(codes, scale, offset, out);
    avx512: apply_body(codes, scale, offset, out);
    neon: apply_body(codes, scale, offset, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use proptest::prelude::*;

    dispatch! {
        fn fold_by<>(weights: &[f32], own: Scales, folded: &mut [f32]) -> f32;
        baseline: fold::<Portable, BASELINE_FMA>(weights, own, folded);
        avx2: fold::<Avx2, true>(weights, own, folded);
        avx512: fold::<Avx512, true>(weights, own, folded);
        neon: fold::<Neon, true>(weights, own, folded);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_instruction_set_computes_the_same(len in 1usize..300, integer in any::<bool>(), seed in 0usize..1000) {
            let number = |i: usize| (((i + seed) * 7919 % 1009) as f32 / 1009.0 - 0.4) * 3.0;
            let weights: Vec<f32> = (0..len).map(number).collect();
            let scales: Vec<f16> = (0..len).map(|i| f16::from_f32(number(3 * i).abs())).collect();
            let zeros: Vec<f16> = (0..len).map(|i| f16::from_f32(number(5 * i))).collect();
            let quantizer = match integer {
                true => Quantizer::IntegerZero { clip: 1.0, include_zero: false },
                false => Quantizer::FloatMin,
            };
            let own = Scales { scales: &scales, zeros: &zeros, quantizer, planes: None };
            let groups: Vec<(f32, f32)> = (0..len).map(|i| own.at(i)).collect();
            let offsets: f64 = weights.iter().zip(&groups).map(|(w, (_, o))| f64::from(*w) * f64::from(*o)).sum();
            let sum: f64 = weights.iter().map(|w| f64::from(*w)).sum();
            for isa in Isa::available() {
                let mut folded = vec![0.0; len];
                let offset = fold_by(isa, &weights, own, &mut folded);
                prop_assert!((f64::from(offset) - offsets).abs() < 1e-3, "{:?}: {} is not {}", isa, offset, offsets);
                prop_assert!((f64::from(total(isa, &weights)) - sum).abs() < 1e-3);
                let mut sums = weights.clone();
                let mut mixed = folded.clone();
                unfold(isa, Unfolding { totals: &[2.0], mixed: &mut mixed, mixed_stride: len, sums: &mut sums, sum_stride: len }, own);
                prop_assert!(mixed.iter().all(|x| *x == 0.0));
                let codes: Vec<u8> = (0..len).map(|i| (i * 37 % 256) as u8).collect();
                let mut numbers = vec![0.0; len];
                let (scale, offset): (Vec<f32>, Vec<f32>) = groups.iter().copied().unzip();
                apply(isa, &codes, &scale, &offset, &mut numbers);
                for (i, (scale, offset)) in groups.iter().enumerate() {
                    prop_assert_eq!(folded[i], weights[i] * scale);
                    prop_assert!((sums[i] - (weights[i] + folded[i] * scale + 2.0 * offset)).abs() < 1e-4);
                    prop_assert_eq!(numbers[i], f32::from(codes[i]) * scale + offset);
                }
            }
        }
    }
}
