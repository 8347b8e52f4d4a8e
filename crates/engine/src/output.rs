//! Tokens of one answer as text, until it ends.

use crate::{EngineError, FinishReason, Request, StopFilter};
use dibit_model::{Pretrained, TextStream};

/// The answer to a request, on its way out.
pub(crate) struct Output {
    stream: TextStream,
    stop: StopFilter,
    /// Stop strings that are special tokens.
    stop_ids: Vec<u32>,
    max_tokens: usize,
    /// All text so far.
    pub text: String,
    /// All tokens so far, the one that ended the text included.
    pub tokens: Vec<u32>,
}

impl Output {
    pub(crate) fn new(pretrained: &Pretrained, request: &Request) -> Self {
        let tokenizer = &pretrained.tokenizer;
        Output {
            stream: tokenizer.stream(&request.prompt),
            stop: StopFilter::new(&request.stop),
            stop_ids: request.stop.iter().filter_map(|stop| tokenizer.special_token(stop)).collect(),
            max_tokens: request.max_tokens,
            text: String::new(),
            tokens: Vec::new(),
        }
    }

    /// Whether no token is asked for.
    pub(crate) fn is_full(&self) -> bool {
        self.tokens.len() >= self.max_tokens
    }

    /// Takes the next token; returns the text that is certain now, and why the answer has ended, if it has. `is_last` says
    /// that no further token can be cached.
    pub(crate) fn push(
        &mut self,
        pretrained: &Pretrained,
        id: u32,
        is_last: bool,
    ) -> Result<(String, Option<FinishReason>), EngineError> {
        self.tokens.push(id);
        if pretrained.stop_token_ids.contains(&id) || self.stop_ids.contains(&id) {
            return self.end(pretrained, FinishReason::Stop);
        }
        let piece = self.stream.push(&pretrained.tokenizer, id)?;
        let (text, stopped) = self.stop.push(&piece);
        self.text.push_str(&text);
        let reason = match stopped {
            true => return Ok((text, Some(FinishReason::Stop))),
            false if self.is_full() => FinishReason::Length,
            false if is_last => FinishReason::Context,
            false => return Ok((text, None)),
        };
        let (rest, reason) = self.end(pretrained, reason)?;
        Ok((text + &rest, reason))
    }

    /// Ends the answer; what was held back of it comes out, and may hold a stop string.
    pub(crate) fn end(
        &mut self,
        pretrained: &Pretrained,
        reason: FinishReason,
    ) -> Result<(String, Option<FinishReason>), EngineError> {
        let (mut text, stopped) = self.stop.push(&self.stream.finish(&pretrained.tokenizer)?);
        if !stopped {
            text += &self.stop.finish();
        }
        self.text.push_str(&text);
        Ok((text, Some(if stopped { FinishReason::Stop } else { reason })))
    }
}
