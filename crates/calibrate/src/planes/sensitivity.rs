//! What it costs the model to quantise a part of one layer.
//!
//! A measurement begins at the residual stream that the exact model leaves at the layer, and runs that layer with the part
//! quantised and every later one as it is.

use crate::CalibrationError;
use dibit_cache::{
    CacheShape, CalibratedScheme, Calibration, Correction, LayerCalibration, LayerOverride, Scheme, Side,
};
use dibit_device::Device;
use dibit_model::{Distribution, Model, Pretrained};
use dibit_runner::{Capacity, Executor, Runner, replaying};
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
    fn scheme(&self, scheme: &Scheme, calibration: &LayerCalibration, num_layers: usize) -> CalibratedScheme {
        let (keys, values) = scheme.sides(0, self.layer);
        let mut layers = vec![LayerCalibration::default(); num_layers];
        layers[self.layer] = calibration.clone();
        let scheme = Scheme {
            keys: Side::Half,
            values: Side::Half,
            correction: Correction::NONE,
            layers: vec![LayerOverride {
                layers: self.layer..self.layer + 1,
                keys: if self.keys { keys } else { Side::Half },
                values: if self.keys { Side::Half } else { values },
                correction: Correction::NONE,
            }],
            ..scheme.clone()
        };
        CalibratedScheme { scheme, calibration: Some(Arc::new(Calibration { layers })) }
    }
}

/// Runs a model on some windows with parts of it quantised.
pub(crate) struct Sensitivities<'a, D: Device> {
    device: &'a Arc<D>,
    pretrained: &'a Pretrained,
    scheme: &'a Scheme,
    windows: &'a [&'a [u32]],
    /// Runs whole windows as they are.
    exact: Runner<D>,
}

impl<'a, D: Device> Sensitivities<'a, D> {
    pub(crate) fn new(
        device: &'a Arc<D>,
        pretrained: &'a Pretrained,
        scheme: &'a Scheme,
        windows: &'a [&'a [u32]],
    ) -> Result<Self, CalibrationError> {
        let config = &pretrained.config;
        let context = windows.iter().map(|window| window.len()).max().unwrap_or(0);
        let layout = config.cache_layout(&CalibratedScheme::load("fp16")?)?;
        let capacity = Capacity::of_one(&layout, context, LOGIT_ROWS);
        let model = Arc::new(Model::new(device, config, &pretrained.weights)?);
        Ok(Sensitivities { exact: Runner::new(model, layout, capacity)?, device, pretrained, scheme, windows })
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
            let mut residual = self.exact.embed(window)?;
            self.exactly(0..num_layers, &residual)?;
            self.logits(window.len(), |_, logits| reference.extend_from_slice(logits))?;
            rows += window.len() / EVERY;
            let (mut layer, mut behind) = (0, self.exactly(0..1, &residual)?);
            for (part, sum) in parts.iter().zip(&mut sums) {
                if progress(done).is_break() {
                    return Ok(None);
                }
                if part.layer > layer {
                    residual = self.exactly(layer + 1..part.layer, &behind)?;
                    layer = part.layer;
                    behind = self.exactly(layer..layer + 1, &residual)?;
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

    /// Runs a window through some layers as they are; returns the residual stream behind them.
    fn exactly(&mut self, layers: Range<usize>, residual: &[f32]) -> Result<Vec<f32>, CalibrationError> {
        let mut sequence = self.exact.open()?;
        let behind = self.exact.resume(&mut sequence, layers, residual);
        self.exact.close(sequence);
        Ok(behind?)
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
        let layout = config.cache_layout(&scheme)?;
        let capacity = Capacity { rows: ROWS, ..Capacity::of_one(&layout, rows, 1) };
        let mut runner = Runner::new(self.exact.model().clone(), layout, capacity)?;
        let mut sequence = runner.open()?;
        let behind = replaying(|| -> Result<Vec<_>, _> {
            let chunks = residual.chunks(ROWS * width);
            chunks.map(|chunk| runner.resume(&mut sequence, part.layer..part.layer + 1, chunk)).collect()
        })?;
        Ok(behind.concat())
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
        self.exactly(layer..self.pretrained.config.num_hidden_layers, residual)?;
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
            self.exact.logits(rows, &mut logits)?;
            seen(index * LOGIT_ROWS, &logits);
        }
        Ok(())
    }
}
