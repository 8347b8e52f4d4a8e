//! Gemma 2 and 3 (Google): norms before and behind both halves of a layer, whose weights are told from 1 on; an embedding that is
//! multiplied by the root of its width; layers with a sliding window between others. Gemma 2 caps logits, Gemma 3 has norms
//! of queries and keys, and another rope in layers with a window.

use super::Source;
use crate::{Architecture, DecoderSpec, ModelError, NormPlaces, QkNorm};
use dibit_device::Activation;
use serde_json::{Map, Value};

pub(super) const KEYS: [&str; 8] = [
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "use_bidirectional_attention",
];

/// What a configuration means that does not say it.
const QUERY_SCALAR: f32 = 256.0;
const CAPS_OF_GEMMA2: [f32; 2] = [50.0, 30.0];
const WINDOW_THETA: f64 = 1e4;

pub(super) fn spec(source: &Source, architecture: Architecture) -> Result<DecoderSpec, ModelError> {
    if source.flag("use_bidirectional_attention")? == Some(true) {
        return Err(ModelError::Unsupported {
            what: "use_bidirectional_attention true in the configuration".into(),
            supported: "models that generate text".into(),
        });
    }
    let activation = match source.value("hidden_activation").map(|own| own.as_str().unwrap_or_default()) {
        None | Some("gelu_pytorch_tanh") => Activation::GeluTanh,
        Some("gelu") => Activation::Gelu,
        Some(other) => {
            return Err(ModelError::Unsupported {
                what: format!("hidden_activation '{other}'"),
                supported: "gelu_pytorch_tanh, gelu".into(),
            });
        }
    };
    let width = source.count("hidden_size")?.unwrap_or(1);
    let is_gemma2 = architecture == Architecture::Gemma2;
    // A cap that is null is none, and one that is absent is Gemma 2's own.
    let cap = |key: &str, own: f32| match source.config.get(key) {
        None => Ok(is_gemma2.then_some(own)),
        Some(_) => source.positive(key),
    };
    Ok(DecoderSpec {
        embedding_multiplier: (width as f32).sqrt(),
        attention_multiplier: Some(source.positive("query_pre_attn_scalar")?.unwrap_or(QUERY_SCALAR).powf(-0.5)),
        attention_logit_softcap: cap("attn_logit_softcapping", CAPS_OF_GEMMA2[0])?,
        final_logit_softcap: cap("final_logit_softcapping", CAPS_OF_GEMMA2[1])?,
        norms: NormPlaces::Both,
        norm_offset: 1.0,
        qk_norm: if is_gemma2 { QkNorm::None } else { QkNorm::Head },
        activation,
        ..source.llama()
    })
}

/// Configurations of Gemma 3 with the rope of layers without a window, and of those with one, in the words of other families.
pub(super) fn ropes(config: &Map<String, Value>) -> [Map<String, Value>; 2] {
    let sets =
        ["full_attention", "sliding_attention"].map(|kind| config.get("rope_parameters").and_then(|all| all.get(kind)));
    let mut all = config.clone();
    // One set for all layers is read, or refused, as that of others.
    if sets.iter().any(Option::is_some) {
        all.remove("rope_parameters");
    }
    // Scaling is that of layers without a window.
    let mut window = all.clone();
    ["rope_scaling", "rope_parameters"].into_iter().for_each(|key| drop(window.remove(key)));
    let theta = config.get("rope_local_base_freq").cloned().unwrap_or_else(|| WINDOW_THETA.into());
    window.insert("rope_theta".into(), theta);
    for (config, set) in [&mut all, &mut window].into_iter().zip(sets) {
        if let Some(set) = set {
            config.insert("rope_parameters".into(), set.clone());
        }
    }
    [all, window]
}
