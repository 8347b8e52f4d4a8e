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

use super::adapters;
use super::block::{Block, Tokens};
use super::call::{Call, Scratch};
use super::page::Page;
use dibit_cache::{PAGE_TOKENS, SideLayout, Span};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Query rows of a task, counted over the heads that share a KV head.
const TASK_QUERIES: usize = 48;

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
    /// What the linear correction adds: `[kv head][row][query head][normaliser, head_dim weighted values]`.
    corrections: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Attends rows `rows` of the batch; `q` and `out` begin at the first of them.
pub(super) fn attend(call: Call, buffers: &mut Buffers, rows: Range<usize>, q: &[f32], out: &mut [f32]) {
    let heads = call.heads;
    let (frame, shared) = (call.frame(), heads.per_key_value());
    let item_rows = (TASK_QUERIES / (frame * shared)).max(1).min(rows.len());
    let stride = heads.dim + 2;
    let item_len = item_rows * frame * shared * stride;
    let Buffers { items, partials, corrections } = buffers;
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
    let corrected = correct(call, rows.clone(), q, corrections);
    let width = heads.num * heads.dim;
    let count = rows.len();
    let powers = call.store.powers(call.layer);
    out[..rows.len() * width].par_chunks_mut(width).zip(rows).enumerate().for_each(|(index, (out, row))| {
        for (kv_head, outs) in out.chunks_exact_mut(shared * heads.dim).enumerate() {
            let own = |item: &&Item| item.first_head == kv_head / frame * frame && item.rows.contains(&row);
            let first = items.iter().position(|item| own(&item)).expect("every row is planned");
            let splits = items[first..].iter().take_while(own).count();
            let rows = &items[first].rows;
            let query = (kv_head % frame * rows.len() + row - rows.start) * shared;
            let parts = partials[first * item_len..].chunks(item_len).take(splits);
            for (head, out) in outs.chunks_exact_mut(heads.dim).enumerate() {
                let at = (query + head) * stride;
                let correction = corrected.then(|| {
                    let own = (kv_head * count + index) * shared + head;
                    &corrections[own * (heads.dim + 1)..][..heads.dim + 1]
                });
                let sink = call.sinks.map(|own| own[kv_head * shared + head]);
                join(parts.clone().map(|part| &part[at..at + stride]), correction, sink, out);
                if let Some(rotation) = &call.store.frames(call.layer).values {
                    SCRATCH.with_borrow_mut(|scratch| rotation.apply_inverse(call.isa, kv_head, out, &mut scratch.row));
                }
                let factor = powers.factor(false, kv_head);
                if factor != 1.0 {
                    out.iter_mut().for_each(|x| *x /= factor);
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
        let whole = span.rows.len() > 1 || !span.classes.is_empty();
        let split = if whole { usize::MAX } else { call.split_tokens };
        for first_head in (0..call.heads.num_key_value).step_by(call.frame()) {
            for first in own.clone().step_by(item_rows) {
                let rows = first..own.end.min(first + item_rows);
                // Pages are looked at from their first token on.
                let seen = call.first_seen(span, first) / PAGE_TOKENS * PAGE_TOKENS;
                let mut start = seen.min(span.cached);
                loop {
                    let end = span.cached.min(start.saturating_add(split));
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
/// (KVLinC, Algorithm 1). What the correction adds to both sums is in the frame of the largest logit of all. A sink is the
/// logit of a token without a value.
fn join<'a>(
    parts: impl Iterator<Item = &'a [f32]> + Clone,
    correction: Option<&[f32]>,
    sink: Option<f32>,
    out: &mut [f32],
) {
    let maximum = parts.clone().map(|part| part[0]).chain(sink).fold(f32::NEG_INFINITY, f32::max);
    let mut normaliser = sink.map_or(0.0, |sink| (sink - maximum).exp());
    out.fill(0.0);
    for part in parts {
        let weight = (part[0] - maximum).exp();
        normaliser += weight * part[1];
        for (out, value) in out.iter_mut().zip(&part[2..]) {
            *out += weight * value;
        }
    }
    if let Some((correction, values)) = correction.and_then(<[f32]>::split_first) {
        normaliser += correction;
        out.iter_mut().zip(values).for_each(|(out, value)| *out += value);
    }
    for out in out {
        *out /= normaliser;
    }
}

/// What the states of the layer's linear correction add to these rows; false where there is nothing to add.
fn correct(call: Call, rows: Range<usize>, q: &[f32], corrections: &mut Vec<f32>) -> bool {
    let Call { store, layer, heads, .. } = call;
    let Some(maps) = &store.frames(layer).adapters else { return false };
    let window = store.layout().window;
    let has_state = |span: &&Span| window.packed_keys(span.cached) > 0;
    let (shared, width) = (heads.per_key_value(), heads.num * heads.dim);
    let per_row = shared * (heads.dim + 1);
    corrections.clear();
    if call.spans.iter().find(has_state).is_none() {
        return false;
    }
    corrections.resize(heads.num_key_value * rows.len() * per_row, 0.0);
    let correct = |(kv_head, own): (usize, &mut [f32])| {
        for span in call.spans.iter().filter(has_state) {
            let Some(state) = store.state(span, layer, kv_head) else { return };
            let own_rows = span.rows.start.max(rows.start)..span.rows.end.min(rows.end);
            if own_rows.is_empty() {
                continue;
            }
            let first = own_rows.start - rows.start;
            let queries = &q[first * width + kv_head * shared * heads.dim..];
            let out = &mut own[first * per_row..][..own_rows.len() * per_row];
            let blocks = out.par_chunks_mut(TASK_QUERIES * per_row).enumerate();
            blocks.for_each(|(block, out)| {
                let queries = &queries[block * TASK_QUERIES * width..];
                SCRATCH.with_borrow_mut(|scratch| {
                    adapters::correct(maps, call.isa, kv_head, queries, width, &state, out, &mut scratch.correction);
                });
            });
        }
    };
    corrections.par_chunks_mut(rows.len() * per_row).enumerate().for_each(correct);
    true
}

fn load_queries(scratch: &mut Scratch, call: Call, q: &[f32], item: &Item, first_row: usize) {
    let heads = call.heads;
    let (d, shared) = (heads.dim, heads.per_key_value());
    let powers = call.store.powers(call.layer);
    let rotation = &call.store.frames(call.layer).keys;
    scratch.queries.clear();
    for kv_head in item.first_head..item.first_head + call.frame() {
        // What keys were divided by is taken back.
        let scale = 1.0 / (d as f32).sqrt() / powers.factor(true, kv_head);
        for row in item.rows.clone() {
            let at = ((row - first_row) * heads.num + kv_head * shared) * d;
            for query in q[at..at + shared * d].chunks_exact(d) {
                let start = scratch.queries.len();
                scratch.queries.extend(query.iter().map(|x| x * scale));
                if let Some(rotation) = rotation {
                    rotation.apply(call.isa, kv_head, &mut scratch.queries[start..], &mut scratch.row);
                }
            }
        }
    }
    if let Some(order) = &call.store.frames(call.layer).order {
        let Scratch { queries, turned, .. } = &mut *scratch;
        turned.clear();
        for (own, queries) in order[item.first_head..].iter().zip(queries.chunks(item.rows.len() * shared * d)) {
            let queries = queries.chunks_exact(d);
            queries.for_each(|query| turned.extend(own.iter().map(|channel| query[*channel])));
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
    let mut look = |class: usize, tokens: Tokens| {
        if let Tokens::Packed(slots) = &tokens {
            expand(call, span, item.first_head, slots.start, scratch);
        }
        for (index, partials) in partials.chunks_exact_mut(queries * stride).enumerate() {
            let kv_head = item.first_head + index;
            let next = next_page(call, span, class, &tokens, packed_keys, kv_head);
            let rows = item.rows.clone();
            let mut block = Block { call, span, rows, class, kv_head, index, queries, next, scratch, partials };
            block.look(&tokens, packed_values);
        }
    };
    for (class, own) in span.classes.iter().enumerate() {
        let packed = own.packed(packed_keys);
        for start in (0..packed).step_by(PAGE_TOKENS) {
            look(class, Tokens::Packed(start..packed.min(start + PAGE_TOKENS)));
        }
    }
    let mut start = if span.classes.is_empty() { item.tokens.start } else { packed_keys };
    while start < item.tokens.end {
        let end = item.tokens.end.min(start / PAGE_TOKENS * PAGE_TOKENS + PAGE_TOKENS);
        debug_assert!(
            end <= packed_keys || start >= packed_keys,
            "the border of packed keys lies on the grid of pages"
        );
        look(0, if end <= packed_keys { Tokens::Packed(start..end) } else { Tokens::Recent(start..end) });
        start = end;
    }
    if item.incoming {
        let seen = span.rows.start + call.first_seen(span, item.rows.start).saturating_sub(span.cached);
        for first in (seen..item.rows.end).step_by(PAGE_TOKENS) {
            let keys = first..item.rows.end.min(first + PAGE_TOKENS);
            for (index, partials) in partials.chunks_exact_mut(queries * stride).enumerate() {
                let kv_head = item.first_head + index;
                let (class, next) = (0, None);
                let rows = item.rows.clone();
                let mut block = Block { call, span, rows, class, kv_head, index, queries, next, scratch, partials };
                block.plain_logits([call.store.incoming_keys(kv_head, keys.clone()), &[]]);
                let first = span.cached + keys.start - span.rows.start;
                block.limit(first..first + keys.len(), false);
                block.softmax(keys.len());
                block.plain_values([call.store.incoming_values(kv_head, keys.clone()), &[]], 0);
            }
        }
    }
}

/// The page behind that of these tokens, where packed keys lie in it, up to the rows of tokens that it may protect. Pages of
/// 16 bit are long enough for the processor to find by itself.
fn next_page<'a>(
    call: Call<'a>,
    span: &Span,
    class: usize,
    tokens: &Tokens,
    packed_keys: usize,
    kv_head: usize,
) -> Option<&'a [u8]> {
    let Tokens::Packed(slots) = tokens else { return None };
    let index = slots.start / PAGE_TOKENS + 1;
    let layer = call.store.layout().layer(class, call.layer);
    let page = &layer.pages[kv_head];
    let packed = matches!((page.keys, page.values), (SideLayout::Packed(_), SideLayout::Packed(_)));
    if !packed || !span.classes.is_empty() || index * PAGE_TOKENS >= packed_keys {
        return None;
    }
    let bytes = call.store.page(class, span.block(layer.group, index), call.layer, kv_head);
    Some(page.sinks.map_or(bytes, |sinks| &bytes[..sinks.keys]))
}

/// Expands the keys of a page that are stored before RoPE, for all heads of a frame.
fn expand(call: Call, span: &Span, first_head: usize, token: usize, scratch: &mut Scratch) {
    let Some(pre_rope) = &call.store.frames(call.layer).pre_rope else { return };
    let layer = &call.store.layout().layers[call.layer];
    let SideLayout::Packed(side) = &layer.pages[first_head].keys else { return };
    let Scratch { expanded, folding, .. } = scratch;
    pre_rope.load(call.isa, first_head, expanded, |head, place, out| {
        let bytes = call.store.page(0, span.block(layer.group, token / PAGE_TOKENS), call.layer, first_head + head);
        Page { bytes, chunk: bytes, side, next: &[] }.expand(call.isa, folding, place, out);
    });
    pre_rope.turn_back(token / PAGE_TOKENS * PAGE_TOKENS, &scratch.queries, &mut scratch.turned);
}
