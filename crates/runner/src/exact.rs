use crate::{Capacity, Executor, Runner, replaying};
use dibit_cache::{CalibratedScheme, Mode, Powers};
use dibit_device::Device;
use dibit_model::{Model, ModelConfig, ModelError, Observation, Observer, Weights};
use std::sync::Arc;

/// Runs single texts as exact prefills, to look at what passes through attention.
pub struct ExactPass<D: Device> {
    runner: Runner<D>,
}

impl<D: Device> ExactPass<D> {
    /// Room for texts of up to `context` tokens.
    ///
    /// # Errors
    /// [`ModelError::Device`] where memory is short.
    pub fn new(device: &Arc<D>, config: &ModelConfig, weights: &Weights, context: usize) -> Result<Self, ModelError> {
        let layout = config.cache_layout(&CalibratedScheme::load("fp16")?)?;
        let capacity = Capacity::of_one(&layout, context, 1);
        let model = Arc::new(Model::new(device, config, weights)?);
        Ok(ExactPass { runner: Runner::new(model, layout, capacity)? })
    }

    /// What the heads of each layer had to be divided by so far to be stored in fp16.
    pub fn powers(&self) -> &[Powers] {
        self.runner.powers()
    }

    /// Runs a text from its first position on, and shows queries, keys and values of every layer and row, once.
    ///
    /// # Errors
    /// Those of [`Runner::observe`].
    pub fn run(&mut self, ids: &[u32], observer: &mut Observer) -> Result<(), ModelError> {
        let mut shown = 0;
        replaying(|| {
            let mut sequence = self.runner.open()?;
            let mut count = 0;
            let result = self.runner.observe(Mode::Chunk, &mut sequence, ids, &mut |seen: Observation| {
                count += 1;
                // A text that is run again shows what it has shown.
                if count > shown {
                    observer(seen);
                }
            });
            self.runner.close(sequence);
            shown = shown.max(count);
            result
        })
    }
}
