//! `y[i][lane] += sum_r a[i][r] * data[r][lane]`: a weighted sum of rows, read where they lie.
//!
//! This is decode attention on packed codes, twice for each page. Keys per channel: a row is a channel, its lanes
//! are tokens, the weights are the query with the channel's scale folded in. Values per token: a row is a token,
//! its lanes are channels, the weights are the probabilities with the token's scale folded in. The loop sees
//! only small integers; nothing is dequantised. Rows of 16 bit go the same way.
//!
//! Every lane sums over rows in their order, so a result does not depend on the instruction set's vector length or
//! on how many rows of `y` share a call.

use super::element::Element;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{BASELINE_FMA, Lanes, Portable, WIDTH, dispatch, mul_add};
use std::marker::PhantomData;

/// Fields of a unit that are summed at once.
const MAX_FIELDS: usize = 4;

/// A storage unit and the lanes in it.
pub(crate) trait Rows: Copy + Send + Sync + 'static {
    /// What a row consists of.
    type Unit: Copy + Send + Sync;
    /// Lanes in a unit; lane `field * units + j` lies in unit `j`.
    const FIELDS: usize;
    /// The number in one field.
    fn lane(unit: Self::Unit, field: usize) -> f32;
    /// One field of sixteen units.
    fn lanes<L: Lanes>(units: &[Self::Unit; WIDTH], field: usize) -> L;
}

/// Codes of `BITS` bits, packed as by [`dibit_quant::pack`]. Of the eight fields of one bit, those from `FIRST` on.
#[derive(Clone, Copy)]
pub(crate) struct Codes<const BITS: usize, const FIRST: usize = 0>;

impl<const BITS: usize, const FIRST: usize> Codes<BITS, FIRST> {
    const MASK: u8 = u8::MAX >> (8 - BITS);
}

impl<const BITS: usize, const FIRST: usize> Rows for Codes<BITS, FIRST> {
    type Unit = u8;
    const FIELDS: usize = if BITS == 1 { MAX_FIELDS } else { 8 / BITS };
    #[inline(always)]
    fn lane(unit: u8, field: usize) -> f32 {
        f32::from((unit >> ((FIRST + field) * BITS)) & Self::MASK)
    }
    #[inline(always)]
    fn lanes<L: Lanes>(units: &[u8; WIDTH], field: usize) -> L {
        L::load_bits(units, ((FIRST + field) * BITS) as u32, Self::MASK)
    }
}

/// Plain numbers: a unit is a lane.
#[derive(Clone, Copy)]
pub(crate) struct Plain<E>(PhantomData<E>);

impl<E: Element> Rows for Plain<E> {
    type Unit = E;
    const FIELDS: usize = 1;
    #[inline(always)]
    fn lane(unit: E, _: usize) -> f32 {
        unit.widen()
    }
    #[inline(always)]
    fn lanes<L: Lanes>(units: &[E; WIDTH], _: usize) -> L {
        E::load(units)
    }
}

/// Shape of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Rows of `y` and of the weights.
    pub m: usize,
    /// Weights from one row to the next.
    pub weight_stride: usize,
    /// Rows of `data`.
    pub rows: usize,
    /// Units from one row of `data` to the next.
    pub row_stride: usize,
    /// Units of a row that are read; `y` has `units * FIELDS` lanes.
    pub units: usize,
    /// Numbers from one row of `y` to the next.
    pub y_stride: usize,
}

/// Sixteen units from `first` on for `M` rows of `y`, all sums in registers; lanes of units before `keep` are
/// left as they were.
#[inline(always)]
fn run<R: Rows, L: Lanes, const M: usize>(
    weights: &[f32],
    data: &[R::Unit],
    shape: Shape,
    first: usize,
    keep: usize,
    y: &mut [f32],
) {
    let at = |i: usize, field: usize| i * shape.y_stride + field * shape.units + first;
    let weights: [&[f32]; M] = std::array::from_fn(|i| &weights[i * shape.weight_stride..][..shape.rows]);
    let mut sums: [[L; MAX_FIELDS]; M] = [[L::splat(0.0); MAX_FIELDS]; M];
    for (i, sums) in sums.iter_mut().enumerate() {
        for (field, sum) in sums.iter_mut().enumerate().take(R::FIELDS) {
            *sum = L::load(y[at(i, field)..][..WIDTH].try_into().expect("WIDTH lanes"));
        }
    }
    for r in 0..shape.rows {
        let units: &[R::Unit; WIDTH] = data[r * shape.row_stride + first..][..WIDTH].try_into().expect("WIDTH units");
        for field in 0..R::FIELDS {
            let lanes = R::lanes::<L>(units, field);
            for (sums, weights) in sums.iter_mut().zip(weights) {
                sums[field] = L::splat(weights[r]).mul_add(lanes, sums[field]);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (field, sum) in sums.into_iter().enumerate().take(R::FIELDS) {
            let mut lanes = [0f32; WIDTH];
            sum.store(&mut lanes);
            y[at(i, field)..][keep - first..WIDTH].copy_from_slice(&lanes[keep - first..]);
        }
    }
}

/// The specification, one lane after the other; also the path for rows of fewer than sixteen units.
#[inline(always)]
fn reference<R: Rows, const FMA: bool>(weights: &[f32], data: &[R::Unit], shape: Shape, y: &mut [f32]) {
    for i in 0..shape.m {
        for r in 0..shape.rows {
            let weight = weights[i * shape.weight_stride + r];
            for field in 0..R::FIELDS {
                let lanes = &mut y[i * shape.y_stride + field * shape.units..][..shape.units];
                for (sum, unit) in lanes.iter_mut().zip(&data[r * shape.row_stride..]) {
                    *sum = mul_add::<FMA>(weight, R::lane(*unit, field), *sum);
                }
            }
        }
    }
}

#[inline(always)]
fn runs<R: Rows, L: Lanes, const M: usize>(weights: &[f32], data: &[R::Unit], shape: Shape, y: &mut [f32]) {
    let mut first = 0;
    while first + WIDTH <= shape.units {
        run::<R, L, M>(weights, data, shape, first, first, y);
        first += WIDTH;
    }
    if first < shape.units {
        run::<R, L, M>(weights, data, shape, shape.units - WIDTH, first, y);
    }
}

#[inline(always)]
fn body<R: Rows, L: Lanes, const FMA: bool, const M: usize>(
    weights: &[f32],
    data: &[R::Unit],
    shape: Shape,
    y: &mut [f32],
) {
    if shape.units < WIDTH {
        return reference::<R, FMA>(weights, data, shape, y);
    }
    let whole = shape.m - shape.m % M;
    for i in (0..whole).step_by(M) {
        runs::<R, L, M>(&weights[i * shape.weight_stride..], data, shape, &mut y[i * shape.y_stride..]);
    }
    for i in whole..shape.m {
        runs::<R, L, 1>(&weights[i * shape.weight_stride..], data, shape, &mut y[i * shape.y_stride..]);
    }
}

dispatch! {
    /// Adds the weighted rows of `data` to `y`.
    fn mix_rows<R: Rows>(weights: &[f32], data: &[R::Unit], shape: Shape, y: &mut [f32]);
    baseline: body::<R, Portable, BASELINE_FMA, 1>(weights, data, shape, y);
    avx2: body::<R, Avx2, true, 1>(weights, data, shape, y);
    avx512: body::<R, Avx512, true, 4>(weights, data, shape, y);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::simd::Isa;
    use half::f16;
    use proptest::prelude::*;

    fn check<R: Rows>(m: usize, rows: usize, units: usize, unit: impl Fn(usize) -> R::Unit) {
        let lanes = units * R::FIELDS;
        let shape = Shape { m, weight_stride: rows + 3, rows, row_stride: units + 2, units, y_stride: lanes + 5 };
        let weights: Vec<f32> = (0..m * shape.weight_stride).map(|i| (i as f32 * 0.71).sin()).collect();
        let data: Vec<R::Unit> = (0..rows * shape.row_stride).map(unit).collect();
        let start: Vec<f32> = (0..m * shape.y_stride).map(|i| (i as f32 * 0.37).cos()).collect();
        for isa in Isa::available() {
            let (mut y, mut expected) = (start.clone(), start.clone());
            mix_rows::<R>(isa, &weights, &data, shape, &mut y);
            let reference = if isa.fuses() { reference::<R, true> } else { reference::<R, false> };
            reference(&weights, &data, shape, &mut expected);
            assert_eq!(y, expected, "{isa:?} {shape:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_instruction_set_equals_the_reference(m in 1usize..9, rows in 1usize..40, units in 1usize..70) {
            let byte = |i: usize| (i * 37 % 251) as u8;
            check::<Codes<2>>(m, rows, units, byte);
            check::<Codes<4>>(m, rows, units, byte);
            check::<Codes<8>>(m, rows, units, byte);
            check::<Codes<1>>(m, rows, units, byte);
            check::<Codes<1, 4>>(m, rows, units, byte);
            check::<Plain<f16>>(m, rows, units, |i| f16::from_f32((i as f32 * 0.91).sin()));
            check::<Plain<f32>>(m, rows, units, |i| (i as f32 * 0.91).sin());
        }
    }

    #[test]
    fn lanes_are_those_of_the_packed_format() {
        let codes: Vec<u8> = (0..20).map(|i| (i * 7 % 4) as u8).collect();
        let mut packed = vec![0; 5];
        dibit_quant::pack(dibit_quant::Bits::Two, &codes, &mut packed);
        let shape = Shape { m: 1, weight_stride: 1, rows: 1, row_stride: 5, units: 5, y_stride: 20 };
        let mut y = vec![0.0; 20];
        mix_rows::<Codes<2>>(Isa::detect(), &[1.0], &packed, shape, &mut y);
        assert_eq!(y, codes.iter().map(|&c| f32::from(c)).collect::<Vec<_>>());
    }
}
