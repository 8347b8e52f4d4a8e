//! A result that several tasks write.

use dibit_device::Output;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// Rows and columns of the result that one task computes.
const TILE_ROWS: usize = 64;
const TILE_COLUMNS: usize = 64;

/// A row-major result that several tasks write, each to numbers of its own.
pub(super) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks only touch numbers that belong to them alone.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(super) fn new(out: &'a mut [f32]) -> Self {
        Shared { start: out.as_mut_ptr(), len: out.len(), borrow: PhantomData }
    }

    /// Where number `first` lies.
    pub(super) fn at(&self, first: usize) -> *mut f32 {
        assert!(first < self.len);
        self.start.wrapping_add(first)
    }

    /// Numbers from `first` on.
    ///
    /// # Safety
    /// No other task reads or writes these numbers while the result is shared.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(super) unsafe fn slice(&self, first: usize, len: usize) -> &mut [f32] {
        assert!(first + len <= self.len);
        // SAFETY: the numbers lie in the borrowed slice and, by contract, nobody else touches them.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

/// Shares `m` rows and some columns of a result among threads: `work` gets the rows and the columns of each tile.
pub(super) fn each_tile(m: usize, columns: Range<usize>, work: impl Fn(Range<usize>, Range<usize>) + Sync) {
    let column_tiles = columns.len().div_ceil(TILE_COLUMNS);
    (0..m.div_ceil(TILE_ROWS) * column_tiles).into_par_iter().for_each(|task| {
        let row = task / column_tiles * TILE_ROWS;
        let column = columns.start + task % column_tiles * TILE_COLUMNS;
        work(row..m.min(row + TILE_ROWS), column..columns.end.min(column + TILE_COLUMNS));
    });
}

/// Writes or adds sums.
#[inline(always)]
pub(super) fn store(out: &mut [f32], sums: &[f32], bias: Option<&[f32]>, output: Output) {
    for (i, (out, sum)) in out.iter_mut().zip(sums).enumerate() {
        let sum = sum + bias.map_or(0.0, |bias| bias[i]);
        match output {
            Output::Write(_) => *out = sum,
            Output::Add(_) => *out += sum,
        }
    }
}
