//! From a `config.json` to what a family computes differently.

mod granite;
mod olmo2;
mod phi3;
mod qwen3;
mod smollm3;

use crate::head_places::HeadPlaces;
use crate::json::shown;
use crate::{Architecture, DecoderSpec, ModelError};
use serde_json::{Map, Value};

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
    match architecture {
        Architecture::Granite => granite::spec(&source),
        Architecture::Olmo2 => Ok(olmo2::spec(&source)),
        Architecture::Phi3 => Ok(phi3::spec(&source)),
        Architecture::Qwen3 => Ok(qwen3::spec(&source)),
        Architecture::SmolLm3 => smollm3::spec(&source),
        Architecture::Llama | Architecture::Mistral | Architecture::Qwen2 => Ok(source.llama()),
    }
}

/// Keys that the family reads and that would change another one's computation.
pub(crate) const fn keys(architecture: Architecture) -> &'static [&'static str] {
    match architecture {
        Architecture::Granite => &granite::KEYS,
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

    /// A factor, above 0; 1 where the configuration is silent.
    fn factor(&self, key: &str) -> Result<f32, ModelError> {
        let Some(value) = self.config.get(key).filter(|value| !value.is_null()) else { return Ok(1.0) };
        let number = value.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_normal());
        number.ok_or_else(|| self.malformed(format!("{key} is {}, not a positive number", shown(value))))
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
            (json!({"no_rope_layer_interval": 0}), "no_rope_layer_interval is 0"),
        ] {
            let message = of(changes).unwrap_err().to_string();
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
}
