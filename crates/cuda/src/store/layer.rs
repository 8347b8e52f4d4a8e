//! What a layer does to keys, queries and values, on a GPU.

use super::rotation::Rotation;
use crate::CudaError;
use crate::abi;
use crate::gpu::Gpu;
use crate::memory::Memory;
use bytemuck::Zeroable;
use dibit_cache::{
    CacheLayout, CodingOrder, FeatureMaps, HeadTransform, PAGE_TOKENS, Powers, PreRopeTransform, StateType,
};
use dibit_device::DeviceError;
use std::sync::Arc;

/// One layer.
pub(crate) struct Layer {
    /// Page layouts of each class.
    pub pages: Vec<Memory>,
    /// [`abi::ClassPages`] of each class.
    pub classes: Memory,
    /// Rotation of keys and queries after RoPE.
    pub keys: Rotation,
    /// Transform of values, taken back from outputs, where the weights do not do it.
    pub values: Rotation,
    pub pre_rope: Option<PreRopeKeys>,
    /// Key channels in the order in which pages hold them, `[kv head][head_dim]`.
    pub order: Option<Memory>,
    feedback: Option<Feedback>,
    value_frame: Option<Memory>,
    pub factors: Factors,
    pub correction: Option<Correction>,
}

/// What KV heads are multiplied by on their way into the cache, `[kv head]`, and what takes that back.
pub(crate) struct Factors {
    /// Of keys, of values, of queries and of outputs; empty where all are 1.
    sides: [Memory; 4],
}

/// Error feedback of keys.
struct Feedback {
    /// Number in storage of each channel, in the order of coding, `[kv head][head_dim]`.
    places: Memory,
    factors: Memory,
}

/// Keys that are stored before RoPE.
pub(crate) struct PreRopeKeys {
    heads: usize,
    rotation: Rotation,
    channels: Memory,
    places: Memory,
    tokens: Memory,
    pages: Memory,
}

/// Adapters of the linear correction.
pub(crate) struct Correction {
    pub features: usize,
    shared: usize,
    query: Memory,
    key: Memory,
    gates: Memory,
    places: Memory,
}

impl Layer {
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        layout: &CacheLayout,
        index: usize,
        num_blocks: usize,
    ) -> Result<Self, DeviceError> {
        let d = layout.shape.head_dim;
        let own = layout.transforms(index);
        let rotation = |own: &Option<_>| Rotation::new(gpu, d, own.as_ref());
        let pre_rope = own.pre_rope.map(|own| PreRopeKeys::new(gpu, d, own, num_blocks)).transpose()?;
        let order = own.order.map(|order| {
            let channels: Vec<i32> = order.iter().flatten().map(|channel| *channel as i32).collect();
            Memory::of(gpu, "an order of channels", &channels)
        });
        let states = layout.layers[index].states.as_ref();
        let correction = own.adapters.zip(states).map(|(maps, states)| Correction::new(gpu, &maps, &states.places));
        let page_layouts = |class: usize| -> Result<Memory, CudaError> {
            let pages: Vec<abi::Page> = layout.layer(class, index).pages.iter().map(abi::Page::from).collect();
            Memory::of(gpu, "page layouts", &pages)
        };
        let pages = (0..=layout.classes.len()).map(page_layouts).collect::<Result<Vec<_>, _>>()?;
        let class_pages = |(class, pages): (usize, &Memory)| {
            let own = layout.layer(class, index);
            abi::ClassPages { pages: pages.at(0), offset: own.offset as i64 }
        };
        let classes: Vec<abi::ClassPages> = pages.iter().enumerate().map(class_pages).collect();
        let classes = Memory::of(gpu, "page layouts", &classes)?;
        Ok(Layer {
            pages,
            classes,
            keys: rotation(&own.keys)?,
            values: rotation(&own.values)?,
            pre_rope,
            order: order.transpose()?,
            feedback: own.feedback.map(|own| Feedback::new(gpu, &own)).transpose()?,
            value_frame: own.value_frame.map(|own| Memory::of(gpu, "a basis", &own)).transpose()?,
            factors: Factors::new(gpu, &Powers::default())?,
            correction: correction.transpose()?,
        })
    }

    pub(super) fn feedback(&self) -> abi::Feedback {
        self.feedback.as_ref().map_or(abi::Feedback::zeroed(), |own| abi::Feedback {
            places: own.places.at(0),
            factors: own.factors.at(0),
        })
    }

    /// The way back from stored values to the model's own frame; null where it is not needed.
    pub(super) fn value_frame(&self) -> u64 {
        self.value_frame.as_ref().map_or(0, |own| own.at(0))
    }

    pub(crate) fn pre_rope(&self) -> abi::PreRope {
        self.pre_rope.as_ref().map_or(abi::PreRope::zeroed(), |own| abi::PreRope {
            enabled: 1,
            heads: own.heads as i32,
            rotation: own.rotation.for_kernels(),
            channels: own.channels.at(0),
            places: own.places.at(0),
            tokens: own.tokens.at(0),
            pages: own.pages.at(0),
        })
    }
}

impl Factors {
    pub(crate) fn new(gpu: &Arc<Gpu>, powers: &Powers) -> Result<Self, CudaError> {
        let of = |keys: bool, back: bool| {
            let factor = |kv_head| powers.factor(keys, kv_head);
            let factors = (0..powers.exponents(keys).len()).map(factor).map(|x| if back { 1.0 / x } else { x });
            Memory::of(gpu, "powers of two", &factors.collect::<Vec<f32>>())
        };
        Ok(Factors { sides: [of(true, false)?, of(false, false)?, of(true, true)?, of(false, true)?] })
    }

    fn at(&self, side: usize) -> u64 {
        let own = &self.sides[side];
        if own.bytes() == 0 { 0 } else { own.at(0) }
    }

    /// Those of keys, and of values; null where all are 1.
    pub(super) fn stored(&self) -> [u64; 2] {
        [self.at(0), self.at(1)]
    }

    /// Those of queries; null where all are 1.
    pub(crate) fn queries(&self) -> u64 {
        self.at(2)
    }

    /// Those of outputs; null where all are 1.
    pub(crate) fn outputs(&self) -> u64 {
        self.at(3)
    }
}

impl Feedback {
    fn new(gpu: &Arc<Gpu>, own: &CodingOrder) -> Result<Self, CudaError> {
        let places: Vec<i32> = own.places.iter().map(|place| *place as i32).collect();
        Ok(Feedback {
            places: Memory::of(gpu, "error feedback", &places)?,
            factors: Memory::of(gpu, "error feedback", &own.factors)?,
        })
    }
}

impl PreRopeKeys {
    fn new(gpu: &Arc<Gpu>, head_dim: usize, own: PreRopeTransform, num_blocks: usize) -> Result<Self, CudaError> {
        let PreRopeTransform { heads, hadamard, channels, inv_freq } = own;
        let mut places = vec![0u32; channels.len()];
        for (place, channel) in channels.iter().enumerate() {
            places[*channel as usize] = place as u32;
        }
        let rotation = Rotation::new(gpu, heads * head_dim, hadamard.map(HeadTransform::Hadamard).as_ref())?;
        let angles = |position: usize| {
            let angle = move |frequency: &f32| f64::from(*frequency) * position as f64;
            inv_freq.iter().map(angle).flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
        };
        let tokens: Vec<f32> = (0..PAGE_TOKENS).flat_map(angles).collect();
        let pages: Vec<f32> = (0..num_blocks).flat_map(|page| angles(page * PAGE_TOKENS)).collect();
        Ok(PreRopeKeys {
            heads,
            rotation,
            channels: Memory::of(gpu, "an order of channels", &channels)?,
            places: Memory::of(gpu, "an order of channels", &places)?,
            tokens: Memory::of(gpu, "rotary angles", &tokens)?,
            pages: Memory::of(gpu, "rotary angles", &pages)?,
        })
    }

    /// Heads that are rotated together.
    pub(super) fn heads(&self) -> usize {
        self.heads
    }
}

impl Correction {
    fn new(gpu: &Arc<Gpu>, maps: &FeatureMaps, places: &[Option<usize>]) -> Result<Self, CudaError> {
        let places: Vec<i32> = places.iter().map(|place| place.map_or(-1, |at| at as i32)).collect();
        Ok(Correction {
            features: maps.features,
            shared: maps.shared,
            query: Memory::of(gpu, "adapters", &maps.query)?,
            key: Memory::of(gpu, "adapters", &maps.key)?,
            gates: Memory::of(gpu, "adapters", &maps.gates)?,
            places: Memory::of(gpu, "adapters", &places)?,
        })
    }

    pub(super) fn for_kernels(
        &self,
        layout: &CacheLayout,
        layer: usize,
        states: &Memory,
        missed: &Memory,
    ) -> abi::Correction {
        let own = layout.layers[layer].states.as_ref().expect("the states of a correction");
        abi::Correction {
            features: self.features as i32,
            shared: self.shared as i32,
            query_maps: self.query.at(0),
            key_maps: self.key.at(0),
            gates: self.gates.at(0),
            states: states.at(0),
            sequence_bytes: layout.state_bytes() as i64,
            head_bytes: own.head_bytes() as i64,
            offset: own.offset as i64,
            half: (own.states == StateType::Fp16).into(),
            padding: 0,
            places: self.places.at(0),
            missed: missed.at(0),
        }
    }
}
