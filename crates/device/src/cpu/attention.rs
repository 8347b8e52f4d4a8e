//! Attention on the CPU: a sum over parts.
//!
//! The visible tokens of a query are cut into blocks of up to 128: packed pages, what the window holds of a page's
//! tokens, and the pass in flight. Each block yields logits and weighted values; an online softmax joins them. A
//! packed block is read as it lies ([`super::page`]); only keys that are stored before RoPE are expanded, a page at a
//! time, in a buffer that stays in cache. Protected tokens lie in slots of their own: their logits and values replace
//! those of their place in a page.
//!
//! Long histories of single rows are cut into splits of a fixed number of tokens, which depend on nothing but the
//! sequence's length, so that neither threads nor batches change a result.

use super::dot::{self, dot_rows};
use super::element::Element;
use super::exp::exp_shifted;
use super::mix::{self, Plain, mix_rows};
use super::page::{Folding, Page, Sums, Weights};
use super::simd::Isa;
use super::store::CpuStore;
use crate::Span;
use dibit_cache::{PAGE_TOKENS, PackedSide, SideLayout};
use dibit_quant::Hadamard;
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

/// Some query rows of the KV heads of one frame against one split of their history.
struct Item {
    span: usize,
    /// First KV head of the frame.
    first_head: usize,
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
    /// `[kv head of the frame][query][head_dim]`, scaled by `1 / sqrt(head_dim)`.
    queries: Vec<f32>,
    /// `[query][128]`, logits and then weights.
    logits: Vec<f32>,
    folding: Folding,
    /// Keys of a page of a frame, `[channel][128]`, turned by the angles within the page.
    expanded: Vec<f32>,
    /// Queries turned back by the angle of the page.
    turned: Vec<f32>,
    row: Vec<f32>,
    /// Protected tokens of the block: token within the block, and slot.
    sinks: Vec<(usize, usize)>,
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
    /// Whether the pass in flight is seen exactly. Where it is not, its tokens are stored already.
    pub incoming: bool,
}

impl Call<'_> {
    /// KV heads that are read together.
    fn frame(&self) -> usize {
        self.store.layout().layers[self.layer].frame
    }
}

/// Attends rows `rows` of the batch; `q` and `out` begin at the first of them.
pub(super) fn attend(call: Call, buffers: &mut Buffers, rows: Range<usize>, q: &[f32], out: &mut [f32]) {
    let heads = call.heads;
    let (frame, shared) = (call.frame(), heads.per_key_value());
    let item_rows = (TASK_QUERIES / (frame * shared)).max(1).min(rows.len());
    let stride = heads.dim + 2;
    let item_len = item_rows * frame * shared * stride;
    let Buffers { items, partials } = buffers;
    plan(items, call, rows.clone(), item_rows);
    if partials.len() < items.len() * item_len {
        partials.resize(items.len() * item_len, 0.0);
    }
    items.par_iter().zip(partials.par_chunks_mut(item_len)).for_each(|(item, partials)| {
        SCRATCH.with_borrow_mut(|scratch| {
            load_queries(scratch, call, q, item, rows.start);
            run(call, item, scratch, partials);
        });
    });
    let width = heads.num * heads.dim;
    out[..rows.len() * width].par_chunks_mut(width).zip(rows).for_each(|(out, row)| {
        for (kv_head, outs) in out.chunks_exact_mut(shared * heads.dim).enumerate() {
            let own = |item: &&Item| item.first_head == kv_head / frame * frame && item.rows.contains(&row);
            let first = items.iter().position(|item| own(&item)).expect("every row is planned");
            let splits = items[first..].iter().take_while(own).count();
            let rows = &items[first].rows;
            let query = (kv_head % frame * rows.len() + row - rows.start) * shared;
            let parts = partials[first * item_len..].chunks(item_len).take(splits);
            for (head, out) in outs.chunks_exact_mut(heads.dim).enumerate() {
                let at = (query + head) * stride;
                join(parts.clone().map(|part| &part[at..at + stride]), out);
                if let Some(rotation) = &call.store.frames(call.layer).values {
                    SCRATCH.with_borrow_mut(|scratch| rotation.apply_inverse(kv_head, out, &mut scratch.row));
                }
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
        for first_head in (0..call.heads.num_key_value).step_by(call.frame()) {
            for first in own.clone().step_by(item_rows) {
                let rows = first..own.end.min(first + item_rows);
                let mut start = 0;
                loop {
                    let end = span.cached.min(start + split.min(span.cached));
                    let last = end == span.cached;
                    let incoming = last && call.incoming;
                    items.push(Item { span: index, first_head, rows: rows.clone(), tokens: start..end, incoming });
                    if last {
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

fn load_queries(scratch: &mut Scratch, call: Call, q: &[f32], item: &Item, first_row: usize) {
    let heads = call.heads;
    let (d, shared) = (heads.dim, heads.per_key_value());
    let scale = 1.0 / (d as f32).sqrt();
    let rotation = &call.store.frames(call.layer).keys;
    scratch.queries.clear();
    for kv_head in item.first_head..item.first_head + call.frame() {
        for row in item.rows.clone() {
            let at = ((row - first_row) * heads.num + kv_head * shared) * d;
            for query in q[at..at + shared * d].chunks_exact(d) {
                let start = scratch.queries.len();
                scratch.queries.extend(query.iter().map(|x| x * scale));
                if let Some(rotation) = rotation {
                    rotation.apply(kv_head, &mut scratch.queries[start..], &mut scratch.row);
                }
            }
        }
    }
    let queries = item.rows.len() * shared;
    scratch.logits.resize(queries * PAGE_TOKENS, 0.0);
}

fn run(call: Call, item: &Item, scratch: &mut Scratch, partials: &mut [f32]) {
    let span = &call.spans[item.span];
    let (frame, shared) = (call.frame(), call.heads.per_key_value());
    let stride = call.heads.dim + 2;
    let queries = item.rows.len() * shared;
    let partials = &mut partials[..frame * queries * stride];
    for state in partials.chunks_exact_mut(stride) {
        state.fill(0.0);
        state[0] = f32::NEG_INFINITY;
    }
    let window = call.store.layout().window;
    let (packed_keys, packed_values) = (window.packed_keys(span.cached), window.packed_values(span.cached));
    let mut start = item.tokens.start;
    while start < item.tokens.end {
        let end = item.tokens.end.min(start / PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS);
        let tokens = start..end;
        let in_page = end <= packed_keys;
        debug_assert!(in_page || start >= packed_keys, "the border of packed keys lies on the grid of pages");
        let border = packed_values.clamp(start, end);
        if in_page {
            expand(call, span, item.first_head, start, scratch);
        }
        for (index, partials) in partials.chunks_exact_mut(queries * stride).enumerate() {
            let kv_head = item.first_head + index;
            let mut block = Block { call, span, kv_head, index, queries, scratch, partials };
            block.find_sinks(start..end.min(packed_keys.max(border)));
            if in_page {
                block.page_logits(tokens.clone());
            } else {
                block.plain_logits(call.store.ring_keys(span, call.layer, kv_head, tokens.clone()));
            }
            block.softmax(tokens.len());
            if border > start {
                block.page_values(start..border);
            }
            if end > border {
                let runs = call.store.ring_values(span, call.layer, kv_head, border..end);
                block.plain_values(runs, border - start);
            }
        }
        start = end;
    }
    if item.incoming {
        for first in (span.rows.start..item.rows.end).step_by(PAGE_TOKENS) {
            let rows = first..item.rows.end.min(first + PAGE_TOKENS);
            for (index, partials) in partials.chunks_exact_mut(queries * stride).enumerate() {
                let kv_head = item.first_head + index;
                let mut block = Block { call, span, kv_head, index, queries, scratch, partials };
                block.plain_logits([call.store.incoming_keys(kv_head, rows.clone()), &[]]);
                block.mask(item.rows.clone(), rows.clone(), shared);
                block.softmax(rows.len());
                block.plain_values([call.store.incoming_values(kv_head, rows.clone()), &[]], 0);
            }
        }
    }
}

/// Expands the keys of a page that are stored before RoPE, for all heads of a frame.
fn expand(call: Call, span: &Span, first_head: usize, token: usize, scratch: &mut Scratch) {
    let Some(pre_rope) = &call.store.frames(call.layer).pre_rope else { return };
    let SideLayout::Packed(side) = &call.store.layout().layers[call.layer].page.keys else { return };
    let Scratch { expanded, folding, .. } = scratch;
    pre_rope.load(first_head, expanded, |head, place, out| {
        let bytes = call.store.page(span, call.layer, first_head + head, token);
        Page { bytes, chunk: bytes, side }.expand(call.isa, folding, place, out);
    });
    pre_rope.turn_back(token / PAGE_TOKENS * PAGE_TOKENS, &scratch.queries, &mut scratch.turned);
}

/// One block of up to 128 keys, seen by the queries of one KV head of an item.
struct Block<'a> {
    call: Call<'a>,
    span: &'a Span,
    kv_head: usize,
    /// Number of the KV head in its frame.
    index: usize,
    queries: usize,
    scratch: &'a mut Scratch,
    partials: &'a mut [f32],
}

impl Block<'_> {
    /// Notes the protected tokens among packed tokens `tokens` of one page.
    fn find_sinks(&mut self, tokens: Range<usize>) {
        let all = self.call.store.sinks(self.span, self.call.layer).iter().enumerate();
        self.scratch.sinks.clear();
        self.scratch.sinks.extend(
            all.map(|(slot, token)| (*token as usize, slot))
                .filter(|(token, _)| tokens.contains(token))
                .map(|(token, slot)| (token - tokens.start, slot)),
        );
    }

    /// The queries of this KV head.
    fn own(&self) -> Range<usize> {
        let width = self.queries * self.call.heads.dim;
        self.index * width..(self.index + 1) * width
    }

    /// Logits of tokens that lie in one page.
    fn page_logits(&mut self, tokens: Range<usize>) {
        let Call { isa, store, layer, heads, .. } = self.call;
        let d = heads.dim;
        let own = self.own();
        match store.layout().layers[layer].page.keys {
            SideLayout::Half { rows } => {
                let page = store.page(self.span, layer, self.kv_head, tokens.start);
                self.plain_logits([half_rows(page, rows, tokens, d), &[]]);
            }
            SideLayout::Packed(side) => {
                let Scratch { queries, logits, folding, expanded, turned, .. } = &mut *self.scratch;
                logits.fill(0.0);
                if store.frames(layer).pre_rope.is_some() {
                    let keys = &expanded[self.index * d * PAGE_TOKENS..][..d * PAGE_TOKENS];
                    let shape = mix::Shape {
                        m: self.queries,
                        weight_stride: d,
                        rows: d,
                        row_stride: PAGE_TOKENS,
                        units: PAGE_TOKENS,
                        y_stride: PAGE_TOKENS,
                    };
                    mix_rows::<Plain<f32>>(isa, &turned[own.clone()], keys, shape, logits);
                } else {
                    let page = self.call.page(self.span, self.kv_head, tokens.start, &side);
                    let weights = Weights { values: &queries[own.clone()], count: self.queries, stride: d };
                    let mut sums = Sums { values: &mut *logits, stride: PAGE_TOKENS };
                    page.accumulate(isa, 0..d, weights, &mut sums, folding);
                    if side.token_hadamard {
                        rotate_tokens(logits);
                    }
                }
            }
        }
        // Protected tokens are seen as they were.
        let Scratch { queries, logits, sinks, .. } = &mut *self.scratch;
        for &(token, slot) in &*sinks {
            let [key, _] = store.sink(self.span, layer, self.kv_head, slot);
            let shape = dot::Shape { m: self.queries, n: 1, k: d };
            dot_rows(isa, &queries[own.clone()], key, shape, &mut |i, _, sum| logits[i * PAGE_TOKENS + token] = sum);
        }
    }

    /// Logits of tokens outside of pages, given as up to two runs of rows.
    fn plain_logits<E: Element>(&mut self, runs: [&[E]; 2]) {
        let d = self.call.heads.dim;
        let own = self.own();
        let Scratch { queries, logits, .. } = &mut *self.scratch;
        let mut first = 0;
        for run in runs {
            let shape = dot::Shape { m: self.queries, n: run.len() / d, k: d };
            dot_rows(self.call.isa, &queries[own.clone()], run, shape, &mut |i, j, sum| {
                logits[i * PAGE_TOKENS + first + j] = sum
            });
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
    fn page_values(&mut self, tokens: Range<usize>) {
        let Call { isa, store, layer, heads, .. } = self.call;
        let (d, stride) = (heads.dim, heads.dim + 2);
        let side = match store.layout().layers[layer].page.values {
            SideLayout::Half { rows } => {
                let page = store.page(self.span, layer, self.kv_head, tokens.start);
                return self.plain_values([half_rows(page, rows, tokens, d), &[]], 0);
            }
            SideLayout::Packed(side) => side,
        };
        let Scratch { logits, folding, sinks, .. } = &mut *self.scratch;
        for &(token, slot) in sinks.iter().filter(|(token, _)| *token < tokens.len()) {
            let [_, value] = store.sink(self.span, layer, self.kv_head, slot);
            for (weights, state) in logits.chunks_exact_mut(PAGE_TOKENS).zip(self.partials.chunks_exact_mut(stride)) {
                let weight = std::mem::take(&mut weights[token]);
                for (sum, value) in state[2..].iter_mut().zip(value) {
                    *sum += weight * value.widen();
                }
            }
        }
        if side.token_hadamard {
            rotate_tokens(logits);
        }
        let slots = tokens.start % PAGE_TOKENS..tokens.start % PAGE_TOKENS + tokens.len();
        let weights = Weights { values: logits, count: self.queries, stride: PAGE_TOKENS };
        let mut sums = Sums { values: &mut self.partials[2..], stride };
        self.call
            .page(self.span, self.kv_head, tokens.start, &side)
            .accumulate(isa, slots, weights, &mut sums, folding);
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

impl<'a> Call<'a> {
    fn page(&self, span: &Span, kv_head: usize, token: usize, side: &'a PackedSide) -> Page<'a> {
        let bytes = self.store.page(span, self.layer, kv_head, token);
        Page { bytes, chunk: self.store.chunk_page(span, self.layer, kv_head, token), side }
    }
}

/// Rotates the 128 numbers of each row along the tokens of a page.
fn rotate_tokens(rows: &mut [f32]) {
    let hadamard = Hadamard::new(PAGE_TOKENS).expect("a power of two");
    rows.chunks_exact_mut(PAGE_TOKENS).for_each(|row| hadamard.apply(row));
}

/// fp16 rows of tokens within a page.
fn half_rows(page: &[u8], offset: usize, tokens: Range<usize>, head_dim: usize) -> &[f16] {
    let row = head_dim * size_of::<f16>();
    let start = offset + tokens.start % PAGE_TOKENS * row;
    bytemuck::cast_slice(&page[start..start + tokens.len() * row])
}
