//! What a layer does to keys, queries and values, on a GPU.

use super::feedback::Feedback;
use super::rotation::Rotation;
use crate::CudaError;
use crate::abi;
use crate::gpu::Gpu;
use crate::memory::Memory;
use bytemuck::Zeroable;
use dibit_cache::{
    CacheLayout, LayerLayout, PAGE_TOKENS, Permutation, Planes, PreRope, SideLayout, StateType, Transform,
    ValueTransform,
};
use dibit_device::DeviceError;
use dibit_device::host::FeatureMaps;
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
    pub correction: Option<Correction>,
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
    pub(super) fn new(
        gpu: &Arc<Gpu>,
        layout: &CacheLayout,
        index: usize,
        num_blocks: usize,
    ) -> Result<Self, DeviceError> {
        let own = &layout.layers[index];
        let shape = layout.shape;
        let missing = || DeviceError::Tables(layout.scheme_name().to_owned());
        let tables = layout.tables();
        let calibration = tables.and_then(|tables| tables.layer(index));
        let hadamard = || -> Result<_, DeviceError> { Rotation::hadamard(gpu, shape.head_dim)?.map_err(|_| missing()) };
        let keys = match own.keys {
            Transform::Hadamard => hadamard()?,
            Transform::Basis => {
                let basis = tables.and_then(|tables| tables.key_basis(index)).ok_or_else(missing)?;
                Rotation::basis(gpu, shape.head_dim, &basis)?
            }
            _ => Rotation::None,
        };
        // Without tables it would be taken for values as they are.
        if own.values == Transform::Basis && tables.and_then(|tables| tables.value_basis(index)).is_none() {
            return Err(missing());
        }
        let values = match layout.online_values(index) {
            Some(ValueTransform::Hadamard) => hadamard()?,
            Some(ValueTransform::Basis(basis)) => Rotation::basis(gpu, shape.head_dim, &basis)?,
            None => Rotation::None,
        };
        let pre_rope = match own.keys {
            Transform::PreRope(choice) => Some(PreRopeKeys::new(gpu, layout, own, choice, index, num_blocks)?),
            _ => None,
        };
        let has_planes = |side: SideLayout| matches!(side, SideLayout::Packed(side) if side.planes.is_some());
        let order = match own.pages.iter().any(|page| has_planes(page.keys)) {
            true => {
                let counts = calibration.and_then(|own| own.key_planes.as_ref()).ok_or_else(missing)?;
                let heads = counts.chunks_exact(shape.head_dim).flat_map(Planes::order);
                Some(heads.map(|channel| channel as i32).collect::<Vec<_>>())
            }
            false => None,
        };
        let takes_feedback = |side: SideLayout| matches!(side, SideLayout::Packed(side) if side.feedback);
        let feedback = match own.pages.iter().any(|page| takes_feedback(page.keys)) {
            true => {
                let all = calibration.and_then(|own| own.key_feedback.as_ref()).ok_or_else(missing)?;
                Some(Feedback::new(gpu, all, shape.head_dim, order.as_deref())?)
            }
            false => None,
        };
        let order = order.map(|order| Memory::of(gpu, "an order of channels", &order)).transpose()?;
        let adapters = own.states.as_ref().zip(calibration.and_then(|own| own.adapters.as_ref()));
        let correction = match adapters {
            Some((states, adapters)) => {
                let maps = FeatureMaps::new(adapters, shape);
                let places: Vec<i32> = states.places.iter().map(|place| place.map_or(-1, |at| at as i32)).collect();
                Some(Correction {
                    features: maps.features,
                    shared: maps.shared,
                    query: Memory::of(gpu, "adapters", &maps.query)?,
                    key: Memory::of(gpu, "adapters", &maps.key)?,
                    gates: Memory::of(gpu, "adapters", &maps.gates)?,
                    places: Memory::of(gpu, "adapters", &places)?,
                })
            }
            None => None,
        };
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
        Ok(Layer { pages, classes, keys, values, pre_rope, order, feedback, correction })
    }

    pub(super) fn feedback(&self) -> abi::Feedback {
        self.feedback.as_ref().map_or(abi::Feedback::zeroed(), Feedback::for_kernels)
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

impl PreRopeKeys {
    fn new(
        gpu: &Arc<Gpu>,
        layout: &CacheLayout,
        layer: &LayerLayout,
        choice: PreRope,
        index: usize,
        num_blocks: usize,
    ) -> Result<Self, DeviceError> {
        let missing = || DeviceError::Tables(layout.scheme_name().to_owned());
        let tables = layout.tables().ok_or_else(missing)?;
        let shape = layout.shape;
        let calibrated = tables.layer(index).and_then(|own| own.permutation.clone());
        let channels: Vec<u32> = match choice.permutation {
            Permutation::None => (0..shape.row() as u32).collect(),
            _ => calibrated.ok_or_else(missing)?,
        };
        let mut places = vec![0u32; channels.len()];
        for (place, channel) in channels.iter().enumerate() {
            places[*channel as usize] = place as u32;
        }
        let rotation = match choice.heads {
            0 => Rotation::None,
            _ => Rotation::hadamard(gpu, layer.rotated_heads * shape.head_dim)?.map_err(|_| missing())?,
        };
        let angles = |position: usize| {
            let angle = move |frequency: &f32| f64::from(*frequency) * position as f64;
            tables.inv_freq.iter().map(angle).flat_map(|angle| [angle.cos() as f32, angle.sin() as f32])
        };
        let tokens: Vec<f32> = (0..PAGE_TOKENS).flat_map(angles).collect();
        let pages: Vec<f32> = (0..num_blocks).flat_map(|page| angles(page * PAGE_TOKENS)).collect();
        Ok(PreRopeKeys {
            heads: layer.rotated_heads,
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
