//! Where every byte of a cache lies.
//!
//! A **page** holds 128 token slots of one (layer, KV head). Pages of all layers and KV heads for the
//! same 128 tokens form a **block**, the unit that the pool hands out, so that one block table serves
//! the whole model. Order within a block: layer, then KV head.

use crate::page_sinks::PageSinks;
use crate::shape::CacheShape;
use crate::{
    AutoSinks, Correction, HALF_BYTES, LayerCalibration, Linear, PAGE_TOKENS, PackedSide, Permutation, PreRope, Side,
    Sinks, StateLayout, Transform,
};
use dibit_quant::Hadamard;

/// Bytes to a multiple of which pages, and the values in them, begin.
const ALIGNMENT: usize = 64;

/// One side (keys or values) of a page.
// There is one for each side of each layer and KV head: its size does not matter, and it is copied like a number.
#[allow(clippy::large_enum_variant)]
#[derive(Debug, Clone, Copy, PartialEq)]
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
    fn new(
        side: Side,
        tokens_are_lanes: bool,
        head_dim: usize,
        offset: usize,
        planes: Option<&[u8]>,
    ) -> Result<Self, (String, String)> {
        Ok(match side {
            Side::Half => SideLayout::Half { rows: offset },
            Side::Packed(packed) => {
                SideLayout::Packed(PackedSide::new(packed, tokens_are_lanes, head_dim, offset, planes)?)
            }
        })
    }

    fn bytes(&self, head_dim: usize) -> usize {
        match self {
            SideLayout::Half { .. } => PAGE_TOKENS * head_dim * HALF_BYTES,
            SideLayout::Packed(side) => side.bytes(),
        }
    }

    /// Makes room for the factors of a chunk at `offset`; returns the bytes that they take.
    fn place_chunk(&mut self, head_dim: usize, offset: usize) -> usize {
        match self {
            SideLayout::Packed(PackedSide { factors: Some(factors), .. }) => {
                factors.chunk = offset;
                head_dim * factors.rank * HALF_BYTES
            }
            _ => 0,
        }
    }
}

/// The bytes of one page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PageLayout {
    /// The keys.
    pub keys: SideLayout,
    /// The values.
    pub values: SideLayout,
    /// Bytes of the keys of a whole page, parameters included.
    pub key_bytes: usize,
    /// Bytes of the values of a whole page, parameters included.
    pub value_bytes: usize,
    /// Places of tokens that the page protects, behind the values.
    pub sinks: Option<PageSinks>,
    /// Bytes of what a chunk of pages shares; it lies in the chunk's first page.
    pub chunk_bytes: usize,
    /// Bytes of the page: all of the above, keys and the rest each rounded up to a multiple of 64. Pages of the KV heads of
    /// a layer differ where their channels have planes by calibration.
    pub bytes: usize,
    /// Offset of the page from the layer's first one.
    pub offset: usize,
}

impl PageLayout {
    fn new(
        keys: Side,
        values: Side,
        head_dim: usize,
        planes: [Option<&[u8]>; 2],
        auto: Option<AutoSinks>,
    ) -> Result<Self, (String, String)> {
        let mut keys = SideLayout::new(keys, true, head_dim, 0, planes[0])?;
        let key_bytes = keys.bytes(head_dim);
        let start = key_bytes.next_multiple_of(ALIGNMENT);
        let mut values = SideLayout::new(values, false, head_dim, start, planes[1])?;
        let value_bytes = values.bytes(head_dim);
        let mut end = start + value_bytes;
        let sinks = auto.map(|auto| PageSinks::new(auto, head_dim, end.next_multiple_of(HALF_BYTES)));
        if let Some(sinks) = &sinks {
            end = sinks.end();
        }
        let mut chunk_bytes = keys.place_chunk(head_dim, end);
        chunk_bytes += values.place_chunk(head_dim, end + chunk_bytes);
        let bytes = (end + chunk_bytes).next_multiple_of(ALIGNMENT);
        Ok(PageLayout { keys, values, key_bytes, value_bytes, sinks, chunk_bytes, bytes, offset: 0 })
    }
}

/// One layer of the cache.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerLayout {
    /// One page of each KV head. They differ where channels have planes by calibration.
    pub pages: Vec<PageLayout>,
    /// Number of the layer's group.
    pub group: usize,
    /// Offset of the layer's first page in a block of that group.
    pub offset: usize,
    /// What happens to keys before they are stored.
    pub keys: Transform,
    /// What happens to values before they are stored.
    pub values: Transform,
    /// Whether values come as they are stored, and outputs are taken in their frame: the projections do the transform.
    pub values_fused: bool,
    /// Adjacent KV heads whose keys are rotated together before RoPE.
    pub rotated_heads: usize,
    /// Adjacent KV heads that can only be read together: those that share a rotation or a permutation.
    pub frame: usize,
    /// The linear correction, where the scheme has one, trained or not.
    pub linear: Option<Linear>,
    /// States of the linear correction, where adapters are there.
    pub states: Option<StateLayout>,
    /// Whether the bias of rounding is taken from logits.
    pub bias: bool,
    /// How many tokens a query sees, itself included; `None` for all before it.
    pub span: Option<usize>,
}

impl LayerLayout {
    pub(crate) fn new(
        (keys, values): (Side, Side),
        correction: Correction,
        shape: CacheShape,
        sinks: Sinks,
        calibration: Option<&LayerCalibration>,
        fuses_values: bool,
    ) -> Result<Self, (String, String)> {
        let heads = shape.num_key_value_heads;
        let (mut rotated_heads, mut frame) = (1, 1);
        let order = |what: &str, order: usize| {
            Hadamard::new(order).map(drop).map_err(|error| (format!("{what} of order {order}"), error.to_string()))
        };
        match keys.transform() {
            Transform::PreRope(PreRope { heads: wanted, permutation, .. }) => {
                while rotated_heads * 2 <= wanted && heads.is_multiple_of(rotated_heads * 2) {
                    rotated_heads *= 2;
                }
                if wanted > 0 {
                    order("keys rotated by a Hadamard matrix", rotated_heads * shape.head_dim)?;
                }
                frame = if permutation == Permutation::Global { heads } else { rotated_heads };
            }
            Transform::Hadamard => order("keys.transform = \"hadamard\"", shape.head_dim)?,
            _ => {}
        }
        if values.transform() == Transform::Hadamard {
            order("values.transform = \"hadamard\"", shape.head_dim)?;
        }
        // What is no calibration of this model is refused with the tables.
        let planes = calibration.map(|own| [&own.key_planes, &own.value_planes]).unwrap_or([&None, &None]);
        let planes = planes.map(|own| own.as_ref().filter(|own| own.len() == heads * shape.head_dim));
        // Tokens of a layer in 16 bit need no places.
        let packed = (keys, values) != (Side::Half, Side::Half);
        let auto = match sinks {
            Sinks::Auto(auto) if packed => {
                let will_be_known = calibration.is_none() && [keys, values].into_iter().any(Side::is_calibrated);
                let places = match calibration.and_then(|own| own.sink_places) {
                    Some(places) => usize::from(places),
                    None if will_be_known => auto.places.min(AutoSinks::PLANNED),
                    None => auto.places,
                };
                (places > 0).then_some(AutoSinks { places, ..auto })
            }
            _ => None,
        };
        let page = |head: usize| {
            let own = head * shape.head_dim..(head + 1) * shape.head_dim;
            let planes = planes.map(|planes| planes.map(|planes| &planes[own.clone()]));
            PageLayout::new(keys, values, shape.head_dim, planes, auto)
        };
        let mut pages: Vec<PageLayout> = (0..heads).map(page).collect::<Result<_, _>>()?;
        let mut end = 0;
        for page in &mut pages {
            page.offset = end;
            end += page.bytes;
        }
        let adapters = calibration.and_then(|own| own.adapters.as_ref());
        let states = correction.linear.zip(adapters).and_then(|(linear, own)| StateLayout::new(linear, own, shape));
        Ok(LayerLayout {
            pages,
            group: 0,
            offset: 0,
            keys: keys.transform(),
            values: values.transform(),
            values_fused: fuses_values && matches!(values.transform(), Transform::Hadamard | Transform::Basis),
            rotated_heads,
            frame,
            linear: correction.linear,
            states,
            bias: correction.bias,
            span: None,
        })
    }

    /// Whether its pages protect tokens.
    pub fn protects_in_pages(&self) -> bool {
        self.pages.iter().any(|page| page.sinks.is_some())
    }

    /// The first token that a token at this position sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.span.map_or(0, |span| (position + 1).saturating_sub(span))
    }

    /// Whether values are stored in another frame than their own.
    pub(crate) fn transforms_values(&self) -> bool {
        matches!(self.values, Transform::Hadamard | Transform::Basis)
    }

    /// Bytes of the pages of all KV heads.
    pub fn bytes(&self) -> usize {
        self.pages.last().map_or(0, |page| page.offset + page.bytes)
    }
}
