use crate::{Model, ModelConfig, ModelError, Observer, Weights, Workspace};
use dibit_cache::{CacheManager, Scheme};
use dibit_device::{Batch, Device, Mode};

/// Runs single texts as exact prefills, to look at what passes through attention.
pub struct ExactPass<D: Device> {
    model: Model<D>,
    manager: CacheManager,
    store: D::Store,
    workspace: Workspace<D>,
}

impl<D: Device> ExactPass<D> {
    /// Room for texts of up to `context` tokens.
    ///
    /// # Errors
    /// [`ModelError::Device`] where memory is short.
    pub fn new(device: &D, config: &ModelConfig, weights: &Weights, context: usize) -> Result<Self, ModelError> {
        let scheme = Scheme::load("fp16").expect("a built-in scheme");
        let layout = config.cache_layout(&scheme).expect("16 bit suits every model");
        let blocks = layout.window.blocks(context);
        Ok(ExactPass {
            model: Model::new(device, config, weights)?,
            store: device.store(&layout, blocks, 1, context)?,
            workspace: Workspace::new(device, config, context, 1)?,
            manager: CacheManager::new(layout, blocks, 1),
        })
    }

    /// Runs a text from its first position on, and shows queries, keys and values of every layer and row.
    ///
    /// # Errors
    /// Those of [`Model::observe`].
    ///
    /// # Panics
    /// If the text is longer than there is room for.
    pub fn run(&mut self, device: &D, ids: &[u32], observer: &mut Observer) -> Result<(), ModelError> {
        let mut sequence = self.manager.open().expect("no other sequence is open");
        self.manager.reserve(&mut sequence, ids.len()).expect("room for the text");
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(&sequence, ids.len(), self.manager.layout().window);
        let result = self.model.observe(device, &mut self.workspace, &mut self.store, &batch, ids, observer);
        self.manager.close(sequence);
        result
    }
}
