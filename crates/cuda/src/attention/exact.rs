//! Attention in f32, whatever the pages hold.

use super::parts::Parts;
use crate::abi;
use crate::cuda::Cuda;
use crate::kernel::{Grid, launch};
use crate::store::{CudaStore, Layer};
use dibit_cache::PAGE_TOKENS;

/// Queries of a block, and threads; tokens that are expanded at a time, and of keys before RoPE.
const QUERIES: usize = 16;
const THREADS: usize = 128;
const TOKENS: usize = 32;
const TURNED_TOKENS: usize = 8;

/// Tokens of a split of a history; kernels/exact.cu has the same.
fn split_tokens(cached: usize) -> usize {
    let mut tokens = PAGE_TOKENS;
    while cached > 64 * tokens {
        tokens *= 2;
    }
    tokens
}

/// Splits of a row that sees `cached` tokens.
pub(super) fn splits(cached: usize) -> usize {
    cached.div_ceil(split_tokens(cached)).max(1)
}

/// Shared memory that the kernel takes for a layer.
pub(crate) fn shared_bytes(layer: &Layer, head_dim: usize) -> usize {
    let turned = if layer.pre_rope.is_some() { TURNED_TOKENS * layer.pre_rope().heads as usize * head_dim } else { 0 };
    (TOKENS * (head_dim + 4) + QUERIES * (2 * head_dim + PAGE_TOKENS) + turned) * size_of::<f32>()
}

/// Computes the parts of all rows.
pub(super) fn attend(c: &Cuda, store: &CudaStore, parts: &Parts) {
    let (shape, own) = (store.layout.shape, &store.layers[parts.layer]);
    let (kv_heads, d) = (shape.num_key_value_heads, shape.head_dim);
    let attention = parts.for_kernels;
    let shared = parts.heads / kv_heads;
    let exact = abi::Exact {
        classes: own.classes.at(0),
        class_spans: store.staged.class_spans(),
        positions: store.staged.positions(),
        pre_rope: own.pre_rope(),
    };
    let tiles = parts.tiles((QUERIES / shared).max(1));
    let blocks = [tiles, kv_heads * shared.div_ceil(QUERIES), parts.splits];
    let grid = Grid::new(blocks, THREADS).shared(shared_bytes(own, d));
    launch!(c.gpu, store.kernels.attend_exact, grid, attention, exact);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_cover_a_history() {
        assert_eq!([0, 1, 128, 129, 8192, 8193].map(splits), [1, 1, 1, 2, 64, 33]);
        for cached in 0..70_000 {
            let (step, splits) = (split_tokens(cached), splits(cached));
            assert!(splits * step >= cached && (splits - 1) * step <= cached && splits <= 64);
            assert!(splits <= self::splits(cached.next_power_of_two()), "the most of all up to there");
        }
    }
}
