//! Codes and parameters of one packed side of a page.

use crate::layout::HALF_BYTES;
use crate::{Axis, PAGE_TOKENS, Packed, Transform};
use dibit_quant::{Bits, Quantizer, packed_len};
use std::ops::Range;

/// Which way the groups of a packed side run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// A group is consecutive lanes of one row: keys per channel, values per token.
    Lanes,
    /// A group is consecutive rows of one lane: keys per token, values per channel.
    Rows,
}

/// Codes and parameters of one packed side of a page. All offsets are bytes from the page's start.
///
/// Keys: a row is a channel and its lanes are the 128 tokens. Values: a row is a token and its lanes are the channels.
/// The codes are `rows` rows of `lanes` codes. Where groups run along lanes, a row is the concatenation of its
/// groups, each packed by [`dibit_quant::pack`], and parameters are in the order \[group\]\[row\]. Where groups
/// run along rows, a row is packed as a whole, and parameters are in the order \[group\]\[lane\]. Parameters are
/// fp16: all scales, then all zeros.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PackedSide {
    /// Whether rows are channels and lanes are tokens (keys), or the other way round (values).
    pub tokens_are_lanes: bool,
    /// Which way groups run.
    pub along: Along,
    /// Bits of a code.
    pub bits: Bits,
    /// Codes that share a scale and a zero.
    pub group: usize,
    /// What the parameters mean.
    pub quantizer: Quantizer,
    /// Whether the page is rotated along its tokens.
    pub token_hadamard: bool,
    /// Number of packed rows.
    pub rows: usize,
    /// Codes in a row.
    pub lanes: usize,
    /// Bytes of a packed row.
    pub row_bytes: usize,
    /// Offset of the first row.
    pub codes: usize,
    /// Offset of the scales.
    pub scales: usize,
    /// Offset of the minimums or zero points.
    pub zeros: usize,
    /// Channels in 16 bit.
    pub high: Option<High>,
    /// Factors of the quantisation error.
    pub factors: Option<Factors>,
    /// Values kept beside the codes.
    pub outliers: Option<Outliers>,
}

/// Channels that stay in 16 bit: the last ones. fp16 `[rows][lanes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct High {
    /// First row, counted behind the packed rows.
    pub first_row: usize,
    /// Rows.
    pub rows: usize,
    /// First lane, counted behind the packed lanes.
    pub first_lane: usize,
    /// Lanes.
    pub lanes: usize,
    /// Offset of the first row.
    pub offset: usize,
}

/// Low-rank factors of the quantisation error: `E ~ tokens channels^T` (GEAR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Factors {
    /// Rank.
    pub rank: usize,
    /// Offset of the page's own factor, fp16 `[128 tokens][rank]`.
    pub page: usize,
    /// Offset, in the first page of a chunk, of the factor that its pages share, fp16 `[head_dim][rank]`.
    pub chunk: usize,
}

/// Values kept beside the codes of a row: its smallest and its largest (GEAR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outliers {
    /// How many at each end of a row.
    pub per_end: usize,
    /// Offset of the values, fp16 `[row][2 per_end]`.
    pub values: usize,
    /// Offset of their lanes, bytes `[row][2 per_end]`.
    pub lanes: usize,
}

/// Where one group lies in a packed row, for groups along lanes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSpan {
    /// Number of the group.
    pub index: usize,
    /// Its lanes.
    pub lanes: Range<usize>,
    /// Its bytes, from the row's start.
    pub bytes: Range<usize>,
}

impl PackedSide {
    /// Places a side from `offset` on. On an error: the problem, and what is supported.
    pub(crate) fn new(
        packed: Packed,
        tokens_are_lanes: bool,
        head_dim: usize,
        offset: usize,
    ) -> Result<Self, (String, String)> {
        let share = f64::from(packed.high_precision) * head_dim as f64;
        let high = share.round_ties_even() as usize;
        if packed.high_precision > 0.0 && high == 0 {
            return Err((
                format!("high_precision = {} of {head_dim} channels, which is none", packed.high_precision),
                format!("a share from {} on", 1.0 / head_dim as f64),
            ));
        }
        let low = head_dim - high;
        let (rows, lanes) = if tokens_are_lanes { (low, PAGE_TOKENS) } else { (PAGE_TOKENS, low) };
        let along = if (packed.axis == Axis::Channel) == tokens_are_lanes { Along::Lanes } else { Along::Rows };
        let mut side = PackedSide {
            tokens_are_lanes,
            along,
            bits: packed.bits,
            group: packed.group.min(if along == Along::Lanes { lanes } else { rows }),
            quantizer: packed.quantizer,
            token_hadamard: packed.transform == Transform::TokenHadamard,
            rows,
            lanes,
            row_bytes: 0,
            codes: offset,
            scales: 0,
            zeros: 0,
            high: None,
            factors: None,
            outliers: None,
        };
        side.row_bytes = side.group_spans().map(|span| span.bytes.len()).sum();
        side.scales = offset + rows * side.row_bytes;
        side.zeros = side.scales + side.num_parameters() * HALF_BYTES;
        if high > 0 {
            let offset = side.end();
            side.high = Some(if tokens_are_lanes {
                High { first_row: rows, rows: high, first_lane: 0, lanes, offset }
            } else {
                High { first_row: 0, rows, first_lane: lanes, lanes: high, offset }
            });
        }
        if packed.low_rank > 0 {
            side.factors = Some(Factors { rank: packed.low_rank, page: side.end(), chunk: 0 });
        }
        if packed.outliers > 0.0 {
            let per_end = ((f64::from(packed.outliers) * lanes as f64 + 1e-6) as usize).max(1);
            let values = side.end();
            side.outliers = Some(Outliers { per_end, values, lanes: values + rows * 2 * per_end * HALF_BYTES });
        }
        Ok(side)
    }

    /// Scales of a page; there are as many zeros.
    pub fn num_parameters(&self) -> usize {
        match self.along {
            Along::Lanes => self.lanes.div_ceil(self.group) * self.rows,
            Along::Rows => self.rows.div_ceil(self.group) * self.lanes,
        }
    }

    /// Lanes and bytes of each packed part of a row: its groups where they run along lanes, else the whole row.
    pub fn group_spans(&self) -> impl Iterator<Item = GroupSpan> + use<> {
        let Self { bits, lanes, .. } = *self;
        let step = if self.along == Along::Lanes { self.group } else { lanes };
        (0..lanes).step_by(step).enumerate().map(move |(index, start)| {
            let end = lanes.min(start + step);
            let first_byte = index * packed_len(bits, step);
            GroupSpan { index, lanes: start..end, bytes: first_byte..first_byte + packed_len(bits, end - start) }
        })
    }

    /// Rows of each group, where groups run along rows.
    pub fn row_groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let Self { group, rows, .. } = *self;
        (0..rows).step_by(group).map(move |start| start..rows.min(start + group)).enumerate()
    }

    /// Number of the parameters of a code.
    pub fn parameter(&self, row: usize, lane: usize) -> usize {
        match self.along {
            Along::Lanes => lane / self.group * self.rows + row,
            Along::Rows => row / self.group * self.lanes + lane,
        }
    }

    /// Offset behind everything that has been placed.
    fn end(&self) -> usize {
        if let Some(outliers) = self.outliers {
            outliers.lanes + self.rows * 2 * outliers.per_end
        } else if let Some(factors) = self.factors {
            factors.page + PAGE_TOKENS * factors.rank * HALF_BYTES
        } else if let Some(high) = self.high {
            high.offset + high.rows * high.lanes * HALF_BYTES
        } else {
            self.zeros + self.num_parameters() * HALF_BYTES
        }
    }

    /// Bytes of the side in a page, what a chunk shares left out.
    pub(crate) fn bytes(&self) -> usize {
        self.end() - self.codes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(axis: Axis, group: usize) -> Packed {
        Packed {
            bits: Bits::Two,
            axis,
            group,
            quantizer: Quantizer::FloatMin,
            transform: Transform::None,
            high_precision: 0.0,
            low_rank: 0,
            outliers: 0.0,
        }
    }

    #[test]
    fn groups_that_do_not_divide_a_head_end_short() {
        let side = PackedSide::new(packed(Axis::Token, 32), false, 80, 0).unwrap();
        let spans: Vec<_> = side.group_spans().map(|span| (span.lanes, span.bytes)).collect();
        assert_eq!(spans, [(0..32, 0..8), (32..64, 8..16), (64..80, 16..20)]);
        assert_eq!((side.num_parameters(), side.row_bytes), (3 * 128, 20));
        let keys = PackedSide::new(packed(Axis::Token, 32), true, 80, 0).unwrap();
        let groups: Vec<_> = keys.row_groups().collect();
        assert_eq!(groups, [(0, 0..32), (1, 32..64), (2, 64..80)]);
        assert_eq!((keys.num_parameters(), keys.row_bytes, keys.group_spans().count()), (3 * 128, 32, 1));
    }

    #[test]
    fn what_lies_beside_the_codes_is_counted() {
        let resq =
            PackedSide::new(Packed { high_precision: 0.03125, ..packed(Axis::Token, 128) }, false, 128, 0).unwrap();
        assert_eq!((resq.lanes, resq.row_bytes), (124, 31));
        assert_eq!(resq.high, Some(High { first_row: 0, rows: 128, first_lane: 124, lanes: 4, offset: 128 * 35 }));
        assert_eq!(resq.bytes(), 128 * (31 + 4 + 8));
        let gear = Packed { low_rank: 2, outliers: 0.01, ..packed(Axis::Channel, 128) };
        let gear = PackedSide::new(gear, true, 64, 256).unwrap();
        assert_eq!(gear.outliers.unwrap().per_end, 1);
        assert_eq!(gear.bytes(), 64 * (32 + 4) + 128 * 2 * 2 + 64 * 2 * 3);
        let none = PackedSide::new(Packed { high_precision: 0.001, ..packed(Axis::Token, 128) }, true, 64, 0);
        assert!(none.unwrap_err().0.contains("which is none"));
    }
}
