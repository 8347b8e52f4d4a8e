//! The bytes of a cache on the CPU.

use super::adapters::{State, StateMut};
use super::append::{Frame, FrameRows, Scratch, blocks, leaving};
use super::frames::{Frames, HeadRotation};
use super::quantise::largest_magnitude;
use super::simd::Isa;
use super::sinks::Protected;
use crate::{Batch, DeviceError, Span};
use dibit_cache::{CacheLayout, CacheShape, Extras, PAGE_TOKENS, StateType};
use half::f16;
use memmap2::MmapMut;
use rayon::prelude::*;
use std::ops::Range;

/// Tokens from which it is worth several threads to move them.
const PARALLEL_TOKENS: usize = 8;

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
    sequences: Vec<SequenceState>,
    /// Buffers of each frame of a layer.
    scratch: Vec<Scratch>,
}

/// What one sequence holds beside pages and window.
struct SequenceState {
    protected: Protected,
    /// For each block, the first block of its chunk.
    chunks: Vec<u32>,
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

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    Keys,
    Values,
}

fn map(what: &'static str, bytes: usize) -> Result<MmapMut, DeviceError> {
    MmapMut::map_anon(bytes.max(1)).map_err(|_| DeviceError::OutOfMemory { what, bytes })
}

impl CpuStore {
    /// Room for so many blocks and sequences, and for passes of up to `max_rows` rows.
    ///
    /// # Errors
    /// As of [`crate::Device::store`].
    pub fn new(
        isa: Isa,
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let shape = layout.shape;
        let frames: Option<Vec<Frames>> = (0..shape.num_layers).map(|layer| Frames::new(layout, layer)).collect();
        let frames = frames.ok_or_else(|| DeviceError::Tables(layout.scheme_name().to_owned()))?;
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
        let state = || SequenceState { protected: Protected::new(layout.sinks, shape.num_layers), chunks: Vec::new() };
        Ok(CpuStore {
            isa,
            frames,
            pages,
            keys: rows(Which::Keys, layout.window.key_slots())?,
            values: rows(Which::Values, layout.window.value_slots())?,
            states: map("correction states", num_sequences * layout.state_bytes())?,
            sequences: (0..num_sequences).map(|_| state()).collect(),
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

    /// The first block of the chunk that block number `index` of a sequence belongs to.
    pub(super) fn chunk_start(&self, span: &Span, index: usize) -> usize {
        self.sequences[span.slot as usize].chunks.get(index).map_or(index, |first| *first as usize)
    }

    /// Positions that a layer of a sequence protects, in the order of their slots.
    pub fn sinks(&self, span: &Span, layer: usize) -> &[u32] {
        self.sequences[span.slot as usize].protected.layer(layer)
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

    /// Where the states of a layer of a sequence lie among all, and their bytes; `None` where it has none.
    pub fn state_bytes(&self, span: &Span, layer: usize) -> Option<(usize, &[u8])> {
        let own = self.layout.layers[layer].states.as_ref()?;
        let start = span.slot as usize * self.layout.state_bytes() + own.offset;
        Some((start, &self.states[start..start + own.bytes()]))
    }

    /// What a sequence of `len` tokens holds beside pages and window.
    pub(super) fn extras(&self, sequence: u32, len: usize) -> Extras {
        let state = &self.sequences[sequence as usize];
        extras(&self.layout, &state.protected, &state.chunks, len)
    }

    /// Lets a layer choose which tokens of prompts it protects.
    pub fn observe(&mut self, layer: usize, batch: &Batch, hidden: &[f32], width: usize) {
        for span in &batch.spans {
            // Tokens that are decoded one by one are never protected for their activations.
            if span.rows.len() > 1 || span.cached == 0 {
                let tokens = span.cached..span.cached + span.rows.len();
                let hidden = &hidden[span.rows.start * width..span.rows.end * width];
                let state = &mut self.sequences[span.slot as usize];
                state.protected.choose(self.layout.sinks, layer, tokens, hidden, width);
            }
        }
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

    /// [`crate::Device::write_kv`].
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
            let frames = &self.frames[layer];
            let rotation = if side.side == Which::Keys { &frames.keys } else { &frames.values };
            side.write(self.isa, self.layout.shape, rotation.as_ref(), rows.clone(), source).map_err(
                |(row, value)| {
                    let span = batch.spans.iter().find(|span| span.rows.contains(&row)).expect("a row of the batch");
                    let token = span.cached + row - span.rows.start;
                    let side = if side.side == Which::Keys { "key" } else { "value" };
                    DeviceError::NotFinite { side, layer, token, value }
                },
            )?;
        }
        Ok(())
    }

    /// Stores `rows` of a span as its tokens from `position` on. The pages that they fill are one chunk.
    ///
    /// # Errors
    /// [`DeviceError::Quantize`].
    pub fn append(
        &mut self,
        layer: usize,
        span: &Span,
        rows: Range<usize>,
        position: usize,
    ) -> Result<(), DeviceError> {
        let cached = position..position + rows.len();
        let leaving = leaving(&self.layout, cached.clone());
        let tokens = leaving.iter().map(Range::len).fold(rows.len(), usize::max);
        let frames = self.split(layer, span, blocks(span, leaving));
        let append = |mut frame: Frame| frame.append(rows.clone(), position);
        let done: Vec<_> = if tokens < PARALLEL_TOKENS {
            frames.into_iter().map(append).collect()
        } else {
            frames.into_par_iter().map(append).collect()
        };
        // Of several errors the first frame's is told, whichever thread was first.
        done.into_iter().collect::<Result<(), _>>().map_err(|source| DeviceError::Quantize { layer, source })?;
        if self.layout.chunk_bytes() > 0 {
            let filled = [cached.start, cached.end].map(|len| self.layout.window.packed_keys(len) / PAGE_TOKENS);
            let chunks = &mut self.sequences[span.slot as usize].chunks;
            chunks.resize(chunks.len().max(filled[1]), 0);
            chunks[filled[0]..filled[1]].fill(filled[0] as u32);
        }
        Ok(())
    }

    /// The frames of a layer, with their pages in these blocks.
    fn split<'a>(&'a mut self, layer: usize, span: &'a Span, blocks: Vec<(u32, usize)>) -> Vec<Frame<'a>> {
        let Self { isa, layout, frames, pages, keys, values, states, sequences, scratch } = self;
        let heads = layout.layers[layer].frame;
        let count = layout.shape.num_key_value_heads / heads;
        scratch.resize_with(count.max(scratch.len()), Default::default);
        let mut pages = split_pages(layout, pages, layer, blocks, count).into_iter();
        let mut keys = keys.split(layout, span.slot, layer, count);
        let mut values = values.split(layout, span.slot, layer, count);
        let mut states = split_states(layout, states, layer, span.slot).into_iter();
        let frame = |(index, scratch)| Frame {
            isa: *isa,
            layout,
            layer,
            span,
            first_head: index * heads,
            rotations: &frames[layer],
            protected: &sequences[span.slot as usize].protected,
            keys: keys.next().expect("keys of every frame"),
            values: values.next().expect("values of every frame"),
            pages: pages.next().expect("pages of every frame"),
            state: states.next().flatten(),
            scratch,
        };
        scratch.iter_mut().take(count).enumerate().map(frame).collect()
    }
}

/// What a sequence of `len` tokens holds beside pages and window: of each layer the protected tokens that are packed, and
/// the chunks that its blocks begin, `chunks` having for each block the first one of its chunk.
pub fn extras(layout: &CacheLayout, protected: &Protected, chunks: &[u32], len: usize) -> Extras {
    let packed = layout.window.packed_keys(len);
    let own = |layer: usize| protected.layer(layer).iter().filter(|token| (**token as usize) < packed).count();
    let begins = |(block, first): (usize, &u32)| block == *first as usize;
    Extras {
        sinks: (0..layout.layers.len()).map(own).sum(),
        chunks: match layout.chunk_bytes() {
            0 => 0,
            _ => chunks.iter().take(packed / PAGE_TOKENS).enumerate().filter(|block| begins(*block)).count(),
        },
    }
}

/// `count` parts of equal length.
fn parts<T>(mut all: &mut [T], count: usize) -> impl Iterator<Item = &mut [T]> {
    let len = all.len() / count;
    (0..count).map(move |_| {
        let (own, rest) = std::mem::take(&mut all).split_at_mut(len);
        all = rest;
        own
    })
}

/// For each of `count` frames of a layer, its pages in `blocks`, which are pairs of block and class, in order.
fn split_pages<'a>(
    layout: &CacheLayout,
    mut rest: &'a mut [u8],
    layer: usize,
    blocks: Vec<(u32, usize)>,
    count: usize,
) -> Vec<Vec<(u32, &'a mut [u8])>> {
    let mut frames: Vec<Vec<_>> = (0..count).map(|_| Vec::with_capacity(blocks.len())).collect();
    let mut start = 0;
    for (block, class) in blocks {
        let offset = layout.page_offset(class, block, layer, 0);
        rest = &mut rest[offset - start..];
        start = offset;
        let all = &layout.layer(class, layer).pages;
        for (frame, heads) in frames.iter_mut().zip(all.chunks(all.len() / count)) {
            let bytes = heads.iter().map(|head| head.bytes).sum();
            let (own, behind) = std::mem::take(&mut rest).split_at_mut(bytes);
            (rest, start) = (behind, start + bytes);
            frame.push((block, own));
        }
    }
    frames
}

/// The states of the KV heads of a layer of a sequence; empty where the layer has none.
fn split_states<'a>(layout: &CacheLayout, all: &'a mut [u8], layer: usize, slot: u32) -> Vec<Option<StateMut<'a>>> {
    let Some(own) = &layout.layers[layer].states else { return Vec::new() };
    let start = slot as usize * layout.state_bytes() + own.offset;
    let mut heads = all[start..start + own.bytes()].chunks_exact_mut(own.head_bytes());
    let head = |place: &Option<usize>| {
        let bytes = place.and_then(|_| heads.next())?;
        let bytes = &mut bytes[..own.numbers * own.states.bytes()];
        Some(match own.states {
            StateType::Fp32 => StateMut::Fp32(bytemuck::cast_slice_mut(bytes)),
            StateType::Fp16 => StateMut::Fp16(bytemuck::cast_slice_mut(bytes)),
        })
    };
    own.places.iter().map(head).collect()
}

/// Rows of consecutive tokens in the ring of a head, token `t` in slot `t % slots`, as up to two runs.
pub(super) fn runs(ring: &[f16], head_dim: usize, tokens: Range<usize>) -> [&[f16]; 2] {
    let count = ring.len() / head_dim;
    debug_assert!(tokens.len() <= count);
    let first = tokens.start % count;
    let until_wrap = tokens.len().min(count - first);
    [&ring[first * head_dim..(first + until_wrap) * head_dim], &ring[..(tokens.len() - until_wrap) * head_dim]]
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

    /// Writes rows of the pass in flight, rotated. Of numbers that fp16 would round to infinity the first one is refused,
    /// with its row.
    fn write(
        &mut self,
        isa: Isa,
        shape: CacheShape,
        rotation: Option<&HeadRotation>,
        rows: Range<usize>,
        source: &[f32],
    ) -> Result<(), (usize, f32)> {
        let (heads, d) = (shape.num_key_value_heads, shape.head_dim);
        let write = |(kv_head, incoming): (usize, &mut [f32])| {
            let mut buffer = Vec::new();
            for (row, source) in rows.clone().zip(source.chunks_exact(heads * d)) {
                let target = &mut incoming[row * d..][..d];
                target.copy_from_slice(&source[kv_head * d..][..d]);
                if let Some(rotation) = rotation {
                    rotation.apply(isa, kv_head, target, &mut buffer);
                }
                let (limit, largest) = (f16::MAX.to_f32(), largest_magnitude(isa, target));
                if largest.is_nan() || largest > limit {
                    let value = target.iter().find(|value| !(-limit..=limit).contains(*value));
                    return Some((row, *value.expect("a large number")));
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
        refused.into_iter().flatten().min_by_key(|(row, _)| *row).map_or(Ok(()), Err)
    }

    /// The rows of each of `count` frames of heads.
    fn split(
        &mut self,
        layout: &CacheLayout,
        sequence: u32,
        layer: usize,
        count: usize,
    ) -> impl Iterator<Item = FrameRows<'_>> {
        let rings = parts(self.ring.heads_mut(layout, sequence, layer), count);
        let sinks = parts(self.sinks.heads_mut(layout, sequence, layer), count);
        let incoming = self.incoming.chunks(self.incoming.len() / count);
        rings.zip(sinks).zip(incoming).map(|((ring, sinks), incoming)| FrameRows { ring, sinks, incoming })
    }
}
