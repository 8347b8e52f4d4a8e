use crate::abi;
use std::ops::Range;

/// What a kernel that computes parts needs to know.
pub(super) struct Parts {
    pub layer: usize,
    pub rows: Range<usize>,
    pub heads: usize,
    pub spans: usize,
    pub splits: usize,
    pub for_kernels: abi::Attention,
}

impl Parts {
    /// Tiles of so many rows, at most: one more than whole ones for each span.
    pub(super) fn tiles(&self, tile_rows: usize) -> usize {
        self.rows.len().div_ceil(tile_rows) + self.spans - 1
    }
}
