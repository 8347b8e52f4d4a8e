//! Training of adapters.

mod adam;
mod features;
mod loss;
mod product;
#[cfg(test)]
mod tests;

use super::{Cpu, missed_keys};
use dibit_cache::CacheLayout;
use dibit_device::{AdamStep, DeviceError, Place, ROW_STATISTICS, RowStatistic, Rows, Train};
use loss::Row;
use rayon::prelude::*;
use std::ops::Range;

/// Rows that one task takes.
const TASK_ROWS: usize = 8;

/// Numbers that one task takes, where they do not depend on each other.
const TASK_NUMBERS: usize = 1 << 14;

/// What row `index` sees.
fn row(rows: &Rows, index: usize) -> Row {
    let query = index % rows.visible.len();
    let (visible, packed) = (rows.visible[query] as usize, rows.packed[query] as usize);
    assert!(packed <= visible && visible <= rows.stride, "{packed} packed keys of {visible} in {}", rows.stride);
    Row { visible, packed, exact: rows.exact.min(packed) }
}

/// Rows of statistics from `first` on.
fn statistics_rows(statistics: &mut [f32], first: usize, count: usize) -> &mut [f32] {
    &mut statistics[first * ROW_STATISTICS..(first + count) * ROW_STATISTICS]
}

impl Train for Cpu {
    fn product(
        &self,
        shape: [usize; 3],
        scale: f32,
        a: (&Vec<f32>, Place),
        b: (&Vec<f32>, Place),
        out: (&mut Vec<f32>, Place),
        add: bool,
    ) {
        product::product(shape, scale, (a.0, a.1), (b.0, b.1), (out.0, out.1), add);
    }

    fn clear(&self, x: &mut Vec<f32>, range: Range<usize>) {
        x[range].fill(0.0);
    }

    fn write(&self, x: &mut Vec<f32>, offset: usize, values: &[f32]) {
        x[offset..offset + values.len()].copy_from_slice(values);
    }

    fn features(&self, x: &mut Vec<f32>, rows: Range<usize>, half: usize, gate: f32) {
        let width = 2 * half;
        let x = &mut x[rows.start * width..rows.end * width];
        x.par_chunks_mut(TASK_ROWS * width).for_each(|x| features::features(self.isa, x, half, gate));
    }

    fn features_backward(
        &self,
        y: &Vec<f32>,
        dy: &mut Vec<f32>,
        rows: Range<usize>,
        half: usize,
        gate: f32,
        statistics: Option<&mut Vec<f32>>,
        first_statistic: usize,
    ) {
        let width = 2 * half;
        let numbers = rows.start * width..rows.end * width;
        let pairs = y[numbers.clone()].par_chunks(width).zip(dy[numbers].par_chunks_mut(width));
        let pairs = pairs.with_min_len(TASK_ROWS);
        match statistics {
            None => pairs.for_each(|(y, dy)| {
                features::features_backward(self.isa, y, dy, half, gate);
            }),
            Some(statistics) => {
                let statistics = statistics_rows(statistics, first_statistic, rows.len());
                pairs.zip(statistics.par_chunks_mut(ROW_STATISTICS)).for_each(|((y, dy), own)| {
                    own[RowStatistic::Gate as usize] = features::features_backward(self.isa, y, dy, half, gate);
                });
            }
        }
    }

    fn row_loss(
        &self,
        rows: Rows,
        exact: &mut Vec<f32>,
        missed: &mut Vec<f32>,
        correction: &mut Vec<f32>,
        statistics: &mut Vec<f32>,
        first_statistic: usize,
        outputs: bool,
    ) {
        let (count, stride) = (rows.count(), rows.stride);
        let exact = exact[..count * stride].par_chunks_mut(stride);
        let missed = missed[..count * stride].par_chunks_mut(stride);
        let correction = correction[..count * stride].par_chunks_mut(stride);
        let statistics = statistics_rows(statistics, first_statistic, count).par_chunks_mut(ROW_STATISTICS);
        let all = exact.zip(missed).zip(correction).zip(statistics).with_min_len(TASK_ROWS).enumerate();
        all.for_each(|(index, (((exact, missed), correction), statistics))| {
            loss::loss(self.isa, row(&rows, index), exact, missed, correction, statistics, outputs);
        });
    }

    fn output_loss(
        &self,
        rows: Rows,
        weight: f32,
        width: usize,
        weights: &Vec<f32>,
        errors: &Vec<f32>,
        toward: &Vec<f32>,
        correction: &mut Vec<f32>,
        statistics: &mut Vec<f32>,
        first_statistic: usize,
    ) {
        let (count, stride) = (rows.count(), rows.stride);
        let read = weights.par_chunks(stride).zip(errors.par_chunks(width)).zip(toward.par_chunks(stride));
        let correction = correction[..count * stride].par_chunks_mut(stride);
        let statistics = statistics_rows(statistics, first_statistic, count).par_chunks_mut(ROW_STATISTICS);
        let all = read.zip(correction).zip(statistics).with_min_len(TASK_ROWS).enumerate();
        all.for_each(|(index, ((((weights, errors), toward), correction), statistics))| {
            loss::output(self.isa, row(&rows, index), weight, weights, errors, toward, correction, statistics);
        });
    }

    fn missed_keys(
        &self,
        layout: &CacheLayout,
        layer: usize,
        k: &Vec<f32>,
        rows: usize,
        out: &mut Vec<f32>,
    ) -> Result<(), DeviceError> {
        missed_keys(self.isa, layout, layer, &k[..rows * layout.shape.row()], out)
    }

    fn sum_of_squares(&self, x: &Vec<f32>, range: Range<usize>) -> f64 {
        // The parts are joined in their order.
        let parts: Vec<f64> = x[range].par_chunks(TASK_NUMBERS).map(|x| adam::squares(self.isa, x)).collect();
        parts.iter().sum()
    }

    fn adam(
        &self,
        step: AdamStep,
        len: usize,
        gradient: &Vec<f32>,
        first: &mut Vec<f32>,
        second: &mut Vec<f32>,
        x: &mut Vec<f32>,
    ) {
        let gradient = gradient[..len].par_chunks(TASK_NUMBERS);
        let first = first[..len].par_chunks_mut(TASK_NUMBERS);
        let second = second[..len].par_chunks_mut(TASK_NUMBERS);
        let x = x[..len].par_chunks_mut(TASK_NUMBERS);
        let all = gradient.zip(first).zip(second).zip(x);
        all.for_each(|(((gradient, first), second), x)| adam::adam(self.isa, step, gradient, first, second, x));
    }
}
