//! The frames in which keys and values are stored: rotations of heads, and keys before their rotary embedding.

use super::dot::{self, dot_rows};
use super::elementwise;
use super::feedback::HeadFeedback;
use super::rotate;
use super::simd::Isa;
use dibit_cache::{CacheLayout, FeatureMaps, HeadTransform, PAGE_TOKENS, PreRopeTransform};
use dibit_quant::turn_back;
use std::sync::Arc;

/// What one layer does to keys, queries and values besides quantising them.
#[derive(Default)]
pub(super) struct Frames {
    /// Rotation of keys and queries after RoPE.
    pub keys: Option<HeadRotation>,
    /// Transform of values, taken back from outputs, where the weights do not do it.
    pub values: Option<HeadRotation>,
    /// For each KV head the way back from stored values to the model's own frame, `[kv head][head_dim][head_dim]`, where
    /// pages protect tokens whose values are small there.
    value_frame: Option<Arc<[f32]>>,
    /// Keys stored before RoPE.
    pub pre_rope: Option<PreRopeKeys>,
    /// For each KV head, its key channels in the order in which pages hold them, where that is not their own.
    pub order: Option<Vec<Vec<usize>>>,
    /// Error feedback of the keys of each KV head.
    pub feedback: Option<Vec<HeadFeedback>>,
    /// Adapters of the linear correction.
    pub adapters: Option<FeatureMaps>,
}

/// A transform of heads, as this processor does it.
pub(super) struct HeadRotation(HeadTransform);

impl Frames {
    /// What a layer does.
    pub(super) fn new(layout: &CacheLayout, index: usize) -> Self {
        let own = layout.transforms(index);
        let (d, layer) = (layout.shape.head_dim, &layout.layers[index]);
        Frames {
            keys: own.keys.map(HeadRotation),
            values: own.values.map(HeadRotation),
            value_frame: own.value_frame,
            pre_rope: own.pre_rope.map(|own| PreRopeKeys::new(own, d, layer.frame * d)),
            order: own.order,
            feedback: own.feedback.map(|own| HeadFeedback::all(&own, d)),
            adapters: own.adapters,
        }
    }

    /// The way back from stored values of a KV head, where it is needed, of `d` rows.
    pub(super) fn value_frame(&self, kv_head: usize, d: usize) -> Option<&[f32]> {
        self.value_frame.as_ref().map(|own| matrix(own, kv_head, d))
    }
}

impl HeadRotation {
    /// `row <- row T`, with a buffer of a head's size.
    pub(super) fn apply(&self, isa: Isa, kv_head: usize, row: &mut [f32], buffer: &mut Vec<f32>) {
        match &self.0 {
            HeadTransform::Hadamard(hadamard) => rotate::hadamard(isa, hadamard, row),
            HeadTransform::Basis(basis) => {
                buffer.resize(row.len(), 0.0);
                rotate::times(isa, row, matrix(&basis.there, kv_head, row.len()), buffer);
                row.copy_from_slice(buffer);
            }
        }
    }

    /// `row <- row T^-1`.
    pub(super) fn apply_inverse(&self, isa: Isa, kv_head: usize, row: &mut [f32], buffer: &mut Vec<f32>) {
        match &self.0 {
            HeadTransform::Hadamard(hadamard) => rotate::hadamard_inverse(isa, hadamard, row),
            HeadTransform::Basis(basis) => {
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
    /// Channels of the heads that are read together.
    width: usize,
    own: PreRopeTransform,
    /// `[head_dim / 2][128]` cosines and sines of the angles within a page.
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl PreRopeKeys {
    fn new(own: PreRopeTransform, head_dim: usize, width: usize) -> Self {
        let angle = |frequency: f32, token: usize| f64::from(frequency) * token as f64;
        let table = |of: fn(f64) -> f64| -> Vec<f32> {
            let rows = own.inv_freq.iter();
            rows.flat_map(|&f| (0..PAGE_TOKENS).map(move |token| of(angle(f, token)) as f32)).collect()
        };
        PreRopeKeys { head_dim, width, cosines: table(f64::cos), sines: table(f64::sin), own }
    }

    /// Channels in storage of the heads from `first_head` on, as channels of their rotated keys.
    fn frame_order(&self, first_head: usize) -> impl Iterator<Item = usize> {
        let start = first_head * self.head_dim;
        self.own.channels[start..start + self.width].iter().map(move |&channel| channel as usize - start)
    }

    /// From the key after RoPE of the token at `position`, heads of a frame side by side, to what is stored.
    pub(super) fn store(&self, isa: Isa, first_head: usize, position: usize, key: &mut [f32], buffer: &mut Vec<f32>) {
        // The same angles as when the model applied them.
        let angles = self.own.inv_freq.iter().map(|frequency| position as f32 * frequency);
        turn_back(key, self.head_dim, angles.map(|angle| (angle.cos(), angle.sin())));
        if let Some(hadamard) = &self.own.hadamard {
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
            let order = &self.own.channels[start + head * self.head_dim..][..self.head_dim];
            expand(head, &|row| (order[row] as usize - start) * PAGE_TOKENS, out);
        }
        if let Some(hadamard) = &self.own.hadamard {
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
        let angles = self.own.inv_freq.iter().map(|frequency| position as f64 * f64::from(*frequency));
        turn_back(turned, self.head_dim, angles.map(|angle| (angle.cos() as f32, angle.sin() as f32)));
    }
}
