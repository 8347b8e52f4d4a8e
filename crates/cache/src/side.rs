//! Codes and parameters of one packed side of a page.

use crate::HALF_BYTES;
use crate::{Axis, PAGE_TOKENS, Packed, Transform};
use dibit_quant::{Bits, Clip, Quantizer, packed_len};
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
    /// Which part of a group's range the codes span.
    pub clip: Clip,
    /// Whether the page is rotated along its tokens.
    pub token_hadamard: bool,
    /// Whether channels take up what others miss.
    pub feedback: bool,
    /// Channels with different numbers of planes; the packed rows are then planes.
    pub planes: Option<Planes>,
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

/// Channels by the two-bit planes that each has: of a channel of `p` planes the code is `sum_i 4^i plane_i`.
///
/// Channels are ordered by falling planes. The rows of keys, or lanes of values, are the lowest plane of the channels that
/// have one, then the second plane of those that have two, and so on. There are scales for channels with a plane, and
/// zeros for all: the minimum of the group, or its mean where there is no plane. Calibrations give the channels of a
/// tile as many planes, so that a kernel can take a tile at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Planes {
    /// All channels.
    pub channels: usize,
    /// Channels with one plane at least, with two, and so on.
    pub with: [usize; Planes::MOST],
}

impl Planes {
    /// Planes of a channel at most.
    pub const MOST: usize = 4;

    /// Channels of a tile.
    pub const TILE: usize = 8;

    /// From the planes of each channel.
    pub fn new(counts: &[u8]) -> Self {
        let with = |planes: usize| counts.iter().filter(|count| usize::from(**count) > planes).count();
        Planes { channels: counts.len(), with: std::array::from_fn(with) }
    }

    /// Planes of a head whose channels have so many bits on average, in whole tiles.
    pub fn of_average(bits: f32, channels: usize) -> usize {
        let tiles = (f64::from(bits) * channels as f64 / (2 * Planes::TILE) as f64).round() as usize;
        (tiles.max(1) * Planes::TILE).min(Planes::MOST * channels)
    }

    /// Where an average of bits is all that is known: as many channels as can be have one plane.
    fn planned(average: f32, channels: usize) -> Self {
        let planes = Planes::of_average(average, channels);
        let with = |index: usize| planes.saturating_sub(index * channels).min(channels);
        Planes { channels, with: std::array::from_fn(with) }
    }

    /// Planes of all channels.
    pub fn count(&self) -> usize {
        self.with.iter().sum()
    }

    /// For each plane behind the first, what its codes are worth and its place among all planes of a head. It has the first
    /// channels.
    pub fn further(&self) -> impl Iterator<Item = (f32, Range<usize>)> {
        let (mut value, mut start) = (1.0, self.with[0]);
        self.with[1..].iter().map(move |count| {
            value *= 4.0;
            let place = start..start + count;
            start = place.end;
            (value, place)
        })
    }

    /// The channels in the order in which they lie in pages.
    pub fn order(counts: &[u8]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..counts.len()).collect();
        order.sort_by_key(|channel| std::cmp::Reverse(counts[*channel]));
        order
    }
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
    /// Places a side from `offset` on; `planes` has the planes of each channel, where they are known. On an error: the
    /// problem, and what is supported.
    pub(crate) fn new(
        packed: Packed,
        tokens_are_lanes: bool,
        head_dim: usize,
        offset: usize,
        planes: Option<&[u8]>,
    ) -> Result<Self, (String, String)> {
        let share = f64::from(packed.high_precision) * head_dim as f64;
        let high = share.round_ties_even() as usize;
        if packed.high_precision > 0.0 && high == 0 {
            return Err((
                format!("high_precision = {} of {head_dim} channels, which is none", packed.high_precision),
                format!("a share from {} on", 1.0 / head_dim as f64),
            ));
        }
        let planes = packed.planes.map(|average| match planes {
            Some(counts) => Planes::new(counts),
            None => Planes::planned(average, head_dim),
        });
        let low = planes.map_or(head_dim - high, |planes| planes.count());
        let (rows, lanes) = if tokens_are_lanes { (low, PAGE_TOKENS) } else { (PAGE_TOKENS, low) };
        let along = if (packed.axis == Axis::Channel) == tokens_are_lanes { Along::Lanes } else { Along::Rows };
        let mut side = PackedSide {
            tokens_are_lanes,
            along,
            bits: packed.bits,
            group: packed.group.min(if along == Along::Lanes { lanes } else { rows }),
            quantizer: packed.quantizer,
            clip: packed.clip,
            token_hadamard: packed.transform == Transform::TokenHadamard,
            feedback: packed.feedback,
            planes,
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
        side.zeros = side.scales + side.num_scales() * HALF_BYTES;
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

    /// Scales of a page.
    pub fn num_scales(&self) -> usize {
        match (self.planes, self.along) {
            (Some(planes), _) => planes.with[0],
            (None, along) => self.num_groups(along),
        }
    }

    /// Zeros of a page: as many as scales, but for channels without a plane.
    pub fn num_zeros(&self) -> usize {
        self.planes.map_or(self.num_groups(self.along), |planes| planes.channels)
    }

    fn num_groups(&self, along: Along) -> usize {
        match along {
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
            self.zeros + self.num_zeros() * HALF_BYTES
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
            planes: None,
            axis,
            group,
            quantizer: Quantizer::FloatMin,
            clip: Clip::None,
            transform: Transform::None,
            high_precision: 0.0,
            low_rank: 0,
            outliers: 0.0,
            feedback: false,
        }
    }

    #[test]
    fn groups_that_do_not_divide_a_head_end_short() {
        let side = PackedSide::new(packed(Axis::Token, 32), false, 80, 0, None).unwrap();
        let spans: Vec<_> = side.group_spans().map(|span| (span.lanes, span.bytes)).collect();
        assert_eq!(spans, [(0..32, 0..8), (32..64, 8..16), (64..80, 16..20)]);
        assert_eq!((side.num_scales(), side.row_bytes), (3 * 128, 20));
        let keys = PackedSide::new(packed(Axis::Token, 32), true, 80, 0, None).unwrap();
        let groups: Vec<_> = keys.row_groups().collect();
        assert_eq!(groups, [(0, 0..32), (1, 32..64), (2, 64..80)]);
        assert_eq!((keys.num_scales(), keys.row_bytes, keys.group_spans().count()), (3 * 128, 32, 1));
    }

    #[test]
    fn what_lies_beside_the_codes_is_counted() {
        let resq = PackedSide::new(Packed { high_precision: 0.03125, ..packed(Axis::Token, 128) }, false, 128, 0, None)
            .unwrap();
        assert_eq!((resq.lanes, resq.row_bytes), (124, 31));
        assert_eq!(resq.high, Some(High { first_row: 0, rows: 128, first_lane: 124, lanes: 4, offset: 128 * 35 }));
        assert_eq!(resq.bytes(), 128 * (31 + 4 + 8));
        let gear = Packed { low_rank: 2, outliers: 0.01, ..packed(Axis::Channel, 128) };
        let gear = PackedSide::new(gear, true, 64, 256, None).unwrap();
        assert_eq!(gear.outliers.unwrap().per_end, 1);
        assert_eq!(gear.bytes(), 64 * (32 + 4) + 128 * 2 * 2 + 64 * 2 * 3);
        let none = PackedSide::new(Packed { high_precision: 0.001, ..packed(Axis::Token, 128) }, true, 64, 0, None);
        assert!(none.unwrap_err().0.contains("which is none"));
    }

    #[test]
    fn planes_take_what_their_channels_need() {
        let side = |planes| {
            let packed = Packed { planes: Some(2.0), ..packed(Axis::Channel, 128) };
            PackedSide::new(packed, true, 8, 0, planes).unwrap()
        };
        let own = side(Some(&[0, 2, 1, 2, 0, 1, 1, 1]));
        assert_eq!(own.planes, Some(Planes { channels: 8, with: [6, 2, 0, 0] }));
        assert_eq!((own.rows, own.num_scales(), own.num_zeros()), (8, 6, 8));
        assert_eq!(own.bytes(), 8 * 32 + 6 * 2 + 8 * 2);
        assert_eq!(Planes::order(&[0, 2, 1, 2, 0, 1, 1, 1]), [1, 3, 2, 5, 6, 7, 0, 4]);
        // What is planned for without a calibration is what two bits take everywhere.
        assert_eq!(side(None).bytes(), 8 * (32 + 4));
        assert_eq!(Planes::planned(3.0, 32).with, [32, 16, 0, 0]);
        assert_eq!(Planes::planned(1.0, 32).with, [16, 0, 0, 0]);
        assert_eq!(Planes::planned(2.2, 64).with, [64, 8, 0, 0]);
        let values = Packed { planes: Some(2.0), ..packed(Axis::Channel, 128) };
        let values = PackedSide::new(values, false, 8, 0, Some(&[3, 2, 1, 1, 0, 0, 0, 0])).unwrap();
        assert_eq!((values.rows, values.lanes, values.row_bytes), (128, 7, 2));
        assert_eq!((values.num_scales(), values.num_zeros()), (4, 8));
    }
}
