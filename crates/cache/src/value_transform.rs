//! Transforms of values that can be fused into the projections of a model.

use crate::{Basis, CacheLayout, CachePlan, Transform};
use dibit_quant::Hadamard;
use std::fmt;
use std::sync::Arc;

/// What happens to the values of a layer before they are stored, each head by itself. A model whose value projection
/// computes values that are transformed already, and whose output projection takes outputs in their frame, computes what
/// it did before.
#[derive(Debug, Clone)]
pub enum ValueTransform {
    /// `v H`.
    Hadamard,
    /// `v T`.
    Basis(Arc<Basis>),
}

impl PartialEq for ValueTransform {
    /// Bases are equal by their numbers.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (ValueTransform::Hadamard, ValueTransform::Hadamard) => true,
            // Layouts of one scheme mostly share them.
            (ValueTransform::Basis(own), ValueTransform::Basis(other)) => Arc::ptr_eq(own, other) || own == other,
            _ => false,
        }
    }
}

/// In how many layers values are transformed where, and what that costs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransformedValues {
    /// Layers whose projections do it.
    pub fused: usize,
    /// Layers whose cache does it: values when they are written, and outputs back.
    pub online: usize,
    /// Multiply-adds of the latter for a token, all layers together.
    pub multiply_adds: usize,
}

impl fmt::Display for TransformedValues {
    /// A sentence; empty where no values are transformed.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let TransformedValues { fused, online, multiply_adds } = self;
        let layers = |count: &usize| format!("{count} {}", if *count == 1 { "layer" } else { "layers" });
        if *fused > 0 {
            let of = if *online > 0 {
                format!("of {} of {}", fused, layers(&(fused + online)))
            } else {
                format!("of {}", layers(fused))
            };
            write!(f, "the transform of values is fused into the value and output projections {of}")?;
        }
        if *online > 0 {
            f.write_str(if *fused > 0 { "; " } else { "" })?;
            write!(
                f,
                "the cache transforms values, and outputs back, in {}, {multiply_adds} multiply-adds a token",
                layers(online)
            )?;
        }
        Ok(())
    }
}

impl CacheLayout {
    /// What is fused into the projections of each layer. A layer whose basis is not known yet has nothing to fuse.
    pub fn fused_values(&self) -> Vec<Option<ValueTransform>> {
        let fused = |index: usize| self.value_transform(index).filter(|_| self.layers[index].values_fused);
        (0..self.layers.len()).map(fused).collect()
    }

    /// The transform that a cache applies to the values of a layer, and takes back from outputs.
    pub fn online_values(&self, layer: usize) -> Option<ValueTransform> {
        self.value_transform(layer).filter(|_| !self.layers[layer].values_fused)
    }

    /// The transform of the values of a layer, wherever it is done.
    fn value_transform(&self, layer: usize) -> Option<ValueTransform> {
        match self.layers[layer].values {
            Transform::Hadamard => Some(ValueTransform::Hadamard),
            Transform::Basis => self.tables().value_basis(layer).map(ValueTransform::Basis),
            _ => None,
        }
    }
}

impl CachePlan {
    /// Where values are transformed, in a model with so many query heads.
    pub fn transformed_values(&self, num_attention_heads: usize) -> TransformedValues {
        let mut all = TransformedValues::default();
        let d = self.shape.head_dim;
        for layer in self.layers.iter().filter(|layer| layer.transforms_values()) {
            if layer.values_fused {
                all.fused += 1;
                continue;
            }
            let head = match layer.values {
                Transform::Hadamard => Hadamard::new(d).map_or(0, |hadamard| hadamard.multiply_adds()),
                _ => d * d,
            };
            all.online += 1;
            all.multiply_adds += (self.shape.num_key_value_heads + num_attention_heads) * head;
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheModel, CacheShape, CalibratedScheme, Calibration, KeyFeedback, LayerCalibration};

    const SHAPE: CacheShape = CacheShape { num_layers: 3, num_key_value_heads: 2, head_dim: 8 };

    fn layout(scheme: &str, basis: Option<f32>, fuses: impl Fn(usize) -> bool) -> CacheLayout {
        let mut scheme = CalibratedScheme::load(scheme).unwrap();
        let matrix = |factor: f32| -> Vec<f32> { (0..64).map(|at| if at % 9 == 0 { factor } else { 0.0 }).collect() };
        let layer = |factor: f32| LayerCalibration {
            key_planes: Some(vec![1; 16]),
            value_planes: Some(vec![1; 16]),
            value_basis: Some(matrix(factor).repeat(2)),
            key_feedback: Some(KeyFeedback::none(2, 8)),
            ..Default::default()
        };
        scheme.calibration = basis.map(|factor| Arc::new(Calibration { layers: vec![layer(factor); 3] }));
        scheme.layout(&CacheModel::of_shape(SHAPE).fusing(fuses)).unwrap()
    }

    #[test]
    fn layers_are_fused_or_online() {
        let own = layout("kvlinc", None, |layer| layer != 1);
        let expected = [Some(ValueTransform::Hadamard), None, Some(ValueTransform::Hadamard)];
        assert_eq!(own.fused_values(), expected);
        assert_eq!([0, 1, 2].map(|layer| own.online_values(layer).is_some()), [false, true, false]);
        // 2 KV heads and 4 query heads, 3 steps of 8 sums and a factor.
        let cost = TransformedValues { fused: 2, online: 1, multiply_adds: 6 * 32 };
        assert_eq!(own.transformed_values(4), cost);
        assert_eq!(
            cost.to_string(),
            "the transform of values is fused into the value and output projections of 2 of 3 layers; the cache transforms \
             values, and outputs back, in 1 layer, 192 multiply-adds a token"
        );
        let plain = layout("kivi", None, |_| true);
        assert_eq!(plain.fused_values(), [None, None, None]);
        assert_eq!(plain.transformed_values(4), TransformedValues::default());
        assert_eq!(TransformedValues::default().to_string(), "");
    }

    #[test]
    fn bases_are_told_apart_by_their_numbers() {
        let own = layout("dibit", Some(2.0), |_| false);
        assert_eq!(own.transformed_values(4), TransformedValues { fused: 0, online: 3, multiply_adds: 3 * 6 * 64 });
        let [own, same, other] = [2.0, 2.0, 3.0].map(|factor| layout("dibit", Some(factor), |_| true).fused_values());
        assert_eq!(own, same);
        assert!(own[0].is_some() && own != other && own[0] != Some(ValueTransform::Hadamard));
    }
}
