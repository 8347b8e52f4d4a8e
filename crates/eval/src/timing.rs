//! How long attention of a decoding step takes, scheme against scheme in one run.

use crate::EvalError;
use dibit_cache::{CacheLayout, CacheManager, Scheme, Sees, Sequence};
use dibit_device::{Batch, DType, Device, Mode, Tensor};
use dibit_model::ModelConfig;
use std::time::{Duration, Instant};

/// Timed steps of each scheme.
const STEPS: usize = 15;

/// Rows that are cached at once.
const FILL_ROWS: usize = 512;

struct Filled<D: Device> {
    layout: CacheLayout,
    store: D::Store,
    sequence: Sequence,
    times: Vec<Duration>,
}

/// Time of attention of one decoding step over `context` cached tokens, all layers together: for each scheme the median
/// of steps that take turns with those of the others. Keys, values and queries are random numbers.
///
/// # Errors
/// [`EvalError`].
pub fn attention_times<D: Device>(
    device: &D,
    config: &ModelConfig,
    schemes: &[Scheme],
    context: usize,
) -> Result<Vec<Duration>, EvalError> {
    let width = config.num_attention_heads * config.head_dim;
    let q = device.upload(&random(0, width))?;
    let mut out = device.buffer(width)?;
    let mut filled =
        schemes.iter().map(|scheme| fill(device, config, scheme, context)).collect::<Result<Vec<_>, _>>()?;
    for _ in 0..STEPS {
        for own in &mut filled {
            let mut batch = Batch::new(Mode::Chunk);
            batch.push(&own.sequence, 1, own.layout.window);
            let heads = config.num_attention_heads;
            let Filled { store, times, layout, .. } = own;
            let elapsed = device.scope(|| {
                let start = Instant::now();
                for layer in 0..layout.layers.len() {
                    device.attention(store, layer, &batch, 0..1, heads, &q, &mut out)?;
                }
                Ok::<_, EvalError>(start.elapsed())
            })?;
            times.push(elapsed);
        }
    }
    Ok(filled.into_iter().map(|own| median(own.times)).collect())
}

fn random(seed: u64, len: usize) -> Vec<f32> {
    Tensor::random(seed, 1.0, DType::F32, 1, len).to_f32()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A cache of `context` random tokens.
fn fill<D: Device>(device: &D, config: &ModelConfig, scheme: &Scheme, context: usize) -> Result<Filled<D>, EvalError> {
    let mut layout = config.cache_layout(scheme)?;
    // What is stored is the same; only rows that are being written see it differently.
    layout.sees = Sees::Exact;
    // One row more, for the token that is decoded.
    let blocks = layout.blocks(context + 1);
    let mut manager = CacheManager::new(layout.clone(), blocks, 1);
    let mut store = device.store(&layout, blocks, 1, FILL_ROWS)?;
    let mut sequence = manager.open()?;
    manager.reserve(&mut sequence, context + 1)?;
    let width = config.num_key_value_heads * config.head_dim;
    for first in (0..context).step_by(FILL_ROWS) {
        let rows = FILL_ROWS.min(context - first);
        let mut batch = Batch::new(Mode::Chunk);
        batch.push(&sequence, rows, layout.window);
        // The first rows are the ones that schemes find which look for large activations.
        let large = if first == 0 { layout.sinks.capacity() } else { 0 };
        let hidden: Vec<f32> = (0..rows).map(|row| if row < large { 1000.0 } else { 1.0 }).collect();
        let hidden = device.upload(&hidden)?;
        let k = device.upload(&random(2 * first as u64 + 1, rows * width))?;
        let v = device.upload(&random(2 * first as u64 + 2, rows * width))?;
        device.scope(|| {
            for layer in 0..layout.layers.len() {
                device.observe(&mut store, layer, &batch, &hidden, 1);
                device.write_kv(&mut store, layer, &batch, 0..rows, &k, &v)?;
                device.commit(&mut store, layer, &batch)?;
            }
            Ok::<_, EvalError>(())
        })?;
        manager.advance(&mut sequence, first + rows);
    }
    // The row that is decoded has keys and values of its own.
    let mut batch = Batch::new(Mode::Chunk);
    batch.push(&sequence, 1, layout.window);
    let row = device.upload(&random(3, width))?;
    for layer in 0..layout.layers.len() {
        device.write_kv(&mut store, layer, &batch, 0..1, &row, &row)?;
    }
    Ok(Filled { layout, store, sequence, times: Vec::new() })
}
