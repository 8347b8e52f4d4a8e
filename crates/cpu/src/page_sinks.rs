//! Tokens that a page protects, kept beside its codes.

use super::quantise::unpack;
use super::rotate;
use super::scales::apply;
use super::simd::Isa;
use dibit_cache::{PageSinks, square_norm};
use dibit_quant::{QuantError, Quantizer, pack, packed_len};
use half::f16;

/// Squared norms of stored values, `[token][d]`; `frame` takes a value back to the model's own frame, row-major, where the two
/// differ.
pub(super) fn squares(isa: Isa, values: &[f32], d: usize, frame: Option<&[f32]>, row: &mut Vec<f32>) -> Vec<f32> {
    let values = values.chunks_exact(d);
    let Some(frame) = frame else { return values.map(square_norm).collect() };
    row.resize(d, 0.0);
    values
        .map(|value| {
            rotate::times(isa, value, frame, row);
            square_norm(row)
        })
        .collect()
}

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
    let (start, row_bytes) = (start(sinks, is_keys), sinks.row_bytes());
    if is_keys {
        let places = &mut page[sinks.slots..][..sinks.auto.places];
        places.fill(PageSinks::EMPTY);
        places.iter_mut().zip(slots).for_each(|(place, slot)| *place = *slot as u8);
    }
    let mut codes = Vec::with_capacity(sinks.head_dim);
    for (place, slot) in slots.iter().enumerate() {
        let row = &rows[slot * sinks.head_dim..][..sinks.head_dim];
        let own = Quantizer::FloatMin.fit(row, PageSinks::BITS)?;
        codes.clear();
        codes.extend(row.iter().map(|value| Quantizer::FloatMin.code(own, *value, PageSinks::BITS)));
        let target = &mut page[start + place * row_bytes..][..row_bytes];
        target[..2].copy_from_slice(&own.scale.to_le_bytes());
        target[2..4].copy_from_slice(&own.zero.to_le_bytes());
        pack(PageSinks::BITS, &codes, &mut target[4..4 + packed_len(PageSinks::BITS, codes.len())]);
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
    let (start, row_bytes) = (start(sinks, is_keys), sinks.row_bytes());
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
        unpack(isa, PageSinks::BITS, &row[4..4 + packed_len(PageSinks::BITS, d)], codes);
        apply(isa, codes, scales, zeros, values);
    }
}

/// Offset of the rows.
fn start(sinks: &PageSinks, is_keys: bool) -> usize {
    if is_keys { sinks.keys } else { sinks.values }
}
