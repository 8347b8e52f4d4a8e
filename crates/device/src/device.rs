use crate::{Batch, Budget, DeviceError, Phase, Tensor};
use dibit_cache::{CacheLayout, Extras};
use std::ops::Range;
use std::time::{Duration, Instant};

/// A root mean square normalisation: its weight, and what is added to the mean square.
#[derive(Debug)]
pub struct Norm<'a, B> {
    /// One number for each channel.
    pub weight: &'a B,
    /// Added to the mean of squares.
    pub eps: f32,
}

/// A linear layer on its way to one output: its weight, its bias, and the buffer that [`Device::linear`] writes.
pub struct Projection<'a, D: Device + ?Sized> {
    /// `[out, in]`
    pub weight: &'a D::Matrix,
    /// One number for each output.
    pub bias: Option<&'a D::Buffer>,
    /// Overwritten from row 0 on.
    pub out: &'a mut D::Buffer,
}

/// Heads of some rows on their way to attention: `[row][heads][head_dim]`.
pub struct Heads<'a, D: Device + ?Sized> {
    /// Changed in place.
    pub x: &'a mut D::Buffer,
    /// Heads of a row.
    pub heads: usize,
    /// The norm of each head, where the model has one (Qwen3).
    pub norm: Option<&'a D::Buffer>,
}

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
    /// Token ids, positions or row numbers.
    type Ids: Send + Sync;

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

    /// Copies `buffer[range]` to the host, once everything that was asked for before is done.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] where any of that failed.
    fn download(&self, buffer: &Self::Buffer, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), DeviceError>;

    /// Room for `capacity` ids.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn ids(&self, capacity: usize) -> Result<Self::Ids, DeviceError>;

    /// Overwrites the first ids.
    fn write_ids(&self, ids: &mut Self::Ids, values: &[u32]);

    /// What passes on this device may take.
    fn budget(&self) -> Budget {
        Budget::HOST
    }

    /// Runs the operations of a forward pass of a batch. A device may keep what it did and do the same again for a
    /// later batch of the same shape, without asking: so `pass` does nothing but call operations, with the same buffers
    /// each time, of one model and one workspace, which `model` tells from others; what changes from batch to batch is in `batch` and in
    /// [`Device::Ids`]. It is called again where what it did could not be kept, and has not been done.
    ///
    /// # Errors
    /// Those of the operations.
    fn pass<E: From<DeviceError> + Send>(
        &self,
        store: &mut Self::Store,
        batch: &Batch,
        model: u64,
        pass: impl FnMut(&mut Self::Store) -> Result<(), E> + Send,
    ) -> Result<(), E>;

    /// A weight matrix.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn matrix(&self, tensor: Tensor) -> Result<Self::Matrix, DeviceError>;

    /// Storage of a cache of `num_blocks` blocks and `num_sequences` sequences, for passes of up to
    /// `max_rows` rows. A CPU takes memory as blocks are first written, a GPU at once.
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

    /// What a store was made for.
    fn layout<'a>(&self, store: &'a Self::Store) -> &'a CacheLayout;

    /// `out[i] = table[ids[i]]` for the first `count` ids, rows of the table's width.
    fn embed(&self, table: &Self::Matrix, ids: &Self::Ids, count: usize, out: &mut Self::Buffer);

    /// `out[i] = x[rows[i]]` for the first `count` rows, rows of `width` numbers.
    fn copy_rows(&self, x: &Self::Buffer, rows: &Self::Ids, count: usize, width: usize, out: &mut Self::Buffer);

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

    /// [`Device::rms_norm`] of rows `rows` of `x` into `normed`, and [`Device::linear`] of that for each of the
    /// projections. What `normed` holds afterwards is not said.
    #[allow(clippy::too_many_arguments)]
    fn norm_linear<const N: usize>(
        &self,
        phase: Phase,
        x: &Self::Buffer,
        rows: Range<usize>,
        width: usize,
        norm: Norm<Self::Buffer>,
        normed: &mut Self::Buffer,
        projections: [Projection<Self>; N],
    ) {
        let count = rows.len();
        self.rms_norm(x, rows, width, norm.weight, norm.eps, normed);
        for Projection { weight, bias, out } in projections {
            self.linear(phase, normed, count, weight, bias, out, Output::Write(0));
        }
    }

    /// [`Device::rms_norm_inplace`] of each head, where it has a norm, and [`Device::rope`].
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

    /// Cosines and sines of rotary positions: row `i` of `out` is `head_dim / 2` cosines, then as many sines,
    /// of `positions[i] * inv_freq`, for the first `count` positions. `inv_freq` holds `head_dim / 2` numbers.
    fn rope_table(
        &self,
        inv_freq: &Self::Buffer,
        half: usize,
        positions: &Self::Ids,
        count: usize,
        out: &mut Self::Buffer,
    );

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
    /// values that [`Device::write_kv`] got. In [`crate::Mode::Streaming`] every row is stored by [`Device::commit`]'s rules
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

    // What measuring takes.

    /// Threads of the host that operations run on; 0 where they run elsewhere.
    fn threads(&self) -> usize {
        0
    }

    /// Waits until everything that was asked for is done. [`Device::download`] does so too.
    fn synchronize(&self) {}

    /// How long `work` takes, to its end on the device.
    fn timed<R: Send>(&self, work: impl FnOnce() -> R + Send) -> (R, Duration) {
        self.synchronize();
        let start = Instant::now();
        let result = work();
        self.synchronize();
        (result, start.elapsed())
    }

    /// Memory of the device, where it has some of its own.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }

    /// Memory of this size, to be read from one end to the other.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn sweep(&self, bytes: usize) -> Result<Box<dyn Sweep>, DeviceError>;

    /// The place of the largest number of each of the first `rows` rows of `width` numbers, the first of equals; `None`
    /// for a row of which not all numbers are finite.
    ///
    /// # Errors
    /// Those of [`Device::download`].
    fn argmax_rows(&self, x: &Self::Buffer, rows: usize, width: usize) -> Result<Vec<Option<u32>>, DeviceError> {
        let mut values = Vec::new();
        self.download(x, 0..rows * width, &mut values)?;
        Ok(values.chunks_exact(width).map(largest).collect())
    }
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What can still be had.
    pub free: usize,
    /// All of it, what others use included.
    pub total: usize,
}

/// Memory that is read from one end to the other: how fast that is, and a way to empty caches. On the CPU it is read by
/// the threads of the [`Device::scope`] that it is called in.
pub trait Sweep: Send + Sync {
    /// Its size.
    fn bytes(&self) -> usize;

    /// Reads all of it once, and says how long that took.
    fn read(&self) -> Duration;
}

impl Sweep for dibit_timing::Sweep {
    fn bytes(&self) -> usize {
        self.bytes()
    }

    fn read(&self) -> Duration {
        self.read()
    }
}

/// The place of the largest number, the first of equals; `None` where not all are finite.
fn largest(row: &[f32]) -> Option<u32> {
    let better = |best: usize, (at, value): (usize, &f32)| if *value > row[best] { at } else { best };
    row.iter().all(|value| value.is_finite()).then(|| row.iter().enumerate().fold(0, better) as u32)
}
