//! Running a model on a text to calibrate a scheme.

use crate::basis::Moments;
use crate::permutation::ChannelSums;
use crate::planes::{self, KeyChannels, ValueSpread};
use crate::{Artefact, CalibrationError, Fingerprint, Source, progress};
use dibit_cache::{
    CacheLayout, CacheShape, Calibration, LayerCalibration, LayerLayout, Scheme, Side, SideLayout, Transform,
};
use dibit_device::Device;
use dibit_model::{ExactPass, Observation, Pretrained, windows};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Between two writes of the state.
const SAVE_EVERY: Duration = Duration::from_secs(30);

/// How a calibration is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Tokens of a sequence.
    pub context: usize,
    /// Tokens in all, rounded up to whole sequences; `None` for as many as the text fills.
    pub tokens: Option<usize>,
    /// Seed of random rotations.
    pub seed: u64,
    /// Where the state is kept while it runs, so that it can go on after it was stopped.
    pub state: Option<PathBuf>,
}

/// How far a calibration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Sequences done.
    pub done: usize,
    /// Sequences in all.
    pub sequences: usize,
}

/// What is gathered of one layer.
#[derive(Default)]
struct Layer {
    channels: Option<ChannelSums>,
    keys: Option<Moments>,
    values: Option<Moments>,
    key_channels: Option<KeyChannels>,
    value_spread: Option<ValueSpread>,
}

/// What is gathered of all layers.
pub(crate) struct Gathered {
    layers: Vec<Layer>,
}

/// Channels of a head in 16 bit.
fn high_channels(side: &SideLayout) -> usize {
    match side {
        SideLayout::Packed(side) => {
            side.high.map_or(0, |high| if side.tokens_are_lanes { high.rows } else { high.lanes })
        }
        SideLayout::Half { .. } => 0,
    }
}

impl Layer {
    fn new(layout: &LayerLayout, (keys, values): (Side, Side), shape: CacheShape) -> Self {
        let (heads, head_dim) = (shape.num_key_value_heads, shape.head_dim);
        let has_planes = |side: Side| planes::average_bits(side).is_some();
        Layer {
            channels: match layout.keys {
                Transform::PreRope(choice) => Some(ChannelSums::new(layout, choice, heads, head_dim)),
                _ => None,
            },
            keys: (layout.keys == Transform::Basis).then(|| Moments::new(heads, head_dim)),
            values: (layout.values == Transform::Basis && !has_planes(values)).then(|| Moments::new(heads, head_dim)),
            key_channels: has_planes(keys).then(|| KeyChannels::new(shape)),
            value_spread: has_planes(values).then(|| ValueSpread::new(shape)),
        }
    }

    fn finish(&self, layout: &LayerLayout, seed: u64, layer: usize) -> LayerCalibration {
        // Every basis has a stream of random numbers of its own.
        let stream = (layer as u64) << 32;
        let page = &layout.pages[0];
        let (keys, values) = (high_channels(&page.keys), high_channels(&page.values));
        LayerCalibration {
            permutation: self.channels.as_ref().and_then(ChannelSums::permutation),
            key_basis: self.keys.as_ref().map(|own| own.shared(keys, seed, stream)),
            value_basis: self.values.as_ref().map(|own| own.by_head(values, seed, stream + 1)),
            ..LayerCalibration::default()
        }
    }
}

impl Gathered {
    fn new(layout: &CacheLayout, scheme: &Scheme) -> Self {
        let layer = |(index, layer)| Layer::new(layer, scheme.sides(0, index), layout.shape);
        Gathered { layers: layout.layers.iter().enumerate().map(layer).collect() }
    }

    fn add(&mut self, seen: Observation, layout: &CacheLayout, inv_freq: &[f32]) {
        let layer = &mut self.layers[seen.layer];
        let (width, skipped) = (layout.shape.row(), planes::skipped(layout.sinks));
        if let Some(channels) = &mut layer.key_channels {
            channels.add(layout.shape, seen.first_row, seen.q, seen.k, skipped);
        }
        if let Some(spread) = &mut layer.value_spread {
            spread.add(layout.shape, seen.first_row, seen.v, skipped);
        }
        for (row, (key, value)) in seen.k.chunks_exact(width).zip(seen.v.chunks_exact(width)).enumerate() {
            if let Some(channels) = &mut layer.channels {
                // A sequence begins at position 0 and takes a pass of its own.
                channels.add(key, seen.first_row + row, inv_freq);
            }
            if let Some(keys) = &mut layer.keys {
                keys.add(key);
            }
            if let Some(values) = &mut layer.values {
                values.add(value);
            }
        }
    }

    /// All sums by their names.
    pub(crate) fn sums(&self) -> Vec<(String, &[f64])> {
        let mut all = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            all.extend(layer.channels.as_ref().map(|own| (format!("layers.{index}.channels"), &own.sums[..])));
            all.extend(layer.keys.as_ref().map(|own| (format!("layers.{index}.keys"), &own.sums[..])));
            all.extend(layer.values.as_ref().map(|own| (format!("layers.{index}.values"), &own.sums[..])));
            let (keys, values) = (&layer.key_channels, &layer.value_spread);
            all.extend(keys.as_ref().map(|own| (format!("layers.{index}.key_channels"), &own.sums[..])));
            all.extend(values.as_ref().map(|own| (format!("layers.{index}.value_spread"), &own.sums[..])));
        }
        all
    }

    /// [`Gathered::sums`], to be written.
    pub(crate) fn sums_mut(&mut self) -> Vec<(String, &mut [f64])> {
        let mut all = Vec::new();
        for (index, layer) in self.layers.iter_mut().enumerate() {
            all.extend(layer.channels.as_mut().map(|own| (format!("layers.{index}.channels"), &mut own.sums[..])));
            all.extend(layer.keys.as_mut().map(|own| (format!("layers.{index}.keys"), &mut own.sums[..])));
            all.extend(layer.values.as_mut().map(|own| (format!("layers.{index}.values"), &mut own.sums[..])));
            let Layer { key_channels: keys, value_spread: values, .. } = layer;
            all.extend(keys.as_mut().map(|own| (format!("layers.{index}.key_channels"), &mut own.sums[..])));
            all.extend(values.as_mut().map(|own| (format!("layers.{index}.value_spread"), &mut own.sums[..])));
        }
        all
    }

    /// A layer whose sums are not finite.
    fn broken_layer(&self) -> Option<usize> {
        let broken = |layer: &Layer| {
            let sums = [
                layer.channels.as_ref().map(|own| &own.sums),
                layer.keys.as_ref().map(|own| &own.sums),
                layer.values.as_ref().map(|own| &own.sums),
                layer.key_channels.as_ref().map(|own| &own.sums),
                layer.value_spread.as_ref().map(|own| &own.sums),
            ];
            sums.into_iter().flatten().flatten().any(|sum| !sum.is_finite())
        };
        self.layers.iter().position(broken)
    }
}

/// Runs a model over a tokenised text, as exact prefills of `context` tokens, and makes what the scheme needs. `None`
/// where `progress` broke it off; the state is then in its file, and the same call goes on from there.
///
/// The result depends on nothing but the model, the scheme, the tokens and the options.
///
/// # Errors
/// [`CalibrationError`].
pub fn calibrate<D: Device>(
    device: &D,
    pretrained: &Pretrained,
    scheme: &Scheme,
    ids: &[u32],
    options: &Options,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Artefact>, CalibrationError> {
    if !scheme.is_calibrated() {
        return Err(CalibrationError::NotNeeded(scheme.origin.clone()));
    }
    let config = &pretrained.config;
    let (context, limit) = (options.context, config.max_position_embeddings);
    if !(2..=limit).contains(&context) {
        return Err(CalibrationError::Context { context, limit });
    }
    let layout = CacheLayout::new(scheme, config.cache_shape())?;
    let count = options.tokens.map(|tokens| tokens.div_ceil(context));
    let windows = windows(ids, config.bos_token_id, context, count);
    let needed = context - config.bos_token_id.iter().len();
    let short = count.is_some_and(|count| windows.len() < count);
    if windows.is_empty() || short {
        let needed = needed.saturating_mul(count.unwrap_or(1));
        return Err(CalibrationError::TextTooShort { tokens: ids.len(), needed });
    }
    let fingerprint = Fingerprint::new(pretrained, scheme);
    let source = Source::new(&windows, context, options.seed);
    let mut gathered = Gathered::new(&layout, scheme);
    let state = options.state.as_deref();
    let done = match state {
        Some(path) => progress::resume(path, &fingerprint, &source, &mut gathered)?,
        None => 0,
    };
    let mut pass = ExactPass::new(device, config, &pretrained.weights, context)?;
    let inv_freq = config.rope.inv_freq(config.head_dim);
    let save =
        |path: &Path, done: usize, gathered: &Gathered| progress::save(path, &fingerprint, &source, done, gathered);
    let mut saved = Instant::now();
    for (index, window) in windows.iter().enumerate().skip(done) {
        if progress(Progress { done: index, sequences: windows.len() }).is_break() {
            if let Some(path) = state {
                save(path, index, &gathered)?;
            }
            return Ok(None);
        }
        if let Some(path) = state.filter(|_| saved.elapsed() > SAVE_EVERY) {
            save(path, index, &gathered)?;
            saved = Instant::now();
        }
        pass.run(device, window, &mut |seen: Observation| gathered.add(seen, &layout, &inv_freq))?;
        if let Some(layer) = gathered.broken_layer() {
            return Err(CalibrationError::NotFinite { layer });
        }
    }
    let layers = gathered.layers.iter().zip(&layout.layers).enumerate();
    let mut layers: Vec<LayerCalibration> =
        layers.map(|(index, (own, layout))| own.finish(layout, options.seed, index)).collect();
    if scheme.has_planes() {
        let keys: Vec<_> = gathered.layers.iter().map(|layer| layer.key_channels.as_ref()).collect();
        let values: Vec<_> = gathered.layers.iter().map(|layer| layer.value_spread.as_ref()).collect();
        let runs = |done, sequences| progress(Progress { done, sequences });
        if !planes::fit(device, pretrained, scheme, &windows, &keys, &values, &mut layers, runs)? {
            if let Some(path) = state {
                save(path, windows.len(), &gathered)?;
            }
            return Ok(None);
        }
    }
    let tokens = windows.len() * context;
    Ok(Some(Artefact {
        fingerprint,
        source: format!("{tokens} tokens in sequences of {context}, text {}, seed {}", source.text, options.seed),
        calibration: Calibration { layers },
    }))
}
