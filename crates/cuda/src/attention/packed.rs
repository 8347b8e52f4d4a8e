//! Attention of single tokens on two-bit codes as they lie.

use super::parts::Parts;
use crate::CudaError;
use crate::cuda::Cuda;
use crate::gpu::Gpu;
use crate::kernel::{Grid, Kernel, launch};
use crate::source::PACKED;
use crate::store::CudaStore;
use dibit_cache::{Along, CachePlan, PAGE_TOKENS, PackedSide, PageLayout, Schedule, SideLayout, Transform};
use dibit_quant::{Bits, Quantizer};

/// As in kernels/packed/constants.cuh.
const WARPS: usize = 4;
const SLOTS: usize = 3;
const QUERIES: usize = 8;
const PLAIN_TOKENS: usize = 128;
const COLUMN_BYTES: usize = 16 * PAGE_TOKENS;

/// The kernel for one layer.
#[derive(Clone)]
pub(super) struct Packed {
    kernel: Kernel,
    shared_bytes: usize,
}

/// What the kernel is compiled with.
pub(super) struct Macros {
    values: Vec<(&'static str, i64)>,
    columns: usize,
    key_planes: bool,
}

/// Whether codes of two bits are all that there is, besides parameters.
fn is_plain(side: &PackedSide) -> bool {
    side.bits == Bits::Two
        && !side.token_hadamard
        && side.high.is_none()
        && side.factors.is_none()
        && side.outliers.is_none()
}

fn suits_keys(page: &PageLayout) -> Option<PackedSide> {
    match page.keys {
        SideLayout::Packed(side) if is_plain(&side) && side.along == Along::Lanes && side.group == PAGE_TOKENS => {
            Some(side)
        }
        _ => None,
    }
}

/// Values with one group for each token, or for each channel of a page.
fn suits_values(page: &PageLayout, head_dim: usize) -> Option<PackedSide> {
    match page.values {
        SideLayout::Packed(side) if is_plain(&side) => match side.along {
            Along::Lanes => side.planes.is_none() && side.lanes == head_dim && side.group == head_dim,
            Along::Rows => side.group == PAGE_TOKENS,
        }
        .then_some(side),
        _ => None,
    }
}

impl Packed {
    /// What the kernel of a layer is compiled with, where it suits the layer.
    pub(super) fn suits(layout: &CachePlan, index: usize) -> Option<Macros> {
        let (layer, head_dim) = (&layout.layers[index], layout.shape.head_dim);
        if !matches!(head_dim, 64 | 128) || !layout.classes.is_empty() || matches!(layer.keys, Transform::PreRope(_)) {
            return None;
        }
        let keys: Vec<PackedSide> = layer.pages.iter().map(suits_keys).collect::<Option<_>>()?;
        let values: Vec<PackedSide> =
            layer.pages.iter().map(|page| suits_values(page, head_dim)).collect::<Option<_>>()?;
        let key_planes = keys.iter().any(|side| side.planes.is_some());
        let by_channel = values.iter().any(|side| side.along == Along::Rows);
        let widest = values.iter().map(|side| side.row_bytes).max().unwrap_or(0);
        let columns = if by_channel { widest.div_ceil(16) } else { 0 };
        let integer = |sides: &[PackedSide]| i64::from(sides.iter().any(|side| side.quantizer != Quantizer::FloatMin));
        // Planes come with minimums alone.
        if key_planes && integer(&keys) != 0 {
            return None;
        }
        let macros = [
            ("HEAD_DIM", head_dim as i64),
            ("BIAS", layer.bias.into()),
            ("INTEGER_KEYS", integer(&keys)),
            ("INTEGER_VALUES", integer(&values)),
            ("LATE_VALUES", (layout.window.schedule == Schedule::Kivi).into()),
            ("KEY_PLANES", key_planes.into()),
            ("VALUE_COLUMNS", columns as i64),
            ("PAGE_SINKS", layer.protects_in_pages().into()),
        ];
        let own = macros.into_iter().filter(|(_, value)| *value != 0).collect();
        Some(Macros { values: own, columns, key_planes })
    }

    /// `limits` are macros of what limits logits and what is seen.
    pub(super) fn new(
        gpu: &Gpu,
        layout: &CachePlan,
        index: usize,
        limits: &[(&'static str, i64)],
    ) -> Result<Option<Self>, CudaError> {
        let Some(mut macros) = Packed::suits(layout, index) else { return Ok(None) };
        macros.values.extend(limits);
        let pages = &layout.layers[index].pages;
        let shared_bytes = pages.iter().map(|page| shared_bytes(page, &macros, layout.shape.head_dim)).max();
        let shared_bytes = shared_bytes.unwrap_or(0);
        let kernel = gpu.kernel(PACKED, &macros.values, "attend_packed")?;
        Ok((shared_bytes <= kernel.most_shared).then_some(Packed { kernel, shared_bytes }))
    }

    /// Computes the parts of all rows.
    pub(super) fn attend(&self, c: &Cuda, store: &CudaStore, parts: &Parts) {
        let kv_heads = store.layout.shape.num_key_value_heads;
        let queries = parts.rows.len().min(store.staged.most_rows) * parts.heads / kv_heads;
        let blocks = [kv_heads * queries.div_ceil(QUERIES), parts.spans, parts.splits];
        let grid = Grid::new(blocks, 32 * WARPS).shared(self.shared_bytes);
        launch!(c.gpu, self.kernel, grid, parts.for_kernels);
    }
}

/// Shared memory of a block that reads such pages.
fn shared_bytes(page: &PageLayout, macros: &Macros, head_dim: usize) -> usize {
    let (SideLayout::Packed(keys), SideLayout::Packed(values)) = (page.keys, page.values) else { return 0 };
    let key_rows = keys.rows.next_multiple_of(16);
    let key_bytes = key_rows * 32 + (keys.zeros - keys.scales + 2 * head_dim).next_multiple_of(16);
    let (value_bytes, column) = match macros.columns {
        0 => (head_dim / 64 * COLUMN_BYTES + 4 * PAGE_TOKENS, 0),
        _ => {
            let bare = values.planes.map_or(0, |planes| planes.channels - planes.with[0]);
            let bytes = (values.zeros - values.codes + 2 * head_dim).next_multiple_of(16) + 32;
            (bytes, COLUMN_BYTES + 4 * QUERIES * bare)
        }
    };
    let planes = if macros.key_planes { key_rows / 16 * 384 } else { 0 };
    let operands = 256 * (head_dim / 16) + planes;
    WARPS * (SLOTS * key_bytes.max(value_bytes) + column) + operands
}

/// Splits of any span of up to `rows` rows that see up to `longest` tokens of a cache, at most: those of pages, and those of
/// tokens in 16 bit. `split_pages` in kernels/packed/constants.cuh says how many a span has.
pub(super) fn splits(layout: &CachePlan, longest: usize, rows: usize) -> usize {
    let pages = longest.div_ceil(PAGE_TOKENS);
    let of_pages = pages.min(4).max(pages.div_ceil(16)).min(44);
    let recent = layout.window.key_slots().max(layout.window.value_slots()).min(longest + 1);
    let plain = (layout.sinks.capacity() + recent).next_multiple_of(16) + rows;
    of_pages + plain.div_ceil(PLAIN_TOKENS)
}
