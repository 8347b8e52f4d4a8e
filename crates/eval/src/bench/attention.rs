//! Attention of a decoding step: one layer, one new token of each sequence of a batch.

use crate::EvalError;
use crate::made_up::calibrated;
use crate::random_cache::{RandomCache, random};
use dibit_cache::{CacheLayout, CacheModel, CacheShape, CalibratedScheme};
use dibit_device::{Arithmetic, Device, Measure, Sweep};
use dibit_model::{Rope, RopeScaling};
use dibit_timing::{Samples, Spread, rounds};
use serde::Serialize;
use std::str::FromStr;
use thiserror::Error;

/// Query heads and KV heads of a layer, written `16/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// KV heads.
    pub key_value: usize,
}

/// Why a text does not name heads.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum HeadsError {
    /// It is not two numbers.
    #[error("heads are given as QUERY/KV, such as 32/8")]
    Form,
    /// There are none.
    #[error("there is no layer without heads; give at least 1/1")]
    Zero,
    /// There are more than models have.
    #[error("{0} heads are more than a layer has; at most {MOST_HEADS} are measured")]
    Many(usize),
    /// Query heads cannot share the KV heads evenly.
    #[error("{query} query heads are not a multiple of {key_value} KV heads")]
    Uneven {
        /// Query heads.
        query: usize,
        /// KV heads.
        key_value: usize,
    },
}

const MOST_HEADS: usize = 1 << 12;

impl FromStr for Heads {
    type Err = HeadsError;

    fn from_str(text: &str) -> Result<Self, HeadsError> {
        let (query, key_value) = text.trim().split_once('/').ok_or(HeadsError::Form)?;
        let number = |text: &str| text.parse::<usize>().map_err(|_| HeadsError::Form);
        let (query, key_value) = (number(query)?, number(key_value)?);
        if query == 0 || key_value == 0 {
            return Err(HeadsError::Zero);
        }
        if let Some(many) = [query, key_value].into_iter().find(|count| *count > MOST_HEADS) {
            return Err(HeadsError::Many(many));
        }
        if !query.is_multiple_of(key_value) {
            return Err(HeadsError::Uneven { query, key_value });
        }
        Ok(Heads { query, key_value })
    }
}

/// What is measured: every choice of heads at every batch and context with every device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttentionOptions {
    /// Query and KV heads.
    pub heads: Vec<Heads>,
    /// Channels of a head.
    pub head_dim: usize,
    /// Sequences at once.
    pub batches: Vec<usize>,
    /// Cached tokens of each.
    pub contexts: Vec<usize>,
    /// Layers that a step goes through, each with a cache of its own; figures are of one of them.
    pub layers: usize,
    /// Rounds that are counted.
    pub rounds: usize,
    /// Bytes that are read in every round besides, to measure how fast that is and to evict caches.
    pub sweep_bytes: usize,
}

/// Figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionBench {
    /// Channels of a head.
    pub head_dim: usize,
    /// Layers that a step goes through; figures are of one of them.
    pub layers: usize,
    /// Rounds that are counted.
    pub rounds: usize,
    /// Bytes of other memory that are read between two steps of a scheme, those of the other schemes not counted.
    pub sweep_bytes: usize,
    /// Every point that was measured.
    pub points: Vec<AttentionPoint>,
}

/// Schemes against each other at one point.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionPoint {
    /// Query heads.
    pub num_attention_heads: usize,
    /// KV heads.
    pub num_key_value_heads: usize,
    /// Sequences at once.
    pub batch: usize,
    /// Cached tokens of each.
    pub context: usize,
    /// Threads of the host; 0 where a GPU computes.
    pub threads: usize,
    /// The device in words.
    pub device: String,
    /// How fast memory is read, in 10^9 bytes per second.
    pub read_gb_per_s: Spread,
    /// One entry for each scheme; `fp16` comes first.
    pub schemes: Vec<AttentionFigures>,
}

/// Figures of one scheme. Ratios are of numbers of the same round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionFigures {
    /// Name of the scheme.
    pub scheme: String,
    /// Bytes that a step reads: pages, window, sinks and factors.
    pub bytes: usize,
    /// Bits in use for a cached scalar.
    pub bits: f64,
    /// Milliseconds of a step.
    pub ms: Spread,
    /// 10^9 bytes read per second.
    pub gb_per_s: Spread,
    /// Share of [`AttentionPoint::read_gb_per_s`].
    pub share_of_read: Spread,
    /// How many times faster than fp16.
    pub over_fp16: Spread,
}

/// Times schemes against each other; `fp16` is added where it is not among them. Keys, values and queries are random
/// numbers, calibrations are made up, and `begin` hears what is done next.
///
/// # Errors
/// [`EvalError`]: a scheme that does not suit the heads, or a lack of memory.
pub fn attention<D: Device + Measure>(
    devices: &[&D],
    schemes: &[CalibratedScheme],
    options: &AttentionOptions,
    mut begin: impl FnMut(String),
) -> Result<AttentionBench, EvalError> {
    let schemes = CalibratedScheme::with_reference(schemes)?;
    let layouts = |heads: &Heads| -> Result<Vec<CacheLayout>, EvalError> {
        let (num_key_value_heads, head_dim) = (heads.key_value, options.head_dim);
        let shape = CacheShape { num_layers: options.layers, num_key_value_heads, head_dim };
        let inv_freq = Rope { theta: 10_000.0, scaling: RopeScaling::Default }.inv_freq(head_dim);
        let model = CacheModel::new(shape, inv_freq).fusing(|_| true);
        let layout = |scheme: &CalibratedScheme| {
            let scheme = calibrated(scheme, shape, heads.query);
            // As in a model whose projections transform values.
            Ok(scheme.layout(&model)?)
        };
        schemes.iter().map(layout).collect()
    };
    // What does not suit a scheme is said before the work begins.
    let layouts = options.heads.iter().map(layouts).collect::<Result<Vec<_>, _>>()?;
    // Caches are filled with the most threads, and are the same whoever fills them.
    let filler = *devices.iter().max_by_key(|device| device.threads()).expect("a device");
    let sweep = filler.sweep(options.sweep_bytes)?;
    let sizes: Vec<(usize, usize)> =
        options.batches.iter().flat_map(|batch| options.contexts.iter().map(|context| (*batch, *context))).collect();
    let mut points = Vec::new();
    for (heads, layouts) in options.heads.iter().zip(layouts) {
        for &(batch, context) in &sizes {
            let mut caches = Vec::new();
            for layout in &layouts {
                let (query, key_value, name) = (heads.query, heads.key_value, layout.scheme_name());
                begin(format!("{query}/{key_value} heads, batch {batch}, {context} tokens: {name}"));
                caches.push(RandomCache::new(filler, layout.clone(), batch, context, 1, Arithmetic::Fast)?);
            }
            for &device in devices {
                points.push(point(device, *heads, &mut caches, &*sweep, options.rounds)?);
            }
        }
    }
    let AttentionOptions { head_dim, layers, rounds, .. } = *options;
    Ok(AttentionBench { head_dim, layers, rounds, sweep_bytes: sweep.bytes(), points })
}

fn point<D: Device + Measure>(
    device: &D,
    heads: Heads,
    caches: &mut [RandomCache<D>],
    sweep: &dyn Sweep,
    count: usize,
) -> Result<AttentionPoint, EvalError> {
    let layout = caches[0].cache.layout();
    let (batch, layers) = (caches[0].batch().rows(), layout.layers.len());
    let width = batch * heads.query * layout.shape.head_dim;
    let q = device.upload(&random(0, width))?;
    let next = device.upload(&random(3, batch * layout.shape.row()))?;
    let mut out = device.buffer(width)?;
    let times = rounds(count, 1 + caches.len(), |contender| match contender.checked_sub(1) {
        None => Ok(device.scope(|| sweep.read())),
        Some(scheme) => caches[scheme].attend(device, heads.query, [&q, &next], &mut out),
    })?;
    let (read, times) = times.split_first().expect("the sweep is timed");
    let times: Vec<Samples> = times.iter().map(|own| own.map(|seconds| seconds / layers as f64)).collect();
    let read = read.map(|seconds| sweep.bytes() as f64 / seconds / 1e9);
    let figures = |(cache, seconds): (&RandomCache<D>, &Samples)| {
        let usage = cache.usage();
        let bytes = usage.used_bytes / layers;
        let speed = seconds.map(|seconds| bytes as f64 / seconds / 1e9);
        AttentionFigures {
            scheme: cache.cache.layout().scheme_name().to_owned(),
            bytes,
            bits: usage.bits(),
            ms: seconds.map(|seconds| seconds * 1e3).spread(),
            gb_per_s: speed.spread(),
            share_of_read: speed.over(&read).spread(),
            over_fp16: times[0].over(seconds).spread(),
        }
    };
    Ok(AttentionPoint {
        num_attention_heads: heads.query,
        num_key_value_heads: heads.key_value,
        batch,
        context: caches[0].len(),
        threads: device.threads(),
        device: device.describe(),
        read_gb_per_s: read.spread(),
        schemes: caches.iter().zip(&times).map(figures).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_two_numbers_that_divide() {
        assert_eq!("32/8".parse(), Ok(Heads { query: 32, key_value: 8 }));
        let error = |text: &str| text.parse::<Heads>().unwrap_err();
        for text in ["", "32", "32:8", "a/8", "32/", "-32/8", "32/8/2"] {
            assert_eq!(error(text), HeadsError::Form, "{text}");
        }
        assert_eq!((error("0/8"), error("8/0")), (HeadsError::Zero, HeadsError::Zero));
        assert_eq!(error("16/3"), HeadsError::Uneven { query: 16, key_value: 3 });
        assert_eq!(error("5000/5"), HeadsError::Many(5000));
    }
}
