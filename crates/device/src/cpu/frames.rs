//! The frames in which keys and values are stored: rotations of heads, and keys before their rotary embedding.

use super::adapters::FeatureMaps;
use super::dot::{self, dot_rows};
use super::elementwise;
use super::feedback::HeadFeedback;
use super::rotate;
use super::simd::Isa;
use dibit_cache::{
    Basis, CacheLayout, LayerLayout, PAGE_TOKENS, PageLayout, Permutation, Planes, PreRope, SideLayout, Tables,
    Transform, ValueTransform,
};
use dibit_quant::{Hadamard, turn_back};
use std::sync::Arc;

/// What one layer does to keys, queries and values besides quantising them.
#[derive(Default)]
pub(super) struct Frames {
    /// Rotation of keys and queries after RoPE.
    pub keys: Option<HeadRotation>,
    /// Transform of values, taken back from outputs, where the weights do not do it.
    pub values: Option<HeadRotation>,
    /// Keys stored before RoPE.
    pub pre_rope: Option<PreRopeKeys>,
    /// For each KV head, its key channels in the order in which pages hold them, where that is not their own.
    pub order: Option<Vec<Vec<usize>>>,
    /// Error feedback of the keys of each KV head.
    pub feedback: Option<Vec<HeadFeedback>>,
    /// Adapters of the linear correction.
    pub adapters: Option<FeatureMaps>,
}

/// An invertible matrix for each KV head; one that turns, for keys.
pub(super) enum HeadRotation {
    Hadamard(Hadamard),
    Basis(Arc<Basis>),
}

impl Frames {
    pub(super) fn new(layout: &CacheLayout, index: usize) -> Option<Self> {
        let layer = &layout.layers[index];
        let tables = layout.tables();
        let calibration = tables.and_then(|tables| tables.layer(index));
        let hadamard = || Some(HeadRotation::Hadamard(Hadamard::new(layout.shape.head_dim).ok()?));
        let keys = match layer.keys {
            Transform::Hadamard => Some(hadamard()?),
            Transform::Basis => Some(HeadRotation::Basis(tables?.key_basis(index)?)),
            _ => None,
        };
        // Without tables it would be taken for values as they are.
        if layer.values == Transform::Basis {
            tables?.value_basis(index)?;
        }
        let values = match layout.online_values(index) {
            Some(ValueTransform::Hadamard) => Some(hadamard()?),
            Some(ValueTransform::Basis(basis)) => Some(HeadRotation::Basis(basis)),
            None => None,
        };
        let pre_rope = match layer.keys {
            Transform::PreRope(choice) => Some(PreRopeKeys::new(layout, layer, choice, tables?, index)?),
            _ => None,
        };
        let planes =
            layer.pages.iter().any(|page| matches!(page.keys, SideLayout::Packed(side) if side.planes.is_some()));
        let order = match planes {
            true => {
                let counts = calibration?.key_planes.as_ref()?;
                Some(counts.chunks_exact(layout.shape.head_dim).map(Planes::order).collect())
            }
            false => None,
        };
        let coded = |page: &PageLayout| matches!(page.keys, SideLayout::Packed(side) if side.feedback);
        let feedback = match layer.pages.iter().any(coded) {
            true => {
                let all = calibration?.key_feedback.as_ref()?;
                let order = |head: usize| order.as_ref().map(|order: &Vec<Vec<usize>>| &order[head][..]);
                let d = layout.shape.head_dim;
                Some((0..layer.pages.len()).map(|head| HeadFeedback::new(all, head, d, order(head))).collect())
            }
            false => None,
        };
        let adapters = layer.states.as_ref().and(calibration).and_then(|own| own.adapters.as_ref());
        let adapters = adapters.map(|own| FeatureMaps::new(own, layout.shape));
        Some(Frames { keys, values, pre_rope, order, feedback, adapters })
    }
}

impl HeadRotation {
    /// `row <- row T`, with a buffer of a head's size.
    pub(super) fn apply(&self, isa: Isa, kv_head: usize, row: &mut [f32], buffer: &mut Vec<f32>) {
        match self {
            HeadRotation::Hadamard(hadamard) => rotate::hadamard(isa, hadamard, row),
            HeadRotation::Basis(basis) => {
                buffer.resize(row.len(), 0.0);
                rotate::times(isa, row, matrix(&basis.there, kv_head, row.len()), buffer);
                row.copy_from_slice(buffer);
            }
        }
    }

    /// `row <- row T^-1`.
    pub(super) fn apply_inverse(&self, isa: Isa, kv_head: usize, row: &mut [f32], buffer: &mut Vec<f32>) {
        match self {
            HeadRotation::Hadamard(hadamard) => rotate::hadamard_inverse(isa, hadamard, row),
            HeadRotation::Basis(basis) => {
                let d = row.len();
                buffer.resize(d, 0.0);
                let shape = dot::Shape { m: 1, n: d, k: d };
                dot_rows(isa, row, matrix(&basis.back, kv_head, d), shape, &mut |_, channel, sum| {
                    buffer[channel] = sum
                });
                row.copy_from_slice(buffer);
            }
        }
    }
}

/// One head's matrix.
fn matrix(all: &[f32], kv_head: usize, d: usize) -> &[f32] {
    &all[kv_head * d * d..(kv_head + 1) * d * d]
}

/// Keys that are stored before RoPE, rotated over adjacent heads and reordered (RotateKV).
///
/// Outside of pages keys lie after RoPE as everywhere. RoPE is undone when they enter a page, and applied again when
/// the page is read, in two parts: the angle of the page's first token turns the query back, once for a page, and the
/// angle of a token within its page turns the key, by a table.
pub(super) struct PreRopeKeys {
    head_dim: usize,
    hadamard: Option<Hadamard>,
    /// Channels of the heads that are read together.
    width: usize,
    /// Channel `j` in storage is channel `order[j]` of the rotated keys, both counted in the whole layer.
    order: Vec<u32>,
    /// `[head_dim / 2][128]` cosines and sines of the angles within a page.
    cosines: Vec<f32>,
    sines: Vec<f32>,
    tables: Arc<Tables>,
}

impl PreRopeKeys {
    fn new(
        layout: &CacheLayout,
        layer: &LayerLayout,
        choice: PreRope,
        tables: &Arc<Tables>,
        index: usize,
    ) -> Option<Self> {
        let shape = layout.shape;
        let channels = shape.num_key_value_heads * shape.head_dim;
        let calibrated = tables.layer(index).and_then(|own| own.permutation.clone());
        let order = match choice.permutation {
            Permutation::None => (0..channels as u32).collect(),
            _ => calibrated?,
        };
        let hadamard = match choice.heads {
            0 => None,
            _ => Some(Hadamard::new(layer.rotated_heads * shape.head_dim).ok()?),
        };
        let angle = |frequency: f32, token: usize| f64::from(frequency) * token as f64;
        let table = |of: fn(f64) -> f64| -> Vec<f32> {
            let rows = tables.inv_freq.iter();
            rows.flat_map(|&f| (0..PAGE_TOKENS).map(move |token| of(angle(f, token)) as f32)).collect()
        };
        Some(PreRopeKeys {
            head_dim: shape.head_dim,
            hadamard,
            width: layer.frame * shape.head_dim,
            order,
            cosines: table(f64::cos),
            sines: table(f64::sin),
            tables: tables.clone(),
        })
    }

    /// Channels in storage of the heads from `first_head` on, as channels of their rotated keys.
    fn frame_order(&self, first_head: usize) -> impl Iterator<Item = usize> {
        let start = first_head * self.head_dim;
        self.order[start..start + self.width].iter().map(move |&channel| channel as usize - start)
    }

    /// From the key after RoPE of the token at `position`, heads of a frame side by side, to what is stored.
    pub(super) fn store(&self, isa: Isa, first_head: usize, position: usize, key: &mut [f32], buffer: &mut Vec<f32>) {
        // The same angles as when the model applied them.
        let angles = self.tables.inv_freq.iter().map(|frequency| position as f32 * frequency);
        turn_back(key, self.head_dim, angles.map(|angle| (angle.cos(), angle.sin())));
        if let Some(hadamard) = &self.hadamard {
            key.chunks_exact_mut(hadamard.order()).for_each(|heads| rotate::hadamard(isa, hadamard, heads));
        }
        buffer.clear();
        buffer.extend(self.frame_order(first_head).map(|channel| key[channel]));
        key.copy_from_slice(buffer);
    }

    /// From what is stored of a page to keys turned by the angle of their token within the page: `[channel][128]` of the
    /// heads of a frame. `expand(head, place, out)` writes stored row `row` of a head of the frame to
    /// `out[place(row)..]`.
    pub(super) fn load(
        &self,
        isa: Isa,
        first_head: usize,
        out: &mut Vec<f32>,
        mut expand: impl FnMut(usize, &dyn Fn(usize) -> usize, &mut [f32]),
    ) {
        out.resize(self.width * PAGE_TOKENS, 0.0);
        let start = first_head * self.head_dim;
        for head in 0..self.width / self.head_dim {
            let order = &self.order[start + head * self.head_dim..][..self.head_dim];
            expand(head, &|row| (order[row] as usize - start) * PAGE_TOKENS, out);
        }
        if let Some(hadamard) = &self.hadamard {
            for heads in out.chunks_exact_mut(hadamard.order() * PAGE_TOKENS) {
                rotate::hadamard_inverse_columns(isa, hadamard, heads, PAGE_TOKENS);
            }
        }
        elementwise::turn(isa, out, &self.cosines, &self.sines);
    }

    /// Turns queries back by the angle of the page that begins at `position`.
    pub(super) fn turn_back(&self, position: usize, queries: &[f32], turned: &mut Vec<f32>) {
        turned.clear();
        turned.extend_from_slice(queries);
        let angles = self.tables.inv_freq.iter().map(|frequency| position as f64 * f64::from(*frequency));
        turn_back(turned, self.head_dim, angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)));
    }
}
