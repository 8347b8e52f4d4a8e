//! Packing on the host, for pages that hold low-rank factors or outliers: what a sequence has in a layer is read from the GPU
//! when tokens leave its window, and written back.

use super::side::Side;
use crate::CudaError;
use crate::memory::Memory;
use bytemuck::Zeroable;
use dibit_cache::{CacheLayout, Span};
use dibit_cpu::{HostPacker, LayerRows};
use dibit_device::DeviceError;
use half::f16;
use std::ops::Range;

pub(super) struct HostPacking {
    packer: HostPacker,
    /// Keys and values outside of pages.
    sides: [Rows; 2],
}

/// Keys, or values, of a sequence outside of pages, `[kv head][slot][head_dim]`.
#[derive(Default)]
struct Rows {
    ring: Vec<f16>,
    sinks: Vec<f16>,
    incoming: Vec<f32>,
}

/// The bytes of a sequence in a layer, on the GPU.
pub(super) struct Bytes<'a> {
    pub pool: &'a Memory,
    pub sides: [&'a Side; 2],
    pub states: &'a Memory,
    /// Number of the sequence among those of all layers.
    pub sequence: usize,
    /// Rows of a pass.
    pub max_rows: usize,
    /// Protected positions.
    pub sinks: &'a [u32],
}

impl HostPacking {
    pub(super) fn new(layout: &CacheLayout) -> Self {
        HostPacking { packer: HostPacker::new(layout), sides: Default::default() }
    }

    /// Packs what leaves the window while the rows of a span are stored.
    pub(super) fn append(
        &mut self,
        layout: &CacheLayout,
        layer: usize,
        span: &Span,
        of: &Bytes,
    ) -> Result<(), DeviceError> {
        let blocks = span.filled_blocks(layout.leaving(layer, span.len()), span.cached..span.len());
        if blocks.is_empty() {
            return Ok(());
        }
        let sink_numbers = layout.sinks.capacity() * layout.shape.row();
        for (own, side) in self.sides.iter_mut().zip(of.sides) {
            let numbers = side.slots * layout.shape.row();
            read(&side.ring, of.sequence * numbers, numbers, &mut own.ring)?;
            read(&side.sinks, of.sequence * sink_numbers, sink_numbers, &mut own.sinks)?;
            own.read_incoming(layout, side, span.rows.clone(), of.max_rows)?;
        }
        let mut pages = Vec::new();
        for (block, class) in blocks {
            // Words, for pages hold numbers that must be aligned.
            let mut words = vec![0; layout.layer(class, layer).bytes() / size_of::<u64>()];
            of.pool.read(layout.page_offset(class, block, layer, 0), bytemuck::cast_slice_mut(&mut words))?;
            pages.push((block, class, words));
        }
        let (mut states, mut states_at) = (Vec::new(), 0);
        if let Some(own) = &layout.layers[layer].states {
            states_at = span.slot as usize * layout.state_bytes() + own.offset;
            states.resize(own.bytes() / size_of::<u64>(), 0u64);
            of.states.read(states_at, bytemuck::cast_slice_mut(&mut states))?;
        }
        let own = Span { rows: 0..span.rows.len(), ..span.clone() };
        let rows = self.sides.each_mut().map(|own| LayerRows {
            ring: &mut own.ring,
            sinks: &mut own.sinks,
            incoming: &own.incoming,
        });
        self.packer.append(layer, &own, rows, &mut pages, &mut states, of.sinks)?;
        for (block, class, words) in &pages {
            of.pool.write(layout.page_offset(*class, *block, layer, 0), bytemuck::cast_slice(words))?;
        }
        for (own, side) in self.sides.iter().zip(of.sides) {
            side.sinks.write(of.sequence * sink_numbers * size_of::<f16>(), bytemuck::cast_slice(&own.sinks))?;
        }
        Ok(of.states.write(states_at, bytemuck::cast_slice(&states))?)
    }
}

impl Rows {
    fn read_incoming(
        &mut self,
        layout: &CacheLayout,
        side: &Side,
        rows: Range<usize>,
        max_rows: usize,
    ) -> Result<(), CudaError> {
        let d = layout.shape.head_dim;
        self.incoming.clear();
        for head in 0..layout.shape.num_key_value_heads {
            let mut own = Vec::new();
            read::<f32>(&side.incoming, (head * max_rows + rows.start) * d, rows.len() * d, &mut own)?;
            self.incoming.extend(own);
        }
        Ok(())
    }
}

/// Reads numbers from number `first` on.
fn read<T: bytemuck::Pod + Zeroable>(
    from: &Memory,
    first: usize,
    numbers: usize,
    to: &mut Vec<T>,
) -> Result<(), CudaError> {
    to.resize(numbers, T::zeroed());
    from.read(first * size_of::<T>(), bytemuck::cast_slice_mut(to))
}
