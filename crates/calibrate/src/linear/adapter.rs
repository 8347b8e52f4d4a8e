//! The adapters of one layer while they are trained.

use super::recipe::Recipe;
use dibit_cache::Adapters;
use dibit_device::{AdamStep, DeviceError, Place, Train};

const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f32 = 1e-8;

/// What the logit of a gate begins with: a gate of 0.018.
const GATE_START: f32 = -4.0;

/// How much faster than maps gates move: a step of Adam is of one size, and their logits have a longer way.
const GATE_RATE: f32 = 10.0;

/// Shape of a layer's attention and adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AdapterShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// D, both halves.
    pub features: usize,
}

impl AdapterShape {
    /// Query heads of a KV head.
    pub(crate) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Numbers of a map.
    fn map(&self) -> usize {
        self.head_dim * self.features
    }

    /// Numbers of all maps: those of the query heads, then those of the KV heads, `[head_dim][D]` each with W1 and W2
    /// side by side.
    pub(crate) fn numbers(&self) -> usize {
        (self.heads + self.kv_heads) * self.map()
    }

    /// The map of a query head.
    pub(crate) fn query_map(&self, head: usize) -> Place {
        Place::rows(head * self.map(), self.features)
    }

    /// The map of a KV head.
    pub(crate) fn key_map(&self, kv_head: usize) -> Place {
        self.query_map(self.heads + kv_head)
    }
}

/// Numbers that Adam moves, with their means; on the host, for the few that gates are.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Gates {
    /// Logits: a gate is their sigmoid.
    pub logits: Vec<f32>,
    pub first: Vec<f32>,
    pub second: Vec<f32>,
    pub gradient: Vec<f64>,
}

/// Adapters, gradients and the state of Adam.
pub(crate) struct Adapter<D: Train> {
    pub shape: AdapterShape,
    pub maps: D::Buffer,
    pub gradient: D::Buffer,
    pub first: D::Buffer,
    pub second: D::Buffer,
    /// `None` where all gates are 1.
    pub gates: Option<Gates>,
}

impl<D: Train> Adapter<D> {
    /// Adapters of zeros.
    pub(crate) fn new(device: &D, shape: AdapterShape, recipe: &Recipe) -> Result<Self, DeviceError> {
        let buffer = || device.buffer(shape.numbers());
        let gates = recipe.gate.then(|| Gates {
            logits: vec![GATE_START; shape.heads],
            first: vec![0.0; shape.heads],
            second: vec![0.0; shape.heads],
            gradient: vec![0.0; shape.heads],
        });
        Ok(Adapter { shape, maps: buffer()?, gradient: buffer()?, first: buffer()?, second: buffer()?, gates })
    }

    /// What the correction of a query head is multiplied by.
    pub(crate) fn gate(&self, head: usize) -> f32 {
        self.gates.as_ref().map_or(1.0, |gates| 1.0 / (1.0 + (-gates.logits[head]).exp()))
    }

    /// Forgets the gradient.
    pub(crate) fn clear(&mut self, device: &D) {
        device.clear(&mut self.gradient, 0..self.shape.numbers());
        self.gates.iter_mut().for_each(|gates| gates.gradient.fill(0.0));
    }

    /// Adds the derivative by a gate to that by its logit.
    pub(crate) fn add_gate_gradient(&mut self, head: usize, derivative: f64) {
        let gate = f64::from(self.gate(head));
        if let Some(gates) = &mut self.gates {
            gates.gradient[head] += derivative * gate * (1.0 - gate);
        }
    }

    /// Moves the adapters by the mean of the gradients of `rows` rows; `step` counts from 1. False where a gradient is not
    /// finite; nothing is moved then.
    #[must_use]
    pub(crate) fn step(&mut self, device: &D, rate: f32, clip: f32, rows: usize, step: usize) -> bool {
        let numbers = self.shape.numbers();
        let gates = self.gates.iter().flat_map(|gates| &gates.gradient).map(|x| x * x).sum::<f64>();
        let norm = (device.sum_of_squares(&self.gradient, 0..numbers) + gates).sqrt() / rows as f64;
        if !norm.is_finite() {
            return false;
        }
        let clip = f64::from(clip);
        let factor = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 };
        let correction = |beta: f64| (1.0 - beta.powi(step.min(1 << 20) as i32)) as f32;
        let adam = AdamStep {
            rate,
            betas: BETAS.map(|beta| beta as f32),
            epsilon: EPSILON,
            scale: (factor / rows as f64) as f32,
            corrections: BETAS.map(correction),
        };
        device.adam(adam, numbers, &self.gradient, &mut self.first, &mut self.second, &mut self.maps);
        if let Some(gates) = &mut self.gates {
            gates.step(adam);
        }
        true
    }

    /// Whether all numbers are.
    pub(crate) fn is_finite(&self, device: &D) -> bool {
        let gates = self.gates.iter().flat_map(|gates| &gates.logits).all(|logit| logit.is_finite());
        gates && device.sum_of_squares(&self.maps, 0..self.shape.numbers()).is_finite()
    }

    /// The adapters as a calibration holds them.
    pub(crate) fn finish(&self, device: &D) -> Result<Adapters, DeviceError> {
        let AdapterShape { heads, kv_heads, features, .. } = self.shape;
        let mut maps = Vec::new();
        device.download(&self.maps, 0..self.shape.numbers(), &mut maps)?;
        let (query, key) = maps.split_at(heads * self.shape.map());
        assert_eq!(key.len(), kv_heads * self.shape.map());
        let half = |maps: &[f32], second: usize| -> Vec<f32> {
            maps.chunks_exact(features / 2).skip(second).step_by(2).flatten().copied().collect()
        };
        Ok(Adapters {
            features,
            query: [half(query, 0), half(query, 1)],
            key: [half(key, 0), half(key, 1)],
            gates: (0..heads).map(|head| self.gate(head)).collect(),
        })
    }
}

impl Gates {
    fn step(&mut self, step: AdamStep) {
        let AdamStep { rate, betas: [beta1, beta2], epsilon, scale, corrections: [correction1, correction2] } = step;
        for head in 0..self.logits.len() {
            let gradient = (self.gradient[head] * f64::from(scale)) as f32;
            let (first, second) = (&mut self.first[head], &mut self.second[head]);
            *first = beta1 * *first + (1.0 - beta1) * gradient;
            *second = beta2 * *second + (1.0 - beta2) * gradient * gradient;
            self.logits[head] -= GATE_RATE * rate * (*first / correction1) / ((*second / correction2).sqrt() + epsilon);
        }
    }
}
