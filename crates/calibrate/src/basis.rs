//! ResQ's orthogonal bases.

use nalgebra::{DMatrix, SymmetricEigen};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Share of the mean diagonal that is added to it.
const DAMPING: f64 = 0.01;

/// Uncentred second moments of keys or values: `[KV head][head_dim][head_dim]`, sums over tokens.
pub(crate) struct Moments {
    pub(crate) sums: Vec<f64>,
    head_dim: usize,
}

impl Moments {
    pub(crate) fn new(num_key_value_heads: usize, head_dim: usize) -> Self {
        Moments { sums: vec![0.0; num_key_value_heads * head_dim * head_dim], head_dim }
    }

    /// Adds all heads of one token.
    pub(crate) fn add(&mut self, token: &[f32]) {
        let d = self.head_dim;
        for (head, sums) in token.chunks_exact(d).zip(self.sums.chunks_exact_mut(d * d)) {
            for (a, row) in head.iter().zip(sums.chunks_exact_mut(d)) {
                for (b, sum) in head.iter().zip(row) {
                    *sum += f64::from(a * b);
                }
            }
        }
    }

    /// One basis for each KV head from its own moments: ResQ's choice for values. Heads take streams of random numbers
    /// from `stream` on.
    pub(crate) fn by_head(&self, high: usize, seed: u64, stream: u64) -> Vec<f32> {
        let d = self.head_dim;
        let heads = self.sums.chunks_exact(d * d).enumerate();
        heads.flat_map(|(head, sums)| basis(sums, d, high, seed, stream + head as u64)).collect()
    }

    /// The same basis for every KV head, from the mean of their moments: ResQ's choice for keys.
    pub(crate) fn shared(&self, high: usize, seed: u64, stream: u64) -> Vec<f32> {
        let d = self.head_dim;
        let mut mean = vec![0.0; d * d];
        for sums in self.sums.chunks_exact(d * d) {
            mean.iter_mut().zip(sums).for_each(|(mean, sum)| *mean += sum);
        }
        basis(&mean, d, high, seed, stream).repeat(self.sums.len() / (d * d))
    }
}

/// `U blockdiag(Q_low, Q_high)`: eigenvectors by ascending eigenvalue, the `high` last ones and the others each mixed by
/// a random rotation of their own. Row-major; applied to row vectors.
fn basis(moments: &[f64], d: usize, high: usize, seed: u64, stream: u64) -> Vec<f32> {
    let mut matrix = DMatrix::from_row_slice(d, d, moments);
    let damping = DAMPING * matrix.trace() / d as f64;
    for i in 0..d {
        matrix[(i, i)] += damping;
    }
    let eigen = SymmetricEigen::new(matrix);
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*a].total_cmp(&eigen.eigenvalues[*b]));
    let sorted = DMatrix::from_fn(d, d, |row, column| eigen.eigenvectors[(row, order[column])]);
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    let low = d - high;
    let mut rotation = DMatrix::zeros(d, d);
    rotation.view_mut((0, 0), (low, low)).copy_from(&orthogonal(low, &mut random));
    rotation.view_mut((low, low), (high, high)).copy_from(&orthogonal(high, &mut random));
    let product = sorted * rotation;
    (0..d * d).map(|at| product[(at / d, at % d)] as f32).collect()
}

/// A random rotation: the orthogonal factor of a normal matrix, columns signed so that it is unique.
fn orthogonal(n: usize, random: &mut ChaCha8Rng) -> DMatrix<f64> {
    if n == 0 {
        return DMatrix::zeros(0, 0);
    }
    let qr = DMatrix::from_fn(n, n, |_, _| normal(random)).qr();
    let (mut q, r) = (qr.q(), qr.r());
    for column in 0..n {
        if r[(column, column)] < 0.0 {
            q.column_mut(column).neg_mut();
        }
    }
    q
}

/// A normal number (Box-Muller).
fn normal(random: &mut ChaCha8Rng) -> f64 {
    let mut uniform = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
    let (a, b) = (1.0 - uniform(), uniform());
    (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens whose channel `c` has spread `c + 1`, turned by a fixed rotation.
    fn tokens(d: usize) -> Vec<Vec<f32>> {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        let turn = orthogonal(d, &mut random);
        (0..4000)
            .map(|_| {
                let spread: Vec<f64> = (0..d).map(|c| normal(&mut random) * (c + 1) as f64).collect();
                (0..d).map(|j| (0..d).map(|i| spread[i] * turn[(i, j)]).sum::<f64>() as f32).collect()
            })
            .collect()
    }

    #[test]
    fn the_last_channels_hold_the_largest_variance() {
        let (d, high) = (16, 4);
        let mut moments = Moments::new(1, d);
        let tokens = tokens(d);
        tokens.iter().for_each(|token| moments.add(token));
        let basis = moments.by_head(high, 7, 0);
        assert_eq!(moments.by_head(high, 7, 0), basis);
        assert_ne!(moments.by_head(high, 8, 0), basis);
        assert_ne!(moments.by_head(high, 7, 1), basis);
        let mut energy = vec![0.0f64; d];
        for token in &tokens {
            for (j, energy) in energy.iter_mut().enumerate() {
                let x: f32 = (0..d).map(|i| token[i] * basis[i * d + j]).sum();
                *energy += f64::from(x * x);
            }
        }
        let (low, high): (f64, f64) = (energy[..12].iter().sum(), energy[12..].iter().sum());
        // Spreads 13 to 16 against 1 to 12, squared: 846 of 1496.
        assert!((high / (low + high) - 846.0 / 1496.0).abs() < 0.02, "{low} {high}");
        let largest = energy[..12].iter().copied().fold(0.0, f64::max);
        assert!(energy[12..].iter().all(|e| *e > largest), "{energy:?}");
    }

    #[test]
    fn bases_are_orthogonal_even_without_data() {
        let mut moments = Moments::new(2, 8);
        for scale in [0.0, 1.0] {
            moments.sums.fill(scale);
            for basis in [moments.shared(1, u64::MAX, 0), moments.by_head(1, u64::MAX, 0)] {
                assert_eq!(basis.len(), 128);
                for head in basis.chunks_exact(64) {
                    for i in 0..8 {
                        for j in 0..8 {
                            let dot: f32 = (0..8).map(|k| head[i * 8 + k] * head[j * 8 + k]).sum();
                            assert!((dot - f32::from(u8::from(i == j))).abs() < 1e-5);
                        }
                    }
                }
            }
        }
    }
}
