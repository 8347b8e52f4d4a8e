//! Numbers that the transforms of a scheme need: the model's rotary frequencies and what was calibrated.

use crate::basis::Kind;
use crate::{
    Adapters, Basis, CachePlan, Calibration, KeyFeedback, LayerCalibration, LayerLayout, PageLayout, Planes, Powers,
    SchemeError, SideLayout, Sinks, Transform,
};
use crate::{Permutation, PreRope};
use std::sync::Arc;

/// Numbers that the transforms of a scheme need.
#[derive(Debug, Clone, PartialEq)]
pub struct Tables {
    /// Rotary frequencies, `head_dim / 2`.
    pub inv_freq: Vec<f32>,
    /// What was calibrated, where the scheme needs it.
    pub calibration: Option<Arc<Calibration>>,
    /// For each layer the bases of keys and of values, where they are stored in some; empty without a calibration.
    bases: Vec<Bases>,
}

/// The bases of keys and of values.
type Bases = [Option<Arc<Basis>>; 2];

impl Tables {
    pub(crate) fn new(
        layout: &CachePlan,
        inv_freq: Vec<f32>,
        calibration: Option<Arc<Calibration>>,
    ) -> Result<Self, SchemeError> {
        let problem = |problem: String| SchemeError::Calibration { name: layout.origin.clone(), problem };
        if inv_freq.len() * 2 != layout.shape.head_dim {
            return Err(problem(format!(
                "{} rotary frequencies for head_dim {}",
                inv_freq.len(),
                layout.shape.head_dim
            )));
        }
        let needed = |layer: &LayerLayout| {
            layer.needs_permutation()
                || layer.needs_basis()
                || layer.needs_feedback()
                || layer.needs_planes().contains(&true)
        };
        let needed = layout.layers.iter().any(needed);
        let Some(own) = &calibration else {
            return match needed {
                true => Err(SchemeError::Uncalibrated(layout.origin.clone())),
                false => Ok(Tables { inv_freq, calibration, bases: Vec::new() }),
            };
        };
        if own.layers.len() != layout.layers.len() {
            return Err(problem(format!("it has {} layers, and the model {}", own.layers.len(), layout.layers.len())));
        }
        let layers = layout.layers.iter().zip(&own.layers).enumerate();
        let bases = layers.map(|(index, (layer, own))| {
            let checked = check_layer(layout, layer, own).and_then(|()| bases(layout, layer, own));
            checked.map_err(|what| problem(format!("layer {index}: {what}")))
        });
        let bases = bases.collect::<Result<_, _>>()?;
        Ok(Tables { inv_freq, calibration, bases })
    }

    /// The basis that keys of a layer are stored in, if they are.
    pub fn key_basis(&self, layer: usize) -> Option<Arc<Basis>> {
        self.bases.get(layer)?[0].clone()
    }

    /// The basis that values of a layer are stored in, if they are.
    pub fn value_basis(&self, layer: usize) -> Option<Arc<Basis>> {
        self.bases.get(layer)?[1].clone()
    }

    /// What was calibrated for a layer.
    pub fn layer(&self, layer: usize) -> Option<&LayerCalibration> {
        self.calibration.as_ref().map(|calibration| &calibration.layers[layer])
    }
}

impl LayerLayout {
    fn needs_permutation(&self) -> bool {
        matches!(self.keys, Transform::PreRope(PreRope { permutation: Permutation::Local | Permutation::Global, .. }))
    }

    /// Whether keys, and values, have planes.
    fn needs_planes(&self) -> [bool; 2] {
        let has_planes = |side: SideLayout| matches!(side, SideLayout::Packed(side) if side.planes.is_some());
        let any = |of: fn(&PageLayout) -> SideLayout| self.pages.iter().map(of).any(has_planes);
        [any(|page| page.keys), any(|page| page.values)]
    }

    fn needs_feedback(&self) -> bool {
        self.pages.iter().any(|page| matches!(page.keys, SideLayout::Packed(side) if side.feedback))
    }

    fn needs_basis(&self) -> bool {
        self.keys == Transform::Basis || self.values == Transform::Basis
    }
}

fn check_layer(layout: &CachePlan, layer: &LayerLayout, own: &LayerCalibration) -> Result<(), String> {
    let (heads, d) = (layout.shape.num_key_value_heads, layout.shape.head_dim);
    let planes = [("key", &own.key_planes), ("value", &own.value_planes)].into_iter().zip(layer.needs_planes());
    for ((side, counts), _) in planes.filter(|(_, needed)| *needed) {
        let counts = counts.as_ref().ok_or_else(|| format!("the planes of the {side} channels are missing"))?;
        if counts.len() != heads * d {
            return Err(format!("planes of {} {side} channels, and the model has {}", counts.len(), heads * d));
        }
        if let Some(count) = counts.iter().find(|count| usize::from(**count) > Planes::MOST) {
            return Err(format!("a {side} channel of {count} planes, and there are {} at most", Planes::MOST));
        }
        if side == "value" && counts.chunks_exact(d).any(|own| own.windows(2).any(|pair| pair[0] < pair[1])) {
            return Err("planes of value channels that rise: their basis orders them by falling planes".into());
        }
        let in_tiles = |own: &[u8]| Planes::new(own).with.iter().all(|count| count % Planes::TILE == 0);
        if let Some(head) = counts.chunks_exact(d).position(|own| !in_tiles(own)) {
            let tile = Planes::TILE;
            return Err(format!(
                "planes of {side} channels of KV head {head} that are not the same in tiles of {tile}"
            ));
        }
        if let Some(head) = counts.chunks_exact(d).position(|own| own.iter().all(|count| *count == 0)) {
            return Err(format!("the {side} channels of KV head {head} have no planes"));
        }
    }
    if layer.needs_feedback() {
        let feedback = own.key_feedback.as_ref().ok_or("the error feedback of keys is missing")?;
        check_feedback(feedback, heads, d)?;
    }
    if let (Some(linear), Some(adapters)) = (layer.linear, &own.adapters) {
        check_adapters(adapters, linear.features, heads, d)?;
    }
    if let (Some(places), Sinks::Auto(auto)) = (own.sink_places, layout.sinks)
        && usize::from(places) > auto.places
    {
        return Err(format!("{places} places for small-valued tokens in a page, and the scheme has {}", auto.places));
    }
    for own in [true, false].map(|keys| own.powers.exponents(keys)).into_iter().filter(|own| !own.is_empty()) {
        if own.len() != heads || own.iter().any(|exponent| *exponent > Powers::MOST) {
            return Err(format!("powers of two {own:?}, and {heads} exponents of at most {} are needed", Powers::MOST));
        }
    }
    if layer.states.is_some() && own.powers.exponents(true).iter().any(|exponent| *exponent > 0) {
        return Err("powers of two for keys, which adapters of a linear correction take as they are".into());
    }
    if layer.needs_permutation() {
        let order = own.permutation.as_ref().ok_or("the permutation is missing")?;
        if order.len() != heads * d {
            return Err(format!("a permutation of {} channels, and the model has {}", order.len(), heads * d));
        }
        let frame = layer.frame * d;
        let mut seen = vec![false; order.len()];
        for (place, &channel) in order.iter().enumerate() {
            let channel = channel as usize;
            if channel >= seen.len() || std::mem::replace(&mut seen[channel], true) {
                return Err(format!("channel {channel} is not a channel, or occurs twice in the permutation"));
            }
            if channel / frame != place / frame {
                return Err(format!("channel {channel} leaves the heads that are rotated together"));
            }
        }
    }
    Ok(())
}

/// The bases that a layer stores keys and values in.
fn bases(layout: &CachePlan, layer: &LayerLayout, own: &LayerCalibration) -> Result<Bases, String> {
    let (heads, d) = (layout.shape.num_key_value_heads, layout.shape.head_dim);
    let basis = |transform: Transform, matrices: &Option<Vec<f32>>, side: &str, kind: Kind| {
        if transform != Transform::Basis {
            return Ok(None);
        }
        let matrices = matrices.as_ref().ok_or_else(|| format!("the {side} basis is missing"))?;
        if matrices.len() != heads * d * d {
            return Err(format!("a {side} basis of {} numbers, and {heads} x {d} x {d} are needed", matrices.len()));
        }
        let basis = Basis::new(matrices, d, kind).map_err(|what| format!("the {side} basis {what}"))?;
        Ok(Some(Arc::new(basis)))
    };
    let planes = layer.needs_planes()[1];
    Ok([
        basis(layer.keys, &own.key_basis, "key", Kind::Orthogonal)?,
        basis(layer.values, &own.value_basis, "value", if planes { Kind::Invertible } else { Kind::Orthogonal })?,
    ])
}

fn check_feedback(feedback: &KeyFeedback, heads: usize, d: usize) -> Result<(), String> {
    let KeyFeedback { order, factors } = feedback;
    if order.len() != heads * d || factors.len() != heads * d * d {
        let (order, factors) = (order.len(), factors.len());
        return Err(format!("error feedback of {order} channels and {factors} factors, and {heads} x {d} are needed"));
    }
    for (head, own) in order.chunks_exact(d).enumerate() {
        let mut sorted = own.to_vec();
        sorted.sort_unstable();
        if !sorted.iter().copied().eq(0..d as u32) {
            return Err(format!("an order of error feedback in KV head {head} that is none of its channels"));
        }
    }
    if factors.iter().any(|factor| !factor.is_finite()) {
        return Err("error feedback that is not finite".into());
    }
    Ok(())
}

fn check_adapters(adapters: &Adapters, features: usize, kv_heads: usize, d: usize) -> Result<(), String> {
    let half = d * features / 2;
    let heads = adapters.gates.len();
    if adapters.features != features {
        return Err(format!("adapters of {} features, and the scheme has {features}", adapters.features));
    }
    if heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(format!("adapters of {heads} query heads, and the model has {kv_heads} KV heads"));
    }
    for (weights, count, side) in [(&adapters.query, heads, "query"), (&adapters.key, kv_heads, "key")] {
        if let Some(own) = weights.iter().find(|own| own.len() != count * half) {
            return Err(format!(
                "adapters of {} numbers for the {side} heads, and {count} x {d} x {} are needed",
                own.len(),
                features / 2
            ));
        }
    }
    let numbers = adapters.query.iter().chain(&adapters.key).chain([&adapters.gates]).flatten();
    if numbers.into_iter().any(|number| !number.is_finite()) {
        return Err("adapters that are not finite".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheModel, CacheShape, CalibratedScheme};

    const SHAPE: CacheShape = CacheShape { num_layers: 1, num_key_value_heads: 4, head_dim: 64 };

    fn check(scheme: &str, calibration: Option<LayerCalibration>) -> Result<(), String> {
        let mut scheme = CalibratedScheme::load(scheme).unwrap();
        scheme.calibration = calibration.map(|layer| Arc::new(Calibration { layers: vec![layer] }));
        scheme.layout(&CacheModel::of_shape(SHAPE)).map(drop).map_err(|error| error.to_string())
    }

    fn permuted(permutation: Vec<u32>) -> Option<LayerCalibration> {
        Some(LayerCalibration { permutation: Some(permutation), ..Default::default() })
    }

    #[test]
    fn permutations_are_checked() {
        assert_eq!(check("kvlinc", None), Ok(()));
        let error = check("rotatekv", None).unwrap_err();
        assert!(error.contains("dibit calibrate --kv rotatekv"), "{error}");
        assert_eq!(check("rotatekv", permuted((0..256).rev().collect())), Ok(()));
        assert!(check("rotatekv", permuted((0..255).collect())).unwrap_err().contains("255 channels"));
        assert!(check("rotatekv", permuted(vec![3; 256])).unwrap_err().contains("occurs twice"));
        assert!(check("rotatekv", permuted((1..257).collect())).unwrap_err().contains("is not a channel"));
        assert!(check("rotatekv", Some(LayerCalibration::default())).unwrap_err().contains("permutation is missing"));
    }

    #[test]
    fn bases_are_checked() {
        let identity: Vec<f32> = (0..4 * 64 * 64).map(|i| if i / 64 % 64 == i % 64 { 1.0 } else { 0.0 }).collect();
        let basis = |key: Vec<f32>, value: Vec<f32>| {
            Some(LayerCalibration { key_basis: Some(key), value_basis: Some(value), ..Default::default() })
        };
        assert_eq!(check("resq", basis(identity.clone(), identity.clone())), Ok(()));
        let mut skewed = identity.clone();
        skewed[64 * 64 + 5] = 0.5;
        let error = check("resq", basis(identity.clone(), skewed.clone())).unwrap_err();
        assert!(error.contains("value basis of KV head 1 is not orthogonal"), "{error}");
        skewed[64 * 64 + 5] = f32::NAN;
        assert!(check("resq", basis(skewed, identity.clone())).unwrap_err().contains("not finite"));
        assert!(check("resq", basis(identity, vec![1.0])).unwrap_err().contains("4 x 64 x 64"));
    }

    #[test]
    fn error_feedback_is_checked() {
        let planes = Some(vec![1; 4 * 64]);
        let identity: Vec<f32> = (0..64 * 64).map(|i| if i % 65 == 0 { 1.0 } else { 0.0 }).collect();
        let with = |key_feedback: Option<KeyFeedback>| {
            let (key_planes, value_planes, value_basis) = (planes.clone(), planes.clone(), Some(identity.repeat(4)));
            let own = LayerCalibration { key_planes, value_planes, value_basis, key_feedback, ..Default::default() };
            check("dibit", Some(own)).err().unwrap_or_default()
        };
        let none = KeyFeedback::none(4, 64);
        assert_eq!(with(Some(none.clone())), "");
        assert!(with(None).contains("the error feedback of keys is missing"));
        let mut twice = none.clone();
        twice.order[65] = 0;
        assert!(with(Some(twice)).contains("order of error feedback in KV head 1"));
        assert!(with(Some(KeyFeedback::none(2, 64))).contains("4 x 64 are needed"));
        let mut broken = none;
        broken.factors[7] = f32::INFINITY;
        assert!(with(Some(broken)).contains("not finite"));
    }

    #[test]
    fn powers_are_checked() {
        let with = |scheme: &str, keys: bool, exponents: Vec<u8>| {
            let mut powers = Powers::default();
            powers.set(keys, exponents);
            let adapters = Adapters {
                features: 256,
                query: [vec![0.0; 4 * 64 * 128], vec![0.0; 4 * 64 * 128]],
                key: [vec![0.0; 4 * 64 * 128], vec![0.0; 4 * 64 * 128]],
                gates: vec![1.0; 4],
            };
            check(scheme, Some(LayerCalibration { powers, adapters: Some(adapters), ..Default::default() }))
        };
        assert_eq!(with("kivi", true, vec![0, 1, 2, Powers::MOST]), Ok(()));
        assert!(with("kivi", true, vec![0, 1]).unwrap_err().contains("and 4 exponents of at most 120 are needed"));
        assert!(with("kivi", false, vec![0, 0, 0, 121]).unwrap_err().contains("at most 120"));
        assert_eq!(with("kvlinc", false, vec![0, 1, 2, 3]), Ok(()));
        assert!(with("kvlinc", true, vec![0, 1, 2, 3]).unwrap_err().contains("adapters of a linear correction"));
    }

    #[test]
    fn planes_are_the_same_in_tiles() {
        let identity: Vec<f32> = (0..64 * 64).map(|i| if i % 65 == 0 { 1.0 } else { 0.0 }).collect();
        let with = |key_planes: Vec<u8>| {
            let (value_planes, value_basis) = (Some(vec![1; 4 * 64]), Some(identity.repeat(4)));
            let key_feedback = Some(KeyFeedback::none(4, 64));
            let key_planes = Some(key_planes);
            let own = LayerCalibration { key_planes, value_planes, value_basis, key_feedback, ..Default::default() };
            check("dibit", Some(own)).err().unwrap_or_default()
        };
        // Tiles of channels that do not lie side by side.
        let mut planes: Vec<u8> = (0..4 * 64).map(|channel| (channel % 8 / 3) as u8).collect();
        assert_eq!(with(planes.clone()), "");
        planes[65] = 2;
        assert!(with(planes).contains("planes of key channels of KV head 1 that are not the same in tiles of 8"));
    }

    #[test]
    fn bases_of_values_with_planes_need_an_inverse() {
        let with = |basis: Vec<f32>| {
            let planes = Some(vec![1; 4 * 64]);
            let (key_planes, value_planes) = (planes.clone(), planes);
            let key_feedback = Some(KeyFeedback::none(4, 64));
            let value_basis = Some(basis);
            let own = LayerCalibration { value_basis, key_planes, value_planes, key_feedback, ..Default::default() };
            check("dibit", Some(own))
        };
        let scaled: Vec<f32> = (0..4 * 64 * 64).map(|i| if i / 64 % 64 == i % 64 { 3.0 } else { 0.01 }).collect();
        assert_eq!(with(scaled.clone()), Ok(()));
        let mut flat = scaled.clone();
        flat[2 * 64 * 64..2 * 64 * 64 + 64].fill(0.0);
        let error = with(flat).unwrap_err();
        assert!(error.contains("layer 0: the value basis of KV head 2 cannot be inverted"), "{error}");
        let mut broken = scaled;
        broken[5] = f32::INFINITY;
        assert!(with(broken).unwrap_err().contains("the value basis of KV head 0 holds a number that is not finite"));
    }
}
