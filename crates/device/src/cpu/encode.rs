//! Writing tokens into one packed side of a page.

use dibit_cache::{Along, Factors, Outliers, PAGE_TOKENS, PackedSide};
use dibit_quant::{Hadamard, LowRank, Parameters, QuantError, pack, put};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Tokens of one page on their way in.
pub(super) struct Tokens<'a> {
    /// `[token][head_dim]`; changed on the way.
    pub values: &'a mut [f32],
    pub head_dim: usize,
    /// Their slots in the page.
    pub slots: Range<usize>,
    /// Which of them are kept elsewhere, and have no part in a group.
    pub sinks: &'a [bool],
}

/// Buffers of the encoder.
#[derive(Default)]
pub(super) struct Encoder {
    /// Values of a group, in the order of its codes, sinks left out.
    group: Vec<f32>,
    codes: Vec<u8>,
    /// Lanes of a row in the order of their values.
    sorted: Vec<usize>,
    /// Row, lane and value of what is kept beside the codes.
    kept: Vec<(usize, usize, f32)>,
}

impl Tokens<'_> {
    fn index(&self, side: &PackedSide, row: usize, lane: usize) -> usize {
        let (token, channel) = if side.tokens_are_lanes { (lane, row) } else { (row, lane) };
        (token - self.slots.start) * self.head_dim + channel
    }

    fn is_sink(&self, side: &PackedSide, row: usize, lane: usize) -> bool {
        self.sinks[if side.tokens_are_lanes { lane } else { row } - self.slots.start]
    }

    /// Packed rows and lanes that the tokens cover.
    fn cover(&self, side: &PackedSide) -> (Range<usize>, Range<usize>) {
        if side.tokens_are_lanes { (0..side.rows, self.slots.clone()) } else { (self.slots.clone(), 0..side.lanes) }
    }
}

impl Encoder {
    /// Quantises tokens into a page. What the codes miss is appended to `error`, `[token][head_dim]`, where the side
    /// keeps factors of it.
    ///
    /// Groups along tokens need whole pages, which the schemes' validation sees to.
    pub(super) fn encode(
        &mut self,
        side: &PackedSide,
        mut tokens: Tokens,
        page: &mut [u8],
        error: &mut Vec<f32>,
    ) -> Result<(), QuantError> {
        if side.token_hadamard {
            let hadamard = Hadamard::new(PAGE_TOKENS).expect("a power of two");
            hadamard.apply_columns(tokens.values, tokens.head_dim);
        }
        self.kept.clear();
        if let Some(outliers) = side.outliers {
            self.set_outliers_aside(side, outliers, &mut tokens);
        }
        let first_error = error.len();
        if side.factors.is_some() {
            error.resize(first_error + tokens.values.len(), 0.0);
        }
        let mut missed = |index: usize, difference: f32| {
            if side.factors.is_some() {
                error[first_error + index] = difference;
            }
        };
        match side.along {
            Along::Lanes => self.groups_of_lanes(side, &tokens, page, &mut missed)?,
            Along::Rows => self.groups_of_rows(side, &tokens, page, &mut missed)?,
        }
        if side.high.is_some() {
            write_high(side, &tokens, page);
        }
        if let Some(outliers) = side.outliers {
            for (place, &(row, lane, value)) in self.kept.iter().enumerate() {
                missed(tokens.index(side, row, lane), 0.0);
                // Rows are kept in their order, each with the same number of values.
                let at = (tokens.cover(side).0.start * 2 * outliers.per_end) + place;
                put_half(page, outliers.values + at * size_of::<f16>(), f16::from_f32(value));
                page[outliers.lanes + at] = lane as u8;
                // What is kept aside is read as its difference to code 0, so that no code must be looked up.
                let span = side.group_spans().find(|span| span.lanes.contains(&lane)).expect("a lane of the side");
                let start = side.codes + row * side.row_bytes;
                let codes = &mut page[start + span.bytes.start..start + span.bytes.end];
                put(side.bits, span.lanes.len(), lane - span.lanes.start, 0, codes);
            }
        }
        Ok(())
    }

    /// Replaces the smallest and largest values of each row by its mean.
    fn set_outliers_aside(&mut self, side: &PackedSide, outliers: Outliers, tokens: &mut Tokens) {
        let (rows, lanes) = tokens.cover(side);
        for row in rows {
            self.sorted.clear();
            self.sorted.extend(lanes.clone().filter(|lane| !tokens.is_sink(side, row, *lane)));
            let value = |lane: usize| tokens.values[tokens.index(side, row, lane)];
            let mean = self.sorted.iter().map(|lane| value(*lane)).sum::<f32>() / self.sorted.len().max(1) as f32;
            // Of equals the first lane comes first, at either end.
            self.sorted.sort_by(|a, b| value(*a).total_cmp(&value(*b)).then(a.cmp(b)));
            let mut chosen: Vec<usize> = self.sorted.iter().copied().take(outliers.per_end).collect();
            self.sorted.sort_by(|a, b| value(*b).total_cmp(&value(*a)).then(a.cmp(b)));
            self.sorted.retain(|lane| !chosen.contains(lane));
            chosen.extend(self.sorted.iter().take(outliers.per_end));
            let start = self.kept.len();
            self.kept.extend(chosen.iter().map(|&lane| (row, lane, value(lane))));
            for &lane in &chosen {
                tokens.values[tokens.index(side, row, lane)] = mean;
            }
            // Where sinks leave too few, a sink fills the place: what it adds is not read.
            let sink = lanes.clone().find(|lane| tokens.is_sink(side, row, *lane)).unwrap_or(lanes.start);
            self.kept.resize(start + 2 * outliers.per_end, (row, sink, 0.0));
        }
    }

    /// Keys per channel, values per token.
    fn groups_of_lanes(
        &mut self,
        side: &PackedSide,
        tokens: &Tokens,
        page: &mut [u8],
        missed: &mut impl FnMut(usize, f32),
    ) -> Result<(), QuantError> {
        let (rows, _) = tokens.cover(side);
        for row in rows {
            for span in side.group_spans() {
                let parameters = self.fit(side, tokens, span.lanes.clone().map(|lane| (row, lane)))?;
                write_parameters(side, page, row, span.lanes.start, parameters);
                self.codes.clear();
                for lane in span.lanes.clone() {
                    self.codes.push(self.code(side, tokens, row, lane, parameters, missed));
                }
                let start = side.codes + row * side.row_bytes;
                pack(side.bits, &self.codes, &mut page[start + span.bytes.start..start + span.bytes.end]);
            }
        }
        Ok(())
    }

    /// Keys per token, values per channel.
    fn groups_of_rows(
        &mut self,
        side: &PackedSide,
        tokens: &Tokens,
        page: &mut [u8],
        missed: &mut impl FnMut(usize, f32),
    ) -> Result<(), QuantError> {
        let (rows, lanes) = tokens.cover(side);
        for lane in lanes {
            for (_, group) in side.row_groups() {
                let own = group.start.max(rows.start)..group.end.min(rows.end);
                if own.is_empty() {
                    continue;
                }
                let parameters = self.fit(side, tokens, own.clone().map(|row| (row, lane)))?;
                write_parameters(side, page, own.start, lane, parameters);
                for row in own {
                    let code = self.code(side, tokens, row, lane, parameters, missed);
                    let start = side.codes + row * side.row_bytes;
                    put(side.bits, side.lanes, lane, code, &mut page[start..start + side.row_bytes]);
                }
            }
        }
        Ok(())
    }

    /// Parameters of a group; zeros where it consists of sinks.
    fn fit(
        &mut self,
        side: &PackedSide,
        tokens: &Tokens,
        group: impl Iterator<Item = (usize, usize)>,
    ) -> Result<Parameters, QuantError> {
        self.group.clear();
        let own = group.filter(|&(row, lane)| !tokens.is_sink(side, row, lane));
        self.group.extend(own.map(|(row, lane)| tokens.values[tokens.index(side, row, lane)]));
        if self.group.is_empty() {
            return Ok(Parameters { scale: f16::ZERO, zero: f16::ZERO });
        }
        side.quantizer.fit(&self.group, side.bits)
    }

    fn code(
        &self,
        side: &PackedSide,
        tokens: &Tokens,
        row: usize,
        lane: usize,
        parameters: Parameters,
        missed: &mut impl FnMut(usize, f32),
    ) -> u8 {
        if tokens.is_sink(side, row, lane) {
            return 0;
        }
        let index = tokens.index(side, row, lane);
        let code = side.quantizer.code(parameters, tokens.values[index], side.bits);
        missed(index, tokens.values[index] - side.quantizer.value(parameters, code));
        code
    }
}

fn write_parameters(side: &PackedSide, page: &mut [u8], row: usize, lane: usize, parameters: Parameters) {
    let at = side.parameter(row, lane) * size_of::<f16>();
    put_half(page, side.scales + at, parameters.scale);
    put_half(page, side.zeros + at, parameters.zero);
}

fn put_half(page: &mut [u8], offset: usize, value: f16) {
    page[offset..offset + size_of::<f16>()].copy_from_slice(&value.to_le_bytes());
}

fn write_high(side: &PackedSide, tokens: &Tokens, page: &mut [u8]) {
    let Some(high) = side.high else { return };
    let (rows, lanes) = if side.tokens_are_lanes {
        (high.first_row..high.first_row + high.rows, tokens.slots.clone())
    } else {
        (tokens.slots.clone(), high.first_lane..high.first_lane + high.lanes)
    };
    for row in rows {
        for lane in lanes.clone() {
            let at = (row - high.first_row) * high.lanes + lane - high.first_lane;
            let value = tokens.values[tokens.index(side, row, lane)];
            put_half(page, high.offset + at * size_of::<f16>(), f16::from_f32(value));
        }
    }
}

/// Writes one page's rows of the factors of a chunk.
///
/// # Errors
/// [`QuantError::Range`] where fp16 cannot hold them.
pub(super) fn write_page_factor(
    factors: Factors,
    all: &LowRank,
    page_in_chunk: usize,
    page: &mut [u8],
) -> Result<(), QuantError> {
    let numbers = PAGE_TOKENS * factors.rank;
    let own = &all.tokens[page_in_chunk * numbers..(page_in_chunk + 1) * numbers];
    write_halves(page, factors.page, own)
}

/// Writes the factor that the pages of a chunk share into the first of them.
///
/// # Errors
/// [`QuantError::Range`] where fp16 cannot hold it: it grows with the error and with the root of the chunk's tokens.
pub(super) fn write_chunk_factor(factors: Factors, all: &LowRank, page: &mut [u8]) -> Result<(), QuantError> {
    write_halves(page, factors.chunk, &all.channels)
}

fn write_halves(page: &mut [u8], offset: usize, values: &[f32]) -> Result<(), QuantError> {
    let (min, max) = values.iter().fold((0f32, 0f32), |(min, max), x| (min.min(*x), max.max(*x)));
    if max.max(-min) > f16::MAX.to_f32() {
        return Err(QuantError::Range { min, max });
    }
    let target = &mut page[offset..offset + values.len() * size_of::<f16>()];
    bytemuck::cast_slice_mut::<u8, f16>(target).convert_from_f32_slice(values);
    Ok(())
}
