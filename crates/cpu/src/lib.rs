//! dibit on CPUs: the reference for every other device.

mod activation;
mod adapters;
#[cfg(target_arch = "x86_64")]
mod amx;
mod append;
mod attention;
mod block;
mod call;
mod clip;
mod codes;
mod dot;
mod element;
mod elementwise;
mod encode;
mod exp;
mod experts;
mod feedback;
mod frames;
mod ggml;
mod host_packing;
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
mod ring;
mod rotate;
mod scales;
mod shared_output;
mod simd;
mod softmax;
mod store;
#[cfg(test)]
mod tests;
mod train;

pub use append::LayerRows;
use attention::Buffers;
use call::{Call, Heads};
use dibit_cache::{Batch, CacheLayout, Phase, Powers, Span};
use dibit_device::{
    Activation, Attention, Dense, DeviceError, KvStorage, Measure, Memory, Norm, Output, QueryHeads, Sweep, Tensor,
    Values, with_blocks,
};
use element::Element;
pub use experts::{ChosenExperts, ExpertStack};
pub use host_packing::HostPacker;
pub use missed::missed_keys;
use rayon::prelude::*;
pub use simd::Isa;
use std::ops::Range;
use std::time::Duration;
use store::CpuStore;

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
}

fn widen_row<E: Element>(table: &[E], row: usize, out: &mut [f32]) {
    let width = out.len();
    for (out, value) in out.iter_mut().zip(&table[row * width..(row + 1) * width]) {
        *out = value.widen();
    }
}

impl Memory for Cpu {
    type Buffer = Vec<f32>;
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
}

impl Dense for Cpu {
    type Matrix = Tensor;

    fn matrix(&self, tensor: Tensor) -> Result<Tensor, DeviceError> {
        Ok(tensor)
    }

    fn embed(&self, table: &Tensor, ids: &Vec<u32>, count: usize, scale: f32, out: &mut Vec<f32>) {
        let values = table.values();
        for (id, out) in ids[..count].iter().zip(out.chunks_exact_mut(table.cols())) {
            match values {
                Values::F32(values) => widen_row(values, *id as usize, out),
                Values::F16(values) => widen_row(values, *id as usize, out),
                Values::Bf16(values) => widen_row(values, *id as usize, out),
                Values::Blocks(..) => table.widen_row(*id as usize, out),
            }
            if scale != 1.0 {
                out.iter_mut().for_each(|x| *x *= scale);
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
        norm: Norm<Vec<f32>>,
        out: &mut Vec<f32>,
        output: Output,
    ) {
        let (Output::Write(first) | Output::Add(first)) = output;
        let x = &x[rows.start * width..rows.end * width];
        let out = &mut out[first * width..(first + rows.len()) * width];
        let (weight, eps) = (&norm.weight[..width], norm.eps);
        let norm = |x: &[f32], out: &mut [f32]| match output {
            Output::Write(_) => elementwise::norm_rows(self.isa, x, weight, eps, out),
            Output::Add(_) => elementwise::add_norm_rows(self.isa, x, weight, eps, out),
        };
        if rows.len() < PARALLEL_ROWS {
            norm(x, out);
        } else {
            let pairs = x.par_chunks(width * PARALLEL_ROWS).zip(out.par_chunks_mut(width * PARALLEL_ROWS));
            pairs.for_each(|(x, out)| norm(x, out));
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
        rows: Range<usize>,
        w: &Tensor,
        bias: Option<&Vec<f32>>,
        out: &mut Vec<f32>,
        output: Output,
    ) {
        let shape = dot::Shape { m: rows.len(), n: w.rows(), k: w.cols() };
        let x = &x[rows.start * w.cols()..rows.end * w.cols()];
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

    fn rope_table(&self, turns: &Vec<f32>, half: usize, positions: &Vec<u32>, count: usize, out: &mut Vec<f32>) {
        let (frequencies, magnitudes) = turns[..2 * half].split_at(half);
        for (position, row) in positions[..count].iter().zip(out.chunks_exact_mut(2 * half)) {
            let (cosines, sines) = row.split_at_mut(half);
            let turns = frequencies.iter().zip(magnitudes);
            for ((cosine, sine), (frequency, magnitude)) in cosines.iter_mut().zip(sines).zip(turns) {
                let (s, c) = (*position as f32 * frequency).sin_cos();
                (*sine, *cosine) = (s * magnitude, c * magnitude);
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

    fn activate(&self, activation: Activation, gate: &mut Vec<f32>, up: &Vec<f32>, len: usize) {
        let chunk = 4096;
        let pairs = gate[..len].par_chunks_mut(chunk).zip(up[..len].par_chunks(chunk));
        pairs.for_each(|(gate, up)| activation::activate(self.isa, activation, gate, up));
    }
}

impl KvStorage for Cpu {
    type Store = CpuCache;

    fn new_store(
        &self,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<CpuCache, DeviceError> {
        let store = CpuStore::new(self.isa, layout, num_blocks, num_sequences, max_rows)?;
        Ok(CpuCache { store, buffers: Buffers::default() })
    }

    fn set_sinks(&self, cache: &mut CpuCache, layer: usize, slot: u32, positions: &[u32]) -> Result<(), DeviceError> {
        cache.store.set_sinks(layer, slot, positions);
        Ok(())
    }

    fn set_powers(&self, cache: &mut CpuCache, layer: usize, powers: &Powers) -> Result<(), DeviceError> {
        cache.store.set_powers(layer, powers);
        Ok(())
    }

    fn place(&self, _: &mut CpuCache, _: &[Span], _: bool) -> Result<(), DeviceError> {
        Ok(())
    }

    fn stage_kv(
        &self,
        cache: &mut CpuCache,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Vec<f32>,
        v: &Vec<f32>,
    ) -> Result<(), DeviceError> {
        cache.store.write(layer, batch, rows, k, v)
    }

    fn attend(
        &self,
        cache: &mut CpuCache,
        attention: Attention<Vec<f32>>,
        q: &Vec<f32>,
        out: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        let shape = cache.store.layout().shape;
        let Attention { layer, spans, rows, first, heads: QueryHeads { num, softcap, sinks }, incoming, .. } =
            attention;
        let heads = Heads { num, num_key_value: shape.num_key_value_heads, dim: shape.head_dim };
        let split_tokens = self.split_tokens;
        let (isa, store, sinks) = (self.isa, &cache.store, sinks.map(|own| &own[..num]));
        let call = Call { isa, store, layer, spans, heads, softcap, sinks, split_tokens, incoming };
        let at = (rows.start - first) * num * shape.head_dim;
        attention::attend(call, &mut cache.buffers, rows, &q[at..], &mut out[at..]);
        Ok(())
    }

    fn append(&self, cache: &mut CpuCache, layer: usize, spans: &[Span]) -> Result<(), DeviceError> {
        spans.iter().try_for_each(|span| cache.store.append(layer, span))
    }

    fn record<E: From<DeviceError> + Send>(
        &self,
        store: &mut CpuCache,
        mut work: impl FnMut(&mut CpuCache) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        self.scope(|| work(store))
    }

    fn finish(&self, _: &mut CpuCache, _: &Batch) -> Result<(), DeviceError> {
        Ok(())
    }
}

impl Measure for Cpu {
    fn threads(&self) -> usize {
        self.pool.current_num_threads()
    }

    fn sweep(&self, bytes: usize) -> Result<Box<dyn Sweep>, DeviceError> {
        let sweep = dibit_timing::Sweep::new(bytes);
        Ok(Box::new(CpuSweep(sweep.map_err(|_| DeviceError::OutOfMemory { what: "the sweep", bytes })?)))
    }
}

/// Memory that is read by the threads of the scope that it is called in.
struct CpuSweep(dibit_timing::Sweep);

impl Sweep for CpuSweep {
    fn bytes(&self) -> usize {
        self.0.bytes()
    }

    fn read(&self) -> Duration {
        self.0.read()
    }
}
