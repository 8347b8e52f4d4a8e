use super::{STEP, TILE};
use half::bf16;
use rayon::prelude::*;
use std::ops::Range;

/// A tile of activations: of each pair of neighbours along `k`, those of 16 rows.
pub(super) type Tile = [[[bf16; 2]; TILE]; STEP / 2];

/// A step of 32 along `k`: the activations rounded to bf16, and what that leaves, rounded again.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Step(pub [Tile; 2]);

/// Activations as the matrix unit reads them: `[16 rows][step]`, zeros where there are fewer rows.
#[derive(Default)]
pub(super) struct Panel {
    steps: Vec<Step>,
    /// Steps of a block of 16 rows.
    count: usize,
}

impl Panel {
    /// Numbers along `k` that are laid out at once: those of 128 rows take 1 MiB, which stays in the second cache.
    pub const MAX_K: usize = 2048;

    /// Lays out the numbers `own` of each of the first `rows` rows of `x`, which have `k` numbers.
    pub fn load(&mut self, x: &[f32], rows: usize, k: usize, own: Range<usize>) {
        self.count = own.len() / STEP;
        let nothing = Step([[[[bf16::ZERO; 2]; TILE]; STEP / 2]; 2]);
        self.steps.resize(rows.div_ceil(TILE) * self.count, nothing);
        self.steps.par_chunks_exact_mut(self.count).enumerate().for_each(|(block, steps)| {
            let rows = block * TILE..rows.min(block * TILE + TILE);
            for (index, step) in steps.iter_mut().enumerate() {
                if rows.len() < TILE {
                    *step = nothing;
                }
                let start = own.start + index * STEP;
                for (place, row) in rows.clone().enumerate() {
                    let (pairs, _) = x[row * k + start..][..STEP].as_chunks::<2>();
                    for (pair, numbers) in pairs.iter().enumerate() {
                        let high = numbers.map(round);
                        let low = [0, 1].map(|i| round(numbers[i] - high[i].to_f32()));
                        step.0[0][pair][place] = high;
                        step.0[1][pair][place] = low;
                    }
                }
            }
        });
    }

    /// Blocks of 16 rows.
    pub fn blocks(&self) -> usize {
        self.steps.len() / self.count
    }

    /// The steps of a block.
    pub fn block(&self, block: usize) -> &[Step] {
        &self.steps[block * self.count..(block + 1) * self.count]
    }
}

/// To the nearest bf16, ties to even; what is not finite is not finite afterwards.
#[inline(always)]
fn round(value: f32) -> bf16 {
    let bits = value.to_bits();
    let finite = bits & 0x7f80_0000 != 0x7f80_0000;
    let rounded = match finite {
        true => (bits + 0x7fff + (bits >> 16 & 1)) >> 16,
        // The low bits of what is no number must not be lost: they may be all that tells it from infinity.
        false => bits >> 16 | u32::from(bits & 0xffff != 0),
    };
    bf16::from_bits(rounded as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_that_of_half() {
        for bits in (0..=u32::MAX).step_by(9973) {
            let value = f32::from_bits(bits);
            let (ours, theirs) = (round(value), bf16::from_f32(value));
            assert!(ours == theirs || (value.is_nan() && ours.is_nan()), "{bits:#x}: {ours} is not {theirs}");
        }
        for value in [f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(round(value), bf16::from_f32(value));
        }
    }
}
