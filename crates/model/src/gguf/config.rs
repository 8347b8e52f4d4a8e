//! The configuration in a file's metadata, as a `config.json`.

use super::header::Content;
use super::metadata::Metadata;
use crate::checkpoint::Format;
use crate::{Architecture, ModelError};
use dibit_device::{Bytes, DType, Tensor};
use serde_json::{Map, Value, json};

/// The architecture that a file calls `name`. Mistral, and Mixtral where there are experts, are a Llama there.
///
/// # Errors
/// [`ModelError::Unsupported`].
pub(super) fn architecture(name: &str, experts: usize) -> Result<Architecture, ModelError> {
    match name {
        "llama" if experts > 0 => Ok(Architecture::Mixtral),
        "llama" => Ok(Architecture::Llama),
        "qwen2" => Ok(Architecture::Qwen2),
        "qwen3" => Ok(Architecture::Qwen3),
        "qwen3moe" => Ok(Architecture::Qwen3Moe),
        "gemma2" => Ok(Architecture::Gemma2),
        "gemma3" => Ok(Architecture::Gemma3),
        other => Err(ModelError::Unsupported {
            what: format!("GGUF architecture '{other}'"),
            supported: "llama, qwen2, qwen3, qwen3moe, gemma2, gemma3".into(),
        }),
    }
}

/// What a file calls its architecture.
///
/// # Errors
/// [`ModelError::Malformed`].
pub(crate) fn name(content: &Content, name: &str) -> Result<String, ModelError> {
    let metadata = Metadata::new(content, name);
    let architecture = metadata.text("general.architecture")?;
    architecture.map(str::to_owned).ok_or_else(|| metadata.missing("general.architecture"))
}

/// Query and KV heads of a file whose rows of query and key projections lie in pairs; `None` where they do not.
pub(crate) fn heads(content: &Content, name: &str) -> Result<Option<(usize, usize)>, ModelError> {
    let metadata = Metadata::new(content, name);
    if metadata.text("general.architecture")? != Some("llama") {
        return Ok(None);
    }
    let query = metadata.number("llama.attention.head_count")?.unwrap_or(0);
    let key_value = metadata.number("llama.attention.head_count_kv")?.unwrap_or(query);
    if query == 0 || key_value == 0 {
        return Err(metadata.malformed("llama.attention.head_count is 0".into()));
    }
    Ok(Some((query, key_value)))
}

/// The `config.json` of a file.
///
/// # Errors
/// [`ModelError::Malformed`] and [`ModelError::Unsupported`].
pub(super) fn config(metadata: &Metadata, bytes: &Bytes) -> Result<Value, ModelError> {
    let name = metadata.text("general.architecture")?.ok_or_else(|| metadata.missing("general.architecture"))?;
    let key = |key: &str| format!("{name}.{key}");
    let experts = metadata.number(&key("expert_count"))?.unwrap_or(0);
    let architecture = architecture(name, experts)?;
    let number = |part: &str| -> Result<usize, ModelError> {
        metadata.number(&key(part))?.ok_or_else(|| metadata.missing(&key(part)))
    };
    if metadata.text("general.type")? == Some("adapter") {
        return Err(unsupported("a GGUF file that is a LoRA adapter", "models: merge it with llama-export-lora first"));
    }
    let is_mixture = matches!(architecture, Architecture::Mixtral | Architecture::Qwen3Moe);
    if experts > 0 && !is_mixture {
        return Err(unsupported(&format!("a mixture of experts of {name}"), "those of llama and qwen3moe"));
    }
    check_unread(metadata, architecture, &key)?;
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.ok_or_else(|| metadata.missing("tokenizer.ggml.tokens"))?;
    let (hidden, heads) = (number("embedding_length")?, number("attention.head_count")?);
    let head_dim = match metadata.number(&key("attention.key_length"))? {
        Some(length) => length,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    for part in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = metadata.number(&key(part))?.filter(|other| *other != head_dim) {
            return Err(unsupported(&format!("{} {other}", key(part)), &format!("{head_dim}, the whole head")));
        }
    }
    let epsilon = key("attention.layer_norm_rms_epsilon");
    let mut ends = Vec::new();
    for id in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(metadata.id(&format!("tokenizer.ggml.{id}"))?.filter(|end| !ends.contains(end)));
    }
    let mut config = json!({
        "architectures": [architecture.name()],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length")?,
        "num_hidden_layers": number("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.number(&key("attention.head_count_kv"))?.unwrap_or(heads),
        "head_dim": head_dim,
        "vocab_size": tokens.len(),
        "max_position_embeddings": number("context_length")?,
        "rms_norm_eps": metadata.float(&epsilon)?.ok_or_else(|| metadata.missing(&epsilon))?,
        "tie_word_embeddings": metadata.tensor("output.weight").is_none(),
        "bos_token_id": metadata.id("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": ends,
        "rope_parameters": rope(metadata, bytes, name)?,
        "sliding_window": metadata.number(&key("attention.sliding_window"))?,
        "use_sliding_window": true,
        "max_window_layers": 0,
    });
    if is_mixture {
        config["num_experts_per_tok"] = json!(number("expert_used_count")?);
        let count = if architecture == Architecture::Mixtral { "num_local_experts" } else { "num_experts" };
        config[count] = json!(experts);
        if architecture == Architecture::Qwen3Moe {
            config["moe_intermediate_size"] = json!(number("expert_feed_forward_length")?);
            config["norm_topk_prob"] = json!(true);
        }
    }
    if architecture.is_gemma() {
        let layers = number("block_count")?;
        gemma(metadata, architecture, &key, &mut config, [layers, hidden, heads])?;
    }
    Ok(config)
}

/// Layers of the models of 27 billion parameters, which scale attention by the width of a head's share of the residual stream.
const LAYERS_OF_27B: [usize; 2] = [46, 62];

/// What a file of Gemma says beside, and what llama.cpp knows of these models.
fn gemma(
    metadata: &Metadata,
    architecture: Architecture,
    key: &dyn Fn(&str) -> String,
    config: &mut Value,
    [layers, hidden, heads]: [usize; 3],
) -> Result<(), ModelError> {
    let scalar =
        if LAYERS_OF_27B.contains(&layers) { json!(hidden / heads.max(1)) } else { config["head_dim"].clone() };
    config["query_pre_attn_scalar"] = scalar;
    if architecture == Architecture::Gemma2 {
        // Older files do not say it, and mean the family's.
        if config["sliding_window"].is_null() {
            config.as_object_mut().expect("an object").remove("sliding_window");
        }
        for name in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if let Some(cap) = metadata.float(&key(name))? {
                config[name] = json!(cap);
            }
        }
        return Ok(());
    }
    let window = metadata.float(&key("rope.freq_base_swa"))?.unwrap_or(10_000.0);
    config["rope_parameters"] = json!({
        "full_attention": config["rope_parameters"].take(),
        "sliding_attention": {"rope_type": "default", "rope_theta": window},
    });
    Ok(())
}

/// Keys that change what a model computes and that dibit does not follow, where they are not 0 or this factor.
const UNREAD: [(&str, f64); 9] = [
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("embedding_scale", 1.0),
    ("final_logit_softcapping", 0.0),
    ("logit_scale", 1.0),
    ("nextn_predict_layers", 0.0),
    ("residual_scale", 1.0),
];

fn check_unread(
    metadata: &Metadata,
    architecture: Architecture,
    key: &dyn Fn(&str) -> String,
) -> Result<(), ModelError> {
    let is_read = |part: &str| architecture == Architecture::Gemma2 && part.ends_with("_logit_softcapping");
    for (part, neutral) in UNREAD.into_iter().filter(|(part, _)| !is_read(part)) {
        if let Some(value) = metadata.float(&key(part))?.filter(|value| *value != 0.0 && *value != neutral) {
            return Err(unsupported(&format!("{} {value}", key(part)), "models without it"));
        }
    }
    for (part, neutral) in [("attention.causal", true), ("use_parallel_residual", false)] {
        if metadata.flag(&key(part))?.is_some_and(|value| value != neutral) {
            return Err(unsupported(&format!("{} {}", key(part), !neutral), "models without it"));
        }
    }
    Ok(())
}

fn unsupported(what: &str, supported: &str) -> ModelError {
    ModelError::Unsupported { what: what.to_owned(), supported: supported.to_owned() }
}

fn rope(metadata: &Metadata, bytes: &Bytes, name: &str) -> Result<Value, ModelError> {
    let key = |key: &str| format!("{name}.rope.{key}");
    let mut rope = Map::new();
    rope.insert("rope_theta".into(), json!(metadata.float(&key("freq_base"))?.unwrap_or(10_000.0)));
    // As llama.cpp reads it: a factor without a type is linear, 0 is no factor, and "none" scales nothing.
    let factor = match metadata.float(&key("scaling.factor"))? {
        None => metadata.float(&key("scale_linear"))?,
        factor => factor,
    };
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    let kind = match metadata.text(&key("scaling.type"))? {
        Some("none") => "default",
        None | Some("linear") if factor == 1.0 => "default",
        None => "linear",
        Some(kind) => kind,
    };
    let is_read = matches!(kind, "default" | "linear" | "yarn");
    let neutral = [("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)];
    for (part, neutral) in neutral.map(|(part, neutral)| (format!("scaling.{part}"), neutral)) {
        if let Some(other) = metadata.float(&key(&part))?.filter(|other| is_read && *other != neutral) {
            return Err(unsupported(&format!("{} {other}", key(&part)), "rope scaling without it"));
        }
    }
    if kind == "yarn" {
        let original = metadata.number(&key("scaling.original_context_length"))?;
        rope.insert("original_max_position_embeddings".into(), json!(original));
        for part in ["beta_fast", "beta_slow"] {
            rope.insert(part.into(), json!(metadata.float(&key(&format!("scaling.yarn_{part}")))?));
        }
    }
    for tensor in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if metadata.tensor(tensor).is_some() {
            return Err(unsupported(&format!("rope scaling by '{tensor}' (longrope)"), "default, linear, llama3"));
        }
    }
    match metadata.tensor("rope_freqs.weight") {
        None => {
            rope.insert("rope_type".into(), json!(kind));
            rope.insert("factor".into(), json!(factor));
        }
        Some(tensor) if kind == "default" && matches!(tensor.format, Format::Numbers(DType::F32)) => {
            let [numbers] = tensor.shape[..] else {
                return Err(metadata.malformed("'rope_freqs.weight' is no vector".into()));
            };
            let divisors = Tensor::from_bytes(bytes, metadata.place(tensor), DType::F32, 1, numbers)
                .map_err(|error| metadata.malformed(format!("'rope_freqs.weight': {error}")))?;
            rope.insert("rope_type".into(), json!("divisors"));
            rope.insert("divisors".into(), json!(divisors.to_f32()));
        }
        Some(tensor) => {
            let found = format!("rope_freqs.weight of {} beside rope scaling '{kind}'", tensor.format.name());
            return Err(unsupported(&found, "rope_freqs.weight of F32 without other scaling"));
        }
    }
    Ok(rope.into())
}
