//! What a study looks at: queries, keys and values of a text.

use crate::EvalError;
use crate::study::{LayerSample, StudyShape};
use dibit_device::Device;
use dibit_model::{Observation, Pretrained};
use dibit_runner::ExactPass;
use std::sync::Arc;

/// Runs a text through a model and keeps the queries, keys and values of every layer, after RoPE.
///
/// # Errors
/// [`EvalError`].
pub fn sample<D: Device>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    ids: &[u32],
) -> Result<(StudyShape, Vec<LayerSample>), EvalError> {
    let config = &pretrained.config;
    let shape = StudyShape {
        tokens: ids.len(),
        num_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        head_dim: config.head_dim,
    };
    let empty = LayerSample { q: Vec::new(), k: Vec::new(), v: Vec::new() };
    let mut layers = vec![empty; config.num_hidden_layers];
    let mut pass = ExactPass::new(device, config, &pretrained.weights, ids.len())?;
    // Rows come in their order.
    pass.run(ids, &mut |seen: Observation| {
        let layer = &mut layers[seen.layer];
        layer.q.extend_from_slice(seen.q);
        layer.k.extend_from_slice(seen.k);
        layer.v.extend_from_slice(seen.v);
    })?;
    Ok((shape, layers))
}
