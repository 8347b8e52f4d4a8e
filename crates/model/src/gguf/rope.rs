//! The rotary position embedding in a file's metadata and tensors, as `rope_parameters`.

use super::config::{Settings, unsupported};
use super::header::TensorInfo;
use crate::ModelError;
use crate::checkpoint::Format;
use dibit_device::{Bytes, DType, Tensor};
use serde_json::{Map, Value, json};

const DIVISORS: &str = "rope_freqs.weight";
const LONG: &str = "rope_factors_long.weight";
const SHORT: &str = "rope_factors_short.weight";

/// Tensors that a file's configuration holds.
pub(crate) const TENSORS: [&str; 3] = [DIVISORS, LONG, SHORT];

/// # Errors
/// [`ModelError::Malformed`] and [`ModelError::Unsupported`].
pub(super) fn rope(settings: &Settings, bytes: &Bytes) -> Result<Value, ModelError> {
    let metadata = settings.metadata;
    let scaling = |part: &str| format!("rope.scaling.{part}");
    let mut rope = Map::new();
    rope.insert("rope_theta".into(), json!(settings.float("rope.freq_base")?.unwrap_or(10_000.0)));
    // As llama.cpp reads it: a factor without a type is linear, 0 is no factor, and "none" scales nothing.
    let factor = match settings.float(&scaling("factor"))? {
        None => settings.float("rope.scale_linear")?,
        factor => factor,
    };
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    let tensors = [SHORT, LONG].map(|name| metadata.tensor(name));
    let kind = match metadata.text(&settings.key(&scaling("type")))? {
        // Files of Phi-3 do not name it.
        None | Some("longrope") if tensors.iter().any(Option::is_some) => "longrope",
        Some("none") => "default",
        None | Some("linear") if factor == 1.0 => "default",
        None => "linear",
        Some(kind) => kind,
    };
    let is_read = matches!(kind, "default" | "linear" | "yarn");
    let neutral = [("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_log_multiplier", 0.0)];
    for (part, neutral) in neutral.map(|(part, neutral)| (scaling(part), neutral)) {
        if let Some(other) = settings.float(&part)?.filter(|other| is_read && *other != neutral) {
            return Err(settings.unsupported(&part, other, "rope scaling without it"));
        }
    }
    rope.insert("rope_type".into(), json!(kind));
    let original = "original_max_position_embeddings";
    if kind == "yarn" {
        rope.insert(original.into(), json!(settings.number(&scaling("original_context_length"))?));
        for part in ["beta_fast", "beta_slow"] {
            rope.insert(part.into(), json!(settings.float(&scaling(&format!("yarn_{part}")))?));
        }
    }
    if kind == "longrope" {
        let [Some(short), Some(long)] = tensors else {
            return Err(metadata.malformed(format!(
                "its rope scaling is longrope, which needs the tensors '{SHORT}' and '{LONG}'; convert the model again"
            )));
        };
        rope.insert(original.into(), json!(settings.needed(&scaling("original_context_length"))?));
        rope.insert("attention_factor".into(), json!(settings.float(&scaling("attn_factor"))?));
        rope.insert("short_factor".into(), json!(vector(settings, bytes, SHORT, short)?));
        rope.insert("long_factor".into(), json!(vector(settings, bytes, LONG, long)?));
    } else if tensors.iter().any(Option::is_some) {
        return Err(unsupported(&format!("'{LONG}' and '{SHORT}' beside rope scaling '{kind}'"), "them with longrope"));
    }
    match metadata.tensor(DIVISORS) {
        None if kind != "longrope" => drop(rope.insert("factor".into(), json!(factor))),
        None => {}
        Some(tensor) if kind == "default" => {
            rope.insert("rope_type".into(), json!("divisors"));
            rope.insert("divisors".into(), json!(vector(settings, bytes, DIVISORS, tensor)?));
        }
        Some(_) => {
            let found = format!("'{DIVISORS}' beside rope scaling '{kind}'");
            return Err(unsupported(&found, &format!("{DIVISORS} without other scaling")));
        }
    }
    Ok(rope.into())
}

/// The numbers of a vector.
fn vector(settings: &Settings, bytes: &Bytes, name: &str, tensor: &TensorInfo) -> Result<Vec<f32>, ModelError> {
    let metadata = settings.metadata;
    let (Format::Numbers(DType::F32), [numbers]) = (&tensor.format, &tensor.shape[..]) else {
        let found = format!("'{name}' of {} and shape {:?}", tensor.format.name(), tensor.shape);
        return Err(unsupported(&found, "a vector of F32; convert the model again"));
    };
    let vector = Tensor::from_bytes(bytes, metadata.place(tensor), DType::F32, 1, *numbers);
    Ok(vector.map_err(|error| metadata.malformed(format!("'{name}': {error}")))?.to_f32())
}
