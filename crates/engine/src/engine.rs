//! The engine: requests on the sequences of one model, one pass at a time.

use crate::active::{Active, Held};
use crate::scheduler::{Job, Kind, Limits, Part, Pass, Scheduler};
use crate::{Completion, EngineError, Event, FinishReason, MemoryPlan, Options, Request, RequestId, SequenceId};
use dibit_cache::{CacheLayout, CalibratedScheme, Mode, Sequence, Usage};
use dibit_device::Device;
use dibit_model::{Model, Pretrained};
use dibit_runner::{Executor, Runner};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Runs requests of one model under one scheme. Each answer is what its request gets alone: bit for bit on a CPU, and on a GPU
/// as far as its linear layers compute rows alike (docs/internals.md, "What can be relied on").
pub struct Engine {
    pretrained: Arc<Pretrained>,
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    options: Options,
    plan: MemoryPlan,
    /// Requests that are not answered yet.
    pub(crate) active: BTreeMap<u64, Active>,
    /// Sequences that are open; `None` where a request is on its way.
    held: BTreeMap<u64, Option<Held>>,
    /// What has happened and was not told yet.
    pub(crate) events: VecDeque<Event>,
    /// The next request, or sequence.
    next: u64,
    /// Whether it was told how prompts are read.
    noted: bool,
    logits: Vec<f32>,
}

/// The next token of a request; the number of tokens before it where not all of its logits are finite.
type Chosen = (u64, Result<u32, usize>);

impl Engine {
    /// Puts a model on a device and plans its cache.
    ///
    /// # Errors
    /// Those of [`Engine::with_model`], a scheme that does not suit the model, or a failed self-test of a transform of
    /// values.
    pub fn new<D: Device + 'static>(
        device: &Arc<D>,
        pretrained: Arc<Pretrained>,
        scheme: &CalibratedScheme,
        options: Options,
    ) -> Result<Self, EngineError> {
        // Before the model is put on the device.
        options.check(&pretrained.config)?;
        let layout = pretrained.cache_layout(scheme)?;
        let model = Model::for_cache(device, &pretrained.config, &pretrained.weights, &layout)?;
        Self::with_model(pretrained, Arc::new(model), layout, options)
    }

    /// Plans a cache of this layout for a model of `pretrained` that is on its device already, and suits it
    /// ([`Model::variant`]).
    ///
    /// # Errors
    /// [`EngineError::ContextTooLong`], [`EngineError::NoRoom`], [`EngineError::Cell`], or a lack of memory.
    pub fn with_model<D: Device + 'static>(
        pretrained: Arc<Pretrained>,
        model: Arc<Model<D>>,
        layout: CacheLayout,
        options: Options,
    ) -> Result<Self, EngineError> {
        options.check(&pretrained.config)?;
        let plan = MemoryPlan::new(&pretrained.config, &layout, options, &model.device().budget());
        let executor = Box::new(Runner::new(model, layout, plan.capacity(options))?);
        Self::with_executor(pretrained, executor, plan, options)
    }

    /// An engine on something that runs passes, which has the room that was planned ([`MemoryPlan::capacity`]).
    ///
    /// # Errors
    /// Those of [`Options::check`].
    pub fn with_executor(
        pretrained: Arc<Pretrained>,
        executor: Box<dyn Executor>,
        plan: MemoryPlan,
        options: Options,
    ) -> Result<Self, EngineError> {
        options.check(&pretrained.config)?;
        let Options { sequences, prefill, .. } = options;
        let limits = Limits { sequences, blocks: plan.blocks, shared_rows: plan.shared_rows, prefill };
        Ok(Engine {
            pretrained,
            executor,
            scheduler: Scheduler::new(limits),
            options,
            plan,
            active: BTreeMap::new(),
            held: BTreeMap::new(),
            events: VecDeque::new(),
            next: 0,
            noted: false,
            logits: Vec::new(),
        })
    }

    /// The model with what belongs to it.
    pub fn pretrained(&self) -> &Arc<Pretrained> {
        &self.pretrained
    }

    /// The planned memory.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The layout of the cache.
    pub fn layout(&self) -> &CacheLayout {
        self.executor.layout()
    }

    /// What it was planned for.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Begins an empty sequence that outlives its requests, to be given back by [`Engine::close`]. It takes what a sequence of
    /// the whole context may need.
    ///
    /// # Errors
    /// [`EngineError::Cache`] where all are in use.
    pub fn open(&mut self) -> Result<SequenceId, EngineError> {
        if !self.scheduler.hold(self.plan.sequence_blocks) {
            return Err(dibit_cache::CacheError::TooManySequences { capacity: self.options.sequences }.into());
        }
        let held = match self.executor.open() {
            Ok(sequence) => Held::new(sequence),
            Err(error) => {
                self.scheduler.release(self.plan.sequence_blocks);
                return Err(error.into());
            }
        };
        let id = self.number();
        self.held.insert(id, Some(held));
        Ok(SequenceId(id))
    }

    /// Empties a sequence. Nothing happens to one that is busy.
    pub fn clear(&mut self, id: SequenceId) {
        if let Some(Some(own)) = self.held.get_mut(&id.0) {
            self.executor.clear(&mut own.sequence);
            own.history.clear();
        }
    }

    /// Ends a sequence. A request on it is cancelled.
    pub fn close(&mut self, id: SequenceId) {
        let request = self.active.iter().find(|(_, own)| own.held == Some(id)).map(|(request, _)| RequestId(*request));
        if let Some(request) = request {
            self.cancel(request);
        }
        if let Some(Some(own)) = self.held.remove(&id.0) {
            self.executor.close(own.sequence);
            self.scheduler.release(self.plan.sequence_blocks);
        }
    }

    /// What a sequence takes in the cache; nothing while it is busy.
    pub fn usage(&self, id: SequenceId) -> Usage {
        self.idle(id).map_or(Usage::default(), |own| self.executor.usage(&own.sequence))
    }

    /// Tokens that a sequence holds; none while it is busy.
    pub fn len(&self, id: SequenceId) -> usize {
        self.idle(id).map_or(0, |own| own.sequence.len())
    }

    /// Whether all requests are answered.
    pub fn is_idle(&self) -> bool {
        self.active.is_empty() && self.events.is_empty()
    }

    /// Whether all requests that are left wait for sequences that are open: one of these must be closed.
    pub fn is_stuck(&self) -> bool {
        self.events.is_empty() && self.scheduler.is_stuck()
    }

    fn idle(&self, id: SequenceId) -> Option<&Held> {
        self.held.get(&id.0)?.as_ref()
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Checks a request for a sequence that holds `cached` tokens.
    ///
    /// # Errors
    /// [`EngineError::EmptyPrompt`], [`EngineError::PromptTooLong`], [`EngineError::PromptBeyondModel`],
    /// [`EngineError::Sampling`], [`EngineError::Bias`], [`EngineError::Model`] for ids that are no tokens.
    pub fn check(&self, request: &Request, cached: usize) -> Result<(), EngineError> {
        let vocab_size = self.pretrained.config.vocab_size;
        request.sampling.validate(vocab_size)?;
        if request.prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if let Some(&id) = request.prompt.iter().find(|id| **id as usize >= vocab_size) {
            return Err(dibit_model::ModelError::TokenId { id, vocab_size }.into());
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

    /// Adds a request, which gets a sequence of its own once there is room for it.
    ///
    /// # Errors
    /// Those of [`Engine::check`].
    pub fn submit(&mut self, request: Request) -> Result<RequestId, EngineError> {
        self.check(&request, 0)?;
        let most = (request.prompt.len().saturating_add(request.max_tokens)).min(self.options.context);
        let blocks = self.layout().blocks(most);
        Ok(self.begin(request, None, blocks))
    }

    /// Adds a request that continues an open sequence, which keeps prompt and answer. The last id of the answer is not
    /// cached: it belongs to the next prompt, unless it ended the text.
    ///
    /// # Errors
    /// Those of [`Engine::check`], [`EngineError::Busy`] and [`EngineError::Closed`]; the sequence is then as it was. A
    /// request that fails later empties it.
    pub fn submit_to(&mut self, id: SequenceId, request: Request) -> Result<RequestId, EngineError> {
        let held = self.held.get(&id.0).ok_or(EngineError::Closed)?;
        let cached = held.as_ref().ok_or(EngineError::Busy)?.sequence.len();
        self.check(&request, cached)?;
        Ok(self.begin(request, Some(id), 0))
    }

    fn begin(&mut self, request: Request, held: Option<SequenceId>, blocks: usize) -> RequestId {
        let id = self.number();
        let own = held.and_then(|held| self.held.get_mut(&held.0)?.take());
        let cached = own.as_ref().map_or(0, |own| own.sequence.len());
        let is_held = held.is_some();
        if let Some(note) = self.options.prefill.note(cached..cached + request.prompt.len()).filter(|_| !self.noted) {
            self.noted = true;
            tracing::info!("{note}");
        }
        self.scheduler.submit(Job { id, cached, prompt: request.prompt.len(), blocks, is_held });
        self.active.insert(id, Active::new(&self.pretrained, request, held, own));
        RequestId(id)
    }

    /// Takes a request out. What was answered so far, or `None` for one that is answered already.
    pub fn cancel(&mut self, id: RequestId) -> Option<Completion> {
        let own = self.active.get_mut(&id.0)?;
        self.events.retain(|event| event.request() != id);
        // A text that cannot be decoded any more is not the caller's concern.
        own.output.end(&self.pretrained, FinishReason::Cancelled).ok();
        Some(self.end(id.0, FinishReason::Cancelled))
    }

    /// Admits requests, or runs a pass, and says what has happened. A failure ends the request that it belongs to. Nothing
    /// happens where all requests that are left wait for sequences that are open ([`Engine::is_stuck`]).
    pub fn step(&mut self) -> Vec<Event> {
        let begin = |id| Event::Text { request: RequestId(id), text: String::new() };
        self.events.extend(self.scheduler.admit().into_iter().map(begin));
        if self.events.is_empty()
            && let Some(pass) = self.scheduler.due()
        {
            let start = Instant::now();
            let chosen = self.run(&pass);
            self.scheduler.done(&pass);
            for (id, chosen) in chosen {
                self.take(id, pass.kind, start.elapsed(), chosen);
            }
        }
        self.events.drain(..).collect()
    }

    /// Runs a pass; the token that each part chose, `None` for one that is not at its end.
    fn run(&mut self, pass: &Pass) -> Vec<(u64, Result<Option<u32>, EngineError>)> {
        let by_part = |chosen: Vec<Chosen>| -> Vec<(u64, Result<Option<u32>, EngineError>)> {
            let find = |id: u64| chosen.iter().find(|(other, _)| *other == id).map(|(_, chosen)| *chosen);
            let own = |part: &Part| match find(part.id) {
                None => Ok(None),
                Some(Ok(token)) => Ok(Some(token)),
                Some(Err(position)) => Err(EngineError::NotFinite { position }),
            };
            pass.parts.iter().map(|part| (part.id, own(part))).collect()
        };
        let error = match self.run_again_where_wanted(pass.kind, &pass.parts) {
            Ok(chosen) => return by_part(chosen),
            Err(error) => error,
        };
        if let [only] = &pass.parts[..] {
            return vec![(only.id, Err(error))];
        }
        // Whose fault it was is not known, and all their windows are damaged: each is read again, and goes on alone.
        tracing::warn!("a pass of {} sequences failed ({error}); each is run again by itself", pass.parts.len());
        let alone = |part: &Part| {
            let own = std::slice::from_ref(part);
            let chosen = self.replay(part.id).and_then(|()| self.run_again_where_wanted(pass.kind, own));
            match chosen.map(|all| all.first().map(|(_, chosen)| *chosen)) {
                Err(error) => (part.id, Err(error)),
                Ok(None) => (part.id, Ok(None)),
                Ok(Some(Ok(token))) => (part.id, Ok(Some(token))),
                Ok(Some(Err(position))) => (part.id, Err(EngineError::NotFinite { position })),
            }
        };
        pass.parts.iter().map(alone).collect()
    }

    /// [`Engine::run_parts`], behind a replay of its sequences where the cache has learnt that numbers of the model are beyond
    /// fp16: that is no fault of a request.
    fn run_again_where_wanted(&mut self, kind: Kind, parts: &[Part]) -> Result<Vec<Chosen>, EngineError> {
        let mut result = self.run_parts(kind, parts);
        while let Err(EngineError::Model(error)) = &result
            && error.wants_replay()
        {
            tracing::warn!("{error}");
            let replayed = parts.iter().try_for_each(|part| self.replay(part.id));
            result = replayed.and_then(|()| self.run_parts(kind, parts));
        }
        result
    }

    /// One pass over the next tokens of some requests, and the next token of each that is at its end.
    fn run_parts(&mut self, kind: Kind, parts: &[Part]) -> Result<Vec<Chosen>, EngineError> {
        let Engine { pretrained, executor, active, options, logits, .. } = self;
        let mode = if kind == Kind::Prefill { options.prefill.mode() } else { Mode::Chunk };
        let mut own: Vec<(&mut Active, &Part)> =
            active.iter_mut().filter_map(|(id, own)| Some((own, parts.iter().find(|part| part.id == *id)?))).collect();
        for (own, _) in &mut own {
            own.open(&mut **executor)?;
        }
        let new: Vec<Vec<u32>> = own.iter().map(|(own, part)| own.next(part.rows).to_vec()).collect();
        let mut rows: Vec<(&mut Sequence, &[u32])> =
            own.iter_mut().zip(&new).map(|((own, _), new)| (own.sequence_mut(), &new[..])).collect();
        executor.step(mode, &mut rows)?;
        let mut ends = Vec::new();
        let mut row = 0;
        for (index, part) in own.iter().map(|(_, part)| part).enumerate() {
            row += part.rows;
            if part.chooses && !own[index].0.output.is_full() {
                ends.push((index, row - 1));
            }
        }
        let outputs: Vec<usize> = ends.iter().map(|(_, row)| *row).collect();
        let is_greedy = |own: &Active| own.sampler.is_greedy() && own.logprobs.is_none();
        let chosen: Vec<Option<u32>> = if outputs.is_empty() {
            Vec::new()
        } else if ends.iter().all(|(index, _)| is_greedy(own[*index].0)) {
            executor.most_likely(&outputs)?
        } else {
            executor.logits(&outputs, logits)?;
            let rows = logits.chunks_exact(pretrained.config.vocab_size);
            ends.iter().zip(rows).map(|((index, _), logits)| own[*index].0.choose(logits)).collect()
        };
        for ((own, _), new) in own.iter_mut().zip(new) {
            own.advance(kind, new);
        }
        let number = |((index, _), token): (&(usize, usize), Option<u32>)| {
            let (own, part) = &own[*index];
            (part.id, token.ok_or(own.len()))
        };
        Ok(ends.iter().zip(chosen).map(number).collect())
    }

    /// Computes the cache of a request's sequence once more, from what was read and what was generated.
    fn replay(&mut self, id: u64) -> Result<(), EngineError> {
        let Engine { executor, active, options, .. } = self;
        let Some(own) = active.get_mut(&id).and_then(|own| own.sequence.as_mut()) else { return Ok(()) };
        executor.clear(&mut own.sequence);
        for (kind, ids) in &own.history {
            let (mode, rows) = match kind {
                Kind::Prefill => (options.prefill.mode(), ids.len()),
                Kind::Decode => (Mode::Chunk, 1),
            };
            for ids in ids.chunks(rows) {
                executor.step(mode, &mut [(&mut own.sequence, ids)])?;
            }
        }
        Ok(())
    }

    /// Goes on with a request behind a pass.
    fn take(&mut self, id: u64, kind: Kind, time: Duration, chosen: Result<Option<u32>, EngineError>) {
        let request = RequestId(id);
        let Some(own) = self.active.get_mut(&id) else { return };
        let timings = &mut own.done.timings;
        match kind {
            Kind::Prefill => timings.prefill += time,
            Kind::Decode => timings.decode += time,
        }
        let chosen = match chosen {
            Ok(chosen) => chosen,
            Err(error) => return self.fail(id, error),
        };
        let Some(token) = chosen else {
            // Read in part, or no token is asked for.
            self.events.push_back(Event::Text { request, text: String::new() });
            if own.is_read() {
                self.finish_with(id, FinishReason::Length);
            }
            return;
        };
        let is_last = own.len() >= self.options.context;
        match own.output.push(&self.pretrained, token, is_last) {
            Ok((text, ended)) => {
                self.events.push_back(Event::Text { request, text });
                if let Some(reason) = ended {
                    let done = self.end(id, reason);
                    self.events.push_back(Event::Done { request, completion: done });
                }
            }
            Err(error) => self.fail(id, error),
        }
    }

    fn finish_with(&mut self, id: u64, reason: FinishReason) {
        let completion = self.end(id, reason);
        self.events.push_back(Event::Done { request: RequestId(id), completion });
    }

    fn fail(&mut self, id: u64, error: EngineError) {
        if let Some(own) = self.active.get_mut(&id).and_then(|own| own.sequence.as_mut()) {
            // A pass that failed half-way has overwritten parts of the window.
            self.executor.clear(&mut own.sequence);
            own.history.clear();
        }
        self.end(id, FinishReason::Cancelled);
        self.events.push_back(Event::Failed { request: RequestId(id), error });
    }

    /// Takes a request out and gives its sequence back.
    fn end(&mut self, id: u64, reason: FinishReason) -> Completion {
        self.scheduler.remove(id);
        let Active { held, sequence, output, mut done, .. } = self.active.remove(&id).expect("a request that is there");
        if let Some(own) = sequence {
            done.usage = self.executor.usage(&own.sequence);
            match held.and_then(|held| self.held.get_mut(&held.0)) {
                Some(place) => *place = Some(own),
                None => self.executor.close(own.sequence),
            }
        }
        done.finish = reason;
        (done.text, done.tokens) = (output.text, output.tokens);
        done
    }
}
