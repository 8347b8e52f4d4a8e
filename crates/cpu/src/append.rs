//! How tokens enter a layer of a cache: into the rings, and from there into pages.
//!
//! Frames of heads share nothing but what is only read, so they are worked on in parallel.

use super::adapters::{self, StateMut};
use super::encode::{Encoder, Tokens, write_chunk_factor, write_page_factor};
use super::frames::Frames;
use super::page_sinks;
use super::ring::{Which, runs};
use super::simd::Isa;
use dibit_cache::{CacheLayout, PageLayout, Run, SideLayout, Span, StateType};
use dibit_device::DeviceError;
use dibit_quant::{QuantError, low_rank};
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;
use std::ops::Range;

/// Tokens from which it is worth several threads to move them.
pub(super) const PARALLEL_TOKENS: usize = 8;

/// The bytes of one sequence in a layer, and what is known of its tokens.
pub(super) struct LayerBytes<'a> {
    pub keys: LayerRows<'a>,
    pub values: LayerRows<'a>,
    /// Blocks that tokens enter, by rising numbers: number, class, and the layer's pages of all heads.
    pub pages: Vec<(u32, usize, &'a mut [u8])>,
    /// States of the linear correction; empty where the layer has none.
    pub states: &'a mut [u8],
    /// Positions that the layer protects, in the order of their slots.
    pub sinks: &'a [u32],
}

/// Keys, or values, of all heads outside of pages.
pub struct LayerRows<'a> {
    /// `[kv head][slot][head_dim]`; token `t` lies in slot `t % slots`.
    pub ring: &'a mut [f16],
    /// `[kv head][sink][head_dim]`
    pub sinks: &'a mut [f16],
    /// `[kv head][row of the batch][head_dim]`
    pub incoming: &'a [f32],
}

/// Stores the rows of a span in a layer. The pages that they fill are one chunk.
pub(super) fn append(
    isa: Isa,
    layout: &CacheLayout,
    layer: usize,
    rotations: &Frames,
    span: &Span,
    bytes: LayerBytes,
    scratch: &mut Vec<Scratch>,
) -> Result<(), DeviceError> {
    let heads = layout.layers[layer].frame;
    let count = layout.shape.num_key_value_heads / heads;
    let leaving = layout.window.leaving(span.cached..span.len());
    let tokens = leaving.iter().map(Range::len).fold(span.rows.len(), usize::max);
    let LayerBytes { keys, values, pages, states, sinks } = bytes;
    scratch.resize_with(count.max(scratch.len()), Default::default);
    let mut pages = split_pages(layout, pages, layer, count).into_iter();
    let (mut keys, mut values) = (keys.split(count), values.split(count));
    let mut states = split_states(layout, states, layer).into_iter();
    let frame = |(index, scratch)| Frame {
        isa,
        layout,
        layer,
        span,
        first_head: index * heads,
        rotations,
        protected: sinks,
        keys: keys.next().expect("keys of every frame"),
        values: values.next().expect("values of every frame"),
        pages: pages.next().expect("pages of every frame"),
        state: states.next().flatten(),
        scratch,
    };
    let frames: Vec<Frame> = scratch.iter_mut().take(count).enumerate().map(frame).collect();
    let append = |mut frame: Frame| frame.append();
    let done: Vec<_> = if tokens < PARALLEL_TOKENS {
        frames.into_iter().map(append).collect()
    } else {
        frames.into_par_iter().map(append).collect()
    };
    // Of several errors the first frame's is told, whichever thread was first.
    done.into_iter().collect::<Result<(), _>>().map_err(|source| DeviceError::Quantize { layer, source })
}

/// For each of `count` frames of a layer, its pages in these blocks.
fn split_pages<'a>(
    layout: &CacheLayout,
    blocks: Vec<(u32, usize, &'a mut [u8])>,
    layer: usize,
    count: usize,
) -> Vec<Vec<(u32, &'a mut [u8])>> {
    let mut frames: Vec<Vec<_>> = (0..count).map(|_| Vec::with_capacity(blocks.len())).collect();
    for (block, class, mut rest) in blocks {
        let all = &layout.layer(class, layer).pages;
        for (frame, heads) in frames.iter_mut().zip(all.chunks(all.len() / count)) {
            let (own, behind) = rest.split_at_mut(heads.iter().map(|head| head.bytes).sum());
            rest = behind;
            frame.push((block, own));
        }
    }
    frames
}

/// The states of the KV heads of a layer of a sequence; empty where the layer has none.
fn split_states<'a>(layout: &CacheLayout, all: &'a mut [u8], layer: usize) -> Vec<Option<StateMut<'a>>> {
    let Some(own) = &layout.layers[layer].states else { return Vec::new() };
    let mut heads = all.chunks_exact_mut(own.head_bytes());
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

/// `count` parts of equal length.
pub(super) fn parts<T>(mut all: &mut [T], count: usize) -> impl Iterator<Item = &mut [T]> {
    let len = all.len() / count;
    (0..count).map(move |_| {
        let (own, rest) = std::mem::take(&mut all).split_at_mut(len);
        all = rest;
        own
    })
}

impl<'a> LayerRows<'a> {
    /// The rows of each of `count` frames of heads.
    fn split(self, count: usize) -> impl Iterator<Item = FrameRows<'a>> {
        let incoming = self.incoming.chunks(self.incoming.len() / count);
        let rows = parts(self.ring, count).zip(parts(self.sinks, count)).zip(incoming);
        rows.map(|((ring, sinks), incoming)| FrameRows { ring, sinks, incoming })
    }
}

/// One frame of heads of a layer, and the sequence whose tokens enter it.
struct Frame<'a> {
    isa: Isa,
    layout: &'a CacheLayout,
    layer: usize,
    span: &'a Span,
    first_head: usize,
    rotations: &'a Frames,
    protected: &'a [u32],
    keys: FrameRows<'a>,
    values: FrameRows<'a>,
    /// Blocks that are written, by their numbers: the pages of the frame.
    pages: Vec<(u32, &'a mut [u8])>,
    /// State of the linear correction, for a frame of one head that has one.
    state: Option<StateMut<'a>>,
    scratch: &'a mut Scratch,
}

/// Keys, or values, of a frame outside of pages.
struct FrameRows<'a> {
    /// `[head][slot][head_dim]`
    ring: &'a mut [f16],
    /// `[head][slot][head_dim]`
    sinks: &'a mut [f16],
    /// `[head][row of the batch][head_dim]`
    incoming: &'a [f32],
}

/// Buffers of a frame.
#[derive(Default)]
pub(super) struct Scratch {
    encoder: Encoder,
    /// `[head][token][head_dim]` on the way into pages.
    wide: Vec<f32>,
    /// A token's channels of the frame.
    token: Vec<f32>,
    row: Vec<f32>,
    /// Which of the tokens are protected outside of pages.
    sinks: Vec<bool>,
    /// Which of them are kept apart from the codes of a head, in its page too.
    apart: Vec<bool>,
    /// Values of a head, of which it is chosen what the page protects.
    chosen_by: Vec<f32>,
    /// What the codes of a chunk miss, `[token][head_dim]`: keys and values of each head.
    errors: Vec<[Vec<f32>; 2]>,
    correction: adapters::Buffers,
}

impl Frame<'_> {
    fn heads(&self) -> usize {
        self.layout.layers[self.layer].frame
    }

    fn append(&mut self) -> Result<(), QuantError> {
        self.scratch.errors.resize_with(self.heads(), Default::default);
        self.scratch.errors.iter_mut().flatten().for_each(Vec::clear);
        let (span, window) = (self.span, self.layout.window);
        let leaving = self.layout.leaving(self.layer, span.len());
        for (token, row) in (span.cached..).zip(span.rows.clone()) {
            let (heads, d) = (self.heads(), self.layout.shape.head_dim);
            self.keys.append(heads, d, token, row);
            self.values.append(heads, d, token, row);
            span.try_each_run(leaving, token..token + 1, |run| self.pack(run))?;
        }
        let filled = window.filled_pages(span.cached..span.len());
        (0..self.heads()).try_for_each(|head| self.finish_chunk(head, filled.clone()))
    }

    /// Packs a run of tokens.
    fn pack(&mut self, run: Run) -> Result<(), QuantError> {
        match self.span.classes.get(run.class) {
            None => self.fill_page(run.tokens.clone(), &run),
            // Tokens of a class are not neighbours in the ring.
            Some(class) => (0..run.tokens.len()).try_for_each(|i| {
                let token = class.tokens[run.tokens.start + i] as usize;
                self.fill_page(token..token + 1, &Run { slot: run.slot + i, ..run.clone() })
            }),
        }
    }

    /// Writes tokens, by their positions, to the page of a run from its slot on.
    fn fill_page(&mut self, tokens: Range<usize>, place: &Run) -> Result<(), QuantError> {
        let which = if place.keys { Which::Keys } else { Which::Values };
        let (heads, d) = (self.heads(), self.layout.shape.head_dim);
        let layer = self.layout.layer(place.class, self.layer);
        let page_layouts = &layer.pages[self.first_head..self.first_head + heads];
        let Self { rotations, protected, keys, values, pages, scratch, state, .. } = self;
        let corrects = which == Which::Keys && state.is_some();
        let rows = match which {
            Which::Keys => &mut *keys,
            Which::Values => &mut *values,
        };
        scratch.sinks.clear();
        for token in tokens.clone() {
            let slot = protected.iter().position(|position| *position as usize == token);
            scratch.sinks.push(slot.is_some());
            if let Some(slot) = slot {
                rows.keep_sink(heads, d, token, slot);
            }
        }
        let per_head = tokens.len() * d;
        scratch.wide.resize(heads * per_head, 0.0);
        let rings = rows.ring.chunks_exact(rows.ring.len() / heads);
        for (wide, ring) in scratch.wide.chunks_exact_mut(per_head).zip(rings) {
            widen(ring, d, tokens.clone(), wide);
        }
        if let Some(pre_rope) = rotations.pre_rope.as_ref().filter(|_| which == Which::Keys) {
            scratch.token.resize(heads * d, 0.0);
            for (i, token) in tokens.clone().enumerate() {
                let at = |head: usize| head * per_head + i * d;
                for (head, key) in scratch.token.chunks_exact_mut(d).enumerate() {
                    key.copy_from_slice(&scratch.wide[at(head)..at(head) + d]);
                }
                pre_rope.store(self.isa, self.first_head, token, &mut scratch.token, &mut scratch.row);
                for (head, key) in scratch.token.chunks_exact(d).enumerate() {
                    scratch.wide[at(head)..at(head) + d].copy_from_slice(key);
                }
            }
        }
        let slots = place.slot..place.slot + tokens.len();
        let pages = heads_of(pages_of(pages, place.block), page_layouts).zip(page_layouts);
        let wide = scratch.wide.chunks_exact_mut(per_head).enumerate();
        let value_rings = values.ring.chunks_exact(values.ring.len() / heads);
        let all = pages.zip(wide).zip(&mut scratch.errors).zip(value_rings);
        for ((((page, own), (head, wide)), errors), ring) in all {
            scratch.apart.clone_from(&scratch.sinks);
            if let Some(places) = &own.sinks {
                let chosen = match which {
                    // Values of the same tokens leave the window with the keys, and behind them.
                    Which::Keys => {
                        scratch.chosen_by.resize(per_head, 0.0);
                        widen(ring, d, tokens.clone(), &mut scratch.chosen_by);
                        let frame = rotations.value_frame(self.first_head + head, d);
                        let squares = page_sinks::squares(self.isa, &scratch.chosen_by, d, frame, &mut scratch.row);
                        places.auto.choose(&squares, &scratch.sinks)
                    }
                    Which::Values => page_sinks::slots(places, page).collect(),
                };
                page_sinks::keep(places, which == Which::Keys, &chosen, wide, page)?;
                chosen.iter().for_each(|slot| scratch.apart[*slot] = true);
            }
            match if which == Which::Keys { own.keys } else { own.values } {
                SideLayout::Half { rows } => {
                    let row_bytes = d * size_of::<f16>();
                    let target = &mut page[rows + slots.start * row_bytes..rows + slots.end * row_bytes];
                    bytemuck::cast_slice_mut::<u8, f16>(target).convert_from_f32_slice(wide);
                }
                SideLayout::Packed(side) => {
                    let order = rotations.order.as_ref().filter(|_| which == Which::Keys);
                    let order = order.map(|order| &order[self.first_head + head][..]);
                    let feedback = rotations.feedback.as_ref().filter(|_| which == Which::Keys && side.feedback);
                    let tokens = Tokens {
                        values: wide,
                        head_dim: d,
                        slots: slots.clone(),
                        sinks: &scratch.apart,
                        order,
                        feedback: feedback.map(|all| &all[self.first_head + head]),
                    };
                    let errors = &mut errors[which as usize];
                    let wanted = corrects || side.factors.is_some();
                    scratch.encoder.encode(self.isa, &side, tokens, page, wanted.then_some(errors))?;
                }
            }
        }
        if let Some(state) = state.as_mut().filter(|_| corrects) {
            let maps = rotations.adapters.as_ref().expect("the adapters of a state");
            // A frame with a state has one head.
            let Scratch { errors, wide, apart: sinks, row, correction, .. } = &mut **scratch;
            let missed = &mut errors[0][which as usize];
            // Values of the same tokens are still in the ring: they leave it with the keys, or after them.
            widen(values.ring, d, tokens.clone(), &mut wide[..per_head]);
            let kept = drop_rows(missed, d, sinks);
            drop_rows(&mut wide[..per_head], d, sinks);
            if let Some(rotation) = &rotations.keys {
                let missed = missed[..kept * d].chunks_exact_mut(d);
                missed.for_each(|missed| rotation.apply_inverse(self.isa, self.first_head, missed, row));
            }
            // A sequence begins with an empty state, whatever was left there.
            if tokens.start == 0 {
                state.clear();
            }
            let (missed, values) = (&missed[..kept * d], &wide[..kept * d]);
            adapters::flush(maps, self.isa, self.first_head, missed, values, state, correction);
            errors[0][which as usize].clear();
        }
        Ok(())
    }

    /// Factors what the codes of newly filled pages miss.
    fn finish_chunk(&mut self, head: usize, blocks: Range<usize>) -> Result<(), QuantError> {
        let group = self.layout.layers[self.layer].group;
        let page_layout = self.layout.layers[self.layer].pages[self.first_head + head];
        for (side, error) in [page_layout.keys, page_layout.values].into_iter().zip(&self.scratch.errors[head]) {
            let SideLayout::Packed(side) = side else { continue };
            let Some(factors) = side.factors.filter(|_| !blocks.is_empty()) else { continue };
            let all = low_rank(error, self.layout.shape.head_dim, factors.rank);
            for (place, block) in blocks.clone().enumerate() {
                let pages = pages_of(&mut self.pages, self.span.block(group, block));
                let first = self.layout.layers[self.layer].pages[self.first_head].offset;
                let page = &mut pages[page_layout.offset - first..][..page_layout.bytes];
                write_page_factor(factors, &all, place, page)?;
                if place == 0 {
                    write_chunk_factor(factors, &all, page)?;
                }
            }
        }
        Ok(())
    }
}

/// Rows of consecutive tokens in the ring of a head, in 32 bit.
fn widen(ring: &[f16], d: usize, tokens: Range<usize>, mut wide: &mut [f32]) {
    for run in runs(ring, d, tokens) {
        let (now, rest) = wide.split_at_mut(run.len());
        run.convert_to_f32_slice(now);
        wide = rest;
    }
}

/// Moves the rows that are no sinks to the front; returns how many they are.
fn drop_rows(rows: &mut [f32], width: usize, sinks: &[bool]) -> usize {
    let mut kept = 0;
    for (row, _) in sinks.iter().enumerate().filter(|(_, is_sink)| !**is_sink) {
        rows.copy_within(row * width..(row + 1) * width, kept * width);
        kept += 1;
    }
    kept
}

/// The pages of a block that is written.
fn pages_of<'a>(pages: &'a mut [(u32, &mut [u8])], block: u32) -> &'a mut [u8] {
    let index = pages.binary_search_by_key(&block, |(number, _)| *number).expect("a block that tokens enter");
    pages[index].1
}

/// The pages of some heads, which follow each other.
fn heads_of<'a>(mut all: &'a mut [u8], heads: &[PageLayout]) -> impl Iterator<Item = &'a mut [u8]> {
    heads.iter().map(move |head| {
        let (own, rest) = std::mem::take(&mut all).split_at_mut(head.bytes);
        all = rest;
        own
    })
}

impl FrameRows<'_> {
    fn append(&mut self, heads: usize, d: usize, token: usize, row: usize) {
        let rings = self.ring.chunks_exact_mut(self.ring.len() / heads);
        for (ring, incoming) in rings.zip(self.incoming.chunks_exact(self.incoming.len() / heads)) {
            let slot = token % (ring.len() / d);
            ring[slot * d..][..d].convert_from_f32_slice(&incoming[row * d..][..d]);
        }
    }

    /// Copies a protected token out of the ring.
    fn keep_sink(&mut self, heads: usize, d: usize, token: usize, slot: usize) {
        let rings = self.ring.chunks_exact(self.ring.len() / heads);
        for (ring, sinks) in rings.zip(self.sinks.chunks_exact_mut(self.sinks.len() / heads)) {
            let from = token % (ring.len() / d);
            sinks[slot * d..][..d].copy_from_slice(&ring[from * d..][..d]);
        }
    }
}
