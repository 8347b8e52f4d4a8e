//! Planar packing of unsigned codes.
//!
//! A row of `n` lanes takes `stride = ceil(n / per_byte)` bytes. Lane `i` lies in byte `i % stride`,
//! in the bit field number `i / stride` counted from the low end. Unpacking one bit field of
//! consecutive bytes therefore yields consecutive lanes, with one shift and one mask.

use crate::QuantError;

/// Width of a packed code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// 2 bits, codes 0 to 3.
    Two,
    /// 4 bits, codes 0 to 15.
    Four,
    /// 8 bits, codes 0 to 255.
    Eight,
}

impl Bits {
    /// Number of bits of one code.
    pub const fn count(self) -> usize {
        match self {
            Bits::Two => 2,
            Bits::Four => 4,
            Bits::Eight => 8,
        }
    }

    /// Largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u8 {
        match self {
            Bits::Two => 3,
            Bits::Four => 15,
            Bits::Eight => 255,
        }
    }

    /// Codes in a byte.
    pub const fn per_byte(self) -> usize {
        8 / self.count()
    }
}

impl TryFrom<u32> for Bits {
    type Error = QuantError;

    fn try_from(count: u32) -> Result<Self, QuantError> {
        match count {
            2 => Ok(Bits::Two),
            4 => Ok(Bits::Four),
            8 => Ok(Bits::Eight),
            other => Err(QuantError::Bits(other)),
        }
    }
}

/// Bytes taken by a packed row of `lanes` codes.
pub const fn packed_len(bits: Bits, lanes: usize) -> usize {
    lanes.div_ceil(bits.per_byte())
}

/// Packs `codes` into `out`, overwriting it. Codes above the maximum are masked to their low bits.
///
/// # Panics
/// If `out` is not exactly [`packed_len`] bytes long.
pub fn pack(bits: Bits, codes: &[u8], out: &mut [u8]) {
    let stride = packed_len(bits, codes.len());
    assert_eq!(out.len(), stride, "packed row of {} codes", codes.len());
    out.fill(0);
    if stride == 0 {
        return;
    }
    for (field, lanes) in codes.chunks(stride).enumerate() {
        let shift = field * bits.count();
        for (byte, &code) in out.iter_mut().zip(lanes) {
            *byte |= (code & bits.max_code()) << shift;
        }
    }
}

/// Unpacks `packed` into `codes`; the inverse of [`pack`].
///
/// # Panics
/// If `packed` is not exactly [`packed_len`] bytes long.
pub fn unpack(bits: Bits, packed: &[u8], codes: &mut [u8]) {
    let stride = packed_len(bits, codes.len());
    assert_eq!(packed.len(), stride, "packed row of {} codes", codes.len());
    if stride == 0 {
        return;
    }
    for (field, lanes) in codes.chunks_mut(stride).enumerate() {
        let shift = field * bits.count();
        for (code, &byte) in lanes.iter_mut().zip(packed) {
            *code = (byte >> shift) & bits.max_code();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: [Bits; 3] = [Bits::Two, Bits::Four, Bits::Eight];

    #[test]
    fn planes_are_contiguous() {
        let codes: Vec<u8> = (0..8).map(|i| i % 4).collect();
        let mut packed = [0u8; 2];
        pack(Bits::Two, &codes, &mut packed);
        // Byte 0 holds lanes 0, 2, 4, 6 and byte 1 holds lanes 1, 3, 5, 7.
        assert_eq!(packed, [0b10_00_10_00, 0b11_01_11_01]);
    }

    #[test]
    fn widths_come_from_numbers() {
        for bits in ALL {
            assert_eq!(Bits::try_from(bits.count() as u32), Ok(bits));
            assert_eq!(1usize << bits.count(), bits.max_code() as usize + 1);
        }
        assert_eq!(Bits::try_from(5), Err(QuantError::Bits(5)));
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(raw in prop::collection::vec(any::<u8>(), 0..300), which in 0usize..3) {
            let bits = ALL[which];
            let codes: Vec<u8> = raw.iter().map(|c| c & bits.max_code()).collect();
            let mut packed = vec![0xa5; packed_len(bits, codes.len())];
            pack(bits, &codes, &mut packed);
            let mut back = vec![0xff; codes.len()];
            unpack(bits, &packed, &mut back);
            prop_assert_eq!(back, codes);
        }
    }
}
