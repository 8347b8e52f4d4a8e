//! What happens to the keys and values of a layer on their way into a cache, besides quantising: the numbers of it, as every
//! device takes them.

use crate::{
    Adapters, Basis, CacheLayout, CacheShape, KeyFeedback, PackedSide, PageLayout, Permutation, Planes, PreRope,
    SideLayout, Transform, ValueTransform,
};
use dibit_quant::Hadamard;
use std::sync::Arc;

/// The transforms of one layer.
#[derive(Debug, Default)]
pub struct LayerTransforms {
    /// Of keys and queries after RoPE.
    pub keys: Option<HeadTransform>,
    /// Of values, taken back from outputs, where the weights do not do it.
    pub values: Option<HeadTransform>,
    /// The way back from stored values to the model's own frame, `[kv head][head_dim][head_dim]`, row-major for row vectors,
    /// where pages protect tokens whose values are small there, and the two differ.
    pub value_frame: Option<Arc<[f32]>>,
    /// Of keys that are stored before RoPE.
    pub pre_rope: Option<PreRopeTransform>,
    /// For each KV head, its key channels in the order in which pages hold them, where that is not their own.
    pub order: Option<Vec<Vec<usize>>>,
    /// Error feedback of keys.
    pub feedback: Option<CodingOrder>,
    /// Adapters of the linear correction.
    pub adapters: Option<FeatureMaps>,
}

/// An invertible matrix for each KV head; one that turns, for keys.
#[derive(Debug)]
pub enum HeadTransform {
    /// The same for all heads.
    Hadamard(Hadamard),
    /// One for each.
    Basis(Arc<Basis>),
}

/// Rotation and order of keys that are stored before RoPE (RotateKV).
#[derive(Debug)]
pub struct PreRopeTransform {
    /// Adjacent KV heads that are rotated together.
    pub heads: usize,
    /// Their rotation.
    pub hadamard: Option<Hadamard>,
    /// Channel `j` in storage is channel `channels[j]` of the rotated keys, both counted in the whole layer.
    pub channels: Vec<u32>,
    /// Rotary frequencies, `head_dim / 2`.
    pub inv_freq: Vec<f32>,
}

/// Error feedback of the keys of a layer, by the places of channels in storage.
#[derive(Debug)]
pub struct CodingOrder {
    /// Place in storage of each channel of a KV head, in the order of coding, `[kv head][head_dim]`.
    pub places: Vec<usize>,
    /// What the channels behind the `i`-th take up of its error, `[kv head][head_dim][head_dim]`.
    pub factors: Vec<f32>,
}

/// The feature maps of a linear correction, both halves side by side.
#[derive(Debug)]
pub struct FeatureMaps {
    /// D.
    pub features: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Query heads of a KV head.
    pub shared: usize,
    /// `[query head][head_dim][D]`
    pub query: Vec<f32>,
    /// `[kv head][head_dim][D]`
    pub key: Vec<f32>,
    /// What each query head is multiplied by.
    pub gates: Vec<f32>,
}

impl CacheLayout {
    /// The transforms of a layer.
    pub fn transforms(&self, index: usize) -> LayerTransforms {
        let layer = &self.layers[index];
        let d = self.shape.head_dim;
        let tables = self.tables();
        let hadamard = |order: usize| Hadamard::new(order).expect("an order that the plan has looked at");
        let calibrated = "what the tables have looked at";
        let calibration = || tables.layer(index).expect(calibrated);
        let keys = match layer.keys {
            Transform::Hadamard => Some(HeadTransform::Hadamard(hadamard(d))),
            Transform::Basis => Some(HeadTransform::Basis(tables.key_basis(index).expect(calibrated))),
            _ => None,
        };
        let values = self.online_values(index).map(|own| match own {
            ValueTransform::Hadamard => HeadTransform::Hadamard(hadamard(d)),
            ValueTransform::Basis(basis) => HeadTransform::Basis(basis),
        });
        let pre_rope = match layer.keys {
            Transform::PreRope(PreRope { heads, permutation, .. }) => Some(PreRopeTransform {
                heads: layer.rotated_heads,
                hadamard: (heads > 0).then(|| hadamard(layer.rotated_heads * d)),
                channels: match permutation {
                    Permutation::None => (0..self.shape.row() as u32).collect(),
                    _ => calibration().permutation.clone().expect(calibrated),
                },
                inv_freq: tables.inv_freq.clone(),
            }),
            _ => None,
        };
        let any_keys = |has: fn(&PackedSide) -> bool| {
            let has = |page: &PageLayout| matches!(&page.keys, SideLayout::Packed(side) if has(side));
            layer.pages.iter().any(has)
        };
        let order: Option<Vec<Vec<usize>>> = any_keys(|side| side.planes.is_some())
            .then(|| calibration().key_planes.as_ref().expect(calibrated).chunks_exact(d).map(Planes::order).collect());
        let feedback = any_keys(|side| side.feedback)
            .then(|| CodingOrder::new(calibration().key_feedback.as_ref().expect(calibrated), order.as_deref(), d));
        let adapters = layer.states.as_ref().and(tables.layer(index)).and_then(|own| own.adapters.as_ref());
        let adapters = adapters.map(|own| FeatureMaps::new(own, self.shape));
        let value_frame = tables.value_basis(index).filter(|own| layer.protects_in_pages() && !own.is_orthogonal());
        let value_frame = value_frame.map(|own| own.inverse(d).into());
        LayerTransforms { keys, values, value_frame, pre_rope, order, feedback, adapters }
    }
}

impl CodingOrder {
    /// Error feedback of channels that pages hold in the order `storage`, where that is not their own.
    pub fn new(all: &KeyFeedback, storage: Option<&[Vec<usize>]>, head_dim: usize) -> Self {
        let head = |(kv_head, order): (usize, &[u32])| {
            let mut place: Vec<usize> = (0..head_dim).collect();
            for (stored, channel) in storage.iter().flat_map(|all| &all[kv_head]).enumerate() {
                place[*channel] = stored;
            }
            order.iter().map(|channel| place[*channel as usize]).collect::<Vec<_>>()
        };
        CodingOrder {
            places: all.order.chunks_exact(head_dim).enumerate().flat_map(head).collect(),
            factors: all.factors.clone(),
        }
    }
}

impl FeatureMaps {
    fn new(own: &Adapters, shape: CacheShape) -> Self {
        let half = own.features / 2;
        FeatureMaps {
            features: own.features,
            head_dim: shape.head_dim,
            shared: own.gates.len() / shape.num_key_value_heads,
            query: side_by_side(&own.query, half),
            key: side_by_side(&own.key, half),
            gates: own.gates.clone(),
        }
    }
}

/// `[head][head_dim][D]` of both halves, `[head][head_dim][D / 2]`.
fn side_by_side(halves: &[Vec<f32>; 2], half: usize) -> Vec<f32> {
    let rows = halves[0].chunks_exact(half).zip(halves[1].chunks_exact(half));
    rows.flat_map(|(first, second)| first.iter().chain(second)).copied().collect()
}
