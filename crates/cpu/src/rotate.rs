//! Rotations of rows and columns.

use super::simd::dispatch;
use dibit_quant::Hadamard;

dispatch! {
    /// [`Hadamard::apply`].
    fn hadamard<>(matrix: &Hadamard, row: &mut [f32]);
    baseline: matrix.apply(row);
    avx2: matrix.apply(row);
    avx512: matrix.apply(row);
    neon: matrix.apply(row);
}

dispatch! {
    /// [`Hadamard::apply_inverse`].
    fn hadamard_inverse<>(matrix: &Hadamard, row: &mut [f32]);
    baseline: matrix.apply_inverse(row);
    avx2: matrix.apply_inverse(row);
    avx512: matrix.apply_inverse(row);
    neon: matrix.apply_inverse(row);
}

dispatch! {
    /// [`Hadamard::apply_columns`].
    fn hadamard_columns<>(matrix: &Hadamard, rows: &mut [f32], columns: usize);
    baseline: matrix.apply_columns(rows, columns);
    avx2: matrix.apply_columns(rows, columns);
    avx512: matrix.apply_columns(rows, columns);
    neon: matrix.apply_columns(rows, columns);
}

dispatch! {
    /// [`Hadamard::apply_inverse_columns`].
    fn hadamard_inverse_columns<>(matrix: &Hadamard, rows: &mut [f32], columns: usize);
    baseline: matrix.apply_inverse_columns(rows, columns);
    avx2: matrix.apply_inverse_columns(rows, columns);
    avx512: matrix.apply_inverse_columns(rows, columns);
    neon: matrix.apply_inverse_columns(rows, columns);
}

#[inline(always)]
fn times_body(row: &[f32], matrix: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (x, matrix_row) in row.iter().zip(matrix.chunks_exact(row.len())) {
        for (sum, u) in out.iter_mut().zip(matrix_row) {
            *sum += x * u;
        }
    }
}

dispatch! {
    /// `out <- row U` for a square matrix.
    fn times<>(row: &[f32], matrix: &[f32], out: &mut [f32]);
    baseline: times_body(row, matrix, out);
    avx2: times_body(row, matrix, out);
    avx512: times_body(row, matrix, out);
    neon: times_body(row, matrix, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;

    fn noise(len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * i) as f32 * 0.37).sin() * 3.0).collect()
    }

    #[test]
    fn every_instruction_set_computes_the_same_bits() {
        for order in [1, 2, 4, 8, 16, 32, 40, 64, 72, 80, 96, 128, 248, 256, 288, 512] {
            let matrix = Hadamard::new(order).unwrap();
            for columns in [1, 3, 16, 128] {
                let x = noise(order * columns);
                let all = |isa: Isa| {
                    let [mut there, mut back] = [x.clone(), x.clone()];
                    hadamard_columns(isa, &matrix, &mut there, columns);
                    hadamard_inverse_columns(isa, &matrix, &mut back, columns);
                    if columns == 1 {
                        let [mut row, mut row_back] = [x.clone(), x.clone()];
                        hadamard(isa, &matrix, &mut row);
                        hadamard_inverse(isa, &matrix, &mut row_back);
                        assert_eq!((&row, &row_back), (&there, &back));
                    }
                    [there, back].concat().into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                for isa in Isa::available() {
                    assert_eq!(all(isa), all(Isa::Baseline), "order {order}, {columns} columns, {isa:?}");
                }
            }
        }
    }

    #[test]
    fn products_are_sums_in_the_order_of_rows() {
        for d in [1, 3, 64, 80] {
            let (row, matrix) = (noise(d), noise(d * d));
            for isa in Isa::available() {
                let mut out = vec![f32::NAN; d];
                times(isa, &row, &matrix, &mut out);
                for (j, got) in out.iter().enumerate() {
                    assert_eq!(*got, (0..d).fold(0.0, |sum, i| sum + row[i] * matrix[i * d + j]), "{isa:?}");
                }
            }
        }
    }
}
