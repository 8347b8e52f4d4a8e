//! A cache of random keys and values, to measure with.

use crate::EvalError;
use dibit_cache::{Batch, CacheLayout, Mode, Sequence, Usage};
use dibit_device::{Arithmetic, DType, Device, DeviceError, KvCache, Measure, Pass, QueryHeads, Tensor};
use std::time::Duration;

/// Rows that are cached at once.
const FILL_ROWS: usize = 512;

/// Sequences of random keys and values, all of one length, in a cache of their own.
pub(crate) struct RandomCache<D: Device> {
    pub cache: KvCache<D>,
    sequences: Vec<Sequence>,
}

impl<D: Device + Measure> RandomCache<D> {
    /// `count` sequences of `tokens` random tokens in each layer, and room for `more`. The sequences hold the same
    /// numbers, each in its own pages: what they cost to read is the same, and random numbers are made once.
    ///
    /// They are written by the operations of a device, without a model. A scheme that attends to what is stored does so
    /// here only up to the token that is decoded, which sees itself exactly.
    pub fn new(
        device: &D,
        layout: CacheLayout,
        count: usize,
        tokens: usize,
        more: usize,
        arithmetic: Arithmetic,
    ) -> Result<Self, EvalError> {
        // What is stored is the same; only rows that are being written see it differently.
        let layout = layout.seen_exactly();
        let blocks = count * layout.blocks(tokens + more);
        let mut cache = KvCache::new(device, layout, blocks, count, FILL_ROWS.max(count), arithmetic)?;
        let mut sequences = Vec::new();
        for _ in 0..count {
            let mut sequence = cache.open()?;
            cache.reserve(&mut sequence, tokens + more)?;
            sequences.push(sequence);
        }
        let mut own = RandomCache { cache, sequences };
        for first in (0..tokens).step_by(FILL_ROWS) {
            own.append(device, FILL_ROWS.min(tokens - first))?;
        }
        device.synchronize();
        Ok(own)
    }

    fn append(&mut self, device: &D, rows: usize) -> Result<(), EvalError> {
        let layout = self.cache.layout();
        let (first, width) = (self.len(), layout.shape.num_key_value_heads * layout.shape.head_dim);
        // The first rows are the ones that schemes find which look for large activations.
        let large = if first == 0 { layout.sinks.capacity() } else { 0 };
        let hidden: Vec<f32> = (0..rows).map(|row| if row < large { 1000.0 } else { 1.0 }).collect();
        let hidden = device.upload(&hidden)?;
        let k = device.upload(&random(2 * first as u64 + 1, rows * width))?;
        let v = device.upload(&random(2 * first as u64 + 2, rows * width))?;
        let layers = layout.layers.len();
        let store = |pass: &mut Pass<D>| {
            (0..layers).try_for_each(|_| {
                let mut layer = pass.layer(&hidden, 1)?;
                layer.stage(rows, &k, &v)?;
                layer.pack()
            })
        };
        for sequence in &self.sequences {
            let mut batch = Batch::new(Mode::Chunk);
            batch.push(self.cache.manager(), sequence, rows);
            self.cache.pass_once::<DeviceError>(device, &batch, store)?;
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
        let mut batch = Batch::new(Mode::Chunk);
        self.sequences.iter().for_each(|sequence| batch.push(self.cache.manager(), sequence, 1));
        batch
    }

    /// Says that so many further tokens of each sequence are cached.
    pub fn advance(&mut self, tokens: usize) {
        self.sequences.iter_mut().for_each(|sequence| self.cache.advance(sequence, tokens));
    }

    /// Attention of the tokens that are decoded next, whose keys and values are `rows`, all layers one after the other,
    /// with the time that it takes.
    pub fn attend(
        &mut self,
        device: &D,
        num_heads: usize,
        [q, rows]: [&D::Buffer; 2],
        out: &mut D::Buffer,
    ) -> Result<Duration, EvalError> {
        let (batch, mut time) = (self.batch(), Duration::ZERO);
        self.cache.pass_once::<DeviceError>(device, &batch, |pass| {
            pass.layer(rows, 1)?.stage(batch.rows(), rows, rows)?;
            let (done, own) = device.timed(|| pass.attend_in_all_layers(QueryHeads::plain(num_heads), q, out));
            time = own;
            done
        })?;
        Ok(time)
    }

    /// What the cached tokens take, those of all sequences together.
    pub fn usage(&self) -> Usage {
        let of = |sequence: &Sequence| self.cache.usage(sequence);
        self.sequences.iter().map(of).fold(Usage::default(), |all, own| all + own)
    }
}

/// Normal numbers.
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    Tensor::random(seed, 1.0, DType::F32, 1, len).to_f32()
}
