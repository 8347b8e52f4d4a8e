//! Made-up calibrations, to measure the speed of schemes without a model.

use crate::random_cache::random;
use dibit_cache::{
    Adapters, AutoSinks, CacheShape, CalibratedScheme, Calibration, KeyFeedback, LayerCalibration, Linear, Packed,
    PlaneBudget, Planes,
};
use dibit_cache::{Scheme, Side};
use std::sync::Arc;

/// The scheme with a calibration of the right shape where it can use one: channels in their own order, bases that turn
/// nothing, planes around the average and random adapters.
pub(crate) fn calibrated(scheme: &Scheme, shape: CacheShape, num_heads: usize) -> CalibratedScheme {
    if !scheme.takes_calibration() {
        return scheme.clone().into();
    }
    let layers = (0..shape.num_layers).map(|layer| of_layer(scheme, layer, shape, num_heads)).collect();
    CalibratedScheme { scheme: scheme.clone(), calibration: Some(Arc::new(Calibration { layers })) }
}

fn of_layer(scheme: &Scheme, layer: usize, shape: CacheShape, num_heads: usize) -> LayerCalibration {
    let (kv_heads, d) = (shape.num_key_value_heads, shape.head_dim);
    let basis: Vec<f32> = (0..kv_heads * d * d).map(|at| if at / d % d == at % d { 1.0 } else { 0.0 }).collect();
    let (keys, values) = scheme.sides(0, layer);
    let planes = |side: Side| Some(planes(side, scheme.planes, d)?.repeat(kv_heads));
    let adapters = scheme.correction(layer).linear.map(|Linear { features, .. }| {
        let maps = |seed: u64, heads: usize| [seed, seed + 1].map(|seed| random(seed, heads * d * features / 2));
        Adapters { features, query: maps(11, num_heads), key: maps(13, kv_heads), gates: vec![1.0; num_heads] }
    });
    LayerCalibration {
        permutation: Some((0..shape.row() as u32).collect()),
        key_basis: Some(basis.clone()),
        value_basis: Some(basis),
        key_planes: planes(keys),
        value_planes: planes(values),
        key_feedback: keys.has_feedback().then(|| feedback(shape)),
        sink_places: scheme.protects_small_values().then_some(AutoSinks::PLANNED as u8),
        powers: Default::default(),
        adapters,
    }
}

/// Small factors for every pair of channels.
fn feedback(shape: CacheShape) -> KeyFeedback {
    let (kv_heads, d) = (shape.num_key_value_heads, shape.head_dim);
    let factor = |at: usize| if at % d > at / d { 0.2 / d as f32 } else { 0.0 };
    let order: Vec<u32> = (0..d as u32).collect();
    KeyFeedback { order: order.repeat(kv_heads), factors: (0..d * d).map(factor).collect::<Vec<_>>().repeat(kv_heads) }
}

/// Planes of the channels of a head, falling from one more than the average to one less.
fn planes(side: Side, budget: PlaneBudget, d: usize) -> Option<Vec<u8>> {
    let Side::Packed(Packed { planes: Some(average), .. }) = side else { return None };
    let of = |channel: usize| {
        let tile = channel / Planes::TILE;
        let place = 1.0 - (2 * tile + 1) as f32 * Planes::TILE as f32 / d as f32;
        (average / 2.0 + 1.5 * place).round().clamp(0.0, budget.most as f32) as u8
    };
    Some((0..d).map(of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use dibit_cache::{CacheModel, CalibratedScheme, Scheme};

    #[test]
    fn every_built_in_scheme_gets_what_it_needs() {
        let shape = CacheShape { num_layers: 2, num_key_value_heads: 2, head_dim: 64 };
        for name in Scheme::built_in() {
            let scheme = calibrated(&CalibratedScheme::load(name).unwrap(), shape, 4);
            assert_eq!(
                scheme.layout(&CacheModel::of_shape(shape)).map(drop).map_err(|error| error.to_string()),
                Ok(()),
                "{name}"
            );
        }
        let dibit = CalibratedScheme::load("dibit").unwrap();
        let planes = planes(dibit.keys, dibit.planes, 64).unwrap();
        assert_eq!(planes.iter().map(|planes| usize::from(*planes)).sum::<usize>(), 64);
        assert_eq!((planes[0], planes[32], planes[63]), (2, 1, 0));
    }
}
