//! Where every byte of a cache lies.
//!
//! A **page** holds 128 token slots of one (layer, KV head). Pages of all layers and KV heads for the
//! same 128 tokens form a **block**, the unit that the pool hands out, so that one block table serves
//! the whole model. Order within a block: layer, then KV head.

use crate::page_sinks::PageSinks;
use crate::{
    AutoSinks, Calibration, Correction, LayerCalibration, Linear, PackedSide, Scheme, SchemeError, Side, Sinks,
};
use crate::{PAGE_TOKENS, Permutation, PreRope, Sees};
use crate::{StateLayout, Tables, Transform, Window};
use dibit_quant::Hadamard;
use std::sync::Arc;

pub(crate) const HALF_BYTES: usize = 2;

/// Bytes to a multiple of which pages, and the values in them, begin.
const ALIGNMENT: usize = 64;

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
    /// Keys, or values, of one token in a layer, in scalars: `KV heads * head_dim`.
    pub fn row(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }

    /// Keys and values of one token, in scalars: `2 * layers * KV heads * head_dim`.
    pub fn scalars_per_token(&self) -> usize {
        2 * self.num_layers * self.num_key_value_heads * self.head_dim
    }
}

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
    /// Offset of the layer's first page in a block.
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
}

impl LayerLayout {
    fn new(
        (keys, values): (Side, Side),
        correction: Correction,
        shape: CacheShape,
        offset: usize,
        sinks: Sinks,
        calibration: Option<&LayerCalibration>,
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
        // Where nothing is known of a layer, its pages have places. Tokens of a layer in 16 bit need none.
        let packed = (keys, values) != (Side::Half, Side::Half);
        let auto = match sinks {
            Sinks::Auto(auto) if packed && calibration.is_none_or(|own| own.sink_places != Some(false)) => Some(auto),
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
            offset,
            keys: keys.transform(),
            values: values.transform(),
            values_fused: false,
            rotated_heads,
            frame,
            linear: correction.linear,
            states,
            bias: correction.bias,
        })
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

/// The layout of a whole cache: a scheme compiled for a model.
#[derive(Debug, Clone, PartialEq)]
pub struct CacheLayout {
    /// The model's side of it.
    pub shape: CacheShape,
    /// Every layer, for tokens without a class.
    pub layers: Vec<LayerLayout>,
    /// Every layer for the tokens of each class, from class 1 on. A block holds tokens of one class.
    pub classes: Vec<Vec<LayerLayout>>,
    /// The window of recent tokens.
    pub window: Window,
    /// Other tokens in 16 bit.
    pub sinks: Sinks,
    /// What the tokens of a pass see of each other.
    pub sees: Sees,
    block_bytes: usize,
    state_bytes: usize,
    calibration: Option<Arc<Calibration>>,
    tables: Option<Arc<Tables>>,
    name: String,
    pub(crate) origin: String,
}

impl CacheLayout {
    /// Compiles a scheme for a model.
    ///
    /// # Errors
    /// [`SchemeError::Unsupported`] where the scheme does not suit the model's shape: a Hadamard matrix of an order that is
    /// no multiple of 8, or fewer layers than it names.
    pub fn new(scheme: &Scheme, shape: CacheShape) -> Result<Self, SchemeError> {
        let error = |(problem, supported)| SchemeError::Unsupported { name: scheme.origin.clone(), problem, supported };
        if let Some(own) = scheme.overrides().find(|own| own.layers.end > shape.num_layers) {
            return Err(error((
                format!("layers {}..{} of a model with {}", own.layers.start, own.layers.end, shape.num_layers),
                format!("ranges within 0..{}", shape.num_layers),
            )));
        }
        // Blocks are of one size, that of the largest class.
        let mut block_bytes = 0;
        let mut classes = Vec::new();
        for class in 0..=scheme.classes.len() {
            let mut layers = Vec::with_capacity(shape.num_layers);
            let mut bytes = 0;
            for layer in 0..shape.num_layers {
                let own = scheme.calibration.as_ref().and_then(|own| own.layers.get(layer));
                let correction = if class == 0 { scheme.correction(layer) } else { Correction::NONE };
                let sides = scheme.sides(class, layer);
                let layer = LayerLayout::new(sides, correction, shape, bytes, scheme.sinks, own).map_err(error)?;
                bytes += layer.bytes();
                layers.push(layer);
            }
            block_bytes = block_bytes.max(bytes);
            classes.push(layers);
        }
        let mut layers = classes.remove(0);
        let mut state_bytes = 0;
        for states in layers.iter_mut().filter_map(|layer| layer.states.as_mut()) {
            states.offset = state_bytes;
            state_bytes += states.bytes();
        }
        Ok(CacheLayout {
            shape,
            layers,
            classes,
            window: scheme.window,
            sinks: scheme.sinks,
            sees: scheme.sees,
            block_bytes,
            state_bytes,
            calibration: scheme.calibration.clone(),
            tables: None,
            name: scheme.name.clone(),
            origin: scheme.origin.clone(),
        })
    }

    /// The layout with the numbers that its transforms need: the model's rotary frequencies, `head_dim / 2`, and the
    /// scheme's calibration. A layout without them can be planned with, but holds nothing.
    ///
    /// # Errors
    /// [`SchemeError::Uncalibrated`], [`SchemeError::Calibration`].
    pub fn with_tables(mut self, inv_freq: Vec<f32>) -> Result<Self, SchemeError> {
        self.tables = Some(Arc::new(Tables::new(&self, inv_freq, self.calibration.clone())?));
        Ok(self)
    }

    /// The numbers that transforms need, where they have been given.
    pub fn tables(&self) -> Option<&Arc<Tables>> {
        self.tables.as_ref()
    }

    /// Name of the scheme.
    pub fn scheme_name(&self) -> &str {
        &self.name
    }

    /// Bytes of a block: 128 tokens of every layer and KV head.
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Bits of a scalar in a page of tokens without a class: codes, scales and everything else that lies there, the average
    /// over the model.
    pub fn packed_bits(&self) -> f64 {
        let bytes: usize = self.layers.iter().map(LayerLayout::bytes).sum();
        bytes as f64 * 8.0 / (PAGE_TOKENS * self.shape.scalars_per_token()) as f64
    }

    /// A layer for the tokens of a class; 0 is that of tokens without one.
    pub fn layer(&self, class: usize, layer: usize) -> &LayerLayout {
        match class.checked_sub(1) {
            Some(index) => &self.classes[index][layer],
            None => &self.layers[layer],
        }
    }

    /// Offset in the arena of a page of a block that holds tokens of this class.
    pub fn page_offset(&self, class: usize, block: u32, layer: usize, kv_head: usize) -> usize {
        let own = self.layer(class, layer);
        block as usize * self.block_bytes + own.offset + own.pages[kv_head].offset
    }

    /// Bytes of one fp16 row of every layer and KV head.
    fn row_bytes(&self) -> usize {
        self.shape.scalars_per_token() / 2 * HALF_BYTES
    }

    /// Bytes of the window rings of one sequence.
    pub fn window_bytes(&self) -> usize {
        self.row_bytes() * (self.window.key_slots() + self.window.value_slots())
    }

    /// Bytes of the sinks of one sequence, keys, values and positions.
    pub fn sink_bytes(&self) -> usize {
        self.sinks.capacity() * (2 * self.row_bytes() + self.shape.num_layers * size_of::<u32>())
    }

    /// Bytes that a chunk of pages shares, in all layers and KV heads.
    pub fn chunk_bytes(&self) -> usize {
        self.layers.iter().flat_map(|layer| &layer.pages).map(|page| page.chunk_bytes).sum()
    }

    /// Bytes of the states of the linear correction of one sequence, from its first packed token on.
    pub fn state_bytes(&self) -> usize {
        self.state_bytes
    }

    /// Bytes allocated for one sequence that holds `blocks` blocks: these, its rings and sinks, its block table, and its
    /// states once it has a block.
    pub fn allocated_bytes(&self, blocks: usize) -> usize {
        let states = if blocks > 0 { self.state_bytes() } else { 0 };
        blocks * (self.block_bytes() + size_of::<u32>()) + self.window_bytes() + self.sink_bytes() + states
    }

    /// Blocks that a sequence of `len` tokens may need: each class ends in a block of its own.
    pub fn blocks(&self, len: usize) -> usize {
        self.window.blocks(len) + self.classes.len()
    }

    /// Bytes allocated for one sequence of `len` tokens.
    pub fn planned_bytes(&self, len: usize) -> usize {
        self.allocated_bytes(self.blocks(len))
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
        let page = layout("kvlinc", 128).layers[0].pages[0];
        assert_eq!((page.key_bytes, page.value_bytes, page.bytes), (4608, 4608, 9216));
        assert_eq!(layout("kivi", 128).packed_bits(), 2.25);
        assert_eq!(layout("fp16", 128).layers[1].pages[0].bytes, 65536);
    }

    #[test]
    fn sections_follow_each_other_without_overlap() {
        for head_dim in (8..=256).step_by(8) {
            for name in ["kivi", "kvlinc"] {
                let page = layout(name, head_dim).layers[2].pages[0];
                let (SideLayout::Packed(keys), SideLayout::Packed(values)) = (page.keys, page.values) else {
                    panic!("{name} packs both sides")
                };
                assert_eq!(keys.codes, 0);
                assert_eq!(keys.scales, head_dim * 32);
                assert_eq!(keys.zeros - keys.scales, keys.num_scales() * 2);
                assert_eq!(values.codes, (keys.zeros + keys.num_scales() * 2).next_multiple_of(64));
                assert_eq!(values.scales - values.codes, 128 * head_dim / 4, "head_dim {head_dim}");
                assert_eq!(values.group, head_dim.min(128));
                assert_eq!(values.codes + page.value_bytes, values.zeros + values.num_scales() * 2);
                for offset in [keys.scales, keys.zeros, values.codes, values.scales, values.zeros] {
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
                    offsets.push(layout.page_offset(0, block, layer, head));
                }
            }
        }
        for (i, offset) in offsets.iter().enumerate() {
            assert_eq!(*offset, i * layout.layers[0].pages[0].bytes);
        }
        assert_eq!(layout.block_bytes(), 6 * layout.layers[0].pages[0].bytes);
    }

    #[test]
    fn a_rotation_needs_a_matrix() {
        let shape = CacheShape { num_layers: 1, num_key_value_heads: 1, head_dim: 76 };
        let error = CacheLayout::new(&Scheme::load("kvlinc").unwrap(), shape).unwrap_err().to_string();
        assert!(error.contains("order 76") && error.contains("20*2^k"), "{error}");
    }

    #[test]
    fn heads_are_rotated_together_as_far_as_they_go() {
        for (heads, rotated) in [(8, 4), (4, 4), (2, 2), (3, 1), (6, 2), (1, 1)] {
            let shape = CacheShape { num_layers: 1, num_key_value_heads: heads, head_dim: 64 };
            let layer = |name: &str| CacheLayout::new(&Scheme::load(name).unwrap(), shape).unwrap().layers[0].clone();
            let (local, global) = (layer("rotatekv"), layer("rotatekv-paper"));
            assert_eq!((local.rotated_heads, local.frame), (rotated, rotated), "{heads} heads");
            assert_eq!((global.rotated_heads, global.frame), (rotated, heads));
        }
    }

    #[test]
    fn layers_may_differ() {
        let text = "name = \"mixed\"\n[keys]\nbits = 2\n[values]\nbits = 2\n[window]\ntokens = 128\n\
            schedule = \"guaranteed\"\n[layers.0]\nkeys = { bits = 4 }\nvalues = { bits = 16 }\n";
        let scheme = Scheme::parse(text, "mixed").unwrap();
        let shape = CacheShape { num_layers: 3, num_key_value_heads: 2, head_dim: 128 };
        let layout = CacheLayout::new(&scheme, shape).unwrap();
        let strides: Vec<usize> = layout.layers.iter().map(|layer| layer.pages[1].offset).collect();
        assert_eq!(strides, [128 * 64 + 512 + 32768, 9216, 9216]);
        assert_eq!(layout.layers[2].offset, 2 * (strides[0] + strides[1]));
        assert_eq!(layout.page_offset(0, 1, 1, 1), layout.block_bytes() + 2 * strides[0] + strides[1]);
        let shape = CacheShape { num_layers: 0, ..shape };
        assert!(CacheLayout::new(&scheme, shape).unwrap_err().to_string().contains("layers 0..1 of a model with 0"));
    }
}
