//! Qwen3-MoE (Alibaba): Qwen3 with mixtures of experts in layers that are not listed as dense.

use super::{Source, qwen3};
use crate::json::{shown, whole};
use crate::spec::ExpertNames;
use crate::{DecoderSpec, ExpertSpec, ModelError};

pub(super) const KEYS: [&str; 7] = [
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
];

/// Width of an expert where a configuration does not say.
const INTERMEDIATE: usize = 768;

pub(super) fn spec(source: &Source) -> Result<DecoderSpec, ModelError> {
    let step = source.count("decoder_sparse_step")?.unwrap_or(1);
    let dense: Vec<i64> = match source.value("mlp_only_layers") {
        None => Vec::new(),
        Some(list) => {
            let numbers: Option<Vec<i64>> = list.as_array().and_then(|own| own.iter().map(whole).collect());
            numbers
                .ok_or_else(|| source.malformed(format!("mlp_only_layers is {}, not a list of layers", shown(list))))?
        }
    };
    let is_dense = |layer: usize| dense.contains(&(layer as i64)) || !(layer + 1).is_multiple_of(step);
    // As transformers 5 calls it, too.
    let count = if source.value("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    let experts = ExpertSpec {
        routing: source.routing(count, source.flag("norm_topk_prob")?.unwrap_or(false), [128, 8])?,
        intermediate_size: source.width("moe_intermediate_size", Some(INTERMEDIATE))?,
        dense_layers: (0..source.num_hidden_layers).map(is_dense).collect(),
        names: ExpertNames::Qwen,
    };
    Ok(DecoderSpec { experts: Some(experts), ..qwen3::spec(source) })
}
