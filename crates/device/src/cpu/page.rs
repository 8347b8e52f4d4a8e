//! Reading one packed side of a page: `y[i][lane] += sum_row w[i][row] x^[row][lane]`.
//!
//! Keys and values go the same way: queries weigh rows of channels and yield logits of tokens, probabilities weigh rows
//! of tokens and yield channels. Codes are never expanded. With `x^ = s c + z`, scales and zeros that belong to a row
//! are folded into its weight, `w x^ = (w s) c + w z`, and those that belong to a lane into the sum.

use super::element::Element;
use super::mix::{self, Codes, Plain, mix_rows};
use super::simd::Isa;
use dibit_cache::{Along, Factors, GroupSpan, High, Outliers, PAGE_TOKENS, PackedSide};
use dibit_quant::{Bits, Quantizer};
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
    /// Weights with scales folded in.
    folded: Vec<f32>,
    /// The same for the high plane of a code.
    raised: Vec<f32>,
    /// Weighted codes of one group of rows.
    mixed: Vec<f32>,
}

/// A packed side of a page.
#[derive(Clone, Copy)]
pub(super) struct Page<'a> {
    pub bytes: &'a [u8],
    /// The first page of its chunk.
    pub chunk: &'a [u8],
    pub side: &'a PackedSide,
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
        let packed = rows.start..rows.end.min(self.side.rows);
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
        let count = rows.len();
        folding.folded.resize(weights.count * count, 0.0);
        for span in self.side.group_spans() {
            let first = span.index * self.side.rows + rows.start;
            let scales = &self.halves(self.side.scales)[first..first + count];
            let zeros = &self.halves(self.side.zeros)[first..first + count];
            let folded = folding.folded.chunks_exact_mut(count);
            for ((weights, folded), sums) in weights.rows().zip(folded).zip(sums.rows()) {
                let offset = fold(self.side.quantizer, &weights[..count], scales, zeros, folded);
                for sum in &mut sums[span.lanes.clone()] {
                    *sum += offset;
                }
            }
            let folded = Weights { values: &folding.folded, stride: count, ..weights };
            self.mix(isa, &span, rows.clone(), folded, &mut folding.raised, sums);
        }
    }

    /// Scales and zeros belong to lanes: `sum w x^ = s (sum w c) + z (sum w)`.
    fn groups_of_rows(self, isa: Isa, rows: Range<usize>, weights: Weights, sums: &mut Sums, folding: &mut Folding) {
        let lanes = self.side.lanes;
        let wide = lanes.next_multiple_of(8);
        for (group, all) in self.side.row_groups() {
            let own = all.start.max(rows.start)..all.end.min(rows.end);
            if own.is_empty() {
                continue;
            }
            folding.mixed.clear();
            folding.mixed.resize(weights.count * wide, 0.0);
            let weights = weights.from(own.start - rows.start);
            let mut mixed = Sums { values: &mut folding.mixed, stride: wide };
            for span in self.side.group_spans() {
                self.mix(isa, &span, own.clone(), weights, &mut folding.raised, &mut mixed);
            }
            let scales = &self.halves(self.side.scales)[group * lanes..(group + 1) * lanes];
            let zeros = &self.halves(self.side.zeros)[group * lanes..(group + 1) * lanes];
            for ((weights, mixed), sums) in weights.rows().zip(folding.mixed.chunks_exact(wide)).zip(sums.rows()) {
                let total: f32 = weights[..own.len()].iter().sum();
                unfold(self.side.quantizer, total, mixed, scales, zeros, sums);
            }
        }
    }

    /// Adds weighted codes of a packed part of some rows.
    fn mix(
        self,
        isa: Isa,
        span: &GroupSpan,
        rows: Range<usize>,
        weights: Weights,
        raised: &mut Vec<f32>,
        sums: &mut Sums,
    ) {
        let PackedSide { bits, codes, row_bytes, .. } = *self.side;
        let start = codes + rows.start * row_bytes + span.bytes.start;
        let codes = &self.bytes[start..start + (rows.len() - 1) * row_bytes + span.bytes.len()];
        let lanes = span.lanes.len();
        let shape = |plane: usize| mix::Shape {
            m: weights.count,
            weight_stride: weights.stride,
            rows: rows.len(),
            row_stride: row_bytes,
            units: bits.planes()[plane].stride(lanes),
            y_stride: sums.stride,
        };
        let y = &mut sums.values[span.lanes.start..];
        match bits {
            Bits::Two => mix_rows::<Codes<2>>(isa, weights.values, codes, shape(0), y),
            Bits::Four => mix_rows::<Codes<4>>(isa, weights.values, codes, shape(0), y),
            Bits::Eight => mix_rows::<Codes<8>>(isa, weights.values, codes, shape(0), y),
            Bits::Three => {
                mix_rows::<Codes<2>>(isa, weights.values, codes, shape(0), y);
                // The plane of the high bit counts four times.
                raised.clear();
                raised.extend(weights.values.iter().map(|weight| 4.0 * weight));
                let high = &codes[shape(0).units..];
                let shape = shape(1);
                mix_rows::<Codes<1>>(isa, raised, high, shape, y);
                if 4 * shape.units < lanes {
                    mix_rows::<Codes<1, 4>>(isa, raised, high, shape, &mut y[4 * shape.units..]);
                }
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
            units: high.lanes,
            y_stride: sums.stride,
        };
        let numbers = &self.halves(high.offset)[(own.start - high.first_row) * high.lanes..][..own.len() * high.lanes];
        let weights = &weights.values[own.start - rows.start..];
        mix_rows::<Plain<f16>>(isa, weights, numbers, shape, &mut sums.values[high.first_lane..]);
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
            folding.mixed.clear();
            folding.mixed.resize(rank, 0.0);
            for (weight, row) in weights.iter().zip(of_rows.chunks_exact(rank)) {
                for (sum, x) in folding.mixed.iter_mut().zip(row) {
                    *sum += weight * x.widen();
                }
            }
            for (sum, lane) in sums[..self.side.lanes].iter_mut().zip(of_lanes.chunks_exact(rank)) {
                *sum += folding.mixed.iter().zip(lane).map(|(a, b)| a * b.widen()).sum::<f32>();
            }
        }
    }

    /// Adds what the outliers of each row differ by from code 0, which they have.
    fn add_outliers(self, outliers: Outliers, rows: Range<usize>, weights: Weights, sums: &mut Sums) {
        let count = 2 * outliers.per_end;
        let all = self.halves(outliers.values);
        let (scales, zeros) = (self.halves(self.side.scales), self.halves(self.side.zeros));
        let integer = self.side.quantizer != Quantizer::FloatMin;
        for row in rows.start..rows.end.min(self.side.rows) {
            let lanes = &self.bytes[outliers.lanes + row * count..][..count];
            for (value, &lane) in all[row * count..].iter().zip(lanes) {
                let lane = usize::from(lane);
                let at = self.side.parameter(row, lane);
                let difference = value.widen() - offset(integer, scales[at].widen(), zeros[at].widen());
                for (weights, sums) in weights.rows().zip(sums.rows()) {
                    sums[lane] += weights[row - rows.start] * difference;
                }
            }
        }
    }

    /// Expands every row, where nothing lies beside the codes: row `row` is written to `out[place(row)..]`.
    pub(super) fn expand(self, isa: Isa, folding: &mut Folding, place: impl Fn(usize) -> usize, out: &mut [f32]) {
        let side = self.side;
        let one = Weights { values: &[1.0], count: 1, stride: 1 };
        let mut codes = |row: usize, out: &mut [f32]| {
            out.fill(0.0);
            let mut sums = Sums { values: out, stride: side.lanes };
            for span in side.group_spans() {
                self.mix(isa, &span, row..row + 1, one, &mut folding.raised, &mut sums);
            }
        };
        let (scales, zeros) = (self.halves(side.scales), self.halves(side.zeros));
        let integer = side.quantizer != Quantizer::FloatMin;
        let parameters = |at: usize| {
            let scale = scales[at].widen();
            (scale, offset(integer, scale, zeros[at].widen()))
        };
        match side.along {
            Along::Lanes => {
                for row in 0..side.rows {
                    let out = &mut out[place(row)..][..side.lanes];
                    codes(row, out);
                    for span in side.group_spans() {
                        let (scale, offset) = parameters(side.parameter(row, span.lanes.start));
                        out[span.lanes].iter_mut().for_each(|x| *x = *x * scale + offset);
                    }
                }
            }
            Along::Rows => {
                for (group, rows) in side.row_groups() {
                    folding.mixed.clear();
                    folding.mixed.extend((0..side.lanes).map(|lane| parameters(group * side.lanes + lane).0));
                    folding.folded.clear();
                    folding.folded.extend((0..side.lanes).map(|lane| parameters(group * side.lanes + lane).1));
                    for row in rows {
                        let out = &mut out[place(row)..][..side.lanes];
                        codes(row, out);
                        for ((x, scale), offset) in out.iter_mut().zip(&folding.mixed).zip(&folding.folded) {
                            *x = *x * scale + offset;
                        }
                    }
                }
            }
        }
    }

    fn halves(&self, offset: usize) -> &[f16] {
        let bytes = &self.bytes[offset..];
        bytemuck::cast_slice(&bytes[..bytes.len() & !1])
    }
}

/// The value of code 0 ([`Quantizer::offset`]).
#[inline(always)]
fn offset(integer: bool, scale: f32, zero: f32) -> f32 {
    if integer { -scale * zero } else { zero }
}

/// `folded = weights * scales`; returns `weights . offsets`.
fn fold(quantizer: Quantizer, weights: &[f32], scales: &[f16], zeros: &[f16], folded: &mut [f32]) -> f32 {
    let integer = quantizer != Quantizer::FloatMin;
    let mut sum = 0.0;
    for (((weight, scale), zero), folded) in weights.iter().zip(scales).zip(zeros).zip(folded) {
        let scale = scale.widen();
        *folded = weight * scale;
        sum += weight * offset(integer, scale, zero.widen());
    }
    sum
}

/// `sums += scales * mixed + offsets * total`.
fn unfold(quantizer: Quantizer, total: f32, mixed: &[f32], scales: &[f16], zeros: &[f16], sums: &mut [f32]) {
    let integer = quantizer != Quantizer::FloatMin;
    for (((mixed, scale), zero), sum) in mixed.iter().zip(scales).zip(zeros).zip(sums) {
        let scale = scale.widen();
        *sum += mixed * scale + total * offset(integer, scale, zero.widen());
    }
}
