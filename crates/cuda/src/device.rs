//! The trait of devices on a GPU.

use crate::blas::Blas;
use crate::gpu::Gpu;
use crate::linear;
use crate::matrix::{Matrix, Stored};
use crate::memory::Memory;
use crate::rows;
use crate::store::CudaStore;
use crate::timing::{self, CudaSweep};
use crate::train::Scratch;
use crate::{CudaError, attention};
use dibit_cache::{CacheLayout, Extras};
use dibit_device::{
    Batch, Budget, Device, DeviceError, DeviceMemory, Heads, Norm, Output, Phase, Projection, Sweep, Tensor,
};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// An NVIDIA GPU.
///
/// Operations that cannot return an error leave it to whoever waits next, so use a `Cuda` from one thread at a time where it
/// matters whose failure it was.
pub struct Cuda {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) blas: Blas,
    pub(crate) scratch: Scratch,
    /// Whether passes of single tokens are recorded and done again.
    pub(crate) records: bool,
    /// Whether attention computes in f32.
    exact: AtomicBool,
}

/// Activations on a GPU.
pub struct Buffer {
    pub(crate) memory: Memory,
    pub(crate) len: usize,
}

/// Ids on a GPU.
pub struct Ids {
    pub(crate) memory: Memory,
}

impl Cuda {
    /// GPU number `ordinal`, as the driver counts them.
    ///
    /// # Errors
    /// [`CudaError`] says what is missing.
    pub fn new(ordinal: usize) -> Result<Self, CudaError> {
        let gpu = Gpu::new(ordinal)?;
        let blas = Blas::new(&gpu)?;
        let cuda = Cuda { gpu, blas, scratch: Scratch::default(), records: true, exact: AtomicBool::new(false) };
        // What cannot be compiled is said now, and not in the middle of a pass.
        rows::check(&cuda)?;
        Ok(cuda)
    }

    /// Computes attention in f32 from now on, whatever the weights are. A matrix of f32 does the same: what is asked to
    /// be exact is exact throughout.
    pub fn compute_exactly(&self) {
        self.exact.store(true, Ordering::Relaxed);
    }

    /// Whether attention computes in f32.
    pub(crate) fn is_exact(&self) -> bool {
        self.exact.load(Ordering::Relaxed)
    }

    /// The same, doing each pass anew, for tests.
    #[doc(hidden)]
    pub fn without_graphs(self) -> Self {
        Cuda { records: false, ..self }
    }

    /// Keeps a failure that an operation cannot return.
    pub(crate) fn keep(&self, result: Result<(), CudaError>) {
        if let Err(error) = result {
            self.gpu.fail(error);
        }
    }
}

impl Device for Cuda {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Store = CudaStore;
    type Ids = Ids;

    fn describe(&self) -> String {
        let limits = self.gpu.limits;
        let (major, minor) = (limits.capability / 10, limits.capability % 10);
        format!("{}, compute capability {major}.{minor}", self.gpu.name)
    }

    fn scope<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        pass()
    }

    fn buffer(&self, len: usize) -> Result<Buffer, DeviceError> {
        Ok(Buffer { memory: Memory::zeros(&self.gpu, "activations", len * size_of::<f32>())?, len })
    }

    fn upload(&self, values: &[f32]) -> Result<Buffer, DeviceError> {
        Ok(Buffer { memory: Memory::of(&self.gpu, "activations", values)?, len: values.len() })
    }

    fn download(&self, buffer: &Buffer, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), DeviceError> {
        out.clear();
        out.resize(range.len(), 0.0);
        Ok(buffer.memory.read(range.start * size_of::<f32>(), bytemuck::cast_slice_mut(out))?)
    }

    fn ids(&self, capacity: usize) -> Result<Ids, DeviceError> {
        Ok(Ids { memory: Memory::new(&self.gpu, "ids", capacity * size_of::<u32>())? })
    }

    fn write_ids(&self, ids: &mut Ids, values: &[u32]) {
        self.keep(ids.memory.write(0, bytemuck::cast_slice(values)));
    }

    fn budget(&self) -> Budget {
        Budget { tile_rows: 64..4096, tile_bytes: 512 << 20, pass_bytes: 512 << 20, pass_rows: 512 }
    }

    fn pass<E: From<DeviceError> + Send>(
        &self,
        store: &mut CudaStore,
        batch: &Batch,
        model: u64,
        pass: impl FnMut(&mut CudaStore) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        store.pass(self, batch, model, pass)
    }

    fn matrix(&self, tensor: Tensor) -> Result<Matrix, DeviceError> {
        let matrix = Matrix::new(&self.gpu, &tensor)?;
        if matrix.stored == Stored::F32 {
            self.compute_exactly();
        }
        Ok(matrix)
    }

    fn store(
        &self,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<CudaStore, DeviceError> {
        CudaStore::new(self, layout, num_blocks, num_sequences, max_rows)
    }

    fn layout<'a>(&self, store: &'a CudaStore) -> &'a CacheLayout {
        &store.layout
    }

    fn embed(&self, table: &Matrix, ids: &Ids, count: usize, out: &mut Buffer) {
        self.keep(rows::embed(self, table, ids, count, out));
    }

    fn copy_rows(&self, x: &Buffer, rows: &Ids, count: usize, width: usize, out: &mut Buffer) {
        self.keep(rows::copy_rows(self, x, rows, count, width, out));
    }

    fn rms_norm(&self, x: &Buffer, rows: Range<usize>, width: usize, weight: &Buffer, eps: f32, out: &mut Buffer) {
        self.keep(rows::rms_norm(self, x, rows, width, weight, eps, out));
    }

    fn rms_norm_inplace(&self, x: &mut Buffer, rows: usize, width: usize, weight: &Buffer, eps: f32) {
        self.keep(rows::rms_norm_inplace(self, x, rows, width, weight, eps));
    }

    fn linear(
        &self,
        phase: Phase,
        x: &Buffer,
        rows: usize,
        w: &Matrix,
        bias: Option<&Buffer>,
        out: &mut Buffer,
        output: Output,
    ) {
        self.keep(linear::linear(self, phase, x, rows, w, bias, out, output));
    }

    fn norm_linear<const N: usize>(
        &self,
        phase: Phase,
        x: &Buffer,
        rows: Range<usize>,
        width: usize,
        norm: Norm<Buffer>,
        normed: &mut Buffer,
        projections: [Projection<Self>; N],
    ) {
        self.keep(linear::norm_linear(self, phase, x, rows, width, norm, normed, projections));
    }

    fn place_heads<const N: usize>(
        &self,
        all: [Heads<Self>; N],
        eps: f32,
        head_dim: usize,
        table: &Buffer,
        rows: Range<usize>,
    ) {
        self.keep(rows::place_heads(self, all, eps, head_dim, table, rows));
    }

    fn rope_table(&self, inv_freq: &Buffer, half: usize, positions: &Ids, count: usize, out: &mut Buffer) {
        self.keep(rows::rope_table(self, inv_freq, half, positions, count, out));
    }

    fn rope(&self, x: &mut Buffer, heads: usize, head_dim: usize, table: &Buffer, rows: Range<usize>) {
        self.keep(rows::rope(self, x, heads, head_dim, table, rows));
    }

    fn silu_mul(&self, gate: &mut Buffer, up: &Buffer, len: usize) {
        self.keep(rows::silu_mul(self, gate, up, len));
    }

    fn observe(&self, store: &mut CudaStore, layer: usize, batch: &Batch, hidden: &Buffer, width: usize) {
        self.keep(store.observe(layer, batch, hidden, width));
    }

    fn extras(&self, store: &CudaStore, sequence: u32, len: usize) -> Extras {
        store.extras(sequence, len)
    }

    fn write_kv(
        &self,
        store: &mut CudaStore,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<(), DeviceError> {
        store.write(self, layer, batch, rows, k, v)
    }

    fn attention(
        &self,
        store: &mut CudaStore,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        num_heads: usize,
        q: &Buffer,
        out: &mut Buffer,
    ) -> Result<(), DeviceError> {
        attention::attention(self, store, layer, batch, rows, num_heads, q, out)
    }

    fn commit(&self, store: &mut CudaStore, layer: usize, batch: &Batch) -> Result<(), DeviceError> {
        store.commit(self, layer, batch)
    }

    fn missed_keys(
        &self,
        layout: &CacheLayout,
        layer: usize,
        k: &Buffer,
        rows: usize,
        out: &mut Buffer,
    ) -> Result<(), DeviceError> {
        crate::store::missed_keys(layout, layer, k, rows, out)
    }

    fn synchronize(&self) {
        self.keep(self.gpu.synchronize());
    }

    fn timed<R: Send>(&self, work: impl FnOnce() -> R + Send) -> (R, Duration) {
        timing::timed(&self.gpu, work)
    }

    fn memory(&self) -> Option<DeviceMemory> {
        let (free, total) = self.gpu.memory().ok()?;
        Some(DeviceMemory { free, total })
    }

    fn argmax_rows(&self, x: &Buffer, rows: usize, width: usize) -> Result<Vec<Option<u32>>, DeviceError> {
        Ok(rows::argmax_rows(self, x, rows, width)?)
    }

    fn sweep(&self, bytes: usize) -> Result<Box<dyn Sweep>, DeviceError> {
        Ok(Box::new(CudaSweep::new(&self.gpu, bytes)?))
    }
}
