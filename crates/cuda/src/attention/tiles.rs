//! Attention by tiles of tokens on tensor cores, for prompts and for caches of nearly any form.

use super::parts::Parts;
use crate::CudaError;
use crate::cuda::Cuda;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, launch};
use crate::memory::room;
use crate::source::TILES;
use crate::store::CudaStore;
use dibit_cache::{CachePlan, PAGE_TOKENS, PageLayout, SideLayout, Transform};
use dibit_device::DeviceError;

/// As in kernels/tiles/constants.cuh.
const THREADS: usize = 128;
const FEW_QUERIES: usize = 16;

/// The kernels for one layer.
#[derive(Clone)]
pub(super) struct Tiles {
    many: Kernel,
    few: Kernel,
    halve: Kernel,
    /// Shared memory of either.
    many_bytes: usize,
    few_bytes: usize,
    /// Queries of a block of `many`.
    many_queries: usize,
}

impl Tiles {
    /// Whether the kernels suit a layer.
    pub(super) fn suits(layout: &CachePlan, index: usize) -> bool {
        let layer = &layout.layers[index];
        let suits = |side: SideLayout| match side {
            SideLayout::Half { .. } => true,
            SideLayout::Packed(own) => !own.token_hadamard && own.factors.is_none() && own.outliers.is_none(),
        };
        layout.shape.head_dim.is_multiple_of(8)
            && layout.shape.head_dim <= 256
            && layout.classes.is_empty()
            && !matches!(layer.keys, Transform::PreRope(_))
            && layer.pages.iter().all(|page| suits(page.keys) && suits(page.values))
    }

    /// `limits` are macros of what limits logits and what is seen.
    pub(super) fn new(
        gpu: &Gpu,
        layout: &CachePlan,
        index: usize,
        limits: &[(&'static str, i64)],
    ) -> Result<Option<Self>, CudaError> {
        let (layer, d) = (&layout.layers[index], layout.shape.head_dim);
        if !Tiles::suits(layout, index) {
            return Ok(None);
        }
        let is_packed = |side: SideLayout| matches!(side, SideLayout::Packed(_));
        let packed = layer.pages.iter().any(|page| is_packed(page.keys) || is_packed(page.values));
        let page_bytes = layer.pages.iter().map(expanded_bytes).max().unwrap_or(0);
        let parts = tile_channels(d) / 8;
        let row_bytes = 16 * if parts.is_multiple_of(8) { parts } else { parts + 1 };
        let tile = |tokens: usize| 2 * tokens * row_bytes;
        let large = d > 128;
        let many_queries = if large { 64 } else { 128 };
        let many_tile = tile(if large { 32 } else { 64 });
        let many_bytes = many_queries * tile_channels(d) * 2 + many_tile + many_tile.max(page_bytes);
        let few_bytes = tile(64) + tile(64).max(page_bytes);
        let mut macros = vec![("HEAD_DIM", d as i64)];
        macros.extend(layer.protects_in_pages().then_some(("PAGE_SINKS", 1)));
        macros.extend(limits);
        let kernel = |name| gpu.kernel(TILES, &macros, name);
        let [many, few] = match packed {
            true => ["attend_packed_tiles", "attend_packed_splits"],
            false => ["attend_tiles", "attend_splits"],
        };
        let (many, few, halve) = (kernel(many)?, kernel(few)?, kernel("halve_incoming")?);
        let fits = many_bytes <= many.most_shared && few_bytes <= few.most_shared;
        Ok(fits.then_some(Tiles { many, few, halve, many_bytes, few_bytes, many_queries }))
    }

    /// Computes the parts of all rows.
    pub(super) fn attend(&self, c: &Cuda, store: &mut CudaStore, parts: &Parts) -> Result<(), DeviceError> {
        let shape = store.layout.shape;
        let (kv_heads, d) = (shape.num_key_value_heads, shape.head_dim);
        let shared = parts.heads / kv_heads;
        let attention = parts.for_kernels;
        let has_many = store.staged.most_rows > 1 && store.staged.most_rows * shared > FEW_QUERIES;
        let mut halves = 0;
        if has_many && attention.incoming != 0 {
            let rows = parts.rows.end;
            let bytes = 2 * attention.cache.incoming_rows as usize * shape.row() * size_of::<u16>();
            halves = room(&c.gpu, &mut store.scratch.halves, "rows of a pass", bytes)?;
            let grid = Grid::new([(rows * d / 8).div_ceil(THREADS), kv_heads, 1], THREADS);
            launch!(c.gpu, self.halve, grid, attention.cache, rows as i32, halves);
        }
        let queries = parts.rows.len() * shared;
        let blocks = |tile: usize| queries.div_ceil(tile) + parts.spans;
        if has_many {
            let grid = Grid::new([blocks(self.many_queries), kv_heads, 1], THREADS).shared(self.many_bytes);
            launch!(c.gpu, self.many, grid, attention, halves);
        }
        if store.staged.least_rows == 1 || store.staged.least_rows * shared <= FEW_QUERIES {
            let few = blocks(FEW_QUERIES);
            let grid = Grid::new([few, kv_heads, parts.splits], THREADS).shared(self.few_bytes);
            launch!(c.gpu, self.few, grid, attention, halves);
        }
        Ok(())
    }
}

/// Channels of a head in a tile, for steps of 16.
pub(super) fn tile_channels(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

/// Bytes of a page that are expanded.
fn expanded_bytes(page: &PageLayout) -> usize {
    let first = match (page.keys, page.values) {
        (SideLayout::Packed(_), _) => 0,
        (_, SideLayout::Packed(values)) => values.codes,
        _ => return 0,
    };
    match page.values {
        SideLayout::Half { rows } => rows - first,
        SideLayout::Packed(_) => page.bytes - first,
    }
}

/// Splits of any row that sees up to `longest` tokens, at most. kernels/tiles/constants.cuh says how many a row has.
pub(super) fn splits(longest: usize) -> usize {
    longest.div_ceil(2 * PAGE_TOKENS).clamp(1, 32)
}
