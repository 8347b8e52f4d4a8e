/// A measurement while adapters were trained.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measurement {
    /// Steps done.
    pub step: usize,
    /// Mean loss of the steps since the measurement before; cross-entropy and, where the recipe has it, the weighted error
    /// of outputs. 0 at the first.
    pub loss: f32,
    /// Mean held-out divergence of attention rows, in nats.
    pub divergence: f32,
    /// The same without a correction.
    pub uncorrected: f32,
}

impl Measurement {
    /// Its numbers, as a file holds them.
    pub(crate) fn numbers(&self) -> [f32; 4] {
        [self.step as f32, self.loss, self.divergence, self.uncorrected]
    }

    /// Measurements from their numbers; `None` where these are not whole.
    pub(crate) fn from_numbers(numbers: &[f32]) -> Option<Vec<Self>> {
        let (all, []) = numbers.as_chunks::<4>() else { return None };
        let measurement = |[step, loss, divergence, uncorrected]: &[f32; 4]| Measurement {
            step: *step as usize,
            loss: *loss,
            divergence: *divergence,
            uncorrected: *uncorrected,
        };
        Some(all.iter().map(measurement).collect())
    }
}

/// What training found, on text that it did not train on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Training {
    /// The recipe in words.
    pub recipe: String,
    /// Kullback-Leibler divergence of attention rows from the exact ones without a correction, in nats, by layer and query
    /// head; empty for layers without a correction.
    pub before: Vec<Vec<f32>>,
    /// The same with the trained correction; heads where it is not lower were switched off.
    pub after: Vec<Vec<f32>>,
    /// The course of training, from its start on.
    pub course: Vec<Measurement>,
}

impl Training {
    /// Whether the correction of a query head is better than none.
    pub fn improves(&self, layer: usize, head: usize) -> bool {
        self.after[layer][head] < self.before[layer][head]
    }

    /// Mean divergence of a layer without a correction and with what is left of it where heads are switched off; `None`
    /// for a layer without one.
    pub fn layer(&self, layer: usize) -> Option<(f32, f32)> {
        let (before, after) = (&self.before[layer], &self.after[layer]);
        let mean = |values: &mut dyn Iterator<Item = f32>| values.sum::<f32>() / before.len() as f32;
        let kept = &mut before.iter().zip(after).map(|(before, after)| before.min(*after));
        (!before.is_empty()).then(|| (mean(&mut before.iter().copied()), mean(kept)))
    }
}
