use super::{Fields, Kernel, Line, MAX_FIELDS, QUAD, Sums, WIDTH, Weights};
use crate::simd::prefetch;
use std::arch::x86_64::*;

/// AVX2.
pub(super) struct Avx2;

// Every block below is sound for the same reason: by the contract of `Kernel` this type is used only where the processor
// has AVX2, and pointers stay within the references they come from.
impl Kernel for Avx2 {
    #[inline(always)]
    fn interleave(bytes: &[u8], stride: usize, lines: &mut [Line]) {
        for (index, line) in lines.iter_mut().enumerate() {
            let rows = &bytes[index * QUAD * stride..];
            let row = |i: usize| -> &[u8; WIDTH] { rows[i * stride..][..WIDTH].try_into().expect("WIDTH bytes") };
            // SAFETY: as above; each row has 16 bytes, and a `Line` is 64 bytes, aligned.
            unsafe {
                let [a, b, c, d] = [row(0), row(1), row(2), row(3)].map(|row| _mm_loadu_si128(row.as_ptr().cast()));
                let pairs = [
                    (_mm_unpacklo_epi8(a, b), _mm_unpacklo_epi8(c, d)),
                    (_mm_unpackhi_epi8(a, b), _mm_unpackhi_epi8(c, d)),
                ];
                let quarters = line.0.chunks_exact_mut(32);
                for (half, (ab, cd)) in quarters.zip(pairs) {
                    _mm_store_si128(half.as_mut_ptr().cast(), _mm_unpacklo_epi16(ab, cd));
                    _mm_store_si128(half[16..].as_mut_ptr().cast(), _mm_unpackhi_epi16(ab, cd));
                }
            }
        }
    }

    #[inline(always)]
    fn sum<const M: usize>(lines: &[Line], weights: Weights<M>, fields: Fields, ahead: &[u8]) -> Sums<M> {
        for index in 0..lines.len() {
            prefetch(ahead, index);
        }
        let mut sums = [[[0; WIDTH]; MAX_FIELDS]; M];
        for field in 0..fields.count {
            for half in 0..fields.places.div_ceil(8) {
                let halves = sums.each_mut().map(|sums| &mut sums[field][half * 8..half * 8 + 8]);
                sum_half(lines, weights, fields, field, half, halves);
            }
        }
        sums
    }
}

/// Sums of one field for eight places. Products of a byte and a code of up to 4 bits fit in 16 bits, two at a time;
/// codes of 8 bit are summed by their halves.
#[inline(always)]
fn sum_half<const M: usize>(
    lines: &[Line],
    weights: Weights<M>,
    fields: Fields,
    field: usize,
    half: usize,
    out: [&mut [i32]; M],
) {
    let wide = fields.width == 8;
    let Weights { high, low } = weights;
    // SAFETY: as above; 32 bytes of a line are read, and 8 numbers are written.
    unsafe {
        let shift = _mm_cvtsi32_si128(fields.shift(field) as i32);
        let mask = _mm256_set1_epi8((fields.mask() & 15) as i8);
        // [high byte of the weight, low byte] of the code, and of the upper half of a code of 8 bit.
        let factors = [256, 1, 4096, 16].map(|factor| _mm256_set1_epi16(factor));
        let mut sums = [_mm256_setzero_si256(); M];
        for (index, line) in lines.iter().enumerate() {
            let bytes = _mm256_load_si256(line.0[half * 32..].as_ptr().cast());
            let codes = _mm256_and_si256(_mm256_srl_epi16(bytes, shift), mask);
            for i in 0..M {
                let [high, low] = [high[i][index], low[i][index]].map(|weights| _mm256_set1_epi32(weights));
                let product = |codes, weights, factor| _mm256_madd_epi16(_mm256_maddubs_epi16(codes, weights), factor);
                let mut sum = _mm256_add_epi32(product(codes, high, factors[0]), product(codes, low, factors[1]));
                if wide {
                    let upper = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
                    sum = _mm256_add_epi32(sum, product(upper, high, factors[2]));
                    sum = _mm256_add_epi32(sum, product(upper, low, factors[3]));
                }
                sums[i] = _mm256_add_epi32(sums[i], sum);
            }
        }
        for (out, sum) in out.into_iter().zip(sums) {
            let out: &mut [i32; 8] = out.try_into().expect("eight places");
            _mm256_storeu_si256(out.as_mut_ptr().cast(), sum);
        }
    }
}
