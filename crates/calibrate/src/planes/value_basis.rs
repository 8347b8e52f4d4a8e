//! A basis of values for what the output projection makes of them.
//!
//! With `A = Wo^(1/2)` and the eigenpairs `(lambda, u)` of `A Sv A`, values are stored as `v A u`: then an error of a
//! channel reaches the residual stream as it is, and the channels are uncorrelated, by falling variance.

use dibit_cache::CacheShape;
use dibit_device::Tensor;
use nalgebra::{DMatrix, DVector, SymmetricEigen};

/// Eigenvalues of Wo are at least this share of the largest.
const LEAST: f64 = 1e-5;

/// How the output projection `[hidden_size, heads * head_dim]` weighs values: for each KV head the sum of
/// `W_h^T W_h` over the query heads that share it, `[KV head][head_dim][head_dim]`.
pub(crate) fn output_metric(shape: CacheShape, weight: &Tensor) -> Vec<DMatrix<f64>> {
    let (d, kv_heads) = (shape.head_dim, shape.num_key_value_heads);
    let heads = weight.cols() / d;
    let shared = heads / kv_heads;
    // Columns of the matrix are rows of the weight.
    let all = DMatrix::from_vec(weight.cols(), weight.rows(), weight.to_f32());
    (0..kv_heads)
        .map(|kv_head| {
            let mut sum = DMatrix::zeros(d, d);
            for head in kv_head * shared..(kv_head + 1) * shared {
                let own = all.rows(head * d, d);
                sum += own * own.transpose();
            }
            sum.map(f64::from)
        })
        .collect()
}

/// The basis of a KV head, row-major, for row vectors: columns by falling variance.
pub(crate) fn basis(metric: &DMatrix<f64>, spread: &[f64]) -> Vec<f32> {
    let d = metric.nrows();
    let spread = DMatrix::from_row_slice(d, d, spread);
    let own = SymmetricEigen::new((metric + metric.transpose()) * 0.5);
    let least = LEAST * own.eigenvalues.max();
    // A projection of nothing weighs all channels alike.
    let roots = if least > 0.0 { own.eigenvalues.map(|x| x.max(least).sqrt()) } else { DVector::repeat(d, 1.0) };
    let root = &own.eigenvectors * DMatrix::from_diagonal(&roots) * own.eigenvectors.transpose();
    let turned = &root * spread * &root;
    let eigen = SymmetricEigen::new((&turned + turned.transpose()) * 0.5);
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
    let all = root * eigen.eigenvectors;
    (0..d * d).map(|at| all[(at / d, order[at % d])] as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_device::DType;

    #[test]
    fn channels_are_uncorrelated_and_weigh_alike() {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: 2, head_dim: 8 };
        let weight = Tensor::random(3, 1.0, DType::F32, 24, 4 * 8);
        let metric = output_metric(shape, &weight);
        let rows = weight.to_f32();
        let product = |kv_head: usize, a: usize, b: usize| -> f64 {
            let of = |row: usize, head: usize| {
                f64::from(rows[row * 32 + head * 8 + a]) * f64::from(rows[row * 32 + head * 8 + b])
            };
            (0..24).flat_map(|row| [of(row, 2 * kv_head), of(row, 2 * kv_head + 1)]).sum()
        };
        assert!((metric[1][(2, 5)] - product(1, 2, 5)).abs() < 1e-4);
        let values = DMatrix::from_vec(8, 40, Tensor::random(4, 1.0, DType::F32, 40, 8).to_f32()).map(f64::from);
        let spread = &values * values.transpose();
        let t = DMatrix::from_row_slice(8, 8, &basis(&metric[1], spread.as_slice())).map(f64::from);
        // Errors of the stored channels reach the output alike: T^-1 Wo T^-T is the identity.
        let inverse = t.clone().try_inverse().unwrap();
        let alike = &inverse * &metric[1] * inverse.transpose();
        assert!((alike - DMatrix::<f64>::identity(8, 8)).abs().max() < 1e-4);
        let stored = t.transpose() * spread * t;
        let largest = stored[(0, 0)];
        for (a, b) in (0..8).flat_map(|a| (0..8).map(move |b| (a, b))).filter(|(a, b)| a != b) {
            assert!(stored[(a, b)].abs() < 1e-5 * largest, "{a} {b}");
        }
        assert!((1..8).all(|c| stored[(c, c)] <= stored[(c - 1, c - 1)]));
    }
}
