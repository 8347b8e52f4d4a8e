//! Planes of two bits for the channels that need them: how many each channel of keys and values gets.
//!
//! A channel matters as much as the error that rounding it makes in the model's output. Within one side of one KV head
//! that is a weight of each channel, by its queries and its range. Between sides and layers it is what quantising one of them
//! alone costs the model, and between the KV heads of a layer what each changes in the residual stream behind it. That is
//! measured twice: with the same number of planes in every head, and with the planes that followed from it.

mod budget;
#[cfg(test)]
mod golden;
mod pages;
mod sensitivity;
mod statistics;
mod value_basis;

pub(crate) use statistics::{KeyMetric, ValueSpread};

use crate::CalibrationError;
use budget::{Group, pooled};
use dibit_cache::{CacheShape, LayerCalibration, Planes, Pool, Scheme};
use dibit_device::Device;
use dibit_model::{Observation, Pretrained};
use dibit_runner::ExactPass;
use sensitivity::{Alone, Place, Sensitivities, places};
use statistics::Ranges;
use std::ops::ControlFlow;
use std::sync::Arc;
use value_basis::{basis, output_metric};

/// Sequences in which ranges are measured, those of values in their basis.
const RANGE_SEQUENCES: usize = 4;

/// Costs are measured so often, and planes given by them: sequences on which the model is run with one place quantised.
const ROUNDS: [usize; 2] = [1, 2];

/// Such runs that take as long as a sequence of ranges: those have half the tokens, and go through half the layers.
const RANGE_RUNS: usize = 4;

/// Tokens of such a sequence at most.
const SENSITIVITY_TOKENS: usize = 1024;

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
    device: &Arc<D>,
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
    let measured = scheme.planes.pool != Pool::Head;
    let places = places(scheme, shape);
    let runs = ROUNDS.map(|count| match measured {
        true => count.min(windows.len()) * places.len() / shape.num_key_value_heads,
        false => 0,
    });
    let first = &windows[..windows.len().min(RANGE_SEQUENCES)];
    let mut done = first.len() * RANGE_RUNS;
    let all = done + runs.iter().sum::<usize>();
    let told = |sequences: usize| progress(sequences * RANGE_RUNS, all);
    let Some(ranges) = measure_ranges(device, pretrained, scheme, first, layers, told)? else { return Ok(false) };
    if scheme.protects_small_values() {
        for (layer, ranges) in layers.iter_mut().zip(&ranges) {
            layer.sink_places = Some(ranges.places() as u8);
        }
    }
    let mut placed: Vec<Placed> = places
        .into_iter()
        .map(|place| {
            let own = &ranges[place.layer];
            let weights = match place.keys {
                true => own.key_weights(statistics[place.layer].keys.expect("the metric of keys with planes"), d),
                false => own.value_weights().to_vec(),
            };
            let weights = weights[place.kv_head * d..(place.kv_head + 1) * d].to_vec();
            Placed { place, group: Group::new(weights), planes: Vec::new() }
        })
        .collect();
    give(scheme, Pool::Head, d, &mut placed);
    if measured && !placed.is_empty() {
        let some = windows.iter().take(ROUNDS[1]);
        let some: Vec<&[u32]> = some.map(|window| &window[..window.len().min(SENSITIVITY_TOKENS)]).collect();
        let mut costs = Sensitivities::new(device, pretrained, scheme, &some)?;
        for (windows, runs_of_round) in ROUNDS.into_iter().zip(runs) {
            let parts = placed.chunks(shape.num_key_value_heads);
            let parts: Vec<Alone> = parts.map(|part| alone(layers, part, shape)).collect();
            let told = |own| progress(done + own, all);
            let Some(found) = costs.measure(&parts, windows, told)? else { return Ok(false) };
            done += runs_of_round;
            for (own, cost) in placed.iter_mut().zip(found.into_iter().flatten()) {
                if !cost.is_finite() {
                    return Err(CalibrationError::NotFinite { layer: own.place.layer });
                }
                own.group.measure(&own.planes, cost);
            }
            give(scheme, scheme.planes.pool, d, &mut placed);
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

/// Gives planes to all places, as many as the scheme says for each of a pool.
fn give(scheme: &Scheme, pool: Pool, d: usize, placed: &mut [Placed]) {
    let most = scheme.planes.most;
    let average = |place: Place| {
        let (keys, values) = scheme.sides(0, place.layer);
        (if place.keys { keys } else { values }).average_bits().expect("a side with planes")
    };
    let mut share = |chosen: &dyn Fn(Place) -> bool| {
        let own: Vec<usize> = (0..placed.len()).filter(|index| chosen(placed[*index].place)).collect();
        let bits: f64 = own.iter().map(|index| f64::from(average(placed[*index].place)) * d as f64).sum();
        let total = (bits / 2.0).round() as usize;
        let groups: Vec<&Group> = own.iter().map(|index| &placed[*index].group).collect();
        let given = pooled(&groups, d, total, most);
        own.iter().zip(given).for_each(|(index, planes)| placed[*index].planes = planes);
    };
    match pool {
        Pool::Head => placed.iter_mut().for_each(|own| {
            own.planes = own.group.spend(Planes::of_average(average(own.place), d), most);
        }),
        Pool::Side => [true, false].into_iter().for_each(|keys| share(&|place: Place| place.keys == keys)),
        Pool::Model => share(&|_| true),
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

/// Squared ranges of keys, and of values in the bases of their layers. `None` where `progress`, called with the windows
/// done, broke it off.
fn measure_ranges<D: Device>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    scheme: &Scheme,
    windows: &[Vec<u32>],
    layers: &[LayerCalibration],
    mut progress: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Vec<Ranges>>, CalibrationError> {
    let config = &pretrained.config;
    let shape = config.cache_shape();
    let mut ranges: Vec<Ranges> = layers.iter().map(|_| Ranges::new(shape)).collect();
    let context = windows.iter().map(Vec::len).max().unwrap_or(0);
    let mut pass = ExactPass::new(device, config, &pretrained.weights, context)?;
    for (index, window) in windows.iter().enumerate() {
        if progress(index).is_break() {
            return Ok(None);
        }
        pass.run(window, &mut |seen: Observation| {
            let basis = layers[seen.layer].value_basis.as_deref();
            ranges[seen.layer].add(shape, basis, seen.first_row, [seen.k, seen.v], scheme.sinks);
        })?;
    }
    Ok(Some(ranges))
}
