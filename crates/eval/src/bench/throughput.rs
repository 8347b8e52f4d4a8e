//! Generation of whole batches: how many tokens a second come out, and how many sequences fit into memory.

use crate::EvalError;
use crate::made_up::calibrated;
use dibit_cache::{CacheLayout, CalibratedScheme, Mode, Sequence};
use dibit_device::{Device, DeviceError, Measure};
use dibit_model::{Model, ModelError, Pretrained, pass_bytes};
use dibit_runner::{Capacity, Executor, Prefill, Runner};
use serde::Serialize;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Tokens that are generated before the clock starts.
const WARM_UP: usize = 2;

/// Sequences at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BatchSize {
    /// So many.
    Number(usize),
    /// As many as memory holds.
    Max,
}

impl FromStr for BatchSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "max" => Ok(BatchSize::Max),
            number => match number.parse() {
                Ok(number) if (1..=1 << 16).contains(&number) => Ok(BatchSize::Number(number)),
                _ => {
                    Err("a batch is a number from 1 to 65536, or max for as many sequences as memory holds".to_owned())
                }
            },
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThroughputOptions {
    /// Batches.
    pub batches: Vec<BatchSize>,
    /// Tokens of the prompt of each sequence.
    pub prompt: usize,
    /// Tokens that are generated for each.
    pub generate: usize,
    /// Prompt tokens of several sequences that are read in one pass; one sequence may have more.
    pub prefill_rows: usize,
    /// How the prompt of each is read.
    pub prefill: Prefill,
    /// Bytes that are free on the host, for a device without memory of its own.
    pub host_bytes: usize,
    /// Whether schemes get a made-up calibration where they have none and can use one.
    pub made_up: bool,
}

/// Figures of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThroughputBench {
    /// Name of the model.
    pub model: String,
    /// The device in words.
    pub device: String,
    /// Storage types of the weights.
    pub dtype: String,
    /// Bytes of the weights.
    pub weight_bytes: usize,
    /// Bytes of memory that there are, for weights, caches and activations.
    pub memory_bytes: usize,
    /// Tokens of the prompt of each sequence.
    pub prompt: usize,
    /// How it was read.
    pub prompt_read: String,
    /// Prompt tokens of several sequences that were read in one pass.
    pub prefill_rows: usize,
    /// Tokens that are generated for each.
    pub generate: usize,
    /// One entry for each scheme.
    pub schemes: Vec<ThroughputScheme>,
}

/// One scheme at all batches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThroughputScheme {
    /// Name of the scheme.
    pub scheme: String,
    /// Bytes of the cache of one sequence once all tokens are generated.
    pub sequence_bytes: usize,
    /// By ascending batch.
    pub points: Vec<ThroughputPoint>,
    /// The smallest batch that did not fit.
    pub out_of_memory: Option<OutOfMemory>,
    /// The largest batch that fits, where it was looked for.
    pub largest: Option<usize>,
}

/// A batch that did not fit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct OutOfMemory {
    /// Sequences at once; 0 where weights did not fit.
    pub batch: usize,
    /// What could not be had.
    pub reason: String,
}

/// One scheme at one batch.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ThroughputPoint {
    /// Sequences at once.
    pub batch: usize,
    /// Seconds from the prompts to the first token of each sequence.
    pub prefill_seconds: f64,
    /// Seconds of all further tokens.
    pub decode_seconds: f64,
    /// Tokens per second of decoding: all but the first one of each sequence.
    pub decode_tokens_per_s: f64,
    /// Generated tokens per second, prompts included in the time.
    pub tokens_per_s: f64,
    /// The most bytes in use: all that is in use on a device with memory of its own, others' included; else what weights,
    /// cache and activations were planned to take.
    pub peak_bytes: usize,
}

impl ThroughputScheme {
    /// The figures at a batch.
    pub fn at(&self, batch: usize) -> Option<&ThroughputPoint> {
        self.points.iter().find(|point| point.batch == batch)
    }
}

/// Generates for every scheme and batch, greedily, and without an end before the last token. A batch that does not fit
/// into memory ends those of its scheme, `largest` apart. `told` hears what was measured so far, and what is done next.
///
/// # Errors
/// [`EvalError`], but for a lack of memory.
pub fn throughput<D: Device + Measure>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    options: &ThroughputOptions,
    mut told: impl FnMut(&ThroughputBench, String),
) -> Result<ThroughputBench, EvalError> {
    let config = &pretrained.config;
    let mut bench = ThroughputBench {
        model: pretrained.name.clone(),
        device: device.describe(),
        dtype: pretrained.weights.formats(),
        weight_bytes: pretrained.weights.num_bytes(),
        memory_bytes: device.memory().map_or(options.host_bytes + pretrained.weights.num_bytes(), |own| own.total),
        prompt: options.prompt,
        prompt_read: options.prefill.to_string(),
        prefill_rows: options.prefill_rows,
        generate: options.generate,
        schemes: Vec::new(),
    };
    let mut layouts = Vec::new();
    for scheme in schemes {
        let made_up = options.made_up && scheme.calibration.is_none();
        let made_up = made_up.then(|| calibrated(scheme, config.cache_shape(), config.num_attention_heads));
        layouts.push(pretrained.cache_layout(made_up.as_ref().unwrap_or(scheme))?);
    }
    for layout in layouts {
        let name = layout.scheme_name().to_owned();
        bench.schemes.push(ThroughputScheme {
            scheme: name.clone(),
            sequence_bytes: layout.planned_bytes(options.prompt + options.generate),
            points: Vec::new(),
            out_of_memory: None,
            largest: None,
        });
        told(&bench, format!("{name}: weights"));
        // One model at a time: a GPU may not hold two.
        let model = Model::for_cache(device, config, &pretrained.weights, &layout);
        let own = bench.schemes.len() - 1;
        let model = match model {
            Ok(model) => model,
            Err(error) => {
                bench.schemes[own].out_of_memory = Some(out_of_memory(error.into(), 0)?);
                continue;
            }
        };
        let ladder =
            Ladder { device: &**device, model: Arc::new(model), layout, options, weight_bytes: bench.weight_bytes };
        let mut batches: Vec<usize> = options.batches.iter().filter_map(|size| size.number()).collect();
        batches.sort_unstable();
        batches.dedup();
        for batch in batches {
            told(&bench, format!("{name}: batch {batch}"));
            match ladder.run(batch) {
                Ok(point) => bench.schemes[own].points.push(point),
                Err(error) => {
                    bench.schemes[own].out_of_memory = Some(out_of_memory(error, batch)?);
                    break;
                }
            }
        }
        if options.batches.contains(&BatchSize::Max) {
            let figures = bench.schemes[own].clone();
            let figures = ladder.largest(figures, |batch| told(&bench, format!("{name}: batch {batch}")))?;
            bench.schemes[own] = figures;
        }
    }
    told(&bench, String::new());
    Ok(bench)
}

impl BatchSize {
    fn number(self) -> Option<usize> {
        if let BatchSize::Number(number) = self { Some(number) } else { None }
    }
}

/// What a batch lacked; every other error is one.
fn out_of_memory(error: EvalError, batch: usize) -> Result<OutOfMemory, EvalError> {
    match &error {
        EvalError::Device(reason) | EvalError::Model(ModelError::Device(reason)) if reason.is_out_of_memory() => {
            Ok(OutOfMemory { batch, reason: reason.to_string() })
        }
        _ => Err(error),
    }
}

/// One scheme on its way through the batches.
struct Ladder<'a, D: Device + Measure> {
    device: &'a D,
    model: Arc<Model<D>>,
    layout: CacheLayout,
    options: &'a ThroughputOptions,
    weight_bytes: usize,
}

impl<D: Device + Measure> Ladder<'_, D> {
    /// Rows of the largest pass.
    fn pass_rows(&self, batch: usize) -> usize {
        let own = self.options.prefill.rows(self.options.prompt);
        self.options.prefill_rows.max(own).min(batch * own).max(batch)
    }

    /// Bytes of caches and activations.
    fn planned_bytes(&self, batch: usize) -> usize {
        let config = self.model.config();
        let cache = self.layout.planned_bytes(self.options.prompt + self.options.generate);
        batch * cache + pass_bytes(config, self.pass_rows(batch), batch, &self.device.budget())
    }

    /// Bytes that caches and activations may take.
    fn free_bytes(&self) -> usize {
        self.device.memory().map_or(self.options.host_bytes, |own| own.free)
    }

    /// A batch that has begun and is empty again: what there is to compile and to warm is done.
    fn start(&self, batch: usize) -> Result<Run<'_, D>, EvalError> {
        let planned = self.planned_bytes(batch);
        // The host may promise memory that it does not have; a GPU says what it lacks.
        if self.device.memory().is_none() && planned > self.free_bytes() {
            return Err(DeviceError::OutOfMemory { what: "caches and activations", bytes: planned }.into());
        }
        let mut run = Run::new(self, batch)?;
        run.generate(WARM_UP.min(self.options.generate))?;
        run.clear();
        Ok(run)
    }

    fn run(&self, batch: usize) -> Result<ThroughputPoint, EvalError> {
        let mut run = self.start(batch)?;
        let (prefill, decode) = run.generate(self.options.generate)?;
        let (prefill_seconds, decode_seconds) = (prefill.as_secs_f64(), decode.as_secs_f64());
        let further = batch * (self.options.generate - 1);
        Ok(ThroughputPoint {
            batch,
            prefill_seconds,
            decode_seconds,
            decode_tokens_per_s: if further == 0 { 0.0 } else { further as f64 / decode_seconds },
            tokens_per_s: (batch * self.options.generate) as f64 / (prefill_seconds + decode_seconds),
            peak_bytes: match self.device.memory() {
                Some(own) => own.total - own.free,
                None => self.weight_bytes + self.planned_bytes(batch),
            },
        })
    }

    /// Adds the figures of the largest batch: what is planned to fit, or else what halving finds between that and the
    /// largest one that ran, to within the last few sequences.
    fn largest(
        &self,
        mut figures: ThroughputScheme,
        mut begin: impl FnMut(usize),
    ) -> Result<ThroughputScheme, EvalError> {
        let mut fits = figures.points.last().map_or(0, |point| point.batch);
        let mut most = self.planned_largest(fits);
        if let Some(lack) = &figures.out_of_memory {
            most = most.min(lack.batch.saturating_sub(1));
        }
        while most > fits {
            let (mut low, mut next) = (fits, most);
            let mut high = most + 1;
            while next > low {
                begin(next);
                match self.start(next) {
                    Ok(_) => low = next,
                    Err(error) => {
                        figures.out_of_memory = Some(out_of_memory(error, next)?);
                        high = next;
                    }
                }
                next = if high - low <= 1 + high / 32 { low } else { low + (high - low) / 2 };
            }
            if low == fits {
                break;
            }
            match self.run(low) {
                Ok(point) => {
                    figures.points.push(point);
                    (fits, most) = (low, low);
                }
                // It began, and did not end.
                Err(error) => {
                    figures.out_of_memory = Some(out_of_memory(error, low)?);
                    most = low - 1;
                }
            }
        }
        figures.largest = Some(fits);
        Ok(figures)
    }

    /// The largest batch that is planned to fit; at least `fits`, which does.
    fn planned_largest(&self, fits: usize) -> usize {
        let free = self.free_bytes();
        let (mut low, mut high) = (fits, free / self.layout.planned_bytes(1).max(1));
        while low < high {
            let middle = low + (high - low).div_ceil(2);
            if self.planned_bytes(middle) <= free { low = middle } else { high = middle - 1 }
        }
        low
    }
}

/// Some sequences that are generated together.
struct Run<'a, D: Device + Measure> {
    device: &'a D,
    runner: Runner<D>,
    sequences: Vec<Sequence>,
    prompt: usize,
    prefill: Prefill,
    /// Sequences whose prompts are read together.
    together: usize,
}

impl<'a, D: Device + Measure> Run<'a, D> {
    fn new(ladder: &'a Ladder<'_, D>, batch: usize) -> Result<Self, EvalError> {
        let Ladder { device, model, layout, options, .. } = ladder;
        let blocks = batch * layout.blocks(options.prompt + options.generate);
        let capacity = Capacity { blocks, sequences: batch, rows: ladder.pass_rows(batch), outputs: batch };
        let mut runner = Runner::new(model.clone(), layout.clone(), capacity)?;
        let sequences = (0..batch).map(|_| runner.open()).collect::<Result<_, _>>()?;
        let together = (options.prefill_rows / options.prefill.rows(options.prompt)).max(1);
        Ok(Run { device, runner, sequences, prompt: options.prompt, prefill: options.prefill, together })
    }

    /// Empties the sequences.
    fn clear(&mut self) {
        self.sequences.iter_mut().for_each(|sequence| self.runner.clear(sequence));
    }

    /// Reads the prompts and generates so many tokens; the time of both.
    fn generate(&mut self, tokens: usize) -> Result<(Duration, Duration), EvalError> {
        self.device.synchronize();
        let start = Instant::now();
        let mut next = self.prefill()?;
        let prefill = start.elapsed();
        for _ in 1..tokens {
            let rows: Vec<usize> = (0..next.len()).collect();
            self.pass(Mode::Chunk, 0..next.len(), &next, 1)?;
            next = self.most_likely(&rows)?;
        }
        Ok((prefill, start.elapsed() - prefill))
    }

    /// Reads the prompts, as many in a pass as there is room for; the first token of each.
    fn prefill(&mut self) -> Result<Vec<u32>, EvalError> {
        let vocab_size = self.runner.model().config().vocab_size;
        let mut first = Vec::new();
        for begin in (0..self.sequences.len()).step_by(self.together) {
            let group = begin..self.sequences.len().min(begin + self.together);
            for tokens in self.prefill.passes(0..self.prompt) {
                let id = |sequence: usize, token: usize| ((sequence * 31 + token) % vocab_size) as u32;
                let ids: Vec<u32> =
                    group.clone().flat_map(|sequence| tokens.clone().map(move |token| id(sequence, token))).collect();
                let count = tokens.len();
                self.pass(self.prefill.mode(), group.clone(), &ids, count)?;
                if tokens.end == self.prompt {
                    let rows: Vec<usize> = (1..=group.len()).map(|place| place * count - 1).collect();
                    first.extend(self.most_likely(&rows)?);
                }
            }
        }
        Ok(first)
    }

    /// A pass of `count` new tokens of each of some sequences.
    fn pass(&mut self, mode: Mode, group: Range<usize>, ids: &[u32], count: usize) -> Result<(), EvalError> {
        let mut rows: Vec<(&mut Sequence, &[u32])> = self.sequences[group].iter_mut().zip(ids.chunks(count)).collect();
        self.runner.step(mode, &mut rows)?;
        Ok(())
    }

    fn most_likely(&mut self, rows: &[usize]) -> Result<Vec<u32>, EvalError> {
        let tokens = self.runner.most_likely(rows)?;
        let scheme = || self.runner.layout().scheme_name().to_owned();
        tokens.into_iter().map(|token| token.ok_or_else(|| EvalError::NotFinite { scheme: scheme() })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_a_number_or_the_largest() {
        assert_eq!(" 64".parse(), Ok(BatchSize::Number(64)));
        assert_eq!("max".parse(), Ok(BatchSize::Max));
        for text in ["", "0", "-1", "65537", "most", "1.5"] {
            assert!(text.parse::<BatchSize>().unwrap_err().contains("max"), "{text}");
        }
    }
}
