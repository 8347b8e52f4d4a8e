//! A conversation whose turns share one cached sequence.

use crate::{Completion, Engine, EngineError, FinishReason, Request, Sampling};
use dibit_cache::{Sequence, Usage};
use dibit_device::Device;
use dibit_model::{ChatTemplate, Message};
use std::ops::ControlFlow;

/// A conversation. Each turn feeds only what is new: earlier turns are attended to in the packed cache.
pub struct Chat {
    template: ChatTemplate,
    messages: Vec<Message>,
    sequence: Sequence,
    /// The text that the cache, together with `pending`, stands for.
    rendered: String,
    /// Generated ids that are not cached yet.
    pending: Vec<u32>,
    /// All ids since the sequence was empty.
    history: Vec<u32>,
}

impl Chat {
    /// Begins a conversation, with a system message if one is given.
    ///
    /// # Errors
    /// [`EngineError::NoChatTemplate`], or no free sequence.
    pub fn new<D: Device>(engine: &mut Engine<'_, D>, system: Option<&str>) -> Result<Self, EngineError> {
        let pretrained = engine.pretrained();
        let template =
            pretrained.chat_template()?.ok_or_else(|| EngineError::NoChatTemplate(pretrained.name.clone()))?;
        let sequence = engine.open()?;
        let mut chat = Chat {
            template,
            messages: Vec::new(),
            sequence,
            rendered: String::new(),
            pending: Vec::new(),
            history: Vec::new(),
        };
        chat.messages.extend(system.map(|content| message("system", content)));
        Ok(chat)
    }

    /// The conversation so far.
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// What the conversation takes in the cache.
    pub fn usage<D: Device>(&self, engine: &Engine<'_, D>) -> Usage {
        engine.usage(&self.sequence)
    }

    /// Forgets everything but the system message.
    pub fn reset<D: Device>(&mut self, engine: &mut Engine<'_, D>) {
        self.messages.retain(|message| message.role == "system");
        self.forget(engine);
    }

    /// Ends the conversation and gives its sequence back.
    pub fn close<D: Device>(self, engine: &mut Engine<'_, D>) {
        engine.close(self.sequence);
    }

    /// Answers the user. A cancelled answer stays in the conversation as far as it came; cancelled before its first
    /// token, or of no tokens, it is as if nothing had been asked.
    ///
    /// # Errors
    /// Those of [`Engine::check`] and of the template. The conversation is then as it was before.
    pub fn answer<D: Device>(
        &mut self,
        engine: &mut Engine<'_, D>,
        user: &str,
        max_tokens: usize,
        sampling: Sampling,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion, EngineError> {
        self.messages.push(message("user", user));
        let result = self.run(engine, max_tokens, sampling, on_text);
        match &result {
            Ok(completion) if !completion.tokens.is_empty() => {
                self.messages.push(message("assistant", &completion.text));
            }
            // Nothing was answered, so nothing was asked.
            _ => {
                self.messages.pop();
            }
        }
        result
    }

    fn run<D: Device>(
        &mut self,
        engine: &mut Engine<'_, D>,
        max_tokens: usize,
        sampling: Sampling,
        on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion, EngineError> {
        let full = self.template.render(&self.messages, true)?;
        let encode = |text: &str| engine.pretrained().tokenizer.encode(text, false);
        let known = full.strip_prefix(&self.rendered).filter(|_| !self.sequence.is_empty());
        let (prompt, fresh) = match known {
            Some(new) => ([self.pending.clone(), encode(new)?].concat(), false),
            None => (encode(&full)?, true),
        };
        let history = if fresh { Vec::new() } else { self.history.clone() };
        let request = Request { prompt, history, max_tokens, sampling, stop: Vec::new() };
        engine.check(&request, if fresh { 0 } else { self.sequence.len() })?;
        if fresh && !self.sequence.is_empty() {
            tracing::info!("the template rewrote earlier turns; the conversation is read again");
        }
        if fresh {
            self.forget(engine);
        }
        let done = engine.continue_sequence(&mut self.sequence, &request, on_text);
        let completion = match done {
            Ok(completion) if !completion.tokens.is_empty() => completion,
            // The prompt was not read to its end.
            other => {
                self.forget(engine);
                return other;
            }
        };
        self.rendered = full + &completion.text;
        self.history.extend(request.prompt.iter().chain(&completion.tokens));
        let ended = completion.tokens.last().is_some_and(|id| engine.pretrained().eos_token_ids().contains(id));
        self.pending = match completion.tokens.last() {
            Some(&id) if !ended => vec![id],
            _ => Vec::new(),
        };
        debug_assert!(ended || completion.finish != FinishReason::Stop);
        Ok(completion)
    }

    fn forget<D: Device>(&mut self, engine: &mut Engine<'_, D>) {
        engine.clear(&mut self.sequence);
        self.rendered.clear();
        self.pending.clear();
        self.history.clear();
    }
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: content.to_owned() }
}
