//! Error feedback: what the code of a channel misses goes to the channels that are coded after it.

use super::quantise::{RowParameters, rounded};
use super::scales::offset;
use super::simd::dispatch;
use dibit_cache::{CodingOrder, PAGE_TOKENS};
use dibit_quant::Quantizer;

/// Error feedback of the keys of one KV head, in the order in which pages hold their channels.
pub(super) struct HeadFeedback {
    /// Number in storage of each channel, in the order of coding.
    places: Vec<usize>,
    /// `[head_dim][head_dim]`: row `i` has what the channels behind the `i`-th take up of its error.
    factors: Vec<f32>,
}

impl HeadFeedback {
    /// That of every KV head.
    pub(super) fn all(own: &CodingOrder, head_dim: usize) -> Vec<Self> {
        let heads = own.places.chunks_exact(head_dim).zip(own.factors.chunks_exact(head_dim * head_dim));
        heads.map(|(places, factors)| HeadFeedback { places: places.to_vec(), factors: factors.to_vec() }).collect()
    }
}

/// Buffers of the coder.
#[derive(Default)]
pub(super) struct Columns {
    /// `[channel in the order of coding][token]`
    values: Vec<f32>,
}

/// One channel on its way to codes.
#[derive(Clone, Copy)]
pub(crate) struct Channel {
    scale: f32,
    zero: f32,
    max_code: f32,
}

impl Columns {
    /// Codes all channels of up to 128 tokens. `numbers` yields the channels of a token in the order of storage, and
    /// `write` takes the code of a token, by its number, and of a channel by its place in storage.
    pub(super) fn code<'a>(
        &mut self,
        isa: super::simd::Isa,
        feedback: &HeadFeedback,
        own: &RowParameters,
        tokens: impl Iterator<Item = &'a [f32]>,
        mut write: impl FnMut(usize, usize, u8),
    ) {
        let d = feedback.places.len();
        self.values.clear();
        self.values.resize(d * PAGE_TOKENS, 0.0);
        let mut count = 0;
        for token in tokens {
            for (column, place) in self.values.chunks_exact_mut(PAGE_TOKENS).zip(&feedback.places) {
                column[count] = token[*place];
            }
            count += 1;
        }
        let mut codes = [0; PAGE_TOKENS];
        for (i, place) in feedback.places.iter().enumerate() {
            let (scale, zero, max_code) = own.at(*place);
            let (now, later) = self.values[i * PAGE_TOKENS..].split_at_mut(PAGE_TOKENS);
            let now: &mut Column = now.try_into().expect("a column");
            let factors = &feedback.factors[i * d + i + 1..(i + 1) * d];
            step(isa, now, Channel { scale, zero, max_code }, &mut codes, factors, later);
            for (token, code) in codes[..count].iter().enumerate() {
                write(token, *place, *code);
            }
        }
    }
}

type Column = [f32; PAGE_TOKENS];

#[inline(always)]
fn step_body(now: &mut Column, own: Channel, codes: &mut [u8; PAGE_TOKENS], factors: &[f32], later: &mut [f32]) {
    let Channel { scale, zero, max_code } = own;
    for (value, code) in now.iter_mut().zip(codes) {
        // What is over goes on.
        *code = rounded(*value, scale, zero, max_code, Quantizer::FloatMin).to_bits() as u8;
        *value -= f32::from(*code) * scale + offset(false, scale, zero);
    }
    for (factor, column) in factors.iter().zip(later.chunks_exact_mut(PAGE_TOKENS)) {
        for (value, missed) in column.iter_mut().zip(&*now) {
            *value -= missed * factor;
        }
    }
}

dispatch! {
    /// Codes one channel, and gives what it misses to the later ones: `later_j <- later_j - e F_j`.
    fn step<>(now: &mut Column, own: Channel, codes: &mut [u8; PAGE_TOKENS], factors: &[f32], later: &mut [f32]);
    baseline: step_body(now, own, codes, factors, later);
    avx2: step_body(now, own, codes, factors, later);
    avx512: step_body(now, own, codes, factors, later);
    neon: step_body(now, own, codes, factors, later);
}
