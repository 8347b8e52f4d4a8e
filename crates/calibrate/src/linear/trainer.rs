//! Runs sequences through the model and trains every layer on what it shows.

use super::adapter::{Adapter, AdapterShape};
use super::batches::sample_rows;
use super::collect::Collector;
use super::layer_pass::{Input, LayerPass, Sums, Task};
use super::recipe::{Recipe, Start};
use super::start::start;
use super::tiles::{Tiles, corrected_rows};
use crate::CalibrationError;
use dibit_cache::CacheLayout;
use dibit_device::{DeviceError, Train};
use dibit_model::{Observation, Pretrained};
use dibit_runner::ExactPass;
use std::sync::Arc;

/// Least share of the queries of held-out sequences that are measured.
const MEASURED_ROWS: f32 = 0.25;

/// Streams of the choice of rows in held-out sequences lie above those in sequences to train on.
const HELD_OUT_STREAM: u64 = 1 << 40;

/// The adapters of all layers, and everything that is needed to train them.
pub(crate) struct Trainer<'a, D: Train> {
    device: &'a Arc<D>,
    layout: CacheLayout,
    recipe: &'a Recipe,
    seed: u64,
    context: usize,
    pass: ExactPass<D>,
    layer_pass: LayerPass<D>,
    collector: Collector,
    /// Positions whose queries see corrected keys.
    rows: Vec<u32>,
    shape: AdapterShape,
    /// First keys that are kept exactly.
    exact: usize,
    /// One for each layer; `None` for those without a correction.
    pub layers: Vec<Option<Adapter<D>>>,
}

impl<'a, D: Train> Trainer<'a, D> {
    /// Adapters of zeros, for the linear correction of `features` features that `layout` has.
    pub(crate) fn new(
        device: &'a Arc<D>,
        pretrained: &Pretrained,
        layout: CacheLayout,
        features: usize,
        recipe: &'a Recipe,
        seed: u64,
        context: usize,
    ) -> Result<Self, CalibrationError> {
        let config = &pretrained.config;
        let shape = AdapterShape {
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            features,
        };
        let exact = layout.sinks.first();
        let rows = corrected_rows(layout.window, context, exact);
        if rows.is_empty() {
            let limit = config.max_position_embeddings;
            let needed = (context + 1..=limit).find(|more| !corrected_rows(layout.window, *more, exact).is_empty());
            return Err(CalibrationError::NothingPacked { context, needed: needed.unwrap_or(limit) });
        }
        let outputs = recipe.output_weight > 0.0;
        let adapters = layout.layers.iter();
        let adapters = adapters.map(|layer| layer.linear.map(|_| Adapter::new(&**device, shape, recipe)).transpose());
        Ok(Trainer {
            device,
            recipe,
            seed,
            context,
            pass: ExactPass::new(device, config, &pretrained.weights, context)?,
            layer_pass: LayerPass::new(&**device, shape, context, outputs)?,
            collector: Collector::new(shape, context, outputs),
            rows,
            shape,
            exact,
            layers: adapters.collect::<Result<_, DeviceError>>()?,
            layout,
        })
    }

    /// Puts the adapters to their start, by what a sequence shows.
    pub(crate) fn start(&mut self, ids: &[u32]) -> Result<(), CalibrationError> {
        let mut seen = vec![None; self.layers.len()];
        if self.recipe.start != Start::Uniform {
            let window = self.layout.window;
            let tiles = Tiles::new(self.rows.clone(), window, self.shape.group());
            let Trainer { device, layout, pass, layer_pass, collector, layers, .. } = self;
            let mut result = Ok(());
            let mut observer = |row: Observation| {
                let Some(adapter) = &layers[row.layer] else { return };
                if result.is_ok() && collector.take(&row, &tiles) {
                    let input = Input { layout, layer: row.layer, attended: &collector.attended, tiles: &tiles };
                    result = layer_pass.look(*device, input, adapter.shape).map(|shown| seen[row.layer] = Some(shown));
                }
            };
            pass.run(ids, &mut observer)?;
            result?;
        }
        for (layer, (adapter, seen)) in self.layers.iter_mut().zip(&seen).enumerate() {
            if let Some(adapter) = adapter {
                let maps = start(self.shape, self.recipe.start, self.seed, layer, seen.as_ref());
                self.device.write(&mut adapter.maps, 0, &maps);
            }
        }
        Ok(())
    }

    /// Sums of a measurement or a step, one for each layer, at zero.
    pub(crate) fn sums(&self) -> Vec<Sums> {
        self.layers.iter().map(|_| Sums::new(self.shape.heads)).collect()
    }

    /// Forgets all gradients.
    pub(crate) fn clear(&mut self) {
        for adapter in self.layers.iter_mut().flatten() {
            adapter.clear(self.device);
        }
    }

    /// Adds the gradients of a sequence, the one of place `at` among all that are trained on.
    pub(crate) fn add(&mut self, ids: &[u32], at: usize, sums: &mut [Sums]) -> Result<(), CalibrationError> {
        self.run(ids, self.recipe.rows, at as u64, true, sums)
    }

    /// Measures a held-out sequence.
    pub(crate) fn measure(&mut self, ids: &[u32], at: usize, sums: &mut [Sums]) -> Result<(), CalibrationError> {
        let share = self.recipe.rows.max(MEASURED_ROWS);
        self.run(ids, share, HELD_OUT_STREAM + at as u64, false, sums)
    }

    /// Moves the adapters by the gradients; `step` counts from 1. False where numbers are not finite.
    #[must_use]
    pub(crate) fn step(&mut self, rate: f32, step: usize, sums: &[Sums]) -> bool {
        let Trainer { device, layers, shape, recipe, .. } = self;
        device.scope(|| {
            let adapters = layers.iter_mut().zip(sums).filter_map(|(adapter, sums)| Some((adapter.as_mut()?, sums)));
            let mut all = adapters.map(|(adapter, sums)| {
                adapter.step(*device, rate, recipe.clip, sums.rows * shape.heads, step) && adapter.is_finite(*device)
            });
            all.all(|moved| moved)
        })
    }

    fn run(
        &mut self,
        ids: &[u32],
        share: f32,
        stream: u64,
        train: bool,
        sums: &mut [Sums],
    ) -> Result<(), CalibrationError> {
        debug_assert_eq!(ids.len(), self.context);
        let window = self.layout.window;
        let tiles = Tiles::new(sample_rows(&self.rows, share, self.seed, stream), window, self.shape.group());
        let task = Task { train, output_weight: self.recipe.output_weight, exact: self.exact };
        let Trainer { device, layout, pass, layer_pass, collector, layers, .. } = self;
        let mut result = Ok(());
        let mut observer = |seen: Observation| {
            let Some(adapter) = &mut layers[seen.layer] else { return };
            if result.is_ok() && collector.take(&seen, &tiles) {
                let input = Input { layout, layer: seen.layer, attended: &collector.attended, tiles: &tiles };
                result = layer_pass.run(*device, input, adapter, task, &mut sums[seen.layer]);
            }
        };
        pass.run(ids, &mut observer)?;
        result?;
        Ok(())
    }
}
