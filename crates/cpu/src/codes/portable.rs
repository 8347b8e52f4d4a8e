use super::{Fields, Kernel, Line, MAX_FIELDS, QUAD, Sums, WIDTH, Weights};

/// Plain Rust.
pub(super) struct Portable;

impl Kernel for Portable {
    #[inline(always)]
    fn interleave(bytes: &[u8], stride: usize, lines: &mut [Line]) {
        for (index, line) in lines.iter_mut().enumerate() {
            let rows: [&[u8; WIDTH]; QUAD] =
                std::array::from_fn(|i| bytes[(index * QUAD + i) * stride..][..WIDTH].try_into().expect("WIDTH bytes"));
            for (place, quad) in line.0.chunks_exact_mut(QUAD).enumerate() {
                for (byte, row) in quad.iter_mut().zip(rows) {
                    *byte = row[place];
                }
            }
        }
    }

    #[inline(always)]
    fn sum<const M: usize>(lines: &[Line], weights: Weights<M>, fields: Fields, _: &[u8]) -> Sums<M> {
        let mut sums = [[[0; WIDTH]; MAX_FIELDS]; M];
        for (index, line) in lines.iter().enumerate() {
            for (i, sums) in sums.iter_mut().enumerate() {
                let (high, low) = (weights.high[i][index].to_ne_bytes(), weights.low[i][index].to_ne_bytes());
                let weights: [i32; QUAD] =
                    std::array::from_fn(|row| 256 * i32::from(high[row] as i8) + i32::from(low[row] as i8));
                for (field, sums) in sums[..fields.count].iter_mut().enumerate() {
                    let (shift, mask) = (fields.shift(field), fields.mask());
                    for (sum, quad) in sums.iter_mut().zip(line.0.chunks_exact(QUAD)) {
                        for (weight, byte) in weights.iter().zip(quad) {
                            *sum += weight * i32::from((byte >> shift) & mask);
                        }
                    }
                }
            }
        }
        sums
    }
}
