//! What kernels are told of a cache: the twins of `kernels/layout.cuh`.

use bytemuck::{Pod, Zeroable};
use dibit_cache::{Along, PackedSide, PageLayout, SideLayout};
use dibit_quant::{Bits, Clip, Quantizer};

/// Codes and parameters of one side of a page.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(crate) struct Side {
    pub half_rows: i32,
    pub tokens_are_lanes: i32,
    pub along_lanes: i32,
    pub bits: i32,
    pub group: i32,
    pub integer_zero: i32,
    pub clip: f32,
    pub include_zero: i32,
    pub clip_mse: i32,
    pub token_hadamard: i32,
    pub feedback: i32,
    pub rows: i32,
    pub lanes: i32,
    pub row_bytes: i32,
    pub codes: i32,
    pub scales: i32,
    pub zeros: i32,
    pub planes: i32,
    pub channels: i32,
    pub with: [i32; 4],
    pub high_first_row: i32,
    pub high_rows: i32,
    pub high_first_lane: i32,
    pub high_lanes: i32,
    pub high_offset: i32,
    pub rank: i32,
    pub factor_page: i32,
    pub factor_chunk: i32,
    pub outliers_per_end: i32,
    pub outlier_values: i32,
    pub outlier_lanes: i32,
}

/// Places of tokens that a page protects.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(crate) struct PageSinks {
    pub places: i32,
    pub share: f32,
    pub slots: i32,
    pub keys: i32,
    pub values: i32,
    pub row_bytes: i32,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
pub(crate) struct Page {
    pub keys: Side,
    pub values: Side,
    pub sinks: PageSinks,
    pub offset: i32,
    pub bytes: i32,
}

/// The tokens of one sequence in a pass.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Span {
    pub slot: i32,
    pub first_row: i32,
    pub rows: i32,
    pub cached: i32,
    pub packed_keys: i32,
    pub packed_values: i32,
    pub blocks: i32,
    pub block_count: i32,
    pub chunks: i32,
    pub classes: i32,
    pub class_count: i32,
}

/// The tokens of one class of a sequence.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct ClassSpan {
    pub tokens: i32,
    pub count: i32,
    pub packed: i32,
    pub blocks: i32,
}

/// One layer of a cache.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Cache {
    pub pool: u64,
    pub block_bytes: i64,
    pub layer_offset: i64,
    pub kv_heads: i32,
    pub head_dim: i32,
    pub pages: u64,
    pub key_ring: u64,
    pub value_ring: u64,
    pub key_slots: i32,
    pub value_slots: i32,
    pub sink_keys: u64,
    pub sink_values: u64,
    pub sink_positions: u64,
    pub sink_counts: u64,
    pub sink_capacity: i32,
    pub padding_2: i32,
    pub incoming_keys: u64,
    pub incoming_values: u64,
    pub incoming_rows: i32,
    pub padding_3: i32,
    pub key_order: u64,
    pub bias: i32,
    pub padding_4: i32,
}

/// Attention of some rows of a batch.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Attention {
    pub cache: Cache,
    pub spans: u64,
    pub span_count: i32,
    pub seen: i32,
    pub tables: u64,
    pub q: u64,
    pub heads: i32,
    pub first_row: i32,
    pub row_count: i32,
    pub incoming: i32,
    pub splits: i32,
    pub softcap: f32,
    pub partials: u64,
}

/// Pages of the tokens of one class in a layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct ClassPages {
    pub pages: u64,
    pub offset: i64,
}

/// A normalised Hadamard matrix on the diagonal of a rotation.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct HadamardBlock {
    pub order: i32,
    pub outer: i32,
    pub signs: i32,
    pub norm: f32,
}

/// A rotation of heads.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Rotation {
    pub kind: i32,
    pub order: i32,
    pub block_count: i32,
    pub padding: i32,
    pub blocks: u64,
    pub matrix: u64,
    pub back: u64,
}

impl Rotation {
    /// The way back.
    pub(crate) fn inverse(self) -> Self {
        Rotation { matrix: self.back, back: self.matrix, ..self }
    }
}

/// Keys that are stored before RoPE.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct PreRope {
    pub enabled: i32,
    pub heads: i32,
    pub rotation: Rotation,
    pub channels: u64,
    pub places: u64,
    pub tokens: u64,
    pub pages: u64,
}

/// What channels of keys take up of what others miss.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Feedback {
    pub places: u64,
    pub factors: u64,
}

/// Tokens that enter one side of one page.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Run {
    pub span: i32,
    pub keys: i32,
    pub token_class: i32,
    pub block: i32,
    pub slot: i32,
    pub count: i32,
    pub first: i32,
    pub positions: i32,
    pub index: i32,
    pub flush: i32,
}

/// What went wrong in a pass.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Errors {
    pub not_finite: u64,
    pub range: u64,
    pub ends: u64,
}

/// What enters the pages and rings of a layer in a pass.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Flush {
    pub cache: Cache,
    pub layer: i32,
    pub span_count: i32,
    pub spans: u64,
    pub runs: u64,
    pub run_count: u64,
    pub positions: u64,
    pub classes: u64,
    pub pre_rope: PreRope,
    pub feedback: Feedback,
    pub value_frame: u64,
    pub angles: u64,
    pub turned: u64,
    pub errors: u64,
    pub spilled: u64,
    pub spilled_numbers: i64,
}

/// The linear correction of a layer.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Correction {
    pub features: i32,
    pub shared: i32,
    pub query_maps: u64,
    pub key_maps: u64,
    pub gates: u64,
    pub states: u64,
    pub sequence_bytes: i64,
    pub head_bytes: i64,
    pub offset: i64,
    pub half: i32,
    pub padding: i32,
    pub places: u64,
    pub missed: u64,
}

/// What attention of any scheme reads besides.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Exact {
    pub classes: u64,
    pub class_spans: u64,
    pub positions: u64,
    pub pre_rope: PreRope,
}

/// Keys, or values, on their way in.
#[repr(C)]
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
pub(crate) struct Written {
    pub source: u64,
    pub target: u64,
    pub rotation: Rotation,
    pub factors: u64,
}

impl From<&SideLayout> for Side {
    fn from(side: &SideLayout) -> Self {
        match side {
            SideLayout::Half { rows } => Side { half_rows: *rows as i32, ..Side::zeroed() },
            SideLayout::Packed(side) => side.into(),
        }
    }
}

impl From<&PackedSide> for Side {
    fn from(own: &PackedSide) -> Self {
        let number = |x: usize| x as i32;
        let mut side = Side {
            half_rows: -1,
            tokens_are_lanes: own.tokens_are_lanes.into(),
            along_lanes: (own.along == Along::Lanes).into(),
            bits: number(Bits::count(own.bits)),
            group: number(own.group),
            clip_mse: (own.clip == Clip::Mse).into(),
            token_hadamard: own.token_hadamard.into(),
            feedback: own.feedback.into(),
            rows: number(own.rows),
            lanes: number(own.lanes),
            row_bytes: number(own.row_bytes),
            codes: number(own.codes),
            scales: number(own.scales),
            zeros: number(own.zeros),
            ..Side::zeroed()
        };
        if let Quantizer::IntegerZero { clip, include_zero } = own.quantizer {
            (side.integer_zero, side.clip, side.include_zero) = (1, clip, include_zero.into());
        }
        if let Some(planes) = own.planes {
            (side.planes, side.channels) = (1, number(planes.channels));
            side.with = planes.with.map(number);
        }
        if let Some(high) = own.high {
            (side.high_first_row, side.high_rows) = (number(high.first_row), number(high.rows));
            (side.high_first_lane, side.high_lanes) = (number(high.first_lane), number(high.lanes));
            side.high_offset = number(high.offset);
        }
        if let Some(factors) = own.factors {
            (side.rank, side.factor_page, side.factor_chunk) =
                (number(factors.rank), number(factors.page), number(factors.chunk));
        }
        if let Some(outliers) = own.outliers {
            (side.outliers_per_end, side.outlier_values, side.outlier_lanes) =
                (number(outliers.per_end), number(outliers.values), number(outliers.lanes));
        }
        side
    }
}

impl From<&dibit_cache::PageSinks> for PageSinks {
    fn from(own: &dibit_cache::PageSinks) -> Self {
        PageSinks {
            places: own.auto.places as i32,
            share: own.auto.share,
            slots: own.slots as i32,
            keys: own.keys as i32,
            values: own.values as i32,
            row_bytes: own.row_bytes() as i32,
        }
    }
}

impl From<&PageLayout> for Page {
    fn from(page: &PageLayout) -> Self {
        Page {
            keys: (&page.keys).into(),
            values: (&page.values).into(),
            sinks: page.sinks.as_ref().map_or(PageSinks::zeroed(), PageSinks::from),
            offset: page.offset as i32,
            bytes: page.bytes as i32,
        }
    }
}
