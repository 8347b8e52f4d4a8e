//! Text to token ids and back.

use crate::ModelError;
use serde::de::IgnoredAny;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A tokenizer of a `tokenizer.json`, or the stand-in for models without one.
pub struct Tokenizer {
    inner: Option<Box<tokenizers::Tokenizer>>,
    vocab_size: usize,
}

/// Ids before a text that decide how it begins.
const CONTEXT_IDS: usize = 6;

/// Ids that the bytes of one character can be spread over, and then some.
const CHARACTER_IDS: usize = 8;

/// Runs what the tokenizers crate does with a stranger's file. It panics at some of what such files say; that is an error.
fn guarded<T>(run: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("no reason given");
            Err(format!("the tokenizers library cannot use it ({text}); get the file again"))
        }
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` for a model of `vocab_size` ids; `origin` names it in errors.
    ///
    /// # Errors
    /// [`ModelError::Malformed`] and [`ModelError::Vocabulary`].
    pub fn parse(bytes: &[u8], vocab_size: usize, origin: &str) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed { path: origin.to_owned(), reason };
        // The library panics where a file ends too early.
        serde_json::from_slice::<IgnoredAny>(bytes).map_err(|error| malformed(error.to_string()))?;
        let inner = guarded(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(bytes)?;
            // Left over from training in some files; a prompt is neither cut nor filled up.
            inner.with_truncation(None)?;
            inner.with_padding(None);
            Ok(inner)
        });
        let inner = inner.map_err(malformed)?;
        let largest = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize);
        if largest >= vocab_size {
            return Err(ModelError::Vocabulary { tokenizer: largest, model: vocab_size });
        }
        Ok(Tokenizer { inner: Some(Box::new(inner)), vocab_size })
    }

    /// A stand-in for made-up weights without a tokenizer: the bytes of a text are its ids, and ids are
    /// written as numbers.
    pub fn bytes(vocab_size: usize) -> Self {
        Tokenizer { inner: None, vocab_size }
    }

    /// Token ids of a text. `special` adds what the tokenizer puts around a text (BOS); special tokens spelled
    /// out in the text are recognised either way.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        match &self.inner {
            Some(inner) => {
                let encoding = guarded(|| inner.encode_fast(text, special)).map_err(ModelError::Tokenizer)?;
                Ok(encoding.get_ids().to_vec())
            }
            None => Ok(text.bytes().map(|byte| u32::from(byte) % self.vocab_size as u32).collect()),
        }
    }

    /// The text of some ids, special tokens left out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        match &self.inner {
            Some(inner) => guarded(|| inner.decode(ids, true)).map_err(ModelError::Tokenizer),
            None => Ok(ids.iter().map(|id| format!("<{id}>")).collect()),
        }
    }

    /// Decodes ids one after the other, as the continuation of `context`: some tokenizers write a word's space
    /// only where something precedes it.
    pub fn stream(&self, context: &[u32]) -> TextStream<'_> {
        let ids = context[context.len().saturating_sub(CONTEXT_IDS)..].to_vec();
        TextStream { tokenizer: self, prefix: 0, read: ids.len(), ids }
    }
}

/// Text of ids that arrive one by one. Text is released as soon as no later id can change it: characters of
/// several tokens come out whole.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Where decoding begins, so that the next piece is seen in its context.
    prefix: usize,
    /// Ids before this one have been released.
    read: usize,
}

impl TextStream<'_> {
    /// Adds an id and returns the text that became certain, possibly none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        self.ids.push(id);
        let piece = self.pending()?;
        if piece.ends_with('\u{fffd}') && self.ids.len() - self.read < CHARACTER_IDS {
            return Ok(String::new());
        }
        self.prefix = self.read;
        self.read = self.ids.len();
        Ok(piece)
    }

    /// The rest: an incomplete character is released as it is.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn finish(&mut self) -> Result<String, ModelError> {
        let piece = self.pending()?;
        self.read = self.ids.len();
        Ok(piece)
    }

    /// Text of the ids that have not been released.
    fn pending(&self) -> Result<String, ModelError> {
        let before = self.tokenizer.decode(&self.ids[self.prefix..self.read])?;
        let all = self.tokenizer.decode(&self.ids[self.prefix..])?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stand_in_takes_bytes() {
        let tokenizer = Tokenizer::bytes(100);
        assert_eq!(tokenizer.encode("ab", true).unwrap(), [97, 98]);
        assert_eq!(tokenizer.decode(&[5, 99]).unwrap(), "<5><99>");
        let mut stream = tokenizer.stream(&[]);
        assert_eq!(stream.push(5).unwrap() + &stream.push(6).unwrap(), "<5><6>");
        assert_eq!(stream.finish().unwrap(), "");
    }

    #[test]
    fn a_word_keeps_its_space_where_a_text_goes_on() {
        let json = r#"{"version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
            "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "▁big": 1, "▁city": 2}, "unk_token": "<unk>"}}"#;
        let tokenizer = Tokenizer::parse(json.as_bytes(), 3, "tokenizer.json").unwrap();
        let prompt = tokenizer.encode("big", true).unwrap();
        assert_eq!(prompt, [1]);
        assert_eq!(tokenizer.stream(&prompt).push(2).unwrap(), " city");
        assert_eq!(tokenizer.stream(&[]).push(2).unwrap(), "city");
    }

    #[test]
    fn a_file_that_is_no_tokenizer_is_named() {
        let error = Tokenizer::parse(b"{}", 10, "tokenizer.json").err().unwrap().to_string();
        assert!(error.contains("tokenizer.json is malformed"), "{error}");
    }
}
