//! Keys of a `config.json`: those that are read, and those that change what a model computes and that dibit does not follow.

use crate::json::shown;
use crate::{Architecture, ModelError, families};
use serde_json::{Map, Value};

/// Keys whose values are whole numbers, however they are spelled.
pub(crate) const WHOLE: [&str; 10] = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "max_window_layers",
    "sliding_window",
];

/// Keys that are read beside those of [`WHOLE`].
const READ: [&str; 21] = [
    "architectures",
    "attention_bias",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "hidden_act",
    "initializer_range",
    "layer_types",
    "mlp_bias",
    "model_type",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_sliding_window",
];

/// When a key changes nothing.
enum Neutral {
    /// False, 0, an empty list.
    Off,
    /// 1: a factor.
    One,
    /// True, or a list of 1 and true.
    On,
    /// Off, or 1: one expert is no mixture.
    AtMostOne,
}

use Neutral::{AtMostOne, Off, On, One};

/// Keys of models whose code differs from that of the families, though they may go by their names.
const KEYS: [(&str, Neutral); 33] = [
    ("alibi", Off),
    ("attention_chunk_size", Off),
    ("attention_multiplier", One),
    ("attn_logit_softcapping", Off),
    ("attn_temperature_tuning", Off),
    ("clip_qkv", Off),
    ("compression_config", Off),
    ("dim_model_base", Off),
    ("embedding_multiplier", One),
    ("embedding_scale", One),
    ("final_logit_softcapping", Off),
    ("is_causal", On),
    ("kv_lora_rank", Off),
    ("lm_head_bias", Off),
    ("lm_head_multiplier", One),
    ("logit_scale", One),
    ("logits_scaling", One),
    ("n_routed_experts", Off),
    ("no_rope_layer_interval", Off),
    ("no_rope_layers", On),
    ("nope_layer_interval", Off),
    ("num_experts", AtMostOne),
    ("num_local_experts", AtMostOne),
    ("parallel_attn", Off),
    ("q_lora_rank", Off),
    ("residual_multiplier", One),
    ("rope_interleave", Off),
    ("rope_interleaved", Off),
    ("rope_ratio", One),
    ("rotary_pct", One),
    ("scale_depth", Off),
    ("scale_emb", One),
    ("use_parallel_residual", Off),
];

/// Names under which configurations ask for norms of the heads of q and k.
const QK_NORM: [&str; 3] = ["use_qk_norm", "qk_norm", "qk_layernorm"];

impl Neutral {
    fn is(&self, value: &Value) -> bool {
        let off = match value {
            Value::Null => true,
            Value::Bool(on) => !on,
            Value::Number(number) => number.as_f64() == Some(0.0),
            Value::String(text) => text.is_empty(),
            Value::Array(values) => values.is_empty(),
            Value::Object(object) => object.is_empty(),
        };
        // Some write 0 or false where a factor is not used.
        let one = || value.as_f64() == Some(1.0);
        match self {
            Off => off,
            One | AtMostOne => off || one(),
            On => match value {
                Value::Array(values) => values.iter().all(|value| On.is(value)),
                value => value.is_null() || *value == true || one(),
            },
        }
    }
}

/// Refuses a configuration with keys that change the model and are not followed.
///
/// # Errors
/// [`ModelError::Unsupported`].
pub(crate) fn check(config: &Map<String, Value>, architecture: Architecture) -> Result<(), ModelError> {
    let own = families::keys(architecture);
    for (key, neutral) in KEYS.iter().filter(|(key, _)| !own.contains(key)) {
        if let Some(value) = config.get(*key).filter(|value| !neutral.is(value)) {
            return Err(ModelError::Unsupported {
                what: format!("{key} {} in the configuration", shown(value)),
                supported: format!("the computation of {} without it", architecture.name()),
            });
        }
    }
    for key in QK_NORM {
        let asked = config.get(key).filter(|value| !value.is_null());
        if let Some(value) = asked.filter(|value| Off.is(value) == architecture.has_qk_norm()) {
            let norms = if architecture.has_qk_norm() { "has" } else { "has no" };
            return Err(ModelError::Unsupported {
                what: format!("{key} {} in the configuration", shown(value)),
                supported: format!("that of {}, which {norms} norms of q and k", architecture.name()),
            });
        }
    }
    Ok(())
}

/// Says which keys are not read, and what is odd about those that are.
pub(crate) fn note(config: &Map<String, Value>, architecture: Architecture, origin: &str) {
    let is_read =
        |key: &str| WHOLE.contains(&key) || READ.contains(&key) || families::keys(architecture).contains(&key);
    let unread = config.keys().filter(|key| !is_read(key));
    let unread: Vec<&str> = unread.map(String::as_str).collect();
    if !unread.is_empty() {
        tracing::debug!("{origin}: not read: {}", unread.join(", "));
    }
    if let Some(other) = config.get("model_type").and_then(Value::as_str).filter(|x| *x != architecture.model_type()) {
        tracing::warn!("{origin}: model_type is '{other}'; the model is run as {}", architecture.name());
    }
    if config.get("auto_map").is_some_and(|map| map.get("AutoModelForCausalLM").is_some()) {
        tracing::warn!(
            "{origin}: the code that the model brings along is not run; it is run as {}",
            architecture.name()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(config: Value, architecture: Architecture) -> Option<String> {
        check(config.as_object().unwrap(), architecture).err().map(|error| error.to_string())
    }

    #[test]
    fn keys_that_change_a_model_are_named_with_their_values() {
        for (key, value) in [
            ("attn_logit_softcapping", json!(50.0)),
            ("clip_qkv", json!(8)),
            ("embedding_multiplier", json!(12)),
            ("is_causal", json!(false)),
            ("no_rope_layers", json!([1, 1, 0, 1])),
            ("num_experts", json!(8)),
            ("num_local_experts", json!(8)),
            ("q_lora_rank", json!(1536)),
            ("residual_multiplier", json!(0.22)),
            ("use_qk_norm", json!(true)),
        ] {
            let message = message(json!({key: value}), Architecture::Llama).unwrap_or_else(|| panic!("{key}"));
            assert!(message.contains(&format!("{key} {value}")) && message.contains("LlamaForCausalLM"), "{message}");
        }
        assert!(message(json!({"qk_norm": false}), Architecture::Qwen3).unwrap().contains("has norms"));
    }

    #[test]
    fn keys_at_their_neutral_values_and_unknown_ones_change_nothing() {
        let config = json!({
            "attn_logit_softcapping": null, "clip_qkv": null, "embedding_multiplier": 1.0, "is_causal": true,
            "no_rope_layers": [1, 1, 1], "num_experts": 0, "num_local_experts": 1, "q_lora_rank": null,
            "residual_multiplier": 1, "use_qk_norm": false, "pretraining_tp": 2, "use_cache": false,
            "attention_dropout": 0.1, "unknown": {"a": 1}
        });
        assert_eq!(message(config, Architecture::Llama), None);
        assert_eq!(message(json!({"use_qk_norm": true}), Architecture::Qwen3), None);
    }
}
