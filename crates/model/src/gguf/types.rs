//! Types of tensors, by the numbers that files have for them.

use super::widen::Packed;
use crate::checkpoint::Format;
use dibit_device::{BlockType, DType};

/// Types of tensors that are read.
pub(crate) const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, \
     Q8_K, IQ4_NL, IQ4_XS, MXFP4";

/// How numbers of the type `kind` are stored; `None` where they are not read.
pub(super) fn format(kind: u32) -> Option<Format> {
    Some(match kind {
        0 => Format::Numbers(DType::F32),
        1 => Format::Numbers(DType::F16),
        30 => Format::Numbers(DType::Bf16),
        2 => Format::Blocks(BlockType::Q4_0),
        3 => Format::Blocks(BlockType::Q4_1),
        6 => Format::Blocks(BlockType::Q5_0),
        7 => Format::Blocks(BlockType::Q5_1),
        8 => Format::Blocks(BlockType::Q8_0),
        10 => Format::Blocks(BlockType::Q2K),
        11 => Format::Blocks(BlockType::Q3K),
        12 => Format::Blocks(BlockType::Q4K),
        13 => Format::Blocks(BlockType::Q5K),
        14 => Format::Blocks(BlockType::Q6K),
        15 => Format::Blocks(BlockType::Q8K),
        20 => Format::Packed(Packed::Iq4Nl),
        23 => Format::Packed(Packed::Iq4Xs),
        39 => Format::Packed(Packed::Mxfp4),
        _ => return None,
    })
}

/// The name of a type that is not read.
pub(super) fn name(kind: u32) -> String {
    let name = match kind {
        9 => "Q8_1",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        41 => "Q1_0",
        other => return other.to_string(),
    };
    name.to_owned()
}
