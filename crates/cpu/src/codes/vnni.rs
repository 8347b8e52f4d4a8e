use super::{Fields, Kernel, Line, MAX_FIELDS, QUAD, Sums, WIDTH, Weights};
use crate::simd::{CACHE_LINE, prefetch_at};
use std::arch::x86_64::*;

/// AVX-512 with VNNI and VBMI.
pub(super) struct Vnni;

/// Byte `4 place + row` of a line comes from byte `16 row + place`.
const PLACES: Line = {
    let mut places = [0; WIDTH * QUAD];
    let mut i = 0;
    while i < places.len() {
        places[i] = (i % QUAD * WIDTH + i / QUAD) as u8;
        i += 1;
    }
    Line(places)
};

// Every block below is sound for the same reason: by the contract of `Kernel` this type is used only where the processor
// has AVX-512 F, BW, VL, VNNI and VBMI, and pointers stay within the references they come from.
impl Kernel for Vnni {
    #[inline(always)]
    fn interleave(bytes: &[u8], stride: usize, lines: &mut [Line]) {
        let last_row = QUAD * lines.len().max(1) - 1;
        assert!(lines.is_empty() || bytes.len() >= last_row * stride + WIDTH, "rows of {stride} bytes");
        // SAFETY: as above; a `Line` is 64 bytes, aligned, and the assertion holds for every row that is read.
        unsafe {
            let places = _mm512_load_si512(PLACES.0.as_ptr().cast());
            for (index, line) in lines.iter_mut().enumerate() {
                let row = |i: usize| _mm_loadu_si128(bytes.as_ptr().add((QUAD * index + i) * stride).cast());
                let mut rows = _mm512_castsi128_si512(row(0));
                rows = _mm512_inserti32x4::<1>(rows, row(1));
                rows = _mm512_inserti32x4::<2>(rows, row(2));
                rows = _mm512_inserti32x4::<3>(rows, row(3));
                _mm512_store_si512(line.0.as_mut_ptr().cast(), _mm512_permutexvar_epi8(places, rows));
            }
        }
    }

    #[inline(always)]
    fn sum<const M: usize>(lines: &[Line], weights: Weights<M>, fields: Fields, ahead: &[u8]) -> Sums<M> {
        match fields.count {
            1 => sum::<M, 1>(lines, weights, fields, ahead),
            2 => sum::<M, 2>(lines, weights, fields, ahead),
            _ => sum::<M, MAX_FIELDS>(lines, weights, fields, ahead),
        }
    }
}

/// Codes are multiplied where they stand in their byte, and sums divided by what that is too much.
#[inline(always)]
fn sum<const M: usize, const F: usize>(lines: &[Line], weights: Weights<M>, fields: Fields, ahead: &[u8]) -> Sums<M> {
    let Weights { high, low } = weights;
    let high: [&[i32]; M] = std::array::from_fn(|i| &high[i][..lines.len()]);
    let low: [&[i32]; M] = std::array::from_fn(|i| &low[i][..lines.len()]);
    // Nothing is asked for by asking for what is there.
    let (next, step) = if ahead.is_empty() { (lines.as_ptr().cast(), 0) } else { (ahead.as_ptr(), CACHE_LINE) };
    // SAFETY: as above; a `Line` is 64 bytes, aligned, and 16 numbers are writable.
    unsafe {
        let masks: [__m512i; F] =
            std::array::from_fn(|field| _mm512_set1_epi8((fields.mask() << fields.shift(field)) as i8));
        let mut high_sums = [[_mm512_setzero_si512(); F]; M];
        let mut low_sums = [[_mm512_setzero_si512(); F]; M];
        for (index, line) in lines.iter().enumerate() {
            prefetch_at(next.wrapping_add(index * step));
            let bytes = _mm512_load_si512(line.0.as_ptr().cast());
            for field in 0..F {
                let codes = _mm512_and_si512(bytes, masks[field]);
                for i in 0..M {
                    let weight = |weights: &[i32]| _mm512_set1_epi32(weights[index]);
                    high_sums[i][field] = _mm512_dpbusd_epi32(high_sums[i][field], codes, weight(high[i]));
                    low_sums[i][field] = _mm512_dpbusd_epi32(low_sums[i][field], codes, weight(low[i]));
                }
            }
        }
        let mut sums = [[[0; WIDTH]; MAX_FIELDS]; M];
        for i in 0..M {
            for field in 0..F {
                let shift = _mm_cvtsi32_si128(fields.shift(field) as i32);
                let [high, low] = [high_sums[i][field], low_sums[i][field]].map(|sum| _mm512_sra_epi32(sum, shift));
                let sum = _mm512_add_epi32(_mm512_slli_epi32::<8>(high), low);
                _mm512_storeu_si512(sums[i][field].as_mut_ptr().cast(), sum);
            }
        }
        sums
    }
}
