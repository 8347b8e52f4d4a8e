//! The linear correction (KVLinC, section 3.2): features of queries and of what the codes of keys miss, and the states
//! that sum up what the codes of a whole sequence miss.
//!
//! `phi(x) = [softmax(x W1), softmax(x W2)]`, equation 4. When keys are packed, `S += phi_k(K - K^)^T V` and
//! `P += phi_k(K - K^)`; a query adds `phi_q(q) S` to its weighted values and `phi_q(q) P` to its normaliser, in the frame
//! of its largest logit (Algorithm 1).

use super::dot::{self, dot_rows};
use super::element::Element;
use super::mix::{self, mix_rows};
use super::simd::Isa;
use super::softmax::softmax;
use dibit_cache::FeatureMaps;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// The state of a KV head, `S` and behind it `P`.
pub(super) enum State<'a> {
    Fp32(&'a [f32]),
    Fp16(&'a [f16]),
}

/// The same, to be added to.
pub(super) enum StateMut<'a> {
    Fp32(&'a mut [f32]),
    Fp16(&'a mut [f16]),
}

/// Buffers of the correction.
#[derive(Default)]
pub(super) struct Buffers {
    /// `[row][D]`
    features: Vec<f32>,
    /// `[D][row]`
    turned: Vec<f32>,
    /// What is added to a state.
    sums: Vec<f32>,
    /// A state as it is added to.
    wide: Vec<f32>,
}

impl StateMut<'_> {
    pub(super) fn clear(&mut self) {
        match self {
            StateMut::Fp32(state) => state.fill(0.0),
            StateMut::Fp16(state) => state.fill(f16::ZERO),
        }
    }
}

/// The features of rows of `head_dim` numbers, which are `stride` numbers apart, by one map, `[head_dim][D]`; rows of
/// features are `features_stride` numbers apart.
#[allow(clippy::too_many_arguments)]
fn map_rows(
    maps: &FeatureMaps,
    isa: Isa,
    map: &[f32],
    x: (&[f32], usize),
    rows: usize,
    features: &mut [f32],
    features_stride: usize,
) {
    let width = maps.features;
    let shape = mix::Shape {
        m: rows,
        weight_stride: x.1,
        rows: maps.head_dim,
        row_stride: width,
        lanes: width,
        y_stride: features_stride,
    };
    features.chunks_mut(features_stride).take(rows).for_each(|row| row[..width].fill(0.0));
    mix_rows(isa, x.0, map, shape, features);
    for row in features.chunks_mut(features_stride).take(rows) {
        for half in row[..width].chunks_exact_mut(width / 2) {
            let mut state = [f32::NEG_INFINITY, 0.0];
            softmax(isa, half, &mut state);
            let inverse = 1.0 / state[1];
            half.iter_mut().for_each(|feature| *feature *= inverse);
        }
    }
}

/// Adds tokens to the state of a KV head: what the codes of their keys miss, and their values, `[token][head_dim]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn flush(
    maps: &FeatureMaps,
    isa: Isa,
    kv_head: usize,
    missed: &[f32],
    values: &[f32],
    state: &mut StateMut,
    buffers: &mut Buffers,
) {
    let (d, width) = (maps.head_dim, maps.features);
    let tokens = missed.len() / d;
    let Buffers { features, turned, sums, wide } = buffers;
    features.resize(tokens * width, 0.0);
    map_rows(maps, isa, &maps.key[kv_head * d * width..][..d * width], (missed, d), tokens, features, width);
    turned.resize(tokens * width, 0.0);
    for (token, features) in features.chunks_exact(width).enumerate() {
        features.iter().enumerate().for_each(|(feature, x)| turned[feature * tokens + token] = *x);
    }
    sums.clear();
    sums.resize(width * (d + 1), 0.0);
    let (s, p) = sums.split_at_mut(width * d);
    let shape = mix::Shape { m: width, weight_stride: tokens, rows: tokens, row_stride: d, lanes: d, y_stride: d };
    mix_rows(isa, turned, values, shape, s);
    for features in features.chunks_exact(width) {
        p.iter_mut().zip(features).for_each(|(p, feature)| *p += feature);
    }
    match state {
        StateMut::Fp32(state) => state.iter_mut().zip(sums).for_each(|(state, sum)| *state += *sum),
        StateMut::Fp16(state) => {
            wide.resize(state.len(), 0.0);
            state.convert_to_f32_slice(wide);
            wide.iter_mut().zip(sums).for_each(|(state, sum)| *state += *sum);
            state.convert_from_f32_slice(wide);
        }
    }
}

/// What the state of a KV head adds to rows of queries: `[row][query head][normaliser, head_dim weighted values]`.
/// Queries are rows `stride` numbers apart, the query heads of the KV head side by side.
#[allow(clippy::too_many_arguments)]
pub(super) fn correct(
    maps: &FeatureMaps,
    isa: Isa,
    kv_head: usize,
    queries: &[f32],
    stride: usize,
    state: &State,
    out: &mut [f32],
    buffers: &mut Buffers,
) {
    match state {
        State::Fp32(state) => correct_by(maps, isa, kv_head, queries, stride, state, out, buffers),
        State::Fp16(state) => correct_by(maps, isa, kv_head, queries, stride, state, out, buffers),
    }
}

#[allow(clippy::too_many_arguments)]
fn correct_by<E: Element>(
    maps: &FeatureMaps,
    isa: Isa,
    kv_head: usize,
    queries: &[f32],
    stride: usize,
    state: &[E],
    out: &mut [f32],
    buffers: &mut Buffers,
) {
    let (d, width) = (maps.head_dim, maps.features);
    let shared = maps.shared;
    let rows = out.len() / (shared * (d + 1));
    let features = &mut buffers.features;
    features.resize(rows * shared * width, 0.0);
    for head in 0..shared {
        let query_head = kv_head * shared + head;
        let map = &maps.query[query_head * d * width..][..d * width];
        let own = &mut features[head * width..];
        map_rows(maps, isa, map, (&queries[head * d..], stride), rows, own, shared * width);
        let gate = maps.gates[query_head];
        if gate != 1.0 {
            own.chunks_mut(shared * width).for_each(|row| row[..width].iter_mut().for_each(|x| *x *= gate));
        }
    }
    let (s, p) = state.split_at(width * d);
    out.fill(0.0);
    let shape = dot::Shape { m: rows * shared, n: 1, k: width };
    dot_rows(isa, features, p, shape, &mut |row, _, sum| out[row * (d + 1)] = sum);
    let shape =
        mix::Shape { m: rows * shared, weight_stride: width, rows: width, row_stride: d, lanes: d, y_stride: d + 1 };
    mix_rows(isa, features, s, shape, &mut out[1..]);
}
