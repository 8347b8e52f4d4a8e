//! What calibration finds for a model.

use crate::Powers;

/// What calibration found for one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct LayerCalibration {
    /// Order of the rotated key channels: channel `j` after it was channel `permutation[j]` before it. A permutation of
    /// all channels of the layer, which keeps those of each [`crate::LayerLayout::frame`] together.
    pub permutation: Option<Vec<u32>>,
    /// Orthogonal matrices `[kv head][head_dim][head_dim]`, applied to row vectors: `k U`.
    pub key_basis: Option<Vec<f32>>,
    /// The same for values: `v T`. Where these have planes, T need not be orthogonal, but must have an inverse.
    pub value_basis: Option<Vec<f32>>,
    /// Two-bit planes of each key channel, `[kv head][head_dim]`, 0 to 4.
    pub key_planes: Option<Vec<u8>>,
    /// The same of values.
    pub value_planes: Option<Vec<u8>>,
    /// What channels of keys take up of what others miss.
    pub key_feedback: Option<KeyFeedback>,
    /// How many tokens with small values pages have places for, where the scheme protects such tokens.
    pub sink_places: Option<u8>,
    /// What heads are divided by before they are stored, where fp16 does not hold them.
    pub powers: Powers,
    /// Adapters of the linear correction.
    pub adapters: Option<Adapters>,
}

/// Error feedback among the channels of keys of a layer: what the code of a channel misses, `e = k - k^`, changes the
/// channels that are coded after it, `k_j <- k_j - e F_ij`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KeyFeedback {
    /// Channels of each KV head in the order in which they are coded, `[kv head][head_dim]`.
    pub order: Vec<u32>,
    /// F of each KV head, `[kv head][head_dim][head_dim]`, rows and columns in the order of coding; nothing below the
    /// diagonal, nor on it, is read.
    pub factors: Vec<f32>,
}

impl KeyFeedback {
    /// Channels in their own order, each coded for itself.
    pub fn none(num_key_value_heads: usize, head_dim: usize) -> Self {
        let order: Vec<u32> = (0..head_dim as u32).collect();
        let factors = vec![0.0; num_key_value_heads * head_dim * head_dim];
        KeyFeedback { order: order.repeat(num_key_value_heads), factors }
    }
}

/// Adapters of a layer's linear correction (KVLinC, section 3.2, equations 4 to 6): the feature maps
/// `phi(x) = [softmax(x W1), softmax(x W2)]` of queries, and of what the codes of keys miss.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Adapters {
    /// D, the features of both maps.
    pub features: usize,
    /// W1 and W2 of each query head, `[head][head_dim][D / 2]`.
    pub query: [Vec<f32>; 2],
    /// W1 and W2 of each KV head, `[kv head][head_dim][D / 2]`.
    pub key: [Vec<f32>; 2],
    /// What the correction of each query head is multiplied by: 1 as in the paper, 0 where it is switched off.
    pub gates: Vec<f32>,
}

impl Adapters {
    /// For each KV head, whether any of its query heads is corrected.
    pub fn enabled(&self, num_key_value_heads: usize) -> Vec<bool> {
        let shared = (self.gates.len() / num_key_value_heads).max(1);
        self.gates.chunks(shared).map(|gates| gates.iter().any(|gate| *gate != 0.0)).collect()
    }
}

/// What calibration found for a model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Calibration {
    /// One entry for each layer.
    pub layers: Vec<LayerCalibration>,
}
