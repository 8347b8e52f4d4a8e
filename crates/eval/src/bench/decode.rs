//! Decoding and prefill of a whole model.

use crate::EvalError;
use crate::random_cache::RandomCache;
use dibit_cache::{CacheLayout, CalibratedScheme};
use dibit_device::{Device, Measure, Sweep};
use dibit_model::{Model, Pretrained, Workspace, argmax};
use dibit_runner::{Capacity, Executor, Models, Prefill, Runner};
use dibit_timing::{Samples, Spread, rounds};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeOptions {
    /// Cached tokens before the first one that is decoded; 0 is always there.
    pub depths: Vec<usize>,
    /// Sequences that are decoded at once.
    pub batch: usize,
    /// Tokens of the prompt whose prefill is timed; 0 leaves it out.
    pub prompt: usize,
    /// How it is read.
    pub prefill: Prefill,
    /// Tokens of each sequence that are decoded in a round.
    pub tokens: usize,
    /// Rounds that are counted.
    pub rounds: usize,
    /// Bytes that are read in every round besides, to measure how fast that is.
    pub sweep_bytes: usize,
}

impl DecodeOptions {
    /// Tokens by which a cache grows in all rounds.
    pub fn growth(&self) -> usize {
        (self.rounds + 1) * self.tokens
    }

    /// The longest context that is reached.
    pub fn longest(&self) -> usize {
        self.prompt.max(self.depths.iter().max().copied().unwrap_or(0) + self.growth())
    }
}

/// Figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DecodeBench {
    /// Name of the model.
    pub model: String,
    /// The device in words.
    pub device: String,
    /// Threads of the host; 0 where a GPU computes.
    pub threads: usize,
    /// Storage types of the weights.
    pub dtype: String,
    /// Bytes of weights that a decoding step reads.
    pub weight_bytes: usize,
    /// Sequences that are decoded at once.
    pub batch: usize,
    /// Tokens of the prompt.
    pub prompt: usize,
    /// How it was read, where there was one.
    pub prompt_read: Option<String>,
    /// Tokens of each sequence that are decoded in a round.
    pub tokens: usize,
    /// Rounds that are counted.
    pub rounds: usize,
    /// Bytes of other memory that are read in a round.
    pub sweep_bytes: usize,
    /// How fast memory is read, in 10^9 bytes per second.
    pub read_gb_per_s: Spread,
    /// One entry for each scheme; empty without a prompt.
    pub prefill: Vec<PrefillFigures>,
    /// One entry for each depth, the shallowest first.
    pub depths: Vec<DecodePoint>,
}

/// Prefill with one scheme, at depth 0.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PrefillFigures {
    /// Name of the scheme.
    pub scheme: String,
    /// Tokens of the prompt per second.
    pub tokens_per_s: Spread,
    /// The same, over that of the first scheme.
    pub over_first: Spread,
}

/// Schemes against each other at one depth.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DecodePoint {
    /// Tokens that are cached before the first round.
    pub depth: usize,
    /// One entry for each scheme.
    pub schemes: Vec<DecodeFigures>,
}

/// Decoding with one scheme at one depth. Ratios are of numbers of the same round.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DecodeFigures {
    /// Name of the scheme.
    pub scheme: String,
    /// Decoded tokens per second, those of all sequences together.
    pub tokens_per_s: Spread,
    /// The same, over that of the first scheme.
    pub over_first: Spread,
    /// The same, over that at depth 0.
    pub over_depth_0: Spread,
    /// Bytes that the cached tokens take at this depth, all layers and sequences together; each decoding step reads them.
    pub cache_bytes: usize,
    /// 10^9 bytes of weights and cache read per second.
    pub gb_per_s: Spread,
    /// Share of [`DecodeBench::read_gb_per_s`].
    pub share_of_read: Spread,
}

/// Times schemes against each other, all depths in the same rounds. Caches are filled with random keys and values, and
/// `begin` hears what is done next.
///
/// # Errors
/// [`EvalError`].
pub fn decode<D: Device + Measure>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    options: &DecodeOptions,
    mut begin: impl FnMut(String),
) -> Result<DecodeBench, EvalError> {
    let config = &pretrained.config;
    let mut models = Models::new(device, pretrained);
    let mut layouts = Vec::new();
    for scheme in schemes {
        let layout = pretrained.cache_layout(scheme)?;
        layouts.push((models.get(&layout)?, layout));
    }
    let sweep = device.sweep(options.sweep_bytes)?;
    let mut run = Run { device: &**device, logits: Vec::new(), sweep };
    let mut prefill = Vec::new();
    if options.prompt > 0 {
        begin("prefill".to_owned());
        prefill = run.prefill(&layouts, options)?;
    }
    let mut depths = options.depths.clone();
    depths.push(0);
    depths.sort_unstable();
    depths.dedup();
    let mut decoders = Vec::new();
    for &depth in &depths {
        for (model, layout) in &layouts {
            begin(format!("filling {} with {depth} tokens", layout.scheme_name()));
            let (batch, growth) = (options.batch, options.growth());
            let cache = RandomCache::new(run.device, layout.clone(), batch, depth, growth, model.arithmetic())?;
            decoders.push(Decoder {
                model: model.clone(),
                cache_bytes: cache.usage().used_bytes,
                workspace: Workspace::new(run.device, config, batch, batch)?,
                cache,
                next: vec![0; options.batch],
            });
        }
    }
    begin("decoding".to_owned());
    let seconds = rounds(options.rounds, 1 + decoders.len(), |contender| match contender.checked_sub(1) {
        None => Ok(run.read()),
        Some(index) => run.decode(&mut decoders[index], options.tokens),
    })?;
    let weight_bytes = pretrained.weights.bytes_per_token();
    let (read, seconds) = seconds.split_first().expect("the sweep is timed");
    let read = read.map(|seconds| run.sweep.bytes() as f64 / seconds / 1e9);
    let speeds: Vec<Samples> =
        seconds.iter().map(|own| own.map(|seconds| (options.batch * options.tokens) as f64 / seconds)).collect();
    let figures = |index: usize| {
        let (own, scheme) = (&decoders[index], index % schemes.len());
        let bytes = (weight_bytes + own.cache_bytes) as f64;
        let gb = speeds[index].map(|speed| speed / options.batch as f64 * bytes / 1e9);
        DecodeFigures {
            scheme: schemes[scheme].name.clone(),
            tokens_per_s: speeds[index].spread(),
            over_first: speeds[index].over(&speeds[index - scheme]).spread(),
            over_depth_0: speeds[index].over(&speeds[scheme]).spread(),
            cache_bytes: own.cache_bytes,
            gb_per_s: gb.spread(),
            share_of_read: gb.over(&read).spread(),
        }
    };
    let point = |(row, depth): (usize, &usize)| DecodePoint {
        depth: *depth,
        schemes: (row * schemes.len()..(row + 1) * schemes.len()).map(figures).collect(),
    };
    Ok(DecodeBench {
        model: pretrained.name.clone(),
        device: device.describe(),
        threads: device.threads(),
        dtype: pretrained.weights.formats(),
        weight_bytes,
        batch: options.batch,
        prompt: options.prompt,
        prompt_read: (options.prompt > 0).then(|| options.prefill.to_string()),
        tokens: options.tokens,
        rounds: options.rounds,
        sweep_bytes: run.sweep.bytes(),
        read_gb_per_s: read.spread(),
        prefill,
        depths: depths.iter().enumerate().map(point).collect(),
    })
}

/// What all contenders use in their turns.
struct Run<'a, D: Device + Measure> {
    device: &'a D,
    logits: Vec<f32>,
    sweep: Box<dyn Sweep>,
}

/// A model in the middle of some texts.
struct Decoder<D: Device> {
    model: Arc<Model<D>>,
    cache: RandomCache<D>,
    workspace: Workspace<D>,
    cache_bytes: usize,
    /// The token of each that comes next.
    next: Vec<u32>,
}

impl<D: Device + Measure> Run<'_, D> {
    fn read(&self) -> Duration {
        self.device.scope(|| self.sweep.read())
    }

    fn decode(&mut self, own: &mut Decoder<D>, tokens: usize) -> Result<Duration, EvalError> {
        let rows: Vec<usize> = (0..own.next.len()).collect();
        self.device.synchronize();
        let start = Instant::now();
        for _ in 0..tokens {
            let batch = own.cache.batch();
            own.model.forward(&mut own.workspace, &mut own.cache.cache, &batch, &own.next)?;
            own.model.logits(&mut own.workspace, &rows, &mut self.logits)?;
            let logits = self.logits.chunks_exact(own.model.config().vocab_size);
            own.next = logits.map(|logits| argmax(logits) as u32).collect();
            own.cache.advance(1);
        }
        Ok(start.elapsed())
    }

    fn prefill(
        &mut self,
        layouts: &[(Arc<Model<D>>, CacheLayout)],
        options: &DecodeOptions,
    ) -> Result<Vec<PrefillFigures>, EvalError> {
        let runner = |(model, layout): &(Arc<Model<D>>, CacheLayout)| {
            let rows = options.prefill.rows(options.prompt);
            let capacity = Capacity { rows, ..Capacity::of_one(layout, options.prompt, 1) };
            Runner::new(model.clone(), layout.clone(), capacity)
        };
        let mut runners = layouts.iter().map(runner).collect::<Result<Vec<_>, _>>()?;
        let seconds = rounds(options.rounds, layouts.len(), |index| {
            let runner = &mut runners[index];
            let vocab_size = runner.model().config().vocab_size;
            let ids: Vec<u32> = (0..options.prompt).map(|token| (token % vocab_size) as u32).collect();
            let mut sequence = runner.open()?;
            self.device.synchronize();
            let start = Instant::now();
            let mut rows = 0;
            for pass in options.prefill.passes(0..options.prompt) {
                rows = pass.len();
                runner.step(options.prefill.mode(), &mut [(&mut sequence, &ids[pass])])?;
            }
            runner.logits(&[rows - 1], &mut self.logits)?;
            let time = start.elapsed();
            runner.close(sequence);
            Ok::<_, EvalError>(time)
        })?;
        let figures = |((_, layout), own): (&(_, CacheLayout), &Samples)| PrefillFigures {
            scheme: layout.scheme_name().to_owned(),
            tokens_per_s: own.map(|seconds| options.prompt as f64 / seconds).spread(),
            over_first: seconds[0].over(own).spread(),
        };
        Ok(layouts.iter().zip(&seconds).map(figures).collect())
    }
}
