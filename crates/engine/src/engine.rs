//! The engine: a model, its cache and the sequences that run on them.

use crate::logprobs::logprob;
use crate::{Completion, EngineError, FinishReason, MemoryPlan, Options, Request, Sampler, StopFilter, Timings};
use dibit_cache::{CacheLayout, Scheme, Sequence, Usage};
use dibit_device::{Device, Mode};
use dibit_model::{Model, Pretrained, TextStream};
use dibit_runner::{Capacity, Runner};
use std::borrow::BorrowMut;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Runs sequences of one model under one scheme.
pub struct Engine<'a, D: Device> {
    pretrained: &'a Pretrained,
    runner: Runner<D>,
    options: Options,
    plan: MemoryPlan,
    logits: Vec<f32>,
}

/// A sequence that is being continued, owned or borrowed.
struct Active<'a, S> {
    index: usize,
    sequence: S,
    sampler: Sampler<'a>,
    stream: TextStream<'a>,
    stop: StopFilter,
    /// Stop strings that are special tokens.
    stop_ids: Vec<u32>,
    /// How many of the most likely tokens are told beside each.
    logprobs: Option<usize>,
    max_tokens: usize,
    /// Whether the text has ended, for the reason that `done` has.
    ended: bool,
    done: Completion,
}

impl<S: BorrowMut<Sequence>> Active<'_, S> {
    /// Passes text on, which may be empty; true where the caller has had enough.
    fn show(&mut self, text: &str, on_text: &mut impl FnMut(usize, &str) -> ControlFlow<()>) -> bool {
        self.done.text.push_str(text);
        on_text(self.index, text).is_break()
    }

    /// Ends the text; what was held back of it comes out.
    fn end(
        &mut self,
        reason: FinishReason,
        on_text: &mut impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let (mut text, stopped) = self.stop.push(&self.stream.finish()?);
        if !stopped {
            text += &self.stop.finish();
        }
        if !text.is_empty() {
            self.show(&text, on_text);
        }
        self.close(if stopped { FinishReason::Stop } else { reason });
        Ok(())
    }

    /// Ends the text as it stands.
    fn close(&mut self, reason: FinishReason) {
        self.ended = true;
        self.done.finish = reason;
    }
}

impl<'a, D: Device> Engine<'a, D> {
    /// Puts a model on a device and plans its cache.
    ///
    /// # Errors
    /// Those of [`Engine::with_model`], a scheme that does not suit the model, or a failed self-test of a transform of
    /// values.
    pub fn new(
        device: &Arc<D>,
        pretrained: &'a Pretrained,
        scheme: &Scheme,
        options: Options,
    ) -> Result<Self, EngineError> {
        let layout = pretrained.cache_layout(scheme)?;
        options.check(&pretrained.config)?;
        let model = Model::for_cache(device, &pretrained.config, &pretrained.weights, &layout)?;
        Self::with_model(pretrained, Arc::new(model), layout, options)
    }

    /// Plans a cache of this layout for a model of `pretrained` that is on the device already, and suits it
    /// ([`Model::variant`]).
    ///
    /// # Errors
    /// [`EngineError::ContextTooLong`], [`EngineError::NoRoom`], or a lack of memory.
    pub fn with_model(
        pretrained: &'a Pretrained,
        model: Arc<Model<D>>,
        layout: CacheLayout,
        options: Options,
    ) -> Result<Self, EngineError> {
        options.check(&pretrained.config)?;
        let config = &pretrained.config;
        let plan = MemoryPlan::new(config, &layout, options, &model.device().budget());
        let capacity = Capacity {
            blocks: plan.sequence_blocks * options.sequences,
            sequences: options.sequences,
            // A decoding step has a row for each sequence.
            rows: plan.pass_rows.max(options.sequences),
            outputs: options.sequences,
        };
        let runner = Runner::new(model, layout, capacity)?;
        Ok(Engine { pretrained, runner, options, plan, logits: Vec::new() })
    }

    /// The model with what belongs to it.
    pub fn pretrained(&self) -> &'a Pretrained {
        self.pretrained
    }

    /// The planned memory.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The layout of the cache.
    pub fn layout(&self) -> &CacheLayout {
        self.runner.layout()
    }

    /// The planned context in tokens.
    pub fn context(&self) -> usize {
        self.options.context
    }

    /// Begins an empty sequence, to be given back by [`Engine::close`].
    ///
    /// # Errors
    /// [`EngineError::Cache`] where all are in use.
    pub fn open(&mut self) -> Result<Sequence, EngineError> {
        Ok(self.runner.open()?)
    }

    /// Empties a sequence.
    pub fn clear(&mut self, sequence: &mut Sequence) {
        self.runner.clear(sequence);
    }

    /// Ends a sequence.
    pub fn close(&mut self, sequence: Sequence) {
        self.runner.close(sequence);
    }

    /// What a sequence takes in the cache.
    pub fn usage(&self, sequence: &Sequence) -> Usage {
        self.runner.usage(sequence)
    }

    /// Continues prompts, several at once where there is room and the rest as room comes free. `on_text` gets
    /// the text of each request as it comes and can end that request. Each answer is what the request gets alone.
    ///
    /// # Errors
    /// Those of [`Engine::check`] before anything runs, and failures of model or device. Sequences are given
    /// back either way.
    pub fn generate(
        &mut self,
        requests: &[Request],
        mut on_text: impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>, EngineError> {
        for request in requests {
            self.check(request, 0)?;
        }
        let mut waiting: VecDeque<usize> = (0..requests.len()).collect();
        let mut active: Vec<Active<Sequence>> = Vec::new();
        let mut finished: Vec<Option<Completion>> = requests.iter().map(|_| None).collect();
        let result = self.run(requests, &mut waiting, &mut active, &mut finished, &mut on_text);
        for left in active {
            self.runner.close(left.sequence);
        }
        result?;
        Ok(finished.into_iter().map(|done| done.expect("every request ran")).collect())
    }

    fn run(
        &mut self,
        requests: &[Request],
        waiting: &mut VecDeque<usize>,
        active: &mut Vec<Active<'a, Sequence>>,
        finished: &mut [Option<Completion>],
        on_text: &mut impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        while !(waiting.is_empty() && active.is_empty()) {
            while active.len() < self.options.sequences
                && let Some(index) = waiting.pop_front()
            {
                let sequence = self.runner.open()?;
                active.push(self.activate(index, sequence, &requests[index]));
                let new = active.len() - 1;
                self.prefill(&mut active[new], &requests[index].prompt, on_text)?;
            }
            self.step(active, on_text)?;
            let mut i = 0;
            while i < active.len() {
                if !active[i].ended {
                    i += 1;
                    continue;
                }
                let Active { index, sequence, done, .. } = active.remove(i);
                finished[index] = Some(done);
                self.runner.close(sequence);
            }
        }
        Ok(())
    }

    /// Continues a sequence by a prompt and the answer to it; the sequence keeps both. The last id of the answer
    /// is not cached: it belongs to the next prompt, unless it ended the text.
    ///
    /// # Errors
    /// As [`Engine::generate`]. A request that is refused leaves the sequence as it was; a pass that fails empties it.
    pub fn continue_sequence(
        &mut self,
        sequence: &mut Sequence,
        request: &Request,
        mut on_text: impl FnMut(&str) -> ControlFlow<()>,
    ) -> Result<Completion, EngineError> {
        self.check(request, sequence.len())?;
        let mut on_text = |_: usize, text: &str| on_text(text);
        let mut active = [self.activate(0, &mut *sequence, request)];
        let mut result = self.prefill(&mut active[0], &request.prompt, &mut on_text);
        while result.is_ok() && !active[0].ended {
            result = self.step(&mut active, &mut on_text);
        }
        let [Active { done, .. }] = active;
        if let Err(error) = result {
            self.runner.clear(sequence);
            return Err(error);
        }
        Ok(done)
    }

    /// Checks a request for a sequence that holds `cached` tokens.
    ///
    /// # Errors
    /// [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`], [`EngineError::PromptBeyondModel`],
    /// [`EngineError::Sampling`], [`EngineError::Bias`].
    pub fn check(&self, request: &Request, cached: usize) -> Result<(), EngineError> {
        request.sampling.validate(self.pretrained.config.vocab_size)?;
        if request.prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        let (prompt, context) = (cached + request.prompt.len(), self.options.context);
        let limit = self.pretrained.config.max_position_embeddings;
        if prompt > limit {
            Err(EngineError::PromptBeyondModel { prompt, limit })
        } else if prompt > context {
            Err(EngineError::PromptTooLong { prompt, context })
        } else {
            Ok(())
        }
    }

    fn activate<S>(&self, index: usize, sequence: S, request: &Request) -> Active<'a, S> {
        let tokenizer = &self.pretrained.tokenizer;
        let breakers = request.sampling.dry.breakers.clone();
        let breaks = move |id| tokenizer.decode(&[id]).is_ok_and(|text| breakers.iter().any(|b| text.contains(b)));
        let context = [&request.history[..], &request.prompt].concat();
        Active {
            index,
            sequence,
            sampler: Sampler::new(request.sampling.clone(), request.stream, &context, breaks),
            stream: tokenizer.stream(&request.prompt),
            stop: StopFilter::new(&request.stop),
            stop_ids: request.stop.iter().filter_map(|stop| tokenizer.special_token(stop)).collect(),
            logprobs: request.logprobs,
            max_tokens: request.max_tokens,
            ended: false,
            done: Completion {
                text: String::new(),
                tokens: Vec::new(),
                logprobs: Vec::new(),
                finish: FinishReason::Cancelled,
                prompt_tokens: request.prompt.len(),
                timings: Timings::default(),
                usage: Usage::default(),
            },
        }
    }

    /// Feeds the prompt in passes and takes the first token.
    fn prefill<S: BorrowMut<Sequence>>(
        &mut self,
        active: &mut Active<'a, S>,
        prompt: &[u32],
        on_text: &mut impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let start = Instant::now();
        let passes = prompt.len().div_ceil(self.plan.pass_rows);
        if passes > 1 {
            tracing::info!(
                "a prompt of {} tokens is prefilled in {passes} passes of up to {} tokens; each attends exactly to itself and \
                 through the cache to those before it",
                prompt.len(),
                self.plan.pass_rows
            );
        }
        for chunk in prompt.chunks(self.plan.pass_rows) {
            if active.show("", on_text) {
                return active.end(FinishReason::Cancelled, on_text);
            }
            self.pass(&mut [(active.sequence.borrow_mut(), chunk)])?;
        }
        if active.max_tokens == 0 {
            active.done.timings.prefill = start.elapsed();
            active.end(FinishReason::Length, on_text)?;
        } else {
            let last = (prompt.len() - 1) % self.plan.pass_rows;
            let next = self.choose(&mut [&mut *active], &[last])?[0];
            active.done.timings.prefill = start.elapsed();
            self.take(active, next, on_text)?;
        }
        active.done.usage = self.usage(active.sequence.borrow());
        Ok(())
    }

    /// Decodes one token of each sequence that has not ended.
    fn step<S: BorrowMut<Sequence>>(
        &mut self,
        active: &mut [Active<'a, S>],
        on_text: &mut impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        let mut running: Vec<&mut Active<'a, S>> = active.iter_mut().filter(|active| !active.ended).collect();
        if running.is_empty() {
            return Ok(());
        }
        let start = Instant::now();
        let mut rows: Vec<(&mut Sequence, &[u32])> = Vec::new();
        for active in &mut running {
            let last = active.done.tokens.len() - 1;
            rows.push((active.sequence.borrow_mut(), &active.done.tokens[last..]));
        }
        self.pass(&mut rows)?;
        let outputs: Vec<usize> = (0..running.len()).collect();
        let chosen = self.choose(&mut running, &outputs)?;
        let elapsed = start.elapsed();
        for (active, next) in running.into_iter().zip(chosen) {
            active.done.timings.decode += elapsed;
            self.take(active, next, on_text)?;
            active.done.usage = self.usage(active.sequence.borrow());
        }
        Ok(())
    }

    /// The next token of each of some sequences, whose last rows of the pass are `rows`. Where all decode greedily, the
    /// device finds it.
    fn choose<S: BorrowMut<Sequence>>(
        &mut self,
        running: &mut [&mut Active<'a, S>],
        rows: &[usize],
    ) -> Result<Vec<u32>, EngineError> {
        let chosen: Vec<Option<u32>> =
            if running.iter().all(|active| active.sampler.is_greedy() && active.logprobs.is_none()) {
                self.runner.outputs().most_likely(rows)?
            } else {
                self.runner.outputs().logits(rows, &mut self.logits)?;
                let logits = self.logits.chunks_exact(self.pretrained.config.vocab_size);
                let sample = |(active, logits): (&mut &mut Active<'a, S>, &[f32])| {
                    logits.iter().all(|logit| logit.is_finite()).then(|| {
                        let id = active.sampler.sample(logits);
                        active.done.logprobs.extend(active.logprobs.map(|count| logprob(logits, id, count)));
                        id
                    })
                };
                running.iter_mut().zip(logits).map(sample).collect()
            };
        let number = |(active, id): (&&mut Active<'a, S>, Option<u32>)| {
            id.ok_or_else(|| EngineError::NotFinite { position: active.sequence.borrow().len() })
        };
        running.iter().zip(chosen).map(number).collect()
    }

    /// One forward pass over the new tokens of some sequences.
    fn pass(&mut self, rows: &mut [(&mut Sequence, &[u32])]) -> Result<(), EngineError> {
        self.runner.step(Mode::Chunk, rows)?;
        Ok(())
    }

    /// Takes the next token of a sequence and decides whether it goes on.
    fn take<S: BorrowMut<Sequence>>(
        &self,
        active: &mut Active<'a, S>,
        id: u32,
        on_text: &mut impl FnMut(usize, &str) -> ControlFlow<()>,
    ) -> Result<(), EngineError> {
        active.done.tokens.push(id);
        if self.pretrained.stop_token_ids.contains(&id) || active.stop_ids.contains(&id) {
            return active.end(FinishReason::Stop, on_text);
        }
        let piece = active.stream.push(id)?;
        let (text, stopped) = active.stop.push(&piece);
        let cancelled = active.show(&text, on_text);
        if stopped {
            active.close(FinishReason::Stop);
            Ok(())
        } else if cancelled {
            active.end(FinishReason::Cancelled, on_text)
        } else if active.done.tokens.len() >= active.max_tokens {
            active.end(FinishReason::Length, on_text)
        } else if active.sequence.borrow().len() >= self.options.context {
            active.end(FinishReason::Context, on_text)
        } else {
            Ok(())
        }
    }
}
