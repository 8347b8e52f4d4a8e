//! Attention before and after the linear correction (KVLinC, figure 5), under the window of the scheme.
//!
//! A query sees packed keys and values where decoding token by token would show it these, and exact ones elsewhere. The
//! correction is that of Algorithm 1: in the frame of the largest logit of all, `phi_q(q) phi_k(k - k^)` is added to the
//! weight of every packed token, and exact values are mixed by it.

use super::attention::{Rows, dot, softmax};
use super::head::{Ratio, gather, tiles};
use super::{ByLayer, GROUP, LayerSample, QUERY_ROWS, StudyShape};
use crate::EvalError;
use dibit_cache::{
    Adapters, CacheLayout, CalibratedScheme, Calibration, Correction, LayerCalibration, LayerOverride, Packed, Scheme,
    Side, Sinks, Transform, Window,
};
use dibit_device::Train;
use dibit_model::ModelConfig;
use rayon::prelude::*;
use serde::Serialize;
use std::sync::Arc;

/// What a scheme's linear correction does to attention, each layer on its exact input.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CorrectionStudy {
    /// Name of the scheme.
    pub scheme: String,
    /// D.
    pub features: usize,
    /// Mean KL divergence of the attention row from the exact one, in nats, by the quantiser alone.
    pub attention_before: ByLayer,
    /// The same with the correction.
    pub attention_after: ByLayer,
    /// Relative squared error of the attention output by the quantiser alone.
    pub output_before: ByLayer,
    /// The same with the correction.
    pub output_after: ByLayer,
}

/// Studies the schemes that have adapters of a linear correction, on layers that were observed in an exact pass. Rows that
/// see nothing packed are left out, so a short text has nothing to show.
///
/// Left out are schemes that also subtract the bias of rounding, that choose sinks by their activations, or whose values
/// are more than codes in the frame of a head: factors, outliers, rotations along tokens, planes, whose bases need not turn.
///
/// # Errors
/// [`EvalError`].
pub fn corrections<D: Train>(
    device: &D,
    config: &ModelConfig,
    schemes: &[CalibratedScheme],
    shape: StudyShape,
    layers: &[LayerSample],
) -> Result<Vec<CorrectionStudy>, EvalError> {
    let mut studies = Vec::new();
    for scheme in schemes.iter().filter(|scheme| is_studied(scheme)) {
        let keys = config.cache_layout(scheme)?;
        let adapters = |layer: usize| -> Option<&Adapters> {
            let own = scheme.calibration.as_ref().filter(|_| keys.layers[layer].linear.is_some())?;
            own.layers[layer].adapters.as_ref()
        };
        if (0..layers.len()).all(|layer| adapters(layer).is_none()) {
            continue;
        }
        let values = config.cache_layout(&values_as_keys(scheme))?;
        let mut by_layer = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            let missed = [missed(device, &keys, index, &layer.k)?, missed(device, &values, index, &layer.v)?];
            let view = LayerView {
                shape,
                sample: layer,
                missed: &missed,
                adapters: adapters(index),
                window: scheme.window,
                sinks: scheme.sinks.first(),
            };
            by_layer.push(device.scope(|| view.errors()));
        }
        if by_layer.iter().all(|layer| layer.rows == 0) {
            continue;
        }
        let figure = |of: fn(&Errors) -> Ratio| by_layer.iter().map(|layer| of(layer).value()).collect();
        studies.push(CorrectionStudy {
            scheme: scheme.name.clone(),
            features: scheme.linear().map_or(0, |linear| linear.features),
            attention_before: figure(|layer| layer.attention[0]),
            attention_after: figure(|layer| layer.attention[1]),
            output_before: figure(|layer| layer.output[0]),
            output_after: figure(|layer| layer.output[1]),
        });
    }
    Ok(studies)
}

fn is_studied(scheme: &Scheme) -> bool {
    let plain = |side: Side| match side {
        Side::Half => true,
        Side::Packed(Packed { transform, low_rank, outliers, planes, .. }) => {
            transform != Transform::TokenHadamard && low_rank == 0 && outliers == 0.0 && planes.is_none()
        }
    };
    let values = std::iter::once(scheme.values).chain(scheme.layers.iter().map(|own| own.values));
    let biased = scheme.correction.bias || scheme.layers.iter().any(|own| own.correction.bias);
    let sinks = matches!(scheme.sinks, Sinks::None | Sinks::First(_));
    scheme.linear().is_some() && !biased && sinks && values.into_iter().all(plain)
}

/// The scheme that stores as keys what this one stores as values: codes depend on the choices, not on the side.
fn values_as_keys(scheme: &CalibratedScheme) -> CalibratedScheme {
    let layer = |own: &LayerCalibration| LayerCalibration {
        key_basis: own.value_basis.clone(),
        key_planes: own.value_planes.clone(),
        value_basis: own.value_basis.clone(),
        value_planes: own.value_planes.clone(),
        ..LayerCalibration::default()
    };
    let calibration = |own: &Arc<Calibration>| Arc::new(Calibration { layers: own.layers.iter().map(layer).collect() });
    let overrides = scheme.layers.iter();
    let scheme_of_keys = Scheme {
        keys: scheme.values,
        correction: Correction::NONE,
        layers: overrides
            .map(|own| LayerOverride { keys: own.values, correction: Correction::NONE, ..own.clone() })
            .collect(),
        ..scheme.scheme.clone()
    };
    CalibratedScheme { scheme: scheme_of_keys, calibration: scheme.calibration.as_ref().map(calibration) }
}

/// What the codes of the complete groups miss, `[tokens][num_key_value_heads][head_dim]`; zeros behind them.
fn missed<D: Train>(device: &D, layout: &CacheLayout, layer: usize, tensor: &[f32]) -> Result<Vec<f32>, EvalError> {
    let row = layout.shape.row();
    let rows = tensor.len() / row / GROUP * GROUP;
    let mut out = device.buffer(rows * row)?;
    device.missed_keys(layout, layer, &device.upload(&tensor[..rows * row])?, rows, &mut out)?;
    let mut missed = Vec::new();
    device.download(&out, 0..rows * row, &mut missed)?;
    missed.resize(tensor.len(), 0.0);
    Ok(missed)
}

/// One layer as a scheme shows it to queries.
pub(super) struct LayerView<'a> {
    pub shape: StudyShape,
    pub sample: &'a LayerSample,
    /// What the codes of keys and of values miss.
    pub missed: &'a [Vec<f32>; 2],
    /// `None` where the layer is not corrected.
    pub adapters: Option<&'a Adapters>,
    pub window: Window,
    /// First tokens that stay exact.
    pub sinks: usize,
}

/// Errors before and after the correction.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Errors {
    pub attention: [Ratio; 2],
    pub output: [Ratio; 2],
    pub rows: usize,
}

impl LayerView<'_> {
    /// The errors of all heads.
    pub fn errors(&self) -> Errors {
        let heads = (0..self.shape.num_heads).into_par_iter().map(|head| self.head(head)).collect::<Vec<_>>();
        heads.into_iter().fold(Errors::default(), |mut sum, own| {
            for side in 0..2 {
                sum.attention[side] += own.attention[side];
                sum.output[side] += own.output[side];
            }
            sum.rows += own.rows;
            sum
        })
    }

    fn head(&self, head: usize) -> Errors {
        let StudyShape { tokens, num_heads, num_key_value_heads, head_dim } = self.shape;
        let kv_head = head / (num_heads / num_key_value_heads);
        let own = |tensor: &[f32]| gather(tensor, num_key_value_heads, kv_head, head_dim);
        let [keys, values] = [&self.sample.k, &self.sample.v].map(|tensor| own(tensor));
        let [missed_keys, missed_values] = [0, 1].map(|side| own(&self.missed[side]));
        let stored: Vec<f32> = keys.iter().zip(&missed_keys).map(|(key, missed)| key - missed).collect();
        let adapters = self.adapters.filter(|own| own.gates[head] != 0.0);
        let key_features = adapters.map(|own| features(&own.key, kv_head, own.features, &missed_keys, head_dim));
        let queries = gather(&self.sample.q, num_heads, head, head_dim);
        let complete = tokens / GROUP * GROUP;
        let mut errors = Errors::default();
        for mut tile in tiles(&queries, head_dim, tokens.div_ceil(QUERY_ROWS)) {
            tile.retain(head_dim, |position| self.window.packed_keys(position) > self.sinks);
            if tile.positions.is_empty() {
                continue;
            }
            let packed = |of: fn(Window, usize) -> usize| -> Vec<usize> {
                tile.positions.iter().map(|&position| of(self.window, position).min(complete)).collect()
            };
            let (packed_keys, packed_values) = (packed(Window::packed_keys), packed(Window::packed_values));
            let exact = tile.attend(&keys, head_dim);
            let output = tile.mix(&exact, &values, head_dim);
            let before = exact.replaced(&tile.attend(&stored, head_dim), &tile.positions, &packed_keys);
            let lost = |rows: &Rows| tile.mix(&rows.seen_until(&packed_values), &missed_values, head_dim);
            let without = |mixed: Vec<f32>, lost: Vec<f32>| -> Vec<f32> {
                mixed.into_iter().zip(lost).map(|(x, lost)| x - lost).collect()
            };
            let mut add = |side: usize, rows: &Rows, mixed: Vec<f32>| {
                errors.attention[side] += Ratio::new(tile.divergence(&exact, rows), tile.positions.len() as f64);
                errors.output[side] += Ratio::error(&output, &mixed);
            };
            add(0, &before, without(tile.mix(&before, &values, head_dim), lost(&before)));
            let after = adapters.zip(key_features.as_ref()).map(|(own, key_features)| {
                let query_features = features(&own.query, head, own.features, &tile.unscaled(head_dim), head_dim);
                let added = |row: usize, token: usize| {
                    let query = &query_features[row * own.features..][..own.features];
                    let key = &key_features[token * own.features..][..own.features];
                    own.gates[head] * dot(query, key)
                };
                let corrected = |row: usize| self.sinks.min(packed_keys[row])..packed_keys[row];
                before.with_weight(&tile.positions, corrected, added)
            });
            match after {
                // Weights of codes shrink as the normaliser grows; the added ones mix exact values.
                Some((after, of_codes)) => {
                    add(1, &after, without(tile.mix(&after, &values, head_dim), lost(&of_codes)));
                }
                None => add(1, &before, without(tile.mix(&before, &values, head_dim), lost(&before))),
            }
            errors.rows += tile.positions.len();
        }
        errors
    }
}

/// `phi(x) = [softmax(x W1), softmax(x W2)]` of rows of `head_dim` numbers by the maps of one head, `[row][D]` (equation 4).
fn features(maps: &[Vec<f32>; 2], head: usize, features: usize, x: &[f32], head_dim: usize) -> Vec<f32> {
    let half = features / 2;
    let mut all = vec![0.0; x.len() / head_dim * features];
    for (x, out) in x.chunks_exact(head_dim).zip(all.chunks_exact_mut(features)) {
        for (map, out) in maps.iter().zip(out.chunks_exact_mut(half)) {
            let map = &map[head * head_dim * half..][..head_dim * half];
            for (x, weights) in x.iter().zip(map.chunks_exact(half)) {
                out.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += x * weight);
            }
            softmax(out);
        }
    }
    all
}

#[cfg(test)]
mod tests;
