//! `out[i][j] = sum_k x[i][k] * w[j][k]`: rows against rows.
//!
//! This is linear layers on weights of 16 and 32 bit (but for prompts with AMX), and the scores of queries against 16-bit
//! keys. Each result is summed in the
//! same order whatever the number of rows, the tile sizes or the threads: `k` runs over 16 interleaved partial
//! sums, joined by a fixed tree. A batch therefore computes exactly what each of its rows computes alone.

use super::element::Element;
#[cfg(target_arch = "aarch64")]
use super::simd::Neon;
#[cfg(target_arch = "x86_64")]
use super::simd::{Avx2, Avx512};
use super::simd::{Lanes, Portable, WIDTH, dispatch, prefetch_at};

/// How many bytes ahead weights are asked for.
const AHEAD: usize = 2048;

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
            let mut lanes = [0f32; WIDTH];
            for k in 0..shape.k {
                let (a, b) = (x[i * shape.k + k], w[j * shape.k + k].widen());
                let lane = &mut lanes[k % WIDTH];
                *lane = if fma { a.mul_add(b, *lane) } else { a * b + *lane };
            }
            out.push(super::simd::join(lanes));
        }
    }
    out
}

/// The last `k % WIDTH` numbers of a row, zeros behind them: they add nothing.
#[inline(always)]
fn rest<E: Element>(row: &[E]) -> [f32; WIDTH] {
    let mut padded = [0f32; WIDTH];
    for (padded, value) in padded.iter_mut().zip(&row[row.len() - row.len() % WIDTH..]) {
        *padded = value.widen();
    }
    padded
}

#[inline(always)]
fn tile<E: Element, L: Lanes, const M: usize, const N: usize>(
    x: [&[f32]; M],
    w: [&[E]; N],
    mut emit: impl FnMut(usize, usize, f32),
) {
    let k = x[0].len();
    let mut sums = [[L::splat(0.0); N]; M];
    for start in (0..k - k % WIDTH).step_by(WIDTH) {
        let mut wide = [L::splat(0.0); N];
        for j in 0..N {
            if M == 1 {
                // One row is bound by memory, and rows of `w` follow each other.
                prefetch_at(w[j].as_ptr().wrapping_byte_add(start * size_of::<E>() + AHEAD));
            }
            wide[j] = E::load(w[j][start..start + WIDTH].try_into().expect("WIDTH numbers"));
        }
        for i in 0..M {
            let x = L::load(x[i][start..start + WIDTH].try_into().expect("WIDTH numbers"));
            for j in 0..N {
                sums[i][j] = x.mul_add(wide[j], sums[i][j]);
            }
        }
    }
    if !k.is_multiple_of(WIDTH) {
        for i in 0..M {
            for j in 0..N {
                sums[i][j] = L::load(&rest(x[i])).mul_add(L::load(&rest(w[j])), sums[i][j]);
            }
        }
    }
    for (i, sums) in sums.into_iter().enumerate() {
        for (j, sum) in sums.into_iter().enumerate() {
            emit(i, j, sum.sum());
        }
    }
}

#[inline(always)]
fn columns<E: Element, L: Lanes, const M: usize, const N: usize>(
    x: [&[f32]; M],
    w: &[E],
    shape: Shape,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let k = shape.k;
    let row = |j: usize| &w[j * k..(j + 1) * k];
    let whole = shape.n - shape.n % N;
    for j in (0..whole).step_by(N) {
        tile::<E, L, M, N>(x, std::array::from_fn(|b| row(j + b)), |a, b, sum| emit(a, j + b, sum));
    }
    for j in whole..shape.n {
        tile::<E, L, M, 1>(x, [row(j)], |a, _, sum| emit(a, j, sum));
    }
}

/// `N1`, `N2` and `N4` are the rows of `w` that are taken at once for 1, 2 and 4 rows of `x`.
#[inline(always)]
fn body<E: Element, L: Lanes, const N1: usize, const N2: usize, const N4: usize>(
    x: &[f32],
    w: &[E],
    shape: Shape,
    emit: &mut impl FnMut(usize, usize, f32),
) {
    let row = |i: usize| &x[i * shape.k..(i + 1) * shape.k];
    let mut i = 0;
    while i < shape.m {
        let emit = &mut |a, j, sum| emit(i + a, j, sum);
        i += match shape.m - i {
            4.. => {
                columns::<E, L, 4, N4>(std::array::from_fn(|a| row(i + a)), w, shape, emit);
                4
            }
            2.. => {
                columns::<E, L, 2, N2>([row(i), row(i + 1)], w, shape, emit);
                2
            }
            _ => {
                columns::<E, L, 1, N1>([row(i)], w, shape, emit);
                1
            }
        };
    }
}

dispatch! {
    /// Calls `emit(i, j, x[i] . w[j])` for every pair of rows.
    fn dot_rows<E: Element, F: FnMut(usize, usize, f32)>(x: &[f32], w: &[E], shape: Shape, emit: &mut F);
    baseline: body::<E, Portable, 2, 2, 1>(x, w, shape, emit);
    avx2: body::<E, Avx2, 4, 3, 1>(x, w, shape, emit);
    avx512: body::<E, Avx512, 1, 8, 4>(x, w, shape, emit);
    neon: body::<E, Neon, 4, 3, 1>(x, w, shape, emit);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn check<E: Element>(shape: Shape, convert: impl Fn(f32) -> E) {
        let x: Vec<f32> = (0..shape.m * shape.k).map(|i| (i as f32 * 0.71).sin()).collect();
        let w: Vec<E> = (0..shape.n * shape.k).map(|i| convert((i as f32 * 1.37).cos())).collect();
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; shape.m * shape.n];
            dot_rows(isa, &x, &w, shape, &mut |i, j, sum| out[i * shape.n + j] = sum);
            assert_eq!(out, reference(&x, &w, shape, isa.fuses()), "{isa:?} {shape:?}");
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
