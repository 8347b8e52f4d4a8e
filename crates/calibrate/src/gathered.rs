//! What is gathered of a model while it runs: sums over tokens.

use crate::CalibrationError;
use crate::basis::Moments;
use crate::feedback::feedback;
use crate::permutation::ChannelSums;
use crate::planes::{KeyMetric, Statistics, ValueSpread};
use dibit_cache::{CachePlan, CacheShape, LayerCalibration, LayerLayout, Powers, Scheme, Side, SideLayout, Transform};
use dibit_model::Observation;

/// What is gathered of one layer.
#[derive(Default)]
struct Layer {
    channels: Option<ChannelSums>,
    keys: Option<Moments>,
    values: Option<Moments>,
    key_metric: Option<KeyMetric>,
    value_spread: Option<ValueSpread>,
    /// What heads had to be divided by to be stored.
    powers: Powers,
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
        let has_planes = |side: Side| side.average_bits().is_some();
        Layer {
            channels: match layout.keys {
                Transform::PreRope(choice) => Some(ChannelSums::new(layout, choice, heads, head_dim)),
                _ => None,
            },
            keys: (layout.keys == Transform::Basis).then(|| Moments::new(heads, head_dim)),
            values: (layout.values == Transform::Basis && !has_planes(values)).then(|| Moments::new(heads, head_dim)),
            key_metric: (has_planes(keys) || keys.has_feedback()).then(|| KeyMetric::new(shape)),
            value_spread: has_planes(values).then(|| ValueSpread::new(shape)),
            powers: Powers::default(),
        }
    }

    fn finish(
        &self,
        layout: &LayerLayout,
        d: usize,
        seed: u64,
        layer: usize,
    ) -> Result<LayerCalibration, CalibrationError> {
        // Every basis has a stream of random numbers of its own.
        let stream = (layer as u64) << 32;
        let page = &layout.pages[0];
        let (keys, values) = (high_channels(&page.keys), high_channels(&page.values));
        let feeds_back = layout.pages.iter().any(|page| matches!(page.keys, SideLayout::Packed(side) if side.feedback));
        let key_feedback = match self.key_metric.as_ref().filter(|_| feeds_back) {
            Some(metric) => Some(feedback(&metric.sums, d, layer)?),
            None => None,
        };
        let mut powers = self.powers.clone();
        if layout.linear.is_some() {
            // Adapters of a linear correction are trained on keys as they are.
            powers.set(true, Vec::new());
        }
        Ok(LayerCalibration {
            key_feedback,
            permutation: self.channels.as_ref().and_then(ChannelSums::permutation),
            key_basis: self.keys.as_ref().map(|own| own.shared(keys, seed, stream)),
            value_basis: self.values.as_ref().map(|own| own.by_head(values, seed, stream + 1)),
            powers,
            ..LayerCalibration::default()
        })
    }
}

impl Gathered {
    pub(crate) fn new(layout: &CachePlan, scheme: &Scheme) -> Self {
        let layer = |(index, layer)| Layer::new(layer, scheme.sides(0, index), layout.shape);
        Gathered { layers: layout.layers.iter().enumerate().map(layer).collect() }
    }

    pub(crate) fn add(&mut self, seen: Observation, layout: &CachePlan, inv_freq: &[f32]) {
        let layer = &mut self.layers[seen.layer];
        let width = layout.shape.row();
        if let Some(metric) = &mut layer.key_metric {
            metric.add(layout.shape, seen.first_row, seen.q, seen.k.len() / width);
        }
        if let Some(spread) = &mut layer.value_spread {
            spread.add(layout.shape, seen.first_row, seen.v, layout.sinks);
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

    /// Takes over what the heads of each layer had to be divided by to be stored.
    pub(crate) fn set_powers(&mut self, powers: &[Powers]) {
        self.layers.iter_mut().zip(powers).for_each(|(layer, powers)| layer.powers.clone_from(powers));
    }

    /// All sums by their names.
    pub(crate) fn sums(&self) -> Vec<(String, &[f64])> {
        let mut all = Vec::new();
        for (index, layer) in self.layers.iter().enumerate() {
            all.extend(layer.channels.as_ref().map(|own| (format!("layers.{index}.channels"), &own.sums[..])));
            all.extend(layer.keys.as_ref().map(|own| (format!("layers.{index}.keys"), &own.sums[..])));
            all.extend(layer.values.as_ref().map(|own| (format!("layers.{index}.values"), &own.sums[..])));
            let (keys, values) = (&layer.key_metric, &layer.value_spread);
            all.extend(keys.as_ref().map(|own| (format!("layers.{index}.key_metric"), &own.sums[..])));
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
            let Layer { key_metric: keys, value_spread: values, .. } = layer;
            all.extend(keys.as_mut().map(|own| (format!("layers.{index}.key_metric"), &mut own.sums[..])));
            all.extend(values.as_mut().map(|own| (format!("layers.{index}.value_spread"), &mut own.sums[..])));
        }
        all
    }

    /// What planes are given by, of all layers.
    pub(crate) fn plane_statistics(&self) -> Vec<Statistics<'_>> {
        let layers = self.layers.iter();
        layers
            .map(|layer| Statistics { keys: layer.key_metric.as_ref(), values: layer.value_spread.as_ref() })
            .collect()
    }

    /// What the sums make of every layer.
    ///
    /// # Errors
    /// [`CalibrationError::NotFinite`].
    pub(crate) fn finish(&self, layout: &CachePlan, seed: u64) -> Result<Vec<LayerCalibration>, CalibrationError> {
        let layers = self.layers.iter().zip(&layout.layers).enumerate();
        let d = layout.shape.head_dim;
        layers.map(|(index, (own, layout))| own.finish(layout, d, seed, index)).collect()
    }

    /// A layer whose sums are not finite.
    pub(crate) fn broken_layer(&self) -> Option<usize> {
        let broken = |layer: &Layer| {
            let sums = [
                layer.channels.as_ref().map(|own| &own.sums),
                layer.keys.as_ref().map(|own| &own.sums),
                layer.values.as_ref().map(|own| &own.sums),
                layer.key_metric.as_ref().map(|own| &own.sums),
                layer.value_spread.as_ref().map(|own| &own.sums),
            ];
            sums.into_iter().flatten().flatten().any(|sum| !sum.is_finite())
        };
        self.layers.iter().position(broken)
    }
}
