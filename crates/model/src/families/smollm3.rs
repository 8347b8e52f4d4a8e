//! SmolLM3 (Hugging Face): Llama with layers whose heads are not turned by their positions.

use super::Source;
use crate::json::{shown, whole};
use crate::{DecoderSpec, ModelError};
use serde_json::Value;

pub(super) const KEYS: [&str; 2] = ["no_rope_layer_interval", "no_rope_layers"];

/// Every layer of this number is not turned, where a configuration does not say.
const INTERVAL: usize = 4;

pub(super) fn spec(source: &Source) -> Result<DecoderSpec, ModelError> {
    let no_rope_layers = match source.value("no_rope_layers") {
        // 1, or true, for a layer that is turned.
        Some(list) => {
            let turned = |value: &Value| value.as_bool().or_else(|| whole(value).map(|number| number != 0));
            let turned: Option<Vec<bool>> = list.as_array().and_then(|own| own.iter().map(turned).collect());
            let suits = |own: &Vec<bool>| own.len() == source.num_hidden_layers;
            let turned = turned.filter(suits).ok_or_else(|| {
                let layers = source.num_hidden_layers;
                source.malformed(format!("no_rope_layers is {}, not 0 or 1 for each of {layers} layers", shown(list)))
            })?;
            turned.into_iter().map(|own| !own).collect()
        }
        None => {
            let interval = source.count("no_rope_layer_interval")?.unwrap_or(INTERVAL);
            (1..=source.num_hidden_layers).map(|layer| layer.is_multiple_of(interval)).collect()
        }
    };
    Ok(DecoderSpec { no_rope_layers, ..source.llama() })
}
