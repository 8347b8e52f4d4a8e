//! `config.json` of Hugging Face checkpoints.

use crate::head_places::HeadPlaces;
use crate::json::{ids, shown, whole};
use crate::unread_keys::{self, WHOLE};
use crate::{Architecture, DecoderSpec, ModelError, NormPlaces, QkNorm, Rope, families};
use dibit_cache::{CacheLayout, CacheModel, CacheShape, CalibratedScheme, SchemeError};
use dibit_device::DType;
use serde::Deserialize;
use serde_json::{Map, Value};

/// Sizes of heads as they are computed, in words; [`supports_head_dim`] says it of one. Checkpoints may have other even
/// numbers, which are filled up.
pub const SUPPORTED_HEAD_DIMS: &str = "multiples of 8 from 8 to 256";

/// Whether heads of so many channels can be computed.
pub const fn supports_head_dim(head_dim: usize) -> bool {
    head_dim >= 8 && head_dim <= 256 && head_dim.is_multiple_of(8)
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
    /// Channels of a head as it is computed: a multiple of 8, to which zeros fill up what a checkpoint has.
    pub head_dim: usize,
    /// Token ids.
    pub vocab_size: usize,
    /// Longest context in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square by norms.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// What the family computes differently.
    pub spec: DecoderSpec,
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
    /// Whether projections of attention have biases; `None` where only the checkpoint tells.
    pub(crate) attention_bias: Option<bool>,
    /// Whether projections of the gated activation have biases; `None` where only the checkpoint tells.
    pub(crate) mlp_bias: Option<bool>,
}

/// The window where a configuration does not say.
const WINDOW: usize = 4096;

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
    bos_token_id: Value,
    #[serde(default)]
    eos_token_id: Value,
    dtype: Option<Value>,
    torch_dtype: Option<Value>,
    #[serde(default = "default_initializer_range")]
    initializer_range: f32,
    #[serde(default = "default_hidden_act")]
    hidden_act: String,
    quantization_config: Option<Value>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
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
    /// Reads the text of a `config.json`; `origin` names it in errors. Null is as absent, and what is absent is as in
    /// transformers 5.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] where fields are missing or senseless, [`ModelError::Unsupported`] for what
    /// dibit does not do.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed { path: origin.to_owned(), reason };
        let mut object: Map<String, Value> =
            serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        let architecture = architecture(&object, origin)?;
        unread_keys::check(&object, architecture)?;
        unread_keys::note(&object, architecture, origin);
        normalise(&mut object, architecture);
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
        let ids = |key: &str, value: &Value| {
            let wrong = || format!("{key} is {}, not a token id, a list of token ids, or null", shown(value));
            ids(value).ok_or_else(|| malformed(wrong()))
        };
        for (name, number) in [("rms_norm_eps", raw.rms_norm_eps), ("initializer_range", raw.initializer_range)] {
            if !number.is_finite() || number < 0.0 {
                return Err(malformed(format!("{name} is {number}")));
            }
        }
        if let Some((name, size, _)) = sizes.into_iter().find(|(_, size, most)| *size == 0 || size > most) {
            return Err(malformed(format!("{name} is {size}")));
        }
        if !raw.num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(malformed(format!(
                "num_attention_heads {} is not a multiple of num_key_value_heads {num_key_value_heads}",
                raw.num_attention_heads
            )));
        }
        let stored = raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads);
        if !stored.is_multiple_of(2) || !supports_head_dim(stored.next_multiple_of(8)) || stored < 8 {
            return unsupported(format!("head_dim {stored}"), "even numbers from 8 to 256");
        }
        let (rope, window_rope, rotary) =
            families::ropes(architecture, &object, stored, raw.max_position_embeddings, origin)?;
        let places = HeadPlaces { stored, rotary };
        let spec = families::spec(architecture, &object, raw.num_hidden_layers, places, origin)?;
        if spec.qk_norm != QkNorm::None && places.head_dim() != stored {
            return unsupported(format!("head_dim {stored} with norms of queries and keys"), SUPPORTED_HEAD_DIMS);
        }
        Ok(ModelConfig {
            architecture,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_hidden_layers: raw.num_hidden_layers,
            num_attention_heads: raw.num_attention_heads,
            num_key_value_heads,
            head_dim: places.head_dim(),
            vocab_size: raw.vocab_size,
            max_position_embeddings: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope,
            spec: DecoderSpec { window_rope, ..spec },
            tie_word_embeddings: raw.tie_word_embeddings,
            bos_token_id: ids("bos_token_id", &raw.bos_token_id)?.first().copied(),
            eos_token_ids: ids("eos_token_id", &raw.eos_token_id)?,
            dtype: raw.dtype.or(raw.torch_dtype).as_ref().and_then(Value::as_str).and_then(parse_dtype),
            initializer_range: raw.initializer_range,
            attention_bias: raw.attention_bias.filter(|_| architecture.may_have_attention_bias()),
            mlp_bias: raw.mlp_bias.filter(|_| architecture.may_have_mlp_bias()),
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

    /// Rotary frequencies of the pairs of channels of a head, `head_dim / 2`: 0 for those that do not turn.
    pub fn inv_freq(&self) -> Vec<f32> {
        self.spec.inv_freq(&self.rope)
    }

    /// Chooses what a model does for contexts of so many tokens: longrope has frequencies for short and for long ones.
    pub fn set_context(&mut self, tokens: usize) {
        self.rope.set_context(tokens);
    }

    /// What a cache needs to know of the model, whose plain weights leave transforms of values to it.
    pub fn cache_model(&self) -> CacheModel {
        CacheModel {
            turns_alike: self.spec.turns_alike(self.num_hidden_layers),
            spans: self.spec.windows.clone(),
            ..CacheModel::new(self.cache_shape(), self.inv_freq())
        }
    }

    /// A scheme's cache for this model. It takes values as plain weights compute them, and transforms them itself;
    /// [`crate::Weights::cache_layout`] leaves that to the weights where it can.
    ///
    /// # Errors
    /// [`SchemeError`] where the scheme does not suit the model, or lacks its calibration.
    pub fn cache_layout(&self, scheme: &CalibratedScheme) -> Result<CacheLayout, SchemeError> {
        scheme.layout(&self.cache_model())
    }

    /// Numbers in all weights.
    pub fn num_parameters(&self) -> usize {
        let head_dim = self.spec.places.stored;
        let q = self.num_attention_heads * head_dim;
        let kv = self.num_key_value_heads * head_dim;
        let biases = if self.architecture.has_qkv_bias() { q + 2 * kv } else { 0 };
        let qk_norms = match self.spec.qk_norm {
            QkNorm::None => 0,
            QkNorm::Head => 2 * head_dim,
            QkNorm::Row => q + kv,
        };
        let places = if self.spec.norms == NormPlaces::Both { 4 } else { 2 };
        let norms = places * self.hidden_size + qk_norms;
        let attention = 2 * self.hidden_size * (q + kv) + biases + norms;
        let gated = |inner: usize| 3 * self.hidden_size * inner;
        let mlp = |layer: usize| match self.spec.experts_of(layer) {
            None => gated(self.intermediate_size),
            Some(own) => own.routing.experts * (gated(own.intermediate_size) + self.hidden_size),
        };
        let add = |sum: usize, layer: usize| sum.saturating_add(attention + mlp(layer));
        let layers = (0..self.num_hidden_layers).fold(0, add);
        let tables = if self.tie_word_embeddings { 1 } else { 2 };
        layers.saturating_add(tables * self.vocab_size * self.hidden_size + self.hidden_size)
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

/// Takes nulls out, writes whole numbers as such, and says what the family has where the configuration is silent.
fn normalise(config: &mut Map<String, Value>, architecture: Architecture) {
    // A window, or a cap, that is null is none, and not what the family has where the key is absent.
    let none = ["sliding_window", "attn_logit_softcapping", "final_logit_softcapping"];
    config.retain(|key, value| !value.is_null() || none.contains(&key.as_str()));
    for (key, value) in config.iter_mut().filter(|(key, _)| WHOLE.contains(&key.as_str())) {
        if let Some(number) = whole(value).filter(|_| value.is_f64()) {
            tracing::debug!("{key} is {value}, read as {number}");
            *value = number.into();
        }
    }
    let config_has_rope = ["rope_parameters", "rope_scaling"].into_iter().any(|key| config.contains_key(key));
    let mut imply = |key: &str, value: Value| {
        config.entry(key).or_insert(value);
    };
    imply("max_position_embeddings", architecture.default_context().into());
    imply("rms_norm_eps", architecture.default_rms_norm_eps().into());
    if architecture == Architecture::Qwen3 {
        imply("head_dim", 128.into());
    }
    if architecture.is_gemma() {
        imply("head_dim", 256.into());
        imply("tie_word_embeddings", true.into());
    }
    if architecture == Architecture::GptOss {
        imply("head_dim", 64.into());
        imply("sliding_window", 128.into());
        imply("attention_bias", true.into());
        if !config_has_rope {
            imply("rope_parameters", gpt_oss_rope());
        }
    }
    if architecture == Architecture::Phi3 {
        imply("original_max_position_embeddings", 4096.into());
    }
    if architecture.implies_window() {
        imply("sliding_window", WINDOW.into());
    }
    imply("rope_theta", architecture.default_rope_theta().into());
}

/// The rope of gpt-oss where a configuration has none.
fn gpt_oss_rope() -> Value {
    serde_json::json!({"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
        "original_max_position_embeddings": 4096})
}

impl RawConfig {
    fn check_supported(&self, architecture: Architecture) -> Result<(), ModelError> {
        // Two names of one function. Gemma has an activation of its own under another key.
        if !architecture.is_gemma() && !["silu", "swish"].contains(&self.hidden_act.as_str()) {
            return unsupported(format!("hidden_act '{}'", self.hidden_act), "silu");
        }
        // gpt-oss comes with experts in MXFP4, which are widened.
        let is_mxfp4 = |config: &Value| config.get("quant_method").and_then(Value::as_str) == Some("mxfp4");
        let own = self.quantization_config.as_ref();
        if let Some(config) = own.filter(|config| !(architecture == Architecture::GptOss && is_mxfp4(config))) {
            let method = config.get("quant_method").and_then(Value::as_str).unwrap_or("unknown");
            return unsupported(format!("a checkpoint quantised by '{method}'"), "f32, f16 and bf16 weights");
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
    fn null_is_as_absent() {
        for architecture in Architecture::ALL {
            let mut required = base();
            required["architectures"] = json!([architecture.name()]);
            required["head_dim"] = json!(64);
            let keys = [
                "attention_bias",
                "bos_token_id",
                "dtype",
                "eos_token_id",
                "head_dim",
                "hidden_act",
                "initializer_range",
                "layer_types",
                "max_position_embeddings",
                "max_window_layers",
                "mlp_bias",
                "num_key_value_heads",
                "original_max_position_embeddings",
                "partial_rotary_factor",
                "quantization_config",
                "rms_norm_eps",
                "rope_parameters",
                "rope_scaling",
                "rope_theta",
                "tie_word_embeddings",
                "torch_dtype",
                "use_sliding_window",
            ];
            // Where Mistral is silent of its window, it has one.
            required["sliding_window"] = Value::Null;
            for key in keys {
                let parse = |config: &Value| ModelConfig::parse(&config.to_string(), "config.json");
                let (mut absent, mut null) = (required.clone(), required.clone());
                absent.as_object_mut().unwrap().remove(key);
                null[key] = Value::Null;
                assert_eq!(parse(&null).unwrap(), parse(&absent).unwrap(), "{key} of {architecture:?}");
            }
        }
    }

    #[test]
    fn what_a_family_has_without_a_word_is_as_in_transformers() {
        let silent = |name: &str| {
            let config = json!({"architectures": [name], "hidden_size": 128, "intermediate_size": 256,
                "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100, "sliding_window": null});
            ModelConfig::parse(&config.to_string(), "config.json").unwrap()
        };
        for (name, context, head_dim) in [
            ("LlamaForCausalLM", 2048, 64),
            ("MistralForCausalLM", 131_072, 64),
            ("Qwen2ForCausalLM", 32_768, 64),
            ("Qwen3ForCausalLM", 32_768, 128),
        ] {
            let config = silent(name);
            assert_eq!(
                (config.max_position_embeddings, config.head_dim, config.rms_norm_eps),
                (context, head_dim, 1e-6)
            );
        }
    }

    #[test]
    fn numbers_are_read_however_they_are_spelled() {
        let spelled = with(json!({"hidden_size": 128.0, "vocab_size": 100.0, "rope_theta": 10000, "eos_token_id": 2.0,
            "bos_token_id": -1, "rms_norm_eps": 1, "hidden_act": "swish"}))
        .unwrap();
        let plain = with(json!({"eos_token_id": 2, "rms_norm_eps": 1.0})).unwrap();
        assert_eq!(spelled, plain);
    }

    #[test]
    fn what_is_not_supported_is_named_with_what_is() {
        let cases = [
            (
                json!({"architectures": ["GPT2LMHeadModel"]}),
                "GPT2LMHeadModel is not supported; supported: LlamaForCausalLM",
            ),
            (json!({"layer_types": ["sliding_attention", "linear_attention"]}), "layer type 'linear_attention'"),
            (json!({"layer_types": ["full_attention"]}), "layer_types has 1 kinds for 2 layers"),
            (json!({"hidden_act": "gelu"}), "hidden_act 'gelu'"),
            (json!({"head_dim": 75}), "even numbers from 8 to 256"),
            (
                json!({"architectures": ["Qwen3ForCausalLM"], "head_dim": 100}),
                "head_dim 100 with norms of queries and keys",
            ),
            (json!({"head_dim": 264}), "even numbers from 8 to 256"),
            (json!({"quantization_config": {"quant_method": "gptq"}}), "quantised by 'gptq'"),
            (json!({"rope_scaling": {"rope_type": "mrope"}}), "mrope"),
            (json!({"residual_multiplier": 0.22}), "residual_multiplier 0.22"),
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
            json!({"hidden_size": 128.5}),
            json!({"rms_norm_eps": -1e-6}),
            json!({"rms_norm_eps": 1e300}),
            json!({"eos_token_id": "</s>"}),
            json!({"bos_token_id": -2}),
            json!({"rope_scaling": "linear"}),
            json!({"rope_scaling": {"factor": 2.0}}),
        ] {
            assert!(matches!(with(changes.clone()), Err(ModelError::Malformed { .. })), "{changes}");
        }
        assert!(matches!(ModelConfig::parse("{", "config.json"), Err(ModelError::Malformed { .. })));
    }
}
