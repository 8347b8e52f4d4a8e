//! `generation_config.json`: how the model's makers sample from it.

use crate::ModelError;
use crate::config::Ids;
use serde::Deserialize;

/// Sampling defaults of a model. What is `None` is not said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// True asks for sampling; without it, decoding is greedy.
    pub do_sample: Option<bool>,
    /// Divisor of the logits.
    pub temperature: Option<f32>,
    /// Probability mass that is sampled from.
    pub top_p: Option<f32>,
    /// Number of tokens that are sampled from.
    pub top_k: Option<usize>,
    /// Share of the most likely token below which tokens are not sampled.
    pub min_p: Option<f32>,
    /// Penalty on tokens that have occurred.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Raw {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<usize>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    #[serde(default)]
    eos_token_id: Ids,
}

impl GenerationConfig {
    /// Reads the text of a `generation_config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, ModelError> {
        let raw: Raw = serde_path_to_error::deserialize(&mut serde_json::Deserializer::from_str(text))
            .map_err(|error| ModelError::Malformed { path: origin.to_owned(), reason: error.to_string() })?;
        Ok(GenerationConfig {
            do_sample: raw.do_sample,
            temperature: raw.temperature,
            top_p: raw.top_p,
            top_k: raw.top_k,
            min_p: raw.min_p,
            repetition_penalty: raw.repetition_penalty,
            eos_token_ids: raw.eos_token_id.into_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_or_several_ids_end_a_text() {
        let config = |text: &str| GenerationConfig::parse(text, "generation_config.json");
        assert_eq!(config(r#"{"eos_token_id": [1, 4], "top_k": 20}"#).unwrap().eos_token_ids, [1, 4]);
        assert_eq!(config(r#"{"eos_token_id": 2, "unknown": 1}"#).unwrap().eos_token_ids, [2]);
        assert_eq!(config(r#"{"eos_token_id": null}"#).unwrap(), GenerationConfig::default());
        assert!(config(r#"{"temperature": "hot"}"#).is_err());
    }
}
