//! What it costs the model to quantise a part of one layer.
//!
//! A measurement begins at the residual stream that the exact model leaves at the layer, and runs that layer with the part
//! quantised and every later one as it is.

use crate::CalibrationError;
use dibit_cache::{CacheManager, CacheShape, Calibration, Correction, LayerCalibration, LayerOverride, Scheme, Side};
use dibit_device::{Batch, Device, Mode};
use dibit_model::{Distribution, Model, Pretrained, Workspace};
use rayon::prelude::*;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

/// Rows that pass through the quantised layer together: what is packed is seen by the next ones.
const ROWS: usize = 128;

/// Of so many rows one is looked at.
const EVERY: usize = 4;

/// Rows whose logits are looked at together.
const LOGIT_ROWS: usize = 64;

/// One side of one KV head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    pub layer: usize,
    pub keys: bool,
    pub kv_head: usize,
}

/// Every side of every KV head that has planes.
pub(crate) fn places(scheme: &Scheme, shape: CacheShape) -> Vec<Place> {
    let heads = shape.num_key_value_heads;
    let both = |layer: usize| {
        let side = move |keys: bool| (0..heads).map(move |kv_head| Place { layer, keys, kv_head });
        [true, false].into_iter().flat_map(side)
    };
    let needed = |place: &Place| {
        let (keys, values) = scheme.sides(0, place.layer);
        (if place.keys { keys } else { values }).average_bits().is_some()
    };
    (0..shape.num_layers).flat_map(both).filter(needed).collect()
}

/// One side of a layer that is quantised alone.
pub(crate) struct Alone {
    pub layer: usize,
    pub keys: bool,
    /// What the layer is calibrated to meanwhile.
    pub all: LayerCalibration,
    /// The same for each KV head alone, where there are several.
    pub heads: Vec<LayerCalibration>,
}

impl Alone {
    /// The scheme that packs this side by a calibration, and has everything else in 16 bit.
    fn scheme(&self, scheme: &Scheme, calibration: &LayerCalibration, num_layers: usize) -> Scheme {
        let (keys, values) = scheme.sides(0, self.layer);
        let mut layers = vec![LayerCalibration::default(); num_layers];
        layers[self.layer] = calibration.clone();
        Scheme {
            keys: Side::Half,
            values: Side::Half,
            correction: Correction::NONE,
            layers: vec![LayerOverride {
                layers: self.layer..self.layer + 1,
                keys: if self.keys { keys } else { Side::Half },
                values: if self.keys { Side::Half } else { values },
                correction: Correction::NONE,
            }],
            calibration: Some(Arc::new(Calibration { layers })),
            ..scheme.clone()
        }
    }
}

/// A cache, and buffers for passes of so many rows.
struct Runner<D: Device> {
    manager: CacheManager,
    store: D::Store,
}

impl<D: Device> Runner<D> {
    fn new(
        device: &D,
        pretrained: &Pretrained,
        scheme: &Scheme,
        context: usize,
        rows: usize,
    ) -> Result<Self, CalibrationError> {
        let layout = pretrained.config.cache_layout(scheme)?;
        let blocks = layout.blocks(context);
        Ok(Runner { store: device.store(&layout, blocks, 1, rows)?, manager: CacheManager::new(layout, blocks, 1) })
    }
}

/// Runs a model on some windows with parts of it quantised.
pub(crate) struct Sensitivities<'a, D: Device> {
    device: &'a D,
    pretrained: &'a Pretrained,
    scheme: &'a Scheme,
    windows: &'a [&'a [u32]],
    model: Model<D>,
    exact: Runner<D>,
    /// For a whole window.
    wide: Workspace<D>,
    /// For [`ROWS`] rows.
    narrow: Workspace<D>,
}

impl<'a, D: Device> Sensitivities<'a, D> {
    pub(crate) fn new(
        device: &'a D,
        pretrained: &'a Pretrained,
        scheme: &'a Scheme,
        windows: &'a [&'a [u32]],
    ) -> Result<Self, CalibrationError> {
        let config = &pretrained.config;
        let context = windows.iter().map(|window| window.len()).max().unwrap_or(0);
        Ok(Sensitivities {
            model: Model::new(device, config, &pretrained.weights)?,
            exact: Runner::new(device, pretrained, &Scheme::load("fp16")?, context, context)?,
            wide: Workspace::new(device, config, context, LOGIT_ROWS)?,
            narrow: Workspace::new(device, config, ROWS, 1)?,
            device,
            pretrained,
            scheme,
            windows,
        })
    }

    /// For each KV head of each part, parts being in the order of layers, what it adds to the mean KL divergence in nats of
    /// the model with the part alone quantised, over the first `windows` windows: its share of the squared change of the residual stream behind the layer.
    /// `None` where `progress`, called with the runs done, broke it off.
    pub(crate) fn measure(
        &mut self,
        parts: &[Alone],
        windows: usize,
        mut progress: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Vec<Vec<f64>>>, CalibrationError> {
        let num_layers = self.pretrained.config.num_hidden_layers;
        let mut sums: Vec<Vec<f64>> = parts.iter().map(|part| vec![0.0; part.heads.len().max(1)]).collect();
        let (mut rows, mut done) = (0, 0);
        for window in &self.windows[..windows.min(self.windows.len())] {
            let mut reference = Vec::new();
            let mut residual = self.embed(window)?;
            self.exactly(0..num_layers, &residual, window.len())?;
            self.logits(window.len(), |_, logits| reference.extend_from_slice(logits))?;
            rows += window.len() / EVERY;
            let (mut layer, mut behind) = (0, self.exactly(0..1, &residual, window.len())?);
            for (part, sum) in parts.iter().zip(&mut sums) {
                if progress(done).is_break() {
                    return Ok(None);
                }
                if part.layer > layer {
                    residual = self.exactly(layer + 1..part.layer, &behind, window.len())?;
                    layer = part.layer;
                    behind = self.exactly(layer..layer + 1, &residual, window.len())?;
                }
                let changed = self.quantised(part, &part.all, &residual)?;
                let divergence = self.divergence(layer + 1, &changed, &reference, window.len())?;
                let shares = self.shares(part, &residual, &behind)?;
                sum.iter_mut().zip(shares).for_each(|(sum, share)| *sum += divergence * share);
                done += 1;
            }
        }
        sums.iter_mut().flatten().for_each(|sum| *sum /= rows.max(1) as f64);
        Ok(Some(sums))
    }

    /// The residual stream that enters layer 0.
    fn embed(&mut self, window: &[u32]) -> Result<Vec<f32>, CalibrationError> {
        let mut residual = Vec::new();
        self.model.embed(self.device, &mut self.wide, window)?;
        self.wide.residual(self.device, window.len(), &mut residual)?;
        Ok(residual)
    }

    /// Runs a window through some layers as they are; returns the residual stream behind them.
    fn exactly(&mut self, layers: Range<usize>, residual: &[f32], rows: usize) -> Result<Vec<f32>, CalibrationError> {
        let Self { device, model, exact: Runner { manager, store }, wide, .. } = self;
        let mut sequence = manager.open()?;
        manager.reserve(&mut sequence, rows)?;
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(&sequence, rows, manager.layout().window);
        model.resume(*device, wide, store, &batch, layers, residual)?;
        manager.close(sequence);
        let mut behind = Vec::new();
        wide.residual(*device, rows, &mut behind)?;
        Ok(behind)
    }

    /// The residual stream behind the layer of a part that is quantised by a calibration.
    fn quantised(
        &mut self,
        part: &Alone,
        calibration: &LayerCalibration,
        residual: &[f32],
    ) -> Result<Vec<f32>, CalibrationError> {
        let config = &self.pretrained.config;
        let (width, rows) = (config.hidden_size, residual.len() / config.hidden_size);
        let scheme = part.scheme(self.scheme, calibration, config.num_hidden_layers);
        let Runner { mut manager, mut store } = Runner::new(self.device, self.pretrained, &scheme, rows, ROWS)?;
        let mut sequence = manager.open()?;
        let (mut behind, mut own) = (Vec::with_capacity(residual.len()), Vec::new());
        for chunk in residual.chunks(ROWS * width) {
            let count = chunk.len() / width;
            let len = sequence.len() + count;
            manager.reserve(&mut sequence, len)?;
            let mut batch = Batch::new(Mode::Chunk);
            batch.push(&sequence, count, manager.layout().window);
            let layers = part.layer..part.layer + 1;
            self.model.resume(self.device, &mut self.narrow, &mut store, &batch, layers, chunk)?;
            manager.advance(&mut sequence, len);
            self.narrow.residual(self.device, count, &mut own)?;
            behind.extend_from_slice(&own);
        }
        manager.close(sequence);
        Ok(behind)
    }

    /// The part of each KV head in what the heads of a part change, all in all 1.
    fn shares(&mut self, part: &Alone, residual: &[f32], behind: &[f32]) -> Result<Vec<f64>, CalibrationError> {
        let mut shares = Vec::new();
        for head in &part.heads {
            let changed = self.quantised(part, head, residual)?;
            let squares = changed.iter().zip(behind).map(|(a, b)| f64::from(a - b).powi(2));
            shares.push(squares.sum::<f64>());
        }
        let all: f64 = shares.iter().sum();
        Ok(match shares.len() {
            0 => vec![1.0],
            count if all == 0.0 => vec![1.0 / count as f64; count],
            _ => shares.into_iter().map(|share| share / all).collect(),
        })
    }

    /// The sum of the divergences of the rows that are looked at, for a residual stream that enters `layer`.
    fn divergence(
        &mut self,
        layer: usize,
        residual: &[f32],
        reference: &[f32],
        rows: usize,
    ) -> Result<f64, CalibrationError> {
        let vocab_size = self.pretrained.config.vocab_size;
        self.exactly(layer..self.pretrained.config.num_hidden_layers, residual, rows)?;
        let mut sum = 0.0;
        let device = self.device;
        self.logits(rows, |first, logits| {
            let expected = &reference[first * vocab_size..first * vocab_size + logits.len()];
            let pairs = expected.par_chunks_exact(vocab_size).zip(logits.par_chunks_exact(vocab_size));
            let each = device
                .scope(|| pairs.map(|(a, b)| Distribution::new(a).kl(&Distribution::new(b))).collect::<Vec<f64>>());
            sum += each.into_iter().sum::<f64>();
        })?;
        Ok(sum)
    }

    /// Shows the logits of the rows of the last window that are looked at, with the number of the first among these.
    fn logits(&mut self, rows: usize, mut seen: impl FnMut(usize, &[f32])) -> Result<(), CalibrationError> {
        let all: Vec<usize> = (0..rows).skip(EVERY - 1).step_by(EVERY).collect();
        let mut logits = Vec::new();
        for (index, rows) in all.chunks(LOGIT_ROWS).enumerate() {
            self.model.logits(self.device, &mut self.wide, rows, &mut logits)?;
            seen(index * LOGIT_ROWS, &logits);
        }
        Ok(())
    }
}
