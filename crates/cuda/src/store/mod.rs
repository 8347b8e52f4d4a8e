//! The bytes of a cache on a GPU.

mod errors;
mod feedback;
mod flush;
mod host_packing;
mod kernels;
mod layer;
mod rotation;
mod runs;
mod staged;

use crate::abi;
use crate::attention;
use crate::device::Buffer;
use crate::graph::Graphs;
use crate::kernel::{Grid, launch};
use crate::memory::Memory;
use crate::{Cuda, CudaError};
use dibit_cache::{CacheLayout, Extras, PAGE_TOKENS, Sees, SideLayout, Sinks};
use dibit_device::host::{self, Protected};
use dibit_device::{Batch, DeviceError, Isa, Mode, Span};
use errors::ErrorRecord;
use host_packing::HostPacking;
pub(crate) use kernels::Kernels;
pub(crate) use layer::Layer;
pub(crate) use staged::{Staged, StagedShape};
use std::ops::Range;
use std::sync::Arc;

/// Rows that a block of `write_rows` and `rotate_rows` has.
pub(crate) const ROWS: usize = 4;

/// A cache on a GPU.
pub struct CudaStore {
    pub(crate) layout: CacheLayout,
    pub(crate) kernels: Kernels,
    pub(crate) layers: Vec<Layer>,
    /// Kernels of attention of each layer, once they were asked for.
    attention: Vec<Option<Arc<attention::Kernels>>>,
    /// `[block][layer][kv head][page]`
    pool: Memory,
    keys: Side,
    values: Side,
    /// States of the linear correction, those of one sequence after the other.
    states: Memory,
    /// Protected tokens, `[layer][sequence][sink]`, and how many there are, `[layer][sequence]`.
    sink_positions: Memory,
    sink_counts: Memory,
    num_sequences: usize,
    /// Rows of a pass.
    max_rows: usize,
    sequences: Vec<SequenceState>,
    pub(crate) staged: Staged,
    /// Keys of a pass that leave the window, before their rotary embedding, `[key][kv head][head_dim]`.
    turned: Memory,
    /// Features of what their codes miss, `[key][kv head][D]`.
    missed: Memory,
    errors: ErrorRecord,
    /// Whether the batch of the pass in flight has been staged.
    in_pass: bool,
    pub(crate) scratch: Scratch,
    graphs: Graphs<PassShape>,
    host_packing: Option<HostPacking>,
}

/// All that the launches of a pass of single tokens depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct PassShape {
    model: u64,
    /// Whether attention computes in f32.
    exact: bool,
    staged: StagedShape,
}

/// Keys, or values, outside of pages.
struct Side {
    /// fp16 `[layer][sequence][kv head][slot][head_dim]`; token `t` lies in slot `t % slots`.
    ring: Memory,
    slots: usize,
    /// fp16 `[layer][sequence][kv head][sink][head_dim]`
    sinks: Memory,
    /// f32 `[kv head][row of the batch][head_dim]`
    incoming: Memory,
}

/// What one sequence holds beside pages and window.
struct SequenceState {
    protected: Protected,
    /// For each block, the first block of its chunk.
    chunks: Vec<u32>,
}

/// Buffers of attention, which grow.
#[derive(Default)]
pub(crate) struct Scratch {
    pub partials: Option<Memory>,
    pub queries: Option<Memory>,
    pub corrections: Option<Memory>,
    pub halves: Option<Memory>,
    pub spilled: Option<Memory>,
}

impl Scratch {
    /// Where the buffers lie.
    fn addresses(&self) -> Vec<u64> {
        let Scratch { partials, queries, corrections, halves, spilled } = self;
        [partials, queries, corrections, halves, spilled].map(|own| own.as_ref().map_or(0, |own| own.at(0))).to_vec()
    }
}

impl CudaStore {
    pub(crate) fn new(
        c: &Cuda,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let gpu = &c.gpu;
        let shape = layout.shape;
        let staged = Staged::new(gpu, layout, num_blocks, num_sequences, max_rows)?;
        let layer = |index| Layer::new(gpu, layout, index, num_blocks);
        let layers = (0..shape.num_layers).map(layer).collect::<Result<Vec<_>, DeviceError>>()?;
        let row_bytes = shape.row() * size_of::<u16>();
        let rows = shape.num_layers * num_sequences;
        let side = |slots: usize| -> Result<Side, CudaError> {
            Ok(Side {
                ring: Memory::zeros(gpu, "window rings", rows * slots * row_bytes)?,
                slots,
                sinks: Memory::zeros(gpu, "sinks", rows * layout.sinks.capacity() * row_bytes)?,
                incoming: Memory::zeros(gpu, "rows of a pass", max_rows * shape.row() * size_of::<f32>())?,
            })
        };
        let leaving_rows = staged.most_leaving * shape.num_key_value_heads * size_of::<f32>();
        let pre_rope = layers.iter().any(|layer| layer.pre_rope.is_some());
        let turned = if pre_rope { leaving_rows * shape.head_dim } else { 0 };
        let features = layers.iter().filter_map(|layer| layer.correction.as_ref()).map(|own| own.features).max();
        let host_packing = packs_on_host(layout).then(|| HostPacking::new(layout, num_blocks, num_sequences, max_rows));
        let state = || SequenceState { protected: Protected::new(layout.sinks, shape.num_layers), chunks: Vec::new() };
        let kernels = Kernels::new(gpu, shape.head_dim)?;
        let needed =
            layers.iter().map(|layer| attention::exact::shared_bytes(layer, shape.head_dim)).max().unwrap_or(0);
        if needed > kernels.attend_exact.most_shared {
            return Err(DeviceError::Unsupported(format!(
                "attention under scheme {} takes {needed} bytes of shared memory, and {} has {}; take another scheme or --device cpu",
                layout.scheme_name(),
                gpu.name,
                kernels.attend_exact.most_shared
            )));
        }
        let store = CudaStore {
            kernels,
            layers,
            attention: vec![None; shape.num_layers],
            pool: Memory::zeros(gpu, "cache blocks", num_blocks * layout.block_bytes())?,
            keys: side(layout.window.key_slots())?,
            values: side(layout.window.value_slots())?,
            states: Memory::zeros(gpu, "correction states", num_sequences * layout.state_bytes())?,
            sink_positions: Memory::zeros(gpu, "sinks", rows * layout.sinks.capacity() * size_of::<i32>())?,
            sink_counts: Memory::zeros(gpu, "sinks", rows * size_of::<i32>())?,
            num_sequences,
            max_rows,
            sequences: (0..num_sequences).map(|_| state()).collect(),
            turned: Memory::new(gpu, "keys that leave the window", turned)?,
            missed: Memory::new(gpu, "features of keys", leaving_rows * features.unwrap_or(0))?,
            staged,
            errors: ErrorRecord::new(gpu)?,
            in_pass: false,
            scratch: Scratch::default(),
            graphs: Graphs::new(),
            host_packing: host_packing.transpose()?,
            layout: layout.clone(),
        };
        store.upload_first_sinks()?;
        Ok(store)
    }

    pub(crate) fn pass<E: From<DeviceError> + Send>(
        &mut self,
        c: &Cuda,
        batch: &Batch,
        model: u64,
        mut pass: impl FnMut(&mut Self) -> Result<(), E> + Send,
    ) -> Result<(), E> {
        self.in_pass = true;
        let result = self.stage(batch).map_err(E::from).and_then(|()| match c.records && self.repeats(batch) {
            true => {
                let shape = PassShape { model, exact: c.is_exact(), staged: self.staged.shape };
                let mut graphs = std::mem::replace(&mut self.graphs, Graphs::new());
                let result = graphs.run(&c.gpu, shape, self.scratch.addresses(), || pass(self));
                self.graphs = graphs;
                result
            }
            false => pass(self),
        });
        self.in_pass = false;
        let checked = self.check(batch);
        result?;
        Ok(checked?)
    }

    /// Whether rows are stored one by one as they attend.
    pub(crate) fn is_stepwise(&self, batch: &Batch) -> bool {
        batch.mode == Mode::Streaming || self.layout.sees == Sees::Stored
    }

    /// Whether a pass does nothing on the host that depends on more than its shape.
    fn repeats(&self, batch: &Batch) -> bool {
        let chooses = matches!(self.layout.sinks, Sinks::Massive(_) | Sinks::Pivots(_));
        let single = |span: &Span| span.rows.len() == 1 && (span.cached > 0 || !chooses);
        batch.mode == Mode::Chunk && refuses_graphs(&self.layout).is_none() && batch.spans.iter().all(single)
    }

    /// Tells the GPU of a batch, unless the pass in flight has done so.
    fn stage(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        if self.is_stepwise(batch) {
            return Ok(());
        }
        self.stage_spans(&batch.spans, true)
    }

    /// Tells the GPU of some tokens of sequences, and of what leaves the window once they are stored.
    pub(crate) fn stage_spans(&mut self, spans: &[Span], leaves: bool) -> Result<(), DeviceError> {
        let Self { staged, sequences, layout, .. } = self;
        let chunks = |slot: u32| &sequences[slot as usize].chunks[..];
        Ok(staged.fill(layout, spans, chunks, leaves)?)
    }

    /// The same for a batch outside of a pass.
    pub(crate) fn stage_alone(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        if self.in_pass { Ok(()) } else { self.stage(batch) }
    }

    /// Says what went wrong on the GPU, once all is done.
    fn check(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.errors.take(batch)
    }

    /// The same outside of a pass.
    fn check_alone(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        if self.in_pass { Ok(()) } else { self.check(batch) }
    }

    /// The kernels of attention that suit a layer.
    pub(crate) fn attention(&mut self, c: &Cuda, layer: usize) -> Result<Arc<attention::Kernels>, CudaError> {
        if let Some(own) = &self.attention[layer] {
            return Ok(own.clone());
        }
        let own = Arc::new(attention::Kernels::new(c, &self.layout, layer)?);
        self.attention[layer] = Some(own.clone());
        Ok(own)
    }

    /// A layer as kernels see it.
    pub(crate) fn cache(&self, layer: usize) -> abi::Cache {
        let shape = self.layout.shape;
        let own = &self.layers[layer];
        let sequences = layer * self.num_sequences;
        let row_bytes = shape.row() * size_of::<u16>();
        let capacity = self.layout.sinks.capacity();
        let ring = |side: &Side| side.ring.at(sequences * side.slots * row_bytes);
        let sinks = |side: &Side| side.sinks.at(sequences * capacity * row_bytes);
        abi::Cache {
            pool: self.pool.at(0),
            block_bytes: self.layout.block_bytes() as i64,
            layer_offset: self.layout.layers[layer].offset as i64,
            kv_heads: shape.num_key_value_heads as i32,
            head_dim: shape.head_dim as i32,
            pages: own.pages[0].at(0),
            key_ring: ring(&self.keys),
            value_ring: ring(&self.values),
            key_slots: self.keys.slots as i32,
            value_slots: self.values.slots as i32,
            sink_keys: sinks(&self.keys),
            sink_values: sinks(&self.values),
            sink_positions: self.sink_positions.at(sequences * capacity * size_of::<i32>()),
            sink_counts: self.sink_counts.at(sequences * size_of::<i32>()),
            sink_capacity: capacity as i32,
            padding_2: 0,
            incoming_keys: self.keys.incoming.at(0),
            incoming_values: self.values.incoming.at(0),
            incoming_rows: self.max_rows as i32,
            padding_3: 0,
            key_order: own.order.as_ref().map_or(0, |order| order.at(0)),
            bias: self.layout.layers[layer].bias.into(),
            padding_4: 0,
        }
    }

    /// The linear correction of a layer as kernels see it.
    pub(crate) fn correction(&self, layer: usize) -> Option<abi::Correction> {
        let own = self.layers[layer].correction.as_ref()?;
        Some(own.for_kernels(&self.layout, layer, &self.states, &self.missed))
    }

    /// Lets a layer choose which tokens of prompts it protects.
    pub(crate) fn observe(
        &mut self,
        layer: usize,
        batch: &Batch,
        hidden: &Buffer,
        width: usize,
    ) -> Result<(), CudaError> {
        if matches!(self.layout.sinks, Sinks::None | Sinks::First(_) | Sinks::Auto(_)) {
            return Ok(());
        }
        for span in &batch.spans {
            // Tokens that are decoded one by one are never protected for their activations.
            if span.rows.len() > 1 || span.cached == 0 {
                let tokens = span.cached..span.cached + span.rows.len();
                let mut rows = vec![0f32; span.rows.len() * width];
                let start = span.rows.start * width * size_of::<f32>();
                hidden.memory.read(start, bytemuck::cast_slice_mut(&mut rows))?;
                let state = &mut self.sequences[span.slot as usize];
                state.protected.choose(self.layout.sinks, layer, tokens, &rows, width);
                self.upload_sinks(layer, span.slot as usize)?;
            }
        }
        if let Some(host) = &mut self.host_packing {
            host.observe(layer, batch, hidden, width)?;
        }
        Ok(())
    }

    /// What is protected in sequences that nothing has been seen of.
    fn upload_first_sinks(&self) -> Result<(), CudaError> {
        let capacity = self.layout.sinks.capacity();
        let (mut counts, mut positions) = (Vec::<i32>::new(), Vec::<i32>::new());
        for layer in 0..self.layers.len() {
            for sequence in &self.sequences {
                let own = sequence.protected.layer(layer);
                counts.push(own.len() as i32);
                positions.extend(own.iter().map(|at| *at as i32));
                positions.resize(counts.len() * capacity, 0);
            }
        }
        self.sink_counts.write(0, bytemuck::cast_slice(&counts))?;
        self.sink_positions.write(0, bytemuck::cast_slice(&positions))
    }

    fn upload_sinks(&self, layer: usize, slot: usize) -> Result<(), CudaError> {
        let positions: Vec<i32> = self.sequences[slot].protected.layer(layer).iter().map(|at| *at as i32).collect();
        let sequence = layer * self.num_sequences + slot;
        let capacity = self.layout.sinks.capacity();
        self.sink_counts.write(sequence * size_of::<i32>(), bytemuck::bytes_of(&(positions.len() as i32)))?;
        self.sink_positions.write(sequence * capacity * size_of::<i32>(), bytemuck::cast_slice(&positions))
    }

    pub(crate) fn extras(&self, sequence: u32, len: usize) -> Extras {
        let state = &self.sequences[sequence as usize];
        host::extras(&self.layout, &state.protected, &state.chunks, len)
    }

    pub(crate) fn write(
        &mut self,
        c: &Cuda,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<(), DeviceError> {
        let shape = self.layout.shape;
        assert!(rows.end <= self.max_rows && rows.len() * shape.row() <= k.len.min(v.len), "rows of a pass");
        let own = &self.layers[layer];
        let written = |source: &Buffer, side: &Side, rotation| abi::Written {
            source: source.memory.at(0),
            target: side.incoming.at(0),
            rotation,
        };
        let grid = Grid::new([rows.len().div_ceil(ROWS), shape.num_key_value_heads, 2], 128)
            .shared(2 * ROWS * shape.head_dim * size_of::<f32>());
        launch!(
            c.gpu,
            self.kernels.write_rows,
            grid,
            written(k, &self.keys, own.keys.for_kernels()),
            written(v, &self.values, own.values.for_kernels()),
            rows.start as i32,
            rows.len() as i32,
            self.max_rows as i32,
            shape.head_dim as i32,
            layer as i32,
            self.errors.at(),
        );
        if let Some(host) = &mut self.host_packing {
            host.write(layer, batch, rows, k, v)?;
        }
        self.check_alone(batch)
    }

    pub(crate) fn commit(&mut self, c: &Cuda, layer: usize, batch: &Batch) -> Result<(), DeviceError> {
        if self.is_stepwise(batch) {
            return Ok(());
        }
        self.stage_alone(batch)?;
        self.append(c, layer, &batch.spans)?;
        self.check_alone(batch)
    }

    /// Stores the rows of staged spans: packs what leaves the window, and fills the rings.
    pub(crate) fn append(&mut self, c: &Cuda, layer: usize, spans: &[Span]) -> Result<(), DeviceError> {
        match &mut self.host_packing {
            Some(host) => {
                let Self { layout, pool, keys, values, states, num_sequences, .. } = self;
                let to = host_packing::Target {
                    pool,
                    sinks: [&keys.sinks, &values.sinks],
                    states,
                    num_sequences: *num_sequences,
                };
                spans.iter().try_for_each(|span| host.append(layout, layer, span, &to))?;
            }
            None => flush::flush(self, c, layer)?,
        }
        let rows: usize = spans.iter().map(|span| span.rows.len()).sum();
        let grid = Grid::new([rows, self.layout.shape.num_key_value_heads, 2], 128);
        let (cache, spans_at) = (self.cache(layer), self.staged.spans());
        launch!(c.gpu, self.kernels.append_rows, grid, cache, spans_at, spans.len() as i32);
        if self.layout.chunk_bytes() > 0 {
            for span in spans {
                let ends = [span.cached, span.cached + span.rows.len()];
                let filled = ends.map(|len| self.layout.window.packed_keys(len) / PAGE_TOKENS);
                let chunks = &mut self.sequences[span.slot as usize].chunks;
                chunks.resize(chunks.len().max(filled[1]), 0);
                chunks[filled[0]..filled[1]].fill(filled[0] as u32);
            }
        }
        Ok(())
    }

    /// Passes that have been recorded, for tests.
    #[doc(hidden)]
    pub fn recorded(&self) -> usize {
        self.graphs.len()
    }

    /// Bytes of a page, for tests.
    #[doc(hidden)]
    pub fn page_bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.layer(class, layer).pages[kv_head].bytes];
        let read = self.pool.read(self.layout.page_offset(class, block, layer, kv_head), &mut bytes);
        read.expect("a page");
        bytes
    }
}

/// Whether pages hold what is computed on the host.
pub(crate) fn packs_on_host(layout: &CacheLayout) -> bool {
    let beside_codes = |side: SideLayout| matches!(side, SideLayout::Packed(side) if side.factors.is_some() || side.outliers.is_some());
    let pages = layout.layers.iter().flat_map(|layer| &layer.pages);
    pages.flat_map(|page| [page.keys, page.values]).any(beside_codes)
}

/// Why passes of single tokens cannot be recorded, where they cannot.
pub(crate) fn refuses_graphs(layout: &CacheLayout) -> Option<&'static str> {
    if layout.sees == Sees::Stored {
        return Some("tokens are stored before they attend");
    }
    if !layout.classes.is_empty() {
        return Some("tokens have classes");
    }
    packs_on_host(layout).then_some("pages are packed on the host")
}

/// What the codes of keys miss, computed on the host: calibration asks for it once for each layer of a text.
pub(crate) fn missed_keys(
    layout: &CacheLayout,
    layer: usize,
    k: &Buffer,
    rows: usize,
    out: &mut Buffer,
) -> Result<(), DeviceError> {
    let mut keys = vec![0f32; rows * layout.shape.row()];
    assert!(keys.len() <= k.len.min(out.len), "keys of rows");
    k.memory.read(0, bytemuck::cast_slice_mut(&mut keys))?;
    let mut missed = vec![0f32; keys.len()];
    host::missed_keys(Isa::detect(), layout, layer, &keys, &mut missed)?;
    Ok(out.memory.write(0, bytemuck::cast_slice(&missed))?)
}
