//! The bytes of a cache on the CPU, and how tokens enter them.

use super::encode::{Encoder, Tokens, write_chunk_factor, write_page_factor};
use super::frames::Frames;
use super::simd::Isa;
use super::sinks::Protected;
use crate::{Batch, DeviceError, Span};
use dibit_cache::{CacheLayout, ClassTokens, Extras, PAGE_TOKENS, SideLayout};
use dibit_quant::{QuantError, low_rank};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::MmapMut;
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
    sequences: Vec<SequenceState>,
    scratch: Scratch,
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
    count: usize,
    numbers: MmapMut,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Keys,
    Values,
}

/// Buffers of the encoder.
#[derive(Default)]
struct Scratch {
    encoder: Encoder,
    /// `[kv head of a frame][token][head_dim]` on the way into pages.
    wide: Vec<f32>,
    /// Channels of a frame.
    frame: Vec<f32>,
    row: Vec<f32>,
    sinks: Vec<bool>,
    /// What the codes of a chunk miss, `[token][head_dim]`: keys and values of each head of a frame.
    errors: Vec<[Vec<f32>; 2]>,
}

fn map(what: &'static str, bytes: usize) -> Result<MmapMut, DeviceError> {
    MmapMut::map_anon(bytes.max(1)).map_err(|_| DeviceError::OutOfMemory { what, bytes })
}

impl CpuStore {
    pub(super) fn new(
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
            Ok(Slots { count, numbers: map(what, heads * count * shape.head_dim * size_of::<f16>())? })
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
            sequences: (0..num_sequences).map(|_| state()).collect(),
            scratch: Scratch::default(),
            layout: layout.clone(),
        })
    }

    pub(super) fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    pub(super) fn frames(&self, layer: usize) -> &Frames {
        &self.frames[layer]
    }

    /// Bytes of the page of `block` that holds tokens of `class`.
    pub(super) fn page(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> &[u8] {
        let offset = self.layout.page_offset(class, block, layer, kv_head);
        &self.pages[offset..offset + self.layout.layer(class, layer).page.stride]
    }

    /// The first block of the chunk that block number `index` of a sequence belongs to.
    pub(super) fn chunk_start(&self, span: &Span, index: usize) -> usize {
        self.sequences[span.slot as usize].chunks.get(index).map_or(index, |first| *first as usize)
    }

    /// Positions that a layer of a sequence protects, in the order of their slots.
    pub(super) fn sinks(&self, span: &Span, layer: usize) -> &[u32] {
        self.sequences[span.slot as usize].protected.layer(layer)
    }

    /// Key and value of a protected token, by its slot.
    pub(super) fn sink(&self, span: &Span, layer: usize, kv_head: usize, slot: usize) -> [&[f16]; 2] {
        [&self.keys, &self.values].map(|rows| rows.sinks.row(&self.layout, span.slot, layer, kv_head, slot))
    }

    /// What a sequence of `len` tokens holds beside pages and window.
    pub(super) fn extras(&self, sequence: u32, len: usize) -> Extras {
        let state = &self.sequences[sequence as usize];
        let packed = self.layout.window.packed_keys(len);
        let own =
            |layer: usize| state.protected.layer(layer).iter().filter(|token| (**token as usize) < packed).count();
        let blocks = packed / PAGE_TOKENS;
        let begins = |(block, first): (usize, &u32)| block == *first as usize;
        Extras {
            sinks: (0..self.layout.layers.len()).map(own).sum(),
            chunks: match self.layout.chunk_bytes() {
                0 => 0,
                _ => state.chunks.iter().take(blocks).enumerate().filter(|block| begins(*block)).count(),
            },
        }
    }

    /// Lets a layer choose which tokens of prompts it protects.
    pub(super) fn observe(&mut self, layer: usize, batch: &Batch, hidden: &[f32], width: usize) {
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

    pub(super) fn write(
        &mut self,
        layer: usize,
        batch: &Batch,
        rows: Range<usize>,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DeviceError> {
        for (side, source) in [(&mut self.keys, k), (&mut self.values, v)] {
            side.write(&self.layout, &self.frames[layer], rows.clone(), source, &mut self.scratch.row).map_err(
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
    pub(super) fn append(
        &mut self,
        layer: usize,
        span: &Span,
        rows: Range<usize>,
        position: usize,
    ) -> Result<(), DeviceError> {
        let frame = self.layout.layers[layer].frame;
        let filled = [position, position + rows.len()].map(|len| self.layout.window.packed_keys(len) / PAGE_TOKENS);
        for first_head in (0..self.layout.shape.num_key_value_heads).step_by(frame) {
            let heads = first_head..first_head + frame;
            self.scratch.errors.resize_with(frame, Default::default);
            self.scratch.errors.iter_mut().flatten().for_each(Vec::clear);
            for (i, row) in rows.clone().enumerate() {
                let token = position + i;
                for kv_head in heads.clone() {
                    self.keys.append(&self.layout, span.slot, layer, kv_head, token, row);
                    self.values.append(&self.layout, span.slot, layer, kv_head, token, row);
                }
                self.flush(layer, span, heads.clone(), token)
                    .map_err(|source| DeviceError::Quantize { layer, source })?;
            }
            for index in 0..frame {
                self.finish_chunk(layer, span, first_head, index, filled[0]..filled[1])
                    .map_err(|source| DeviceError::Quantize { layer, source })?;
            }
        }
        Ok(())
    }

    /// Moves what leaves the window once `token` is cached.
    fn flush(&mut self, layer: usize, span: &Span, heads: Range<usize>, token: usize) -> Result<(), QuantError> {
        let window = self.layout.window;
        let keys = window.packed_keys(token)..window.packed_keys(token + 1);
        let values = window.packed_values(token)..window.packed_values(token + 1);
        for (which, tokens) in [(Which::Keys, keys), (Which::Values, values)] {
            let mut first = tokens.start;
            while first < tokens.end {
                let place = place(span, first);
                // Tokens of a class go one by one to its next slots.
                let room = if span.classes.is_empty() { PAGE_TOKENS - place.slot } else { 1 };
                let last = tokens.end.min(first + room);
                self.fill_page(layer, span, heads.clone(), which, first..last, place)?;
                first = last;
            }
        }
        Ok(())
    }

    /// Writes tokens of one page, for the heads of a frame, from `place` on.
    fn fill_page(
        &mut self,
        layer: usize,
        span: &Span,
        heads: Range<usize>,
        which: Which,
        tokens: Range<usize>,
        place: Place,
    ) -> Result<(), QuantError> {
        let Self { isa, layout, frames, pages, keys, values, sequences, scratch } = self;
        let d = layout.shape.head_dim;
        let own = layout.layer(place.class, layer);
        let (rows, side) = match which {
            Which::Keys => (keys, own.page.keys),
            Which::Values => (values, own.page.values),
        };
        let state = &mut sequences[span.slot as usize];
        scratch.sinks.clear();
        for token in tokens.clone() {
            let slot = state.protected.slot(layer, token);
            scratch.sinks.push(slot.is_some());
            if let Some(slot) = slot {
                heads.clone().for_each(|head| rows.keep_sink(layout, span.slot, layer, head, token, slot));
            }
        }
        let pre_rope = frames[layer].pre_rope.as_ref().filter(|_| which == Which::Keys);
        let per_head = tokens.len() * d;
        scratch.wide.resize(heads.len() * per_head, 0.0);
        for (index, kv_head) in heads.clone().enumerate() {
            let mut wide = &mut scratch.wide[index * per_head..(index + 1) * per_head];
            for run in rows.ring.runs(layout, span.slot, layer, kv_head, tokens.clone()) {
                let (now, rest) = wide.split_at_mut(run.len());
                run.convert_to_f32_slice(now);
                wide = rest;
            }
        }
        if let Some(pre_rope) = pre_rope {
            scratch.frame.resize(heads.len() * d, 0.0);
            for (i, token) in tokens.clone().enumerate() {
                let at = |index: usize| index * per_head + i * d;
                for (index, head) in scratch.frame.chunks_exact_mut(d).enumerate() {
                    head.copy_from_slice(&scratch.wide[at(index)..at(index) + d]);
                }
                pre_rope.store(heads.start, token, &mut scratch.frame, &mut scratch.row);
                for (index, head) in scratch.frame.chunks_exact(d).enumerate() {
                    scratch.wide[at(index)..at(index) + d].copy_from_slice(head);
                }
            }
        }
        let slots = place.slot..place.slot + tokens.len();
        for ((index, kv_head), wide) in heads.enumerate().zip(scratch.wide.chunks_exact_mut(per_head)) {
            let offset = layout.page_offset(place.class, place.block, layer, kv_head);
            let page = &mut pages[offset..offset + own.page.stride];
            match side {
                SideLayout::Half { rows } => {
                    let row_bytes = d * size_of::<f16>();
                    let target = &mut page[rows + slots.start * row_bytes..rows + slots.end * row_bytes];
                    bytemuck::cast_slice_mut::<u8, f16>(target).convert_from_f32_slice(wide);
                }
                SideLayout::Packed(side) => {
                    let tokens = Tokens { values: wide, head_dim: d, slots: slots.clone(), sinks: &scratch.sinks };
                    let error = &mut scratch.errors[index][usize::from(which == Which::Values)];
                    scratch.encoder.encode(*isa, &side, tokens, page, error)?;
                }
            }
        }
        Ok(())
    }

    /// Factors what the codes of newly filled pages miss, for head `index` of the frame that begins at `first_head`.
    fn finish_chunk(
        &mut self,
        layer: usize,
        span: &Span,
        first_head: usize,
        index: usize,
        blocks: Range<usize>,
    ) -> Result<(), QuantError> {
        let page_layout = self.layout.layers[layer].page;
        for (side, error) in [page_layout.keys, page_layout.values].into_iter().zip(&self.scratch.errors[index]) {
            let SideLayout::Packed(side) = side else { continue };
            let Some(factors) = side.factors.filter(|_| !blocks.is_empty()) else { continue };
            let all = low_rank(error, self.layout.shape.head_dim, factors.rank);
            for (place, block) in blocks.clone().enumerate() {
                let offset = self.layout.page_offset(0, span.blocks[block], layer, first_head + index);
                let page = &mut self.pages[offset..offset + page_layout.stride];
                write_page_factor(factors, &all, place, page)?;
                if place == 0 {
                    write_chunk_factor(factors, &all, page)?;
                }
            }
            let chunks = &mut self.sequences[span.slot as usize].chunks;
            chunks.resize(chunks.len().max(blocks.end), 0);
            chunks[blocks.clone()].fill(blocks.start as u32);
        }
        Ok(())
    }
}

/// Where a packed token lies.
#[derive(Clone, Copy)]
struct Place {
    class: usize,
    block: u32,
    slot: usize,
}

fn place(span: &Span, token: usize) -> Place {
    let in_class = |(class, own): (usize, &ClassTokens)| {
        let index = own.tokens.binary_search(&(token as u32)).ok()?;
        Some(Place { class, block: own.blocks[index / PAGE_TOKENS], slot: index % PAGE_TOKENS })
    };
    let without = || Place { class: 0, block: span.blocks[token / PAGE_TOKENS], slot: token % PAGE_TOKENS };
    span.classes.iter().enumerate().find_map(in_class).unwrap_or_else(without)
}

impl Slots {
    fn start(&self, layout: &CacheLayout, sequence: u32, layer: usize, kv_head: usize) -> usize {
        let shape = layout.shape;
        let own = self.count * shape.head_dim;
        let sequences = self.numbers.len() / size_of::<f16>() / (shape.num_layers * shape.num_key_value_heads * own);
        ((layer * sequences + sequence as usize) * shape.num_key_value_heads + kv_head) * own
    }

    fn row(&self, layout: &CacheLayout, sequence: u32, layer: usize, kv_head: usize, slot: usize) -> &[f16] {
        let d = layout.shape.head_dim;
        let start = self.start(layout, sequence, layer, kv_head) + slot * d;
        &bytemuck::cast_slice(&self.numbers)[start..start + d]
    }

    fn row_mut(
        &mut self,
        layout: &CacheLayout,
        sequence: u32,
        layer: usize,
        kv_head: usize,
        slot: usize,
    ) -> &mut [f16] {
        let d = layout.shape.head_dim;
        let start = self.start(layout, sequence, layer, kv_head) + slot * d;
        &mut bytemuck::cast_slice_mut(&mut self.numbers)[start..start + d]
    }

    /// Rows of consecutive tokens, token `t` in slot `t % count`.
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
        let all = &bytemuck::cast_slice::<u8, f16>(&self.numbers)[start..start + self.count * d];
        debug_assert!(tokens.len() <= self.count);
        let first = tokens.start % self.count;
        let until_wrap = tokens.len().min(self.count - first);
        [&all[first * d..(first + until_wrap) * d], &all[..(tokens.len() - until_wrap) * d]]
    }
}

impl Rows {
    fn incoming(&self, layout: &CacheLayout, kv_head: usize, rows: Range<usize>) -> &[f32] {
        let shape = layout.shape;
        let head = self.incoming.len() / shape.num_key_value_heads;
        let start = kv_head * head;
        &self.incoming[start + rows.start * shape.head_dim..start + rows.end * shape.head_dim]
    }

    fn write(
        &mut self,
        layout: &CacheLayout,
        frames: &Frames,
        rows: Range<usize>,
        source: &[f32],
        buffer: &mut Vec<f32>,
    ) -> Result<(), (usize, f32)> {
        let shape = layout.shape;
        let d = shape.head_dim;
        let limit = f16::MAX.to_f32();
        let head = self.incoming.len() / shape.num_key_value_heads;
        let rotation = if self.side == Which::Keys { &frames.keys } else { &frames.values };
        for (row, source) in rows.zip(source.chunks_exact(shape.num_key_value_heads * d)) {
            for (kv_head, source) in source.chunks_exact(d).enumerate() {
                let target = &mut self.incoming[kv_head * head + row * d..][..d];
                target.copy_from_slice(source);
                if let Some(rotation) = rotation {
                    rotation.apply(kv_head, target, buffer);
                }
                // Numbers that fp16 would round to infinity are refused before they are cached.
                if let Some(value) = target.iter().find(|value| !(-limit..=limit).contains(*value)) {
                    return Err((row, *value));
                }
            }
        }
        Ok(())
    }

    fn append(&mut self, layout: &CacheLayout, sequence: u32, layer: usize, kv_head: usize, token: usize, row: usize) {
        let d = layout.shape.head_dim;
        let head = self.incoming.len() / layout.shape.num_key_value_heads;
        let source = kv_head * head + row * d;
        let slot = token % self.ring.count;
        self.ring
            .row_mut(layout, sequence, layer, kv_head, slot)
            .convert_from_f32_slice(&self.incoming[source..source + d]);
    }

    /// Copies a protected token out of the ring.
    fn keep_sink(
        &mut self,
        layout: &CacheLayout,
        sequence: u32,
        layer: usize,
        kv_head: usize,
        token: usize,
        slot: usize,
    ) {
        let row = self.ring.row(layout, sequence, layer, kv_head, token % self.ring.count);
        self.sinks.row_mut(layout, sequence, layer, kv_head, slot).copy_from_slice(row);
    }
}
