use crate::EvalError;
use dibit_cache::CacheLayout;
use dibit_device::Device;
use dibit_model::{Model, Pretrained};
use std::sync::Arc;

/// Models of the same weights. Schemes that rotate the same values share one.
pub(crate) struct Models<'a, D: Device> {
    device: &'a D,
    pretrained: &'a Pretrained,
    made: Vec<(Vec<bool>, Arc<Model<D>>)>,
}

impl<'a, D: Device> Models<'a, D> {
    pub fn new(device: &'a D, pretrained: &'a Pretrained) -> Self {
        Models { device, pretrained, made: Vec::new() }
    }

    /// The model that writes values as this cache stores them.
    pub fn get(&mut self, layout: &CacheLayout) -> Result<Arc<Model<D>>, EvalError> {
        let rotated = layout.rotated_values();
        if let Some((_, model)) = self.made.iter().find(|(other, _)| *other == rotated) {
            return Ok(model.clone());
        }
        let Pretrained { config, weights, .. } = self.pretrained;
        let mut weights = weights.clone();
        // Refuses weights that are rotated already where they should not be.
        weights.rotate_values(self.device, config.head_dim, &rotated)?;
        let model = Arc::new(Model::new(self.device, config, &weights)?);
        self.made.push((rotated, model.clone()));
        Ok(model)
    }
}
