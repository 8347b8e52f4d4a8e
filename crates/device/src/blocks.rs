//! Quantised weights as llama.cpp's files hold them: rows of blocks, each of codes with their scales.

use candle_core::quantized::GgmlType;
use candle_core::quantized::k_quants::{BlockQ4_0, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0};

/// A format of blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 8 bits, 32 numbers share a scale.
    Q8_0,
    /// 4 bits, 32 numbers share a scale.
    Q4_0,
    /// 5 bits, 32 numbers share a scale: what llama.cpp takes instead of Q4_K where rows are no multiple of 256.
    Q5_0,
    /// 5 bits, 32 numbers share a scale and a minimum: what it takes instead of Q5_K.
    Q5_1,
    /// 4 bits with a scale and a minimum of 6 bits for 32 numbers, in blocks of 256.
    Q4K,
    /// 5 bits with a scale and a minimum of 6 bits for 32 numbers, in blocks of 256.
    Q5K,
    /// 6 bits with a scale of 8 bits for 16 numbers, in blocks of 256.
    Q6K,
}

impl BlockType {
    /// The name that llama.cpp uses.
    pub const fn name(self) -> &'static str {
        match self {
            BlockType::Q8_0 => "Q8_0",
            BlockType::Q4_0 => "Q4_0",
            BlockType::Q5_0 => "Q5_0",
            BlockType::Q5_1 => "Q5_1",
            BlockType::Q4K => "Q4_K",
            BlockType::Q5K => "Q5_K",
            BlockType::Q6K => "Q6_K",
        }
    }

    /// Numbers of a block.
    pub const fn numbers(self) -> usize {
        match self {
            BlockType::Q8_0 | BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q5_1 => 32,
            BlockType::Q4K | BlockType::Q5K | BlockType::Q6K => 256,
        }
    }

    /// Bytes of a block.
    pub const fn bytes(self) -> usize {
        match self {
            BlockType::Q8_0 => size_of::<BlockQ8_0>(),
            BlockType::Q4_0 => size_of::<BlockQ4_0>(),
            BlockType::Q5_0 => size_of::<BlockQ5_0>(),
            BlockType::Q5_1 => size_of::<BlockQ5_1>(),
            BlockType::Q4K => size_of::<BlockQ4K>(),
            BlockType::Q5K => size_of::<BlockQ5K>(),
            BlockType::Q6K => size_of::<BlockQ6K>(),
        }
    }

    /// The numbers of some blocks, widened. Blocks are whole: `out` holds the numbers of all.
    pub(crate) fn widen(self, words: &[u16], out: &mut [f32]) {
        with_blocks!(self, words, |blocks| widen(blocks, out));
    }
}

fn widen<T: Block>(blocks: &[T], out: &mut [f32]) {
    T::to_float(blocks, out);
}

/// A block that lies in a file as it does in memory.
///
/// # Safety
/// The type has no padding and no reference, is valid for all bits, and is aligned to 2.
pub(crate) unsafe trait Block: GgmlType + 'static {}

macro_rules! block {
    ($($name:ident),*) => {
        $(
            const _: () = assert!(align_of::<$name>() == 2 && size_of::<$name>().is_multiple_of(2));
            // SAFETY: `repr(C)` over 16-bit floats and arrays of bytes; its size is the sum of theirs, as the crate
            // that defines it asserts.
            unsafe impl Block for $name {}
        )*
    };
}
block!(BlockQ8_0, BlockQ4_0, BlockQ5_0, BlockQ5_1, BlockQ4K, BlockQ5K, BlockQ6K);

/// The blocks in some words; a rest that is no whole block is left out.
pub(crate) fn cast<T: Block>(words: &[u16]) -> &[T] {
    let count = size_of_val(words) / size_of::<T>();
    // SAFETY: `T` is valid for all bits and aligned as words are, and the words outlive the blocks.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), count) }
}

/// Runs an expression on the blocks in some words, as the type that a [`BlockType`] says.
macro_rules! with_blocks {
    ($kind:expr, $words:expr, |$blocks:ident| $body:expr) => {{
        use candle_core::quantized::k_quants;
        match $kind {
            $crate::BlockType::Q8_0 => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ8_0>($words);
                $body
            }
            $crate::BlockType::Q4_0 => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ4_0>($words);
                $body
            }
            $crate::BlockType::Q5_0 => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ5_0>($words);
                $body
            }
            $crate::BlockType::Q5_1 => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ5_1>($words);
                $body
            }
            $crate::BlockType::Q4K => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ4K>($words);
                $body
            }
            $crate::BlockType::Q5K => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ5K>($words);
                $body
            }
            $crate::BlockType::Q6K => {
                let $blocks = $crate::blocks::cast::<k_quants::BlockQ6K>($words);
                $body
            }
        }
    }};
}
pub(crate) use with_blocks;
