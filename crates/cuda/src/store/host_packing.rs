//! Packing on the host, for pages that hold low-rank factors or outliers: a cache of the CPU beside that of the GPU, which
//! gets what changes in it.

use crate::CudaError;
use crate::device::Buffer;
use crate::memory::Memory;
use dibit_cache::CacheLayout;
use dibit_device::host::{CpuStore, blocks, leaving};
use dibit_device::{Batch, DeviceError, Isa, Span};
use half::f16;
use std::ops::Range;

pub(super) struct HostPacking {
    cache: CpuStore,
    /// Rows on their way to the host.
    rows: [Vec<f32>; 2],
}

/// What on the GPU is written.
pub(super) struct Target<'a> {
    pub pool: &'a Memory,
    /// Protected keys and values, fp16 `[layer][sequence][kv head][sink][head_dim]`.
    pub sinks: [&'a Memory; 2],
    pub states: &'a Memory,
    pub num_sequences: usize,
}

impl HostPacking {
    pub(super) fn new(
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let cache = CpuStore::new(Isa::detect(), layout, num_blocks, num_sequences, max_rows)?;
        Ok(HostPacking { cache, rows: Default::default() })
    }

    pub(super) fn observe(
        &mut self,
        layer: usize,
        batch: &Batch,
        hidden: &Buffer,
        width: usize,
    ) -> Result<(), CudaError> {
        let rows = &mut self.rows[0];
        download(hidden, batch.rows() * width, rows)?;
        self.cache.observe(layer, batch, rows, width);
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &Buffer,
        v: &Buffer,
    ) -> Result<(), DeviceError> {
        let numbers = rows.len() * self.cache.layout().shape.row();
        let [keys, values] = &mut self.rows;
        download(k, numbers, keys)?;
        download(v, numbers, values)?;
        self.cache.write(layer, batch, rows, keys, values)
    }

    /// Stores the rows of a span, and tells the GPU which pages, protected tokens and states that has changed.
    pub(super) fn append(
        &mut self,
        layout: &CacheLayout,
        layer: usize,
        span: &Span,
        to: &Target,
    ) -> Result<(), DeviceError> {
        let cache = &mut self.cache;
        cache.append(layer, span, span.rows.clone(), span.cached)?;
        let heads = layout.shape.num_key_value_heads;
        let leaving = leaving(layout, span.cached..span.cached + span.rows.len());
        for (block, class) in blocks(span, leaving.clone()) {
            for head in 0..heads {
                to.pool.write(layout.page_offset(class, block, layer, head), cache.page(class, block, layer, head))?;
            }
        }
        let capacity = layout.sinks.capacity();
        let row_bytes = layout.shape.head_dim * size_of::<f16>();
        for (slot, token) in cache.sinks(span, layer).iter().enumerate() {
            if !leaving.iter().any(|tokens| tokens.contains(&(*token as usize))) {
                continue;
            }
            for head in 0..heads {
                let sequence = layer * to.num_sequences + span.slot as usize;
                let at = ((sequence * heads + head) * capacity + slot) * row_bytes;
                for (memory, row) in to.sinks.iter().zip(cache.sink(span, layer, head, slot)) {
                    memory.write(at, bytemuck::cast_slice(row))?;
                }
            }
        }
        match cache.state_bytes(span, layer).filter(|_| !leaving[0].is_empty()) {
            Some((at, bytes)) => Ok(to.states.write(at, bytes)?),
            None => Ok(()),
        }
    }
}

fn download(from: &Buffer, numbers: usize, to: &mut Vec<f32>) -> Result<(), CudaError> {
    to.resize(numbers, 0.0);
    from.memory.read(0, bytemuck::cast_slice_mut(to))
}
