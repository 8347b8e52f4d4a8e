//! `config.json` of Hugging Face checkpoints.

use crate::{ModelError, Rope};
use dibit_cache::{CacheLayout, CacheShape, Scheme, SchemeError};
use dibit_device::DType;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Head sizes, in words; [`supports_head_dim`] says it of one.
pub const SUPPORTED_HEAD_DIMS: &str = "multiples of 8 from 8 to 256";

/// Whether heads of so many channels are supported.
pub const fn supports_head_dim(head_dim: usize) -> bool {
    head_dim >= 8 && head_dim <= 256 && head_dim.is_multiple_of(8)
}

/// Decoder families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3, 3.1, 3.2.
    Llama,
    /// Mistral 7B from version 0.2 on.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: a norm on each head of q and k.
    Qwen3,
}

impl Architecture {
    const ALL: [Architecture; 4] =
        [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2, Architecture::Qwen3];

    /// The name in `architectures`.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// Whether q, k and v always have biases.
    pub const fn has_qkv_bias(self) -> bool {
        matches!(self, Architecture::Qwen2)
    }

    /// Whether heads of q and k are normalised.
    pub const fn has_qk_norm(self) -> bool {
        matches!(self, Architecture::Qwen3)
    }
}

/// A validated model configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Decoder family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated activation.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// KV heads.
    pub num_key_value_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Token ids.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square by norms.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Token that begins a text, if any.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Storage type that the configuration names, if any.
    pub dtype: Option<DType>,
    /// Standard deviation of fresh weights.
    pub initializer_range: f32,
}

/// One id, several, or none.
#[derive(Deserialize, Default)]
#[serde(untagged, expecting = "expected a token id, a list of token ids, or null")]
pub(crate) enum Ids {
    One(u32),
    Many(Vec<u32>),
    #[default]
    None,
}

impl Ids {
    pub(crate) fn into_vec(self) -> Vec<u32> {
        match self {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
            Ids::None => Vec::new(),
        }
    }
}

#[derive(Deserialize)]
struct RawConfig {
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    bos_token_id: Ids,
    #[serde(default)]
    eos_token_id: Ids,
    dtype: Option<String>,
    torch_dtype: Option<String>,
    #[serde(default = "default_initializer_range")]
    initializer_range: f32,
    #[serde(default = "default_hidden_act")]
    hidden_act: String,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    #[serde(default)]
    layer_types: Vec<String>,
    quantization_config: Option<Value>,
}

fn default_initializer_range() -> f32 {
    0.02
}

fn default_hidden_act() -> String {
    "silu".to_owned()
}

fn unsupported<T>(what: impl Into<String>, supported: impl Into<String>) -> Result<T, ModelError> {
    Err(ModelError::Unsupported { what: what.into(), supported: supported.into() })
}

impl ModelConfig {
    /// Reads the text of a `config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] where fields are missing or senseless, [`ModelError::Unsupported`] for what
    /// dibit does not do.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed { path: origin.to_owned(), reason };
        let object: Map<String, Value> = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        let architecture = architecture(&object, origin)?;
        let raw: RawConfig = serde_path_to_error::deserialize(Value::Object(object.clone()))
            .map_err(|error| malformed(error.to_string()))?;
        raw.check_supported(architecture)?;
        let num_key_value_heads = raw.num_key_value_heads.unwrap_or(raw.num_attention_heads);
        // Far above every model, and low enough for products of them to be computed.
        let sizes = [
            ("hidden_size", raw.hidden_size, 1 << 20),
            ("intermediate_size", raw.intermediate_size, 1 << 20),
            ("num_hidden_layers", raw.num_hidden_layers, 1 << 12),
            ("num_attention_heads", raw.num_attention_heads, 1 << 12),
            ("num_key_value_heads", num_key_value_heads, 1 << 12),
            ("vocab_size", raw.vocab_size, 1 << 24),
            ("max_position_embeddings", raw.max_position_embeddings, 1 << 27),
        ];
        if let Some((name, size, _)) = sizes.into_iter().find(|(_, size, most)| *size == 0 || size > most) {
            return Err(malformed(format!("{name} is {size}")));
        }
        if !raw.num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(malformed(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {num_key_value_heads}",
                raw.num_attention_heads
            )));
        }
        let head_dim = raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads);
        if !supports_head_dim(head_dim) {
            return unsupported(format!("head_dim {head_dim}"), SUPPORTED_HEAD_DIMS);
        }
        Ok(ModelConfig {
            architecture,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: raw.vocab_size,
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope: Rope::parse(&object, head_dim, origin)?,
            tie_word_embeddings: raw.tie_word_embeddings,
            bos_token_id: raw.bos_token_id.into_vec().first().copied(),
            eos_token_ids: raw.eos_token_id.into_vec(),
            dtype: raw.dtype.or(raw.torch_dtype).as_deref().and_then(parse_dtype),
            initializer_range: raw.initializer_range,
        })
    }

    /// The model's side of a cache.
    pub fn cache_shape(&self) -> CacheShape {
        CacheShape {
            num_layers: self.num_hidden_layers,
            num_key_value_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
        }
    }

    /// A scheme's cache for this model, with all that it needs to hold tokens.
    ///
    /// # Errors
    /// [`SchemeError`] where the scheme does not suit the model, or lacks its calibration.
    pub fn cache_layout(&self, scheme: &Scheme) -> Result<CacheLayout, SchemeError> {
        CacheLayout::new(scheme, self.cache_shape())?.with_tables(self.rope.inv_freq(self.head_dim))
    }

    /// Numbers in all weights.
    pub fn num_parameters(&self) -> usize {
        let q = self.num_attention_heads * self.head_dim;
        let kv = self.num_key_value_heads * self.head_dim;
        let biases = if self.architecture.has_qkv_bias() { q + 2 * kv } else { 0 };
        let norms = 2 * self.hidden_size + if self.architecture.has_qk_norm() { 2 * self.head_dim } else { 0 };
        let layer = 2 * self.hidden_size * (q + kv) + 3 * self.hidden_size * self.intermediate_size + biases + norms;
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        self.num_hidden_layers * layer + tables * self.vocab_size * self.hidden_size + self.hidden_size
    }
}

/// The name of a storage type as configurations spell it.
fn parse_dtype(name: &str) -> Option<DType> {
    match name.trim_start_matches("torch.") {
        "float32" => Some(DType::F32),
        "float16" => Some(DType::F16),
        "bfloat16" => Some(DType::Bf16),
        _ => None,
    }
}

fn architecture(object: &Map<String, Value>, origin: &str) -> Result<Architecture, ModelError> {
    let names: Vec<&str> = object
        .get("architectures")
        .and_then(Value::as_array)
        .map(|names| names.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default();
    if names.is_empty() {
        return Err(ModelError::Malformed { path: origin.to_owned(), reason: "it names no 'architectures'".into() });
    }
    let known = Architecture::ALL.into_iter().find(|known| names.contains(&known.name()));
    known.map_or_else(
        || {
            unsupported(
                format!("architecture {}", names.join(", ")),
                Architecture::ALL.map(Architecture::name).join(", "),
            )
        },
        Ok,
    )
}

impl RawConfig {
    fn check_supported(&self, architecture: Architecture) -> Result<(), ModelError> {
        if self.hidden_act != "silu" {
            return unsupported(format!("hidden_act '{}'", self.hidden_act), "silu");
        }
        if let Some(config) = &self.quantization_config {
            let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            return unsupported(format!("a checkpoint quantised by '{method}'"), "f32, f16 and bf16 weights");
        }
        // Mistral has no switch; the Qwen models use their window only where the switch is on.
        let in_use = self.use_sliding_window.unwrap_or(architecture == Architecture::Mistral);
        if let Some(window) = self.sliding_window.filter(|window| in_use && *window < self.max_position_embeddings) {
            return unsupported(format!("a sliding window of {window} tokens"), "full attention (sliding_window null)");
        }
        if let Some(other) = self.layer_types.iter().find(|kind| *kind != "full_attention") {
            return unsupported(format!("layer type '{other}'"), "full_attention");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn base() -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-5
        })
    }

    fn with(changes: Value) -> Result<ModelConfig, ModelError> {
        let mut config = base();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::parse(&config.to_string(), "config.json")
    }

    #[test]
    fn what_is_left_out_is_implied() {
        let config = with(json!({})).unwrap();
        assert_eq!((config.num_key_value_heads, config.head_dim, config.rope.theta), (2, 64, 10_000.0));
        assert!(!config.tie_word_embeddings && config.eos_token_ids.is_empty() && config.bos_token_id.is_none());
        let config =
            with(json!({"head_dim": 96, "eos_token_id": [1, 4], "bos_token_id": 7, "torch_dtype": "float16"})).unwrap();
        assert_eq!((config.head_dim, config.eos_token_ids, config.bos_token_id), (96, vec![1, 4], Some(7)));
        assert_eq!(config.dtype, Some(DType::F16));
    }

    #[test]
    fn windows_that_do_nothing_are_accepted() {
        let qwen = json!({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 100, "use_sliding_window": false});
        assert!(with(qwen).is_ok());
        assert!(with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": 512})).is_ok());
        assert!(with(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null})).is_ok());
    }

    #[test]
    fn what_is_not_supported_is_named_with_what_is() {
        let cases = [
            (
                json!({"architectures": ["GPT2LMHeadModel"]}),
                "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM",
            ),
            (json!({"architectures": ["MistralForCausalLM"], "sliding_window": 100}), "sliding window of 100 tokens"),
            (json!({"layer_types": ["sliding_attention"]}), "'sliding_attention'"),
            (json!({"hidden_act": "gelu"}), "hidden_act 'gelu'"),
            (json!({"head_dim": 76}), "multiples of 8 from 8 to 256"),
            (json!({"head_dim": 264}), "multiples of 8 from 8 to 256"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "quantised by 'gptq'"),
            (json!({"rope_scaling": {"rope_type": "longrope"}}), "longrope"),
        ];
        for (changes, expected) in cases {
            let message = with(changes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn senseless_configurations_are_malformed() {
        for changes in [
            json!({"hidden_size": 0}),
            json!({"num_key_value_heads": 0}),
            json!({"num_attention_heads": 4, "head_dim": 64, "num_key_value_heads": 3}),
            json!({"architectures": []}),
            json!({"vocab_size": "many"}),
            json!({"hidden_size": 4_000_000_000u64}),
        ] {
            assert!(matches!(with(changes.clone()), Err(ModelError::Malformed { .. })), "{changes}");
        }
        assert!(matches!(ModelConfig::parse("{", "config.json"), Err(ModelError::Malformed { .. })));
    }
}
