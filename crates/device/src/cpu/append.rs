//! How tokens enter a layer of a cache: into the rings, and from there into pages.
//!
//! Frames of heads share nothing but what is only read, so they are worked on in parallel.

use super::adapters::{self, StateMut};
use super::encode::{Encoder, Tokens, write_chunk_factor, write_page_factor};
use super::frames::Frames;
use super::page_sinks;
use super::simd::Isa;
use super::sinks::Protected;
use super::store::{Which, runs};
use crate::Span;
use dibit_cache::{CacheLayout, ClassTokens, PAGE_TOKENS, PageLayout, SideLayout};
use dibit_quant::{QuantError, low_rank};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// One frame of heads of a layer, and the sequence whose tokens enter it.
pub(super) struct Frame<'a> {
    pub isa: Isa,
    pub layout: &'a CacheLayout,
    pub layer: usize,
    pub span: &'a Span,
    pub first_head: usize,
    pub rotations: &'a Frames,
    pub protected: &'a Protected,
    pub keys: FrameRows<'a>,
    pub values: FrameRows<'a>,
    /// Blocks that are written, by their numbers: the pages of the frame.
    pub pages: Vec<(u32, &'a mut [u8])>,
    /// State of the linear correction, for a frame of one head that has one.
    pub state: Option<StateMut<'a>>,
    pub scratch: &'a mut Scratch,
}

/// Keys, or values, of a frame outside of pages.
pub(super) struct FrameRows<'a> {
    /// `[head][slot][head_dim]`
    pub ring: &'a mut [f16],
    /// `[head][slot][head_dim]`
    pub sinks: &'a mut [f16],
    /// `[head][row of the batch][head_dim]`
    pub incoming: &'a [f32],
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

/// Keys and values that leave the window while a sequence grows from `cached.start` to `cached.end` tokens.
pub fn leaving(layout: &CacheLayout, cached: Range<usize>) -> [Range<usize>; 2] {
    let window = layout.window;
    [
        window.packed_keys(cached.start)..window.packed_keys(cached.end),
        window.packed_values(cached.start)..window.packed_values(cached.end),
    ]
}

/// Blocks that these keys and values enter, in the order of their numbers, each with its class.
pub fn blocks(span: &Span, leaving: [Range<usize>; 2]) -> Vec<(u32, usize)> {
    let places = leaving.into_iter().flatten().map(|token| place(span, token));
    let mut blocks: Vec<(u32, usize)> = places.map(|place| (place.block, place.class)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

impl Frame<'_> {
    fn heads(&self) -> usize {
        self.layout.layers[self.layer].frame
    }

    /// Stores `rows` of the batch as tokens from `position` on. The pages that they fill are one chunk.
    pub(super) fn append(&mut self, rows: Range<usize>, position: usize) -> Result<(), QuantError> {
        self.scratch.errors.resize_with(self.heads(), Default::default);
        self.scratch.errors.iter_mut().flatten().for_each(Vec::clear);
        let last = position + rows.len();
        for (token, row) in (position..).zip(rows) {
            let (heads, d) = (self.heads(), self.layout.shape.head_dim);
            self.keys.append(heads, d, token, row);
            self.values.append(heads, d, token, row);
            self.flush(token)?;
        }
        let filled = [position, last].map(|len| self.layout.window.packed_keys(len) / PAGE_TOKENS);
        (0..self.heads()).try_for_each(|head| self.finish_chunk(head, filled[0]..filled[1]))
    }

    /// Moves what leaves the window once `token` is cached.
    fn flush(&mut self, token: usize) -> Result<(), QuantError> {
        let leaving = leaving(self.layout, token..token + 1);
        for (which, tokens) in [Which::Keys, Which::Values].into_iter().zip(leaving) {
            let mut first = tokens.start;
            while first < tokens.end {
                let place = place(self.span, first);
                // Tokens of a class go one by one to its next slots.
                let room = if self.span.classes.is_empty() { PAGE_TOKENS - place.slot } else { 1 };
                let last = tokens.end.min(first + room);
                self.fill_page(which, first..last, place)?;
                first = last;
            }
        }
        Ok(())
    }

    /// Writes tokens of one page from `place` on.
    fn fill_page(&mut self, which: Which, tokens: Range<usize>, place: Place) -> Result<(), QuantError> {
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
            let slot = protected.slot(self.layer, token);
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
                // Values of the same tokens leave the window with the keys, and the choice depends on nothing else.
                scratch.chosen_by.resize(per_head, 0.0);
                widen(ring, d, tokens.clone(), &mut scratch.chosen_by);
                let chosen = places.auto.choose(&scratch.chosen_by, d, &scratch.sinks);
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
            maps.flush(self.isa, self.first_head, &missed[..kept * d], &wide[..kept * d], state, correction);
            missed.clear();
        }
        Ok(())
    }

    /// Factors what the codes of newly filled pages miss.
    fn finish_chunk(&mut self, head: usize, blocks: Range<usize>) -> Result<(), QuantError> {
        let page_layout = self.layout.layers[self.layer].pages[self.first_head + head];
        for (side, error) in [page_layout.keys, page_layout.values].into_iter().zip(&self.scratch.errors[head]) {
            let SideLayout::Packed(side) = side else { continue };
            let Some(factors) = side.factors.filter(|_| !blocks.is_empty()) else { continue };
            let all = low_rank(error, self.layout.shape.head_dim, factors.rank);
            for (place, block) in blocks.clone().enumerate() {
                let pages = pages_of(&mut self.pages, self.span.blocks[block]);
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
