//! Quantised weights as llama.cpp's files hold them: rows of blocks, each of codes with their scales.

use candle_core::quantized::GgmlType;
use candle_core::quantized::k_quants::{
    BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0, BlockQ8K,
};
use std::borrow::Cow;

/// A format of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 8 bits, 32 numbers share a scale.
    Q8_0,
    /// 4 bits, 32 numbers share a scale.
    Q4_0,
    /// 4 bits, 32 numbers share a scale and a minimum.
    Q4_1,
    /// 5 bits, 32 numbers share a scale: what llama.cpp takes instead of Q4_K where rows are no multiple of 256.
    Q5_0,
    /// 5 bits, 32 numbers share a scale and a minimum: what it takes instead of Q5_K.
    Q5_1,
    /// 2 bits with a scale and a minimum of 4 bits for 16 numbers, in blocks of 256.
    Q2K,
    /// 3 bits with a scale of 6 bits for 16 numbers, in blocks of 256.
    Q3K,
    /// 4 bits with a scale and a minimum of 6 bits for 32 numbers, in blocks of 256.
    Q4K,
    /// 5 bits with a scale and a minimum of 6 bits for 32 numbers, in blocks of 256.
    Q5K,
    /// 6 bits with a scale of 8 bits for 16 numbers, in blocks of 256.
    Q6K,
    /// 8 bits, 256 numbers share a scale in single precision.
    Q8K,
}

impl BlockType {
    /// The name that llama.cpp uses.
    pub const fn name(self) -> &'static str {
        match self {
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q4_1 => "Q4_1",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q2K => "Q2_K",
            BlockType::Q3K => "Q3_K",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
            BlockType::Q8K => "Q8_K",
        }
    }

    /// Numbers of a block.
    pub const fn numbers(self) -> usize {
        crate::with_block_type!(self, |T| <T as GgmlType>::BLCK_SIZE)
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        crate::with_block_type!(self, |T| size_of::<T>())
    }

    /// The numbers of some blocks, widened. Blocks are whole: `out` holds the numbers of all.
    pub(crate) fn widen(self, words: &[u16], out: &mut [f32]) {
        crate::with_blocks!(self, words, |blocks| widen(blocks, out));
    }
}

fn widen<T: Block>(blocks: &[T], out: &mut [f32]) {
    T::to_float(blocks, out);
}

/// A block that lies in a file as it does in memory.
///
/// # Safety
/// The type has no padding and no reference, and is valid for all bits.
pub unsafe trait Block: GgmlType + 'static {}

macro_rules! block {
    ($($name:ident),*) => {
        $(
            const _: () = assert!(size_of::<$name>().is_multiple_of(2));
            // SAFETY: `repr(C)` over floats, integers and arrays of bytes; its size is the sum of theirs, as the crate
            // that defines it asserts.
            unsafe impl Block for $name {}
        )*
    };
}
block!(
    BlockQ8_0, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, BlockQ8K
);

/// The blocks in some words; a rest that is no whole block is left out. They are copied where the words do not lie as the
/// type must, which is only possible for Q8_K.
pub fn cast_blocks<T: Block>(words: &[u16]) -> Cow<'_, [T]> {
    let count = size_of_val(words) / size_of::<T>();
    let first = words.as_ptr().cast::<T>();
    if first.is_aligned() {
        // SAFETY: `T` is valid for all bits, the blocks are aligned, and the words outlive them.
        return Cow::Borrowed(unsafe { std::slice::from_raw_parts(first, count) });
    }
    // SAFETY: `T` is valid for all bits, and so many blocks lie in the words.
    (0..count).map(|block| unsafe { first.add(block).read_unaligned() }).collect()
}

/// Runs an expression with the type of block that a [`BlockType`] says.
#[macro_export]
macro_rules! with_block_type {
    ($kind:expr, |$block:ident| $body:expr) => {
        $crate::with_block_type!(
            @ $kind, $block, $body,
            Q8_0 BlockQ8_0, Q4_0 BlockQ4_0, Q4_1 BlockQ4_1, Q5_0 BlockQ5_0, Q5_1 BlockQ5_1, Q2K BlockQ2K,
            Q3K BlockQ3K, Q4K BlockQ4K, Q5K BlockQ5K, Q6K BlockQ6K, Q8K BlockQ8K
        )
    };
    (@ $kind:expr, $block:ident, $body:expr, $($name:ident $type:ident),*) => {
        match $kind {
            $($crate::BlockType::$name => {
                type $block = $crate::candle_core::quantized::k_quants::$type;
                $body
            })*
        }
    };
}

/// Runs an expression on the blocks in some words, as the type that a [`BlockType`] says.
#[macro_export]
macro_rules! with_blocks {
    ($kind:expr, $words:expr, |$blocks:ident| $body:expr) => {
        $crate::with_block_type!($kind, |T| {
            let blocks = $crate::cast_blocks::<T>($words);
            let $blocks = &*blocks;
            $body
        })
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_lie_where_they_may() {
        let bytes: Vec<u8> = (0..2 * size_of::<BlockQ8K>() + 4).map(|i| i as u8 % 64).collect();
        let words: Vec<u16> = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        let mut copied = 0;
        for first in 0..2 {
            let blocks = cast_blocks::<BlockQ8K>(&words[first..]);
            copied += usize::from(matches!(blocks, Cow::Owned(_)));
            let mut numbers = [0.0; 512];
            BlockQ8K::to_float(&blocks, &mut numbers);
            let of = |block: usize, i: usize| {
                let at = 2 * first + block * size_of::<BlockQ8K>();
                let scale = f32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                scale * f32::from(bytes[at + 4 + i] as i8)
            };
            assert_eq!([numbers[0], numbers[511]], [of(0, 0), of(1, 255)]);
        }
        assert_eq!(copied, 1);
    }
}
