//! A cache of random keys and values, to measure with.

use crate::EvalError;
use dibit_cache::{CacheLayout, CacheManager, Sees, Sequence, Usage};
use dibit_device::{Batch, DType, Device, Mode, Tensor};
use std::time::Duration;

/// Rows that are cached at once.
const FILL_ROWS: usize = 512;

/// Sequences of random keys and values, all of one length, in a cache of their own.
pub(crate) struct RandomCache<D: Device> {
    pub manager: CacheManager,
    pub store: D::Store,
    sequences: Vec<Sequence>,
}

impl<D: Device> RandomCache<D> {
    /// `count` sequences of `tokens` random tokens in each layer, and room for `more`. The sequences hold the same
    /// numbers, each in its own pages: what they cost to read is the same, and random numbers are made once.
    ///
    /// They are written by the operations of a device, without a model. A scheme that attends to what is stored does so
    /// here only up to the token that is decoded, which sees itself exactly.
    pub fn new(
        device: &D,
        mut layout: CacheLayout,
        count: usize,
        tokens: usize,
        more: usize,
    ) -> Result<Self, EvalError> {
        // What is stored is the same; only rows that are being written see it differently.
        layout.sees = Sees::Exact;
        let blocks = count * layout.blocks(tokens + more);
        let mut manager = CacheManager::new(layout.clone(), blocks, count);
        let mut sequences = Vec::new();
        for _ in 0..count {
            let mut sequence = manager.open()?;
            manager.reserve(&mut sequence, tokens + more)?;
            sequences.push(sequence);
        }
        let store = device.store(&layout, blocks, count, FILL_ROWS.max(count))?;
        let mut own = RandomCache { store, manager, sequences };
        for first in (0..tokens).step_by(FILL_ROWS) {
            own.append(device, FILL_ROWS.min(tokens - first))?;
        }
        device.synchronize();
        Ok(own)
    }

    fn append(&mut self, device: &D, rows: usize) -> Result<(), EvalError> {
        let layout = self.manager.layout();
        let (first, width) = (self.len(), layout.shape.num_key_value_heads * layout.shape.head_dim);
        // The first rows are the ones that schemes find which look for large activations.
        let large = if first == 0 { layout.sinks.capacity() } else { 0 };
        let hidden: Vec<f32> = (0..rows).map(|row| if row < large { 1000.0 } else { 1.0 }).collect();
        let hidden = device.upload(&hidden)?;
        let k = device.upload(&random(2 * first as u64 + 1, rows * width))?;
        let v = device.upload(&random(2 * first as u64 + 2, rows * width))?;
        for sequence in &self.sequences {
            let batch = batch(std::slice::from_ref(sequence), rows, layout);
            let store = &mut self.store;
            device.scope(|| {
                for layer in 0..layout.layers.len() {
                    device.observe(store, layer, &batch, &hidden, 1);
                    device.write_kv(store, layer, &batch, 0..rows, &k, &v)?;
                    device.commit(store, layer, &batch)?;
                }
                Ok::<_, EvalError>(())
            })?;
        }
        self.advance(rows);
        Ok(())
    }

    /// Tokens of each sequence.
    pub fn len(&self) -> usize {
        self.sequences[0].len()
    }

    /// A pass of the next token of every sequence.
    pub fn batch(&self) -> Batch {
        batch(&self.sequences, 1, self.manager.layout())
    }

    /// Says that so many further tokens of each sequence are cached.
    pub fn advance(&mut self, tokens: usize) {
        let len = self.len() + tokens;
        self.sequences.iter_mut().for_each(|sequence| self.manager.advance(sequence, len));
    }

    /// Gives the tokens that are decoded next random keys and values in every layer, without caching them.
    pub fn write_next(&mut self, device: &D) -> Result<(), EvalError> {
        let shape = self.manager.layout().shape;
        let batch = self.batch();
        let rows = device.upload(&random(3, batch.rows() * shape.row()))?;
        for layer in 0..shape.num_layers {
            device.write_kv(&mut self.store, layer, &batch, 0..batch.rows(), &rows, &rows)?;
        }
        Ok(())
    }

    /// Attention of the tokens that are decoded next, all layers one after the other, with the time that it takes.
    pub fn attend(
        &mut self,
        device: &D,
        num_heads: usize,
        q: &D::Buffer,
        out: &mut D::Buffer,
    ) -> Result<Duration, EvalError> {
        let batch = self.batch();
        let (store, layers) = (&mut self.store, self.manager.layout().layers.len());
        device.scope(|| {
            let attend = |layer| device.attention(store, layer, &batch, 0..batch.rows(), num_heads, q, out);
            let (done, time) = device.timed(|| (0..layers).try_for_each(attend));
            done?;
            Ok(time)
        })
    }

    /// What the cached tokens take, those of all sequences together.
    pub fn usage(&self, device: &D) -> Usage {
        let of = |sequence: &Sequence| {
            let extras = device.extras(&self.store, sequence.slot(), sequence.len());
            self.manager.layout().sequence_usage(sequence, extras)
        };
        self.sequences.iter().map(of).fold(Usage::default(), |all, own| all + own)
    }
}

/// A pass of the next `rows` tokens of each sequence.
fn batch(sequences: &[Sequence], rows: usize, layout: &CacheLayout) -> Batch {
    let mut batch = Batch::new(Mode::Chunk);
    sequences.iter().for_each(|sequence| batch.push(sequence, rows, layout.window));
    batch
}

/// Normal numbers.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    Tensor::random(seed, 1.0, DType::F32, 1, len).to_f32()
}
