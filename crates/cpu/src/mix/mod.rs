//! `y[i][lane] += sum_r a[i][r] * data[r][lane]`: a weighted sum of rows of 16 or 32 bit, read where they lie.
//!
//! Every lane sums over rows in their order, so a result does not depend on the instruction set's vector length or
//! on how many rows of `y` share a call.

use super::element::Element;
#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{BASELINE_FMA, Lanes, Portable, WIDTH, dispatch, mul_add};

/// Shape of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Rows of `y` and of the weights.
    pub m: usize,
    /// Weights from one row to the next.
    pub weight_stride: usize,
    /// Rows of `data`.
    pub rows: usize,
    /// Numbers from one row of `data` to the next.
    pub row_stride: usize,
    /// Numbers of a row.
    pub lanes: usize,
    /// Numbers from one row of `y` to the next.
    pub y_stride: usize,
}

/// `16 C` lanes from `first` on for `M` rows of `y`, all sums in registers; lanes before `keep` are left as they were.
#[inline(always)]
fn run<E: Element, L: Lanes, const M: usize, const C: usize>(
    weights: &[f32],
    data: &[E],
    shape: Shape,
    first: usize,
    keep: usize,
    y: &mut [f32],
) {
    let weights: [&[f32]; M] = std::array::from_fn(|i| &weights[i * shape.weight_stride..][..shape.rows]);
    let mut sums: [[L; C]; M] = std::array::from_fn(|i| {
        let y = &y[i * shape.y_stride + first..][..C * WIDTH];
        std::array::from_fn(|c| L::load(y[c * WIDTH..][..WIDTH].try_into().expect("WIDTH lanes")))
    });
    for r in 0..shape.rows {
        let row = &data[r * shape.row_stride + first..][..C * WIDTH];
        for c in 0..C {
            let lanes: L = E::load(row[c * WIDTH..][..WIDTH].try_into().expect("WIDTH lanes"));
            for (sums, weights) in sums.iter_mut().zip(weights) {
                sums[c] = L::splat(weights[r]).mul_add(lanes, sums[c]);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (c, sum) in sums.into_iter().enumerate() {
            let mut lanes = [0f32; WIDTH];
            sum.store(&mut lanes);
            let skip = if c == 0 { keep - first } else { 0 };
            y[i * shape.y_stride + first + c * WIDTH..][skip..WIDTH].copy_from_slice(&lanes[skip..]);
        }
    }
}

/// The specification, one lane after the other; also the path for rows of fewer than sixteen lanes.
#[inline(always)]
fn reference<E: Element, const FMA: bool>(weights: &[f32], data: &[E], shape: Shape, y: &mut [f32]) {
    for i in 0..shape.m {
        for r in 0..shape.rows {
            let weight = weights[i * shape.weight_stride + r];
            let lanes = &mut y[i * shape.y_stride..][..shape.lanes];
            for (sum, x) in lanes.iter_mut().zip(&data[r * shape.row_stride..]) {
                *sum = mul_add::<FMA>(weight, x.widen(), *sum);
            }
        }
    }
}

#[inline(always)]
fn runs<E: Element, L: Lanes, const M: usize, const C: usize>(
    weights: &[f32],
    data: &[E],
    shape: Shape,
    y: &mut [f32],
) {
    let mut first = 0;
    while first + C * WIDTH <= shape.lanes {
        run::<E, L, M, C>(weights, data, shape, first, first, y);
        first += C * WIDTH;
    }
    while first + WIDTH <= shape.lanes {
        run::<E, L, M, 1>(weights, data, shape, first, first, y);
        first += WIDTH;
    }
    if first < shape.lanes {
        run::<E, L, M, 1>(weights, data, shape, shape.lanes - WIDTH, first, y);
    }
}

/// `C1`, `C2` and `C4` are the columns that are summed at once for 1, 2 and 4 rows of `y`.
#[inline(always)]
fn body<E: Element, L: Lanes, const FMA: bool, const C1: usize, const C2: usize, const C4: usize>(
    weights: &[f32],
    data: &[E],
    shape: Shape,
    y: &mut [f32],
) {
    if shape.lanes < WIDTH {
        return reference::<E, FMA>(weights, data, shape, y);
    }
    let mut i = 0;
    while i < shape.m {
        let (weights, y) = (&weights[i * shape.weight_stride..], &mut y[i * shape.y_stride..]);
        i += match shape.m - i {
            4.. => {
                runs::<E, L, 4, C4>(weights, data, shape, y);
                4
            }
            2.. => {
                runs::<E, L, 2, C2>(weights, data, shape, y);
                2
            }
            _ => {
                runs::<E, L, 1, C1>(weights, data, shape, y);
                1
            }
        };
    }
}

dispatch! {
    /// Adds the weighted rows of `data` to `y`.
    fn mix_rows<E: Element>(weights: &[f32], data: &[E], shape: Shape, y: &mut [f32]);
    baseline: body::<E, Portable, BASELINE_FMA, 1, 1, 1>(weights, data, shape, y);
    avx2: body::<E, Avx2, true, 4, 2, 1>(weights, data, shape, y);
    avx512: body::<E, Avx512, true, 8, 8, 4>(weights, data, shape, y);
    neon: body::<E, Neon, true, 4, 2, 1>(weights, data, shape, y);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn check<E: Element>(m: usize, rows: usize, lanes: usize, number: impl Fn(f32) -> E) {
        let shape = Shape { m, weight_stride: rows + 3, rows, row_stride: lanes + 2, lanes, y_stride: lanes + 5 };
        let weights: Vec<f32> = (0..m * shape.weight_stride).map(|i| (i as f32 * 0.71).sin()).collect();
        let data: Vec<E> = (0..rows * shape.row_stride).map(|i| number((i as f32 * 0.91).sin())).collect();
        let start: Vec<f32> = (0..m * shape.y_stride).map(|i| (i as f32 * 0.37).cos()).collect();
        for isa in Isa::available() {
            let (mut y, mut expected) = (start.clone(), start.clone());
            mix_rows(isa, &weights, &data, shape, &mut y);
            let reference = if isa.fuses() { reference::<E, true> } else { reference::<E, false> };
            reference(&weights, &data, shape, &mut expected);
            assert_eq!(y, expected, "{isa:?} {shape:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_instruction_set_equals_the_reference(m in 1usize..9, rows in 1usize..40, lanes in 1usize..270) {
            check(m, rows, lanes, f16::from_f32);
            check(m, rows, lanes, |x| x);
        }
    }

    /// Each of these finite numbers, weighted by one and added to zero, is what it is widened to.
    fn check_widening<E: Element>(data: &[E]) {
        let lanes = data.len();
        let shape = Shape { m: 1, weight_stride: 1, rows: 1, row_stride: lanes, lanes, y_stride: lanes };
        let expected: Vec<f32> = data.iter().map(|value| value.widen()).collect();
        for isa in Isa::available() {
            let mut y = vec![0.0; lanes];
            mix_rows(isa, &[1.0], data, shape, &mut y);
            assert_eq!(y, expected, "{isa:?}");
        }
    }

    #[test]
    fn every_instruction_set_widens_exactly() {
        check_widening(&(0..=u16::MAX).map(f16::from_bits).filter(|half| half.is_finite()).collect::<Vec<_>>());
        check_widening(&(0..=u16::MAX).map(bf16::from_bits).filter(|brain| brain.is_finite()).collect::<Vec<_>>());
    }
}
