//! From a `config.json` to what a family computes differently.

mod gemma;
mod gpt_oss;
mod granite;
mod mixtral;
mod olmo2;
mod phi3;
mod qwen3;
mod qwen3_moe;
mod smollm3;
mod windows;

use crate::head_places::HeadPlaces;
use crate::json::{shown, whole};
use crate::{Architecture, DecoderSpec, ModelError, Rope};
use dibit_device::Routing;
use serde_json::{Map, Value};

/// Far above every model, and low enough for products of them to be computed.
const MOST_EXPERTS: usize = 1 << 12;
const MOST_WIDTH: usize = 1 << 20;

/// A configuration, and what it is called in errors.
struct Source<'a> {
    config: &'a Map<String, Value>,
    origin: &'a str,
    num_hidden_layers: usize,
    places: HeadPlaces,
}

/// What the configuration of a family says of it.
///
/// # Errors
/// [`ModelError::Malformed`] for senseless values.
pub(crate) fn spec(
    architecture: Architecture,
    config: &Map<String, Value>,
    num_hidden_layers: usize,
    places: HeadPlaces,
    origin: &str,
) -> Result<DecoderSpec, ModelError> {
    let source = Source { config, origin, num_hidden_layers, places };
    let spec = match architecture {
        Architecture::Gemma2 | Architecture::Gemma3 => gemma::spec(&source, architecture),
        Architecture::GptOss => gpt_oss::spec(&source),
        Architecture::Granite => granite::spec(&source),
        Architecture::Mixtral => mixtral::spec(&source),
        Architecture::Olmo2 => Ok(olmo2::spec(&source)),
        Architecture::Phi3 => Ok(phi3::spec(&source)),
        Architecture::Qwen3 => Ok(qwen3::spec(&source)),
        Architecture::Qwen3Moe => qwen3_moe::spec(&source),
        Architecture::SmolLm3 => smollm3::spec(&source),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => Ok(source.llama()),
    }?;
    Ok(DecoderSpec { windows: windows::windows(&source, architecture, &spec)?, ..spec })
}

/// The rotary position embedding, another one of layers with a window where these have it, and how many channels of a head
/// turn.
///
/// # Errors
/// Those of [`Rope::parse`].
pub(crate) fn ropes(
    architecture: Architecture,
    config: &Map<String, Value>,
    head_dim: usize,
    max_position_embeddings: usize,
    origin: &str,
) -> Result<(Rope, Option<Rope>, usize), ModelError> {
    let parse =
        |config: &Map<String, Value>| Rope::parse(config, architecture, head_dim, max_position_embeddings, origin);
    if architecture == Architecture::Gemma3 {
        let [all, window] = gemma::ropes(config);
        let ((all, rotary), (window, _)) = (parse(&all)?, parse(&window)?);
        return Ok((all, Some(window), rotary));
    }
    parse(config).map(|(rope, rotary)| (rope, None, rotary))
}

/// Keys that the family reads and that would change another one's computation.
pub(crate) const fn keys(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Gemma2 | Architecture::Gemma3 => &gemma::KEYS,
        Architecture::GptOss => &gpt_oss::KEYS,
        Architecture::Granite => &granite::KEYS,
        Architecture::Mixtral => &mixtral::KEYS,
        Architecture::Qwen3Moe => &qwen3_moe::KEYS,
        Architecture::SmolLm3 => &smollm3::KEYS,
        _ => &[],
    }
}

impl Source<'_> {
    /// What Llama computes.
    fn llama(&self) -> DecoderSpec {
        DecoderSpec::new(self.places)
    }

    fn malformed(&self, reason: String) -> ModelError {
        ModelError::Malformed { path: self.origin.to_owned(), reason }
    }

    /// A value that is not null.
    fn value(&self, key: &str) -> Option<&Value> {
        self.config.get(key).filter(|value| !value.is_null())
    }

    /// A factor, above 0; 1 where the configuration is silent.
    fn factor(&self, key: &str) -> Result<f32, ModelError> {
        Ok(self.positive(key)?.unwrap_or(1.0))
    }

    /// A number above 0.
    fn positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = value.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_normal());
        match number {
            None => Err(self.malformed(format!("{key} is {}, not a positive number", shown(value)))),
            number => Ok(number),
        }
    }

    /// A number of things, above 0.
    fn count(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = whole(value).and_then(|own| usize::try_from(own).ok()).filter(|own| *own > 0);
        match number {
            None => Err(self.malformed(format!("{key} is {}, not a number of 1 or more", shown(value)))),
            number => Ok(number),
        }
    }

    /// The width of an expert, or what the family has where a configuration does not say.
    fn width(&self, key: &str, own: Option<usize>) -> Result<usize, ModelError> {
        let width = self.count(key)?.or(own).ok_or_else(|| self.malformed(format!("it has no {key}")))?;
        if width > MOST_WIDTH { Err(self.malformed(format!("{key} is {width}"))) } else { Ok(width) }
    }

    /// How experts are chosen, of which there are as many as a key says.
    fn routing(&self, experts: &str, normalised: bool, own: [usize; 2]) -> Result<Routing, ModelError> {
        const CHOSEN: &str = "num_experts_per_tok";
        let count = self.count(experts)?.unwrap_or(own[0]);
        let chosen = self.count(CHOSEN)?.unwrap_or(own[1]);
        if count > MOST_EXPERTS || chosen > count {
            let reason = format!("{CHOSEN} is {chosen} and {experts} {count}, of at most {MOST_EXPERTS}");
            return Err(self.malformed(reason));
        }
        Ok(Routing { experts: count, chosen, normalised })
    }

    /// A switch.
    fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(*on)),
            Some(other) => Err(self.malformed(format!("{key} is {}, not true or false", shown(other)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{ModelConfig, ModelError};
    use serde_json::{Value, json};

    fn with(changes: Value) -> Result<ModelConfig, ModelError> {
        let mut config = json!({"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 5,
            "num_attention_heads": 2, "vocab_size": 100, "max_position_embeddings": 512});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        ModelConfig::parse(&config.to_string(), "config.json")
    }

    #[test]
    fn layers_without_rotary_positions_are_listed_or_counted() {
        let of = |changes: Value| {
            let mut config = json!({"architectures": ["SmolLM3ForCausalLM"]});
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            with(config).map(|config| (0..5).map(|layer| config.spec.has_rope(layer)).collect::<Vec<bool>>())
        };
        assert_eq!(of(json!({})).unwrap(), [true, true, true, false, true]);
        assert_eq!(of(json!({"no_rope_layer_interval": 2})).unwrap(), [true, false, true, false, true]);
        assert_eq!(of(json!({"no_rope_layers": [1, 0, 0, 1, 1]})).unwrap(), [true, false, false, true, true]);
        for (changes, expected) in [
            (json!({"no_rope_layers": [1, 0]}), "not 0 or 1 for each of 5 layers"),
            (json!({"no_rope_layer_interval": 0}), "no_rope_layer_interval is 0, not a number of 1"),
        ] {
            let message = of(changes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    fn windows(name: &str, changes: Value) -> Result<Vec<Option<usize>>, ModelError> {
        let mut config = json!({"architectures": [name], "sliding_window": 100});
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        with(config).map(|config| (0..5).map(|layer| config.spec.window(layer)).collect())
    }

    #[test]
    fn layers_with_a_window_are_those_of_the_family_or_the_list() {
        let of = |layers: [usize; 5]| layers.map(|own| (own > 0).then_some(100)).to_vec();
        let none = of([0; 5]);
        let qwen = |first: usize| json!({"use_sliding_window": true, "max_window_layers": first});
        let listed = json!({"layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention",
            "sliding_attention"], "use_sliding_window": true});
        for (name, changes, expected) in [
            ("MistralForCausalLM", json!({}), of([1; 5])),
            ("MistralForCausalLM", json!({"sliding_window": null}), none.clone()),
            // No longer than what a query sees anyway.
            ("MistralForCausalLM", json!({"sliding_window": 512}), none.clone()),
            ("LlamaForCausalLM", json!({}), none.clone()),
            ("Qwen2ForCausalLM", json!({"max_window_layers": 0}), none.clone()),
            ("Qwen2ForCausalLM", qwen(2), of([0, 0, 1, 1, 1])),
            ("Qwen3ForCausalLM", json!({"use_sliding_window": true}), none),
            ("Qwen3ForCausalLM", listed.clone(), of([0, 1, 0, 0, 1])),
            ("SmolLM3ForCausalLM", json!({"use_sliding_window": true}), of([0, 0, 0, 1, 0])),
            ("Gemma2ForCausalLM", json!({}), of([1, 0, 1, 0, 1])),
            ("Gemma3ForCausalLM", json!({"sliding_window_pattern": 3}), of([1, 1, 0, 1, 1])),
            ("Phi3ForCausalLM", json!({}), of([1; 5])),
        ] {
            assert_eq!(windows(name, changes.clone()).unwrap(), expected, "{name} {changes}");
        }
        // Where Mistral is silent of its window, it has one.
        let silent = json!({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192});
        assert_eq!(with(silent).unwrap().spec.window(0), Some(4096));
        let message = windows("MistralForCausalLM", json!({"sliding_window": 0})).unwrap_err().to_string();
        assert!(message.contains("sliding_window is 0, not a number of 1 or more"), "{message}");
    }

    #[test]
    fn gemma_caps_and_turns_as_its_configuration_says() {
        let gemma = |number: u8, changes: Value| {
            let mut config = json!({"architectures": [format!("Gemma{number}ForCausalLM")]});
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            with(config)
        };
        let caps = |config: ModelConfig| (config.spec.attention_logit_softcap, config.spec.final_logit_softcap);
        assert_eq!(caps(gemma(2, json!({})).unwrap()), (Some(50.0), Some(30.0)));
        assert_eq!(caps(gemma(2, json!({"attn_logit_softcapping": null})).unwrap()), (None, Some(30.0)));
        assert_eq!(caps(gemma(3, json!({})).unwrap()), (None, None));
        let old = gemma(3, json!({"rope_scaling": {"rope_type": "linear", "factor": 8}})).unwrap();
        let new = json!({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
        assert_eq!(old, gemma(3, new).unwrap());
        // One set for all layers is that of layers without a window.
        let flat = json!({"rope_parameters": {"rope_type": "linear", "factor": 8, "rope_theta": 1e6}});
        assert_eq!(gemma(3, flat).unwrap(), old);
        assert!(gemma(3, json!({"rope_parameters": 3})).is_err());
        // A window that is no shorter than the context still says how a layer turns.
        assert_eq!(gemma(3, json!({"sliding_window": null})).unwrap().spec.window(0), Some(512));
        let window = old.spec.window_rope.unwrap();
        assert_eq!((old.rope.theta, window.theta, window.inv_freq(4)), (1e6, 1e4, vec![1.0, 0.01]));
        for (changes, expected) in [
            (json!({"hidden_activation": "relu"}), "hidden_activation 'relu' is not supported"),
            (json!({"query_pre_attn_scalar": -1}), "query_pre_attn_scalar is -1"),
            (json!({"use_bidirectional_attention": true}), "use_bidirectional_attention true"),
        ] {
            let message = gemma(3, changes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn factors_are_those_of_the_configuration_or_one() {
        let granite = |changes: Value| {
            let mut config = json!({"architectures": ["GraniteForCausalLM"]});
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            with(config).map(|config| config.spec)
        };
        let all = granite(json!({"embedding_multiplier": 6, "attention_multiplier": 0.5, "residual_multiplier": 0.25,
            "logits_scaling": 3}))
        .unwrap();
        assert_eq!((all.embedding_multiplier, all.residual_multiplier, all.logits_scaling), (6.0, 0.25, 3.0));
        assert_eq!(
            (all.attention_multiplier, granite(json!({})).unwrap().attention_multiplier),
            (Some(0.5), Some(1.0))
        );
        let message = granite(json!({"residual_multiplier": 0})).unwrap_err().to_string();
        assert!(message.contains("residual_multiplier is 0, not a positive number"), "{message}");
    }

    #[test]
    fn experts_are_those_of_the_configuration_or_the_family() {
        let of = |name: &str, changes: Value| {
            let mut config = json!({"architectures": [name]});
            config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            with(config)
        };
        let qwen = of(
            "Qwen3MoeForCausalLM",
            json!({"mlp_only_layers": [2], "norm_topk_prob": true, "num_experts": 6,
            "num_experts_per_tok": 3, "moe_intermediate_size": 40}),
        )
        .unwrap();
        let own = qwen.spec.experts_of(0).unwrap();
        assert_eq!((own.routing.experts, own.routing.chosen, own.routing.normalised), (6, 3, true));
        assert_eq!((own.intermediate_size, qwen.spec.experts_of(2).is_none()), (40, true));
        let sparse = of("Qwen3MoeForCausalLM", json!({"decoder_sparse_step": 2})).unwrap();
        assert_eq!(
            (0..4).map(|layer| sparse.spec.experts_of(layer).is_some()).collect::<Vec<_>>(),
            [false, true, false, true]
        );
        let mixtral = of("MixtralForCausalLM", json!({})).unwrap();
        assert_eq!(
            mixtral.spec.experts_of(4).unwrap().routing,
            dibit_device::Routing { experts: 8, chosen: 2, normalised: true }
        );
        let oss = of("GptOssForCausalLM", json!({"quantization_config": {"quant_method": "mxfp4"}})).unwrap();
        assert!(
            oss.spec.attention_sinks && matches!(oss.rope.scaling, crate::RopeScaling::Yarn { truncate: false, .. })
        );
        assert_eq!((oss.spec.window(0), oss.spec.window(1)), (Some(128), None));
        for (name, changes, expected) in [
            (
                "MixtralForCausalLM",
                json!({"num_experts_per_tok": 9}),
                "num_experts_per_tok is 9 and num_local_experts 8",
            ),
            ("Qwen3MoeForCausalLM", json!({"mlp_only_layers": "none"}), "mlp_only_layers is \"none\""),
            ("GptOssForCausalLM", json!({"swiglu_alpha": 1.5}), "swiglu_alpha 1.5"),
            ("LlamaForCausalLM", json!({"quantization_config": {"quant_method": "mxfp4"}}), "quantised by 'mxfp4'"),
        ] {
            let message = of(name, changes).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
