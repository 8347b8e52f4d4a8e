//! How long attention of a decoding step takes, scheme against scheme in one run.

use crate::EvalError;
use crate::random_cache::{RandomCache, random};
use dibit_cache::CalibratedScheme;
use dibit_device::{Device, Measure};
use dibit_model::Pretrained;
use dibit_timing::rounds;
use std::time::Duration;

/// Timed steps of each scheme.
const STEPS: usize = 15;

/// Time of attention of one decoding step over `context` cached tokens, all layers together: for each scheme the median
/// of steps that take turns with those of the others. Keys, values and queries are random numbers.
///
/// # Errors
/// [`EvalError`].
pub fn attention_times<D: Device + Measure>(
    device: &D,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    context: usize,
) -> Result<Vec<Duration>, EvalError> {
    let config = &pretrained.config;
    let heads = config.num_attention_heads;
    let q = device.upload(&random(0, heads * config.head_dim))?;
    let next = device.upload(&random(3, config.cache_shape().row()))?;
    let mut out = device.buffer(heads * config.head_dim)?;
    let mut caches = Vec::new();
    for scheme in schemes {
        let arithmetic = pretrained.weights.arithmetic();
        caches.push(RandomCache::new(device, pretrained.cache_layout(scheme)?, 1, context, 1, arithmetic)?);
    }
    let seconds = rounds(STEPS, caches.len(), |scheme| caches[scheme].attend(device, heads, [&q, &next], &mut out))?;
    Ok(seconds.iter().map(|own| Duration::from_secs_f64(own.spread().median)).collect())
}
