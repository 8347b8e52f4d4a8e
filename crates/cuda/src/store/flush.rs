//! Packing what leaves the window.

use super::CudaStore;
use crate::abi;
use crate::cuda::Cuda;
use crate::kernel::{Grid, launch};
use crate::memory::room;
use dibit_cache::PAGE_TOKENS;
use dibit_device::DeviceError;

/// Tokens of a block of `turn_back`, tokens and features of blocks of the linear correction.
const TURNED_TOKENS: usize = 8;
const TILE: usize = 8;
const FEATURES: usize = 16;

/// Packs the staged runs in a layer.
pub(super) fn flush(store: &mut CudaStore, c: &Cuda, layer: usize) -> Result<(), DeviceError> {
    let shape = store.staged.shape;
    if shape.runs == 0 {
        return Ok(());
    }
    let (heads, d) = (store.layout.shape.num_key_value_heads, store.layout.shape.head_dim);
    let tokens = shape.tokens;
    debug_assert!(tokens <= PAGE_TOKENS, "a run lies in one page");
    let numbers = tokens * (d + 1);
    let bytes = numbers * size_of::<f32>();
    // A page of heads of 256 channels is more than the shared memory of most GPUs.
    let fits = bytes + PAGE_TOKENS * size_of::<i32>() <= c.gpu.limits.shared_bytes;
    let spilled = match fits {
        true => 0,
        false => {
            room(&c.gpu, &mut store.scratch.spilled, "tokens on their way into pages", shape.runs * heads * bytes)?
        }
    };
    let own = &store.layers[layer];
    let (staged, group) = (&store.staged, store.layout.layers[layer].group);
    let flush = abi::Flush {
        cache: store.cache(layer),
        layer: layer as i32,
        span_count: shape.spans as i32,
        spans: staged.spans(group),
        runs: staged.runs(group),
        run_count: staged.run_count(group),
        positions: staged.positions(),
        classes: own.classes.at(0),
        pre_rope: own.pre_rope(),
        feedback: own.feedback(),
        value_frame: own.value_frame(),
        angles: staged.angles(group),
        turned: store.turned.at(0),
        errors: store.errors.at(),
        spilled,
        spilled_numbers: numbers as i64,
    };
    if let Some(pre_rope) = &own.pre_rope {
        let width = pre_rope.heads() * d;
        let grid = Grid::new([shape.runs, heads / pre_rope.heads(), tokens.div_ceil(TURNED_TOKENS)], 256)
            .shared(TURNED_TOKENS * width * size_of::<f32>());
        launch!(c.gpu, store.kernels.turn_back, grid, flush);
    }
    if store.layout.layers[layer].protects_in_pages() {
        launch!(c.gpu, store.kernels.protect_in_pages, Grid::new([shape.runs, heads, 1], 256), flush);
    }
    let grid = Grid::new([shape.runs, heads, 1], 256).shared(if fits { bytes } else { 0 });
    launch!(c.gpu, store.kernels.encode, grid, flush);
    if let Some(correction) = store.correction(layer) {
        let features = correction.features as usize;
        let grid = Grid::new([shape.runs, heads, tokens.div_ceil(TILE)], 128)
            .shared(TILE * (2 * d + features) * size_of::<f32>());
        launch!(c.gpu, store.kernels.missed_features, grid, flush, correction, own.keys.for_kernels());
        let grid = Grid::new([shape.spans, heads, features.div_ceil(FEATURES)], 128);
        launch!(c.gpu, store.kernels.add_states, grid, flush, correction);
    }
    Ok(())
}
