//! The traits of a device on a GPU.

use crate::blas::Blas;
use crate::cuda::{Buffer, Cuda, Ids};
use crate::experts::{self, ChosenExperts, ExpertStack};
use crate::gpu::Gpu;
use crate::linear;
use crate::matrix::Matrix;
use crate::memory::Memory;
use crate::partial_sums::PartialSums;
use crate::rows;
use crate::store::{CudaStore, Kernels, Layer, Recording};
use crate::timing::{self, CudaSweep};
use crate::{CudaError, attention};
use dibit_cache::{Batch, CacheLayout, Phase, Powers, Span};
use dibit_device::{
    Activation, Attention, Budget, Dense, DeviceError, DeviceMemory, Experts, Heads, KvStorage, Measure, Norm, Output,
    Projection, Routing, Sweep, Tensor,
};
use std::ops::Range;
use std::time::Duration;

/// A cache on a GPU, with the kernels of its attention.
pub struct CudaCache {
    store: CudaStore,
    attention: attention::Kernels,
}

impl CudaCache {
    /// Passes that have been recorded, for tests.
    #[doc(hidden)]
    pub fn recorded(&self) -> usize {
        self.store.recorded()
    }

    /// Bytes of a page, for tests.
    #[doc(hidden)]
    pub fn page_bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8> {
        self.store.page_bytes(class, block, layer, kv_head)
    }
}

impl Cuda {
    /// GPU number `ordinal`, as the driver counts them.
    ///
    /// # Errors
    /// [`CudaError`] says what is missing.
    pub fn new(ordinal: usize) -> Result<Self, CudaError> {
        let gpu = Gpu::new(ordinal)?;
        let blas = Blas::new(&gpu)?;
        let cuda = Cuda { gpu, blas, partial_sums: PartialSums::default(), records: true };
        // What cannot be compiled is said now, and not in the middle of a pass.
        rows::check(&cuda)?;
        Ok(cuda)
    }
}

impl dibit_device::Memory for Cuda {
    type Buffer = Buffer;
    type Ids = Ids;

    fn describe(&self) -> String {
        let limits = self.gpu.limits;
        let (major, minor) = (limits.capability / 10, limits.capability % 10);
        format!("{}, compute capability {major}.{minor}", self.gpu.name)
    }

    fn budget(&self) -> Budget {
        Budget {
            tile_rows: 64..4096,
            tile_bytes: 512 << 20,
            cell: 1024,
            // cuBLASLt takes another kernel for another number of rows.
            prefill_rows: 0,
        }
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

    fn memory(&self) -> Option<DeviceMemory> {
        let (free, total) = self.gpu.memory().ok()?;
        Some(DeviceMemory { free, total })
    }

    fn write_ids(&self, ids: &mut Ids, values: &[u32]) {
        self.keep(ids.memory.write(0, bytemuck::cast_slice(values)));
    }
}

impl Dense for Cuda {
    type Matrix = Matrix;

    fn matrix(&self, tensor: Tensor) -> Result<Matrix, DeviceError> {
        Ok(Matrix::new(&self.gpu, &tensor)?)
    }

    fn embed(&self, table: &Matrix, ids: &Ids, count: usize, scale: f32, out: &mut Buffer) {
        self.keep(rows::embed(self, table, ids, count, scale, out));
    }

    fn copy_rows(&self, x: &Buffer, rows: &Ids, count: usize, width: usize, out: &mut Buffer) {
        self.keep(rows::copy_rows(self, x, rows, count, width, out));
    }

    fn rms_norm(
        &self,
        x: &Buffer,
        rows: Range<usize>,
        width: usize,
        norm: Norm<Buffer>,
        out: &mut Buffer,
        output: Output,
    ) {
        self.keep(rows::rms_norm(self, x, rows, width, norm, out, output));
    }

    fn rms_norm_inplace(&self, x: &mut Buffer, rows: usize, width: usize, weight: &Buffer, eps: f32) {
        self.keep(rows::rms_norm_inplace(self, x, rows, width, weight, eps));
    }

    fn linear(
        &self,
        phase: Phase,
        x: &Buffer,
        rows: Range<usize>,
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
        norm: Option<Norm<Buffer>>,
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

    fn rope_table(&self, turns: &Buffer, half: usize, positions: &Ids, count: usize, out: &mut Buffer) {
        self.keep(rows::rope_table(self, turns, half, positions, count, out));
    }

    fn rope(&self, x: &mut Buffer, heads: usize, head_dim: usize, table: &Buffer, rows: Range<usize>) {
        self.keep(rows::rope(self, x, heads, head_dim, table, rows));
    }

    fn activate(&self, activation: Activation, gate: &mut Buffer, up: &Buffer, len: usize) {
        self.keep(rows::activate(self, activation, gate, up, len));
    }

    fn argmax_rows(&self, x: &Buffer, rows: usize, width: usize) -> Result<Vec<Option<u32>>, DeviceError> {
        Ok(rows::argmax_rows(self, x, rows, width)?)
    }
}

impl Experts for Cuda {
    type Stack = ExpertStack;
    type Chosen = ChosenExperts;

    fn stack(&self, matrices: Vec<Tensor>, bias: Option<Tensor>) -> Result<ExpertStack, DeviceError> {
        Ok(experts::stack(self, matrices, bias)?)
    }

    fn chosen(&self, routing: Routing, rows: usize) -> Result<ChosenExperts, DeviceError> {
        Ok(experts::chosen(self, routing, rows)?)
    }

    fn choose(&self, routing: Routing, logits: &Buffer, rows: usize, out: &mut ChosenExperts) {
        self.keep(experts::choose(self, routing, logits, rows, out));
    }

    fn expert_linear(
        &self,
        _: Phase,
        x: &Buffer,
        of_pairs: bool,
        chosen: &mut ChosenExperts,
        stack: &ExpertStack,
        out: &mut Buffer,
    ) {
        self.keep(experts::expert_linear(self, x, of_pairs, chosen, stack, out));
    }

    fn add_experts(&self, x: &Buffer, chosen: &ChosenExperts, width: usize, out: &mut Buffer, first: usize) {
        self.keep(experts::add_experts(self, x, chosen, width, out, first));
    }
}

/// KV heads that kernels can name in what they note.
const MOST_KV_HEADS: usize = 256;

impl KvStorage for Cuda {
    type Store = CudaCache;

    fn new_store(
        &self,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<CudaCache, DeviceError> {
        let heads = layout.shape.num_key_value_heads;
        if heads > MOST_KV_HEADS {
            return Err(DeviceError::Unsupported(format!(
                "{heads} KV heads, and a GPU takes {MOST_KV_HEADS} at most; take --device cpu"
            )));
        }
        let kernels = Kernels::new(&self.gpu, layout.shape.head_dim)?;
        let layer = |index| Layer::new(&self.gpu, layout, index, num_blocks);
        let layers = (0..layout.layers.len()).map(layer).collect::<Result<Vec<_>, DeviceError>>()?;
        let most_shared = kernels.attend_exact.most_shared;
        let attention = attention::Kernels::new(&self.gpu, layout, &layers, most_shared)?;
        let store = CudaStore::new(self, layout, kernels, layers, num_blocks, num_sequences, max_rows)?;
        Ok(CudaCache { store, attention })
    }

    fn set_sinks(&self, cache: &mut CudaCache, layer: usize, slot: u32, positions: &[u32]) -> Result<(), DeviceError> {
        Ok(cache.store.set_sinks(layer, slot as usize, positions)?)
    }

    fn set_powers(&self, cache: &mut CudaCache, layer: usize, powers: &Powers) -> Result<(), DeviceError> {
        Ok(cache.store.set_powers(self, layer, powers)?)
    }

    fn place(&self, cache: &mut CudaCache, spans: &[Span], appends: bool) -> Result<(), DeviceError> {
        cache.store.place(spans, appends)
    }

    fn stage_kv(
        &self,
        cache: &mut CudaCache,
        layer: usize,
        _: &Batch,
        rows: Range<usize>,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<(), DeviceError> {
        cache.store.stage_kv(self, layer, rows, k, v);
        Ok(())
    }

    fn attend(
        &self,
        cache: &mut CudaCache,
        attention: Attention<Buffer>,
        q: &Buffer,
        out: &mut Buffer,
    ) -> Result<(), DeviceError> {
        attention::attend(self, &mut cache.store, &mut cache.attention, attention, q, out)
    }

    fn append(&self, cache: &mut CudaCache, layer: usize, spans: &[Span]) -> Result<(), DeviceError> {
        cache.store.append(self, layer, spans)
    }

    fn record<E: From<DeviceError> + Send>(
        &self,
        cache: &mut CudaCache,
        mut work: impl FnMut(&mut CudaCache) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        let Some(recording) = cache.store.recording(self) else { return work(cache) };
        let Recording { mut graphs, shape, addresses } = recording;
        let result = graphs.run(&self.gpu, shape, addresses, || work(cache));
        cache.store.keep(graphs);
        result
    }

    fn finish(&self, cache: &mut CudaCache, batch: &Batch) -> Result<(), DeviceError> {
        cache.store.finish(batch)
    }
}

impl Measure for Cuda {
    fn synchronize(&self) {
        self.keep(self.gpu.synchronize());
    }

    fn timed<R: Send>(&self, work: impl FnOnce() -> R + Send) -> (R, Duration) {
        timing::timed(&self.gpu, work)
    }

    fn sweep(&self, bytes: usize) -> Result<Box<dyn Sweep>, DeviceError> {
        Ok(Box::new(CudaSweep::new(&self.gpu, bytes)?))
    }
}
