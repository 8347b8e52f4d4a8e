//! Planes of two bits for the channels that need them: how many each channel of keys and values gets.
//!
//! A channel matters as much as the error that rounding it makes in the model's output. Within one side of one layer
//! that is a weight of each channel, by its queries and its range; between sides and layers it is what quantising one of
//! them alone costs the model.

mod budget;
mod pages;
mod sensitivity;
mod statistics;

pub(crate) use statistics::{KeyChannels, ValueSpread};

use crate::CalibrationError;
use budget::{Group, error, planes_of, pooled};
use dibit_cache::{LayerCalibration, Pool, Scheme, Sinks};
use dibit_device::Device;
use dibit_model::{ExactPass, Observation, Pretrained};
use sensitivity::{Place, places, sensitivities};
use statistics::ValueChannels;
use std::ops::ControlFlow;

/// Sequences in which the ranges of values are measured in their basis.
const RANGE_SEQUENCES: usize = 4;

/// Sequences on which the model is run with one side of one layer quantised.
const SENSITIVITY_SEQUENCES: usize = 2;

/// First tokens that are never packed.
pub(crate) fn skipped(sinks: Sinks) -> usize {
    if let Sinks::First(count) = sinks { count } else { 0 }
}

/// What was gathered of a layer; `None` for a side without planes.
pub(crate) struct Statistics<'a> {
    pub keys: Option<&'a KeyChannels>,
    pub values: Option<&'a ValueSpread>,
}

/// Gives planes to the channels of all layers by what was gathered of each; the bases of values are written too.
/// Returns false where `progress` broke it off.
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
    for (layer, own) in layers.iter_mut().zip(statistics) {
        if let Some(values) = own.values {
            layer.value_basis = Some(values.basis(d));
        }
    }
    let ranges = value_ranges(device, pretrained, scheme, &windows[..windows.len().min(RANGE_SEQUENCES)], layers)?;
    let places = places(scheme, layers.len());
    let mut groups: Vec<Group> = places
        .iter()
        .map(|place| {
            let weights = match place.keys {
                true => statistics[place.layer].keys.expect("statistics of keys with planes").weights(),
                false => ranges[place.layer].weights().to_vec(),
            };
            Group { weights, head_dim: d }
        })
        .collect();
    if scheme.planes.pool != Pool::Head {
        let some = &windows[..windows.len().min(SENSITIVITY_SEQUENCES)];
        let Some(costs) = sensitivities(device, pretrained, scheme, &places, layers, some, &mut progress)? else {
            return Ok(false);
        };
        // In the same unit everywhere: the divergence that the error of a channel causes.
        for (group, cost) in groups.iter_mut().zip(costs) {
            let expected = group.weights.iter().sum::<f64>() * error(1);
            let factor = if expected > 0.0 { cost / expected } else { 0.0 };
            group.weights.iter_mut().for_each(|weight| *weight *= factor);
        }
    }
    let most = scheme.planes.most;
    let bits = |place: &Place| {
        let (keys, values) = scheme.sides(0, place.layer);
        (if place.keys { keys } else { values }).average_bits().expect("a side with planes")
    };
    let pool = |chosen: &dyn Fn(&Place) -> bool| -> Vec<(Place, Vec<u8>)> {
        let own: Vec<usize> = (0..places.len()).filter(|index| chosen(&places[*index])).collect();
        let total = own.iter().map(|index| planes_of(bits(&places[*index]), d)).sum();
        let own_groups: Vec<&Group> = own.iter().map(|index| &groups[*index]).collect();
        own.iter().map(|index| places[*index]).zip(pooled(&own_groups, total, most)).collect()
    };
    let given: Vec<(Place, Vec<u8>)> = match scheme.planes.pool {
        Pool::Model => pool(&|_| true),
        Pool::Side => [true, false].into_iter().flat_map(|keys| pool(&|place| place.keys == keys)).collect(),
        Pool::Head => {
            let each = places.iter().zip(&groups);
            each.map(|(place, group)| (*place, group.spend(planes_of(bits(place), d), most))).collect()
        }
    };
    for (place, planes) in given {
        let layer = &mut layers[place.layer];
        if place.keys {
            layer.key_planes = Some(planes);
        } else {
            order_values(layer, planes, d);
        }
    }
    Ok(true)
}

/// Squared ranges of values in the bases of their layers.
fn value_ranges<D: Device>(
    device: &D,
    pretrained: &Pretrained,
    scheme: &Scheme,
    windows: &[Vec<u32>],
    layers: &[LayerCalibration],
) -> Result<Vec<ValueChannels>, CalibrationError> {
    let config = &pretrained.config;
    let shape = config.cache_shape();
    let mut ranges: Vec<ValueChannels> = layers.iter().map(|_| ValueChannels::new(shape)).collect();
    if layers.iter().all(|layer| layer.value_basis.is_none()) {
        return Ok(ranges);
    }
    let context = windows.iter().map(Vec::len).max().unwrap_or(0);
    let mut pass = ExactPass::new(device, config, &pretrained.weights, context)?;
    for window in windows {
        pass.run(device, window, &mut |seen: Observation| {
            if let Some(basis) = &layers[seen.layer].value_basis {
                ranges[seen.layer].add(shape, basis, seen.first_row, seen.v, skipped(scheme.sinks));
            }
        })?;
    }
    Ok(ranges)
}

/// Orders the channels of values, and the columns of their basis, by falling planes.
fn order_values(layer: &mut LayerCalibration, planes: Vec<u8>, d: usize) {
    let basis = layer.value_basis.as_mut().expect("the basis of values with planes");
    let mut ordered = Vec::with_capacity(planes.len());
    for (planes, basis) in planes.chunks_exact(d).zip(basis.chunks_exact_mut(d * d)) {
        let order = dibit_cache::Planes::order(planes);
        ordered.extend(order.iter().map(|channel| planes[*channel]));
        for row in basis.chunks_exact_mut(d) {
            let moved: Vec<f32> = order.iter().map(|channel| row[*channel]).collect();
            row.copy_from_slice(&moved);
        }
    }
    layer.value_planes = Some(ordered);
}
