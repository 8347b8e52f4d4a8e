//! Text of ids that arrive one by one.

use super::Tokenizer;
use crate::ModelError;

/// Ids before a text that decide how it begins.
const CONTEXT_IDS: usize = 6;

/// Ids that the bytes of one character can be spread over, and then some.
const CHARACTER_IDS: usize = 8;

/// Text is released as soon as no later id can change it: characters of several tokens come out whole.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Where decoding begins, so that the next piece is seen in its context.
    prefix: usize,
    /// Ids before this one have been released.
    read: usize,
}

impl<'a> TextStream<'a> {
    /// A stream of the text that continues `context`.
    pub(super) fn new(tokenizer: &'a Tokenizer, context: &[u32]) -> Self {
        let ids = context[context.len().saturating_sub(CONTEXT_IDS)..].to_vec();
        TextStream { tokenizer, prefix: 0, read: ids.len(), ids }
    }

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
