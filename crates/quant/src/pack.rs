//! Planar packing of unsigned codes.
//!
//! A row of `n` lanes takes `stride = ceil(n / per_byte)` bytes. Lane `i` lies in byte `i % stride`,
//! in the bit field number `i / stride` counted from the low end. Unpacking one bit field of
//! consecutive bytes therefore yields consecutive lanes, with one shift and one mask. Codes of three bits
//! are a packed row of their two low bits, followed by a packed row of their high bit; of five and six bits,
//! of their four low bits and of the others.
//!
//! Packing and unpacking are inlined, so that a caller that is compiled for more instructions uses them.

use crate::QuantError;

/// Width of a packed code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// 2 bits, codes 0 to 3.
    Two,
    /// 3 bits, codes 0 to 7.
    Three,
    /// 4 bits, codes 0 to 15.
    Four,
    /// 5 bits, codes 0 to 31.
    Five,
    /// 6 bits, codes 0 to 63.
    Six,
    /// 8 bits, codes 0 to 255.
    Eight,
}

/// Some bits of every code of a row, packed together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plane {
    /// Bits of a code in this plane.
    pub width: usize,
    /// Lowest of these bits in the code.
    pub shift: usize,
}

impl Plane {
    /// Bytes of a row of `lanes` codes in this plane.
    pub const fn stride(self, lanes: usize) -> usize {
        lanes.div_ceil(8 / self.width)
    }

    /// Its bits, at the low end.
    pub const fn mask(self) -> u8 {
        u8::MAX >> (8 - self.width)
    }
}

impl Bits {
    /// Every width.
    pub const ALL: [Bits; 6] = [Bits::Two, Bits::Three, Bits::Four, Bits::Five, Bits::Six, Bits::Eight];

    /// Number of bits of one code.
    pub const fn count(self) -> usize {
        match self {
            Bits::Two => 2,
            Bits::Three => 3,
            Bits::Four => 4,
            Bits::Five => 5,
            Bits::Six => 6,
            Bits::Eight => 8,
        }
    }

    /// Largest code, `2^bits - 1`.
    pub const fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.count())
    }

    /// The planes of a packed row, in their order.
    pub const fn planes(self) -> &'static [Plane] {
        match self {
            Bits::Two => &[Plane { width: 2, shift: 0 }],
            Bits::Three => &[Plane { width: 2, shift: 0 }, Plane { width: 1, shift: 2 }],
            Bits::Four => &[Plane { width: 4, shift: 0 }],
            Bits::Five => &[Plane { width: 4, shift: 0 }, Plane { width: 1, shift: 4 }],
            Bits::Six => &[Plane { width: 4, shift: 0 }, Plane { width: 2, shift: 4 }],
            Bits::Eight => &[Plane { width: 8, shift: 0 }],
        }
    }
}

impl TryFrom<u32> for Bits {
    type Error = QuantError;

    fn try_from(count: u32) -> Result<Self, QuantError> {
        Bits::ALL.into_iter().find(|bits| bits.count() == count as usize).ok_or(QuantError::Bits(count))
    }
}

/// Bytes taken by a packed row of `lanes` codes.
#[inline]
pub fn packed_len(bits: Bits, lanes: usize) -> usize {
    bits.planes().iter().map(|plane| plane.stride(lanes)).sum()
}

/// The planes of a packed row, each with its bytes.
#[inline(always)]
fn planes(bits: Bits, lanes: usize) -> impl Iterator<Item = (Plane, std::ops::Range<usize>)> {
    let mut start = 0;
    bits.planes().iter().map(move |plane| {
        let bytes = start..start + plane.stride(lanes);
        start = bytes.end;
        (*plane, bytes)
    })
}

/// Packs `codes` into `out`, overwriting it. Codes above the maximum are masked to their low bits.
///
/// # Panics
/// If `out` is not exactly [`packed_len`] bytes long.
#[inline(always)]
pub fn pack(bits: Bits, codes: &[u8], out: &mut [u8]) {
    assert_eq!(out.len(), packed_len(bits, codes.len()), "packed row of {} codes", codes.len());
    out.fill(0);
    for (plane, bytes) in planes(bits, codes.len()).filter(|(_, bytes)| !bytes.is_empty()) {
        let out = &mut out[bytes];
        for (field, lanes) in codes.chunks(out.len()).enumerate() {
            for (byte, &code) in out.iter_mut().zip(lanes) {
                *byte |= ((code >> plane.shift) & plane.mask()) << (field * plane.width);
            }
        }
    }
}

/// Writes the code of one lane into a packed row of `lanes` codes, and leaves the others as they are.
///
/// # Panics
/// If `row` is not exactly [`packed_len`] bytes long, or has no such lane.
pub fn put(bits: Bits, lanes: usize, lane: usize, code: u8, row: &mut [u8]) {
    assert_eq!(row.len(), packed_len(bits, lanes), "packed row of {lanes} codes");
    assert!(lane < lanes, "lane {lane} of {lanes}");
    for (plane, bytes) in planes(bits, lanes) {
        let shift = lane / bytes.len() * plane.width;
        let byte = &mut row[bytes.start + lane % bytes.len()];
        *byte = *byte & !(plane.mask() << shift) | ((code >> plane.shift) & plane.mask()) << shift;
    }
}

/// Unpacks `packed` into `codes`; the inverse of [`pack`].
///
/// # Panics
/// If `packed` is not exactly [`packed_len`] bytes long.
#[inline(always)]
pub fn unpack(bits: Bits, packed: &[u8], codes: &mut [u8]) {
    assert_eq!(packed.len(), packed_len(bits, codes.len()), "packed row of {} codes", codes.len());
    codes.fill(0);
    for (plane, bytes) in planes(bits, codes.len()).filter(|(_, bytes)| !bytes.is_empty()) {
        let packed = &packed[bytes];
        for (field, lanes) in codes.chunks_mut(packed.len()).enumerate() {
            for (code, &byte) in lanes.iter_mut().zip(packed) {
                *code |= ((byte >> (field * plane.width)) & plane.mask()) << plane.shift;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
        for bits in Bits::ALL {
            assert_eq!(Bits::try_from(bits.count() as u32), Ok(bits));
            assert_eq!(1usize << bits.count(), bits.max_code() as usize + 1);
        }
        assert_eq!(Bits::try_from(7), Err(QuantError::Bits(7)));
    }

    proptest! {
        #[test]
        fn unpack_inverts_pack(raw in prop::collection::vec(any::<u8>(), 0..300), which in 0usize..6) {
            let bits = Bits::ALL[which];
            let codes: Vec<u8> = raw.iter().map(|c| c & bits.max_code()).collect();
            let mut packed = vec![0xa5; packed_len(bits, codes.len())];
            pack(bits, &codes, &mut packed);
            let mut back = vec![0xff; codes.len()];
            unpack(bits, &packed, &mut back);
            prop_assert_eq!(back, codes);
        }

        #[test]
        fn putting_lane_by_lane_is_packing(raw in prop::collection::vec(any::<u8>(), 1..200), which in 0usize..6) {
            let bits = Bits::ALL[which];
            let mut packed = vec![0; packed_len(bits, raw.len())];
            pack(bits, &raw, &mut packed);
            let mut put_in = vec![0x5a; packed.len()];
            pack(bits, &vec![0; raw.len()], &mut put_in);
            for (lane, &code) in raw.iter().enumerate().rev() {
                put(bits, raw.len(), lane, code ^ bits.max_code(), &mut put_in);
                put(bits, raw.len(), lane, code, &mut put_in);
            }
            prop_assert_eq!(put_in, packed);
        }
    }

    #[test]
    fn three_bits_are_a_plane_of_two_and_a_plane_of_one() {
        let mut packed = [0u8; 3];
        pack(Bits::Three, &[5, 2, 7, 0, 1, 4, 6, 3], &mut packed);
        // Low bits 1,2,3,0,1,0,2,3 over two bytes; high bits 1,0,1,0,0,1,1,0 over one.
        assert_eq!(packed, [0b10_01_11_01, 0b11_00_00_10, 0b0110_0101]);
    }
}
