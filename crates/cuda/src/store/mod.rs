//! The bytes of a cache on a GPU.

mod errors;
mod flush;
mod host_packing;
mod kernels;
mod layer;
mod rotation;
mod runs;
mod side;
mod staged;

use crate::CudaError;
use crate::abi;
use crate::cuda::{Buffer, Cuda};
use crate::graph::Graphs;
use crate::kernel::{Grid, launch};
use crate::memory::Memory;
use dibit_cache::{Batch, CacheLayout, CachePlan, Powers, Sees, SideLayout, Span};
use dibit_cpu::Isa;
use dibit_device::DeviceError;
use errors::ErrorRecord;
use host_packing::HostPacking;
pub(crate) use kernels::Kernels;
use layer::Factors;
pub(crate) use layer::Layer;
use side::Side;
pub(crate) use staged::{Staged, StagedShape};
use std::ops::Range;

/// Rows that a block of `write_rows` and `rotate_rows` has.
pub(crate) const ROWS: usize = 4;

/// A cache on a GPU.
pub(crate) struct CudaStore {
    pub(crate) layout: CacheLayout,
    pub(crate) kernels: Kernels,
    pub(crate) layers: Vec<Layer>,
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
    /// The protected tokens once more, `[layer][sequence]`.
    sinks: Vec<Vec<u32>>,
    pub(crate) staged: Staged,
    /// Keys of a pass that leave the window, before their rotary embedding, `[key][kv head][head_dim]`.
    turned: Memory,
    /// Features of what their codes miss, `[key][kv head][D]`.
    missed: Memory,
    errors: ErrorRecord,
    pub(crate) scratch: Scratch,
    graphs: Graphs<StagedShape>,
    host_packing: Option<HostPacking>,
}

/// What was recorded for a cache, and what it depends on.
pub(crate) struct Recording {
    pub graphs: Graphs<StagedShape>,
    pub shape: StagedShape,
    pub addresses: Vec<u64>,
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
        kernels: Kernels,
        layers: Vec<Layer>,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let gpu = &c.gpu;
        let shape = layout.shape;
        let staged = Staged::new(gpu, layout, num_blocks, num_sequences, max_rows)?;
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
        let host_packing = packs_on_host(layout).then(|| HostPacking::new(layout));
        let first = layout.sinks.first_positions();
        let store = CudaStore {
            kernels,
            layers,
            pool: Memory::zeros(gpu, "cache blocks", num_blocks * layout.block_bytes())?,
            keys: side(layout.window.key_slots())?,
            values: side(layout.window.value_slots())?,
            states: Memory::zeros(gpu, "correction states", num_sequences * layout.state_bytes())?,
            sink_positions: Memory::zeros(gpu, "sinks", rows * layout.sinks.capacity() * size_of::<i32>())?,
            sink_counts: Memory::zeros(gpu, "sinks", rows * size_of::<i32>())?,
            num_sequences,
            max_rows,
            sinks: vec![first; rows],
            turned: Memory::new(gpu, "keys that leave the window", turned)?,
            missed: Memory::new(gpu, "features of keys", leaving_rows * features.unwrap_or(0))?,
            staged,
            errors: ErrorRecord::new(gpu)?,
            scratch: Scratch::default(),
            graphs: Graphs::new(),
            host_packing,
            layout: layout.clone(),
        };
        store.upload_first_sinks()?;
        Ok(store)
    }

    /// What recording a pass of the spans in place takes; `None` where it is not recorded.
    pub(crate) fn recording(&mut self, c: &Cuda) -> Option<Recording> {
        let records = c.records && refuses_graphs(&self.layout).is_none();
        records.then(|| Recording {
            graphs: std::mem::replace(&mut self.graphs, Graphs::new()),
            shape: self.staged.shape,
            addresses: self.scratch.addresses(),
        })
    }

    /// Keeps what was recorded.
    pub(crate) fn keep(&mut self, graphs: Graphs<StagedShape>) {
        self.graphs = graphs;
    }

    /// Tells the GPU of some tokens of sequences, and of what leaves the window once they are stored.
    pub(crate) fn place(&mut self, spans: &[Span], appends: bool) -> Result<(), DeviceError> {
        Ok(self.staged.fill(&self.layout, spans, appends)?)
    }

    /// Says what went wrong on the GPU, once all is done.
    pub(crate) fn finish(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.errors.take(batch)
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

    /// What is protected in every sequence, whatever it holds.
    fn upload_first_sinks(&self) -> Result<(), CudaError> {
        let capacity = self.layout.sinks.capacity();
        let (mut counts, mut positions) = (Vec::<i32>::new(), Vec::<i32>::new());
        for own in &self.sinks {
            counts.push(own.len() as i32);
            positions.extend(own.iter().map(|at| *at as i32));
            positions.resize(counts.len() * capacity, 0);
        }
        self.sink_counts.write(0, bytemuck::cast_slice(&counts))?;
        self.sink_positions.write(0, bytemuck::cast_slice(&positions))
    }

    pub(crate) fn set_sinks(&mut self, layer: usize, slot: usize, positions: &[u32]) -> Result<(), CudaError> {
        let sequence = layer * self.num_sequences + slot;
        self.sinks[sequence] = positions.to_vec();
        let at = sequence * self.layout.sinks.capacity() * size_of::<u32>();
        self.sink_counts.write(sequence * size_of::<i32>(), bytemuck::bytes_of(&(positions.len() as i32)))?;
        self.sink_positions.write(at, bytemuck::cast_slice(positions))
    }

    /// [`dibit_device::KvStorage::set_powers`]. What was recorded knows others.
    pub(crate) fn set_powers(&mut self, c: &Cuda, layer: usize, powers: &Powers) -> Result<(), CudaError> {
        self.layers[layer].factors = Factors::new(&c.gpu, powers)?;
        self.graphs = Graphs::new();
        Ok(())
    }

    /// Writes rows of the pass in flight, rotated and multiplied by the factors of their heads.
    pub(crate) fn stage_kv(&mut self, c: &Cuda, layer: usize, rows: Range<usize>, k: &Buffer, v: &Buffer) {
        let shape = self.layout.shape;
        assert!(rows.end <= self.max_rows && rows.len() * shape.row() <= k.len.min(v.len), "rows of a pass");
        let own = &self.layers[layer];
        let written = |source: &Buffer, side: &Side, rotation, factors| abi::Written {
            source: source.memory.at(0),
            target: side.incoming.at(0),
            rotation,
            factors,
        };
        let [key_factors, value_factors] = own.factors.stored();
        let grid = Grid::new([rows.len().div_ceil(ROWS), shape.num_key_value_heads, 2], 128)
            .shared(2 * ROWS * shape.head_dim * size_of::<f32>());
        launch!(
            c.gpu,
            self.kernels.write_rows,
            grid,
            written(k, &self.keys, own.keys.for_kernels(), key_factors),
            written(v, &self.values, own.values.for_kernels(), value_factors),
            rows.start as i32,
            rows.len() as i32,
            self.max_rows as i32,
            shape.head_dim as i32,
            layer as i32,
            self.errors.at(),
        );
    }

    /// Stores the rows of staged spans: packs what leaves the window, and fills the rings.
    pub(crate) fn append(&mut self, c: &Cuda, layer: usize, spans: &[Span]) -> Result<(), DeviceError> {
        match &mut self.host_packing {
            Some(host) => {
                let Self { layout, pool, keys, values, states, sinks, num_sequences, max_rows, .. } = self;
                for span in spans {
                    let sequence = layer * *num_sequences + span.slot as usize;
                    let of = host_packing::Bytes {
                        pool,
                        sides: [&*keys, &*values],
                        states,
                        sequence,
                        max_rows: *max_rows,
                        sinks: &sinks[sequence],
                    };
                    host.append(layout, layer, span, &of)?;
                }
            }
            None => flush::flush(self, c, layer)?,
        }
        let rows: usize = spans.iter().map(|span| span.rows.len()).sum();
        let grid = Grid::new([rows, self.layout.shape.num_key_value_heads, 2], 128);
        let (cache, spans_at) = (self.cache(layer), self.staged.spans(self.layout.layers[layer].group));
        launch!(c.gpu, self.kernels.append_rows, grid, cache, spans_at, spans.len() as i32);
        Ok(())
    }

    /// Passes that have been recorded, for tests.
    pub(crate) fn recorded(&self) -> usize {
        self.graphs.len()
    }

    /// Bytes of a page, for tests.
    pub(crate) fn page_bytes(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> Vec<u8> {
        let mut bytes = vec![0; self.layout.layer(class, layer).pages[kv_head].bytes];
        let read = self.pool.read(self.layout.page_offset(class, block, layer, kv_head), &mut bytes);
        read.expect("a page");
        bytes
    }
}

/// Whether pages hold what is computed on the host.
pub(crate) fn packs_on_host(layout: &CachePlan) -> bool {
    let beside_codes = |side: SideLayout| matches!(side, SideLayout::Packed(side) if side.factors.is_some() || side.outliers.is_some());
    let pages = layout.layers.iter().flat_map(|layer| &layer.pages);
    pages.flat_map(|page| [page.keys, page.values]).any(beside_codes)
}

/// Why passes of single tokens cannot be recorded, where they cannot.
pub(crate) fn refuses_graphs(layout: &CachePlan) -> Option<&'static str> {
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
    dibit_cpu::missed_keys(Isa::detect(), layout, layer, &keys, &mut missed)?;
    Ok(out.memory.write(0, bytemuck::cast_slice(&missed))?)
}
