//! A request on its way.

use crate::logprobs::logprob;
use crate::output::Output;
use crate::scheduler::Kind;
use crate::{Completion, EngineError, FinishReason, Request, Sampler, SequenceId, Timings};
use dibit_cache::{Sequence, Usage};
use dibit_model::Pretrained;
use dibit_runner::Executor;
use std::sync::Arc;

/// A sequence, and how its tokens came in.
pub(crate) struct Held {
    pub sequence: Sequence,
    /// Tokens of prompts, those of each pass, and tokens that were generated one by one.
    pub history: Vec<(Kind, Vec<u32>)>,
}

/// A request that is not answered yet.
pub(crate) struct Active {
    /// The open sequence that it continues.
    pub held: Option<SequenceId>,
    /// Its sequence, once it runs.
    pub sequence: Option<Held>,
    prompt: Vec<u32>,
    /// Tokens of the prompt that were read.
    read: usize,
    pub sampler: Sampler,
    pub output: Output,
    /// How many of the most likely tokens are told beside each.
    pub logprobs: Option<usize>,
    /// What is told at the end.
    pub done: Completion,
}

impl Held {
    pub(crate) fn new(sequence: Sequence) -> Self {
        Held { sequence, history: Vec::new() }
    }
}

impl Active {
    pub(crate) fn new(
        pretrained: &Arc<Pretrained>,
        request: Request,
        held: Option<SequenceId>,
        sequence: Option<Held>,
    ) -> Self {
        let breakers = request.sampling.dry.breakers.clone();
        let own = pretrained.clone();
        let breaks = move |id| own.tokenizer.decode(&[id]).is_ok_and(|text| breakers.iter().any(|b| text.contains(b)));
        let context = [&request.history[..], &request.prompt].concat();
        Active {
            held,
            sequence,
            sampler: Sampler::new(request.sampling.clone(), request.stream, &context, breaks),
            output: Output::new(pretrained, &request),
            logprobs: request.logprobs,
            read: 0,
            done: Completion {
                text: String::new(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                finish: FinishReason::Cancelled,
                prompt_tokens: request.prompt.len(),
                timings: Timings::default(),
                usage: Usage::default(),
            },
            prompt: request.prompt,
        }
    }

    /// Gives it a sequence, where it has none.
    pub(crate) fn open(&mut self, executor: &mut dyn Executor) -> Result<(), EngineError> {
        if self.sequence.is_none() {
            self.sequence = Some(Held::new(executor.open()?));
        }
        Ok(())
    }

    /// Its sequence.
    ///
    /// # Panics
    /// If it has none.
    pub(crate) fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.sequence.as_mut().expect("a sequence that is open").sequence
    }

    /// Tokens that its sequence holds.
    pub(crate) fn len(&self) -> usize {
        self.sequence.as_ref().map_or(0, |own| own.sequence.len())
    }

    /// Whether the prompt was read.
    pub(crate) fn is_read(&self) -> bool {
        self.read == self.prompt.len()
    }

    /// The tokens that come next: of the prompt, or the last one that was generated.
    pub(crate) fn next(&self, rows: usize) -> &[u32] {
        match self.is_read() {
            false => &self.prompt[self.read..self.read + rows],
            true => &self.output.tokens[self.output.tokens.len() - 1..],
        }
    }

    /// Records that a pass has cached these tokens.
    pub(crate) fn advance(&mut self, kind: Kind, ids: Vec<u32>) {
        if kind == Kind::Prefill {
            self.read += ids.len();
        }
        let history = &mut self.sequence.as_mut().expect("a sequence that is open").history;
        match history.last_mut() {
            Some((Kind::Decode, all)) if kind == Kind::Decode => all.extend(ids),
            _ => history.push((kind, ids)),
        }
    }

    /// Chooses the next token by its logits; `None` where not all are finite.
    pub(crate) fn choose(&mut self, logits: &[f32]) -> Option<u32> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        let id = self.sampler.sample(logits);
        self.done.logprobs.extend(self.logprobs.map(|count| logprob(logits, id, count)));
        Some(id)
    }
}
