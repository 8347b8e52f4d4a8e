//! The bytes of a cache on the CPU.

use super::adapters::State;
use super::append::{LayerBytes, LayerRows, PARALLEL_TOKENS, Scratch, append, parts};
use super::frames::{Frames, HeadRotation};
use super::quantise::largest_magnitude;
use super::ring::{Which, runs};
use super::simd::Isa;
use dibit_cache::{Batch, CacheLayout, CacheShape, Powers, Span, StateType};
use dibit_device::DeviceError;
use half::f16;
use memmap2::MmapMut;
use rayon::prelude::*;
use std::ops::Range;

/// Pages, window rings, sinks and the keys and values of the pass in flight.
pub struct CpuStore {
    isa: Isa,
    layout: CacheLayout,
    frames: Vec<Frames>,
    /// `[block][layer][kv head][page]`; untouched memory is not resident.
    pages: MmapMut,
    keys: Rows,
    values: Rows,
    /// States of the linear correction, those of one sequence after the other; untouched memory is not resident.
    states: MmapMut,
    /// Positions that each layer of each sequence protects, `[sequence][layer]`, in the order of their slots.
    sink_positions: Vec<Vec<Vec<u32>>>,
    /// What the heads of each layer are divided by.
    powers: Vec<Powers>,
    /// Buffers of each frame of a layer.
    scratch: Vec<Scratch>,
}

/// Keys, or values, outside of pages.
struct Rows {
    side: Which,
    /// fp16 `[layer][sequence][kv head][slot][head_dim]`; token `t` lies in slot `t % slots`.
    ring: Slots,
    /// fp16 `[layer][sequence][kv head][slot][head_dim]`; a slot for each protected token.
    sinks: Slots,
    /// f32 `[kv head][row of the batch][head_dim]`.
    incoming: Vec<f32>,
}

/// fp16 rows of every (layer, sequence, KV head).
struct Slots {
    sequences: usize,
    count: usize,
    numbers: MmapMut,
}

fn map(what: &'static str, bytes: usize) -> Result<MmapMut, DeviceError> {
    MmapMut::map_anon(bytes.max(1)).map_err(|_| DeviceError::OutOfMemory { what, bytes })
}

impl CpuStore {
    /// Room for so many blocks and sequences, and for passes of up to `max_rows` rows.
    ///
    /// # Errors
    /// As of [`dibit_device::KvStorage::new_store`].
    pub fn new(
        isa: Isa,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let shape = layout.shape;
        let frames = (0..shape.num_layers).map(|layer| Frames::new(layout, layer)).collect();
        let row_count = shape.num_key_value_heads * max_rows * shape.head_dim;
        let heads = shape.num_layers * shape.num_key_value_heads * num_sequences;
        let slots = |what, count: usize| -> Result<Slots, DeviceError> {
            Ok(Slots {
                sequences: num_sequences,
                count,
                numbers: map(what, heads * count * shape.head_dim * size_of::<f16>())?,
            })
        };
        let rows = |side, count: usize| -> Result<Rows, DeviceError> {
            let sinks = slots("sinks", layout.sinks.capacity())?;
            Ok(Rows { side, ring: slots("window rings", count)?, sinks, incoming: vec![0.0; row_count] })
        };
        let pages = map("cache blocks", num_blocks * layout.block_bytes())?;
        // Advice: a kernel without huge pages is slower and nothing else.
        #[cfg(target_os = "linux")]
        pages.advise(memmap2::Advice::HugePage).ok();
        let first = layout.sinks.first_positions();
        Ok(CpuStore {
            isa,
            frames,
            pages,
            keys: rows(Which::Keys, layout.window.key_slots())?,
            values: rows(Which::Values, layout.window.value_slots())?,
            states: map("correction states", num_sequences * layout.state_bytes())?,
            sink_positions: vec![vec![first; shape.num_layers]; num_sequences],
            powers: vec![Powers::default(); shape.num_layers],
            scratch: Vec::new(),
            layout: layout.clone(),
        })
    }

    /// What it stores.
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    pub(super) fn frames(&self, layer: usize) -> &Frames {
        &self.frames[layer]
    }

    /// Bytes of the page of `block` that holds tokens of `class`.
    pub fn page(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> &[u8] {
        let offset = self.layout.page_offset(class, block, layer, kv_head);
        &self.pages[offset..offset + self.layout.layer(class, layer).pages[kv_head].bytes]
    }

    /// Positions that a layer of a sequence protects, in the order of their slots.
    pub fn sinks(&self, span: &Span, layer: usize) -> &[u32] {
        &self.sink_positions[span.slot as usize][layer]
    }

    /// [`dibit_device::KvStorage::set_sinks`].
    pub fn set_sinks(&mut self, layer: usize, slot: u32, positions: &[u32]) {
        let own = &mut self.sink_positions[slot as usize][layer];
        own.clear();
        own.extend_from_slice(positions);
    }

    /// [`dibit_device::KvStorage::set_powers`].
    pub fn set_powers(&mut self, layer: usize, powers: &Powers) {
        self.powers[layer].clone_from(powers);
    }

    /// What the heads of a layer are divided by.
    pub(super) fn powers(&self, layer: usize) -> &Powers {
        &self.powers[layer]
    }

    /// Key and value of a protected token, by its slot.
    pub fn sink(&self, span: &Span, layer: usize, kv_head: usize, slot: usize) -> [&[f16]; 2] {
        [&self.keys, &self.values].map(|rows| rows.sinks.row(&self.layout, span.slot, layer, kv_head, slot))
    }

    /// The state of the linear correction of a KV head.
    pub(super) fn state(&self, span: &Span, layer: usize, kv_head: usize) -> Option<State<'_>> {
        let own = self.layout.layers[layer].states.as_ref()?;
        let place = own.places[kv_head]?;
        let start = span.slot as usize * self.layout.state_bytes() + own.offset + place * own.head_bytes();
        let bytes = &self.states[start..start + own.numbers * own.states.bytes()];
        Some(match own.states {
            StateType::Fp32 => State::Fp32(bytemuck::cast_slice(bytes)),
            StateType::Fp16 => State::Fp16(bytemuck::cast_slice(bytes)),
        })
    }

    /// 16-bit keys of tokens `tokens` in the ring of a span, as up to two runs in the order of the tokens.
    pub(super) fn ring_keys(&self, span: &Span, layer: usize, kv_head: usize, tokens: Range<usize>) -> [&[f16]; 2] {
        self.keys.ring.runs(&self.layout, span.slot, layer, kv_head, tokens)
    }

    /// 16-bit values of tokens `tokens`; see [`CpuStore::ring_keys`].
    pub(super) fn ring_values(&self, span: &Span, layer: usize, kv_head: usize, tokens: Range<usize>) -> [&[f16]; 2] {
        self.values.ring.runs(&self.layout, span.slot, layer, kv_head, tokens)
    }

    /// Keys of these rows of the pass in flight.
    pub(super) fn incoming_keys(&self, kv_head: usize, rows: Range<usize>) -> &[f32] {
        self.keys.incoming(&self.layout, kv_head, rows)
    }

    /// Values of these rows of the pass in flight.
    pub(super) fn incoming_values(&self, kv_head: usize, rows: Range<usize>) -> &[f32] {
        self.values.incoming(&self.layout, kv_head, rows)
    }

    /// [`dibit_device::KvStorage::stage_kv`].
    ///
    /// # Errors
    /// As there.
    pub fn write(
        &mut self,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DeviceError> {
        for (side, source) in [(&mut self.keys, k), (&mut self.values, v)] {
            let keys = side.side == Which::Keys;
            let frames = &self.frames[layer];
            let rotation = if keys { &frames.keys } else { &frames.values };
            let factor = |kv_head| self.powers[layer].factor(keys, kv_head);
            side.write(self.isa, self.layout.shape, rotation.as_ref(), factor, rows.clone(), source).map_err(
                |(row, kv_head, value)| {
                    let span = batch.spans.iter().find(|span| span.rows.contains(&row)).expect("a row of the batch");
                    let token = span.cached + row - span.rows.start;
                    let side = if keys { "key" } else { "value" };
                    DeviceError::NotFinite { side, layer, kv_head, token, value }
                },
            )?;
        }
        Ok(())
    }

    /// Stores the rows of a span. The pages that they fill are one chunk.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`].
    pub fn append(&mut self, layer: usize, span: &Span) -> Result<(), DeviceError> {
        let Self { isa, layout, frames, pages, keys, values, states, sink_positions, scratch, .. } = self;
        let mut rest = &mut pages[..];
        let mut start = 0;
        let mut blocks = Vec::new();
        for (block, class) in span.filled_blocks(layout.leaving(layer, span.len()), span.cached..span.len()) {
            let offset = layout.page_offset(class, block, layer, 0);
            let behind = &mut rest[offset - start..];
            let bytes = layout.layer(class, layer).bytes();
            let (own, behind) = behind.split_at_mut(bytes);
            (rest, start) = (behind, offset + bytes);
            blocks.push((block, class, own));
        }
        let states = match &layout.layers[layer].states {
            Some(own) => &mut states[span.slot as usize * layout.state_bytes() + own.offset..][..own.bytes()],
            None => &mut [],
        };
        let bytes = LayerBytes {
            keys: keys.layer(layout, span.slot, layer),
            values: values.layer(layout, span.slot, layer),
            pages: blocks,
            states,
            sinks: &sink_positions[span.slot as usize][layer],
        };
        append(*isa, layout, layer, &frames[layer], span, bytes, scratch)
    }
}

impl Slots {
    fn start(&self, layout: &CacheLayout, sequence: u32, layer: usize, kv_head: usize) -> usize {
        let shape = layout.shape;
        let own = self.count * shape.head_dim;
        ((layer * self.sequences + sequence as usize) * shape.num_key_value_heads + kv_head) * own
    }

    fn row(&self, layout: &CacheLayout, sequence: u32, layer: usize, kv_head: usize, slot: usize) -> &[f16] {
        let d = layout.shape.head_dim;
        let start = self.start(layout, sequence, layer, kv_head) + slot * d;
        &bytemuck::cast_slice(&self.numbers)[start..start + d]
    }

    /// Rows of all heads of a layer of a sequence.
    fn heads_mut(&mut self, layout: &CacheLayout, sequence: u32, layer: usize) -> &mut [f16] {
        let start = self.start(layout, sequence, layer, 0);
        let numbers = layout.shape.num_key_value_heads * self.count * layout.shape.head_dim;
        bytemuck::cast_slice_mut(&mut self.numbers[start * size_of::<f16>()..][..numbers * size_of::<f16>()])
    }

    /// Rows of consecutive tokens.
    fn runs(
        &self,
        layout: &CacheLayout,
        sequence: u32,
        layer: usize,
        kv_head: usize,
        tokens: Range<usize>,
    ) -> [&[f16]; 2] {
        let d = layout.shape.head_dim;
        let start = self.start(layout, sequence, layer, kv_head);
        runs(&bytemuck::cast_slice(&self.numbers)[start..start + self.count * d], d, tokens)
    }
}

impl Rows {
    fn incoming(&self, layout: &CacheLayout, kv_head: usize, rows: Range<usize>) -> &[f32] {
        let shape = layout.shape;
        let head = self.incoming.len() / shape.num_key_value_heads;
        let start = kv_head * head;
        &self.incoming[start + rows.start * shape.head_dim..start + rows.end * shape.head_dim]
    }

    /// Writes rows of the pass in flight, rotated and multiplied by the factor of their KV head. Of numbers that fp16 would
    /// round to infinity the first one is refused, with its row and KV head.
    fn write(
        &mut self,
        isa: Isa,
        shape: CacheShape,
        rotation: Option<&HeadRotation>,
        factor: impl Fn(usize) -> f32 + Sync,
        rows: Range<usize>,
        source: &[f32],
    ) -> Result<(), (usize, usize, f32)> {
        let (heads, d) = (shape.num_key_value_heads, shape.head_dim);
        let write = |(kv_head, incoming): (usize, &mut [f32])| {
            let mut buffer = Vec::new();
            for (row, source) in rows.clone().zip(source.chunks_exact(heads * d)) {
                let target = &mut incoming[row * d..][..d];
                target.copy_from_slice(&source[kv_head * d..][..d]);
                if let Some(rotation) = rotation {
                    rotation.apply(isa, kv_head, target, &mut buffer);
                }
                let factor = factor(kv_head);
                if factor != 1.0 {
                    target.iter_mut().for_each(|x| *x *= factor);
                }
                let (limit, largest) = (f16::MAX.to_f32(), largest_magnitude(isa, target));
                if largest.is_nan() || largest > limit {
                    let value = target.iter().find(|value| !(-limit..=limit).contains(*value));
                    return Some((row, kv_head, *value.expect("a large number")));
                }
            }
            None
        };
        let all = parts(&mut self.incoming, heads).enumerate();
        let refused: Vec<_> = if rows.len() < PARALLEL_TOKENS {
            all.map(write).collect()
        } else {
            all.collect::<Vec<_>>().into_par_iter().map(write).collect()
        };
        refused.into_iter().flatten().min_by_key(|(row, ..)| *row).map_or(Ok(()), Err)
    }

    /// The rows of a layer of a sequence.
    fn layer(&mut self, layout: &CacheLayout, sequence: u32, layer: usize) -> LayerRows<'_> {
        LayerRows {
            ring: self.ring.heads_mut(layout, sequence, layer),
            sinks: self.sinks.heads_mut(layout, sequence, layer),
            incoming: &self.incoming,
        }
    }
}
