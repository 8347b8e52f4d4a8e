//! Packing on the host, for devices that keep their caches elsewhere and cannot pack every page themselves.

use super::append::{LayerBytes, LayerRows, Scratch, append};
use super::frames::Frames;
use super::simd::Isa;
use bytemuck::cast_slice_mut;
use dibit_cache::{CacheLayout, Span};
use dibit_device::DeviceError;

/// Packs tokens of caches of one layout. It holds no bytes of them.
pub struct HostPacker {
    isa: Isa,
    layout: CacheLayout,
    frames: Vec<Frames>,
    scratch: Vec<Scratch>,
}

impl HostPacker {
    /// A packer for caches of this layout.
    pub fn new(layout: &CacheLayout) -> Self {
        let frames = (0..layout.layers.len()).map(|layer| Frames::new(layout, layer)).collect();
        HostPacker { isa: Isa::detect(), layout: layout.clone(), frames, scratch: Vec::new() }
    }

    /// Stores the rows of a span in a layer, as [`dibit_device::KvStorage::append`] does.
    ///
    /// - `rows`: keys and values of the sequence outside of pages; `incoming` holds the rows of the span as the batch does.
    /// - `pages`: blocks that tokens enter ([`Span::filled_blocks`]): number, class, and the layer's pages of all heads.
    /// - `states`: those of the layer; empty where it has none.
    /// - `sinks`: positions that the layer protects, in the order of their slots.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`].
    pub fn append(
        &mut self,
        layer: usize,
        span: &Span,
        [keys, values]: [LayerRows; 2],
        pages: &mut [(u32, usize, Vec<u64>)],
        states: &mut [u64],
        sinks: &[u32],
    ) -> Result<(), DeviceError> {
        let pages = pages.iter_mut().map(|(block, class, bytes)| (*block, *class, cast_slice_mut(bytes))).collect();
        let bytes = LayerBytes { keys, values, pages, states: cast_slice_mut(states), sinks };
        append(self.isa, &self.layout, layer, &self.frames[layer], span, bytes, &mut self.scratch)
    }
}
