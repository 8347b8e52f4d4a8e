//! A scheme with a shape of heads, and a cache of it on a device.

use super::LAYER;
use super::made_up::calibration;
use dibit_cache::{CacheLayout, CacheModel, CacheShape, CalibratedScheme, Calibration, Pivots, Sinks};
use dibit_device::{Arithmetic, KvCache, KvStorage};
use std::sync::Arc;

pub(crate) struct Case {
    pub(crate) scheme: CalibratedScheme,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Tokens that the layer is made to protect where the scheme looks for massive activations.
    pub(crate) sinks: Vec<usize>,
    /// Classes of the tokens.
    pub(crate) classes: Vec<u8>,
    pub(crate) arithmetic: Arithmetic,
    /// How many tokens a query sees, a cap of logits, and logits of sinks of the query heads.
    pub(crate) seen: Option<usize>,
    pub(crate) softcap: Option<f32>,
    pub(crate) head_sinks: Option<Vec<f32>>,
}

impl Case {
    pub(crate) fn model(&self) -> CacheModel {
        CacheModel { spans: vec![self.seen; 2], ..CacheModel::of_shape(self.shape()) }
    }

    pub(crate) fn shape(&self) -> CacheShape {
        CacheShape { num_layers: 2, num_key_value_heads: self.kv_heads, head_dim: self.head_dim }
    }

    pub(crate) fn new(scheme: impl Into<CalibratedScheme>, heads: usize, kv_heads: usize, head_dim: usize) -> Self {
        let mut scheme = scheme.into();
        let shape = CacheShape { num_layers: 2, num_key_value_heads: kv_heads, head_dim };
        if scheme.takes_calibration() {
            let frame = scheme.plan(&CacheModel::of_shape(shape)).unwrap().layers[LAYER].frame * head_dim;
            scheme.calibration =
                Some(Arc::new(Calibration { layers: vec![calibration(&scheme, shape, heads, frame); 2] }));
        }
        let (sinks, classes, arithmetic) = (Vec::new(), Vec::new(), Arithmetic::Exact);
        let (seen, softcap, head_sinks) = (None, None, None);
        Case { scheme, heads, kv_heads, head_dim, sinks, classes, arithmetic, seen, softcap, head_sinks }
            .protecting(&[0, 5, 133, 260])
    }

    /// Makes schemes that look for massive activations find these tokens.
    pub(crate) fn protecting(mut self, tokens: &[usize]) -> Self {
        self.sinks = tokens.to_vec();
        match &mut self.scheme.sinks {
            Sinks::Massive(count) | Sinks::Pivots(Pivots { count, .. }) => *count = tokens.len(),
            Sinks::None | Sinks::First(_) | Sinks::Auto(_) => {}
        }
        self
    }

    /// With limits of what queries see, and of logits.
    pub(crate) fn limited(self, seen: Option<usize>, softcap: Option<f32>, has_sinks: bool) -> Self {
        let head_sinks = has_sinks.then(|| (0..self.heads).map(|head| 1.5 - head as f32).collect());
        Case { seen, softcap, head_sinks, ..self }
    }

    pub(crate) fn layout(&self) -> CacheLayout {
        self.scheme.layout(&self.model()).unwrap()
    }

    pub(crate) fn cache<D: KvStorage>(&self, device: &D, len: usize, sequences: usize, max_rows: usize) -> KvCache<D> {
        let layout = self.layout();
        let blocks = sequences * layout.blocks(len);
        KvCache::new(device, layout, blocks, sequences, max_rows, self.arithmetic).unwrap()
    }
}
