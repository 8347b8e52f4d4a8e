//! What feature maps begin with.

use super::adapter::AdapterShape;
use super::recipe::Start;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Stream of random numbers of the first layer's start.
const START_STREAM: u64 = 1 << 50;

/// Spread of the products of queries, and of what codes miss, with a feature's direction.
const SPREAD: f32 = 1.5;

/// What a query at the mean has as product with a direction of features that queries prefer, and minus that with others.
const PREFERENCE: f32 = 2.0;

/// What a layer shows before training.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Seen {
    /// Mean query of each query head, `[head][head_dim]`.
    pub mean_query: Vec<f32>,
    /// Root of the mean squared norm of the queries of each query head.
    pub query_norm: Vec<f32>,
    /// The same of what codes miss, for each KV head.
    pub missed_norm: Vec<f32>,
}

/// A uniform number between -1 and 1.
fn uniform(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() >> 8) as f32 / (1u32 << 23) as f32 - 1.0
}

/// A number of mean 0 and variance 1: a sum of uniform ones, near enough to a normal one.
fn spread(random: &mut ChaCha8Rng) -> f32 {
    (0..3).map(|_| uniform(random)).sum()
}

/// All maps of a layer at their start, in the order of [`AdapterShape::numbers`]; all starts but the uniform one look at
/// what was seen.
pub(crate) fn start(shape: AdapterShape, start: Start, seed: u64, layer: usize, seen: Option<&Seen>) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(START_STREAM + layer as u64);
    match (start, seen) {
        (Start::Uniform, _) | (_, None) => {
            let bound = (6.0 / (shape.head_dim * shape.features / 2) as f32).sqrt();
            (0..shape.numbers()).map(|_| bound * uniform(&mut random)).collect()
        }
        (Start::Aligned, Some(seen)) => aligned(shape, &mut random, seen),
        (Start::Apart, Some(seen)) => apart(shape, &mut random, seen),
    }
}

/// One over a number, or 0.
fn inverse(x: f32) -> f32 {
    if x > 0.0 { 1.0 / x } else { 0.0 }
}

/// The same random directions for queries and for what codes of their keys miss, so that features meet where both point
/// the same way.
fn aligned(shape: AdapterShape, random: &mut ChaCha8Rng, seen: &Seen) -> Vec<f32> {
    let map = shape.head_dim * shape.features;
    let directions: Vec<Vec<f32>> = (0..shape.kv_heads).map(|_| (0..map).map(|_| spread(random)).collect()).collect();
    let scaled = |directions: &Vec<f32>, norm: f32| -> Vec<f32> {
        directions.iter().map(|x| x * SPREAD * inverse(norm)).collect()
    };
    let queries = (0..shape.heads).flat_map(|head| scaled(&directions[head / shape.group()], seen.query_norm[head]));
    let keys = (0..shape.kv_heads).flat_map(|head| scaled(&directions[head], seen.missed_norm[head]));
    queries.chain(keys).collect()
}

/// Of each half, the first half of the features is what queries at the mean prefer, and what keys without error have;
/// the other half is of directions of what codes miss.
fn apart(shape: AdapterShape, random: &mut ChaCha8Rng, seen: &Seen) -> Vec<f32> {
    let AdapterShape { heads, kv_heads, head_dim, features } = shape;
    let preferred = |feature: usize| feature % (features / 2) < features / 4;
    let bound = (6.0 / (head_dim * features / 2) as f32).sqrt();
    let mut maps = Vec::with_capacity(shape.numbers());
    for head in 0..heads {
        let mean = &seen.mean_query[head * head_dim..(head + 1) * head_dim];
        let scale = PREFERENCE * inverse(mean.iter().map(|x| x * x).sum());
        for x in mean {
            let toward = |feature: usize| if preferred(feature) { scale * x } else { -scale * x };
            maps.extend((0..features).map(|feature| toward(feature) + bound * uniform(random)));
        }
    }
    for head in 0..kv_heads {
        let scale = SPREAD * inverse(seen.missed_norm[head]);
        for _ in 0..head_dim {
            let number =
                |feature: usize| if preferred(feature) { bound * uniform(random) } else { scale * spread(random) };
            maps.extend((0..features).map(number));
        }
    }
    maps
}
