//! Control tokens spelled out in the contents of messages, which must not become control tokens.
//!
//! A template puts contents between its own control tokens, and what comes out is one text. A mark inside what is spelled in a
//! content breaks it for the search of control tokens; the mark is dropped before the text is cut and merged.

use super::guarded;
use crate::ModelError;
use serde_json::{Value, json};
use std::borrow::Cow;
use std::sync::OnceLock;

/// A noncharacter of Unicode: no text that is meant for others holds it.
const MARK: char = '\u{fdd0}';

/// A tokenizer that does not see marked control tokens.
pub(super) struct Shield {
    /// The `tokenizer.json`.
    json: Vec<u8>,
    /// Control tokens of two characters or more.
    control: Vec<String>,
    /// Made when the first marked text comes.
    tokenizer: OnceLock<Result<Box<tokenizers::Tokenizer>, String>>,
}

impl Shield {
    pub(super) fn new(json: &[u8], inner: &tokenizers::Tokenizer) -> Self {
        let added = inner.get_added_tokens_decoder();
        let control = added.values().filter(|token| is_control(&token.content, token.special));
        let mut control: Vec<String> = control.map(|token| token.content.clone()).collect();
        control.sort();
        Shield { json: json.to_vec(), control, tokenizer: OnceLock::new() }
    }

    /// A content with a mark inside each control token that it spells.
    pub(super) fn mark<'a>(&self, content: &'a str) -> Result<Cow<'a, str>, ModelError> {
        if content.contains(MARK) {
            return Err(ModelError::Tokenizer("a message holds the noncharacter U+FDD0; remove it".into()));
        }
        let mut places: Vec<usize> =
            self.control.iter().flat_map(|token| content.match_indices(token.as_str()).map(|(at, _)| at)).collect();
        if places.is_empty() {
            return Ok(content.into());
        }
        places.sort_unstable();
        places.dedup();
        let mut marked = String::with_capacity(content.len() + places.len() * MARK.len_utf8());
        let mut done = 0;
        for place in places {
            let inside = place + content[place..].chars().next().map_or(0, char::len_utf8);
            marked.push_str(&content[done..inside]);
            marked.push(MARK);
            done = inside;
        }
        marked.push_str(&content[done..]);
        Ok(marked.into())
    }

    /// The tokenizer for a text with marks; `None` for one without.
    pub(super) fn tokenizer(&self, text: &str) -> Result<Option<&tokenizers::Tokenizer>, ModelError> {
        if !text.contains(MARK) {
            return Ok(None);
        }
        match self.tokenizer.get_or_init(|| self.build().map(Box::new)) {
            Ok(tokenizer) => Ok(Some(tokenizer)),
            Err(reason) => Err(ModelError::Tokenizer(reason.clone())),
        }
    }

    /// The tokenizer whose control tokens are found in the text as it is, and which drops marks after that.
    fn build(&self) -> Result<tokenizers::Tokenizer, String> {
        let mut json: Value = serde_json::from_slice(&self.json).map_err(|error| error.to_string())?;
        let drop = json!({"type": "Replace", "pattern": {"String": MARK.to_string()}, "content": ""});
        let normalizers = [drop].into_iter().chain(json.get("normalizer").filter(|own| !own.is_null()).cloned());
        json["normalizer"] = json!({"type": "Sequence", "normalizers": normalizers.collect::<Vec<_>>()});
        for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
            let special = token["special"].as_bool().unwrap_or(false);
            if is_control(token["content"].as_str().unwrap_or_default(), special) {
                token["normalized"] = json!(false);
            }
        }
        let bytes = serde_json::to_vec(&json).map_err(|error| error.to_string())?;
        guarded(|| tokenizers::Tokenizer::from_bytes(bytes))
    }
}

/// Whether an added token controls: what is called special does, and what is spelled like `<|user|>` or `<｜User｜>`, which
/// some files do not call special.
fn is_control(content: &str, special: bool) -> bool {
    let spelled = ["|", "\u{ff5c}"].iter().any(|bar| {
        content.strip_prefix('<').is_some_and(|rest| rest.starts_with(bar))
            && content.strip_suffix('>').is_some_and(|rest| rest.ends_with(bar))
    });
    (special || spelled) && content.chars().nth(1).is_some()
}
