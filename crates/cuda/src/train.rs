//! The trait of training on a GPU.

use crate::CudaError;
use crate::cuda::{Buffer, Cuda};
use crate::kernel::{Grid, Kernel, launch};
use crate::memory::at;
use crate::partial_sums::{PRODUCT_BLOCKS, TILE};
use crate::source::TRAIN;
use dibit_cache::CacheLayout;
use dibit_device::{AdamStep, DeviceError, Place, ROW_STATISTICS, RowStatistic, Rows, Train};
use std::ops::Range;

/// Threads of a product's blocks.
const PRODUCT_THREADS: usize = 128;

/// Terms of a part of a product's sums, at least; parts are whole multiples of `PART_STEP`.
const PART: usize = 128;
const PART_STEP: usize = 16;

/// Queries of a launch, and threads of a row, as the kernels have them.
const QUERIES: usize = 128;
const ROW_THREADS: usize = 256;

/// Threads of what has no tiles, and rows that they compute where a warp takes one.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

/// Numbers of a part of a sum of squares, about, and how many parts there are at most.
const SQUARES: usize = 1 << 13;
const SQUARE_PARTS: usize = 1 << 10;

/// The twin of the kernels' `Queries`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Queries {
    visible: [u32; QUERIES],
    packed: [u32; QUERIES],
    first: i32,
    all: i32,
    exact: i32,
    stride: i32,
}

/// A number as kernels take it.
fn int(number: usize) -> i32 {
    i32::try_from(number).expect("fewer than 2^31")
}

/// Numbers `first ..` of a buffer as kernels take them; there must be `len` of them.
fn numbers(x: &Buffer, first: usize, len: usize) -> u64 {
    assert!(first + len <= x.len, "numbers {first} to {} of {}", first + len, x.len);
    at(&x.memory, first)
}

/// Where a matrix of `rows` rows and `columns` columns begins.
fn matrix(x: &Buffer, place: Place, rows: usize, columns: usize) -> u64 {
    numbers(x, place.offset, (rows - 1) * place.row + (columns - 1) * place.column + 1)
}

/// Place `which` of statistics from row `first` on, of which there must be `count`.
fn statistic(x: &Buffer, first: usize, count: usize, which: usize) -> u64 {
    numbers(x, first * ROW_STATISTICS, count * ROW_STATISTICS) + (which * size_of::<f32>()) as u64
}

/// How many parts the sums of a product of `k` terms are in, and the terms of each.
fn parts(tiles: usize, k: usize) -> (usize, usize) {
    let wanted = (PRODUCT_BLOCKS / tiles).min(k / PART).max(1);
    let part = k.div_ceil(wanted).next_multiple_of(PART_STEP);
    (k.div_ceil(part), part)
}

impl Cuda {
    fn training(&self, name: &'static str) -> Result<Kernel, CudaError> {
        self.gpu.kernel(TRAIN, &[], name)
    }

    fn try_product(
        &self,
        [m, n, k]: [usize; 3],
        scale: f32,
        (a, a_place): (&Buffer, Place),
        (b, b_place): (&Buffer, Place),
        (out, out_place): (&mut Buffer, Place),
        add: bool,
    ) -> Result<(), CudaError> {
        let a = (matrix(a, a_place, m, k), a_place.row as i64, a_place.column as i64);
        let b = (matrix(b, b_place, k, n), b_place.row as i64, b_place.column as i64);
        let (out, out_row, add) = (matrix(out, out_place, m, n), out_place.row as i64, i32::from(add));
        let tiles = [n.div_ceil(TILE), m.div_ceil(TILE)];
        let (count, part) = parts(tiles[0] * tiles[1], k);
        let kernel = self.training("product")?;
        let (m, n, k, part) = (int(m), int(n), int(k), int(part));
        let run = |scale: f32, out: u64, out_row: i64, out_part: i64, add: i32| {
            let grid = Grid::new([tiles[0], tiles[1], count], PRODUCT_THREADS);
            launch!(
                self.gpu, kernel, grid, m, n, k, part, scale, a.0, a.1, a.2, b.0, b.1, b.2, out, out_row, out_part, add
            );
        };
        if count == 1 {
            run(scale, out, out_row, 0, add);
            return Ok(());
        }
        let join = self.training("join_products")?;
        self.partial_sums.with(&self.gpu, |scratch| {
            let (parts, all) = (scratch.at(0), m as usize * n as usize);
            run(1.0, parts, i64::from(n), all as i64, 0);
            launch!(self.gpu, join, Grid::each(all, THREADS), m, n, int(count), scale, parts, out, out_row, add);
            Ok(())
        })
    }

    fn try_features(&self, x: &mut Buffer, rows: Range<usize>, half: usize, gate: f32) -> Result<(), CudaError> {
        let halves = 2 * rows.len();
        let x = numbers(x, rows.start * 2 * half, halves * half);
        let kernel = self.training("features")?;
        let grid = Grid::new([halves.div_ceil(WARPS), 1, 1], THREADS);
        launch!(self.gpu, kernel, grid, x, halves as i64, int(half), gate);
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn try_features_backward(
        &self,
        y: &Buffer,
        dy: &mut Buffer,
        rows: Range<usize>,
        half: usize,
        gate: f32,
        statistics: Option<&mut Buffer>,
        first_statistic: usize,
    ) -> Result<(), CudaError> {
        let (first, count) = (rows.start * 2 * half, rows.len());
        let (y, dy) = (numbers(y, first, count * 2 * half), numbers(dy, first, count * 2 * half));
        let place = RowStatistic::Gate as usize;
        let by_gate = statistics.map_or(0, |own| statistic(own, first_statistic, count, place));
        let (kernel, step) = (self.training("features_backward")?, int(ROW_STATISTICS));
        let grid = Grid::new([count.div_ceil(WARPS), 1, 1], THREADS);
        launch!(self.gpu, kernel, grid, y, dy, count as i64, int(half), gate, by_gate, step);
        Ok(())
    }

    /// Runs a kernel for the attention rows of some queries at a time.
    fn each_query(&self, rows: &Rows, run: impl Fn(Grid, Queries)) {
        let all = rows.visible.len();
        let seen = rows.visible.chunks(QUERIES).zip(rows.packed.chunks(QUERIES));
        for (chunk, (visible, packed)) in seen.enumerate() {
            let mut queries = Queries {
                visible: [0; QUERIES],
                packed: [0; QUERIES],
                first: int(chunk * QUERIES),
                all: int(all),
                exact: int(rows.exact),
                stride: int(rows.stride),
            };
            queries.visible[..visible.len()].copy_from_slice(visible);
            queries.packed[..packed.len()].copy_from_slice(packed);
            run(Grid::new([visible.len(), rows.heads, 1], ROW_THREADS), queries);
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn try_row_loss(
        &self,
        rows: Rows,
        exact: &mut Buffer,
        missed: &mut Buffer,
        correction: &mut Buffer,
        statistics: &mut Buffer,
        first_statistic: usize,
        outputs: bool,
    ) -> Result<(), CudaError> {
        let all = rows.count() * rows.stride;
        let [exact, missed, correction] = [exact, missed, correction].map(|own| numbers(own, 0, all));
        let statistics = statistic(statistics, first_statistic, rows.count(), 0);
        let (kernel, outputs) = (self.training("row_loss")?, i32::from(outputs));
        self.each_query(&rows, |grid, queries| {
            launch!(self.gpu, kernel, grid, queries, exact, missed, correction, statistics, outputs);
        });
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn try_output_loss(
        &self,
        rows: Rows,
        weight: f32,
        width: usize,
        weights: &Buffer,
        errors: &Buffer,
        toward: &Buffer,
        correction: &mut Buffer,
        statistics: &mut Buffer,
        first_statistic: usize,
    ) -> Result<(), CudaError> {
        let all = rows.count() * rows.stride;
        let [weights, toward, correction] = [weights, toward, &*correction].map(|own| numbers(own, 0, all));
        let errors = numbers(errors, 0, rows.count() * width);
        let statistics = statistic(statistics, first_statistic, rows.count(), 0);
        let (kernel, width) = (self.training("output_loss")?, int(width));
        self.each_query(&rows, |grid, queries| {
            launch!(self.gpu, kernel, grid, queries, weight, width, weights, errors, toward, correction, statistics);
        });
        Ok(())
    }

    fn try_sum_of_squares(&self, x: &Buffer, range: Range<usize>) -> Result<f64, CudaError> {
        let x = numbers(x, range.start, range.len());
        let part = range.len().div_ceil(SQUARE_PARTS).max(SQUARES);
        let parts = range.len().div_ceil(part);
        let (squares, join) = (self.training("sum_squares")?, self.training("join_sums")?);
        self.partial_sums.with(&self.gpu, |scratch| {
            let (sum, sums) = (scratch.at(0), scratch.at(size_of::<f64>()));
            let grid = Grid::new([parts, 1, 1], THREADS);
            launch!(self.gpu, squares, grid, x, range.len() as i64, part as i64, sums);
            launch!(self.gpu, join, Grid::new([1, 1, 1], THREADS), sums, int(parts), sum);
            let mut out = [0f64];
            scratch.read(0, bytemuck::cast_slice_mut(&mut out))?;
            Ok(out[0])
        })
    }

    fn try_adam(
        &self,
        step: AdamStep,
        len: usize,
        gradient: &Buffer,
        [first, second, x]: [&mut Buffer; 3],
    ) -> Result<(), CudaError> {
        let AdamStep { rate, betas, epsilon, scale, corrections } = step;
        let step = [rate, betas[0], betas[1], epsilon, scale, corrections[0], corrections[1]];
        let gradient = numbers(gradient, 0, len);
        let [first, second, x] = [first, second, x].map(|own| numbers(own, 0, len));
        let kernel = self.training("adam")?;
        launch!(self.gpu, kernel, Grid::each(len, THREADS), step, len as i64, gradient, first, second, x);
        Ok(())
    }
}

/// Checks what the rows see.
fn check(rows: &Rows) {
    assert_eq!(rows.visible.len(), rows.packed.len(), "what each query sees");
    for (visible, packed) in rows.visible.iter().zip(rows.packed) {
        let stride = rows.stride;
        assert!(packed <= visible && *visible as usize <= stride, "{packed} packed keys of {visible} in {stride}");
    }
}

impl Train for Cuda {
    fn product(
        &self,
        shape: [usize; 3],
        scale: f32,
        a: (&Buffer, Place),
        b: (&Buffer, Place),
        out: (&mut Buffer, Place),
        add: bool,
    ) {
        let [m, n, k] = shape;
        if m == 0 || n == 0 {
            return;
        }
        assert!(k > 0 && out.1.column == 1 && (out.1.row >= n || m == 1), "rows of a result do not overlap");
        self.keep(self.try_product(shape, scale, a, b, out, add));
    }

    fn clear(&self, x: &mut Buffer, range: Range<usize>) {
        x.memory.clear(range.start * size_of::<f32>(), range.len() * size_of::<f32>());
    }

    fn write(&self, x: &mut Buffer, offset: usize, values: &[f32]) {
        self.keep(x.memory.write(offset * size_of::<f32>(), bytemuck::cast_slice(values)));
    }

    fn features(&self, x: &mut Buffer, rows: Range<usize>, half: usize, gate: f32) {
        self.keep(self.try_features(x, rows, half, gate));
    }

    fn features_backward(
        &self,
        y: &Buffer,
        dy: &mut Buffer,
        rows: Range<usize>,
        half: usize,
        gate: f32,
        statistics: Option<&mut Buffer>,
        first_statistic: usize,
    ) {
        self.keep(self.try_features_backward(y, dy, rows, half, gate, statistics, first_statistic));
    }

    fn row_loss(
        &self,
        rows: Rows,
        exact: &mut Buffer,
        missed: &mut Buffer,
        correction: &mut Buffer,
        statistics: &mut Buffer,
        first_statistic: usize,
        outputs: bool,
    ) {
        check(&rows);
        self.keep(self.try_row_loss(rows, exact, missed, correction, statistics, first_statistic, outputs));
    }

    fn output_loss(
        &self,
        rows: Rows,
        weight: f32,
        width: usize,
        weights: &Buffer,
        errors: &Buffer,
        toward: &Buffer,
        correction: &mut Buffer,
        statistics: &mut Buffer,
        first_statistic: usize,
    ) {
        check(&rows);
        self.keep(self.try_output_loss(
            rows,
            weight,
            width,
            weights,
            errors,
            toward,
            correction,
            statistics,
            first_statistic,
        ));
    }

    fn missed_keys(
        &self,
        layout: &CacheLayout,
        layer: usize,
        k: &Buffer,
        rows: usize,
        out: &mut Buffer,
    ) -> Result<(), DeviceError> {
        crate::store::missed_keys(layout, layer, k, rows, out)
    }

    /// Not a number where the GPU has failed; [`crate::CudaError`] comes with what is asked for next.
    fn sum_of_squares(&self, x: &Buffer, range: Range<usize>) -> f64 {
        self.try_sum_of_squares(x, range).unwrap_or_else(|error| {
            self.gpu.fail(error);
            f64::NAN
        })
    }

    fn adam(
        &self,
        step: AdamStep,
        len: usize,
        gradient: &Buffer,
        first: &mut Buffer,
        second: &mut Buffer,
        x: &mut Buffer,
    ) {
        self.keep(self.try_adam(step, len, gradient, [first, second, x]));
    }
}
