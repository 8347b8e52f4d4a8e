//! The steps of a training.

use super::batches::Order;
use super::layer_pass::Sums;
use super::recipe::Recipe;
use super::schedule::rate;
use super::state::Progressed;
use super::trainer::Trainer;
use super::training::{Measurement, Training};
use crate::CalibrationError;
use dibit_cache::Adapters;
use dibit_device::{DeviceError, Train};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Measurements in the course of a training, about, besides the first.
const MEASUREMENTS: usize = 10;

/// The sequences of a training.
pub(crate) struct Material<'a> {
    pub sequences: &'a [Vec<u32>],
    pub held_out: &'a [Vec<u32>],
}

/// Sees a training at every sequence.
pub(crate) trait Watch<D: Train> {
    /// Sequences of the next step that are done; says whether to go on.
    fn watch(&mut self, progressed: &Progressed, sequences: usize) -> ControlFlow<()>;

    /// Comes after every step.
    fn after_step(&mut self, trainer: &Trainer<D>, progressed: &Progressed) -> Result<(), CalibrationError>;
}

/// Adapters of all layers that have some, and what was found on the way.
pub(crate) type Outcome = (Vec<Option<Adapters>>, Training);

/// Trains from where `progressed` stands; `None` where `watch` broke it off, with `progressed` at the last whole step.
pub(crate) fn train<D: Train>(
    device: &Arc<D>,
    trainer: &mut Trainer<D>,
    material: &Material,
    recipe: &Recipe,
    (seed, context): (u64, usize),
    progressed: &mut Progressed,
    watch: &mut dyn Watch<D>,
) -> Result<Option<Outcome>, CalibrationError> {
    let batch = recipe.sequences(context);
    let mut order = Order::new(material.sequences.len(), seed);
    let every = recipe.steps.div_ceil(MEASUREMENTS).max(1);
    loop {
        let steps = progressed.steps;
        let last = steps == recipe.steps;
        let known = progressed.course.last().is_some_and(|last| last.step == steps);
        if last || (steps.is_multiple_of(every) && !known) {
            let mut sums = trainer.sums();
            for (at, ids) in material.held_out.iter().enumerate() {
                if watch.watch(progressed, 0).is_break() {
                    return Ok(None);
                }
                trainer.measure(ids, at, &mut sums)?;
            }
            progressed.measured(&sums);
            if last {
                return Ok(Some(finish(device, trainer, recipe, &sums, progressed)?));
            }
        }
        trainer.clear();
        let mut sums = trainer.sums();
        for index in 0..batch {
            if watch.watch(progressed, index).is_break() {
                return Ok(None);
            }
            let at = steps * batch + index;
            trainer.add(&material.sequences[order.sequence(at)], at, &mut sums)?;
        }
        let loss = loss(&sums, recipe);
        let moved = trainer.step(rate(recipe, steps, &progressed.course), steps + 1, &sums);
        if !moved || !loss.is_finite() {
            return Err(CalibrationError::Diverged { step: steps });
        }
        progressed.steps += 1;
        progressed.losses[0] += loss;
        progressed.losses[1] += 1.0;
        watch.after_step(trainer, progressed)?;
    }
}

/// The mean over layers, heads and rows of a sum by heads.
fn mean(sums: &[Sums], of: impl Fn(&Sums) -> &Vec<f64>) -> f64 {
    let (mut sum, mut count) = (0.0, 0);
    for own in sums.iter().filter(|own| own.rows > 0) {
        sum += of(own).iter().sum::<f64>();
        count += own.rows * of(own).len();
    }
    sum / count as f64
}

fn loss(sums: &[Sums], recipe: &Recipe) -> f64 {
    mean(sums, |own| &own.cross_entropy) + f64::from(recipe.output_weight) * mean(sums, |own| &own.output)
}

impl Progressed {
    /// Notes a measurement.
    fn measured(&mut self, sums: &[Sums]) {
        let step = self.steps;
        self.course.retain(|own| own.step < step);
        let [sum, count] = std::mem::take(&mut self.losses);
        self.course.push(Measurement {
            step,
            loss: (sum / count.max(1.0)) as f32,
            divergence: mean(sums, |own| &own.divergence) as f32,
            uncorrected: mean(sums, |own| &own.uncorrected) as f32,
        });
    }
}

fn finish<D: Train>(
    device: &Arc<D>,
    trainer: &Trainer<D>,
    recipe: &Recipe,
    sums: &[Sums],
    progressed: &Progressed,
) -> Result<Outcome, DeviceError> {
    let means = |own: &Sums, of: &Vec<f64>| -> Vec<f32> {
        of.iter().filter(|_| own.rows > 0).map(|sum| (sum / own.rows as f64) as f32).collect()
    };
    let training = Training {
        recipe: recipe.to_string(),
        before: sums.iter().map(|own| means(own, &own.uncorrected)).collect(),
        after: sums.iter().map(|own| means(own, &own.divergence)).collect(),
        course: progressed.course.clone(),
    };
    let adapters = trainer.layers.iter().enumerate().map(|(layer, adapter)| {
        let Some(adapter) = adapter else { return Ok(None) };
        let mut adapters = adapter.finish(device)?;
        for (head, gate) in adapters.gates.iter_mut().enumerate() {
            if !training.improves(layer, head) {
                *gate = 0.0;
            }
        }
        Ok(Some(adapters))
    });
    Ok((adapters.collect::<Result<_, DeviceError>>()?, training))
}
