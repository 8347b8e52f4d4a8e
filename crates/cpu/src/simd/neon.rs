use super::{Lanes, WIDTH};
use half::{bf16, f16};
use std::arch::aarch64::*;

/// Four NEON registers.
#[derive(Clone, Copy)]
pub(crate) struct Neon([float32x4_t; 4]);

// Every block below is sound for the same reason: every AArch64 processor that Rust's standard library runs on has
// NEON, and pointers stay within references to 16 numbers.
impl Lanes for Neon {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        // SAFETY: the instruction set is there (see above).
        Neon(unsafe { [vdupq_n_f32(value); 4] })
    }

    #[inline(always)]
    fn load(values: &[f32; WIDTH]) -> Self {
        let start = values.as_ptr();
        // SAFETY: as above; 16 numbers are readable.
        Neon(unsafe { [vld1q_f32(start), vld1q_f32(start.add(4)), vld1q_f32(start.add(8)), vld1q_f32(start.add(12))] })
    }

    #[inline(always)]
    fn load_f16(values: &[f16; WIDTH]) -> Self {
        let start: *const u16 = values.as_ptr().cast();
        // SAFETY: as above; an f16 is its 16 bits.
        Neon(unsafe {
            let low = vreinterpretq_f16_u16(vld1q_u16(start));
            let high = vreinterpretq_f16_u16(vld1q_u16(start.add(8)));
            [
                vcvt_f32_f16(vget_low_f16(low)),
                vcvt_high_f32_f16(low),
                vcvt_f32_f16(vget_low_f16(high)),
                vcvt_high_f32_f16(high),
            ]
        })
    }

    #[inline(always)]
    fn load_bf16(values: &[bf16; WIDTH]) -> Self {
        let start: *const u16 = values.as_ptr().cast();
        // SAFETY: as above; a bf16 is its 16 bits.
        Neon(unsafe {
            let (low, high) = (vld1q_u16(start), vld1q_u16(start.add(8)));
            [
                vshll_n_u16::<16>(vget_low_u16(low)),
                vshll_high_n_u16::<16>(low),
                vshll_n_u16::<16>(vget_low_u16(high)),
                vshll_high_n_u16::<16>(high),
            ]
            .map(|wide| vreinterpretq_f32_u32(wide))
        })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: as above.
        Neon(std::array::from_fn(|i| unsafe { vfmaq_f32(addend.0[i], self.0[i], factor.0[i]) }))
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; WIDTH]) {
        let start = values.as_mut_ptr();
        // SAFETY: as above; 16 numbers are writable.
        unsafe {
            vst1q_f32(start, self.0[0]);
            vst1q_f32(start.add(4), self.0[1]);
            vst1q_f32(start.add(8), self.0[2]);
            vst1q_f32(start.add(12), self.0[3]);
        }
    }
}
