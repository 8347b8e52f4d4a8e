//! Which layers have a sliding window.

use super::Source;
use crate::json::shown;
use crate::{Architecture, DecoderSpec, ModelError};

const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// The first layer that has a window in a Qwen model, where a configuration does not say.
const FIRST_OF_QWEN: usize = 28;

/// Of how many layers of Gemma 3 one has no window, where a configuration does not say.
const PATTERN: usize = 6;

/// For each layer how many tokens a query sees, itself included; empty where all see all before them.
pub(super) fn windows(
    source: &Source,
    architecture: Architecture,
    spec: &DecoderSpec,
) -> Result<Vec<Option<usize>>, ModelError> {
    // What is null is none, and what is absent was implied.
    let context = source.count("max_position_embeddings")?.unwrap_or(usize::MAX);
    let window = source.count("sliding_window")?;
    let window = match architecture {
        // Layers with a window turn otherwise, though it may be no shorter than all.
        Architecture::Gemma3 => Some(window.unwrap_or(context).min(context)),
        _ => window.filter(|window| *window < context),
    };
    let layers = 0..source.num_hidden_layers;
    let switched = source.flag("use_sliding_window")?;
    let is_windowed: Vec<bool> = match kinds(source)? {
        Some(kinds) => kinds,
        None => match architecture {
            Architecture::Mistral | Architecture::Mixtral | Architecture::Phi3 | Architecture::Qwen3Moe => {
                vec![true; layers.len()]
            }
            Architecture::Qwen2 | Architecture::Qwen3 => {
                let first = match source.value("max_window_layers").and_then(serde_json::Value::as_u64) {
                    None => FIRST_OF_QWEN,
                    Some(first) => usize::try_from(first).unwrap_or(usize::MAX),
                };
                layers.map(|layer| layer >= first).collect()
            }
            Architecture::SmolLm3 => layers.map(|layer| !spec.has_rope(layer)).collect(),
            Architecture::Gemma2 | Architecture::GptOss => layers.map(|layer| layer.is_multiple_of(2)).collect(),
            Architecture::Gemma3 => {
                let pattern = source.count("sliding_window_pattern")?.unwrap_or(PATTERN);
                layers.map(|layer| !(layer + 1).is_multiple_of(pattern)).collect()
            }
            Architecture::Llama | Architecture::Granite | Architecture::Olmo2 => Vec::new(),
        },
    };
    // These have a switch, which is off where nothing is said.
    let has_switch = architecture.is_qwen() || architecture == Architecture::SmolLm3;
    let is_on = !has_switch || switched.unwrap_or(false);
    let all: Vec<Option<usize>> = is_windowed.into_iter().map(|own| window.filter(|_| own && is_on)).collect();
    Ok(if all.iter().all(Option::is_none) { Vec::new() } else { all })
}

/// Whether each layer has a window, where a configuration lists the kinds of layers.
fn kinds(source: &Source) -> Result<Option<Vec<bool>>, ModelError> {
    let Some(list) = source.value("layer_types") else { return Ok(None) };
    let names: Option<Vec<&str>> = list.as_array().and_then(|own| own.iter().map(|own| own.as_str()).collect());
    let names =
        names.ok_or_else(|| source.malformed(format!("layer_types is {}, not a list of names", shown(list))))?;
    if let Some(other) = names.iter().find(|name| ![FULL, SLIDING].contains(name)) {
        return Err(ModelError::Unsupported {
            what: format!("layer type '{other}'"),
            supported: format!("{FULL}, {SLIDING}"),
        });
    }
    if names.is_empty() {
        return Ok(None);
    }
    if names.len() != source.num_hidden_layers {
        let (found, layers) = (names.len(), source.num_hidden_layers);
        return Err(source.malformed(format!("layer_types has {found} kinds for {layers} layers")));
    }
    Ok(Some(names.iter().map(|name| *name == SLIDING).collect()))
}
