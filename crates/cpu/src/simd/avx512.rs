use super::{Lanes, WIDTH};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// One AVX-512 register.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

// Every block below is sound for the same reason: by the contract of `Lanes` this type is used only where the
// processor has AVX-512 F, BW, DQ and VL, and pointers come from references to 16 numbers.
impl Lanes for Avx512 {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: the instruction set is there (contract of `Lanes`).
        Avx512(unsafe { _mm512_set1_ps(value) })
    }

    #[inline(always)]
    fn load(values: &[f32; WIDTH]) -> Self {
        // SAFETY: as above; 16 numbers are readable.
        Avx512(unsafe { _mm512_loadu_ps(values.as_ptr()) })
    }

    #[inline(always)]
    fn load_f16(values: &[f16; WIDTH]) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(values.as_ptr().cast())) })
    }

    #[inline(always)]
    fn load_bf16(values: &[bf16; WIDTH]) -> Self {
        // SAFETY: as above.
        Avx512(unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(values.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as above.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; WIDTH]) {
        // SAFETY: as above; 16 numbers are writable.
        unsafe { _mm512_storeu_ps(values.as_mut_ptr(), self.0) }
    }
}
