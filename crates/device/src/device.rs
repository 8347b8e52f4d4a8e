use crate::{Batch, DeviceError, Phase, Tensor};
use dibit_cache::{CacheLayout, Extras};
use std::ops::Range;

/// Where the result of [`Device::linear`] goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Overwrites the rows from this one on.
    Write(usize),
    /// Adds to the rows from this one on (a residual connection).
    Add(usize),
}

/// A machine that a model runs on.
///
/// Activations are row-major matrices of f32 precision in [`Device::Buffer`]s, allocated once and reused.
/// All shapes are in numbers, not bytes. Operations panic on buffers that are too short: their shapes
/// follow from a validated model configuration, so this is a defect of the caller and not an input error.
pub trait Device: Send + Sync {
    /// Activations.
    type Buffer: Send + Sync;
    /// A weight matrix `[out, in]`; clones share the numbers.
    type Matrix: Send + Sync + Clone;
    /// The bytes of a cache: pages, window rings and the keys and values of the pass in flight.
    type Store: Send;

    /// The device in words.
    fn describe(&self) -> String;

    /// Runs a whole forward pass. Operations may be called outside of it, but start more slowly there.
    fn scope<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn buffer(&self, len: usize) -> Result<Self::Buffer, DeviceError>;

    /// A buffer of these numbers.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn upload(&self, values: &[f32]) -> Result<Self::Buffer, DeviceError>;

    /// Copies `buffer[range]` to the host.
    fn download(&self, buffer: &Self::Buffer, range: Range<usize>, out: &mut Vec<f32>);

    /// A weight matrix.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn matrix(&self, tensor: Tensor) -> Result<Self::Matrix, DeviceError>;

    /// Storage of a cache of `num_blocks` blocks and `num_sequences` sequences, for passes of up to
    /// `max_rows` rows. Memory is taken as blocks are first written.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`]; [`DeviceError::Tables`] where the layout's transforms need tables that it lacks.
    fn store(
        &self,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self::Store, DeviceError>;

    /// `out[i] = table[ids[i]]`, rows of the table's width.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], out: &mut Self::Buffer);

    /// `out[i] = x[rows[i]]`, rows of `width` numbers.
    fn copy_rows(&self, x: &Self::Buffer, rows: &[usize], width: usize, out: &mut Self::Buffer);

    /// Root mean square normalisation of `rows` rows of `width` numbers from row `first` of `x`, into the
    /// first rows of `out`: `x / sqrt(mean(x^2) + eps) * weight`.
    fn rms_norm(
        &self,
        x: &Self::Buffer,
        rows: Range<usize>,
        width: usize,
        weight: &Self::Buffer,
        eps: f32,
        out: &mut Self::Buffer,
    );

    /// [`Device::rms_norm`] in place, on the first `rows` rows of `width` numbers: the q/k-norm of Qwen3,
    /// a row being a head.
    fn rms_norm_inplace(&self, x: &mut Self::Buffer, rows: usize, width: usize, weight: &Self::Buffer, eps: f32);

    /// `x w^T + bias` for the first `rows` rows of `x`.
    #[allow(clippy::too_many_arguments)]
    fn linear(
        &self,
        phase: Phase,
        x: &Self::Buffer,
        rows: usize,
        w: &Self::Matrix,
        bias: Option<&Self::Buffer>,
        out: &mut Self::Buffer,
        output: Output,
    );

    /// Cosines and sines of rotary positions: row `i` of `out` is `head_dim / 2` cosines, then as many sines,
    /// of `positions[i] * inv_freq`.
    fn rope_table(&self, inv_freq: &[f32], positions: &[u32], out: &mut Self::Buffer);

    /// Rotates the heads of `rows.len()` rows of `x` in place by the rows `rows` of a [`Device::rope_table`]:
    /// channel `c` pairs with `c + head_dim / 2`.
    fn rope(&self, x: &mut Self::Buffer, heads: usize, head_dim: usize, table: &Self::Buffer, rows: Range<usize>);

    /// `gate <- silu(gate) * up` for the first `len` numbers.
    fn silu_mul(&self, gate: &mut Self::Buffer, up: &Self::Buffer, len: usize);

    /// Shows the residual stream that enters a layer, a row of `width` numbers for each row of the batch, to schemes
    /// that choose by it which tokens of a prompt they protect. Comes before [`Device::write_kv`], for every layer of a
    /// pass in their order: what layer 0 sees makes forget what the pass before found.
    fn observe(&self, store: &mut Self::Store, layer: usize, batch: &Batch, hidden: &Self::Buffer, width: usize);

    /// What a sequence, by its slot, holds beside pages and window once it has `len` tokens.
    fn extras(&self, store: &Self::Store, sequence: u32, len: usize) -> Extras;

    /// Keeps the keys and values of rows `rows` of the batch as the pass in flight, which sees them exactly;
    /// fp16 must be able to hold them, for that is what the window stores.
    /// `k` and `v` hold `rows.len()` rows of `num_key_value_heads * head_dim`; keys are post-RoPE.
    ///
    /// # Errors
    /// [`DeviceError::NotFinite`].
    fn write_kv(
        &self,
        store: &mut Self::Store,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Self::Buffer,
        v: &Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Causal attention of rows `rows` of the batch over packed pages, windows and the pass in flight.
    /// `q` and `out` hold `rows.len()` rows of `num_heads * head_dim`. The output is in the frame of the
    /// stored values. In [`crate::Mode::Streaming`] every row is stored by [`Device::commit`]'s rules
    /// before the next one attends.
    ///
    /// # Errors
    /// In streaming mode those of [`Device::commit`].
    #[allow(clippy::too_many_arguments)]
    fn attention(
        &self,
        store: &mut Self::Store,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        num_heads: usize,
        q: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<(), DeviceError>;

    /// Stores the keys and values of the pass in flight behind those of each sequence, and quantises the
    /// groups that leave the window.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`].
    fn commit(&self, store: &mut Self::Store, layer: usize, batch: &Batch) -> Result<(), DeviceError>;

    /// What the codes of keys miss, `out = k - k^`, in the frame of `k`: rows of `num_key_value_heads * head_dim`, the keys
    /// after RoPE of the first `rows` tokens of a sequence, rounded to the 16 bit in which a window holds them. It is zero
    /// for first tokens that the scheme keeps in 16 bit; other sinks are not looked for.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`]; [`DeviceError::Tables`] as of [`Device::store`].
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
}
