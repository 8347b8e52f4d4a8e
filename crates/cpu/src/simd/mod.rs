//! Sixteen f32 lanes on every instruction set.
//!
//! Kernels are written once over [`Lanes`]. Each lane computes the same whatever the instruction set, except that
//! the portable implementation fuses multiplication and addition only where the target does.

#[cfg(target_arch = "x86_64")]
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx_state;
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod isa;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub use isa::Isa;
pub(crate) use isa::{BASELINE_FMA, dispatch, mul_add};
#[cfg(target_arch = "aarch64")]
pub(crate) use neon::Neon;
pub(crate) use portable::Portable;

use half::{bf16, f16};

/// Number of lanes.
pub(crate) const WIDTH: usize = 16;

/// Sixteen f32 numbers. A type of an instruction set is only used inside functions that [`dispatch`] compiled for
/// that instruction set and calls where the machine has it.
pub(crate) trait Lanes: Copy {
    /// The same number in every lane.
    fn splat(value: f32) -> Self;
    /// These numbers.
    fn load(values: &[f32; WIDTH]) -> Self;
    /// These numbers, widened.
    fn load_f16(values: &[f16; WIDTH]) -> Self;
    /// These numbers, widened.
    fn load_bf16(values: &[bf16; WIDTH]) -> Self;
    /// `self * factor + addend`, fused.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Writes the lanes.
    fn store(self, values: &mut [f32; WIDTH]);

    /// The sum of all lanes, by a fixed tree: lane `i` joins lane `i + 8`, then `i + 4`, `i + 2`, `i + 1`.
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut lanes = [0f32; WIDTH];
        self.store(&mut lanes);
        join(lanes)
    }
}

/// Bytes that come from memory together.
pub(crate) const CACHE_LINE: usize = 64;

/// Asks for cache line `index` of bytes that are about to be read, if there is one.
#[inline(always)]
pub(crate) fn prefetch(bytes: &[u8], index: usize) {
    if let Some(byte) = bytes.get(index * CACHE_LINE) {
        prefetch_at(byte);
    }
}

/// Asks for the cache line at an address, whatever is there. Where no instruction does that, it is read when it is.
#[inline(always)]
pub(crate) fn prefetch_at<T>(address: *const T) {
    // SAFETY: every x86-64 processor has SSE, and a prefetch reads nothing that the program could see: it may have any
    // address.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(address.cast());
    }
    // SAFETY: as above; every AArch64 processor has the instruction, and it changes no register.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) address, options(readonly, nostack, preserves_flags))
    };
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// The tree of [`Lanes::sum`].
#[inline(always)]
pub(crate) fn join(mut lanes: [f32; WIDTH]) -> f32 {
    let mut half = WIDTH / 2;
    while half > 0 {
        for lane in 0..half {
            lanes[lane] += lanes[lane + half];
        }
        half /= 2;
    }
    lanes[0]
}
