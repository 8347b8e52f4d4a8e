//! Linear layers: tiles of the result shared among threads.

use super::dot::{Shape, dot_rows};
use super::element::Element;
use super::simd::Isa;
use crate::Output;
use rayon::prelude::*;
use std::marker::PhantomData;

/// Rows and columns of the result that one task computes.
const TILE_ROWS: usize = 64;
const TILE_COLUMNS: usize = 64;

/// A row-major result that several tasks write, each to numbers of its own.
struct Shared<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: `add` and `set` are only called for numbers that belong to the calling task alone.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    fn new(out: &'a mut [f32]) -> Self {
        Shared { start: out.as_mut_ptr(), len: out.len(), borrow: PhantomData }
    }

    /// Changes number `index`.
    ///
    /// # Safety
    /// No other task reads or writes this number while the result is shared.
    #[inline(always)]
    unsafe fn update(&self, index: usize, change: impl FnOnce(&mut f32)) {
        debug_assert!(index < self.len);
        // SAFETY: the index lies in the borrowed slice and, by contract, nobody else touches the number.
        unsafe { change(&mut *self.start.add(index)) }
    }
}

/// `out = x w^T + bias`, or added to `out`.
pub(super) fn linear<E: Element>(
    isa: Isa,
    x: &[f32],
    w: &[E],
    shape: Shape,
    bias: Option<&[f32]>,
    out: &mut [f32],
    output: Output,
) {
    let Shape { m, n, k } = shape;
    let (Output::Write(first) | Output::Add(first)) = output;
    let (x, w) = (&x[..m * k], &w[..n * k]);
    let shared = Shared::new(&mut out[first * n..(first + m) * n]);
    let column_tiles = n.div_ceil(TILE_COLUMNS);
    (0..m.div_ceil(TILE_ROWS) * column_tiles).into_par_iter().for_each(|task| {
        let rows = task / column_tiles * TILE_ROWS..m.min(task / column_tiles * TILE_ROWS + TILE_ROWS);
        let columns = task % column_tiles * TILE_COLUMNS..n.min(task % column_tiles * TILE_COLUMNS + TILE_COLUMNS);
        let tile = Shape { m: rows.len(), n: columns.len(), k };
        let (x, w) = (&x[rows.start * k..rows.end * k], &w[columns.start * k..columns.end * k]);
        dot_rows(isa, x, w, tile, &mut |i, j, sum| {
            let column = columns.start + j;
            let sum = sum + bias.map_or(0.0, |bias| bias[column]);
            // SAFETY: tiles do not overlap, and each number of a tile is emitted once.
            unsafe {
                shared.update((rows.start + i) * n + column, |out| match output {
                    Output::Write(_) => *out = sum,
                    Output::Add(_) => *out += sum,
                });
            }
        });
    });
}
