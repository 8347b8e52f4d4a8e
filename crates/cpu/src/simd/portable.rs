use super::{BASELINE_FMA, Lanes, WIDTH, mul_add};
use crate::element::Element;
use half::{bf16, f16};

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; WIDTH]);

impl Lanes for Portable {
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Portable([value; WIDTH])
    }

    #[inline(always)]
    fn load(values: &[f32; WIDTH]) -> Self {
        Portable(*values)
    }

    #[inline(always)]
    fn load_f16(values: &[f16; WIDTH]) -> Self {
        Portable(values.map(Element::widen))
    }

    #[inline(always)]
    fn load_bf16(values: &[bf16; WIDTH]) -> Self {
        Portable(values.map(Element::widen))
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        let product = |lane: usize| mul_add::<BASELINE_FMA>(self.0[lane], factor.0[lane], addend.0[lane]);
        Portable(std::array::from_fn(product))
    }

    #[inline(always)]
    fn store(self, values: &mut [f32; WIDTH]) {
        *values = self.0;
    }
}
