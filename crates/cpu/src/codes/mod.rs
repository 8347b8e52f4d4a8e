//! `y[i][lane] += sum_r w[i][r] * code[r][lane]` on packed codes: decode attention, twice for each page.
//!
//! Keys per channel: a row is a channel, its lanes are tokens, the weights are the query with the channel's scale folded
//! in. Values per token: a row is a token, its lanes are channels, the weights are the probabilities with the token's
//! scale folded in. Nothing is dequantised.
//!
//! Weights are integers of 16 bit ([`IntegerWeights`]), so that the sums are exact and the same on every instruction set,
//! whatever rows of `y` share a call. A weight is `256 high + low`, two signed bytes: x86 multiplies bytes, and
//! sums four rows at once. For that, four rows of packed codes are laid side by side, byte by byte ([`Line`]).

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(target_arch = "x86_64")]
mod vnni;
mod weights;

use super::simd::{CACHE_LINE, WIDTH, dispatch};
#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
use dibit_quant::Bits;
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use portable::Portable;
#[cfg(target_arch = "x86_64")]
use vnni::Vnni;
pub(crate) use weights::IntegerWeights;

/// Rows that lie side by side.
const QUAD: usize = 4;

/// Fields of a byte that are summed at once.
const MAX_FIELDS: usize = 4;

/// Sixteen bytes of each of four packed rows: the four of one place are next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; WIDTH * QUAD]);

/// Some fields of bytes.
#[derive(Debug, Clone, Copy)]
struct Fields {
    /// Bits of a code.
    width: u32,
    /// Bit at which the first one begins.
    shift: u32,
    /// Number of fields.
    count: usize,
    /// How many places of a line are wanted.
    places: usize,
}

impl Fields {
    /// Bit at which a field begins.
    #[inline(always)]
    fn shift(self, field: usize) -> u32 {
        self.shift + field as u32 * self.width
    }

    /// The bits of a code, as if its field were the lowest.
    #[inline(always)]
    fn mask(self) -> u8 {
        u8::MAX >> (8 - self.width)
    }
}

/// High and low bytes of the weights of `M` queries, four rows in a number.
#[derive(Clone, Copy)]
struct Weights<'a, const M: usize> {
    high: [&'a [i32]; M],
    low: [&'a [i32]; M],
}

/// Sums for `M` queries: of each field the 16 places of a line.
type Sums<const M: usize> = [[[i32; WIDTH]; MAX_FIELDS]; M];

/// What is written for each instruction set. A type is used only inside functions that [`dispatch`] compiled for its
/// instruction set and calls where the machine has it.
trait Kernel {
    /// Lays rows side by side: line `i` holds the first 16 bytes of the rows from `4 i` on, which are `stride` bytes
    /// apart.
    fn interleave(bytes: &[u8], stride: usize, lines: &mut [Line]);

    /// `sums[i][field][place] = sum_line weights[i][line] . codes[line][place]`, for `M` queries, all fields and the places
    /// that are wanted; others are anything. With each line, one cache line of `ahead` is asked for.
    fn sum<const M: usize>(lines: &[Line], weights: Weights<M>, fields: Fields, ahead: &[u8]) -> Sums<M>;
}

/// Packed rows, as they lie in a page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Codes<'a> {
    pub bytes: &'a [u8],
    pub bits: Bits,
    pub rows: usize,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// Codes of a row.
    pub lanes: usize,
}

/// Lays the first `width` bytes of `rows` rows side by side, up to 16; zeros where a line lacks rows. What lies behind a
/// shorter width is anything.
#[inline(always)]
fn load<K: Kernel>(bytes: &[u8], width: usize, rows: usize, stride: usize, lines: &mut [Line]) {
    // Rows behind which there are 16 bytes, if not all their own.
    let readable = bytes.len().checked_sub(WIDTH).map_or(0, |last| last / stride + 1);
    let whole = rows.min(readable) / QUAD;
    K::interleave(bytes, stride, &mut lines[..whole]);
    if whole * QUAD < rows {
        load_last(&bytes[whole * QUAD * stride..], width, rows - whole * QUAD, stride, &mut lines[whole..]);
    }
}

/// The same, byte by byte.
fn load_last(bytes: &[u8], width: usize, rows: usize, stride: usize, lines: &mut [Line]) {
    for (index, line) in lines.iter_mut().enumerate() {
        *line = Line([0; WIDTH * QUAD]);
        for (i, row) in (index * QUAD..rows.min(index * QUAD + QUAD)).enumerate() {
            for (j, byte) in bytes[row * stride..][..width].iter().enumerate() {
                line.0[j * QUAD + i] = *byte;
            }
        }
    }
}

#[inline(always)]
fn body<K: Kernel>(
    codes: Codes,
    weights: &IntegerWeights,
    lines: &mut Vec<Line>,
    y: &mut [f32],
    y_stride: usize,
    ahead: &mut &[u8],
    offsets: &[f32],
) {
    lines.resize(codes.rows.div_ceil(QUAD), Line([0; WIDTH * QUAD]));
    let mut start = 0;
    for plane in codes.bits.planes() {
        let units = plane.stride(codes.lanes);
        for first in (0..units).step_by(WIDTH) {
            let bytes = &codes.bytes[start + first..];
            let places = WIDTH.min(units - first);
            load::<K>(bytes, places, codes.rows, codes.stride, lines);
            for field in (0..8 / plane.width).step_by(MAX_FIELDS) {
                let fields = Fields {
                    width: plane.width as u32,
                    shift: (field * plane.width) as u32,
                    count: MAX_FIELDS.min(8 / plane.width),
                    places,
                };
                let value = f32::from(1u8 << plane.shift);
                let offsets = if plane.shift == 0 { offsets } else { &[] };
                let place = Place { first, units, lanes: codes.lanes, field, value, offsets };
                let whole = weights.count() / 2 * 2;
                for query in (0..whole).step_by(2) {
                    let ahead = take(ahead, lines.len());
                    run::<K, 2>(lines, weights, query, fields, place, &mut y[query * y_stride..], y_stride, ahead);
                }
                if whole < weights.count() {
                    let ahead = take(ahead, lines.len());
                    run::<K, 1>(lines, weights, whole, fields, place, &mut y[whole * y_stride..], y_stride, ahead);
                }
            }
        }
        start += units;
    }
}

/// Takes a cache line for each of `count` lines off the front.
fn take<'a>(ahead: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (now, later) = ahead.split_at(ahead.len().min(count * CACHE_LINE));
    *ahead = later;
    now
}

/// Where the sums of a line go.
#[derive(Clone, Copy)]
struct Place<'a> {
    /// Number of the line's first byte in a row of `units` bytes.
    first: usize,
    units: usize,
    lanes: usize,
    /// Number of the first field.
    field: usize,
    /// What 1 in the plane is worth in the code.
    value: f32,
    /// What each query adds to all lanes; nothing where there are none.
    offsets: &'a [f32],
}

#[allow(clippy::too_many_arguments)]
#[inline(always)]
fn run<K: Kernel, const M: usize>(
    lines: &[Line],
    weights: &IntegerWeights,
    query: usize,
    fields: Fields,
    place: Place,
    y: &mut [f32],
    y_stride: usize,
    ahead: &[u8],
) {
    let sums = K::sum::<M>(lines, weights.bytes::<M>(query), fields, ahead);
    for (i, sums) in sums.iter().enumerate() {
        let step = weights.step(query + i) * place.value;
        let offset = place.offsets.get(query + i).copied().unwrap_or(0.0);
        for (field, sums) in sums[..fields.count].iter().enumerate() {
            let lane = (place.field + field) * place.units + place.first;
            let width = WIDTH.min(place.units - place.first).min(place.lanes.saturating_sub(lane));
            let y = &mut y[i * y_stride..];
            if width == WIDTH {
                let y: &mut [f32; WIDTH] = (&mut y[lane..lane + WIDTH]).try_into().expect("WIDTH lanes");
                add_scaled(y, sums, step, offset);
            } else if width > 0 {
                add_scaled(&mut y[lane..lane + width], sums, step, offset);
            }
        }
    }
}

/// `y += step * sums + offset`.
#[inline(always)]
fn add_scaled(y: &mut [f32], sums: &[i32; WIDTH], step: f32, offset: f32) {
    for (y, sum) in y.iter_mut().zip(sums) {
        *y += *sum as f32 * step + offset;
    }
}

dispatch! {
    /// Adds the weighted codes, and each row's offset if there are any, to the rows of `y`, which are `y_stride` numbers
    /// apart. Meanwhile bytes off the front of `ahead` are brought into the cache.
    fn mix_codes<>(
        codes: Codes,
        weights: &IntegerWeights,
        lines: &mut Vec<Line>,
        y: &mut [f32],
        y_stride: usize,
        ahead: &mut &[u8],
        offsets: &[f32],
    );
    baseline: body::<Portable>(codes, weights, lines, y, y_stride, ahead, offsets);
    avx2: body::<Avx2>(codes, weights, lines, y, y_stride, ahead, offsets);
    avx512: body::<Avx2>(codes, weights, lines, y, y_stride, ahead, offsets);
    vnni: body::<Vnni>(codes, weights, lines, y, y_stride, ahead, offsets);
    neon: body::<Neon>(codes, weights, lines, y, y_stride, ahead, offsets);
}

/// The specification.
#[cfg(test)]
pub(crate) fn reference(codes: Codes, weights: &IntegerWeights, y: &mut [f32], y_stride: usize, offsets: &[f32]) {
    let mut start = 0;
    for plane in codes.bits.planes() {
        let units = plane.stride(codes.lanes);
        for query in 0..weights.count() {
            for lane in 0..codes.lanes {
                let (unit, field) = (lane % units, lane / units);
                let code = |row: usize| {
                    let byte = codes.bytes[row * codes.stride + start + unit];
                    i32::from(byte >> (field * plane.width) & (u8::MAX >> (8 - plane.width)))
                };
                let sum: i32 = (0..codes.rows).map(|row| weights.number(query, row) * code(row)).sum();
                let offset = if plane.shift == 0 { offsets[query] } else { 0.0 };
                y[query * y_stride + lane] +=
                    sum as f32 * (weights.step(query) * f32::from(1u8 << plane.shift)) + offset;
            }
        }
        start += units;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use dibit_quant::{pack, packed_len};
    use proptest::prelude::*;

    fn weights(isa: Isa, m: usize, rows: usize, spread: i32) -> IntegerWeights {
        let stride = rows + 3;
        let number = |i: usize| ((i * i + i) as f32 * 0.71).sin() * 10f32.powi(i as i32 * 7 % spread);
        let values: Vec<f32> = (0..m * stride).map(number).collect();
        let mut weights = IntegerWeights::default();
        weights.load(isa, &values, m, stride, rows);
        weights
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn every_instruction_set_equals_the_reference(
            bits in prop::sample::select(Bits::ALL.to_vec()),
            m in 1usize..8,
            rows in 1usize..140,
            lanes in 1usize..270,
            spread in 1i32..9,
            seed in any::<u32>(),
        ) {
            let own = packed_len(bits, lanes);
            let (stride, y_stride) = (own + 2, lanes + 5);
            let byte = |i: usize| (dibit_quant::splitmix(u64::from(seed) + i as u64) >> 13) as u8;
            let bytes: Vec<u8> = (0..(rows - 1) * stride + own).map(byte).collect();
            let codes = Codes { bytes: &bytes, bits, rows, stride, lanes };
            let start: Vec<f32> = (0..m * y_stride).map(|i| (i as f32 * 0.37).cos()).collect();
            let offsets: Vec<f32> = (0..m).map(|i| i as f32 - 1.5).collect();
            let mut expected = start.clone();
            reference(codes, &weights(Isa::Baseline, m, rows, spread), &mut expected, y_stride, &offsets);
            for isa in Isa::available() {
                let mut y = start.clone();
                mix_codes(isa, codes, &weights(isa, m, rows, spread), &mut Vec::new(), &mut y, y_stride, &mut bytes.as_slice(), &offsets);
                prop_assert_eq!(&y, &expected, "{:?}", isa);
            }
        }
    }

    /// The largest sums that can occur: 256 rows of the largest codes.
    #[test]
    fn sums_do_not_overflow() {
        let bytes = vec![u8::MAX; 256 * 32];
        for (isa, bits) in Isa::available().into_iter().flat_map(|isa| Bits::ALL.map(|bits| (isa, bits))) {
            let codes = Codes { bytes: &bytes, bits, rows: 256, stride: 32, lanes: 32 };
            for sign in [1.0, -1.0] {
                let mut weights = IntegerWeights::default();
                weights.load(isa, &[sign; 256], 1, 256, 256);
                let mut y = [0.0; 32];
                mix_codes(isa, codes, &weights, &mut Vec::new(), &mut y, 32, &mut [].as_slice(), &[]);
                let sum = sign * f32::from(bits.max_code()) * 256.0;
                assert!(y.iter().all(|y| (y - sum).abs() < 0.1), "{isa:?}, {bits:?}: {y:?}");
            }
        }
    }

    #[test]
    fn lanes_are_those_of_the_packed_format() {
        for bits in Bits::ALL {
            let codes: Vec<u8> = (0..20).map(|i| i * 7 % (bits.max_code() / 2 + 2)).collect();
            let mut packed = vec![0; packed_len(bits, 20)];
            pack(bits, &codes, &mut packed);
            let mut weights = IntegerWeights::default();
            weights.load(Isa::detect(), &[1.0], 1, 1, 1);
            let mut y = vec![0.0; 20];
            let codes_of = Codes { bytes: &packed, bits, rows: 1, stride: packed.len(), lanes: 20 };
            mix_codes(Isa::detect(), codes_of, &weights, &mut Vec::new(), &mut y, 20, &mut [].as_slice(), &[]);
            for (y, code) in y.iter().zip(codes) {
                assert!((y - f32::from(code)).abs() < 1e-4, "{bits:?}: {y} is not {code}");
            }
        }
    }
}
