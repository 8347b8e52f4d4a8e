//! What it costs the model to quantise one side of one layer.

use crate::CalibrationError;
use dibit_cache::{CacheManager, Calibration, LayerCalibration, LayerOverride, Scheme, Side};
use dibit_device::{Batch, Device, Mode};
use dibit_model::{Distribution, Model, Pretrained, Workspace};
use std::ops::ControlFlow;
use std::sync::Arc;

/// Rows of a pass: what is packed is seen by the next pass.
const ROWS: usize = 128;

/// Of so many rows one is looked at.
const EVERY: usize = 4;

/// One side of one layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub layer: usize,
    pub keys: bool,
}

/// Every side of every layer that has planes.
pub(crate) fn places(scheme: &Scheme, num_layers: usize) -> Vec<Place> {
    let both = |layer: usize| [true, false].map(|keys| Place { layer, keys });
    let needed = |place: &Place| {
        let (keys, values) = scheme.sides(0, place.layer);
        (if place.keys { keys } else { values }).average_bits().is_some()
    };
    (0..num_layers).flat_map(both).filter(needed).collect()
}

/// The scheme that has one plane for each channel of one place, and everything else in 16 bit.
fn alone(scheme: &Scheme, place: Place, layers: &[LayerCalibration], row: usize) -> Scheme {
    let (keys, values) = scheme.sides(0, place.layer);
    let mut calibration = vec![LayerCalibration::default(); layers.len()];
    let own = &mut calibration[place.layer];
    *own = layers[place.layer].clone();
    (own.key_planes, own.value_planes) = (Some(vec![1; row]), Some(vec![1; row]));
    Scheme {
        keys: Side::Half,
        values: Side::Half,
        correction: Default::default(),
        layers: vec![LayerOverride {
            layers: place.layer..place.layer + 1,
            keys: if place.keys { keys } else { Side::Half },
            values: if place.keys { Side::Half } else { values },
            correction: Default::default(),
        }],
        calibration: Some(Arc::new(Calibration { layers: calibration })),
        ..scheme.clone()
    }
}

/// A model with one cache.
struct Runner<'a, D: Device> {
    device: &'a D,
    model: &'a Model<D>,
    manager: CacheManager,
    store: D::Store,
    workspace: Workspace<D>,
    logits: Vec<f32>,
}

impl<'a, D: Device> Runner<'a, D> {
    fn new(
        device: &'a D,
        pretrained: &Pretrained,
        model: &'a Model<D>,
        scheme: &Scheme,
        context: usize,
    ) -> Result<Self, CalibrationError> {
        let layout = pretrained.config.cache_layout(scheme)?;
        let blocks = layout.blocks(context);
        Ok(Runner {
            store: device.store(&layout, blocks, 1, ROWS)?,
            workspace: Workspace::new(device, &pretrained.config, ROWS, ROWS / EVERY)?,
            manager: CacheManager::new(layout, blocks, 1),
            logits: Vec::new(),
            device,
            model,
        })
    }

    /// Runs a window, and shows the logits of some rows of each pass.
    fn run(&mut self, window: &[u32], mut seen: impl FnMut(&[f32])) -> Result<(), CalibrationError> {
        let Runner { device, model, manager, store, workspace, logits } = self;
        let mut sequence = manager.open()?;
        for ids in window.chunks(ROWS) {
            let len = sequence.len() + ids.len();
            manager.reserve(&mut sequence, len)?;
            let mut batch = Batch::new(Mode::Chunk);
            batch.push(&sequence, ids.len(), manager.layout().window);
            model.forward(*device, workspace, store, &batch, ids)?;
            manager.advance(&mut sequence, len);
            let rows: Vec<usize> = (0..ids.len()).skip(EVERY - 1).step_by(EVERY).collect();
            model.logits(*device, workspace, &rows, logits)?;
            seen(logits);
        }
        manager.close(sequence);
        Ok(())
    }
}

/// For each place the mean KL divergence, in nats, of the model with that place alone quantised, one plane for each
/// channel. `None` where `progress`, called with the runs done and in all, broke it off.
pub(crate) fn sensitivities<D: Device>(
    device: &D,
    pretrained: &Pretrained,
    scheme: &Scheme,
    places: &[Place],
    layers: &[LayerCalibration],
    windows: &[Vec<u32>],
    mut progress: impl FnMut(usize, usize) -> ControlFlow<()>,
) -> Result<Option<Vec<f64>>, CalibrationError> {
    let config = &pretrained.config;
    let vocab_size = config.vocab_size;
    let context = windows.iter().map(Vec::len).max().unwrap_or(0);
    let model = Model::new(device, config, &pretrained.weights)?;
    let exact = Scheme::load("fp16")?;
    let runs = windows.len() * (places.len() + 1);
    let mut sums = vec![0.0; places.len()];
    let mut rows = 0;
    for (index, window) in windows.iter().enumerate() {
        let mut reference: Vec<f32> = Vec::new();
        if progress(index * (places.len() + 1), runs).is_break() {
            return Ok(None);
        }
        Runner::new(device, pretrained, &model, &exact, context)?
            .run(window, |logits| reference.extend_from_slice(logits))?;
        rows += reference.len() / vocab_size;
        for (number, (place, sum)) in places.iter().zip(&mut sums).enumerate() {
            if progress(index * (places.len() + 1) + number + 1, runs).is_break() {
                return Ok(None);
            }
            let alone = alone(scheme, *place, layers, config.cache_shape().row());
            let mut expected = reference.chunks_exact(vocab_size);
            Runner::new(device, pretrained, &model, &alone, context)?.run(window, |logits| {
                for (own, expected) in logits.chunks_exact(vocab_size).zip(&mut expected) {
                    *sum += Distribution::new(expected).kl(&Distribution::new(own));
                }
            })?;
        }
    }
    Ok(Some(sums.into_iter().map(|sum| sum / rows.max(1) as f64).collect()))
}
