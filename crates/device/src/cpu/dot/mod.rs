//! `out[i][j] = sum_k x[i][k] * w[j][k]`: rows against rows.
//!
//! This is every linear layer, and the scores of queries against 16-bit keys. Each result is summed in the
//! same order whatever the number of rows, the tile sizes or the threads: `k` runs over 16 interleaved partial
//! sums, joined by a fixed tree. A batch therefore computes exactly what each of its rows computes alone.

use super::element::Element;
use super::isa::{BASELINE_FMA, dispatch, mul_add};

/// Partial sums of a dot product.
const LANES: usize = 16;

/// Shape of a call: `x` is `m` rows of `k` numbers, `w` is `n` rows of `k` numbers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// The specification: the same sums in the same order, one number at a time.
#[cfg(test)]
pub(crate) fn reference<E: Element>(x: &[f32], w: &[E], shape: Shape, fma: bool) -> Vec<f32> {
    let mut out = Vec::new();
    for i in 0..shape.m {
        for j in 0..shape.n {
            let mut lanes = [0f32; LANES];
            for k in 0..shape.k {
                let (a, b) = (x[i * shape.k + k], w[j * shape.k + k].widen());
                let lane = &mut lanes[k % LANES];
                *lane = if fma { a.mul_add(b, *lane) } else { a * b + *lane };
            }
            out.push(join(lanes));
        }
    }
    out
}

#[inline(always)]
fn join(mut lanes: [f32; LANES]) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn tile<E: Element, const FMA: bool, const M: usize, const N: usize>(
    x: [&[f32]; M],
    w: [&[E]; N],
    mut emit: impl FnMut(usize, usize, f32),
) {
    let k = x[0].len();
    let mut sums = [[[0f32; LANES]; N]; M];
    for start in (0..k - k % LANES).step_by(LANES) {
        let mut wide = [[0f32; LANES]; N];
        for (wide, row) in wide.iter_mut().zip(w) {
            let chunk: &[E; LANES] = row[start..start + LANES].try_into().expect("a chunk of LANES");
            for lane in 0..LANES {
                wide[lane] = chunk[lane].widen();
            }
        }
        for (sums, row) in sums.iter_mut().zip(x) {
            let chunk: &[f32; LANES] = row[start..start + LANES].try_into().expect("a chunk of LANES");
            for (sum, wide) in sums.iter_mut().zip(&wide) {
                for lane in 0..LANES {
                    sum[lane] = mul_add::<FMA>(chunk[lane], wide[lane], sum[lane]);
                }
            }
        }
    }
    for at in k - k % LANES..k {
        for (sums, x) in sums.iter_mut().zip(x) {
            for (sum, w) in sums.iter_mut().zip(w) {
                let lane = at % LANES;
                sum[lane] = mul_add::<FMA>(x[at], w[at].widen(), sum[lane]);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            emit(i, j, join(sum));
        }
    }
}

#[inline(always)]
fn columns<E: Element, const FMA: bool, const M: usize, const N: usize>(
    x: [&[f32]; M],
    w: &[E],
    shape: Shape,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let k = shape.k;
    let row = |j: usize| &w[j * k..(j + 1) * k];
    let whole = shape.n - shape.n % N;
    for j in (0..whole).step_by(N) {
        tile::<E, FMA, M, N>(x, std::array::from_fn(|b| row(j + b)), |a, b, sum| emit(a, j + b, sum));
    }
    for j in whole..shape.n {
        tile::<E, FMA, M, 1>(x, [row(j)], |a, _, sum| emit(a, j, sum));
    }
}

#[inline(always)]
fn body<E: Element, const FMA: bool, const M: usize, const N: usize>(
    x: &[f32],
    w: &[E],
    shape: Shape,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let row = |i: usize| &x[i * shape.k..(i + 1) * shape.k];
    let whole = shape.m - shape.m % M;
    for i in (0..whole).step_by(M) {
        columns::<E, FMA, M, N>(std::array::from_fn(|a| row(i + a)), w, shape, &mut |a, j, sum| emit(i + a, j, sum));
    }
    for i in whole..shape.m {
        columns::<E, FMA, 1, N>([row(i)], w, shape, &mut |_, j, sum| emit(i, j, sum));
    }
}

dispatch! {
    /// Calls `emit(i, j, x[i] . w[j])` for every pair of rows.
    fn dot_rows<E: Element, F: FnMut(usize, usize, f32)>(x: &[f32], w: &[E], shape: Shape, emit: &mut F);
    baseline: body::<E, BASELINE_FMA, 2, 2>(x, w, shape, emit);
    avx2: body::<E, true, 2, 3>(x, w, shape, emit);
    avx512: body::<E, true, 4, 4>(x, w, shape, emit);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn check<E: Element>(shape: Shape, convert: impl Fn(f32) -> E) {
        let x: Vec<f32> = (0..shape.m * shape.k).map(|i| (i as f32 * 0.71).sin()).collect();
        let w: Vec<E> = (0..shape.n * shape.k).map(|i| convert((i as f32 * 1.37).cos())).collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; shape.m * shape.n];
            dot_rows(isa, &x, &w, shape, &mut |i, j, sum| out[i * shape.n + j] = sum);
            assert_eq!(out, reference(&x, &w, shape, isa != Isa::Baseline || BASELINE_FMA), "{isa:?} {shape:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_instruction_set_equals_the_reference(m in 1usize..10, n in 1usize..10, k in 1usize..100) {
            let shape = Shape { m, n, k };
            check(shape, |v| v);
            check(shape, f16::from_f32);
            check(shape, bf16::from_f32);
        }
    }
}
