//! The bytes of a cache on the CPU, and how tokens enter them.

use crate::{Batch, DeviceError, Span};
use dibit_cache::{Axis, CacheLayout, PAGE_TOKENS, PackedSide, SideLayout};
use dibit_quant::{Affine, QuantError, pack};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::MmapMut;
use std::ops::Range;

/// Pages, window rings and the keys and values of the pass in flight.
pub struct CpuStore {
    layout: CacheLayout,
    /// `[block][layer][kv head][page]`; untouched memory is not resident.
    pages: MmapMut,
    keys: Rows,
    values: Rows,
    scratch: Scratch,
}

/// Keys, or values, outside of pages.
struct Rows {
    side: &'static str,
    slots: usize,
    /// fp16 `[layer][sequence][kv head][slot][head_dim]`; token `t` lies in slot `t % slots`.
    ring: MmapMut,
    /// f32 `[kv head][row of the batch][head_dim]`.
    incoming: Vec<f32>,
}

/// Buffers of the encoder.
struct Scratch {
    /// f32 `[row][lane]` of a page side.
    wide: Vec<f32>,
    codes: Vec<u8>,
}

fn map(what: &'static str, bytes: usize) -> Result<MmapMut, DeviceError> {
    MmapMut::map_anon(bytes.max(1)).map_err(|_| DeviceError::OutOfMemory { what, bytes })
}

impl CpuStore {
    pub(super) fn new(
        layout: &CacheLayout,
        num_blocks: usize,
        num_sequences: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let shape = layout.shape;
        let heads = shape.num_layers * shape.num_key_value_heads * num_sequences;
        let row_count = shape.num_key_value_heads * max_rows * shape.head_dim;
        let rows = |side, slots: usize| -> Result<Rows, DeviceError> {
            let ring = map("window rings", heads * slots * shape.head_dim * size_of::<f16>())?;
            Ok(Rows { side, slots, ring, incoming: vec![0.0; row_count] })
        };
        let lanes = PAGE_TOKENS.max(shape.head_dim);
        let pages = map("cache blocks", num_blocks * layout.block_bytes())?;
        // Advice: a kernel without huge pages is slower and nothing else.
        #[cfg(target_os = "linux")]
        pages.advise(memmap2::Advice::HugePage).ok();
        Ok(CpuStore {
            layout: layout.clone(),
            pages,
            keys: rows("key", layout.window.key_slots())?,
            values: rows("value", layout.window.value_slots())?,
            scratch: Scratch { wide: vec![0.0; lanes * PAGE_TOKENS], codes: vec![0; lanes] },
        })
    }

    pub(super) fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    pub(super) fn page(&self, block: u32, layer: usize, kv_head: usize) -> &[u8] {
        let offset = self.layout.page_offset(block, layer, kv_head);
        &self.pages[offset..offset + self.layout.page.stride]
    }

    /// 16-bit keys of tokens `tokens` in the ring of a span, as up to two runs in the order of the tokens.
    pub(super) fn ring_keys(&self, span: &Span, layer: usize, kv_head: usize, tokens: Range<usize>) -> [&[f16]; 2] {
        self.keys.runs(&self.layout, span.slot, layer, kv_head, tokens)
    }

    /// 16-bit values of tokens `tokens`; see [`CpuStore::ring_keys`].
    pub(super) fn ring_values(&self, span: &Span, layer: usize, kv_head: usize, tokens: Range<usize>) -> [&[f16]; 2] {
        self.values.runs(&self.layout, span.slot, layer, kv_head, tokens)
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
            side.write(&self.layout, rows.clone(), source).map_err(|(row, value)| {
                let span = batch.spans.iter().find(|span| span.rows.contains(&row)).expect("a row of the batch");
                let token = span.cached + row - span.rows.start;
                DeviceError::NotFinite { side: side.side, layer, token, value }
            })?;
        }
        Ok(())
    }

    /// Stores `rows` of a span as its tokens from `position` on.
    pub(super) fn append(
        &mut self,
        layer: usize,
        span: &Span,
        rows: Range<usize>,
        position: usize,
    ) -> Result<(), DeviceError> {
        for kv_head in 0..self.layout.shape.num_key_value_heads {
            for (i, row) in rows.clone().enumerate() {
                let token = position + i;
                self.keys.append(&self.layout, span.slot, layer, kv_head, token, row);
                self.values.append(&self.layout, span.slot, layer, kv_head, token, row);
                self.flush(layer, span, kv_head, token).map_err(|source| DeviceError::Quantize { layer, source })?;
            }
        }
        Ok(())
    }

    /// Moves what leaves the window once `token` is cached.
    fn flush(&mut self, layer: usize, span: &Span, kv_head: usize, token: usize) -> Result<(), QuantError> {
        let window = self.layout.window;
        let page_layout = self.layout.page;
        let keys = window.packed_keys(token)..window.packed_keys(token + 1);
        let values = window.packed_values(token)..window.packed_values(token + 1);
        for (side, rows, tokens) in [(page_layout.keys, &self.keys, keys), (page_layout.values, &self.values, values)] {
            let mut first = tokens.start;
            while first < tokens.end {
                let last = tokens.end.min(first / PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS);
                let offset = self.layout.page_offset(span.blocks[first / PAGE_TOKENS], layer, kv_head);
                let page = &mut self.pages[offset..offset + page_layout.stride];
                let runs = rows.runs(&self.layout, span.slot, layer, kv_head, first..last);
                encode(side, &self.layout, runs, first % PAGE_TOKENS, page, &mut self.scratch)?;
                first = last;
            }
        }
        Ok(())
    }
}

impl Rows {
    fn ring_start(&self, layout: &CacheLayout, slot: u32, layer: usize, kv_head: usize) -> usize {
        let shape = layout.shape;
        let ring = self.slots * shape.head_dim;
        let sequences = self.ring.len() / size_of::<f16>() / (shape.num_layers * shape.num_key_value_heads * ring);
        ((layer * sequences + slot as usize) * shape.num_key_value_heads + kv_head) * ring
    }

    fn runs(&self, layout: &CacheLayout, slot: u32, layer: usize, kv_head: usize, tokens: Range<usize>) -> [&[f16]; 2] {
        let d = layout.shape.head_dim;
        let start = self.ring_start(layout, slot, layer, kv_head);
        let ring = &bytemuck::cast_slice::<u8, f16>(&self.ring)[start..start + self.slots * d];
        debug_assert!(tokens.len() <= self.slots);
        let first = tokens.start % self.slots;
        let until_wrap = tokens.len().min(self.slots - first);
        [&ring[first * d..(first + until_wrap) * d], &ring[..(tokens.len() - until_wrap) * d]]
    }

    fn incoming(&self, layout: &CacheLayout, kv_head: usize, rows: Range<usize>) -> &[f32] {
        let shape = layout.shape;
        let head = self.incoming.len() / shape.num_key_value_heads;
        let start = kv_head * head;
        &self.incoming[start + rows.start * shape.head_dim..start + rows.end * shape.head_dim]
    }

    fn write(&mut self, layout: &CacheLayout, rows: Range<usize>, source: &[f32]) -> Result<(), (usize, f32)> {
        let shape = layout.shape;
        let d = shape.head_dim;
        let limit = f16::MAX.to_f32();
        let head = self.incoming.len() / shape.num_key_value_heads;
        for (row, source) in rows.zip(source.chunks_exact(shape.num_key_value_heads * d)) {
            for (kv_head, source) in source.chunks_exact(d).enumerate() {
                let target = &mut self.incoming[kv_head * head + row * d..][..d];
                // Numbers that fp16 would round to infinity are refused before they are cached.
                if let Some(value) = source.iter().find(|value| !(-limit..=limit).contains(*value)) {
                    return Err((row, *value));
                }
                target.copy_from_slice(source);
            }
        }
        Ok(())
    }

    fn append(&mut self, layout: &CacheLayout, slot: u32, layer: usize, kv_head: usize, token: usize, row: usize) {
        let d = layout.shape.head_dim;
        let start = self.ring_start(layout, slot, layer, kv_head) + token % self.slots * d;
        let head = self.incoming.len() / layout.shape.num_key_value_heads;
        let source = kv_head * head + row * d;
        bytemuck::cast_slice_mut::<u8, f16>(&mut self.ring)[start..start + d]
            .convert_from_f32_slice(&self.incoming[source..source + d]);
    }
}

/// Writes tokens, given as runs of fp16 rows, into a page from token slot `first` on.
fn encode(
    side: SideLayout,
    layout: &CacheLayout,
    runs: [&[f16]; 2],
    first: usize,
    page: &mut [u8],
    scratch: &mut Scratch,
) -> Result<(), QuantError> {
    let d = layout.shape.head_dim;
    let side = match side {
        SideLayout::Half { rows } => {
            let mut at = rows + first * d * size_of::<f16>();
            for run in runs {
                let bytes: &[u8] = bytemuck::cast_slice(run);
                page[at..at + bytes.len()].copy_from_slice(bytes);
                at += bytes.len();
            }
            return Ok(());
        }
        SideLayout::Packed(side) => side,
    };
    let rows = runs.into_iter().flat_map(|run| run.chunks_exact(d)).enumerate();
    match side.axis {
        // The schedules that a scheme can name move whole pages of keys (Window::packed_keys).
        Axis::Channel => {
            for (token, row) in rows {
                for (channel, value) in row.iter().enumerate() {
                    scratch.wide[channel * PAGE_TOKENS + token] = value.to_f32();
                }
            }
            encode_rows(&side, 0..d, page, scratch)
        }
        Axis::Token => {
            let mut tokens = 0;
            for (token, row) in rows {
                row.convert_to_f32_slice(&mut scratch.wide[token * d..(token + 1) * d]);
                tokens += 1;
            }
            encode_rows(&side, first..first + tokens, page, scratch)
        }
    }
}

/// Quantises packed rows `rows` of a page side from the first rows of `scratch.wide`.
fn encode_rows(
    side: &PackedSide,
    rows: Range<usize>,
    page: &mut [u8],
    scratch: &mut Scratch,
) -> Result<(), QuantError> {
    for (i, row) in rows.enumerate() {
        let wide = &scratch.wide[i * side.lanes..(i + 1) * side.lanes];
        for span in side.group_spans() {
            let codes = &mut scratch.codes[..span.lanes.len()];
            let affine = Affine::quantize(&wide[span.lanes], side.bits, codes)?;
            let start = side.codes + row * side.row_bytes;
            pack(side.bits, codes, &mut page[start + span.bytes.start..start + span.bytes.end]);
            let parameter = (span.index * side.rows + row) * size_of::<f16>();
            for (offset, value) in [(side.scales, affine.scale), (side.mins, affine.min)] {
                page[offset + parameter..][..size_of::<f16>()].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    Ok(())
}
