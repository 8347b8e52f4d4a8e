//! What a model is known by.

use dibit_model::{Architecture, ModelConfig, Pretrained, Sketch};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// How far rotary frequencies of one model may lie apart: files round the numbers that they are computed from.
const SAME_FREQUENCY: f32 = 1e-4;

/// What a model is known by, whether a directory, the hub or a GGUF file has it, and in which format: its shape, and a
/// sketch of its weights that is compared with a tolerance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelKey {
    /// Family and sizes, in words.
    shape: String,
    /// Rotary frequencies.
    inv_freq: Vec<f32>,
    /// Of the weights.
    sketch: Sketch,
}

impl ModelKey {
    /// The key of a model.
    pub fn new(pretrained: &Pretrained) -> Self {
        let mut config = pretrained.config.clone();
        // Whatever contexts a run is for, it is the same model.
        config.set_context(config.max_position_embeddings);
        ModelKey { shape: shape(&config), inv_freq: config.inv_freq(), sketch: pretrained.weights.sketch.clone() }
    }

    /// A name for just these weights in just this format.
    pub fn name(&self) -> String {
        hash(&serde_json::to_string(self).expect("strings and numbers"))
    }

    /// A name that all models of this shape share.
    pub fn shape_name(&self) -> String {
        hash(&self.shape)
    }

    /// In what another model differs, in words; `None` for the same one.
    pub(crate) fn difference(&self, other: &ModelKey) -> Option<String> {
        if self.shape != other.shape {
            return Some(format!("{}, and this run has {}", self.shape, other.shape));
        }
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= SAME_FREQUENCY * a.abs();
        if self.inv_freq.len() != other.inv_freq.len() || !self.inv_freq.iter().zip(&other.inv_freq).all(close) {
            return Some("its rotary frequencies are not those of this run".to_owned());
        }
        let difference = self.sketch.difference(&other.sketch)?;
        Some(format!("its weights are not those of this run: {difference}"))
    }
}

fn shape(config: &ModelConfig) -> String {
    // GGUF files call both of them llama.
    let family = match config.architecture {
        Architecture::Mistral => Architecture::Llama,
        other => other,
    };
    format!(
        "{}, {} layers, hidden size {}, {} heads on {} KV heads of {}, intermediate size {}, vocabulary {}",
        family.name(),
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.intermediate_size,
        config.vocab_size
    )
}

/// The first 8 bytes of a SHA-256, in hexadecimal.
pub(crate) fn hash(text: &str) -> String {
    Sha256::digest(text).iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}
