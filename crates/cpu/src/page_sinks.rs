//! Tokens that a page protects, kept beside its codes.

use super::quantise::unpack;
use super::scales::apply;
use super::simd::Isa;
use dibit_cache::PageSinks;
use dibit_quant::{Bits, QuantError, Quantizer, pack, packed_len};
use half::f16;

/// Keeps the rows of some slots of a page, `[token][head_dim]`: its keys, with the slots, or its values.
///
/// # Errors
/// [`QuantError`] for numbers that are not finite.
pub(super) fn keep(
    sinks: &PageSinks,
    is_keys: bool,
    slots: &[usize],
    rows: &[f32],
    page: &mut [u8],
) -> Result<(), QuantError> {
    let (start, bits, row_bytes) = side(sinks, is_keys);
    if is_keys {
        let places = &mut page[sinks.slots..][..sinks.auto.places];
        places.fill(PageSinks::EMPTY);
        places.iter_mut().zip(slots).for_each(|(place, slot)| *place = *slot as u8);
    }
    let mut codes = Vec::with_capacity(sinks.head_dim);
    for (place, slot) in slots.iter().enumerate() {
        let row = &rows[slot * sinks.head_dim..][..sinks.head_dim];
        let own = Quantizer::FloatMin.fit(row, bits)?;
        codes.clear();
        codes.extend(row.iter().map(|value| Quantizer::FloatMin.code(own, *value, bits)));
        let target = &mut page[start + place * row_bytes..][..row_bytes];
        target[..2].copy_from_slice(&own.scale.to_le_bytes());
        target[2..4].copy_from_slice(&own.zero.to_le_bytes());
        pack(bits, &codes, &mut target[4..4 + packed_len(bits, codes.len())]);
    }
    Ok(())
}

/// Slots of the tokens that a page keeps, in the order of their places.
pub(super) fn slots<'a>(sinks: &PageSinks, page: &'a [u8]) -> impl Iterator<Item = usize> + use<'a> {
    let places = &page[sinks.slots..][..sinks.auto.places];
    places.iter().take_while(|slot| **slot != PageSinks::EMPTY).map(|slot| usize::from(*slot))
}

/// Buffers of [`read`].
#[derive(Default)]
pub(super) struct Rows {
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<f32>,
    /// `[place][head_dim]`
    pub(super) values: Vec<f32>,
}

/// The keys, or values, of the first `count` places.
pub(super) fn read(isa: Isa, sinks: &PageSinks, is_keys: bool, count: usize, page: &[u8], rows: &mut Rows) {
    let (start, bits, row_bytes) = side(sinks, is_keys);
    let d = sinks.head_dim;
    let Rows { codes, scales, zeros, values } = rows;
    codes.resize(d, 0);
    scales.resize(d, 0.0);
    zeros.resize(d, 0.0);
    values.resize(count * d, 0.0);
    for (row, values) in page[start..].chunks_exact(row_bytes).zip(values.chunks_exact_mut(d)) {
        let half = |at: usize| f16::from_le_bytes([row[at], row[at + 1]]).to_f32();
        scales.fill(half(0));
        zeros.fill(half(2));
        unpack(isa, bits, &row[4..4 + packed_len(bits, d)], codes);
        apply(isa, codes, scales, zeros, values);
    }
}

/// Offset of the rows, their bits and their bytes.
fn side(sinks: &PageSinks, is_keys: bool) -> (usize, Bits, usize) {
    let [key_bytes, value_bytes] = sinks.row_bytes();
    match is_keys {
        true => (sinks.keys, PageSinks::KEY_BITS, key_bytes),
        false => (sinks.values, PageSinks::VALUE_BITS, value_bytes),
    }
}
