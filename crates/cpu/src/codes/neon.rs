use super::{Fields, Kernel, Line, MAX_FIELDS, QUAD, Sums, WIDTH, Weights};
use crate::simd::prefetch;
use std::arch::aarch64::*;
use std::array::from_fn;

/// NEON.
pub(super) struct Neon;

// Every block below is sound for the same reason: every AArch64 processor that Rust's standard library runs on has NEON,
// and pointers stay within the references they come from.
impl Kernel for Neon {
    #[inline(always)]
    fn interleave(bytes: &[u8], stride: usize, lines: &mut [Line]) {
        for (index, line) in lines.iter_mut().enumerate() {
            let rows = &bytes[index * QUAD * stride..];
            let row = |i: usize| -> &[u8; WIDTH] { rows[i * stride..][..WIDTH].try_into().expect("WIDTH bytes") };
            // SAFETY: as above; each row has 16 bytes, and a `Line` 64.
            unsafe {
                let [a, b, c, d] = [row(0), row(1), row(2), row(3)].map(|row| vld1q_u8(row.as_ptr()));
                vst4q_u8(line.0.as_mut_ptr(), uint8x16x4_t(a, b, c, d));
            }
        }
    }

    #[inline(always)]
    fn sum<const M: usize>(lines: &[Line], weights: Weights<M>, fields: Fields, ahead: &[u8]) -> Sums<M> {
        for index in 0..lines.len() {
            prefetch(ahead, index);
        }
        let mut sums = [[[0; WIDTH]; MAX_FIELDS]; M];
        match fields.count {
            1 => sum::<M, 1>(lines, weights, fields, 0, &mut sums),
            2 => sum::<M, 2>(lines, weights, fields, 0, &mut sums),
            _ => {
                sum::<M, 2>(lines, weights, fields, 0, &mut sums);
                sum::<M, 2>(lines, weights, fields, 2, &mut sums);
            }
        }
        sums
    }
}

/// `F` fields from `first` on: for 2 queries the sums of 2 fields are half of the registers. Codes are multiplied where
/// they stand in their byte, and sums divided by what that is too much.
#[inline(always)]
fn sum<const M: usize, const F: usize>(
    lines: &[Line],
    weights: Weights<M>,
    fields: Fields,
    first: usize,
    out: &mut Sums<M>,
) {
    let high: [&[i32]; M] = from_fn(|i| &weights.high[i][..lines.len()]);
    let low: [&[i32]; M] = from_fn(|i| &weights.low[i][..lines.len()]);
    // SAFETY: as above; a `Line` is 64 bytes, and 16 numbers are writable.
    unsafe {
        let masks: [uint8x16_t; F] = from_fn(|field| vdupq_n_u8(fields.mask() << fields.shift(first + field)));
        let mut sums = [[[vdupq_n_s32(0); 4]; M]; F];
        for (index, line) in lines.iter().enumerate() {
            let uint8x16x4_t(a, b, c, d) = vld4q_u8(line.0.as_ptr());
            let weights: [int16x4_t; M] = from_fn(|i| join(high[i][index], low[i][index]));
            for (sums, mask) in sums.iter_mut().zip(masks) {
                add::<M, 0>(sums, vandq_u8(a, mask), weights);
                add::<M, 1>(sums, vandq_u8(b, mask), weights);
                add::<M, 2>(sums, vandq_u8(c, mask), weights);
                add::<M, 3>(sums, vandq_u8(d, mask), weights);
            }
        }
        for (field, sums) in sums.into_iter().enumerate() {
            let shift = vdupq_n_s32(-(fields.shift(first + field) as i32));
            for (out, sums) in out.iter_mut().zip(sums) {
                for (out, sum) in out[first + field].chunks_exact_mut(4).zip(sums) {
                    vst1q_s32(out.as_mut_ptr(), vshlq_s32(sum, shift));
                }
            }
        }
    }
}

/// The weights of four rows.
#[inline(always)]
fn join(high: i32, low: i32) -> int16x4_t {
    let bytes = u64::from(high as u32) | u64::from(low as u32) << 32;
    // SAFETY: as above.
    unsafe {
        let bytes = vmovl_s8(vcreate_s8(bytes));
        vadd_s16(vshl_n_s16::<8>(vget_low_s16(bytes)), vget_high_s16(bytes))
    }
}

/// Adds the products of row `ROW` of a line.
#[inline(always)]
fn add<const M: usize, const ROW: i32>(sums: &mut [[int32x4_t; 4]; M], codes: uint8x16_t, weights: [int16x4_t; M]) {
    // SAFETY: as above.
    unsafe {
        let low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(codes)));
        let high = vreinterpretq_s16_u16(vmovl_high_u8(codes));
        for ([a, b, c, d], weights) in sums.iter_mut().zip(weights) {
            *a = vmlal_lane_s16::<ROW>(*a, vget_low_s16(low), weights);
            *b = vmlal_high_lane_s16::<ROW>(*b, low, weights);
            *c = vmlal_lane_s16::<ROW>(*c, vget_low_s16(high), weights);
            *d = vmlal_high_lane_s16::<ROW>(*d, high, weights);
        }
    }
}
