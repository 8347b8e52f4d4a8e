//! Running a model over tokens.

use dibit_cache::{CacheLayout, Mode, Sequence};
use dibit_cpu::Cpu;
use dibit_model::Model;
use dibit_runner::{Capacity, Executor, Runner};
use std::sync::Arc;

/// Logits of all `ids`, fed in passes of these lengths.
pub fn logits(
    model: &Arc<Model<Cpu>>,
    layout: &CacheLayout,
    mode: Mode,
    ids: &[u32],
    passes: &[usize],
) -> Vec<Vec<f32>> {
    let capacity = Capacity::of_one(layout, ids.len(), ids.len());
    let mut runner = Runner::new(model.clone(), layout.clone(), capacity).unwrap();
    let mut sequence: Sequence = runner.open().unwrap();
    let mut all = Vec::new();
    for &rows in passes {
        let new = &ids[sequence.len()..sequence.len() + rows];
        let mut logits = Vec::new();
        let outputs: Vec<usize> = (0..rows).collect();
        runner.step(mode, &mut [(&mut sequence, new)]).unwrap();
        runner.logits(&outputs, &mut logits).unwrap();
        all.extend(logits.chunks_exact(model.config().vocab_size).map(<[f32]>::to_vec));
    }
    all
}
