//! What a `tokenizer_config.json` says of a tokenizer.

use crate::ModelError;
use serde_json::Value;

/// Settings beside a `tokenizer.json`. What is `None` is not said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TokenizerSettings {
    /// Whether a text begins with BOS, whatever `tokenizer.json` says.
    pub add_bos_token: Option<bool>,
    /// Whether a text ends with EOS, whatever `tokenizer.json` says.
    pub add_eos_token: Option<bool>,
    /// The token that begins a text.
    pub bos_token: Option<String>,
    /// The token that ends a text, or a turn.
    pub eos_token: Option<String>,
}

impl TokenizerSettings {
    /// Reads the text of a `tokenizer_config.json`; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] where it is no JSON, or a setting is no truth value.
    pub fn parse(text: &str, origin: &str) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed { path: origin.to_owned(), reason };
        let config: Value = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
        let flag = |name: &str| match config.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(malformed(format!("{name} is {other}; it must be true or false"))),
        };
        Ok(TokenizerSettings {
            add_bos_token: flag("add_bos_token")?,
            add_eos_token: flag("add_eos_token")?,
            bos_token: config.get("bos_token").and_then(token_text).map(str::to_owned),
            eos_token: config.get("eos_token").and_then(token_text).map(str::to_owned),
        })
    }
}

/// The text of a token that a `tokenizer_config.json` names: as it is, or as the `content` of an object.
pub(crate) fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token.get("content")?.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_texts_or_objects() {
        let text = r#"{"bos_token": {"content": "<s>", "lstrip": false}, "eos_token": "</s>", "add_bos_token": null, "add_eos_token": true}"#;
        let settings = TokenizerSettings::parse(text, "tokenizer_config.json").unwrap();
        assert_eq!((settings.bos_token.as_deref(), settings.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
        assert_eq!((settings.add_bos_token, settings.add_eos_token), (None, Some(true)));
        assert_eq!(TokenizerSettings::parse("{}", "m").unwrap(), TokenizerSettings::default());
        for bad in ["{", r#"{"add_bos_token": "yes"}"#] {
            assert!(TokenizerSettings::parse(bad, "m").is_err(), "{bad}");
        }
    }
}
