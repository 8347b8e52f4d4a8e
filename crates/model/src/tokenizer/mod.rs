//! Text to token ids and back.

mod settings;
mod shield;
mod stream;

pub use settings::TokenizerSettings;
pub(crate) use settings::token_text;
pub use stream::TextStream;

use crate::{ModelError, quiet_panic};
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use shield::Shield;
use std::borrow::Cow;

/// White space in a row from which on the expressions that cut a text fail, and cut it elsewhere without a word: their
/// matcher holds a million states.
const LONGEST_BLANK: usize = 1_000_000;

/// A tokenizer of a `tokenizer.json`, or the stand-in for models without one.
pub struct Tokenizer {
    inner: Option<Inner>,
    vocab_size: usize,
}

struct Inner {
    tokenizer: Box<tokenizers::Tokenizer>,
    shield: Shield,
    /// Whether regular expressions cut a text.
    cuts: bool,
    bos: Edge,
    eos: Edge,
}

/// A token at an end of a text.
#[derive(Clone, Copy)]
struct Edge {
    id: Option<u32>,
    /// Whether the `tokenizer.json` puts it there.
    usual: bool,
    /// Whether it is to be there.
    wanted: bool,
}

/// Runs what the tokenizers crate does with a stranger's file. It panics at some of what such files say; that is an error.
fn guarded<T>(run: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T, String> {
    match quiet_panic::catch(run) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("the tokenizers library cannot use it ({panic}); get the file again")),
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` for a model of `vocab_size` ids; `origin` names it in errors. It may have more ids than the
    /// model: a text that takes such an id is refused.
    ///
    /// # Errors
    /// [`ModelError::Malformed`].
    pub fn parse(bytes: &[u8], vocab_size: usize, origin: &str) -> Result<Self, ModelError> {
        Self::with_settings(bytes, &TokenizerSettings::default(), vocab_size, origin)
    }

    /// The same with the settings of a `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`ModelError::Malformed`].
    pub fn with_settings(
        bytes: &[u8],
        settings: &TokenizerSettings,
        vocab_size: usize,
        origin: &str,
    ) -> Result<Self, ModelError> {
        let malformed = |reason: String| ModelError::Malformed { path: origin.to_owned(), reason };
        // The library panics where a file ends too early.
        serde_json::from_slice::<IgnoredAny>(bytes).map_err(|error| malformed(error.to_string()))?;
        let read = guarded(|| {
            let mut tokenizer = tokenizers::Tokenizer::from_bytes(bytes)?;
            // Left over from training in some files; a prompt is neither cut nor filled up.
            tokenizer.with_truncation(None)?;
            tokenizer.with_padding(None);
            let around = tokenizer.encode_fast("", true)?.get_ids().to_vec();
            Ok((tokenizer, around))
        });
        let (tokenizer, around) = read.map_err(malformed)?;
        let special = |id: &u32| tokenizer.get_added_tokens_decoder().get(id).is_some_and(|token| token.special);
        let edge = |name: &str, token: &Option<String>, found: Option<u32>, wanted: Option<bool>| {
            // Where the settings name none, it is what the tokenizer.json puts there.
            let id = token.as_deref().map_or(found.filter(special), |token| tokenizer.token_to_id(token));
            if id.is_none() && wanted == Some(true) {
                tracing::warn!(
                    "{origin}: add_{name}_token is true, and there is no {name}_token to add; none is added"
                );
            }
            let usual = id.is_some() && found == id;
            Edge { id, usual, wanted: id.is_some() && wanted.unwrap_or(usual) }
        };
        let bos = edge("bos", &settings.bos_token, around.first().copied(), settings.add_bos_token);
        let behind = around.get(usize::from(bos.usual)..).and_then(<[u32]>::last).copied();
        let eos = edge("eos", &settings.eos_token, behind, settings.add_eos_token);
        let (shield, cuts) = (Shield::new(bytes, &tokenizer), cuts_by_expressions(&tokenizer));
        let inner = Inner { shield, cuts, bos, eos, tokenizer: Box::new(tokenizer) };
        Ok(Tokenizer { inner: Some(inner), vocab_size })
    }

    /// A stand-in for made-up weights without a tokenizer: the bytes of a text are its ids, and ids are
    /// written as numbers.
    pub fn bytes(vocab_size: usize) -> Self {
        Tokenizer { inner: None, vocab_size }
    }

    /// Token ids of a text. `special` adds what the tokenizer puts around a text: BOS where `add_bos_token` of the settings
    /// says so, or where they say nothing and the `tokenizer.json` does, and EOS likewise. A text that spells BOS itself does
    /// not get a second one. Special tokens spelled out in the text are recognised either way.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`], and [`ModelError::NoEmbedding`] where the text takes a token that the model has no row for.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        let Some(inner) = &self.inner else {
            return Ok(text.bytes().map(|byte| u32::from(byte) % self.vocab_size as u32).collect());
        };
        self.check(if special { inner.encode_whole(text)? } else { inner.encode(&inner.tokenizer, text, false)? })
    }

    /// A message's content as a chat template may get it: control tokens that it spells out stay text when
    /// [`Tokenizer::encode_rendered`] reads what the template made of it.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] for a content with the noncharacter U+FDD0, which is the mark.
    pub fn shield<'a>(&self, content: &'a str) -> Result<Cow<'a, str>, ModelError> {
        self.inner.as_ref().map_or(Ok(content.into()), |inner| inner.shield.mark(content))
    }

    /// Token ids of what a chat template made of shielded contents. Nothing is added around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let Some(inner) = &self.inner else { return self.encode(text, false) };
        match inner.shield.tokenizer(text)? {
            None => self.encode(text, false),
            Some(shielded) => self.check(inner.encode(shielded, text, false)?),
        }
    }

    /// Refuses ids that the model has no row for.
    fn check(&self, ids: Vec<u32>) -> Result<Vec<u32>, ModelError> {
        match ids.iter().find(|id| **id as usize >= self.vocab_size) {
            Some(&id) => {
                let token = self.inner.as_ref().and_then(|inner| inner.tokenizer.id_to_token(id)).unwrap_or_default();
                Err(ModelError::NoEmbedding { token, id, vocab_size: self.vocab_size })
            }
            None => Ok(ids),
        }
    }

    /// The text of some ids, special tokens left out.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn decode(&self, ids: &[u32]) -> Result<String, ModelError> {
        match &self.inner {
            Some(inner) => guarded(|| inner.tokenizer.decode(ids, true)).map_err(ModelError::Tokenizer),
            None => Ok(ids.iter().map(|id| format!("<{id}>")).collect()),
        }
    }

    /// The token of an id as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.as_ref()?.tokenizer.id_to_token(id)
    }

    /// The id of a token that the model has, as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.as_ref()?.tokenizer.token_to_id(token).filter(|id| (*id as usize) < self.vocab_size)
    }

    /// The id of a special token that the model has, by its text.
    pub fn special_token(&self, text: &str) -> Option<u32> {
        let id = self.id(text)?;
        let added = self.inner.as_ref()?.tokenizer.get_added_tokens_decoder();
        added.get(&id).filter(|token| token.special).map(|_| id)
    }

    /// Whether texts begin with BOS where [`Tokenizer::encode`] adds special tokens.
    pub fn adds_bos(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.bos.wanted)
    }

    /// Decodes ids one after the other, as the continuation of `context`: some tokenizers write a word's space
    /// only where something precedes it.
    pub fn stream(&self, context: &[u32]) -> TextStream {
        TextStream::new(context)
    }
}

impl Inner {
    fn encode(&self, tokenizer: &tokenizers::Tokenizer, text: &str, special: bool) -> Result<Vec<u32>, ModelError> {
        if self.cuts {
            check_blanks(text)?;
        }
        let encoding = guarded(|| tokenizer.encode_fast(text, special)).map_err(ModelError::Tokenizer)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// A text with what belongs around it.
    fn encode_whole(&self, text: &str) -> Result<Vec<u32>, ModelError> {
        let Inner { bos, eos, .. } = *self;
        // A tokenizer.json may put more around a text than these two, so it does where it agrees with the settings.
        if bos.wanted == bos.usual && eos.wanted == eos.usual {
            let mut ids = self.encode(&self.tokenizer, text, true)?;
            if bos.usual && ids.get(1).copied() == bos.id {
                ids.remove(0);
            }
            if eos.usual && ids.len() > 1 && ids[ids.len() - 2..].iter().all(|id| Some(*id) == eos.id) {
                ids.pop();
            }
            return Ok(ids);
        }
        let mut ids = self.encode(&self.tokenizer, text, false)?;
        if bos.wanted && ids.first().copied() != bos.id {
            ids.splice(0..0, bos.id);
        }
        if eos.wanted && ids.last().copied() != eos.id {
            ids.extend(eos.id);
        }
        Ok(ids)
    }
}

/// Whether a tokenizer cuts a text by regular expressions.
fn cuts_by_expressions(tokenizer: &tokenizers::Tokenizer) -> bool {
    fn cuts(step: &Value) -> bool {
        let expression = step.get("pattern").is_some_and(|pattern| pattern.get("Regex").is_some());
        let steps = step.get("pretokenizers").and_then(Value::as_array);
        let bytes = step["type"] == "ByteLevel" && step["use_regex"] != json!(false);
        expression || bytes || steps.is_some_and(|steps| steps.iter().any(cuts))
    }
    cuts(&serde_json::to_value(tokenizer.get_pre_tokenizer()).unwrap_or_default())
}

/// Refuses a text with more white space in a row than expressions can be matched over.
fn check_blanks(text: &str) -> Result<(), ModelError> {
    if text.len() < LONGEST_BLANK {
        return Ok(());
    }
    let mut run = 0;
    for character in text.chars() {
        run = if character.is_whitespace() { run + 1 } else { 0 };
        if run >= LONGEST_BLANK {
            let most = LONGEST_BLANK - 1;
            let reason = format!("the text has more than {most} white-space characters in a row; shorten that run");
            return Err(ModelError::Tokenizer(reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
