//! Running a model over tokens.

use dibit_cache::{CacheLayout, CacheManager};
use dibit_device::{Batch, Cpu, Device, Mode};
use dibit_model::{Model, Workspace};

/// Logits of all `ids`, fed in passes of these lengths.
pub fn logits(
    cpu: &Cpu,
    model: &Model<Cpu>,
    layout: &CacheLayout,
    mode: Mode,
    ids: &[u32],
    passes: &[usize],
) -> Vec<Vec<f32>> {
    let config = model.config();
    let mut manager = CacheManager::new(layout.clone(), layout.window.blocks(ids.len()), 1);
    let mut store = cpu.store(layout, manager.num_blocks(), 1, ids.len()).unwrap();
    let mut workspace = Workspace::new(cpu, config, ids.len(), ids.len()).unwrap();
    let mut sequence = manager.open().unwrap();
    let mut all = Vec::new();
    for &rows in passes {
        let (start, end) = (sequence.len(), sequence.len() + rows);
        manager.reserve(&mut sequence, end).unwrap();
        let mut batch = Batch::new(mode);
        batch.push(&sequence, rows, layout.window);
        model.forward(cpu, &mut workspace, &mut store, &batch, &ids[start..end]).unwrap();
        manager.advance(&mut sequence, end);
        let outputs: Vec<usize> = (0..rows).collect();
        let mut logits = Vec::new();
        model.logits(cpu, &mut workspace, &outputs, &mut logits).unwrap();
        all.extend(logits.chunks_exact(config.vocab_size).map(<[f32]>::to_vec));
    }
    all
}
