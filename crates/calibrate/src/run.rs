//! Running a model on a text to calibrate a scheme.

use crate::gathered::Gathered;
use crate::linear::{Material, Outcome, Progressed, Recipe, Trainer, Watch, load, pack, save, train};
use crate::progress::Kept;
use crate::{Artefact, CalibrationError, Fingerprint, Source, planes};
use dibit_cache::{CalibratedScheme, Calibration, Linear, Pool, Scheme};
use dibit_device::Train;
use dibit_model::{ModelConfig, Observation, Pretrained};
use dibit_runner::ExactPass;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Between two writes of the state.
const SAVE_EVERY: Duration = Duration::from_secs(30);

/// Most sequences that are held out of a text.
const MOST_HELD_OUT: usize = 16;

/// How a calibration is made.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Tokens of a sequence.
    pub context: usize,
    /// Tokens that statistics are gathered from, rounded up to whole sequences; `None` for as many as the text fills.
    pub tokens: Option<usize>,
    /// Seed of random rotations, starts and orders.
    pub seed: u64,
    /// Where the state is kept while it runs, so that it can go on after it was stopped.
    pub state: Option<PathBuf>,
    /// How adapters are trained, where the scheme has some.
    pub recipe: Recipe,
    /// Share of the sequences, the last ones, that training is measured on and does not see; where the text holds none
    /// out by itself.
    pub held_out: f32,
}

/// A tokenised text.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Text {
    /// Its documents.
    pub documents: Vec<Vec<u32>>,
    /// Documents that training is measured on and does not see; empty where some of the others are to be held out.
    pub held_out: Vec<Vec<u32>>,
}

/// What a calibration is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Gathering statistics.
    Gathering,
    /// Training adapters.
    Training,
}

/// How far a calibration is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// Sequences done in this phase; one that is run several times counts each time.
    pub done: usize,
    /// Sequences of this phase in all, as far as they can be counted.
    pub sequences: usize,
    /// Steps of training that are done.
    pub steps: usize,
    /// Mean loss of the last steps of training.
    pub loss: Option<f64>,
    /// Mean held-out divergence of attention rows without a correction, and with it when it was last measured.
    pub divergence: Option<[f32; 2]>,
}

impl Progress {
    fn gathering(done: usize, sequences: usize) -> Self {
        Progress { phase: Phase::Gathering, done, sequences, steps: 0, loss: None, divergence: None }
    }
}

/// The sequences of a text, and the first of those that are held out.
struct Sequences {
    all: Vec<Vec<u32>>,
    held_out: usize,
}

impl Sequences {
    fn new(text: &Text, bos: Option<u32>, options: &Options, trained: bool) -> Result<Self, CalibrationError> {
        let context = options.context;
        let mut all = pack(&text.documents, bos, context);
        let count = options.tokens.map(|tokens| tokens.div_ceil(context));
        let needed = if trained && text.held_out.is_empty() { 2 } else { 1 };
        let needed = if trained { needed } else { count.unwrap_or(needed) };
        let too_short = |documents: &[Vec<u32>], sequences: usize| CalibrationError::TextTooShort {
            tokens: documents.iter().map(Vec::len).sum(),
            needed: (context - bos.iter().len()).saturating_mul(sequences),
        };
        if all.len() < needed {
            return Err(too_short(&text.documents, needed));
        }
        if !trained {
            all.truncate(needed.max(count.unwrap_or(all.len())));
            let held_out = all.len();
            return Ok(Sequences { all, held_out });
        }
        if text.held_out.is_empty() {
            let share = (all.len() as f64 * f64::from(options.held_out)).round() as usize;
            let held_out = all.len() - share.clamp(1, MOST_HELD_OUT.min(all.len() - 1));
            return Ok(Sequences { all, held_out });
        }
        let mut own = pack(&text.held_out, bos, context);
        if own.is_empty() {
            return Err(too_short(&text.held_out, 1));
        }
        own.truncate(MOST_HELD_OUT);
        let held_out = all.len();
        all.extend(own);
        Ok(Sequences { all, held_out })
    }

    fn material(&self) -> Material<'_> {
        let (sequences, held_out) = self.all.split_at(self.held_out);
        Material { sequences, held_out }
    }
}

/// Where the state is kept, and when it was.
struct Keeper<'a> {
    kept: &'a Kept,
    saved: Instant,
    /// Whether it could not be written.
    gave_up: bool,
}

impl<'a> Keeper<'a> {
    fn new(kept: &'a Kept) -> Self {
        Keeper { kept, saved: Instant::now(), gave_up: false }
    }

    /// Writes the state where it is due. A run whose state cannot be written goes on without one.
    fn save_if_due(
        &mut self,
        save: impl FnOnce(&Kept) -> Result<(), CalibrationError>,
    ) -> Result<(), CalibrationError> {
        if self.gave_up || self.saved.elapsed() <= SAVE_EVERY {
            return Ok(());
        }
        self.gave_up = !written(save(self.kept))?;
        self.saved = Instant::now();
        Ok(())
    }
}

/// Whether a state was written; that it cannot be is said, and is no reason to stop.
fn written(result: Result<(), CalibrationError>) -> Result<bool, CalibrationError> {
    let Err(CalibrationError::Write { path, source }) = result else { return result.map(|()| true) };
    tracing::warn!(
        "cannot write {}: {source}; the calibration goes on, and begins again if it is stopped",
        path.display()
    );
    Ok(false)
}

/// Sequences that a calibration runs before any training, or that take as long, where statistics are gathered from so many.
pub fn passes(scheme: &Scheme, config: &ModelConfig, gathered: usize) -> usize {
    // What `planes::fit` runs: a few for ranges, and for each side of each layer three times, of half the tokens, the layers
    // behind it.
    let ranges = if scheme.has_planes() || scheme.protects_small_values() { 4 } else { 0 };
    let measured = scheme.has_planes() && scheme.planes.pool != Pool::Head;
    gathered + ranges + if measured { 2 * config.num_hidden_layers } else { 0 }
}

/// Runs a model over a tokenised text, as exact prefills of `context` tokens, and makes what the scheme needs: statistics
/// first, then adapters. `None` where `progress` broke it off; the state is then in its file, and the same call goes on
/// from there.
///
/// The result depends on nothing but the model, the scheme, the text and the options.
///
/// # Errors
/// [`CalibrationError`].
pub fn calibrate<D: Train>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    scheme: &Scheme,
    text: &Text,
    options: &Options,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Artefact>, CalibrationError> {
    if !scheme.takes_calibration() {
        return Err(CalibrationError::NotNeeded(scheme.origin.clone()));
    }
    let config = &pretrained.config;
    let (context, limit) = (options.context, config.max_position_embeddings);
    if !(2..=limit).contains(&context) {
        return Err(CalibrationError::Context { context, limit });
    }
    let layout = scheme.plan(&config.cache_model())?;
    let linear = scheme.linear();
    let sequences = Sequences::new(text, pretrained.window_bos, options, linear.is_some())?;
    let recipe = linear.map(|_| &options.recipe);
    let kept = Kept {
        path: options.state.clone(),
        fingerprint: Fingerprint::new(pretrained, scheme),
        source: Source::new(&sequences.all, sequences.held_out, options, recipe),
    };
    let mut gathered = Gathered::new(&layout, scheme);
    let (done, saved) = kept.load(&mut gathered)?;
    let mut keeper = Keeper::new(&kept);
    if !gather(device, pretrained, &sequences, options, scheme, done, &mut gathered, &mut keeper, &mut progress)? {
        return Ok(None);
    }
    let mut layers = gathered.finish(&layout, options.seed)?;
    let count = gather_count(scheme, &sequences, options);
    if scheme.has_planes() || scheme.protects_small_values() {
        let statistics = gathered.plane_statistics();
        let all = passes(scheme, config, count);
        let runs =
            |done: usize, runs: usize| progress(Progress::gathering(count + done * (all - count) / runs.max(1), all));
        let windows = &sequences.all[..count];
        if !planes::fit(device, pretrained, scheme, windows, &statistics, &mut layers, runs)? {
            // What a training that was stopped had done stays as it is.
            if linear.is_none() || saved.is_none() {
                kept.save(count, &gathered, |_| Ok(()))?;
            }
            return Ok(None);
        }
    }
    let mut training = None;
    if let Some(Linear { features, .. }) = linear {
        let calibration = scheme.is_calibrated().then(|| Arc::new(Calibration { layers: layers.clone() }));
        let layout = config.cache_layout(&CalibratedScheme { scheme: scheme.clone(), calibration })?;
        let (recipe, seed) = (&options.recipe, options.seed);
        let mut trainer = Trainer::new(device, pretrained, layout, features, recipe, seed, context)?;
        let resumed = saved.map(|contents| load(&contents, &**device, &mut trainer)).transpose();
        let resumed = resumed.map_err(|problem| kept.unusable(problem))?.flatten();
        if resumed.is_none() {
            trainer.start(&sequences.all[0])?;
        }
        let mut progressed = resumed.unwrap_or_default();
        if progressed.steps > recipe.steps {
            return Err(kept.unusable("it has more steps than the recipe".into()));
        }
        let material = sequences.material();
        let mut watcher = Watcher {
            device,
            keeper,
            gathered: (count, &gathered),
            batch: recipe.sequences(context),
            steps: recipe.steps,
            progress: &mut progress,
        };
        let times = (seed, context);
        let outcome = train(device, &mut trainer, &material, recipe, times, &mut progressed, &mut watcher)?;
        let Some(outcome) = outcome else {
            kept.save(count, &gathered, |contents| Ok(save(contents, &**device, &trainer, &progressed)?))?;
            return Ok(None);
        };
        let (adapters, found): Outcome = outcome;
        for (layer, adapters) in layers.iter_mut().zip(adapters) {
            layer.adapters = adapters;
        }
        training = Some(found);
    }
    let source = kept.source.words();
    Ok(Some(Artefact { fingerprint: kept.fingerprint, source, calibration: Calibration { layers }, training }))
}

/// Sequences that statistics are gathered from.
fn gather_count(scheme: &Scheme, sequences: &Sequences, options: &Options) -> usize {
    let most = options.tokens.map_or(usize::MAX, |tokens| tokens.div_ceil(options.context));
    if scheme.is_calibrated() || scheme.protects_small_values() { sequences.held_out.min(most) } else { 0 }
}

/// Gathers statistics from the sequences behind the first `done`; says whether it came to the end.
#[allow(clippy::too_many_arguments)]
fn gather<D: Train>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    sequences: &Sequences,
    options: &Options,
    scheme: &Scheme,
    done: usize,
    gathered: &mut Gathered,
    keeper: &mut Keeper,
    progress: &mut impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<bool, CalibrationError> {
    let config = &pretrained.config;
    let count = gather_count(scheme, sequences, options);
    if done >= count {
        return Ok(true);
    }
    let mut pass = ExactPass::new(device, config, &pretrained.weights, options.context)?;
    let layout = scheme.plan(&config.cache_model())?;
    let inv_freq = config.inv_freq();
    let all = passes(scheme, config, count);
    for (index, ids) in sequences.all[..count].iter().enumerate().skip(done) {
        if progress(Progress::gathering(index, all)).is_break() {
            keeper.kept.save(index, gathered, |_| Ok(()))?;
            return Ok(false);
        }
        keeper.save_if_due(|kept| kept.save(index, gathered, |_| Ok(())))?;
        pass.run(ids, &mut |seen: Observation| gathered.add(seen, &layout, &inv_freq))?;
        if let Some(layer) = gathered.broken_layer() {
            return Err(CalibrationError::NotFinite { layer });
        }
    }
    gathered.set_powers(pass.powers());
    Ok(true)
}

/// Tells how far a training is, and keeps its state.
struct Watcher<'a, D, F> {
    device: &'a Arc<D>,
    keeper: Keeper<'a>,
    /// Sequences that statistics were gathered from, and these.
    gathered: (usize, &'a Gathered),
    batch: usize,
    steps: usize,
    progress: &'a mut F,
}

impl<D: Train, F: FnMut(Progress) -> ControlFlow<()>> Watch<D> for Watcher<'_, D, F> {
    fn watch(&mut self, progressed: &Progressed, sequences: usize) -> ControlFlow<()> {
        let [loss, count] = progressed.losses;
        let before = progressed.course.last();
        (self.progress)(Progress {
            phase: Phase::Training,
            done: progressed.steps * self.batch + sequences,
            sequences: self.steps * self.batch,
            steps: progressed.steps,
            loss: if count > 0.0 {
                Some(loss / count)
            } else {
                before.filter(|own| own.step > 0).map(|own| own.loss.into())
            },
            divergence: before.map(|own| [own.uncorrected, own.divergence]),
        })
    }

    fn after_step(&mut self, trainer: &Trainer<D>, progressed: &Progressed) -> Result<(), CalibrationError> {
        let (device, (done, gathered)) = (self.device, self.gathered);
        self.keeper.save_if_due(|kept| {
            kept.save(done, gathered, |contents| Ok(save(contents, &**device, trainer, progressed)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_cannot_be_written_is_no_reason_to_stop() {
        let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert!(!written(Err(CalibrationError::Write { path: "x.partial".into(), source: full })).unwrap());
        assert!(written(Ok(())).unwrap());
        assert!(matches!(
            written(Err(CalibrationError::Diverged { step: 3 })),
            Err(CalibrationError::Diverged { step: 3 })
        ));
    }
}
