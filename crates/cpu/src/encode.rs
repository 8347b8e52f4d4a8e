//! Writing tokens into one packed side of a page.

use super::clip::{Group, Search};
use super::feedback::{Columns, HeadFeedback};
use super::quantise::{self, RowParameters};
use super::rotate;
use super::simd::Isa;
use dibit_cache::{Along, Factors, GroupSpan, Outliers, PAGE_TOKENS, PackedSide};
use dibit_quant::{Bits, Clip, Hadamard, LowRank, Parameters, QuantError, put};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Parameters of a group that consists of sinks.
const NONE: Parameters = Parameters { scale: f16::ZERO, zero: f16::ZERO };

/// Tokens of one page on their way in.
pub(super) struct Tokens<'a> {
    /// `[token][head_dim]`; changed on the way.
    pub values: &'a mut [f32],
    pub head_dim: usize,
    /// Their slots in the page.
    pub slots: Range<usize>,
    /// Which of them are kept elsewhere, and have no part in a group.
    pub sinks: &'a [bool],
    /// The channels in the order in which they are stored, where that is not their own.
    pub order: Option<&'a [usize]>,
    /// What channels take up of what others miss, where the side asks for it.
    pub feedback: Option<&'a HeadFeedback>,
}

/// Buffers of the encoder.
#[derive(Default)]
pub(super) struct Encoder {
    /// `[token][channel]`
    codes: Vec<u8>,
    /// Parameters of each channel of a token.
    own: RowParameters,
    /// Smallest and largest value of each channel.
    min: Vec<f32>,
    max: Vec<f32>,
    /// The groups of the channels.
    groups: Vec<Group>,
    search: Search,
    /// One packed byte of each channel.
    bytes: Vec<u8>,
    /// Lanes of a row in the order of their values.
    sorted: Vec<usize>,
    /// Row, lane and value of what is kept beside the codes.
    kept: Vec<(usize, usize, f32)>,
    /// `[token][plane]`
    planes: Vec<u8>,
    /// Channels of a token on their way to another order.
    row: Vec<f32>,
    columns: Columns,
}

/// Slot of the token that a code belongs to.
fn slot(side: &PackedSide, row: usize, lane: usize) -> usize {
    if side.tokens_are_lanes { lane } else { row }
}

/// Channels that have codes, or a mean in their place.
fn channels(side: &PackedSide) -> usize {
    match side.planes {
        Some(planes) => planes.channels,
        None if side.tokens_are_lanes => side.rows,
        None => side.lanes,
    }
}

/// Whether a group is a channel of several tokens. If not, it is several channels of a token.
fn along_tokens(side: &PackedSide) -> bool {
    (side.along == Along::Lanes) == side.tokens_are_lanes
}

impl Tokens<'_> {
    /// Numbers of a token that become codes.
    fn numbers(&self, side: &PackedSide, slot: usize) -> &[f32] {
        &self.values[(slot - self.slots.start) * self.head_dim..][..channels(side)]
    }

    fn is_sink(&self, slot: usize) -> bool {
        self.sinks[slot - self.slots.start]
    }

    /// Those of some slots that are no sinks.
    fn seen(&self, slots: Range<usize>) -> impl Iterator<Item = usize> + Clone {
        slots.filter(|slot| !self.is_sink(*slot))
    }

    fn index(&self, side: &PackedSide, row: usize, lane: usize) -> usize {
        let channel = if side.tokens_are_lanes { row } else { lane };
        (slot(side, row, lane) - self.slots.start) * self.head_dim + channel
    }

    /// Packed rows and lanes that the tokens cover.
    fn cover(&self, side: &PackedSide) -> (Range<usize>, Range<usize>) {
        if side.tokens_are_lanes { (0..side.rows, self.slots.clone()) } else { (self.slots.clone(), 0..side.lanes) }
    }
}

impl Encoder {
    /// Quantises tokens into a page. What the codes miss is appended to `error`, `[token][head_dim]`, where that is wanted;
    /// it is zero for sinks.
    ///
    /// Groups along tokens need whole pages, which the schemes' validation sees to.
    pub(super) fn encode(
        &mut self,
        isa: Isa,
        side: &PackedSide,
        mut tokens: Tokens,
        page: &mut [u8],
        error: Option<&mut Vec<f32>>,
    ) -> Result<(), QuantError> {
        if let Some(order) = tokens.order {
            for token in tokens.values.chunks_exact_mut(tokens.head_dim) {
                self.row.clear();
                self.row.extend(order.iter().map(|channel| token[*channel]));
                token.copy_from_slice(&self.row);
            }
        }
        if side.token_hadamard {
            let hadamard = Hadamard::new(PAGE_TOKENS).expect("a power of two");
            rotate::hadamard_columns(isa, &hadamard, tokens.values, tokens.head_dim);
        }
        self.kept.clear();
        if let Some(outliers) = side.outliers {
            self.set_outliers_aside(side, outliers, &mut tokens);
        }
        let mut error = error.map(|error| {
            let first = error.len();
            error.resize(first + tokens.values.len(), 0.0);
            &mut error[first..]
        });
        self.quantise(isa, side, &tokens, page, error.as_deref_mut())?;
        if side.tokens_are_lanes {
            self.pack_channels(isa, side, tokens.slots.clone(), page);
        } else {
            self.pack_tokens(isa, side, tokens.slots.clone(), page);
        }
        if side.high.is_some() {
            write_high(side, &tokens, page);
        }
        if let Some(outliers) = side.outliers {
            self.write_outliers(side, outliers, &tokens, page, error.as_deref_mut());
        }
        if let (Some(order), Some(error)) = (tokens.order, error) {
            for token in error.chunks_exact_mut(tokens.head_dim) {
                self.row.clear();
                self.row.extend_from_slice(token);
                order.iter().zip(&self.row).for_each(|(channel, missed)| token[*channel] = *missed);
            }
        }
        Ok(())
    }

    /// Replaces the smallest and largest values of each row by its mean.
    fn set_outliers_aside(&mut self, side: &PackedSide, outliers: Outliers, tokens: &mut Tokens) {
        let (rows, lanes) = tokens.cover(side);
        for row in rows {
            self.sorted.clear();
            self.sorted.extend(lanes.clone().filter(|lane| !tokens.is_sink(slot(side, row, *lane))));
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
            let sink = lanes.clone().find(|lane| tokens.is_sink(slot(side, row, *lane))).unwrap_or(lanes.start);
            self.kept.resize(start + 2 * outliers.per_end, (row, sink, 0.0));
        }
    }

    /// Keeps what was set aside beside the codes.
    fn write_outliers(
        &self,
        side: &PackedSide,
        outliers: Outliers,
        tokens: &Tokens,
        page: &mut [u8],
        mut error: Option<&mut [f32]>,
    ) {
        for (place, &(row, lane, value)) in self.kept.iter().enumerate() {
            if let Some(error) = &mut error {
                error[tokens.index(side, row, lane)] = 0.0;
            }
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

    /// Fits all groups and leaves the codes of the tokens in `codes`: 0 for sinks.
    fn quantise(
        &mut self,
        isa: Isa,
        side: &PackedSide,
        tokens: &Tokens,
        page: &mut [u8],
        mut error: Option<&mut [f32]>,
    ) -> Result<(), QuantError> {
        let channels = channels(side);
        self.codes.clear();
        self.codes.resize(tokens.slots.len() * channels, 0);
        self.own.resize(channels);
        if let Some(slot) = tokens
            .seen(tokens.slots.clone())
            .find(|slot| !quantise::largest_magnitude(isa, tokens.numbers(side, *slot)).is_finite())
        {
            return Err(not_finite(side, tokens, slot));
        }
        let step = if along_tokens(side) { side.group } else { 1 };
        for first in (0..PAGE_TOKENS).step_by(step) {
            let group = first.max(tokens.slots.start)..tokens.slots.end.min(first + step);
            if group.is_empty() {
                continue;
            }
            match along_tokens(side) {
                true => self.fit_channels(isa, side, tokens, group.clone(), page)?,
                false => self.fit_token(isa, side, tokens, group.start, page)?,
            }
            if let Some(feedback) = tokens.feedback {
                let seen: Vec<usize> = tokens.seen(group.clone()).collect();
                let numbers = seen.iter().map(|slot| tokens.numbers(side, *slot));
                let Self { codes, own, columns, .. } = self;
                columns.code(isa, feedback, own, numbers, |token, channel, code| {
                    codes[(seen[token] - tokens.slots.start) * channels + channel] = code;
                });
            }
            for slot in tokens.seen(group) {
                let index = slot - tokens.slots.start;
                let numbers = tokens.numbers(side, slot);
                let codes = &mut self.codes[index * channels..][..channels];
                if tokens.feedback.is_none() {
                    quantise::code(isa, numbers, &self.own, side.quantizer, codes);
                }
                if let Some(error) = &mut error {
                    let error = &mut error[index * tokens.head_dim..][..channels];
                    quantise::missed(isa, numbers, codes, &self.own, side.quantizer, error);
                }
            }
        }
        Ok(())
    }

    /// Fits a group of tokens in each channel.
    fn fit_channels(
        &mut self,
        isa: Isa,
        side: &PackedSide,
        tokens: &Tokens,
        group: Range<usize>,
        page: &mut [u8],
    ) -> Result<(), QuantError> {
        for (ends, start) in [(&mut self.min, f32::INFINITY), (&mut self.max, f32::NEG_INFINITY)] {
            ends.clear();
            ends.resize(channels(side), start);
        }
        for slot in tokens.seen(group.clone()) {
            quantise::widen(isa, tokens.numbers(side, slot), &mut self.min, &mut self.max);
        }
        let is_empty = tokens.seen(group.clone()).next().is_none();
        self.groups.clear();
        for (channel, (min, max)) in self.min.iter().zip(&self.max).enumerate() {
            let bits = bits(side, channel);
            let parameters = match bits {
                _ if is_empty => NONE,
                Some(bits) => side.quantizer.fit_range(*min, *max, bits)?,
                None => mean(tokens, side, group.clone(), channel),
            };
            self.groups.push(Group { min: *min, max: *max, bits, parameters });
        }
        if side.clip == Clip::Mse && !is_empty {
            let rows = tokens.seen(group.clone()).map(|slot| tokens.numbers(side, slot));
            self.search.columns(isa, side.quantizer, rows, &mut self.groups);
        }
        for (channel, Group { bits, parameters, .. }) in self.groups.iter().enumerate() {
            self.own.set(channel..channel + 1, *parameters, bits.map_or(0, Bits::max_code));
            write_parameters(side, page, group.start, channel, *parameters);
        }
        Ok(())
    }

    /// Fits the groups of channels of a token.
    fn fit_token(
        &mut self,
        isa: Isa,
        side: &PackedSide,
        tokens: &Tokens,
        slot: usize,
        page: &mut [u8],
    ) -> Result<(), QuantError> {
        let numbers = tokens.numbers(side, slot);
        for (index, own) in numbers.chunks(side.group).enumerate() {
            let (min, max) = quantise::range(isa, own);
            let mut group = Group { min, max, bits: Some(side.bits), parameters: NONE };
            if !tokens.is_sink(slot) {
                group.parameters = side.quantizer.fit_range(min, max, side.bits)?;
                if side.clip == Clip::Mse {
                    self.search.row(isa, side.quantizer, own, &mut group);
                }
            }
            let first = index * side.group;
            self.own.set(first..first + own.len(), group.parameters, side.bits.max_code());
            write_parameters(side, page, slot, first, group.parameters);
        }
        Ok(())
    }

    /// Packs rows that are tokens.
    fn pack_tokens(&mut self, isa: Isa, side: &PackedSide, slots: Range<usize>, page: &mut [u8]) {
        let spans: Vec<GroupSpan> = side.group_spans().collect();
        let codes = stored_codes(side, &self.codes, &mut self.planes);
        for (slot, codes) in slots.zip(codes.chunks_exact(side.lanes)) {
            let row = &mut page[side.codes + slot * side.row_bytes..][..side.row_bytes];
            for span in &spans {
                quantise::pack(isa, side.bits, &codes[span.lanes.clone()], &mut row[span.bytes.clone()]);
            }
        }
    }

    /// Packs rows that are channels: the bytes at one place of all rows at a time.
    fn pack_channels(&mut self, isa: Isa, side: &PackedSide, slots: Range<usize>, page: &mut [u8]) {
        let Self { codes, bytes, planes, .. } = self;
        let codes = stored_codes(side, codes, planes);
        let rows = &mut page[side.codes..][..side.rows * side.row_bytes];
        bytes.resize(side.rows, 0);
        for span in side.group_spans() {
            let mut first_byte = span.bytes.start;
            for plane in side.bits.planes() {
                let stride = plane.stride(span.lanes.len());
                for place in 0..stride.min(span.lanes.len()) {
                    let fields = (span.lanes.start + place..span.lanes.end).step_by(stride).enumerate();
                    let mut fields = fields.filter(|(_, slot)| slots.contains(slot)).peekable();
                    if fields.peek().is_none() {
                        continue;
                    }
                    let at = first_byte + place;
                    for (byte, row) in bytes.iter_mut().zip(rows.chunks_exact(side.row_bytes)) {
                        *byte = row[at];
                    }
                    for (field, slot) in fields {
                        let codes = &codes[(slot - slots.start) * side.rows..][..side.rows];
                        quantise::merge(isa, codes, *plane, field, bytes);
                    }
                    for (byte, row) in bytes.iter().zip(rows.chunks_exact_mut(side.row_bytes)) {
                        row[at] = *byte;
                    }
                }
                first_byte += stride;
            }
        }
    }
}

/// Bits of a channel in the order of storage; none where it has no plane.
fn bits(side: &PackedSide, channel: usize) -> Option<Bits> {
    let Some(planes) = side.planes else { return Some(side.bits) };
    match planes.with.iter().filter(|with| channel < **with).count() {
        0 => None,
        1 => Some(Bits::Two),
        2 => Some(Bits::Four),
        3 => Some(Bits::Six),
        _ => Some(Bits::Eight),
    }
}

/// The mean of a group, in place of codes.
fn mean(tokens: &Tokens, side: &PackedSide, group: Range<usize>, channel: usize) -> Parameters {
    let numbers = tokens.seen(group).map(|slot| f64::from(tokens.numbers(side, slot)[channel]));
    let (count, sum) = numbers.fold((0, 0.0), |(count, sum), number| (count + 1, sum + number));
    Parameters { scale: f16::ZERO, zero: f16::from_f64(sum / f64::from(count)) }
}

/// The codes of a token as they are stored: where there are planes, from `[token][channel]` to `[token][plane]`.
fn stored_codes<'a>(side: &PackedSide, codes: &'a [u8], planes: &'a mut Vec<u8>) -> &'a [u8] {
    let Some(own) = side.planes else { return codes };
    planes.clear();
    for token in codes.chunks_exact(own.channels) {
        for (plane, with) in own.with.iter().enumerate() {
            planes.extend(token[..*with].iter().map(|code| code >> (2 * plane) & 3));
        }
    }
    planes
}

/// Says which number of a token is not finite.
fn not_finite(side: &PackedSide, tokens: &Tokens, slot: usize) -> QuantError {
    let numbers = tokens.numbers(side, slot);
    let channel = numbers.iter().position(|value| !value.is_finite()).expect("a number that is not finite");
    let index = if along_tokens(side) {
        tokens.seen((slot / side.group * side.group).max(tokens.slots.start)..slot).count()
    } else {
        channel % side.group
    };
    QuantError::NonFinite { index, value: numbers[channel] }
}

fn write_parameters(side: &PackedSide, page: &mut [u8], slot: usize, channel: usize, parameters: Parameters) {
    let (row, lane) = if side.tokens_are_lanes { (channel, slot) } else { (slot, channel) };
    // Groups of planes are whole pages.
    let number = if side.planes.is_some() { channel } else { side.parameter(row, lane) };
    let at = number * size_of::<f16>();
    if side.planes.is_none_or(|planes| channel < planes.with[0]) {
        put_half(page, side.scales + at, parameters.scale);
    }
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
