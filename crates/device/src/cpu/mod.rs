//! The CPU: the reference for every other device.

mod adapters;
#[cfg(target_arch = "x86_64")]
mod amx;
mod append;
mod attention;
mod block;
mod clip;
mod codes;
mod dot;
mod element;
mod elementwise;
mod encode;
mod exp;
mod feedback;
mod frames;
mod ggml;
mod linear;
mod ln;
mod missed;
mod mix;
mod page;
mod page_sinks;
mod paths;
mod quantise;
#[cfg(test)]
mod reference;
mod rotate;
mod scales;
mod simd;
mod sinks;
mod softmax;
mod store;
#[cfg(test)]
mod tests;
mod train;

use crate::blocks::with_blocks;
use crate::tensor::Values;
use crate::{Batch, Device, DeviceError, Mode, Output, Phase, Span, Sweep, Tensor};
pub use adapters::FeatureMaps;
pub use append::{blocks, leaving};
use attention::{Buffers, Call, Heads};
use dibit_cache::{CacheLayout, Extras, Sees};
use element::Element;
pub use missed::missed_keys;
use rayon::prelude::*;
pub use simd::Isa;
pub use sinks::Protected;
use std::ops::Range;
pub use store::{CpuStore, extras};

/// Tokens of a split of a long history. A constant: a result must not depend on the number of threads.
const SPLIT_TOKENS: usize = 4096;

/// Rows from which element-wise operations are worth several threads.
const PARALLEL_ROWS: usize = 8;

/// The CPU, with a thread pool of its own.
pub struct Cpu {
    pool: rayon::ThreadPool,
    isa: Isa,
    split_tokens: usize,
}

/// A cache on the CPU with the buffers of its attention.
pub struct CpuCache {
    store: CpuStore,
    buffers: Buffers,
}

impl CpuCache {
    /// Bytes of a page, for tests of other devices.
    #[doc(hidden)]
    pub fn page_bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8> {
        self.store.page(class, block, layer, kv_head).to_vec()
    }
}

impl Cpu {
    /// A CPU device of `threads` threads; `None` takes one for each core.
    ///
    /// # Errors
    /// [`DeviceError::Threads`].
    pub fn new(threads: Option<usize>) -> Result<Self, DeviceError> {
        let threads = threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get()));
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|error| DeviceError::Threads { threads, message: error.to_string() })?;
        Ok(Cpu { pool, isa: Isa::detect(), split_tokens: SPLIT_TOKENS })
    }

    /// The same with another instruction set than the best that the machine has.
    ///
    /// # Errors
    /// [`DeviceError::Isa`] where the machine lacks it.
    pub fn with_isa(self, isa: Isa) -> Result<Self, DeviceError> {
        Ok(Cpu { isa: Isa::named(isa.name())?, ..self })
    }

    fn call<'a>(&self, store: &'a CpuStore, layer: usize, spans: &'a [Span], num_heads: usize) -> Call<'a> {
        let shape = store.layout().shape;
        let heads = Heads { num: num_heads, num_key_value: shape.num_key_value_heads, dim: shape.head_dim };
        let incoming = store.layout().sees == Sees::Exact;
        Call { isa: self.isa, store, layer, spans, heads, split_tokens: self.split_tokens, incoming }
    }
}

fn widen_row<E: Element>(table: &[E], row: usize, out: &mut [f32]) {
    let width = out.len();
    for (out, value) in out.iter_mut().zip(&table[row * width..(row + 1) * width]) {
        *out = value.widen();
    }
}

impl Device for Cpu {
    type Buffer = Vec<f32>;
    type Matrix = Tensor;
    type Store = CpuCache;
    type Ids = Vec<u32>;

    fn describe(&self) -> String {
        format!("CPU, {} threads, {}", self.threads(), self.isa.name())
    }

    fn scope<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R {
        self.pool.install(pass)
    }

    fn buffer(&self, len: usize) -> Result<Vec<f32>, DeviceError> {
        let mut buffer = Vec::new();
        let bytes = len.saturating_mul(size_of::<f32>());
        buffer.try_reserve_exact(len).map_err(|_| DeviceError::OutOfMemory { what: "activations", bytes })?;
        buffer.resize(len, 0.0);
        Ok(buffer)
    }

    fn upload(&self, values: &[f32]) -> Result<Vec<f32>, DeviceError> {
        Ok(values.to_vec())
    }

    fn download(&self, buffer: &Vec<f32>, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), DeviceError> {
        out.clear();
        out.extend_from_slice(&buffer[range]);
        Ok(())
    }

    fn ids(&self, capacity: usize) -> Result<Vec<u32>, DeviceError> {
        Ok(Vec::with_capacity(capacity))
    }

    fn write_ids(&self, ids: &mut Vec<u32>, values: &[u32]) {
        ids.clear();
        ids.extend_from_slice(values);
    }

    fn pass<E: From<DeviceError> + Send>(
        &self,
        store: &mut CpuCache,
        _: &Batch,
        _: u64,
        mut pass: impl FnMut(&mut CpuCache) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        self.scope(|| pass(store))
    }

    fn matrix(&self, tensor: Tensor) -> Result<Tensor, DeviceError> {
        Ok(tensor)
    }

    fn store(
        &self,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<CpuCache, DeviceError> {
        let store = CpuStore::new(self.isa, layout, num_blocks, num_sequences, max_rows)?;
        Ok(CpuCache { store, buffers: Buffers::default() })
    }

    fn layout<'a>(&self, cache: &'a CpuCache) -> &'a CacheLayout {
        cache.store.layout()
    }

    fn embed(&self, table: &Tensor, ids: &Vec<u32>, count: usize, out: &mut Vec<f32>) {
        let values = table.values();
        for (id, out) in ids[..count].iter().zip(out.chunks_exact_mut(table.cols())) {
            match values {
                Values::F32(values) => widen_row(values, *id as usize, out),
                Values::F16(values) => widen_row(values, *id as usize, out),
                Values::Bf16(values) => widen_row(values, *id as usize, out),
                Values::Blocks(..) => table.widen_row(*id as usize, out),
            }
        }
    }

    fn copy_rows(&self, x: &Vec<f32>, rows: &Vec<u32>, count: usize, width: usize, out: &mut Vec<f32>) {
        for (row, out) in rows[..count].iter().zip(out.chunks_exact_mut(width)) {
            let row = *row as usize;
            out.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
    }

    fn rms_norm(
        &self,
        x: &Vec<f32>,
        rows: Range<usize>,
        width: usize,
        weight: &Vec<f32>,
        eps: f32,
        out: &mut Vec<f32>,
    ) {
        let x = &x[rows.start * width..rows.end * width];
        let out = &mut out[..rows.len() * width];
        let weight = &weight[..width];
        if rows.len() < PARALLEL_ROWS {
            elementwise::norm_rows(self.isa, x, weight, eps, out);
        } else {
            let pairs = x.par_chunks(width * PARALLEL_ROWS).zip(out.par_chunks_mut(width * PARALLEL_ROWS));
            pairs.for_each(|(x, out)| elementwise::norm_rows(self.isa, x, weight, eps, out));
        }
    }

    fn rms_norm_inplace(&self, x: &mut Vec<f32>, rows: usize, width: usize, weight: &Vec<f32>, eps: f32) {
        let chunks = x[..rows * width].par_chunks_mut(width * PARALLEL_ROWS);
        chunks.for_each(|rows| elementwise::norm_rows_inplace(self.isa, rows, &weight[..width], eps));
    }

    fn linear(
        &self,
        phase: Phase,
        x: &Vec<f32>,
        rows: usize,
        w: &Tensor,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
        output: Output,
    ) {
        let shape = dot::Shape { m: rows, n: w.rows(), k: w.cols() };
        let bias = bias.map(Vec::as_slice);
        let isa = if phase == Phase::Prefill { self.isa } else { self.isa.without_matrices() };
        match w.values() {
            Values::F32(w) => linear::linear(isa, x, w, shape, bias, out, output),
            Values::F16(w) => linear::linear(isa, x, w, shape, bias, out, output),
            Values::Bf16(w) => linear::linear(isa, x, w, shape, bias, out, output),
            Values::Blocks(kind, words) => {
                with_blocks!(kind, words, |w| ggml::linear(x, w, shape, bias, out, output));
            }
        }
    }

    fn rope_table(&self, inv_freq: &Vec<f32>, half: usize, positions: &Vec<u32>, count: usize, out: &mut Vec<f32>) {
        let inv_freq = &inv_freq[..half];
        for (position, row) in positions[..count].iter().zip(out.chunks_exact_mut(2 * half)) {
            let (cosines, sines) = row.split_at_mut(half);
            for ((cosine, sine), frequency) in cosines.iter_mut().zip(sines).zip(inv_freq) {
                (*sine, *cosine) = (*position as f32 * frequency).sin_cos();
            }
        }
    }

    fn rope(&self, x: &mut Vec<f32>, heads: usize, head_dim: usize, table: &Vec<f32>, rows: Range<usize>) {
        let half = head_dim / 2;
        let table = table[rows.start * head_dim..rows.end * head_dim].par_chunks(head_dim);
        x.par_chunks_mut(heads * head_dim).zip(table).for_each(|(row, angles)| {
            let (cosines, sines) = angles.split_at(half);
            elementwise::turn(self.isa, row, cosines, sines);
        });
    }

    fn silu_mul(&self, gate: &mut Vec<f32>, up: &Vec<f32>, len: usize) {
        let chunk = 4096;
        let pairs = gate[..len].par_chunks_mut(chunk).zip(up[..len].par_chunks(chunk));
        pairs.for_each(|(gate, up)| elementwise::silu_mul(self.isa, gate, up));
    }

    fn observe(&self, cache: &mut CpuCache, layer: usize, batch: &Batch, hidden: &Vec<f32>, width: usize) {
        cache.store.observe(layer, batch, hidden, width);
    }

    fn extras(&self, cache: &CpuCache, sequence: u32, len: usize) -> Extras {
        cache.store.extras(sequence, len)
    }

    fn write_kv(
        &self,
        store: &mut CpuCache,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Vec<f32>,
        v: &Vec<f32>,
    ) -> Result<(), DeviceError> {
        store.store.write(layer, batch, rows, k, v)
    }

    fn attention(
        &self,
        cache: &mut CpuCache,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        num_heads: usize,
        q: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let sees = cache.store.layout().sees;
        if batch.mode == Mode::Chunk && sees == Sees::Exact {
            let call = self.call(&cache.store, layer, &batch.spans, num_heads);
            attention::attend(call, &mut cache.buffers, rows, q, out);
            return Ok(());
        }
        let width = num_heads * cache.store.layout().shape.head_dim;
        for span in &batch.spans {
            let mut one = span.clone();
            for row in span.rows.start.max(rows.start)..span.rows.end.min(rows.end) {
                one.rows = row..row + 1;
                one.cached = span.cached + row - span.rows.start;
                if sees == Sees::Stored {
                    cache.store.append(layer, &one, row..row + 1, one.cached)?;
                    one.cached += 1;
                }
                let at = (row - rows.start) * width;
                let call = self.call(&cache.store, layer, std::slice::from_ref(&one), num_heads);
                attention::attend(call, &mut cache.buffers, row..row + 1, &q[at..], &mut out[at..]);
                if sees == Sees::Exact {
                    cache.store.append(layer, &one, row..row + 1, one.cached)?;
                }
            }
        }
        Ok(())
    }

    fn commit(&self, cache: &mut CpuCache, layer: usize, batch: &Batch) -> Result<(), DeviceError> {
        if batch.mode == Mode::Streaming || cache.store.layout().sees == Sees::Stored {
            return Ok(());
        }
        for span in &batch.spans {
            cache.store.append(layer, span, span.rows.clone(), span.cached)?;
        }
        Ok(())
    }

    fn missed_keys(
        &self,
        layout: &CacheLayout,
        layer: usize,
        k: &Vec<f32>,
        rows: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        missed_keys(self.isa, layout, layer, &k[..rows * layout.shape.row()], out)
    }

    fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn sweep(&self, bytes: usize) -> Result<Box<dyn Sweep>, DeviceError> {
        let sweep = dibit_timing::Sweep::new(bytes);
        Ok(Box::new(sweep.map_err(|_| DeviceError::OutOfMemory { what: "the sweep", bytes })?))
    }
}
