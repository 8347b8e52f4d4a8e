//! A conversation whose turns share one cached sequence.

use crate::{Completion, Engine, EngineError, FinishReason, Request, Sampling, SequenceId};
use dibit_cache::Usage;
use dibit_model::{ChatFormat, Message};
use std::ops::ControlFlow;

/// What a conversation is held with.
pub struct ChatOptions {
    /// How messages are put to the model.
    pub format: ChatFormat,
    /// A system message.
    pub system: Option<String>,
    /// Whether the oldest turns are dropped where the conversation outgrows the context.
    pub context_shift: bool,
}

/// A conversation. Each turn feeds only what is new: earlier turns are attended to in the packed cache.
pub struct Chat {
    format: ChatFormat,
    context_shift: bool,
    messages: Vec<Message>,
    sequence: SequenceId,
    /// The text that the cache, together with `pending`, stands for.
    rendered: String,
    /// Generated ids that are not cached yet.
    pending: Vec<u32>,
    /// All ids that are cached.
    history: Vec<u32>,
    /// Answers so far: each takes a stream of the seed.
    answers: u64,
}

/// What a turn feeds.
struct Prompt {
    /// The whole conversation as text.
    text: String,
    ids: Vec<u32>,
    /// Whether the sequence begins anew with it.
    fresh: bool,
}

impl Chat {
    /// Begins a conversation.
    ///
    /// # Errors
    /// [`EngineError::Cache`] where no sequence is free.
    pub fn new(engine: &mut Engine, options: ChatOptions) -> Result<Self, EngineError> {
        let sequence = engine.open()?;
        Ok(Chat {
            format: options.format,
            context_shift: options.context_shift,
            messages: options.system.map(|content| message("system", &content)).into_iter().collect(),
            sequence,
            rendered: String::new(),
            pending: Vec::new(),
            history: Vec::new(),
            answers: 0,
        })
    }

    /// The conversation so far, without turns that were dropped.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// What the conversation takes in the cache.
    pub fn usage(&self, engine: &Engine) -> Usage {
        engine.usage(self.sequence)
    }

    /// Forgets everything but the system message.
    pub fn reset(&mut self, engine: &mut Engine) {
        self.messages.retain(|message| message.role == "system");
        self.forget(engine);
    }

    /// Ends the conversation and gives its sequence back.
    pub fn close(self, engine: &mut Engine) {
        engine.close(self.sequence);
    }

    /// Answers the user. A cancelled answer stays in the conversation as far as it came; cancelled before its first
    /// token, or of no tokens, it is as if nothing had been asked.
    ///
    /// # Errors
    /// Those of [`Engine::check`] and of the template, and [`EngineError::ConversationTooLong`]. The conversation is then as it
    /// was before.
    pub fn answer(
        &mut self,
        engine: &mut Engine,
        user: &str,
        max_tokens: usize,
        sampling: &Sampling,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion, EngineError> {
        let before = self.messages.clone();
        self.messages.push(message("user", user));
        let result = self.run(engine, max_tokens, sampling, on_text);
        match &result {
            Ok(completion) if !completion.tokens.is_empty() => {
                self.messages.push(message("assistant", &completion.text));
            }
            // Nothing was answered, so nothing was asked.
            _ => self.messages = before,
        }
        result
    }

    fn run(
        &mut self,
        engine: &mut Engine,
        max_tokens: usize,
        sampling: &Sampling,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion, EngineError> {
        let Prompt { text, ids, fresh } = self.fitting_prompt(engine, max_tokens)?;
        let history = if fresh { Vec::new() } else { self.history.clone() };
        let request = Request {
            prompt: ids,
            history,
            max_tokens,
            sampling: sampling.clone(),
            stream: self.answers,
            stop: Vec::new(),
            logprobs: None,
        };
        let cached = engine.len(self.sequence);
        engine.check(&request, if fresh { 0 } else { cached })?;
        if fresh && cached > 0 {
            tracing::info!("earlier turns are not as they were; the conversation is read again");
        }
        if fresh {
            self.forget(engine);
        }
        let prompt = request.prompt.clone();
        let done = engine.submit_to(self.sequence, request).and_then(|id| engine.finish(id, on_text));
        let completion = match done {
            Ok(completion) if !completion.tokens.is_empty() => completion,
            // The prompt was not read to its end.
            other => {
                self.forget(engine);
                return other;
            }
        };
        self.rendered = text + &completion.text;
        self.answers += 1;
        // The last id is not cached: it comes with the next prompt, as it is or as the template writes it.
        let cached = &completion.tokens[..completion.tokens.len() - 1];
        self.history.extend(prompt.iter().chain(cached));
        let ended = completion.tokens.last().is_some_and(|id| engine.pretrained().stop_token_ids.contains(id));
        self.pending = match completion.tokens.last() {
            Some(&id) if !ended => vec![id],
            _ => Vec::new(),
        };
        debug_assert!(ended || completion.finish != FinishReason::Stop);
        Ok(completion)
    }

    /// What the turn feeds, with room for an answer: the oldest turns go where that is allowed.
    fn fitting_prompt(&mut self, engine: &Engine, max_tokens: usize) -> Result<Prompt, EngineError> {
        let (context, cached) = (engine.options().context, engine.len(self.sequence));
        // A turn that leaves no room for its answer is of no use, and one that leaves a quarter need not go for more.
        let room = if self.context_shift { max_tokens.min(context / 4) } else { 0 };
        let (mut dropped, mut prompt) = (0, self.prompt(engine)?);
        let tokens = |prompt: &Prompt, cached| prompt.ids.len() + if prompt.fresh { 0 } else { cached };
        while tokens(&prompt, cached) + room > context {
            match self.drop_oldest_turn() {
                0 => break,
                count => dropped += count,
            }
            prompt = self.prompt(engine)?;
        }
        let tokens = tokens(&prompt, cached);
        if tokens > context {
            return Err(self.too_long(tokens, context, engine));
        }
        if dropped > 0 {
            tracing::info!("the conversation outgrew the context: its oldest {dropped} messages are dropped");
        }
        Ok(prompt)
    }

    fn too_long(&self, prompt: usize, context: usize, engine: &Engine) -> EngineError {
        let could_grow = context < engine.pretrained().config.max_position_embeddings;
        let advice = match (self.context_shift, could_grow) {
            (true, true) => ": its last message alone is too long; shorten it, or plan more with --context",
            (true, false) => ": its last message alone is too long; shorten it",
            (false, true) => ": /reset begins anew, --context-shift drops the oldest turns, --context plans more",
            (false, false) => {
                ", the most that the model supports: /reset begins anew, --context-shift drops the oldest turns"
            }
        };
        EngineError::ConversationTooLong { prompt, context, advice }
    }

    /// Drops the oldest messages up to the second one of the user, where that is allowed and leaves the last; says how many.
    fn drop_oldest_turn(&mut self) -> usize {
        let is_user = |message: &Message| message.role == "user";
        let first = self.messages.iter().position(|message| message.role != "system").unwrap_or(0);
        let next = self.messages.iter().skip(first + 1).position(is_user);
        match next.filter(|_| self.context_shift) {
            Some(next) => self.messages.drain(first..first + 1 + next).count(),
            None => 0,
        }
    }

    fn prompt(&self, engine: &Engine) -> Result<Prompt, EngineError> {
        let tokenizer = &engine.pretrained().tokenizer;
        let text = self.format.render(tokenizer, &self.messages, true)?;
        let known = text.strip_prefix(&self.rendered).filter(|_| engine.len(self.sequence) > 0);
        Ok(match known {
            Some(new) => {
                let ids = [&self.pending[..], &tokenizer.encode_rendered(new)?].concat();
                Prompt { ids, fresh: false, text }
            }
            None => Prompt { ids: tokenizer.encode_rendered(&text)?, fresh: true, text },
        })
    }

    fn forget(&mut self, engine: &mut Engine) {
        engine.clear(self.sequence);
        self.rendered.clear();
        self.pending.clear();
        self.history.clear();
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}
