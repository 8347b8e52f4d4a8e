//! Up to 128 tokens as the queries of one KV head see them: logits, weights, weighted values.

use super::call::{Call, Scratch};
use super::dot::{self, dot_rows};
use super::element::Element;
use super::elementwise;
use super::mix::{self, mix_rows};
use super::page::{Page, Sums, Weights};
use super::page_sinks;
use super::rotate;
use super::simd::{CACHE_LINE, Isa};
use super::softmax::softmax;
use dibit_cache::{AutoSinks, PAGE_TOKENS, PackedSide, SideLayout, Span};
use dibit_quant::Hadamard;
use half::f16;
use std::ops::Range;

/// Up to 128 cached tokens.
pub(super) enum Tokens {
    /// Tokens whose keys lie in one page: their numbers among the packed tokens of their class.
    Packed(Range<usize>),
    /// Tokens whose keys lie in the window: their positions.
    Recent(Range<usize>),
}

/// One block of up to 128 keys, seen by the queries of one KV head of an item.
pub(super) struct Block<'a> {
    pub call: Call<'a>,
    pub span: &'a Span,
    /// Rows of the batch whose queries these are.
    pub rows: Range<usize>,
    pub class: usize,
    pub kv_head: usize,
    /// Number of the KV head in its frame.
    pub index: usize,
    pub queries: usize,
    /// The page that is read next, where that is known.
    pub next: Option<&'a [u8]>,
    pub scratch: &'a mut Scratch,
    pub partials: &'a mut [f32],
}

impl Block<'_> {
    /// Adds the tokens to the sums. Without classes, those up to `packed_values` have their values in a page.
    pub(super) fn look(&mut self, tokens: &Tokens, packed_values: usize) {
        let (range, in_page) = match tokens {
            Tokens::Packed(slots) => (slots.clone(), true),
            Tokens::Recent(positions) => (positions.clone(), false),
        };
        // Keys and values of classes leave the window together.
        let border = match self.span.classes.is_empty() {
            true => packed_values.clamp(range.start, range.end),
            false if in_page => range.end,
            false => range.start,
        };
        self.find_sinks(range.start..if in_page { range.end } else { border });
        let Call { store, layer, .. } = self.call;
        self.scratch.page_sinks.clear();
        if in_page {
            self.find_page_sinks(range.start);
            self.page_logits(range.clone());
        } else {
            self.plain_logits(store.ring_keys(self.span, layer, self.kv_head, range.clone()));
        }
        self.limit(range.clone(), in_page && !self.span.classes.is_empty());
        self.softmax(range.len());
        if border > range.start {
            self.page_values(range.start..border);
        }
        if range.end > border {
            let runs = store.ring_values(self.span, layer, self.kv_head, border..range.end);
            self.plain_values(runs, border - range.start);
        }
    }

    /// Notes the protected tokens among packed tokens of one page.
    fn find_sinks(&mut self, tokens: Range<usize>) {
        let all = self.call.store.sinks(self.span, self.call.layer).iter().enumerate();
        let own = self.span.classes.get(self.class);
        let number = |position: u32| match own {
            Some(own) => own.tokens.binary_search(&position).ok(),
            None => Some(position as usize),
        };
        self.scratch.sinks.clear();
        self.scratch.sinks.extend(
            all.filter_map(|(slot, position)| Some((number(*position)?, slot)))
                .filter(|(token, _)| tokens.contains(token))
                .map(|(token, slot)| (token - tokens.start, slot)),
        );
    }

    /// Notes the tokens that the page of a token protects.
    fn find_page_sinks(&mut self, token: usize) {
        let Call { store, layer, .. } = self.call;
        if let Some(sinks) = &store.layout().layer(self.class, layer).pages[self.kv_head].sinks {
            let page = store.page(self.class, self.blocks(token)[0], layer, self.kv_head);
            self.scratch.page_sinks.extend(page_sinks::slots(sinks, page));
        }
    }

    /// Block of a packed token, and the first one of its chunk.
    fn blocks(&self, token: usize) -> [u32; 2] {
        let index = token / PAGE_TOKENS;
        match self.span.classes.get(self.class) {
            Some(own) => [own.blocks[index]; 2],
            None => {
                let group = self.call.store.layout().layers[self.call.layer].group;
                [index, self.span.chunk_start(index)].map(|index| self.span.block(group, index))
            }
        }
    }

    /// A packed side of the page that holds a token.
    fn page<'b>(&self, token: usize, side: &'b PackedSide) -> Page<'b>
    where
        Self: 'b,
    {
        let Call { store, layer, .. } = self.call;
        let [bytes, chunk] = self.blocks(token).map(|block| store.page(self.class, block, layer, self.kv_head));
        // Each side asks for the half of the next page that it is of this one, in whole cache lines.
        let half = |page: &[u8]| (page.len() / 2).next_multiple_of(CACHE_LINE).min(page.len());
        let (first, second) = self.next.map(|page| page.split_at(half(page))).unwrap_or_default();
        let next = if side.tokens_are_lanes { first } else { second };
        Page { bytes, chunk, side, next }
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
        match store.layout().layer(self.class, layer).pages[self.kv_head].keys {
            SideLayout::Half { rows } => {
                let page = store.page(self.class, self.blocks(tokens.start)[0], layer, self.kv_head);
                self.plain_logits([half_rows(page, rows, tokens, d), &[]]);
            }
            SideLayout::Packed(side) => {
                let page = self.page(tokens.start, &side);
                let Scratch { queries, logits, folding, expanded, turned, .. } = &mut *self.scratch;
                logits.fill(0.0);
                if store.frames(layer).pre_rope.is_some() {
                    let keys = &expanded[self.index * d * PAGE_TOKENS..][..d * PAGE_TOKENS];
                    let shape = mix::Shape {
                        m: self.queries,
                        weight_stride: d,
                        rows: d,
                        row_stride: PAGE_TOKENS,
                        lanes: PAGE_TOKENS,
                        y_stride: PAGE_TOKENS,
                    };
                    mix_rows(isa, &turned[own.clone()], keys, shape, logits);
                } else {
                    let queries = if side.planes.is_some() { &*turned } else { &*queries };
                    let weights = Weights { values: &queries[own.clone()], count: self.queries, stride: d };
                    let mut sums = Sums { values: &mut *logits, stride: PAGE_TOKENS };
                    page.accumulate(isa, 0..d, weights, &mut sums, folding);
                    if store.layout().layer(self.class, layer).bias {
                        page.take_bias(weights, &mut sums);
                    }
                    if side.token_hadamard {
                        rotate_tokens(isa, logits);
                    }
                }
                self.page_sink_logits(page.bytes);
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

    /// Logits of the tokens that the page protects.
    fn page_sink_logits(&mut self, page: &[u8]) {
        let Call { isa, store, layer, heads, .. } = self.call;
        let Some(sinks) = &store.layout().layer(self.class, layer).pages[self.kv_head].sinks else { return };
        let own = self.own();
        let Scratch { queries, logits, page_sinks: slots, rows, .. } = &mut *self.scratch;
        if slots.is_empty() {
            return;
        }
        page_sinks::read(isa, sinks, true, slots.len(), page, rows);
        let shape = dot::Shape { m: self.queries, n: slots.len(), k: heads.dim };
        dot_rows(isa, &queries[own], &rows.values[..], shape, &mut |i, j, sum| {
            logits[i * PAGE_TOKENS + slots[j]] = sum;
        });
    }

    /// Adds the weighted values of the tokens that the page protects, and takes their weights out of the others'.
    fn page_sink_values(&mut self, page: &[u8]) {
        let Call { isa, store, layer, heads, .. } = self.call;
        let Some(sinks) = &store.layout().layer(self.class, layer).pages[self.kv_head].sinks else { return };
        let Scratch { logits, page_sinks: slots, rows, .. } = &mut *self.scratch;
        if slots.is_empty() {
            return;
        }
        let (d, stride) = (heads.dim, heads.dim + 2);
        page_sinks::read(isa, sinks, false, slots.len(), page, rows);
        let mut weights = [0.0; AutoSinks::MOST];
        for (own, state) in logits.chunks_exact_mut(PAGE_TOKENS).zip(self.partials.chunks_exact_mut(stride)) {
            for (weight, slot) in weights.iter_mut().zip(&*slots) {
                *weight = std::mem::take(&mut own[*slot]);
            }
            let shape = mix::Shape { m: 1, weight_stride: d, rows: slots.len(), row_stride: d, lanes: d, y_stride: d };
            mix_rows(isa, &weights[..], &rows.values[..slots.len() * d], shape, &mut state[2..]);
        }
    }

    /// Logits of tokens outside of pages, given as up to two runs of rows.
    pub(super) fn plain_logits<E: Element>(&mut self, runs: [&[E]; 2]) {
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

    /// Caps logits, and hides tokens at these positions from queries that come before them, or so far behind them that they
    /// do not see them. Numbers of tokens of a class are no positions: all of these are seen.
    pub(super) fn limit(&mut self, tokens: Range<usize>, all_seen: bool) {
        let Call { isa, layer, store, heads, softcap, .. } = self.call;
        let group = heads.per_key_value();
        if let Some(cap) = softcap {
            let logits = self.scratch.logits.chunks_exact_mut(PAGE_TOKENS).take(self.queries);
            logits.for_each(|logits| elementwise::cap(isa, cap, &mut logits[..tokens.len()]));
        }
        if all_seen {
            return;
        }
        let layer = &store.layout().layers[layer];
        for (i, row) in self.rows.clone().enumerate() {
            let position = self.call.position(self.span, row);
            let within = |position: usize| position.clamp(tokens.start, tokens.end) - tokens.start;
            let (first, end) = (within(layer.first_seen(position)), within(position + 1));
            if (first, end) == (0, tokens.len()) {
                continue;
            }
            for logits in self.scratch.logits[i * group * PAGE_TOKENS..].chunks_exact_mut(PAGE_TOKENS).take(group) {
                logits[..first].fill(f32::NEG_INFINITY);
                logits[end..tokens.len()].fill(f32::NEG_INFINITY);
            }
        }
    }

    /// Turns `tokens` logits into weights in the frame of the largest logit so far, and moves the sums there.
    pub(super) fn softmax(&mut self, tokens: usize) {
        let states = self.partials.chunks_exact_mut(self.call.heads.dim + 2);
        for (logits, state) in self.scratch.logits.chunks_exact_mut(PAGE_TOKENS).zip(states) {
            softmax(self.call.isa, &mut logits[..tokens], state);
        }
    }

    /// Adds the weighted values of tokens that lie in one page; their weights are the first ones.
    fn page_values(&mut self, tokens: Range<usize>) {
        let Call { isa, store, layer, heads, .. } = self.call;
        let (d, stride) = (heads.dim, heads.dim + 2);
        let side = match store.layout().layer(self.class, layer).pages[self.kv_head].values {
            SideLayout::Half { rows } => {
                let page = store.page(self.class, self.blocks(tokens.start)[0], layer, self.kv_head);
                return self.plain_values([half_rows(page, rows, tokens, d), &[]], 0);
            }
            SideLayout::Packed(side) => side,
        };
        let page = self.page(tokens.start, &side);
        self.page_sink_values(page.bytes);
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
            rotate_tokens(isa, logits);
        }
        let slots = tokens.start % PAGE_TOKENS..tokens.start % PAGE_TOKENS + tokens.len();
        let weights = Weights { values: logits, count: self.queries, stride: PAGE_TOKENS };
        let mut sums = Sums { values: &mut self.partials[2..], stride };
        page.accumulate(isa, slots, weights, &mut sums, folding);
    }

    /// Adds the weighted values of tokens outside of pages; their weights begin at `first`.
    pub(super) fn plain_values<E: Element>(&mut self, runs: [&[E]; 2], first: usize) {
        let d = self.call.heads.dim;
        let mut first = first;
        for run in runs {
            let rows = run.len() / d;
            let shape = mix::Shape {
                m: self.queries,
                weight_stride: PAGE_TOKENS,
                rows,
                row_stride: d,
                lanes: d,
                y_stride: d + 2,
            };
            mix_rows(self.call.isa, &self.scratch.logits[first..], run, shape, &mut self.partials[2..]);
            first += rows;
        }
    }
}

/// Rotates the 128 numbers of each row along the tokens of a page.
fn rotate_tokens(isa: Isa, rows: &mut [f32]) {
    let hadamard = Hadamard::new(PAGE_TOKENS).expect("a power of two");
    rows.chunks_exact_mut(PAGE_TOKENS).for_each(|row| rotate::hadamard(isa, &hadamard, row));
}

/// fp16 rows of tokens within a page.
fn half_rows(page: &[u8], offset: usize, tokens: Range<usize>, head_dim: usize) -> &[f16] {
    let row = head_dim * size_of::<f16>();
    let start = offset + tokens.start % PAGE_TOKENS * row;
    bytemuck::cast_slice(&page[start..start + tokens.len() * row])
}
