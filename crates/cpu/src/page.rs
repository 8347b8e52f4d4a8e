//! Reading one packed side of a page: `y[i][lane] += sum_row w[i][row] x^[row][lane]`.
//!
//! Keys and values go the same way: queries weigh rows of channels and yield logits of tokens, probabilities weigh rows
//! of tokens and yield channels. Codes are never expanded. With `x^ = s c + z`, scales and zeros that belong to a row
//! are folded into its weight, `w x^ = (w s) c + w z`, and those that belong to a lane into the sum.

use super::codes::{Codes, IntegerWeights, Line, mix_codes};
use super::element::Element;
use super::mix::{self, mix_rows};
use super::quantise::unpack;
use super::scales::{Scales, Unfolding, apply, total, unfold};
use super::simd::Isa;
use dibit_cache::{Along, Factors, GroupSpan, High, Outliers, PAGE_TOKENS, PackedSide};
use half::f16;
use std::ops::Range;

/// The weights of a call: `count` rows of weights, one for each row that is read.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub values: &'a [f32],
    pub count: usize,
    pub stride: usize,
}

impl<'a> Weights<'a> {
    fn rows(self) -> impl Iterator<Item = &'a [f32]> {
        self.values.chunks(self.stride).take(self.count)
    }

    /// The weights of the rows from `first` on.
    fn from(self, first: usize) -> Self {
        Weights { values: &self.values[first..], ..self }
    }
}

/// Where a call adds its results.
pub(super) struct Sums<'a> {
    pub values: &'a mut [f32],
    pub stride: usize,
}

impl Sums<'_> {
    fn rows(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.values.chunks_mut(self.stride)
    }
}

/// Buffers of a call.
#[derive(Default)]
pub(super) struct Folding {
    weights: IntegerWeights,
    /// What each row of weights adds to all lanes.
    offsets: Vec<f32>,
    /// Packed rows side by side.
    lines: Vec<Line>,
    /// Weighted codes of one group of rows; zeros between calls.
    mixed: Vec<f32>,
    /// The sum of each row of weights.
    totals: Vec<f32>,
    /// Weighted factors of the quantisation error.
    factors: Vec<f32>,
    /// Codes of a row, and what its lanes are scaled and moved by.
    codes: Vec<u8>,
    row_scales: Vec<f32>,
    row_offsets: Vec<f32>,
}

/// A packed side of a page.
#[derive(Clone, Copy)]
pub(super) struct Page<'a> {
    pub bytes: &'a [u8],
    /// The first page of its chunk.
    pub chunk: &'a [u8],
    pub side: &'a PackedSide,
    /// What is read next, as far as that is known.
    pub next: &'a [u8],
}

impl Page<'_> {
    /// Adds the weighted rows `rows` to the sums. Weights and rows begin at `rows.start`.
    pub(super) fn accumulate(
        self,
        isa: Isa,
        rows: Range<usize>,
        weights: Weights,
        sums: &mut Sums,
        folding: &mut Folding,
    ) {
        // Rows of keys are planes, whatever the channels are.
        let packed = match self.side.planes {
            Some(_) if self.side.tokens_are_lanes => 0..self.side.rows,
            _ => rows.start..rows.end.min(self.side.rows),
        };
        match self.side.along {
            Along::Lanes => self.groups_of_lanes(isa, packed, weights, sums, folding),
            Along::Rows => self.groups_of_rows(isa, packed, weights, sums, folding),
        }
        if let Some(high) = self.side.high {
            self.add_high(isa, high, rows.clone(), weights, sums);
        }
        if let Some(factors) = self.side.factors {
            self.add_factors(factors, rows.clone(), weights, sums, folding);
        }
        if let Some(outliers) = self.side.outliers {
            self.add_outliers(outliers, rows, weights, sums);
        }
    }

    /// Scales and zeros belong to rows: `w x^ = (w s) c + w z`.
    fn groups_of_lanes(self, isa: Isa, rows: Range<usize>, weights: Weights, sums: &mut Sums, folding: &mut Folding) {
        let mut ahead = self.next;
        if rows.is_empty() {
            return;
        }
        let Folding { offsets, weights: integers, lines, .. } = folding;
        for span in self.side.group_spans() {
            let own = self.scales(span.index * self.side.rows + rows.start, rows.len());
            integers.load_folded(isa, weights.values, weights.count, weights.stride, own, offsets);
            let y = &mut sums.values[span.lanes.start..];
            mix_codes(isa, self.codes(&span, rows.clone()), integers, lines, y, sums.stride, &mut ahead, offsets);
        }
    }

    /// Scales and zeros belong to lanes: `sum w x^ = s (sum w c) + z (sum w)`.
    fn groups_of_rows(self, isa: Isa, rows: Range<usize>, weights: Weights, sums: &mut Sums, folding: &mut Folding) {
        let mut ahead = self.next;
        let lanes = self.side.lanes;
        let Folding { mixed, totals, weights: integers, lines, .. } = folding;
        for (group, all) in self.side.row_groups() {
            let own = all.start.max(rows.start)..all.end.min(rows.end);
            if own.is_empty() {
                continue;
            }
            let stride = self.side.planes.map_or(lanes, |planes| planes.channels.max(lanes));
            mixed.resize(weights.count * stride, 0.0);
            let weights = weights.from(own.start - rows.start);
            integers.load(isa, weights.values, weights.count, weights.stride, own.len());
            for span in self.side.group_spans() {
                let y = &mut mixed[span.lanes.start..];
                mix_codes(isa, self.codes(&span, own.clone()), integers, lines, y, stride, &mut ahead, &[]);
            }
            totals.clear();
            totals.extend(weights.rows().map(|weights| total(isa, &weights[..own.len()])));
            let rows = Unfolding { totals, mixed, mixed_stride: stride, sums: sums.values, sum_stride: sums.stride };
            unfold(isa, rows, self.scales(group * lanes, lanes));
        }
    }

    /// A packed part of some rows.
    fn codes(&self, span: &GroupSpan, rows: Range<usize>) -> Codes<'_> {
        let PackedSide { bits, codes, row_bytes, .. } = *self.side;
        let start = codes + rows.start * row_bytes + span.bytes.start;
        let bytes = &self.bytes[start..start + (rows.len() - 1) * row_bytes + span.bytes.len()];
        Codes { bytes, bits, rows: rows.len(), stride: row_bytes, lanes: span.lanes.len() }
    }

    /// `count` scales and zeros from number `first` on; with planes, those of all channels in the order of storage.
    fn scales(&self, first: usize, count: usize) -> Scales<'_> {
        let PackedSide { scales, zeros, quantizer, planes, .. } = self.side;
        // Behind the scales of channels with a plane lie zeros, which stand for nothing there.
        let own = planes.map_or(first..first + count, |planes| 0..planes.channels);
        let of = |offset: usize| &self.halves(offset)[own.clone()];
        Scales { scales: of(*scales), zeros: of(*zeros), quantizer: *quantizer, planes: planes.as_ref() }
    }

    /// Takes from the logits of queries what rounding adds to them on average: where a key's rounding error is uniform in
    /// a step, `E[exp(q e)] = sinh(a) / a` with `a = q step / 2` (arXiv 2605.26266). Rows must be channels, and groups run
    /// along lanes; channels without a plane have no step.
    pub(super) fn take_bias(self, queries: Weights, sums: &mut Sums) {
        for span in self.side.group_spans() {
            let scales = self.scales(span.index * self.side.rows, self.side.rows).scales;
            let scales = &scales[..self.side.planes.map_or(self.side.rows, |planes| planes.with[0])];
            for (query, sums) in queries.rows().zip(sums.rows()) {
                let own = query.iter().zip(scales).map(|(query, scale)| bias(0.5 * query * scale.widen()));
                let bias: f32 = own.sum();
                sums[span.lanes.clone()].iter_mut().for_each(|sum| *sum -= bias);
            }
        }
    }

    /// Adds the channels in 16 bit: rows of keys, lanes of values.
    fn add_high(self, isa: Isa, high: High, rows: Range<usize>, weights: Weights, sums: &mut Sums) {
        let own = rows.start.max(high.first_row)..rows.end.min(high.first_row + high.rows);
        if own.is_empty() {
            return;
        }
        let shape = mix::Shape {
            m: weights.count,
            weight_stride: weights.stride,
            rows: own.len(),
            row_stride: high.lanes,
            lanes: high.lanes,
            y_stride: sums.stride,
        };
        let numbers = &self.halves(high.offset)[(own.start - high.first_row) * high.lanes..][..own.len() * high.lanes];
        let weights = &weights.values[own.start - rows.start..];
        mix_rows(isa, weights, numbers, shape, &mut sums.values[high.first_lane..]);
    }

    /// Adds `E = tokens channels^T`, seen as rows and lanes.
    fn add_factors(
        self,
        factors: Factors,
        rows: Range<usize>,
        weights: Weights,
        sums: &mut Sums,
        folding: &mut Folding,
    ) {
        let rank = factors.rank;
        let tokens = &self.halves(factors.page)[..PAGE_TOKENS * rank];
        let chunk: &[f16] = bytemuck::cast_slice(&self.chunk[factors.chunk..]);
        let (of_rows, of_lanes) = if self.side.tokens_are_lanes { (chunk, tokens) } else { (tokens, chunk) };
        let of_rows = &of_rows[rows.start * rank..rows.end * rank];
        for (weights, sums) in weights.rows().zip(sums.rows()) {
            folding.factors.clear();
            folding.factors.resize(rank, 0.0);
            for (weight, row) in weights.iter().zip(of_rows.chunks_exact(rank)) {
                for (sum, x) in folding.factors.iter_mut().zip(row) {
                    *sum += weight * x.widen();
                }
            }
            for (sum, lane) in sums[..self.side.lanes].iter_mut().zip(of_lanes.chunks_exact(rank)) {
                *sum += folding.factors.iter().zip(lane).map(|(a, b)| a * b.widen()).sum::<f32>();
            }
        }
    }

    /// Adds what the outliers of each row differ by from code 0, which they have.
    fn add_outliers(self, outliers: Outliers, rows: Range<usize>, weights: Weights, sums: &mut Sums) {
        let count = 2 * outliers.per_end;
        let all = self.halves(outliers.values);
        let own = self.scales(0, self.side.num_scales());
        for row in rows.start..rows.end.min(self.side.rows) {
            let lanes = &self.bytes[outliers.lanes + row * count..][..count];
            for (value, &lane) in all[row * count..].iter().zip(lanes) {
                let lane = usize::from(lane);
                let (_, offset) = own.at(self.side.parameter(row, lane));
                let difference = value.widen() - offset;
                for (weights, sums) in weights.rows().zip(sums.rows()) {
                    sums[lane] += weights[row - rows.start] * difference;
                }
            }
        }
    }

    /// Expands every row, where nothing lies beside the codes: row `row` is written to `out[place(row)..]`.
    pub(super) fn expand(self, isa: Isa, folding: &mut Folding, place: impl Fn(usize) -> usize, out: &mut [f32]) {
        let side = self.side;
        let Folding { codes, row_scales, row_offsets, .. } = folding;
        codes.resize(side.lanes, 0);
        row_scales.resize(side.lanes, 0.0);
        row_offsets.resize(side.lanes, 0.0);
        let own = self.scales(0, side.num_scales());
        let spans: Vec<GroupSpan> = side.group_spans().collect();
        for row in 0..side.rows {
            for span in &spans {
                unpack(isa, side.bits, self.codes(span, row..row + 1).bytes, &mut codes[span.lanes.clone()]);
            }
            match side.along {
                Along::Lanes => {
                    for span in &spans {
                        let (scale, offset) = own.at(side.parameter(row, span.lanes.start));
                        row_scales[span.lanes.clone()].fill(scale);
                        row_offsets[span.lanes.clone()].fill(offset);
                    }
                }
                Along::Rows if row % side.group == 0 => {
                    for (lane, (scale, offset)) in row_scales.iter_mut().zip(row_offsets.iter_mut()).enumerate() {
                        (*scale, *offset) = own.at(side.parameter(row, lane));
                    }
                }
                Along::Rows => {}
            }
            apply(isa, codes, row_scales, row_offsets, &mut out[place(row)..][..side.lanes]);
        }
    }

    fn halves(&self, offset: usize) -> &[f16] {
        let bytes = &self.bytes[offset..];
        bytemuck::cast_slice(&bytes[..bytes.len() & !1])
    }
}

/// `ln(sinh(a) / a)`.
fn bias(a: f32) -> f32 {
    let a = a.abs();
    if a < 0.5 {
        // The series, whose next term is below 2e-8 here.
        let square = a * a;
        return square * (1.0 / 6.0 - square * (1.0 / 180.0 - square * (1.0 / 2835.0 - square / 37800.0)));
    }
    a + ((1.0 - (-2.0 * a).exp()) / (2.0 * a)).ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bias_is_that_of_uniform_rounding() {
        for a in [1e-4, 0.01, 0.3, 0.499, 0.501, 1.0, 3.0, 20.0, 80.0] {
            let a = f64::from(a as f32);
            let exact = if a < 1e-2 { a * a / 6.0 } else { (a.sinh() / a).ln() };
            assert!((f64::from(bias(-a as f32)) - exact).abs() <= 1e-6 * exact.max(0.1), "{a}");
        }
        // E[exp(q e)] over rounding errors, by quadrature, in 128 channels.
        let channels =
            (0..128).map(|c| (f64::from(c as f32 * 0.37).sin() * 0.9, 0.2 + f64::from(c as f32 * 0.11).cos().abs()));
        let (mut sum, mut expected) = (0.0, 0.0);
        for (query, step) in channels {
            let points = (0..1000).map(|i| ((f64::from(i) + 0.5) / 1000.0 - 0.5) * step);
            expected += (points.map(|e| (query * e).exp()).sum::<f64>() / 1000.0).ln();
            sum += f64::from(bias((0.5 * query * step) as f32));
        }
        assert!((sum - expected).abs() < 1e-4 * expected, "{sum} {expected}");
    }
}
