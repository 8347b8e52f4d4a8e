use crate::{DeviceError, Memory, Tensor};
use dibit_cache::Phase;
use std::ops::Range;

/// A root mean square normalisation: its weight, and what is added to the mean square.
#[derive(Debug)]
pub struct Norm<'a, B> {
    /// One number for each channel.
    pub weight: &'a B,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// A linear layer on its way to one output: its weight, its bias, and the buffer that [`Dense::linear`] writes.
pub struct Projection<'a, D: Dense + ?Sized> {
    /// `[out, in]`
    pub weight: &'a D::Matrix,
    /// One number for each output.
    pub bias: Option<&'a D::Buffer>,
    /// Overwritten from row 0 on.
    pub out: &'a mut D::Buffer,
}

/// Heads of some rows on their way to attention: `[row][heads][head_dim]`.
pub struct Heads<'a, D: Dense + ?Sized> {
    /// Changed in place.
    pub x: &'a mut D::Buffer,
    /// Heads of a row.
    pub heads: usize,
    /// The norm of each head, where the model has one (Qwen3).
    pub norm: Option<&'a D::Buffer>,
}

/// Where the result of [`Dense::linear`] goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Overwrites the rows from this one on.
    Write(usize),
    /// Adds to the rows from this one on (a residual connection).
    Add(usize),
}

/// What becomes of the gate of a gated layer, and how it meets the other half.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) up`
    Silu,
    /// `gelu(gate) up`, by the tanh of a polynomial.
    GeluTanh,
    /// `gelu(gate) up`, by the error function.
    Gelu,
    /// gpt-oss: `g sigmoid(1.702 g) (u + 1)`, `g` being the gate up to the limit, `u` the other half within it on both sides.
    Clamped {
        /// The limit.
        limit: f32,
    },
}

/// The operations that a model is made of, but for its cache.
pub trait Dense: Memory {
    /// A weight matrix `[out, in]`; clones share the numbers.
    type Matrix: Send + Sync + Clone;

    /// A weight matrix.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn matrix(&self, tensor: Tensor) -> Result<Self::Matrix, DeviceError>;

    /// `out[i] = scale table[ids[i]]` for the first `count` ids, rows of the table's width.
    fn embed(&self, table: &Self::Matrix, ids: &Self::Ids, count: usize, scale: f32, out: &mut Self::Buffer);

    /// `out[i] = x[rows[i]]` for the first `count` rows, rows of `width` numbers.
    fn copy_rows(&self, x: &Self::Buffer, rows: &Self::Ids, count: usize, width: usize, out: &mut Self::Buffer);

    /// Root mean square normalisation of the rows `rows` of `x`, of `width` numbers each: `x / sqrt(mean(x^2) + eps) * weight`.
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        rows: Range<usize>,
        width: usize,
        norm: Norm<Self::Buffer>,
        out: &mut Self::Buffer,
        output: Output,
    );

    /// [`Dense::rms_norm`] in place, on the first `rows` rows of `width` numbers: norms of q and k,
    /// a row being a head (Qwen3) or all heads of a token (OLMo 2).
    fn rms_norm_inplace(&self, x: &mut Self::Buffer, rows: usize, width: usize, weight: &Self::Buffer, eps: f32);

    /// `x w^T + bias` for the rows `rows` of `x`.
    #[allow(clippy::too_many_arguments)]
    fn linear(
        &self,
        phase: Phase,
        x: &Self::Buffer,
        rows: Range<usize>,
        w: &Self::Matrix,
        bias: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
        output: Output,
    );

    /// [`Dense::rms_norm`] of rows `rows` of `x` into `normed`, where there is a norm, and [`Dense::linear`] of that for each
    /// of the projections. What `normed` holds afterwards is not said.
    #[allow(clippy::too_many_arguments)]
    fn norm_linear<const N: usize>(
        &self,
        phase: Phase,
        x: &Self::Buffer,
        rows: Range<usize>,
        width: usize,
        norm: Option<Norm<Self::Buffer>>,
        normed: &mut Self::Buffer,
        projections: [Projection<Self>; N],
    ) {
        let (x, rows) = match norm {
            None => (x, rows),
            Some(norm) => {
                let count = rows.len();
                self.rms_norm(x, rows, width, norm, normed, Output::Write(0));
                (&*normed, 0..count)
            }
        };
        for Projection { weight, bias, out } in projections {
            self.linear(phase, x, rows.clone(), weight, bias, out, Output::Write(0));
        }
    }

    /// [`Dense::rms_norm_inplace`] of each head, where it has a norm, and [`Dense::rope`].
    fn place_heads<const N: usize>(
        &self,
        all: [Heads<Self>; N],
        eps: f32,
        head_dim: usize,
        table: &Self::Buffer,
        rows: Range<usize>,
    ) {
        for Heads { x, heads, norm } in all {
            if let Some(norm) = norm {
                self.rms_norm_inplace(x, rows.len() * heads, head_dim, norm, eps);
            }
            self.rope(x, heads, head_dim, table, rows.clone());
        }
    }

    /// Cosines and sines of rotary positions: row `i` of `out` is `half` cosines, then as many sines, of `positions[i]` times
    /// the frequency of each pair of channels, both times the pair's magnitude, for the first `count` positions. `turns`
    /// holds `half` frequencies, then as many magnitudes.
    fn rope_table(
        &self,
        turns: &Self::Buffer,
        half: usize,
        positions: &Self::Ids,
        count: usize,
        out: &mut Self::Buffer,
    );

    /// Rotates the heads of `rows.len()` rows of `x` in place by the rows `rows` of a [`Dense::rope_table`]:
    /// channel `c` pairs with `c + head_dim / 2`.
    fn rope(&self, x: &mut Self::Buffer, heads: usize, head_dim: usize, table: &Self::Buffer, rows: Range<usize>);

    /// `gate <-` the activation of `gate` and `up`, for the first `len` numbers.
    fn activate(&self, activation: Activation, gate: &mut Self::Buffer, up: &Self::Buffer, len: usize);

    /// The place of the largest number of each of the first `rows` rows of `width` numbers, the first of equals; `None`
    /// for a row of which not all numbers are finite.
    ///
    /// # Errors
    /// Those of [`Memory::download`].
    fn argmax_rows(&self, x: &Self::Buffer, rows: usize, width: usize) -> Result<Vec<Option<u32>>, DeviceError> {
        let mut values = Vec::new();
        self.download(x, 0..rows * width, &mut values)?;
        Ok(values.chunks_exact(width).map(largest).collect())
    }
}

/// The place of the largest number, the first of equals; `None` where not all are finite.
fn largest(row: &[f32]) -> Option<u32> {
    let better = |best: usize, (at, value): (usize, &f32)| if *value > row[best] { at } else { best };
    row.iter().all(|value| value.is_finite()).then(|| row.iter().enumerate().fold(0, better) as u32)
}
