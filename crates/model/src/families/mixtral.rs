//! Mixtral (Mistral AI): Mistral with mixtures of experts, whose weights are a softmax over those that a token takes.

use super::Source;
use crate::spec::ExpertNames;
use crate::{DecoderSpec, ExpertSpec, ModelError};

pub(super) const KEYS: [&str; 2] = ["num_experts_per_tok", "num_local_experts"];

pub(super) fn spec(source: &Source) -> Result<DecoderSpec, ModelError> {
    let experts = ExpertSpec {
        routing: source.routing("num_local_experts", true, [8, 2])?,
        intermediate_size: source.width("intermediate_size", None)?,
        dense_layers: Vec::new(),
        names: ExpertNames::Mixtral,
    };
    Ok(DecoderSpec { experts: Some(experts), ..source.llama() })
}
