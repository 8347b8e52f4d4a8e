//! The learning rate of a step.

use super::recipe::{RateSchedule, Recipe};
use super::training::Measurement;

/// Measurements in a row without a lower divergence after which a plateau is over.
const PATIENCE: usize = 2;

/// What the rate falls to at the end of a plateau, as a share.
const FACTOR: f32 = 0.1;

/// The learning rate of step `step`, counted from 0, after these measurements.
pub(crate) fn rate(recipe: &Recipe, step: usize, measurements: &[Measurement]) -> f32 {
    match recipe.schedule {
        RateSchedule::Constant => recipe.rate,
        RateSchedule::Cosine => {
            let turn = std::f64::consts::PI * step as f64 / recipe.steps as f64;
            (f64::from(recipe.rate) * 0.5 * (1.0 + turn.cos())) as f32
        }
        RateSchedule::Plateau => {
            let (mut rate, mut least, mut waited) = (recipe.rate, f32::INFINITY, 0);
            for measurement in measurements {
                waited += 1;
                if measurement.divergence < least {
                    (least, waited) = (measurement.divergence, 0);
                } else if waited >= PATIENCE {
                    (rate, waited) = (rate * FACTOR, 0);
                }
            }
            rate
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe(schedule: RateSchedule) -> Recipe {
        Recipe { steps: 10, rate: 1.0, schedule, ..Recipe::default() }
    }

    fn of(schedule: RateSchedule, step: usize, divergences: &[f32]) -> f32 {
        let measurement = |(step, divergence): (usize, &f32)| Measurement {
            step,
            loss: 0.0,
            divergence: *divergence,
            uncorrected: 9.0,
        };
        let measurements: Vec<Measurement> = divergences.iter().enumerate().map(measurement).collect();
        rate(&recipe(schedule), step, &measurements)
    }

    #[test]
    fn rates_follow_their_schedule() {
        assert_eq!(of(RateSchedule::Constant, 9, &[1.0, 2.0, 3.0]), 1.0);
        assert_eq!(of(RateSchedule::Cosine, 0, &[]), 1.0);
        assert!((of(RateSchedule::Cosine, 5, &[]) - 0.5).abs() < 1e-6);
        assert!(of(RateSchedule::Cosine, 9, &[]) < 0.03);
        assert_eq!(of(RateSchedule::Plateau, 9, &[3.0, 2.0, 1.0, 1.5]), 1.0);
        assert_eq!(of(RateSchedule::Plateau, 9, &[3.0, 2.0, 2.5, 2.0]), 0.1);
        assert_eq!(of(RateSchedule::Plateau, 9, &[3.0, 4.0, 4.0, 2.0, 2.0, 2.0]), 0.1 * 0.1);
    }
}
