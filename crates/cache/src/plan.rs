//! Planning: what a scheme is in a model, and how many bytes it takes.

use crate::group::{Group, Leaving, groups};
use crate::shape::{CacheModel, CacheShape};
use crate::{
    CalibratedScheme, Calibration, Correction, HALF_BYTES, LayerLayout, PAGE_TOKENS, Scheme, SchemeError, Sees, Side,
    Sinks, Transform, Window,
};

/// Where every byte of a cache lies, and how many there are: a scheme compiled for a model, without the numbers that
/// transforms need. It can be planned with, but holds nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct CachePlan {
    /// The model's side of it.
    pub shape: CacheShape,
    /// Every layer, for tokens without a class.
    pub layers: Vec<LayerLayout>,
    /// Every layer for the tokens of each class, from class 1 on. A block holds tokens of one class.
    pub classes: Vec<Vec<LayerLayout>>,
    /// Layers by their block tables. Where tokens have classes, all are one group.
    pub groups: Vec<Group>,
    /// The window of recent tokens.
    pub window: Window,
    /// Other tokens in 16 bit.
    pub sinks: Sinks,
    /// What the tokens of a pass see of each other.
    pub sees: Sees,
    block_bytes: usize,
    state_bytes: usize,
    name: String,
    pub(crate) origin: String,
}

impl CachePlan {
    /// Compiles a scheme for a model.
    ///
    /// # Errors
    /// [`SchemeError::Unsupported`] where the scheme does not suit the model's shape: a Hadamard matrix of an order that is
    /// no multiple of 8, or fewer layers than it names.
    pub fn new(scheme: &Scheme, calibration: Option<&Calibration>, model: &CacheModel) -> Result<Self, SchemeError> {
        let shape = model.shape;
        let error = |(problem, supported)| SchemeError::Unsupported { name: scheme.origin.clone(), problem, supported };
        if let Some(own) = scheme.overrides().find(|own| own.layers.end > shape.num_layers) {
            return Err(error((
                format!("layers {}..{} of a model with {}", own.layers.start, own.layers.end, shape.num_layers),
                format!("ranges within 0..{}", shape.num_layers),
            )));
        }
        let mut classes = Vec::new();
        for class in 0..=scheme.classes.len() {
            let mut layers = Vec::with_capacity(shape.num_layers);
            for layer in 0..shape.num_layers {
                let own = calibration.and_then(|own| own.layers.get(layer));
                let fuses = model.fuses_values.get(layer).copied().unwrap_or(false);
                let span = model.spans.get(layer).copied().flatten();
                let mut correction = if class == 0 { scheme.correction(layer) } else { Correction::NONE };
                // States of tokens cannot be taken out of a sum again.
                correction.linear = correction.linear.filter(|_| span.is_none());
                let sides = scheme.sides(class, layer);
                if let Some(problem) = problem(sides, span, !scheme.classes.is_empty(), model.turns_alike) {
                    return Err(error(problem));
                }
                let mut layer = LayerLayout::new(sides, correction, shape, scheme.sinks, own, fuses).map_err(error)?;
                layer.span = span;
                layers.push(layer);
            }
            classes.push(layers);
        }
        let groups = groups(&classes[0]);
        // Blocks are of one size, that of the largest group and class.
        let mut block_bytes = 0;
        for layers in &mut classes {
            for (number, group) in groups.iter().enumerate() {
                let mut bytes = 0;
                for layer in &group.layers {
                    let own = &mut layers[*layer];
                    (own.group, own.offset) = (number, bytes);
                    bytes += own.bytes();
                }
                block_bytes = block_bytes.max(bytes);
            }
        }
        let mut layers = classes.remove(0);
        let mut state_bytes = 0;
        for states in layers.iter_mut().filter_map(|layer| layer.states.as_mut()) {
            states.offset = state_bytes;
            state_bytes += states.bytes();
        }
        Ok(CachePlan {
            shape,
            layers,
            classes,
            groups,
            window: scheme.window,
            sinks: scheme.sinks,
            sees: scheme.sees,
            block_bytes,
            state_bytes,
            name: scheme.name.clone(),
            origin: scheme.origin.clone(),
        })
    }

    /// Name of the scheme.
    pub fn scheme_name(&self) -> &str {
        &self.name
    }

    /// Bytes of a block: 128 tokens of every layer of a group and KV head.
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
        self.group_blocks(len).sum::<usize>() + self.classes.len()
    }

    /// Blocks of each group that a sequence of `len` tokens without classes needs.
    pub fn group_blocks(&self, len: usize) -> impl Iterator<Item = usize> {
        self.groups.iter().map(move |group| group.blocks(self.window, len))
    }

    /// Bytes that a token adds to pages of a long sequence: those of layers that see all tokens before them.
    pub fn token_bytes(&self) -> f64 {
        let grows = self.groups.iter().filter(|group| group.span.is_none()).count();
        (grows * self.block_bytes()) as f64 / PAGE_TOKENS as f64
    }

    /// How many layers see no more than so many tokens, by rising numbers of tokens: `(tokens, layers)`.
    pub fn spans(&self) -> Vec<(usize, usize)> {
        let mut all: Vec<(usize, usize)> = Vec::new();
        for span in self.layers.iter().filter_map(|layer| layer.span) {
            match all.iter_mut().find(|own| own.0 == span) {
                Some(own) => own.1 += 1,
                None => all.push((span, 1)),
            }
        }
        all.sort_unstable();
        all
    }

    /// What enters the pages of a layer of the tokens that leave the window, once a sequence has `len` tokens.
    pub fn leaving(&self, layer: usize, len: usize) -> Leaving {
        let LayerLayout { group, span, .. } = self.layers[layer];
        Leaving { window: self.window, group, kept: span.map_or(0, |span| len.saturating_sub(span)) }
    }

    /// Bytes allocated for one sequence of `len` tokens.
    pub fn planned_bytes(&self, len: usize) -> usize {
        self.allocated_bytes(self.blocks(len))
    }
}

/// What of a layer's scheme does not suit the model, and what would.
fn problem(
    (keys, values): (Side, Side),
    span: Option<usize>,
    has_classes: bool,
    turns_alike: bool,
) -> Option<(String, String)> {
    let has_factors = |side: Side| matches!(side, Side::Packed(own) if own.low_rank > 0);
    let problem = |what: &str, instead: &str| Some((what.to_owned(), instead.to_owned()));
    if matches!(keys.transform(), Transform::PreRope(_)) && !turns_alike {
        return problem("keys before RoPE of a model whose layers turn them differently", "position = \"post-rope\"");
    }
    let span = span?;
    if has_factors(keys) || has_factors(values) {
        let what = format!("low-rank factors of pages in a layer that sees {span} tokens, which leave one by one");
        return problem(&what, "schemes without low_rank");
    }
    if has_classes {
        let what = format!("tokens by classes in a layer that sees {span} tokens");
        return problem(&what, "schemes without classes");
    }
    None
}

impl Scheme {
    /// The scheme in a model, without a calibration, as far as planning goes.
    ///
    /// # Errors
    /// Those of [`CachePlan::new`].
    pub fn plan(&self, model: &CacheModel) -> Result<CachePlan, SchemeError> {
        CachePlan::new(self, None, model)
    }
}

impl CalibratedScheme {
    /// Its cache in a model, as far as planning goes.
    ///
    /// # Errors
    /// Those of [`CachePlan::new`].
    pub fn plan(&self, model: &CacheModel) -> Result<CachePlan, SchemeError> {
        CachePlan::new(&self.scheme, self.calibration.as_deref(), model)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SideLayout;

    fn layout(scheme: &str, head_dim: usize) -> CachePlan {
        let shape = CacheShape { num_layers: 3, num_key_value_heads: 2, head_dim };
        Scheme::load(scheme).unwrap().plan(&CacheModel::of_shape(shape)).unwrap()
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
        let error = Scheme::load("kvlinc").unwrap().plan(&CacheModel::of_shape(shape)).unwrap_err().to_string();
        assert!(error.contains("order 76") && error.contains("20*2^k"), "{error}");
    }

    #[test]
    fn heads_are_rotated_together_as_far_as_they_go() {
        for (heads, rotated) in [(8, 4), (4, 4), (2, 2), (3, 1), (6, 2), (1, 1)] {
            let shape = CacheShape { num_layers: 1, num_key_value_heads: heads, head_dim: 64 };
            let layer =
                |name: &str| Scheme::load(name).unwrap().plan(&CacheModel::of_shape(shape)).unwrap().layers[0].clone();
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
        let layout = scheme.plan(&CacheModel::of_shape(shape)).unwrap();
        let strides: Vec<usize> = layout.layers.iter().map(|layer| layer.pages[1].offset).collect();
        assert_eq!(strides, [128 * 64 + 512 + 32768, 9216, 9216]);
        assert_eq!(layout.layers[2].offset, 2 * (strides[0] + strides[1]));
        assert_eq!(layout.page_offset(0, 1, 1, 1), layout.block_bytes() + 2 * strides[0] + strides[1]);
        let shape = CacheShape { num_layers: 0, ..shape };
        assert!(
            scheme
                .plan(&CacheModel::of_shape(shape))
                .unwrap_err()
                .to_string()
                .contains("layers 0..1 of a model with 0")
        );
    }
}
