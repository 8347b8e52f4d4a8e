use dibit_cache::CacheLayout;
use dibit_device::Device;
use dibit_model::{Model, ModelError, Pretrained};
use std::sync::Arc;

/// Models of the same weights. Schemes that transform values alike share one; those of others share all matrices on the
/// device, but for the value and output projections that differ.
pub struct Models<'a, D: Device> {
    device: &'a Arc<D>,
    pretrained: &'a Pretrained,
    made: Vec<Arc<Model<D>>>,
}

impl<'a, D: Device> Models<'a, D> {
    /// None yet.
    pub fn new(device: &'a Arc<D>, pretrained: &'a Pretrained) -> Self {
        Models { device, pretrained, made: Vec::new() }
    }

    /// The device that they are on.
    pub fn device(&self) -> &Arc<D> {
        self.device
    }

    /// The model that computes values as this cache takes them.
    ///
    /// # Errors
    /// Those of [`Model::for_cache`].
    pub fn get(&mut self, layout: &CacheLayout) -> Result<Arc<Model<D>>, ModelError> {
        if let Some(model) = self.made.iter().find(|model| model.suits(layout)) {
            return Ok(model.clone());
        }
        let Pretrained { config, weights, .. } = self.pretrained;
        let model = Arc::new(match self.made.first() {
            Some(first) => first.variant(weights, layout)?,
            None => Model::for_cache(self.device, config, weights, layout)?,
        });
        self.made.push(model.clone());
        Ok(model)
    }

    /// Lets go of all models but the first one, and with them of their projections, once nobody else has them.
    pub fn keep_first(&mut self) {
        self.made.truncate(1);
    }
}
