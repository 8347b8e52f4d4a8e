//! What is known of the channels of a layer.

use super::pages::{Pages, squared_ranges};
use dibit_cache::CacheShape;
use nalgebra::{DMatrix, SymmetricEigen};

/// How much the channels of keys matter.
pub(crate) struct KeyChannels {
    /// For each channel of the KV heads the sum of its squared queries, and then for each that of its squared ranges
    /// within pages.
    pub(crate) sums: Vec<f64>,
    pages: Pages,
}

/// How values are spread around the mean of their page: `[KV head][head_dim][head_dim]`, sums over tokens.
pub(crate) struct ValueSpread {
    pub(crate) sums: Vec<f64>,
    pages: Pages,
}

impl KeyChannels {
    pub(crate) fn new(shape: CacheShape) -> Self {
        KeyChannels { sums: vec![0.0; 2 * shape.row()], pages: Pages::default() }
    }

    /// Adds rows of queries and keys of a sequence, of which the first `skipped` tokens are never packed.
    pub(crate) fn add(&mut self, shape: CacheShape, first: usize, q: &[f32], k: &[f32], skipped: usize) {
        let (width, d) = (shape.row(), shape.head_dim);
        let (queries, ranges) = self.sums.split_at_mut(width);
        let rows = k.len() / width;
        let shared = q.len() / (rows * width);
        for row in q.chunks_exact(width * shared) {
            for (own, heads) in queries.chunks_exact_mut(d).zip(row.chunks_exact(shared * d)) {
                for query in heads.chunks_exact(d) {
                    own.iter_mut().zip(query).for_each(|(sum, x)| *sum += f64::from(x * x));
                }
            }
        }
        self.pages.add(first, k, width, skipped, |page| {
            ranges.iter_mut().zip(squared_ranges(page, width)).for_each(|(sum, range)| *sum += range);
        });
    }

    /// The weight of each channel: a channel of a key reaches a logit multiplied by its query, and rounding it costs in
    /// proportion to the square of its range.
    pub(crate) fn weights(&self) -> Vec<f64> {
        let (queries, ranges) = self.sums.split_at(self.sums.len() / 2);
        queries.iter().zip(ranges).map(|(query, range)| query * range).collect()
    }
}

impl ValueSpread {
    pub(crate) fn new(shape: CacheShape) -> Self {
        ValueSpread { sums: vec![0.0; shape.row() * shape.head_dim], pages: Pages::default() }
    }

    /// Adds rows of values of a sequence.
    pub(crate) fn add(&mut self, shape: CacheShape, first: usize, v: &[f32], skipped: usize) {
        let (width, d) = (shape.row(), shape.head_dim);
        let sums = &mut self.sums;
        let mut mean = vec![0.0; width];
        let mut centred = vec![0.0; d];
        self.pages.add(first, v, width, skipped, |page| {
            mean.fill(0.0);
            let rows = page.len() / width;
            for row in page.chunks_exact(width) {
                mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += *x);
            }
            mean.iter_mut().for_each(|mean| *mean /= rows as f32);
            for row in page.chunks_exact(width) {
                let heads = row.chunks_exact(d).zip(mean.chunks_exact(d)).zip(sums.chunks_exact_mut(d * d));
                for ((values, mean), sums) in heads {
                    centred.iter_mut().zip(values.iter().zip(mean)).for_each(|(c, (x, mean))| *c = x - mean);
                    for (a, sums) in centred.iter().zip(sums.chunks_exact_mut(d)) {
                        sums.iter_mut().zip(&centred).for_each(|(sum, b)| *sum += f64::from(a * b));
                    }
                }
            }
        });
    }

    /// The principal components of each head by falling variance: columns of an orthogonal matrix, row-major.
    pub(crate) fn basis(&self, head_dim: usize) -> Vec<f32> {
        self.sums.chunks_exact(head_dim * head_dim).flat_map(|sums| principal(sums, head_dim)).collect()
    }
}

fn principal(sums: &[f64], d: usize) -> Vec<f32> {
    let eigen = SymmetricEigen::new(DMatrix::from_row_slice(d, d, sums));
    let mut order: Vec<usize> = (0..d).collect();
    order.sort_by(|a, b| eigen.eigenvalues[*b].total_cmp(&eigen.eigenvalues[*a]));
    (0..d * d).map(|at| eigen.eigenvectors[(at / d, order[at % d])] as f32).collect()
}

/// Squared ranges of values in their basis.
pub(crate) struct ValueChannels {
    sums: Vec<f64>,
    pages: Pages,
}

impl ValueChannels {
    pub(crate) fn new(shape: CacheShape) -> Self {
        ValueChannels { sums: vec![0.0; shape.row()], pages: Pages::default() }
    }

    /// Adds rows of values of a sequence.
    pub(crate) fn add(&mut self, shape: CacheShape, basis: &[f32], first: usize, v: &[f32], skipped: usize) {
        let (width, d) = (shape.row(), shape.head_dim);
        let Self { sums, pages } = self;
        let mut turned = Vec::new();
        pages.add(first, v, width, skipped, |page| {
            turned.clear();
            turned.resize(page.len(), 0.0);
            for (turned, row) in turned.chunks_exact_mut(width).zip(page.chunks_exact(width)) {
                let heads = turned.chunks_exact_mut(d).zip(row.chunks_exact(d)).zip(basis.chunks_exact(d * d));
                for ((turned, value), basis) in heads {
                    for (x, basis) in value.iter().zip(basis.chunks_exact(d)) {
                        turned.iter_mut().zip(basis).for_each(|(sum, u)| *sum += x * u);
                    }
                }
            }
            sums.iter_mut().zip(squared_ranges(&turned, width)).for_each(|(sum, range)| *sum += range);
        });
    }

    /// The weight of each channel.
    pub(crate) fn weights(&self) -> &[f64] {
        &self.sums
    }
}
