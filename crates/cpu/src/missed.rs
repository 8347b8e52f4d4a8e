//! What the codes of keys miss, without a cache: training of the linear correction asks for it.

use super::encode::{Encoder, Tokens};
use super::frames::Frames;
use super::simd::Isa;
use dibit_cache::{CacheLayout, PAGE_TOKENS, SideLayout};
use dibit_device::DeviceError;
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// One KV head of one page's tokens.
struct Work<'a> {
    isa: Isa,
    layout: &'a CacheLayout,
    frames: &'a Frames,
    layer: usize,
    kv_head: usize,
    /// Position of the first token.
    first: usize,
}

/// [`dibit_device::Train::missed_keys`] of all rows of `k`.
///
/// # Errors
/// As there.
///
/// # Panics
/// As there.
pub fn missed_keys(
    isa: Isa,
    layout: &CacheLayout,
    layer: usize,
    k: &[f32],
    out: &mut [f32],
) -> Result<(), DeviceError> {
    let frames = Frames::new(layout, layer);
    let page = PAGE_TOKENS * layout.shape.row();
    assert!(k.len().is_multiple_of(page) && frames.pre_rope.is_none(), "whole pages of keys after RoPE");
    let pages = k.par_chunks_exact(page).zip(out.par_chunks_exact_mut(page)).enumerate();
    pages.try_for_each(|(index, (k, out))| {
        (0..layout.shape.num_key_value_heads).try_for_each(|kv_head| {
            let work = Work { isa, layout, frames: &frames, layer, kv_head, first: index * PAGE_TOKENS };
            work.head(k, out)
        })
    })
}

impl Work<'_> {
    /// One page of keys of all heads, and where to write what is missed of this one.
    fn head(&self, k: &[f32], out: &mut [f32]) -> Result<(), DeviceError> {
        let Work { isa, layout, frames, layer, kv_head, first } = *self;
        let (row, d) = (layout.shape.row(), layout.shape.head_dim);
        let page_layout = &layout.layers[layer].pages[kv_head];
        let own = kv_head * d..(kv_head + 1) * d;
        let SideLayout::Packed(side) = page_layout.keys else {
            out.chunks_exact_mut(row).for_each(|token| token[own.clone()].fill(0.0));
            return Ok(());
        };
        let mut buffer = Vec::new();
        let mut values = vec![0.0; PAGE_TOKENS * d];
        for (value, token) in values.chunks_exact_mut(d).zip(k.chunks_exact(row)) {
            value.copy_from_slice(&token[own.clone()]);
            if let Some(rotation) = &frames.keys {
                rotation.apply(isa, kv_head, value, &mut buffer);
            }
        }
        let mut halves = vec![f16::ZERO; values.len()];
        halves.convert_from_f32_slice(&values);
        halves.convert_to_f32_slice(&mut values);
        let kept = layout.sinks.first();
        let sinks: Vec<bool> = (first..first + PAGE_TOKENS).map(|token| token < kept).collect();
        let tokens = Tokens {
            values: &mut values,
            head_dim: d,
            slots: 0..PAGE_TOKENS,
            sinks: &sinks,
            order: frames.order.as_ref().map(|order| &order[kv_head][..]),
            feedback: frames.feedback.as_ref().map(|feedback| &feedback[kv_head]),
        };
        let (mut page, mut missed) = (vec![0; page_layout.bytes], Vec::new());
        let encoded = Encoder::default().encode(isa, &side, tokens, &mut page, Some(&mut missed));
        encoded.map_err(|source| DeviceError::Quantize { layer, source })?;
        for (missed, token) in missed.chunks_exact_mut(d).zip(out.chunks_exact_mut(row)) {
            if let Some(rotation) = &frames.keys {
                rotation.apply_inverse(isa, kv_head, missed, &mut buffer);
            }
            token[own.clone()].copy_from_slice(missed);
        }
        Ok(())
    }
}
