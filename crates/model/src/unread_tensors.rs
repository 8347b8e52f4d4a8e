//! Tensors of a checkpoint that loading did not ask for, and why one that it asked for is not there.

use crate::gguf::ROPE_TENSORS;
use crate::{Architecture, ModelConfig, ModelError};

/// Names that a message shows.
const SHOWN: usize = 5;

/// Ends of names of buffers that are computed and not learned, which some programs save.
const COMPUTED: [&str; 7] = [
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".attn.bias",
    ".attention.bias",
    ".masked_bias",
    ".attn_rot_embd",
];

const MERGE: &str =
    "it is a LoRA adapter, or a model with one: merge it first (peft's merge_and_unload, then save_pretrained)";

/// Judges the tensors that were not read, by the names of the file: those that would have changed what the model says are an
/// error, others are named in a warning.
///
/// # Errors
/// [`ModelError::UnreadTensors`].
pub(crate) fn check<'a>(unread: impl Iterator<Item = &'a str>, config: &ModelConfig) -> Result<(), ModelError> {
    let is_computed = |name: &&str| ROPE_TENSORS.contains(name) || COMPUTED.iter().any(|end| name.ends_with(end));
    let mut names: Vec<&str> = unread.filter(|name| !is_computed(name)).collect();
    names.sort_unstable();
    let architecture = config.architecture.name();
    let error =
        |names: &[&str], hint: String| Err(ModelError::UnreadTensors { architecture, names: listed(names), hint });
    let of = |kind: &dyn Fn(&str) -> bool| -> Vec<&str> { names.iter().copied().filter(|name| kind(name)).collect() };
    let adapter = of(&is_adapter);
    if !adapter.is_empty() {
        return error(&adapter, MERGE.to_owned());
    }
    let layers = config.num_hidden_layers;
    let within = of(&|name| layer(name).is_some_and(|layer| layer < layers));
    if !within.is_empty() {
        let hint = hint(&within, config.architecture);
        return error(&within, hint);
    }
    let beyond = of(&|name| layer(name).is_some());
    if !beyond.is_empty() {
        let hint = format!(
            "the configuration says num_hidden_layers {layers}: it is another model's, or these layers must be taken out"
        );
        return error(&beyond, hint);
    }
    let around = of(&is_around_layers);
    if !around.is_empty() {
        return error(&around, "the checkpoint is probably of another architecture than its configuration says".into());
    }
    if !names.is_empty() {
        tracing::warn!("the checkpoint has tensors that {architecture} does not read: {}", listed(&names));
    }
    Ok(())
}

/// Why a checkpoint has no tensor `name`, where its other names tell.
pub(crate) fn explain_missing<'a>(names: impl Iterator<Item = &'a str>, name: &str) -> Option<ModelError> {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    let error = |found: &str, hint: String| {
        Some(ModelError::OtherNames { name: name.to_owned(), found: found.to_owned(), hint })
    };
    if let Some(found) = names.iter().find(|name| is_adapter(name)) {
        return error(found, MERGE.to_owned());
    }
    if names.iter().any(|name| name.starts_with("model.layers.") || name.starts_with("blk.")) {
        return None;
    }
    let bare = name.strip_prefix("model.").unwrap_or(name);
    let found = names.iter().find(|found| **found == bare || found.ends_with(&format!(".{bare}")))?;
    let prefix = found.strip_suffix(bare).unwrap_or_default();
    let expected = name.strip_suffix(bare).unwrap_or_default();
    if prefix == expected {
        return None;
    }
    let renamed = |whose: &str| format!("{whose}; save the model again so that its names begin with '{expected}'");
    let hint = match prefix {
        "" => renamed("its names lack the prefix of a model that generates text (it was saved as a base model)"),
        _ if prefix.contains("language_model") => {
            "it is a model of images and text; dibit runs models of text alone".to_owned()
        }
        _ if prefix.contains("base_model") => MERGE.to_owned(),
        _ => renamed(&format!("its names begin with '{prefix}'")),
    };
    error(found, hint)
}

fn is_adapter(name: &str) -> bool {
    ["lora_", ".lora.", "base_model.model.", ".base_layer.", "dora_", ".adapter."]
        .iter()
        .any(|part| name.contains(part))
}

/// The layer that a tensor belongs to, by either spelling of names.
fn layer(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("model.layers.").or_else(|| name.strip_prefix("blk."))?;
    rest.split('.').next()?.parse().ok()
}

/// What stands before and behind the layers.
fn is_around_layers(name: &str) -> bool {
    ["model.embed_", "model.norm.", "lm_head.", "token_embd", "output"].iter().any(|start| name.starts_with(start))
}

/// What a checkpoint with these tensors in its layers probably is.
fn hint(names: &[&str], architecture: Architecture) -> String {
    let has = |part: &str| names.iter().any(|name| name.contains(part));
    let probably = |what: &str| format!("it is probably {what}, and its configuration is another model's");
    if !architecture.has_qk_norm() && (has("q_norm") || has("k_norm")) {
        return probably("a Qwen3 or another model with norms of q and k");
    }
    if has("bias") {
        return "the configuration says that these layers have no biases (attention_bias, mlp_bias): correct it, or take \
                the checkpoint that belongs to it"
            .to_owned();
    }
    if has("experts") || has("_exps") || has("gate_inp") {
        return probably("a mixture of experts");
    }
    if has("qweight") || has("scales") || has("absmax") || has("_scale") {
        return "it is quantised in a way that dibit does not read; get it in bf16, or as GGUF".to_owned();
    }
    probably("of another architecture")
}

/// Some of the names, and how many there are.
fn listed(names: &[&str]) -> String {
    let shown = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let text = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 1, "vocab_size": 10}"#;
        ModelConfig::parse(text, "config.json").unwrap()
    }

    fn judged(names: &[&str]) -> Option<String> {
        check(names.iter().copied(), &config()).err().map(|error| error.to_string())
    }

    #[test]
    fn what_would_have_changed_the_text_is_an_error() {
        for (name, words) in [
            ("model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
            ("base_model.model.model.layers.0.x", "merge_and_unload"),
            ("blk.0.attn_q.weight.lora_a", "merge_and_unload"),
            ("model.layers.0.self_attn.q_norm.weight", "probably a Qwen3"),
            ("blk.1.attn_k_norm.weight", "probably a Qwen3"),
            ("model.layers.1.self_attn.q_proj.bias", "attention_bias"),
            ("model.layers.1.mlp.experts.0.up_proj.weight", "mixture of experts"),
            ("model.layers.1.mlp.up_proj.weight_scale", "quantised"),
            ("model.layers.1.pre_feedforward_layernorm.weight", "another architecture"),
            ("model.layers.2.mlp.up_proj.weight", "num_hidden_layers 2"),
            ("lm_head.bias", "another architecture"),
            ("output_norm.bias", "another architecture"),
        ] {
            let message = judged(&[name]).unwrap_or_else(|| panic!("{name}"));
            assert!(message.contains(name) && message.contains(words), "{message}");
            assert!(message.contains("LlamaForCausalLM does not read"), "{message}");
        }
        let names: Vec<String> = (0..9).map(|i| format!("model.layers.1.self_attn.x{i}.weight")).collect();
        let message = judged(&names.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
        assert!(message.contains("x4.weight and 4 more"), "{message}");
    }

    #[test]
    fn what_is_computed_or_of_another_part_is_none() {
        for name in [
            "model.layers.0.self_attn.rotary_emb.inv_freq",
            "model.layers.7.self_attn.rotary_emb.inv_freq",
            "model.rotary_emb.inv_freq",
            "model.layers.0.attention.masked_bias",
            "rope_freqs.weight",
            "rope_factors_long.weight",
            "vision_tower.layers.0.weight",
        ] {
            assert_eq!(judged(&[name]), None, "{name}");
        }
    }

    #[test]
    fn other_prefixes_tell_what_a_checkpoint_is() {
        let name = "model.embed_tokens.weight";
        for (found, words) in [
            ("embed_tokens.weight", Some("saved as a base model")),
            ("language_model.model.embed_tokens.weight", Some("images and text")),
            ("model.language_model.embed_tokens.weight", Some("images and text")),
            ("_orig_mod.model.embed_tokens.weight", Some("begin with '_orig_mod.model.'")),
            ("base_model.model.model.embed_tokens.weight", Some("merge_and_unload")),
            ("transformer.wte.weight", None),
        ] {
            let message = explain_missing([found].into_iter(), name).map(|error| error.to_string());
            assert_eq!(message.is_some(), words.is_some(), "{found}: {message:?}");
            if let (Some(message), Some(words)) = (message, words) {
                assert!(message.contains(words) && message.contains(found) && message.contains(name), "{message}");
            }
        }
    }
}
