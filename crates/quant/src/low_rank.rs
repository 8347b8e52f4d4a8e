//! Low-rank factors of a quantisation error (GEAR).

use crate::splitmix;

/// Repetitions of the power iteration in GEAR's code.
const LOOPS: usize = 3;

/// Factors of an error matrix: `E ~ tokens channels^T`.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `[rows][rank]`, orthonormal columns.
    pub tokens: Vec<f32>,
    /// `[cols][rank]`
    pub channels: Vec<f32>,
}

/// The best `rank` directions of `error`, a row-major matrix of `cols` columns, by power iteration from a fixed
/// start: three rounds, and columns made orthonormal in the last of them.
///
/// # Panics
/// If `error` is not made of whole rows.
pub fn low_rank(error: &[f32], cols: usize, rank: usize) -> LowRank {
    assert!(error.len().is_multiple_of(cols), "whole rows of {cols} numbers");
    let rows = error.len() / cols;
    let mut channels: Vec<f32> = (0..cols * rank).map(|i| uniform(i as u64)).collect();
    let mut tokens = vec![0.0; rows * rank];
    for round in 0..LOOPS {
        let last = round + 1 == LOOPS;
        if last {
            orthonormalise(&mut channels, rank);
        }
        for (row, out) in error.chunks_exact(cols).zip(tokens.chunks_exact_mut(rank)) {
            out.fill(0.0);
            for (value, channel) in row.iter().zip(channels.chunks_exact(rank)) {
                for (out, channel) in out.iter_mut().zip(channel) {
                    *out += value * channel;
                }
            }
        }
        if last {
            orthonormalise(&mut tokens, rank);
        }
        channels.fill(0.0);
        for (row, token) in error.chunks_exact(cols).zip(tokens.chunks_exact(rank)) {
            for (value, channel) in row.iter().zip(channels.chunks_exact_mut(rank)) {
                for (channel, token) in channel.iter_mut().zip(token) {
                    *channel += value * token;
                }
            }
        }
    }
    LowRank { tokens, channels }
}

/// Uniform numbers of `[0, 1)` by counter.
fn uniform(counter: u64) -> f32 {
    (splitmix(counter) >> 40) as f32 / (1u64 << 24) as f32
}

/// Gram-Schmidt on the columns of a row-major matrix, twice over, in f64. Columns that depend on earlier ones become
/// zero.
fn orthonormalise(matrix: &mut [f32], cols: usize) {
    let dot = |matrix: &[f32], a: usize, b: usize| -> f64 {
        matrix.chunks_exact(cols).map(|row| f64::from(row[a]) * f64::from(row[b])).sum()
    };
    for column in 0..cols {
        let before = dot(matrix, column, column);
        for earlier in (0..column).chain(0..column) {
            let along = dot(matrix, column, earlier) as f32;
            for row in matrix.chunks_exact_mut(cols) {
                row[column] -= along * row[earlier];
            }
        }
        let left = dot(matrix, column, column);
        let scale = if left > 1e-12 * before { (1.0 / left.sqrt()) as f32 } else { 0.0 };
        for row in matrix.chunks_exact_mut(cols) {
            row[column] *= scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn residual(error: &[f32], cols: usize, factors: &LowRank, rank: usize) -> f64 {
        let mut sum = 0.0;
        for (row, token) in error.chunks_exact(cols).zip(factors.tokens.chunks_exact(rank)) {
            for (value, channel) in row.iter().zip(factors.channels.chunks_exact(rank)) {
                let product: f32 = token.iter().zip(channel).map(|(a, b)| a * b).sum();
                sum += f64::from(value - product).powi(2);
            }
        }
        sum
    }

    #[test]
    fn a_matrix_of_that_rank_is_found_exactly() {
        let (rows, cols) = (40, 16);
        let a: Vec<f32> = (0..rows).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = (0..cols).map(|i| (i as f32 * 1.3).cos()).collect();
        let error: Vec<f32> = a.iter().flat_map(|a| b.iter().map(move |b| a * b)).collect();
        for rank in [1, 2, 4] {
            assert!(residual(&error, cols, &low_rank(&error, cols, rank), rank) < 1e-8);
        }
    }

    #[test]
    fn more_rank_leaves_less() {
        let (rows, cols) = (128, 32);
        let error: Vec<f32> = (0..rows * cols).map(|i| uniform(i as u64 + 77) - 0.5).collect();
        let left: Vec<f64> =
            [1, 2, 4, 8].map(|rank| residual(&error, cols, &low_rank(&error, cols, rank), rank)).into();
        assert!(left.windows(2).all(|pair| pair[1] < pair[0]), "{left:?}");
        assert!(left[0] < error.iter().map(|e| f64::from(*e).powi(2)).sum());
    }

    #[test]
    fn no_error_has_no_factors() {
        let factors = low_rank(&[0.0; 64], 16, 2);
        assert!(factors.tokens.iter().chain(&factors.channels).all(|x| *x == 0.0));
    }
}
