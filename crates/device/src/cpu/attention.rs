//! Attention on the CPU: a sum over parts.
//!
//! The visible tokens of a query are cut into blocks of up to 128: packed pages, what the window holds of a page's
//! tokens, and the pass in flight. Each block yields logits and weighted values; an online softmax joins them. A
//! packed block is never expanded: with `x^ = s c + z`, `q . k^ = (q s) . c + q . z` for keys and
//! `p v^ = (p s) c + p z` for values, so scales and minimums are folded into the query and the weights once for
//! each page and group, and the inner loop ([`mix_rows`]) sees codes only.
//!
//! Long histories of single rows are cut into splits of a fixed number of tokens, which depend on nothing but the
//! sequence's length, so that neither threads nor batches change a result.

use super::dot::{self, dot_rows};
use super::element::Element;
use super::exp::exp_shifted;
use super::mix::{self, Codes, Plain, mix_rows};
use super::simd::Isa;
use super::store::CpuStore;
use crate::Span;
use dibit_cache::{PAGE_TOKENS, PackedSide, SideLayout};
use dibit_quant::Bits;
use half::f16;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Query rows of a task, counted over the heads that share a KV head.
const TASK_QUERIES: usize = 48;

/// Shape of the queries.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    /// Query heads.
    pub num: usize,
    /// KV heads.
    pub num_key_value: usize,
    /// Channels of a head.
    pub dim: usize,
}

impl Heads {
    /// Query heads that share a KV head.
    fn per_key_value(&self) -> usize {
        self.num / self.num_key_value
    }
}

/// Some query rows of one KV head against one split of their history.
struct Item {
    span: usize,
    kv_head: usize,
    /// Rows of the batch.
    rows: Range<usize>,
    /// Cached tokens that are looked at.
    tokens: Range<usize>,
    /// Whether the pass in flight is looked at too.
    incoming: bool,
}

/// Buffers of attention, reused from call to call.
#[derive(Default)]
pub(super) struct Buffers {
    items: Vec<Item>,
    /// Partial results of each item: `[query][maximum, normaliser, head_dim weighted values]`.
    partials: Vec<f32>,
}

/// Buffers of one thread.
#[derive(Default)]
struct Scratch {
    /// `[query][head_dim]`, scaled by `1 / sqrt(head_dim)`.
    queries: Vec<f32>,
    /// `[query][128]`, logits and then weights.
    logits: Vec<f32>,
    /// `[query][max(head_dim, 128)]`, queries or weights with scales folded in.
    folded: Vec<f32>,
    /// `[query][max(head_dim, 128)]`, weighted codes of one group.
    mixed: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// What an attention call reads.
#[derive(Clone, Copy)]
pub(super) struct Call<'a> {
    pub isa: Isa,
    pub store: &'a CpuStore,
    pub layer: usize,
    pub spans: &'a [Span],
    pub heads: Heads,
    /// Tokens of a split.
    pub split_tokens: usize,
}

/// Attends rows `rows` of the batch; `q` and `out` begin at the first of them.
pub(super) fn attend(call: Call, buffers: &mut Buffers, rows: Range<usize>, q: &[f32], out: &mut [f32]) {
    let heads = call.heads;
    let item_rows = (TASK_QUERIES / heads.per_key_value()).max(1).min(rows.len());
    let stride = heads.dim + 2;
    let item_len = item_rows * heads.per_key_value() * stride;
    let Buffers { items, partials } = buffers;
    plan(items, call, rows.clone(), item_rows);
    if partials.len() < items.len() * item_len {
        partials.resize(items.len() * item_len, 0.0);
    }
    items.par_iter().zip(partials.par_chunks_mut(item_len)).for_each(|(item, partials)| {
        SCRATCH.with_borrow_mut(|scratch| {
            load_queries(scratch, q, item, rows.start, heads);
            run(call, item, scratch, partials);
        });
    });
    let width = heads.num * heads.dim;
    out[..rows.len() * width].par_chunks_mut(width).zip(rows).for_each(|(out, row)| {
        for kv_head in 0..heads.num_key_value {
            let own = |item: &&Item| item.kv_head == kv_head && item.rows.contains(&row);
            let first = items.iter().position(|item| own(&item)).expect("every row is planned");
            let splits = items[first..].iter().take_while(own).count();
            let row_offset = (row - items[first].rows.start) * heads.per_key_value() * stride;
            let parts = partials[first * item_len..].chunks(item_len).take(splits);
            let head_outs = out[kv_head * heads.per_key_value() * heads.dim..].chunks_exact_mut(heads.dim);
            for (head, out) in head_outs.take(heads.per_key_value()).enumerate() {
                let at = row_offset + head * stride;
                join(parts.clone().map(|part| &part[at..at + stride]), out);
            }
        }
    });
}

/// Cuts the rows into items. Splits of the same rows follow each other, the one with the pass in flight last.
fn plan(items: &mut Vec<Item>, call: Call, rows: Range<usize>, item_rows: usize) {
    items.clear();
    for (index, span) in call.spans.iter().enumerate() {
        let own = span.rows.start.max(rows.start)..span.rows.end.min(rows.end);
        let split = if span.rows.len() == 1 { call.split_tokens } else { usize::MAX };
        for kv_head in 0..call.heads.num_key_value {
            for first in own.clone().step_by(item_rows) {
                let rows = first..own.end.min(first + item_rows);
                let mut start = 0;
                loop {
                    let end = span.cached.min(start + split.min(span.cached));
                    let incoming = end == span.cached;
                    items.push(Item { span: index, kv_head, rows: rows.clone(), tokens: start..end, incoming });
                    if incoming {
                        break;
                    }
                    start = end;
                }
            }
        }
    }
}

/// Joins the partial results of one query: `sum_j w_j Y_j / sum_j w_j l_j` with `w_j = exp(m_j - max m)`
/// (KVLinC, Algorithm 1).
fn join<'a>(parts: impl Iterator<Item = &'a [f32]> + Clone, out: &mut [f32]) {
    let maximum = parts.clone().map(|part| part[0]).fold(f32::NEG_INFINITY, f32::max);
    let mut normaliser = 0.0;
    out.fill(0.0);
    for part in parts {
        let weight = (part[0] - maximum).exp();
        normaliser += weight * part[1];
        for (out, value) in out.iter_mut().zip(&part[2..]) {
            *out += weight * value;
        }
    }
    for out in out {
        *out /= normaliser;
    }
}

fn load_queries(scratch: &mut Scratch, q: &[f32], item: &Item, first_row: usize, heads: Heads) {
    let group = heads.per_key_value();
    let queries = item.rows.len() * group;
    let wide = heads.dim.max(PAGE_TOKENS);
    let fit = |buffer: &mut Vec<f32>, len: usize| {
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
    };
    fit(&mut scratch.queries, queries * heads.dim);
    fit(&mut scratch.logits, queries * PAGE_TOKENS);
    fit(&mut scratch.folded, queries * wide);
    fit(&mut scratch.mixed, queries * wide);
    let scale = 1.0 / (heads.dim as f32).sqrt();
    for (i, row) in item.rows.clone().enumerate() {
        let at = (row - first_row) * heads.num * heads.dim + item.kv_head * group * heads.dim;
        let target = &mut scratch.queries[i * group * heads.dim..][..group * heads.dim];
        for (target, source) in target.iter_mut().zip(&q[at..]) {
            *target = source * scale;
        }
    }
}

fn run(call: Call, item: &Item, scratch: &mut Scratch, partials: &mut [f32]) {
    let span = &call.spans[item.span];
    let group = call.heads.per_key_value();
    let stride = call.heads.dim + 2;
    let partials = &mut partials[..item.rows.len() * group * stride];
    for state in partials.chunks_exact_mut(stride) {
        state.fill(0.0);
        state[0] = f32::NEG_INFINITY;
    }
    let window = call.store.layout().window;
    let (packed_keys, packed_values) = (window.packed_keys(span.cached), window.packed_values(span.cached));
    let mut block = Block { call, kv_head: item.kv_head, queries: item.rows.len() * group, scratch, partials };
    let mut start = item.tokens.start;
    while start < item.tokens.end {
        let end = item.tokens.end.min(start / PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS);
        let tokens = start..end;
        if end <= packed_keys {
            block.page_logits(span, tokens.clone());
        } else {
            debug_assert!(start >= packed_keys, "the border of packed keys lies on the grid of pages");
            let runs = call.store.ring_keys(span, call.layer, item.kv_head, tokens.clone());
            block.plain_logits(runs);
        }
        block.softmax(tokens.len());
        let border = packed_values.clamp(start, end);
        if border > start {
            block.page_values(span, start..border);
        }
        if end > border {
            let runs = call.store.ring_values(span, call.layer, item.kv_head, border..end);
            block.plain_values(runs, border - start);
        }
        start = end;
    }
    if item.incoming {
        for first in (span.rows.start..item.rows.end).step_by(PAGE_TOKENS) {
            let rows = first..item.rows.end.min(first + PAGE_TOKENS);
            block.plain_logits([call.store.incoming_keys(item.kv_head, rows.clone()), &[]]);
            block.mask(item.rows.clone(), rows.clone(), group);
            block.softmax(rows.len());
            block.plain_values([call.store.incoming_values(item.kv_head, rows), &[]], 0);
        }
    }
}

/// One block of up to 128 keys, seen by the queries of an item.
struct Block<'a> {
    call: Call<'a>,
    kv_head: usize,
    queries: usize,
    scratch: &'a mut Scratch,
    partials: &'a mut [f32],
}

impl Block<'_> {
    /// Logits of tokens that lie in one page.
    fn page_logits(&mut self, span: &Span, tokens: Range<usize>) {
        let page = self.call.store.page(span.blocks[tokens.start / PAGE_TOKENS], self.call.layer, self.kv_head);
        match self.call.store.layout().page.keys {
            SideLayout::Half { rows } => {
                let rows = half_rows(page, rows, tokens, self.call.heads.dim);
                self.plain_logits([rows, &[]]);
            }
            SideLayout::Packed(side) => match side.bits {
                Bits::Two => self.packed_logits::<2>(page, &side),
                Bits::Four => self.packed_logits::<4>(page, &side),
                Bits::Eight => self.packed_logits::<8>(page, &side),
            },
        }
    }

    /// Logits of a page of keys per channel: `q . k^ = (q s) . c + q . z` in each group of tokens.
    fn packed_logits<const BITS: usize>(&mut self, page: &[u8], side: &PackedSide) {
        let d = self.call.heads.dim;
        for span in side.group_spans() {
            let (scales, mins) = parameters(page, side, span.index, 0..side.rows);
            let lanes = span.lanes.len();
            let queries = self.scratch.queries.chunks_exact(d).take(self.queries);
            let folded = self.scratch.folded.chunks_exact_mut(d);
            let mixed = self.scratch.mixed.chunks_exact_mut(lanes);
            for ((query, folded), mixed) in queries.zip(folded).zip(mixed) {
                mixed.fill(fold(query, scales, mins, folded));
            }
            let shape = mix::Shape {
                m: self.queries,
                weight_stride: d,
                rows: side.rows,
                row_stride: side.row_bytes,
                units: span.bytes.len(),
                y_stride: lanes,
            };
            let codes = &page[side.codes + span.bytes.start..][..(side.rows - 1) * side.row_bytes + span.bytes.len()];
            mix_rows::<Codes<BITS>>(self.call.isa, &self.scratch.folded, codes, shape, &mut self.scratch.mixed);
            let logits = self.scratch.logits.chunks_exact_mut(PAGE_TOKENS).take(self.queries);
            for (logits, mixed) in logits.zip(self.scratch.mixed.chunks_exact(lanes)) {
                logits[span.lanes.clone()].copy_from_slice(mixed);
            }
        }
    }

    /// Logits of tokens outside of pages, given as up to two runs of rows.
    fn plain_logits<E: Element>(&mut self, runs: [&[E]; 2]) {
        let d = self.call.heads.dim;
        let Scratch { queries, logits, .. } = &mut *self.scratch;
        let mut first = 0;
        for run in runs {
            let shape = dot::Shape { m: self.queries, n: run.len() / d, k: d };
            dot_rows(self.call.isa, queries, run, shape, &mut |i, j, sum| logits[i * PAGE_TOKENS + first + j] = sum);
            first += shape.n;
        }
    }

    /// Hides rows of the pass in flight from the queries of earlier rows.
    fn mask(&mut self, query_rows: Range<usize>, key_rows: Range<usize>, group: usize) {
        for (i, row) in query_rows.enumerate() {
            let visible = (row + 1).clamp(key_rows.start, key_rows.end) - key_rows.start;
            for logits in self.scratch.logits[i * group * PAGE_TOKENS..].chunks_exact_mut(PAGE_TOKENS).take(group) {
                logits[visible..key_rows.len()].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Turns `tokens` logits into weights in the frame of the largest logit so far, and moves the sums there.
    fn softmax(&mut self, tokens: usize) {
        let states = self.partials.chunks_exact_mut(self.call.heads.dim + 2);
        for (logits, state) in self.scratch.logits.chunks_exact_mut(PAGE_TOKENS).zip(states) {
            let logits = &mut logits[..tokens];
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            if largest > state[0] {
                let shrink = (state[0] - largest).exp();
                for sum in &mut state[1..] {
                    *sum *= shrink;
                }
                state[0] = largest;
            }
            if state[0] == f32::NEG_INFINITY {
                logits.fill(0.0);
                continue;
            }
            exp_shifted(self.call.isa, logits, state[0]);
            state[1] += logits.iter().sum::<f32>();
        }
    }

    /// Adds the weighted values of tokens that lie in one page; their weights are the first ones.
    fn page_values(&mut self, span: &Span, tokens: Range<usize>) {
        let page = self.call.store.page(span.blocks[tokens.start / PAGE_TOKENS], self.call.layer, self.kv_head);
        match self.call.store.layout().page.values {
            SideLayout::Half { rows } => {
                let rows = half_rows(page, rows, tokens, self.call.heads.dim);
                self.plain_values([rows, &[]], 0);
            }
            SideLayout::Packed(side) => {
                let rows = tokens.start % PAGE_TOKENS..(tokens.end - 1) % PAGE_TOKENS + 1;
                match side.bits {
                    Bits::Two => self.packed_values::<2>(page, &side, rows),
                    Bits::Four => self.packed_values::<4>(page, &side, rows),
                    Bits::Eight => self.packed_values::<8>(page, &side, rows),
                }
            }
        }
    }

    /// Adds values per token: `p v^ = (p s) c + p z` in each group of channels.
    fn packed_values<const BITS: usize>(&mut self, page: &[u8], side: &PackedSide, rows: Range<usize>) {
        let stride = self.call.heads.dim + 2;
        for span in side.group_spans() {
            let (scales, mins) = parameters(page, side, span.index, rows.clone());
            let weights = self.scratch.logits.chunks_exact(PAGE_TOKENS).take(self.queries);
            let folded = self.scratch.folded.chunks_exact_mut(PAGE_TOKENS);
            let states = self.partials.chunks_exact_mut(stride);
            for ((weights, folded), state) in weights.zip(folded).zip(states) {
                let offset = fold(&weights[..rows.len()], scales, mins, folded);
                for sum in &mut state[2..][span.lanes.clone()] {
                    *sum += offset;
                }
            }
            let shape = mix::Shape {
                m: self.queries,
                weight_stride: PAGE_TOKENS,
                rows: rows.len(),
                row_stride: side.row_bytes,
                units: span.bytes.len(),
                y_stride: stride,
            };
            let start = side.codes + rows.start * side.row_bytes + span.bytes.start;
            let codes = &page[start..start + (rows.len() - 1) * side.row_bytes + span.bytes.len()];
            let sums = &mut self.partials[2 + span.lanes.start..];
            mix_rows::<Codes<BITS>>(self.call.isa, &self.scratch.folded, codes, shape, sums);
        }
    }

    /// Adds the weighted values of tokens outside of pages; their weights begin at `first`.
    fn plain_values<E: Element>(&mut self, runs: [&[E]; 2], first: usize) {
        let d = self.call.heads.dim;
        let mut first = first;
        for run in runs {
            let rows = run.len() / d;
            let shape = mix::Shape {
                m: self.queries,
                weight_stride: PAGE_TOKENS,
                rows,
                row_stride: d,
                units: d,
                y_stride: d + 2,
            };
            mix_rows::<Plain<E>>(self.call.isa, &self.scratch.logits[first..], run, shape, &mut self.partials[2..]);
            first += rows;
        }
    }
}

/// `folded = weights * scales`; returns `weights . mins`.
fn fold(weights: &[f32], scales: &[f16], mins: &[f16], folded: &mut [f32]) -> f32 {
    let mut offset = 0.0;
    for (((weight, scale), min), folded) in weights.iter().zip(scales).zip(mins).zip(folded) {
        *folded = weight * scale.widen();
        offset += weight * min.widen();
    }
    offset
}

/// Scales and minimums of some rows of one group.
fn parameters<'a>(page: &'a [u8], side: &PackedSide, group: usize, rows: Range<usize>) -> (&'a [f16], &'a [f16]) {
    let of = |offset: usize| {
        let start = offset + group * side.rows * size_of::<f16>();
        let all: &[f16] = bytemuck::cast_slice(&page[start..start + side.rows * size_of::<f16>()]);
        &all[rows.clone()]
    };
    (of(side.scales), of(side.mins))
}

/// fp16 rows of tokens within a page.
fn half_rows(page: &[u8], offset: usize, tokens: Range<usize>, head_dim: usize) -> &[f16] {
    let row = head_dim * size_of::<f16>();
    let start = offset + tokens.start % PAGE_TOKENS * row;
    bytemuck::cast_slice(&page[start..start + tokens.len() * row])
}
