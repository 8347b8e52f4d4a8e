//! Granite (IBM): Llama with factors of the embedding, of what layers add, of attention and of logits.

use super::Source;
use crate::{DecoderSpec, ModelError};

pub(super) const KEYS: [&str; 4] =
    ["attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"];

pub(super) fn spec(source: &Source) -> Result<DecoderSpec, ModelError> {
    Ok(DecoderSpec {
        embedding_multiplier: source.factor("embedding_multiplier")?,
        residual_multiplier: source.factor("residual_multiplier")?,
        logits_scaling: source.factor("logits_scaling")?,
        // As in transformers, a configuration that does not say it means 1, not 1 / sqrt(head_dim).
        attention_multiplier: Some(source.factor("attention_multiplier")?),
        ..source.llama()
    })
}
