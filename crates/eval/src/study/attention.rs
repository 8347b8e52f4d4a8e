//! Causal attention of a few query rows at a time, so that a tensor is read once for all of them.

use std::ops::Range;

/// Query rows that are computed together.
pub(super) const TILE: usize = 16;

/// Query rows of one head, at ascending positions.
pub(super) struct Tile {
    /// Position of each row; it sees the keys up to and including this one.
    pub positions: Vec<usize>,
    /// `[rows][head_dim]`, divided by the square root of `head_dim`.
    pub queries: Vec<f32>,
}

/// Attention rows of a tile over one key tensor.
#[derive(Clone)]
pub(super) struct Rows {
    /// `[rows][tokens]`; entries that a row does not see are unspecified.
    logits: Vec<f32>,
    /// `[rows][tokens]`; softmax of the logits that a row sees.
    weights: Vec<f32>,
    /// Logarithm of the sum of the exponentials of a row's logits.
    log_totals: Vec<f64>,
    tokens: usize,
}

impl Rows {
    /// The rows with the logits of others for the first tokens, so many in each row.
    pub fn replaced(&self, others: &Rows, positions: &[usize], first: &[usize]) -> Rows {
        let mut logits = self.logits.clone();
        for (row, (logits, others)) in
            logits.chunks_exact_mut(self.tokens).zip(others.logits.chunks_exact(self.tokens)).enumerate()
        {
            logits[..first[row]].copy_from_slice(&others[..first[row]]);
        }
        Rows::of(logits, self.tokens, positions)
    }

    /// The rows with weight added to the tokens that `tokens` gives for a row, in the frame where the largest weight is 1
    /// (KVLinC, Algorithm 1); and the weights without what was added, over the new normaliser.
    pub fn with_weight(
        &self,
        positions: &[usize],
        tokens: impl Fn(usize) -> Range<usize>,
        added: impl Fn(usize, usize) -> f32,
    ) -> (Rows, Rows) {
        let mut more = self.clone();
        let mut old = self.clone();
        for (row, &position) in positions.iter().enumerate() {
            let seen = row * self.tokens..=row * self.tokens + position;
            let (logits, weights) = (&mut more.logits[seen.clone()], &mut more.weights[seen.clone()]);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            weights.iter_mut().zip(&*logits).for_each(|(weight, logit)| *weight = (logit - largest).exp());
            old.weights[seen.clone()].copy_from_slice(weights);
            for token in tokens(row) {
                let added = added(row, token);
                // Where nothing is added the logit stays, which may be too low for a weight.
                if added > 0.0 {
                    weights[token] += added;
                    logits[token] = largest + weights[token].ln();
                }
            }
            let total: f64 = weights.iter().map(|&weight| f64::from(weight)).sum();
            let norm = (1.0 / total) as f32;
            weights.iter_mut().chain(&mut old.weights[seen]).for_each(|weight| *weight *= norm);
            more.log_totals[row] = f64::from(largest) + total.ln();
        }
        (more, old)
    }

    /// The rows with no weight from a token on, a different one in each row.
    pub fn seen_until(&self, ends: &[usize]) -> Rows {
        let mut rows = self.clone();
        for (row, &end) in rows.weights.chunks_exact_mut(self.tokens).zip(ends) {
            row[end..].fill(0.0);
        }
        rows
    }

    fn of(logits: Vec<f32>, tokens: usize, positions: &[usize]) -> Rows {
        let mut weights = logits.clone();
        let rows = weights.chunks_exact_mut(tokens).zip(positions);
        let log_totals = rows.map(|(row, &position)| softmax(&mut row[..=position])).collect();
        Rows { logits, weights, log_totals, tokens }
    }
}

impl Tile {
    /// Keeps the rows at some positions.
    pub fn retain(&mut self, head_dim: usize, keep: impl Fn(usize) -> bool) {
        let rows = self.queries.chunks_exact(head_dim).zip(&self.positions);
        self.queries = rows.filter(|(_, position)| keep(**position)).flat_map(|(query, _)| query).copied().collect();
        self.positions.retain(|position| keep(*position));
    }

    /// The queries as they were before they were divided.
    pub fn unscaled(&self, head_dim: usize) -> Vec<f32> {
        let norm = (head_dim as f32).sqrt();
        self.queries.iter().map(|x| x * norm).collect()
    }

    /// The attention rows over keys `[tokens][head_dim]`.
    pub fn attend(&self, keys: &[f32], head_dim: usize) -> Rows {
        let tokens = keys.len() / head_dim;
        let mut logits = vec![0.0; self.positions.len() * tokens];
        self.visible(keys, head_dim, |row, token, query, key| logits[row * tokens + token] = dot(query, key));
        Rows::of(logits, tokens, &self.positions)
    }

    /// The outputs `[rows][head_dim]` for values `[tokens][head_dim]`.
    pub fn mix(&self, rows: &Rows, values: &[f32], head_dim: usize) -> Vec<f32> {
        let mut outputs = vec![0f32; self.queries.len()];
        self.visible(values, head_dim, |row, token, _, value| {
            let weight = rows.weights[row * rows.tokens + token];
            let output = &mut outputs[row * head_dim..(row + 1) * head_dim];
            output.iter_mut().zip(value).for_each(|(sum, x)| *sum += weight * x);
        });
        outputs
    }

    /// Sum over the rows of the KL divergence of `other` from `exact`, `sum p log(p / q)`, in nats.
    pub fn divergence(&self, exact: &Rows, other: &Rows) -> f64 {
        let row = |(row, &position): (usize, &usize)| {
            let seen = row * exact.tokens..=row * exact.tokens + position;
            let moved = exact.logits[seen.clone()].iter().zip(&other.logits[seen.clone()]);
            let sum: f64 = exact.weights[seen]
                .iter()
                .zip(moved)
                .map(|(weight, (p, q))| f64::from(*weight) * f64::from(p - q))
                .sum();
            // Rounding can make a divergence of nothing slightly negative.
            (sum + other.log_totals[row] - exact.log_totals[row]).max(0.0)
        };
        self.positions.iter().enumerate().map(row).sum()
    }

    /// Calls `each(row, token, query, vector)` for every vector of `tensor` that a row sees.
    fn visible<'a>(&self, tensor: &'a [f32], head_dim: usize, mut each: impl FnMut(usize, usize, &[f32], &'a [f32])) {
        for (token, vector) in tensor.chunks_exact(head_dim).enumerate() {
            let first = self.positions.partition_point(|&position| position < token);
            for row in first..self.positions.len() {
                each(row, token, &self.queries[row * head_dim..(row + 1) * head_dim], vector);
            }
        }
    }
}

/// Softmax in place; returns the logarithm of the sum of the exponentials.
pub(super) fn softmax(logits: &mut [f32]) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut total = 0.0;
    for logit in &mut *logits {
        *logit = (*logit - largest).exp();
        total += f64::from(*logit);
    }
    let norm = (1.0 / total) as f32;
    logits.iter_mut().for_each(|weight| *weight *= norm);
    f64::from(largest) + total.ln()
}

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, b) = (a.chunks_exact(16), b.chunks_exact(16));
    let rest: f32 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x * y).sum();
    let mut lanes = [0f32; 16];
    for (a, b) in a.zip(b) {
        for ((lane, x), y) in lanes.iter_mut().zip(a).zip(b) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + rest
}
