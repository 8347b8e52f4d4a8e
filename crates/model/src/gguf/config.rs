//! The configuration in a file's metadata, as a `config.json`.

use super::header::Content;
use super::metadata::Metadata;
use super::{families, rope};
use crate::{Architecture, ModelError};
use dibit_device::Bytes;
use serde_json::{Value, json};

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
        "phi3" => Ok(Architecture::Phi3),
        "olmo2" => Ok(Architecture::Olmo2),
        "granite" => Ok(Architecture::Granite),
        "smollm3" => Ok(Architecture::SmolLm3),
        "gpt-oss" => Ok(Architecture::GptOss),
        other => Err(ModelError::Unsupported {
            what: format!("GGUF architecture '{other}'"),
            supported: "llama, qwen2, qwen3, qwen3moe, gemma2, gemma3, phi3, olmo2, granite, smollm3, gpt-oss".into(),
        }),
    }
}

/// Architectures whose rows of query and key projections lie in pairs.
const WITH_PAIRS: [&str; 3] = ["llama", "granite", "smollm3"];

/// What a file calls its architecture.
///
/// # Errors
/// [`ModelError::Malformed`].
pub(crate) fn name(content: &Content, name: &str) -> Result<String, ModelError> {
    Settings::new(&Metadata::new(content, name)).map(|settings| settings.name.to_owned())
}

/// Query and KV heads of a file whose rows of query and key projections lie in pairs; `None` where they do not.
pub(crate) fn heads(content: &Content, name: &str) -> Result<Option<(usize, usize)>, ModelError> {
    let metadata = Metadata::new(content, name);
    let settings = Settings::new(&metadata)?;
    if !WITH_PAIRS.contains(&settings.name) {
        return Ok(None);
    }
    let query = settings.number("attention.head_count")?.unwrap_or(0);
    let key_value = settings.number("attention.head_count_kv")?.unwrap_or(query);
    if query == 0 || key_value == 0 {
        return Err(metadata.malformed(format!("{} is 0", settings.key("attention.head_count"))));
    }
    Ok(Some((query, key_value)))
}

/// The values whose keys begin with the name of a file's architecture.
pub(super) struct Settings<'a> {
    pub metadata: &'a Metadata<'a>,
    /// What the file calls its architecture.
    pub name: &'a str,
}

impl<'a> Settings<'a> {
    fn new(metadata: &'a Metadata<'a>) -> Result<Self, ModelError> {
        const KEY: &str = "general.architecture";
        let name = metadata.text(KEY)?.ok_or_else(|| metadata.missing(KEY))?;
        Ok(Settings { metadata, name })
    }

    pub fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    pub fn number(&self, part: &str) -> Result<Option<usize>, ModelError> {
        self.metadata.number(&self.key(part))
    }

    pub fn float(&self, part: &str) -> Result<Option<f64>, ModelError> {
        self.metadata.float(&self.key(part))
    }

    /// A number that must be there.
    pub fn needed(&self, part: &str) -> Result<usize, ModelError> {
        self.number(part)?.ok_or_else(|| self.metadata.missing(&self.key(part)))
    }

    /// The error for a value that is not followed.
    pub fn unsupported(&self, part: &str, value: impl std::fmt::Display, supported: &str) -> ModelError {
        unsupported(&format!("{} {value}", self.key(part)), supported)
    }
}

/// The `config.json` of a file.
///
/// # Errors
/// [`ModelError::Malformed`] and [`ModelError::Unsupported`].
pub(super) fn config(metadata: &Metadata, bytes: &Bytes) -> Result<Value, ModelError> {
    let settings = Settings::new(metadata)?;
    let experts = settings.number("expert_count")?.unwrap_or(0);
    let architecture = architecture(settings.name, experts)?;
    if metadata.text("general.type")? == Some("adapter") {
        return Err(unsupported("a GGUF file that is a LoRA adapter", "models: merge it with llama-export-lora first"));
    }
    if experts > 0 && !families::is_mixture(architecture) {
        let name = settings.name;
        return Err(unsupported(&format!("a mixture of experts of {name}"), "those of llama, qwen3moe and gpt-oss"));
    }
    check_unread(&settings, architecture)?;
    let tokens = metadata.texts("tokenizer.ggml.tokens")?.ok_or_else(|| metadata.missing("tokenizer.ggml.tokens"))?;
    let (hidden, heads) = (settings.needed("embedding_length")?, settings.needed("attention.head_count")?);
    let head_dim = settings.number("attention.key_length")?.unwrap_or_else(|| hidden.checked_div(heads).unwrap_or(0));
    let whole_head =
        |part: &str, value: usize| settings.unsupported(part, value, &format!("{head_dim}, the whole head"));
    if let Some(other) = settings.number("attention.value_length")?.filter(|other| *other != head_dim) {
        return Err(whole_head("attention.value_length", other));
    }
    let turned = settings.number("rope.dimension_count")?.filter(|turned| *turned != head_dim);
    if let Some(other) = turned.filter(|turned| !architecture.may_turn_in_part() || *turned > head_dim) {
        return Err(whole_head("rope.dimension_count", other));
    }
    let epsilon = settings.key("attention.layer_norm_rms_epsilon");
    let mut ends = Vec::new();
    for id in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        ends.extend(metadata.id(&format!("tokenizer.ggml.{id}"))?.filter(|end| !ends.contains(end)));
    }
    let mut config = json!({
        "architectures": [architecture.name()],
        "hidden_size": hidden,
        "intermediate_size": settings.needed("feed_forward_length")?,
        "num_hidden_layers": settings.needed("block_count")?,
        "num_attention_heads": heads,
        "num_key_value_heads": settings.number("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "vocab_size": tokens.len(),
        "max_position_embeddings": settings.needed("context_length")?,
        "rms_norm_eps": metadata.float(&epsilon)?.ok_or_else(|| metadata.missing(&epsilon))?,
        "tie_word_embeddings": metadata.tensor("output.weight").is_none(),
        "bos_token_id": metadata.id("tokenizer.ggml.bos_token_id")?,
        "eos_token_id": ends,
        "rope_parameters": rope::rope(&settings, bytes)?,
        "sliding_window": settings.number("attention.sliding_window")?.filter(|window| *window > 0),
        "use_sliding_window": true,
        "max_window_layers": 0,
    });
    if let Some(turned) = turned {
        // Half a channel more, so that rounding cannot make it one less.
        config["partial_rotary_factor"] = json!((turned as f64 + 0.5) / head_dim as f64);
    }
    families::add(&settings, architecture, &mut config)?;
    Ok(config)
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

fn check_unread(settings: &Settings, architecture: Architecture) -> Result<(), ModelError> {
    let read = families::keys(architecture);
    for (part, neutral) in UNREAD.into_iter().filter(|(part, _)| !read.contains(part)) {
        if let Some(value) = settings.float(part)?.filter(|value| *value != 0.0 && *value != neutral) {
            return Err(settings.unsupported(part, value, "models without it"));
        }
    }
    for (part, neutral) in [("attention.causal", true), ("use_parallel_residual", false)] {
        if settings.metadata.flag(&settings.key(part))?.is_some_and(|value| value != neutral) {
            return Err(settings.unsupported(part, !neutral, "models without it"));
        }
    }
    Ok(())
}

pub(super) fn unsupported(what: &str, supported: &str) -> ModelError {
    ModelError::Unsupported { what: what.to_owned(), supported: supported.to_owned() }
}
