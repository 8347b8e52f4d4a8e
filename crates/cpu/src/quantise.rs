//! Groups of numbers as codes, many at a time: what [`dibit_quant::Quantizer`] and [`dibit_quant::pack`] say, exactly.

use super::element::Element;
use super::exp::ROUND;
use super::scales::offset;
use super::simd::{WIDTH, dispatch};
use dibit_quant::{Bits, Parameters, Plane, Quantizer};
use std::ops::Range;

/// The shares in the places of a row, the last one twice.
pub(super) const PLACES: usize = 8;

#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn largest_magnitude_body(values: &[f32]) -> f32 {
    // Magnitudes compare like their bits.
    f32::from_bits(values.iter().fold(0, |most, value| most.max(value.to_bits() & 0x7fff_ffff)))
}

dispatch! {
    /// The largest magnitude; not a number where one of them is none.
    fn largest_magnitude<>(values: &[f32]) -> f32;
    baseline: largest_magnitude_body(values);
    avx2: largest_magnitude_body(values);
    avx512: largest_magnitude_body(values);
    neon: largest_magnitude_body(values);
}

#[inline(always)]
fn range_body(values: &[f32]) -> (f32, f32) {
    let (whole, rest) = values.as_chunks::<WIDTH>();
    let (mut min, mut max) = ([f32::INFINITY; WIDTH], [f32::NEG_INFINITY; WIDTH]);
    for values in whole {
        for ((min, max), value) in min.iter_mut().zip(&mut max).zip(values) {
            (*min, *max) = (smaller(*value, *min), larger(*value, *max));
        }
    }
    let min = min.iter().chain(rest).fold(f32::INFINITY, |min, value| smaller(*value, min));
    (min, max.iter().chain(rest).fold(f32::NEG_INFINITY, |max, value| larger(*value, max)))
}

dispatch! {
    /// The smallest and the largest of finite numbers.
    fn range<>(values: &[f32]) -> (f32, f32);
    baseline: range_body(values);
    avx2: range_body(values);
    avx512: range_body(values);
    neon: range_body(values);
}

#[inline(always)]
fn widen_body(values: &[f32], min: &mut [f32], max: &mut [f32]) {
    for ((value, min), max) in values.iter().zip(min).zip(max) {
        (*min, *max) = (smaller(*value, *min), larger(*value, *max));
    }
}

dispatch! {
    /// Widens each range to hold the number of its place.
    fn widen<>(values: &[f32], min: &mut [f32], max: &mut [f32]);
    baseline: widen_body(values, min, max);
    avx2: widen_body(values, min, max);
    avx512: widen_body(values, min, max);
    neon: widen_body(values, min, max);
}

/// Scale, zero and largest code of each number of a row.
#[derive(Default)]
pub(super) struct RowParameters {
    scales: Vec<f32>,
    zeros: Vec<f32>,
    max_codes: Vec<f32>,
}

impl RowParameters {
    /// Makes room for a row of `len` numbers.
    pub(super) fn resize(&mut self, len: usize) {
        self.scales.resize(len, 0.0);
        self.zeros.resize(len, 0.0);
        self.max_codes.resize(len, 0.0);
    }

    /// Scale, zero and largest code of a number.
    pub(super) fn at(&self, index: usize) -> (f32, f32, f32) {
        (self.scales[index], self.zeros[index], self.max_codes[index])
    }

    /// Gives some numbers these parameters.
    pub(super) fn set(&mut self, numbers: Range<usize>, parameters: Parameters, max_code: u8) {
        self.scales[numbers.clone()].fill(parameters.scale.widen());
        self.zeros[numbers.clone()].fill(parameters.zero.widen());
        self.max_codes[numbers].fill(f32::from(max_code));
    }
}

/// The code of a number with [`ROUND`] added to it, which leaves it in the lowest bits.
#[inline(always)]
pub(super) fn rounded(value: f32, scale: f32, zero: f32, max_code: f32, quantizer: Quantizer) -> f32 {
    let steps = match quantizer {
        Quantizer::FloatMin => (value - zero) / scale,
        // Beyond 2^22 this does not round, but no zero point is large enough to bring that back to a code.
        Quantizer::IntegerZero { .. } => ((value / scale + ROUND) - ROUND) + zero,
    };
    let clamped = smaller(larger(steps, 0.0), max_code);
    let clamped = if scale == 0.0 { 0.0 } else { clamped };
    clamped + ROUND
}

#[inline(always)]
fn code_body(values: &[f32], own: &RowParameters, quantizer: Quantizer, codes: &mut [u8]) {
    let parameters = own.scales.iter().zip(&own.zeros).zip(&own.max_codes);
    for ((code, value), ((scale, zero), max_code)) in codes.iter_mut().zip(values).zip(parameters) {
        *code = rounded(*value, *scale, *zero, *max_code, quantizer).to_bits() as u8;
    }
}

dispatch! {
    /// The codes of a row.
    fn code<>(values: &[f32], own: &RowParameters, quantizer: Quantizer, codes: &mut [u8]);
    baseline: code_body(values, own, quantizer, codes);
    avx2: code_body(values, own, quantizer, codes);
    avx512: code_body(values, own, quantizer, codes);
    neon: code_body(values, own, quantizer, codes);
}

#[inline(always)]
fn missed_body(values: &[f32], codes: &[u8], own: &RowParameters, quantizer: Quantizer, missed: &mut [f32]) {
    let integer = quantizer != Quantizer::FloatMin;
    let parameters = own.scales.iter().zip(&own.zeros);
    for (((missed, value), code), (scale, zero)) in missed.iter_mut().zip(values).zip(codes).zip(parameters) {
        *missed = value - (f32::from(*code) * scale + offset(integer, *scale, *zero));
    }
}

dispatch! {
    /// What the numbers of a row differ by from what their codes stand for.
    fn missed<>(values: &[f32], codes: &[u8], own: &RowParameters, quantizer: Quantizer, missed: &mut [f32]);
    baseline: missed_body(values, codes, own, quantizer, missed);
    avx2: missed_body(values, codes, own, quantizer, missed);
    avx512: missed_body(values, codes, own, quantizer, missed);
    neon: missed_body(values, codes, own, quantizer, missed);
}

#[inline(always)]
fn add_squares_body(values: &[f32], own: &RowParameters, quantizer: Quantizer, sums: &mut [f32]) {
    let integer = quantizer != Quantizer::FloatMin;
    let parameters = own.scales.iter().zip(&own.zeros).zip(&own.max_codes);
    for ((sum, value), ((scale, zero), max_code)) in sums.iter_mut().zip(values).zip(parameters) {
        let code = rounded(*value, *scale, *zero, *max_code, quantizer) - ROUND;
        let missed = value - (code * scale + offset(integer, *scale, *zero));
        *sum += missed * missed;
    }
}

dispatch! {
    /// Adds to the sum of each place the square of what the code of its number misses.
    fn add_squares<>(values: &[f32], own: &RowParameters, quantizer: Quantizer, sums: &mut [f32]);
    baseline: add_squares_body(values, own, quantizer, sums);
    avx2: add_squares_body(values, own, quantizer, sums);
    avx512: add_squares_body(values, own, quantizer, sums);
    neon: add_squares_body(values, own, quantizer, sums);
}

#[inline(always)]
fn add_squares_of_each_body(values: &[f32], own: &RowParameters, quantizer: Quantizer, sums: &mut [f32; PLACES]) {
    values.iter().for_each(|value| add_squares_body(&[*value; PLACES], own, quantizer, sums));
}

dispatch! {
    /// The same of every number with the parameters of every place.
    fn add_squares_of_each<>(values: &[f32], own: &RowParameters, quantizer: Quantizer, sums: &mut [f32; PLACES]);
    baseline: add_squares_of_each_body(values, own, quantizer, sums);
    avx2: add_squares_of_each_body(values, own, quantizer, sums);
    avx512: add_squares_of_each_body(values, own, quantizer, sums);
    neon: add_squares_of_each_body(values, own, quantizer, sums);
}

#[inline(always)]
fn merge_body(codes: &[u8], plane: Plane, field: usize, bytes: &mut [u8]) {
    let (mask, shift) = (plane.mask(), field * plane.width);
    for (byte, code) in bytes.iter_mut().zip(codes) {
        *byte = *byte & !(mask << shift) | ((code >> plane.shift) & mask) << shift;
    }
}

dispatch! {
    /// Writes a plane's bits of each code into bit field `field` of the byte of its place.
    fn merge<>(codes: &[u8], plane: Plane, field: usize, bytes: &mut [u8]);
    baseline: merge_body(codes, plane, field, bytes);
    avx2: merge_body(codes, plane, field, bytes);
    avx512: merge_body(codes, plane, field, bytes);
    neon: merge_body(codes, plane, field, bytes);
}

dispatch! {
    /// [`dibit_quant::pack`].
    fn pack<>(bits: Bits, codes: &[u8], out: &mut [u8]);
    baseline: dibit_quant::pack(bits, codes, out);
    avx2: dibit_quant::pack(bits, codes, out);
    avx512: dibit_quant::pack(bits, codes, out);
    neon: dibit_quant::pack(bits, codes, out);
}

dispatch! {
    /// [`dibit_quant::unpack`].
    fn unpack<>(bits: Bits, packed: &[u8], codes: &mut [u8]);
    baseline: dibit_quant::unpack(bits, packed, codes);
    avx2: dibit_quant::unpack(bits, packed, codes);
    avx512: dibit_quant::unpack(bits, packed, codes);
    neon: dibit_quant::unpack(bits, packed, codes);
}
