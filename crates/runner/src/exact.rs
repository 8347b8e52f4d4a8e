use crate::{Capacity, Executor, Runner};
use dibit_cache::{CalibratedScheme, Mode};
use dibit_device::Device;
use dibit_model::{Model, ModelConfig, ModelError, Observer, Weights};
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

    /// Runs a text from its first position on, and shows queries, keys and values of every layer and row.
    ///
    /// # Errors
    /// Those of [`Runner::observe`].
    pub fn run(&mut self, ids: &[u32], observer: &mut Observer) -> Result<(), ModelError> {
        let mut sequence = self.runner.open()?;
        let result = self.runner.observe(Mode::Chunk, &mut sequence, ids, observer);
        self.runner.close(sequence);
        result
    }
}
