//! Planes of two bits for the channels that need them: how many each channel of keys and values gets.
//!
//! A channel matters as much as the error that rounding it makes in the model's output. Within one side of one KV head
//! that is a weight of each channel, by its queries and its range. Between sides and layers it is what quantising one of them
//! alone costs the model, and between the KV heads of a layer what each changes in the residual stream behind it. That is
//! measured twice: with one plane for each channel, and with the planes that followed from it.

mod budget;
#[cfg(test)]
mod golden;
mod pages;
mod sensitivity;
mod statistics;
mod value_basis;

pub(crate) use statistics::{KeyMetric, ValueSpread};

use crate::CalibrationError;
use budget::{Group, planes_of, pooled};
use dibit_cache::{CacheShape, LayerCalibration, Planes, Pool, Scheme};
use dibit_device::Device;
use dibit_model::{ExactPass, Observation, Pretrained};
use sensitivity::{Alone, Place, Sensitivities, places};
use statistics::Ranges;
use std::ops::ControlFlow;
use value_basis::{basis, output_metric};

/// Sequences in which ranges are measured, those of values in their basis.
const RANGE_SEQUENCES: usize = 4;

/// Sequences on which the model is run with one place quantised.
const SENSITIVITY_SEQUENCES: usize = 2;

/// Tokens of such a sequence at most.
const SENSITIVITY_TOKENS: usize = 1024;

/// How often costs are measured, and planes given by them.
const ROUNDS: usize = 2;

/// Pages of a layer have places for tokens with small values where a page and KV head has so many of them on average.
const SMALL_TOKENS: f64 = 0.2;

/// What was gathered of a layer; `None` where it is not needed.
pub(crate) struct Statistics<'a> {
    pub keys: Option<&'a KeyMetric>,
    pub values: Option<&'a ValueSpread>,
}

/// One place and its channels.
struct Placed {
    place: Place,
    group: Group,
    planes: Vec<u8>,
}

/// Gives planes to the channels of all layers by what was gathered of each; the bases of values are written too, and which
/// layers protect tokens with small values. Returns false where `progress`, called with the runs done and in all, broke it
/// off.
pub(crate) fn fit<D: Device>(
    device: &D,
    pretrained: &Pretrained,
    scheme: &Scheme,
    windows: &[Vec<u32>],
    statistics: &[Statistics],
    layers: &mut [LayerCalibration],
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<bool, CalibrationError> {
    let shape = pretrained.config.cache_shape();
    let d = shape.head_dim;
    for (index, (layer, own)) in layers.iter_mut().zip(statistics).enumerate() {
        if let Some(values) = own.values {
            let metric = output_metric(shape, &pretrained.weights.layers[index].o.weight);
            let spread = values.sums.chunks_exact(d * d);
            layer.value_basis = Some(metric.iter().zip(spread).flat_map(|(metric, own)| basis(metric, own)).collect());
        }
    }
    let ranges = measure_ranges(device, pretrained, scheme, &windows[..windows.len().min(RANGE_SEQUENCES)], layers)?;
    if scheme.protects_small_values() {
        for (layer, ranges) in layers.iter_mut().zip(&ranges) {
            layer.sink_places = Some(ranges.small_tokens() >= SMALL_TOKENS);
        }
    }
    let mut placed: Vec<Placed> = places(scheme, shape)
        .into_iter()
        .map(|place| {
            let own = &ranges[place.layer];
            let weights = match place.keys {
                true => own.key_weights(statistics[place.layer].keys.expect("the metric of keys with planes"), d),
                false => own.value_weights().to_vec(),
            };
            let weights = weights[place.kv_head * d..(place.kv_head + 1) * d].to_vec();
            Placed { place, group: Group { weights }, planes: vec![1; d] }
        })
        .collect();
    if scheme.planes.pool == Pool::Head {
        give(scheme, d, &mut placed);
    } else if !placed.is_empty() {
        let some = windows.iter().take(SENSITIVITY_SEQUENCES);
        let some: Vec<&[u32]> = some.map(|window| &window[..window.len().min(SENSITIVITY_TOKENS)]).collect();
        let mut costs = Sensitivities::new(device, pretrained, scheme, &some)?;
        let runs = costs.runs(placed.len() / shape.num_key_value_heads);
        for round in 0..ROUNDS {
            let parts = placed.chunks(shape.num_key_value_heads);
            let parts: Vec<Alone> = parts.map(|part| alone(layers, part, shape)).collect();
            let told = |own| progress(round * runs + own, ROUNDS * runs);
            let Some(found) = costs.measure(&parts, told)? else { return Ok(false) };
            // In the same unit everywhere: the divergence that the error of a channel causes.
            for (own, cost) in placed.iter_mut().zip(found.into_iter().flatten()) {
                let expected = own.group.loss(&own.planes);
                let factor = if expected > 0.0 { cost / expected } else { 0.0 };
                own.group.weights.iter_mut().for_each(|weight| *weight *= factor);
            }
            give(scheme, d, &mut placed);
        }
    }
    for own in &placed {
        set(&mut layers[own.place.layer], own, shape);
    }
    Ok(true)
}

/// One side of a layer with its planes, and the same with each KV head alone: the others then have as many planes as can
/// be.
fn alone(layers: &[LayerCalibration], part: &[Placed], shape: CacheShape) -> Alone {
    let Place { layer, keys, .. } = part[0].place;
    let with = |own: &[Placed]| {
        let mut calibration = layers[layer].clone();
        let nearly_exact = Some(vec![Planes::MOST as u8; shape.row()]);
        *if keys { &mut calibration.key_planes } else { &mut calibration.value_planes } = nearly_exact;
        own.iter().for_each(|own| set(&mut calibration, own, shape));
        calibration
    };
    let heads = if part.len() > 1 { part.chunks(1).map(with).collect() } else { Vec::new() };
    Alone { layer, keys, all: with(part), heads }
}

/// Gives planes to all places, by the pool of the scheme.
fn give(scheme: &Scheme, d: usize, placed: &mut [Placed]) {
    let most = scheme.planes.most;
    let count = |place: Place| {
        let (keys, values) = scheme.sides(0, place.layer);
        planes_of((if place.keys { keys } else { values }).average_bits().expect("a side with planes"), d)
    };
    if scheme.planes.pool == Pool::Head {
        for own in placed {
            own.planes = own.group.spend(count(own.place), most);
        }
        return;
    }
    let mut give = |chosen: &dyn Fn(Place) -> bool| {
        let own: Vec<usize> = (0..placed.len()).filter(|index| chosen(placed[*index].place)).collect();
        let total = own.iter().map(|index| count(placed[*index].place)).sum();
        let groups: Vec<&Group> = own.iter().map(|index| &placed[*index].group).collect();
        let given = pooled(&groups, d, total, most);
        own.iter().zip(given).for_each(|(index, planes)| placed[*index].planes = planes);
    };
    match scheme.planes.pool {
        Pool::Side => [true, false].into_iter().for_each(|keys| give(&|place: Place| place.keys == keys)),
        _ => give(&|_| true),
    }
}

/// Writes the planes of a place. Channels of values, and the columns of their basis, are ordered by falling planes.
fn set(layer: &mut LayerCalibration, own: &Placed, shape: CacheShape) {
    let Place { keys, kv_head, .. } = own.place;
    let d = shape.head_dim;
    let channels = kv_head * d..(kv_head + 1) * d;
    let planes = if keys { &mut layer.key_planes } else { &mut layer.value_planes };
    let planes = &mut planes.get_or_insert_with(|| vec![1; shape.row()])[channels];
    if keys {
        return planes.copy_from_slice(&own.planes);
    }
    let order = Planes::order(&own.planes);
    planes.iter_mut().zip(&order).for_each(|(planes, channel)| *planes = own.planes[*channel]);
    let basis = layer.value_basis.as_mut().expect("the basis of values with planes");
    for row in basis[kv_head * d * d..(kv_head + 1) * d * d].chunks_exact_mut(d) {
        let moved: Vec<f32> = order.iter().map(|channel| row[*channel]).collect();
        row.copy_from_slice(&moved);
    }
}

/// Squared ranges of keys, and of values in the bases of their layers.
fn measure_ranges<D: Device>(
    device: &D,
    pretrained: &Pretrained,
    scheme: &Scheme,
    windows: &[Vec<u32>],
    layers: &[LayerCalibration],
) -> Result<Vec<Ranges>, CalibrationError> {
    let config = &pretrained.config;
    let shape = config.cache_shape();
    let mut ranges: Vec<Ranges> = layers.iter().map(|_| Ranges::new(shape)).collect();
    let context = windows.iter().map(Vec::len).max().unwrap_or(0);
    let mut pass = ExactPass::new(device, config, &pretrained.weights, context)?;
    for window in windows {
        pass.run(device, window, &mut |seen: Observation| {
            let basis = layers[seen.layer].value_basis.as_deref();
            ranges[seen.layer].add(shape, basis, seen.first_row, [seen.k, seen.v], scheme.sinks);
        })?;
    }
    Ok(ranges)
}
