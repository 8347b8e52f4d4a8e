//! Blocks that no kernel multiplies: their numbers are widened when they are loaded.

use dibit_device::{DType, Tensor};
use half::f16;

/// What the codes of IQ4_NL and IQ4_XS stand for, before their scale: levels close together around zero.
const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The magnitudes of four-bit floats (one sign, two exponent bits, one fraction bit), doubled.
const MAGNITUDES: [f32; 8] = [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0];

const GROUP: usize = Packed::GROUP;

/// A format of blocks that are widened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packed {
    /// A scale in fp16 and 32 codes of 4 bits for uneven levels.
    Iq4Nl,
    /// The same levels in blocks of 256: a scale in fp16, and one of 6 bits for 32 numbers.
    Iq4Xs,
    /// A power of two and 32 floats of 4 bits.
    Mxfp4,
}

impl Packed {
    /// Numbers that share a scale.
    pub const GROUP: usize = 32;

    /// The matrix of MXFP4 whose powers of two lie apart from its codes, of which neighbours share a byte (gpt-oss).
    pub fn widen_mxfp4(codes: &[u8], exponents: &[u8], rows: usize, cols: usize) -> Tensor {
        let (width, groups) = (cols / 2, cols / GROUP);
        Tensor::from_blocks(Packed::Mxfp4.dtype(), rows, cols, 1, |row, out| {
            let codes = codes[row * width..(row + 1) * width].chunks_exact(GROUP / 2);
            let all = codes.zip(&exponents[row * groups..(row + 1) * groups]).zip(out.chunks_exact_mut(GROUP));
            for ((codes, exponent), out) in all {
                let scale = mxfp4_scale(*exponent);
                for (code, out) in codes.iter().zip(out.chunks_exact_mut(2)) {
                    (out[0], out[1]) = (mxfp4(code & 15, scale), mxfp4(code >> 4, scale));
                }
            }
        })
    }

    /// The name that llama.cpp uses.
    pub const fn name(self) -> &'static str {
        match self {
            Packed::Iq4Nl => "IQ4_NL",
            Packed::Iq4Xs => "IQ4_XS",
            Packed::Mxfp4 => "MXFP4",
        }
    }

    /// Numbers of a block.
    const fn numbers(self) -> usize {
        match self {
            Packed::Iq4Nl | Packed::Mxfp4 => GROUP,
            Packed::Iq4Xs => 8 * GROUP,
        }
    }

    /// Bytes of a block.
    const fn block_bytes(self) -> usize {
        match self {
            Packed::Iq4Nl => 2 + GROUP / 2,
            Packed::Iq4Xs => 2 + 2 + 4 + 8 * GROUP / 2,
            Packed::Mxfp4 => 1 + GROUP / 2,
        }
    }

    /// What the numbers are widened to. bf16 holds a two-bit fraction and any power of two as they are. A level times a
    /// scale has up to 18 bits; of these f16 keeps 11, as many as the scale has, in half the memory of f32.
    pub const fn dtype(self) -> DType {
        match self {
            Packed::Iq4Nl | Packed::Iq4Xs => DType::F16,
            Packed::Mxfp4 => DType::Bf16,
        }
    }

    /// Bytes of a matrix; `None` where rows are no whole blocks, or there is no such number.
    pub fn bytes(self, rows: usize, cols: usize) -> Option<usize> {
        let row = cols.is_multiple_of(self.numbers()).then(|| cols / self.numbers() * self.block_bytes())?;
        row.checked_mul(rows)
    }

    /// The matrix in these bytes, of which there are as many as [`Packed::bytes`] says.
    pub fn widen(self, bytes: &[u8], rows: usize, cols: usize) -> Tensor {
        let width = bytes.len() / rows.max(1);
        Tensor::from_blocks(self.dtype(), rows, cols, 1, |row, out| {
            let blocks = bytes[row * width..(row + 1) * width].chunks_exact(self.block_bytes());
            for (block, out) in blocks.zip(out.chunks_exact_mut(self.numbers())) {
                self.widen_block(block, out);
            }
        })
    }

    fn widen_block(self, block: &[u8], out: &mut [f32]) {
        let level = |code: u8| f32::from(LEVELS[usize::from(code)]);
        match self {
            Packed::Iq4Nl => {
                let (scale, codes) = block.split_at(2);
                let scale = f16::from_le_bytes([scale[0], scale[1]]).to_f32();
                halves(codes, out, |code| scale * level(code));
            }
            Packed::Iq4Xs => {
                let (scales, codes) = block.split_at(8);
                let scale = f16::from_le_bytes([scales[0], scales[1]]).to_f32();
                let high = u16::from_le_bytes([scales[2], scales[3]]);
                let groups = codes.chunks_exact(GROUP / 2).zip(out.chunks_exact_mut(GROUP));
                for (group, (codes, out)) in groups.enumerate() {
                    let low = scales[4 + group / 2] >> (4 * (group % 2)) & 15;
                    let own = u16::from(low) | (high >> (2 * group) & 3) << 4;
                    let scale = scale * (f32::from(own) - 32.0);
                    halves(codes, out, |code| scale * level(code));
                }
            }
            Packed::Mxfp4 => {
                let (scale, codes) = (mxfp4_scale(block[0]), &block[1..]);
                halves(codes, out, |code| mxfp4(code, scale));
            }
        }
    }
}

/// Half of 2^(exponent - 127), as magnitudes are doubled; the smallest two are subnormal.
fn mxfp4_scale(exponent: u8) -> f32 {
    match u32::from(exponent) {
        exponent @ 0..=1 => f32::from_bits(1 << (21 + exponent)),
        exponent => f32::from_bits((exponent - 1) << 23),
    }
}

/// The number of a code of MXFP4.
fn mxfp4(code: u8, scale: f32) -> f32 {
    let magnitude = scale * MAGNITUDES[usize::from(code & 7)];
    if code & 8 == 0 { magnitude } else { -magnitude }
}

/// The numbers of a group of codes of 4 bits: the low halves of all bytes, then the high ones.
fn halves(codes: &[u8], out: &mut [f32], number: impl Fn(u8) -> f32) {
    let (low, high) = out.split_at_mut(codes.len());
    for ((code, low), high) in codes.iter().zip(low).zip(high) {
        *low = number(code & 15);
        *high = number(code >> 4);
    }
}
