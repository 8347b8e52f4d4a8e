//! Linear layers: tiles of the result shared among threads.

#[cfg(target_arch = "x86_64")]
use super::amx;
use super::dot::{Shape, dot_rows};
use super::element::Element;
use super::simd::Isa;
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
    let done = by_tiles(isa, x, w, shape, bias, &shared, output);
    each_tile(m, done..n, |rows, columns| {
        let tile = Shape { m: rows.len(), n: columns.len(), k };
        let (x, w) = (&x[rows.start * k..rows.end * k], &w[columns.start * k..columns.end * k]);
        dot_rows(isa, x, w, tile, &mut |i, j, sum| {
            let column = columns.start + j;
            // SAFETY: tiles do not overlap, and each number of a tile is emitted once.
            let out = unsafe { shared.slice((rows.start + i) * n + column, 1) };
            store(out, &[sum], bias.map(|bias| &bias[column..]), output);
        });
    });
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

/// The columns that the matrix unit computes, where there is one: their number.
#[cfg(target_arch = "x86_64")]
fn by_tiles<E: Element>(
    isa: Isa,
    x: &[f32],
    w: &[E],
    shape: Shape,
    bias: Option<&[f32]>,
    out: &Shared,
    output: Output,
) -> usize {
    match E::as_bf16(w) {
        Some(w) if isa == Isa::Amx => amx::linear(x, w, shape, bias, out, output),
        _ => 0,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn by_tiles<E: Element>(_: Isa, _: &[f32], _: &[E], _: Shape, _: Option<&[f32]>, _: &Shared, _: Output) -> usize {
    0
}
