//! Text of ids that arrive one by one.

use super::Tokenizer;
use crate::ModelError;

/// Ids before a text that decide how it begins.
const CONTEXT_IDS: usize = 6;

/// Ids that the bytes of one character can be spread over, and then some.
const CHARACTER_IDS: usize = 8;

/// The text of ids of one tokenizer, which is given with each. It is released as soon as no later id can change it: characters of several tokens come out whole.
pub struct TextStream {
    ids: Vec<u32>,
    /// Where decoding begins, so that the next piece is seen in its context.
    prefix: usize,
    /// Ids before this one have been released.
    read: usize,
}

impl TextStream {
    /// A stream of the text that continues `context`.
    pub(super) fn new(context: &[u32]) -> Self {
        let ids = context[context.len().saturating_sub(CONTEXT_IDS)..].to_vec();
        TextStream { prefix: 0, read: ids.len(), ids }
    }

    /// Adds an id and returns the text that became certain, possibly none.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`].
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> Result<String, ModelError> {
        self.ids.push(id);
        let piece = self.pending(tokenizer)?;
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
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> Result<String, ModelError> {
        let piece = self.pending(tokenizer)?;
        self.read = self.ids.len();
        Ok(piece)
    }

    /// Text of the ids that have not been released.
    fn pending(&self, tokenizer: &Tokenizer) -> Result<String, ModelError> {
        let before = tokenizer.decode(&self.ids[self.prefix..self.read])?;
        let all = tokenizer.decode(&self.ids[self.prefix..])?;
        Ok(all.get(before.len()..).unwrap_or_default().to_owned())
    }
}
