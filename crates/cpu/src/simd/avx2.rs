use super::{Lanes, WIDTH};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Two AVX registers.
#[derive(Clone, Copy)]
pub(crate) struct Avx2([__m256; 2]);

// Every block below is sound for the same reason: by the contract of `Lanes` this type is used only where the
// processor has AVX2, FMA and F16C, and pointers stay within references to 16 numbers.
impl Lanes for Avx2 {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: the instruction set is there (contract of `Lanes`).
        Avx2(unsafe { [_mm256_set1_ps(value); 2] })
    }

    #[inline(always)]
    fn load(values: &[f32; WIDTH]) -> Self {
        let start = values.as_ptr();
        // SAFETY: as above; 16 numbers are readable.
        Avx2(unsafe { [_mm256_loadu_ps(start), _mm256_loadu_ps(start.add(8))] })
    }

    #[inline(always)]
    fn load_f16(values: &[f16; WIDTH]) -> Self {
        let start = values.as_ptr();
        // SAFETY: as above.
        Avx2(unsafe {
            [_mm256_cvtph_ps(_mm_loadu_si128(start.cast())), _mm256_cvtph_ps(_mm_loadu_si128(start.add(8).cast()))]
        })
    }

    #[inline(always)]
    fn load_bf16(values: &[bf16; WIDTH]) -> Self {
        let start = values.as_ptr();
        // SAFETY: as above.
        Avx2(unsafe {
            [start, start.add(8)].map(|start| {
                let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(start.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
            })
        })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as above.
        Avx2(unsafe {
            [_mm256_fmadd_ps(self.0[0], factor.0[0], addend.0[0]), _mm256_fmadd_ps(self.0[1], factor.0[1], addend.0[1])]
        })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; WIDTH]) {
        let start = values.as_mut_ptr();
        // SAFETY: as above; 16 numbers are writable.
        unsafe {
            _mm256_storeu_ps(start, self.0[0]);
            _mm256_storeu_ps(start.add(8), self.0[1]);
        }
    }
}
