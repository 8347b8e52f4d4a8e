//! Where every byte of a cache lies.
//!
//! A **page** holds 128 token slots of one (layer, KV head). Pages of all layers and KV heads for the
//! same 128 tokens form a **block**, the unit that the pool hands out, so that one block table serves
//! the whole model. Order within a block: layer, then KV head.

use crate::{Axis, PAGE_TOKENS, Packed, Scheme, SchemeError, Side, Window};
use dibit_quant::{Bits, packed_len};
use std::ops::Range;

const HALF_BYTES: usize = 2;

/// Shape of the model's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Decoder layers.
    pub num_layers: usize,
    /// KV heads of a layer.
    pub num_key_value_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
}

impl CacheShape {
    /// Keys and values of one token, in scalars: `2 * layers * KV heads * head_dim`.
    pub fn scalars_per_token(&self) -> usize {
        2 * self.num_layers * self.num_key_value_heads * self.head_dim
    }
}

/// Codes and parameters of one packed side of a page. All offsets are bytes from the page's start.
///
/// Codes are `rows` rows of `lanes` codes. Along [`Axis::Channel`] a row is a channel and its lanes are the
/// 128 tokens; along [`Axis::Token`] a row is a token and its lanes are the channels. A row is the concatenation of its groups,
/// each packed by [`dibit_quant::pack`]. Parameters are fp16: all scales, then all minimums, both in the
/// order \[group\]\[row\].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedSide {
    /// Whether a row is a channel or a token.
    pub axis: Axis,
    /// Bits of a code.
    pub bits: Bits,
    /// Lanes that share a scale and a minimum.
    pub group: usize,
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
    /// Offset of the minimums.
    pub mins: usize,
}

impl PackedSide {
    fn new(packed: Packed, axis: Axis, head_dim: usize, offset: usize) -> Self {
        let (rows, lanes) = match axis {
            Axis::Channel => (head_dim, PAGE_TOKENS),
            Axis::Token => (PAGE_TOKENS, head_dim),
        };
        let bits = packed.bits;
        let group = packed.group.min(lanes);
        let mut side = PackedSide { axis, bits, group, rows, lanes, row_bytes: 0, codes: offset, scales: 0, mins: 0 };
        side.row_bytes = side.group_spans().map(|span| span.bytes.len()).sum();
        side.scales = offset + rows * side.row_bytes;
        side.mins = side.scales + side.groups() * rows * HALF_BYTES;
        side
    }

    /// Groups of a row; the last one is shorter where the group does not divide the lanes.
    pub fn groups(&self) -> usize {
        self.lanes.div_ceil(self.group)
    }

    /// Lanes and bytes of each group within a row.
    pub fn group_spans(&self) -> impl Iterator<Item = GroupSpan> + use<> {
        let Self { bits, group, lanes, .. } = *self;
        (0..lanes).step_by(group).enumerate().map(move |(index, start)| {
            let end = lanes.min(start + group);
            let first_byte = index * packed_len(bits, group);
            GroupSpan { index, lanes: start..end, bytes: first_byte..first_byte + packed_len(bits, end - start) }
        })
    }

    fn bytes(&self) -> usize {
        self.rows * self.row_bytes + 2 * self.groups() * self.rows * HALF_BYTES
    }
}

/// Where one group lies in a packed row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupSpan {
    /// Number of the group.
    pub index: usize,
    /// Its lanes.
    pub lanes: Range<usize>,
    /// Its bytes, from the row's start.
    pub bytes: Range<usize>,
}

/// One side (keys or values) of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SideLayout {
    /// fp16 rows of `head_dim` numbers, one for each token, from this byte offset on.
    Half {
        /// Offset of the first row.
        rows: usize,
    },
    /// Packed codes.
    Packed(PackedSide),
}

impl SideLayout {
    fn bytes(&self, head_dim: usize) -> usize {
        match self {
            SideLayout::Half { .. } => PAGE_TOKENS * head_dim * HALF_BYTES,
            SideLayout::Packed(side) => side.bytes(),
        }
    }
}

/// The bytes of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLayout {
    /// The keys.
    pub keys: SideLayout,
    /// The values.
    pub values: SideLayout,
    /// Bytes of the keys of a whole page, parameters included.
    pub key_bytes: usize,
    /// Bytes of the values of a whole page, parameters included.
    pub value_bytes: usize,
    /// Bytes from one page to the next: keys and values, rounded up to a multiple of 64.
    pub stride: usize,
}

impl PageLayout {
    fn new(scheme: &Scheme, head_dim: usize) -> Self {
        let keys = match scheme.keys {
            Side::Half => SideLayout::Half { rows: 0 },
            Side::Packed(packed) => SideLayout::Packed(PackedSide::new(packed, Axis::Channel, head_dim, 0)),
        };
        let key_bytes = keys.bytes(head_dim);
        let values = match scheme.values {
            Side::Half => SideLayout::Half { rows: key_bytes },
            Side::Packed(packed) => SideLayout::Packed(PackedSide::new(packed, Axis::Token, head_dim, key_bytes)),
        };
        let value_bytes = values.bytes(head_dim);
        PageLayout { keys, values, key_bytes, value_bytes, stride: (key_bytes + value_bytes).next_multiple_of(64) }
    }
}

/// The layout of a whole cache: a scheme compiled for a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheLayout {
    /// The model's side of it.
    pub shape: CacheShape,
    /// One page of any layer and KV head.
    pub page: PageLayout,
    /// The window of recent tokens.
    pub window: Window,
    name: String,
}

impl CacheLayout {
    /// Compiles a scheme for a model.
    ///
    /// # Errors
    /// [`SchemeError::Unsupported`] where the scheme rotates values by a Hadamard matrix whose order the
    /// head size does not have.
    pub fn new(scheme: &Scheme, shape: CacheShape) -> Result<Self, SchemeError> {
        if scheme.value_transform == crate::ValueTransform::Hadamard {
            dibit_quant::Hadamard::new(shape.head_dim).map_err(|error| SchemeError::Unsupported {
                name: scheme.name.clone(),
                problem: format!("values.transform = \"hadamard\" with head_dim {}", shape.head_dim),
                supported: error.to_string(),
            })?;
        }
        let page = PageLayout::new(scheme, shape.head_dim);
        Ok(CacheLayout { shape, page, window: scheme.window, name: scheme.name.clone() })
    }

    /// Name of the scheme.
    pub fn scheme_name(&self) -> &str {
        &self.name
    }

    /// Bytes of a block: 128 tokens of every layer and KV head.
    pub fn block_bytes(&self) -> usize {
        self.shape.num_layers * self.shape.num_key_value_heads * self.page.stride
    }

    /// Offset of a page in the arena.
    pub fn page_offset(&self, block: u32, layer: usize, kv_head: usize) -> usize {
        block as usize * self.block_bytes() + (layer * self.shape.num_key_value_heads + kv_head) * self.page.stride
    }

    /// fp16 numbers in the key ring of one (sequence, layer, KV head).
    pub fn key_ring_len(&self) -> usize {
        self.window.key_slots() * self.shape.head_dim
    }

    /// fp16 numbers in the value ring of one (sequence, layer, KV head).
    pub fn value_ring_len(&self) -> usize {
        self.window.value_slots() * self.shape.head_dim
    }

    /// Bytes of the window rings of one sequence.
    pub fn window_bytes(&self) -> usize {
        let rings = self.shape.num_layers * self.shape.num_key_value_heads;
        rings * (self.key_ring_len() + self.value_ring_len()) * HALF_BYTES
    }

    /// Bytes allocated for one sequence that holds `blocks` blocks: these, its rings and its block table.
    pub fn allocated_bytes(&self, blocks: usize) -> usize {
        blocks * (self.block_bytes() + size_of::<u32>()) + self.window_bytes()
    }

    /// Bytes allocated for one sequence of `len` tokens.
    pub fn planned_bytes(&self, len: usize) -> usize {
        self.allocated_bytes(self.window.blocks(len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(scheme: &str, head_dim: usize) -> CacheLayout {
        let shape = CacheShape { num_layers: 3, num_key_value_heads: 2, head_dim };
        CacheLayout::new(&Scheme::load(scheme).unwrap(), shape).unwrap()
    }

    #[test]
    fn a_two_bit_page_of_128_channels_takes_9216_bytes() {
        let page = layout("kvlinc", 128).page;
        assert_eq!((page.key_bytes, page.value_bytes, page.stride), (4608, 4608, 9216));
        assert_eq!(layout("fp16", 128).page.stride, 65536);
    }

    #[test]
    fn sections_follow_each_other_without_overlap() {
        for head_dim in [64, 80, 96, 128, 256] {
            for name in ["kivi", "kvlinc"] {
                let page = layout(name, head_dim).page;
                let (SideLayout::Packed(keys), SideLayout::Packed(values)) = (page.keys, page.values) else {
                    panic!("{name} packs both sides")
                };
                assert_eq!(keys.codes, 0);
                assert_eq!(keys.scales, head_dim * 32);
                assert_eq!(keys.mins - keys.scales, keys.groups() * head_dim * 2);
                assert_eq!(values.codes, keys.mins + keys.groups() * head_dim * 2);
                assert_eq!(values.scales - values.codes, 128 * head_dim / 4);
                assert_eq!(values.group, head_dim.min(128));
                assert_eq!(page.key_bytes + page.value_bytes, values.mins + values.groups() * 256);
                for offset in [keys.scales, keys.mins, values.codes, values.scales, values.mins] {
                    assert_eq!(offset % 16, 0, "head_dim {head_dim}");
                }
            }
        }
    }

    #[test]
    fn pages_of_a_block_do_not_overlap() {
        let layout = layout("kivi", 80);
        let mut offsets = Vec::new();
        for block in 0..2 {
            for layer in 0..3 {
                for head in 0..2 {
                    offsets.push(layout.page_offset(block, layer, head));
                }
            }
        }
        for (i, offset) in offsets.iter().enumerate() {
            assert_eq!(*offset, i * layout.page.stride);
        }
        assert_eq!(layout.block_bytes(), 6 * layout.page.stride);
    }

    #[test]
    fn groups_that_do_not_divide_a_head_end_short() {
        let side = PackedSide::new(Packed { bits: Bits::Two, group: 32 }, Axis::Token, 80, 0);
        let spans: Vec<_> = side.group_spans().map(|span| (span.lanes, span.bytes)).collect();
        assert_eq!(spans, [(0..32, 0..8), (32..64, 8..16), (64..80, 16..20)]);
        assert_eq!((side.groups(), side.row_bytes), (3, 20));
    }

    #[test]
    fn a_rotation_needs_a_matrix() {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim: 72 };
        let error = CacheLayout::new(&Scheme::load("kvlinc").unwrap(), shape).unwrap_err().to_string();
        assert!(error.contains("head_dim 72") && error.contains("20*2^k"), "{error}");
    }
}
