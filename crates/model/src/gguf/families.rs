//! What files of single families say beside what all do, and what llama.cpp knows of these models.

use super::config::Settings;
use crate::{Architecture, ModelError};
use serde_json::{Value, json};

const WINDOW: &str = "attention.sliding_window";

/// Far above every model.
const MOST_LAYERS: usize = 1 << 12;

/// Layers of the Gemma models of 27 billion parameters, which scale attention by the width of a head's share of the residual
/// stream.
const LAYERS_OF_27B: [usize; 2] = [46, 62];

/// Whether the models are mixtures of experts.
pub(super) const fn is_mixture(architecture: Architecture) -> bool {
    matches!(architecture, Architecture::Mixtral | Architecture::Qwen3Moe | Architecture::GptOss)
}

/// Keys that the family reads and that would change another one's computation.
pub(super) const fn keys(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Gemma2 => &["attn_logit_softcapping", "final_logit_softcapping"],
        Architecture::Granite => &["attention.scale", "embedding_scale", "logit_scale", "residual_scale"],
        _ => &[],
    }
}

/// Puts what a family's file says into its `config.json`.
///
/// # Errors
/// [`ModelError::Malformed`] and [`ModelError::Unsupported`].
pub(super) fn add(settings: &Settings, architecture: Architecture, config: &mut Value) -> Result<(), ModelError> {
    if is_mixture(architecture) {
        experts(settings, architecture, config)?;
    }
    match architecture {
        Architecture::Gemma2 | Architecture::Gemma3 => gemma(settings, architecture, config),
        Architecture::GptOss => gpt_oss(settings, config),
        Architecture::Granite => granite(settings, config),
        Architecture::Olmo2 => olmo2(settings),
        _ => Ok(()),
    }
}

fn experts(settings: &Settings, architecture: Architecture, config: &mut Value) -> Result<(), ModelError> {
    config["num_experts_per_tok"] = json!(settings.needed("expert_used_count")?);
    let count = json!(settings.needed("expert_count")?);
    if architecture == Architecture::Qwen3Moe {
        config["num_experts"] = count;
        config["moe_intermediate_size"] = json!(settings.needed("expert_feed_forward_length")?);
        config["norm_topk_prob"] = json!(true);
    } else {
        config["num_local_experts"] = count;
    }
    Ok(())
}

fn gemma(settings: &Settings, architecture: Architecture, config: &mut Value) -> Result<(), ModelError> {
    let (layers, hidden) = (settings.needed("block_count")?, settings.needed("embedding_length")?);
    let heads = settings.needed("attention.head_count")?;
    let scalar =
        if LAYERS_OF_27B.contains(&layers) { json!(hidden / heads.max(1)) } else { config["head_dim"].clone() };
    config["query_pre_attn_scalar"] = scalar;
    layer_types(settings, config)?;
    if architecture == Architecture::Gemma2 {
        // Older files do not say it, and mean the family's.
        if config["sliding_window"].is_null() {
            config.as_object_mut().expect("an object").remove("sliding_window");
        }
        for name in keys(architecture) {
            if let Some(cap) = settings.float(name)? {
                config[*name] = json!(cap);
            }
        }
        return Ok(());
    }
    let window = settings.float("rope.freq_base_swa")?.unwrap_or(10_000.0);
    config["rope_parameters"] = json!({
        "full_attention": config["rope_parameters"].take(),
        "sliding_attention": {"rope_type": "default", "rope_theta": window},
    });
    Ok(())
}

fn gpt_oss(settings: &Settings, config: &mut Value) -> Result<(), ModelError> {
    config["intermediate_size"] = json!(settings.needed("expert_feed_forward_length")?);
    config["sliding_window"] = json!(settings.needed(WINDOW)?);
    // Files do not say it. llama.cpp truncates; the models were trained without it.
    if config["rope_parameters"]["rope_type"] == "yarn" {
        config["rope_parameters"]["truncate"] = json!(false);
    }
    layer_types(settings, config)
}

fn granite(settings: &Settings, config: &mut Value) -> Result<(), ModelError> {
    let finetuned = "rope.scaling.finetuned";
    if settings.metadata.flag(&settings.key(finetuned))? == Some(false) {
        return Err(settings.unsupported(finetuned, false, "Granite with rotary positions"));
    }
    let logits = "logit_scale";
    if settings.float(logits)?.is_none() {
        return Err(settings.metadata.missing(&settings.key(logits)));
    }
    let head_dim = config["head_dim"].as_f64().unwrap_or_default();
    // As llama.cpp reads it, 0 is as absent.
    for (part, name, silent) in [
        ("attention.scale", "attention_multiplier", head_dim.max(1.0).powf(-0.5)),
        ("embedding_scale", "embedding_multiplier", 1.0),
        ("residual_scale", "residual_multiplier", 1.0),
        (logits, "logits_scaling", 1.0),
    ] {
        config[name] = json!(settings.float(part)?.filter(|scale| *scale != 0.0).unwrap_or(silent));
    }
    Ok(())
}

/// OLMo 3 has the architecture's name, too.
fn olmo2(settings: &Settings) -> Result<(), ModelError> {
    match settings.number(WINDOW)?.filter(|window| *window > 0) {
        Some(window) => Err(settings.unsupported(WINDOW, window, "OLMo 2, which has no windows (this is an OLMo 3)")),
        None => Ok(()),
    }
}

/// Which layers have a window, where a file says it: every one but the last of so many, or those of a list.
fn layer_types(settings: &Settings, config: &mut Value) -> Result<(), ModelError> {
    let key = settings.key("attention.sliding_window_pattern");
    let layers = settings.needed("block_count")?;
    if layers > MOST_LAYERS {
        // `ModelConfig` refuses it.
        return Ok(());
    }
    let is_windowed: Vec<bool> = match settings.metadata.flags(&key)? {
        Some(flags) => flags,
        None => match settings.metadata.number(&key)? {
            None => return Ok(()),
            Some(period) => (1..=layers).map(|layer| period == 0 || !layer.is_multiple_of(period)).collect(),
        },
    };
    if is_windowed.len() != layers {
        let found = is_windowed.len();
        return Err(settings
            .metadata
            .malformed(format!("'{key}' of its metadata has {found} values for {layers} layers")));
    }
    let kind = |own: bool| if own { "sliding_attention" } else { "full_attention" };
    config["layer_types"] = is_windowed.into_iter().map(kind).collect();
    Ok(())
}
