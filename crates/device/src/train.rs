use crate::{Device, DeviceError};
use dibit_cache::CacheLayout;
use std::ops::Range;

/// Where a matrix lies in a buffer: number `(i, j)` is number `offset + i * row + j * column`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Number `(0, 0)`.
    pub offset: usize,
    /// From one row to the next.
    pub row: usize,
    /// From one column to the next.
    pub column: usize,
}

impl Place {
    /// A row-major matrix with rows of `row` numbers, or a part of one.
    pub const fn rows(offset: usize, row: usize) -> Self {
        Place { offset, row, column: 1 }
    }

    /// The same matrix with rows and columns exchanged.
    pub const fn transposed(self) -> Self {
        Place { offset: self.offset, row: self.column, column: self.row }
    }
}

/// Numbers of a row in [`Train::row_loss`]'s statistics.
pub const ROW_STATISTICS: usize = 6;

/// What a row of [`Train::row_loss`]'s statistics holds, by place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowStatistic {
    /// Cross-entropy of the corrected row under the exact one: the loss.
    CrossEntropy,
    /// Kullback-Leibler divergence of the corrected row from the exact one.
    Divergence,
    /// The same without a correction.
    Uncorrected,
    /// One over the sum of the corrected row's weights.
    Inverse,
    /// Mean squared error of the output; written by [`Train::output_loss`].
    Output,
    /// Derivative of the loss by the gate; written by [`Train::features_backward`].
    Gate,
}

/// Attention rows of one KV head, and what each sees.
///
/// Row `i` belongs to the query of place `i % visible.len()`: the rows of a query head follow each other, then those of
/// the next one.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Query heads.
    pub heads: usize,
    /// Keys that each query sees, its own included.
    pub visible: &'a [u32],
    /// How many of them, the first ones, are packed; no more than it sees.
    pub packed: &'a [u32],
    /// How many of those, the first ones, are kept exactly, and have no correction.
    pub exact: usize,
    /// Numbers from one row to the next, in all matrices of rows and keys.
    pub stride: usize,
}

impl Rows<'_> {
    /// Rows of all query heads.
    pub fn count(&self) -> usize {
        self.heads * self.visible.len()
    }
}

/// A step of Adam (Kingma and Ba, algorithm 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamStep {
    /// Learning rate.
    pub rate: f32,
    /// Decay of the mean of gradients and of the mean of their squares.
    pub betas: [f32; 2],
    /// Added to the root of the latter.
    pub epsilon: f32,
    /// What gradients are multiplied by first.
    pub scale: f32,
    /// `1 - beta^t` for both decays, at step `t` from 1 on.
    pub corrections: [f32; 2],
}

/// What training the adapters of a linear correction takes, beside the operations of a model.
///
/// The same conventions as for [`crate::Memory`] hold: numbers of f32 precision, shapes in numbers, panics on buffers that are
/// too short. Sums have one order, whatever the number of threads.
pub trait Train: Device {
    /// `out <- scale a b`, or `out <- out + scale a b` with `add`, for `a` of `[m, k]`, `b` of `[k, n]` and `out` of
    /// `[m, n]`; `shape` is `[m, n, k]`. The columns of `out` lie side by side.
    fn product(
        &self,
        shape: [usize; 3],
        scale: f32,
        a: (&Self::Buffer, Place),
        b: (&Self::Buffer, Place),
        out: (&mut Self::Buffer, Place),
        add: bool,
    );

    /// Sets numbers to zero.
    fn clear(&self, x: &mut Self::Buffer, range: Range<usize>);

    /// Overwrites `x[offset ..]` with these numbers.
    fn write(&self, x: &mut Self::Buffer, offset: usize, values: &[f32]);

    /// Turns rows `rows` of `x`, of `2 * half` numbers, into features: `gate softmax` of each half.
    fn features(&self, x: &mut Self::Buffer, rows: Range<usize>, half: usize, gate: f32);

    /// The way back: `dy`, derivatives of the loss by the features `y`, becomes those by what [`Train::features`] was
    /// given. With `statistics`, place [`RowStatistic::Gate`] of the same rows becomes the derivative by the gate.
    #[allow(clippy::too_many_arguments)]
    fn features_backward(
        &self,
        y: &Self::Buffer,
        dy: &mut Self::Buffer,
        rows: Range<usize>,
        half: usize,
        gate: f32,
        statistics: Option<&mut Self::Buffer>,
        first_statistic: usize,
    );

    /// The loss of attention rows under the linear correction, and its derivative.
    ///
    /// With the logits `l` of the exact keys and `l'` of what the cache holds, the largest `m` of a row's `l'`, and the
    /// correction `C`, 0 but for packed keys that are not kept exactly: `a = exp(l' - m) + C`, `A' = a / sum a`,
    /// `A = softmax(l)`, loss `- sum A ln max(A', 1e-12)` (KVLinC, section 3.2: the correction counts in the frame of
    /// the largest logit).
    ///
    /// - `exact`: `l`, `[rows][stride]`. Overwritten.
    /// - `missed`: `l - l'` for packed keys, `[rows][stride]`. Overwritten.
    /// - `correction`: `C` for packed keys, `[rows][stride]`; becomes the derivative of the row's loss by it, which is 0
    ///   for packed keys of other rows than its own and for those that are kept exactly.
    /// - `statistics`: a row of [`ROW_STATISTICS`] for each, from row `first_statistic` on.
    ///
    /// With `outputs`, `exact` becomes `A' - A` and `missed` becomes `A'`, with zeros for keys that a row does not see,
    /// for [`Train::output_loss`].
    #[allow(clippy::too_many_arguments)]
    fn row_loss(
        &self,
        rows: Rows,
        exact: &mut Self::Buffer,
        missed: &mut Self::Buffer,
        correction: &mut Self::Buffer,
        statistics: &mut Self::Buffer,
        first_statistic: usize,
        outputs: bool,
    );

    /// Adds the squared error of the output to the loss: `weight / width |(A' - A) V|^2` for each row.
    ///
    /// - `weights`: `A'` as [`Train::row_loss`] left it in `missed`.
    /// - `errors`: `(A' - A) V`, `[rows][width]`.
    /// - `toward`: `(A' - A) V V^T`, `[rows][stride]`.
    /// - `correction`: derivatives, to which those of this term are added.
    /// - `statistics`: place [`RowStatistic::Output`] becomes the squared error over `width`, without `weight`.
    #[allow(clippy::too_many_arguments)]
    fn output_loss(
        &self,
        rows: Rows,
        weight: f32,
        width: usize,
        weights: &Self::Buffer,
        errors: &Self::Buffer,
        toward: &Self::Buffer,
        correction: &mut Self::Buffer,
        statistics: &mut Self::Buffer,
        first_statistic: usize,
    );

    /// What the codes of keys miss, `out = k - k^`, in the frame of `k`: rows of `num_key_value_heads * head_dim`, the keys
    /// after RoPE of the first `rows` tokens of a sequence, rounded to the 16 bit in which a window holds them. It is zero
    /// for first tokens that the scheme keeps in 16 bit; other sinks are not looked for.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`].
    ///
    /// # Panics
    /// If `rows` is not a multiple of 128, or keys are stored before RoPE.
    fn missed_keys(
        &self,
        layout: &CacheLayout,
        layer: usize,
        k: &Self::Buffer,
        rows: usize,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// The sum of the squares of `x[range]`.
    fn sum_of_squares(&self, x: &Self::Buffer, range: Range<usize>) -> f64;

    /// A step of Adam on the first `len` numbers: `gradient` moves the means `first` and `second`, and those `x`.
    #[allow(clippy::too_many_arguments)]
    fn adam(
        &self,
        step: AdamStep,
        len: usize,
        gradient: &Self::Buffer,
        first: &mut Self::Buffer,
        second: &mut Self::Buffer,
        x: &mut Self::Buffer,
    );
}
