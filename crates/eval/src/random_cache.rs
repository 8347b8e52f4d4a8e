//! A cache of random keys and values, to measure with.

use crate::EvalError;
use dibit_cache::{CacheLayout, CacheManager, Sees, Sequence, Usage};
use dibit_device::{Batch, DType, Device, Mode, Tensor};
use std::time::{Duration, Instant};

/// Rows that are cached at once.
const FILL_ROWS: usize = 512;

/// One sequence of random keys and values in a cache of its own.
pub(crate) struct RandomCache<D: Device> {
    pub manager: CacheManager,
    pub store: D::Store,
    pub sequence: Sequence,
}

impl<D: Device> RandomCache<D> {
    /// `tokens` random tokens in each layer, and room for `more`.
    ///
    /// They are written by the operations of a device, without a model. A scheme that attends to what is stored does so
    /// here only up to the token that is decoded, which sees itself exactly.
    pub fn new(device: &D, mut layout: CacheLayout, tokens: usize, more: usize) -> Result<Self, EvalError> {
        // What is stored is the same; only rows that are being written see it differently.
        layout.sees = Sees::Exact;
        let blocks = layout.blocks(tokens + more);
        let mut manager = CacheManager::new(layout.clone(), blocks, 1);
        let mut sequence = manager.open()?;
        manager.reserve(&mut sequence, tokens + more)?;
        let mut own = RandomCache { store: device.store(&layout, blocks, 1, FILL_ROWS)?, manager, sequence };
        for first in (0..tokens).step_by(FILL_ROWS) {
            own.append(device, FILL_ROWS.min(tokens - first))?;
        }
        Ok(own)
    }

    fn append(&mut self, device: &D, rows: usize) -> Result<(), EvalError> {
        let layout = self.manager.layout();
        let (first, width) = (self.sequence.len(), layout.shape.num_key_value_heads * layout.shape.head_dim);
        let batch = self.batch(rows);
        // The first rows are the ones that schemes find which look for large activations.
        let large = if first == 0 { layout.sinks.capacity() } else { 0 };
        let hidden: Vec<f32> = (0..rows).map(|row| if row < large { 1000.0 } else { 1.0 }).collect();
        let hidden = device.upload(&hidden)?;
        let k = device.upload(&random(2 * first as u64 + 1, rows * width))?;
        let v = device.upload(&random(2 * first as u64 + 2, rows * width))?;
        let store = &mut self.store;
        device.scope(|| {
            for layer in 0..layout.layers.len() {
                device.observe(store, layer, &batch, &hidden, 1);
                device.write_kv(store, layer, &batch, 0..rows, &k, &v)?;
                device.commit(store, layer, &batch)?;
            }
            Ok::<_, EvalError>(())
        })?;
        self.manager.advance(&mut self.sequence, first + rows);
        Ok(())
    }

    /// A pass of the next `rows` tokens.
    pub fn batch(&self, rows: usize) -> Batch {
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(&self.sequence, rows, self.manager.layout().window);
        batch
    }

    /// Gives the token that is decoded next random keys and values in every layer, without caching them.
    pub fn write_next(&mut self, device: &D) -> Result<(), EvalError> {
        let shape = self.manager.layout().shape;
        let batch = self.batch(1);
        let row = device.upload(&random(3, shape.num_key_value_heads * shape.head_dim))?;
        for layer in 0..shape.num_layers {
            device.write_kv(&mut self.store, layer, &batch, 0..1, &row, &row)?;
        }
        Ok(())
    }

    /// Attention of the token that is decoded next, all layers one after the other, with the time that it takes.
    pub fn attend(
        &mut self,
        device: &D,
        num_heads: usize,
        q: &D::Buffer,
        out: &mut D::Buffer,
    ) -> Result<Duration, EvalError> {
        let batch = self.batch(1);
        let (store, layers) = (&mut self.store, self.manager.layout().layers.len());
        device.scope(|| {
            let start = Instant::now();
            for layer in 0..layers {
                device.attention(store, layer, &batch, 0..1, num_heads, q, out)?;
            }
            Ok(start.elapsed())
        })
    }

    /// What the cached tokens take.
    pub fn usage(&self, device: &D) -> Usage {
        let extras = device.extras(&self.store, self.sequence.slot(), self.sequence.len());
        self.manager.layout().sequence_usage(&self.sequence, extras)
    }
}

/// Normal numbers.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    Tensor::random(seed, 1.0, DType::F32, 1, len).to_f32()
}
