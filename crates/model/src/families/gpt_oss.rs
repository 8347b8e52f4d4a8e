//! gpt-oss (OpenAI): mixtures of experts with biases and a clamped activation, learned sinks of attention, sliding windows in
//! every second layer.

use super::Source;
use crate::spec::ExpertNames;
use crate::{DecoderSpec, ExpertSpec, ModelError};
use dibit_device::Activation;

pub(super) const KEYS: [&str; 5] =
    ["num_experts_per_tok", "num_local_experts", "swiglu_alpha", "swiglu_limit", "experts_per_token"];

/// What a configuration means that does not say it.
const LIMIT: f32 = 7.0;
const ALPHA: f32 = 1.702;

pub(super) fn spec(source: &Source) -> Result<DecoderSpec, ModelError> {
    if let Some(other) = source.positive("swiglu_alpha")?.filter(|alpha| *alpha != ALPHA) {
        return Err(ModelError::Unsupported {
            what: format!("swiglu_alpha {other} in the configuration"),
            supported: format!("{ALPHA}"),
        });
    }
    let experts = ExpertSpec {
        routing: source.routing("num_local_experts", true, [128, 4])?,
        intermediate_size: source.width("intermediate_size", None)?,
        dense_layers: Vec::new(),
        names: ExpertNames::GptOss,
    };
    Ok(DecoderSpec {
        experts: Some(experts),
        activation: Activation::Clamped { limit: source.positive("swiglu_limit")?.unwrap_or(LIMIT) },
        attention_sinks: true,
        ..source.llama()
    })
}
