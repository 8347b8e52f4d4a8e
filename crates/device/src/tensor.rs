//! Weights as they come from a checkpoint: mapped where the layout allows, owned where they were changed.

use crate::BlockType;
use crate::storage::{Bytes, Storage};
use dibit_quant::splitmix;
use half::{bf16, f16};
use std::ops::Range;
use std::sync::Arc;
use thiserror::Error;

/// Storage type of a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl DType {
    /// Bytes of one number.
    pub const fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// The name that checkpoints and options use.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }
}

/// Why bytes are not a tensor.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{bytes} bytes cannot hold a {rows} x {cols} tensor of {dtype}")]
pub struct TensorError {
    rows: usize,
    cols: usize,
    bytes: usize,
    dtype: &'static str,
}

#[derive(Clone)]
enum Data {
    F32(Storage<f32>),
    F16(Storage<f16>),
    Bf16(Storage<bf16>),
    /// Blocks as they lie in a file: all have an even number of bytes, and numbers of at most 16 bit.
    Blocks(BlockType, Storage<u16>),
}

/// The numbers of a tensor, by storage type.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// IEEE single precision.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Blocks, as the words that they lie in.
    Blocks(BlockType, &'a [u16]),
}

/// A row-major matrix `[rows, cols]`; a vector is one row.
#[derive(Clone)]
pub struct Tensor {
    rows: usize,
    cols: usize,
    data: Data,
}

/// `len`, where so many bytes lie behind `offset`; else how many there are.
fn fitting(bytes: &Bytes, offset: usize, len: Option<usize>) -> Result<usize, usize> {
    let available = bytes.len().checked_sub(offset);
    len.filter(|len| available.is_some_and(|available| *len <= available)).ok_or(available.unwrap_or(0))
}

impl Tensor {
    /// A matrix over `bytes[offset .. offset + rows * cols * size]`, little-endian, copied only where the
    /// bytes are not aligned.
    ///
    /// # Errors
    /// [`TensorError`] where there are fewer bytes than that.
    pub fn from_bytes(
        bytes: &Bytes,
        offset: usize,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Result<Self, TensorError> {
        let len = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size()));
        let len = fitting(bytes, offset, len).map_err(|available| TensorError {
            rows,
            cols,
            bytes: available,
            dtype: dtype.name(),
        })?;
        let data = match dtype {
            DType::F32 => Data::F32(Storage::new(bytes, offset, len)),
            DType::F16 => Data::F16(Storage::new(bytes, offset, len)),
            DType::Bf16 => Data::Bf16(Storage::new(bytes, offset, len)),
        };
        Ok(Tensor { rows, cols, data })
    }

    /// A quantised matrix over the bytes from `offset` on, copied only where they are not aligned to 2.
    ///
    /// # Errors
    /// [`TensorError`] where there are fewer bytes than that, or rows are no whole blocks.
    pub fn from_quantized(
        bytes: &Bytes,
        offset: usize,
        kind: BlockType,
        rows: usize,
        cols: usize,
    ) -> Result<Self, TensorError> {
        let row = cols.is_multiple_of(kind.numbers()).then(|| cols / kind.numbers() * kind.bytes());
        let len = fitting(bytes, offset, row.and_then(|row| row.checked_mul(rows)))
            .map_err(|available| TensorError { rows, cols, bytes: available, dtype: kind.name() })?;
        Ok(Tensor { rows, cols, data: Data::Blocks(kind, Storage::new(bytes, offset, len)) })
    }

    /// A copy whose row `i` is row `source(i)` of this matrix, stored as this one is.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn reorder_rows(&self, source: impl Fn(usize) -> usize) -> Tensor {
        fn copy<T: Copy>(values: &[T], rows: usize, source: &dyn Fn(usize) -> usize) -> Storage<T> {
            let width = values.len() / rows.max(1);
            let row = |row: usize| &values[row * width..(row + 1) * width];
            Storage::Owned(Arc::new((0..rows).flat_map(|i| row(source(i))).copied().collect()))
        }
        let data = match self.values() {
            Values::F32(values) => Data::F32(copy(values, self.rows, &source)),
            Values::F16(values) => Data::F16(copy(values, self.rows, &source)),
            Values::Bf16(values) => Data::Bf16(copy(values, self.rows, &source)),
            Values::Blocks(kind, words) => Data::Blocks(kind, copy(words, self.rows, &source)),
        };
        Tensor { rows: self.rows, cols: self.cols, data }
    }

    /// The matrix of some of the rows.
    ///
    /// # Panics
    /// If there are no such rows.
    pub fn part_rows(&self, rows: Range<usize>) -> Tensor {
        fn of<T: bytemuck::Pod>(storage: &Storage<T>, all: usize, rows: &Range<usize>) -> Storage<T> {
            let width = storage.as_slice().len() / all.max(1);
            storage.part(rows.start * width..rows.end * width)
        }
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {}", self.rows);
        let data = match &self.data {
            Data::F32(storage) => Data::F32(of(storage, self.rows, &rows)),
            Data::F16(storage) => Data::F16(of(storage, self.rows, &rows)),
            Data::Bf16(storage) => Data::Bf16(of(storage, self.rows, &rows)),
            Data::Blocks(kind, storage) => Data::Blocks(*kind, of(storage, self.rows, &rows)),
        };
        Tensor { rows: rows.len(), cols: self.cols, data }
    }

    /// A matrix of `values`, rounded to `dtype`.
    ///
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn from_f32(values: Vec<f32>, dtype: DType, rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols, "values of a {rows} x {cols} matrix");
        if dtype == DType::F32 {
            return Tensor { rows, cols, data: Data::F32(Storage::Owned(Arc::new(values))) };
        }
        Tensor::from_blocks(dtype, rows, cols, rows.max(1), |_, block| block.copy_from_slice(&values))
    }

    /// A matrix made of blocks of `block_rows` rows, the last one shorter where they do not divide the rows:
    /// `fill(first_row, block)` writes each in f32. Besides the matrix, one block is held in memory.
    pub fn from_blocks(
        dtype: DType,
        rows: usize,
        cols: usize,
        block_rows: usize,
        mut fill: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        fn collect<T: bytemuck::Pod>(
            [rows, cols, block_rows]: [usize; 3],
            fill: &mut dyn FnMut(usize, &mut [f32]),
            round: impl Fn(f32) -> T,
        ) -> Storage<T> {
            let mut storage = Storage::zeroed(rows * cols);
            let mut block = vec![0.0; block_rows.min(rows) * cols];
            for first in (0..rows).step_by(block_rows) {
                let block = &mut block[..(rows - first).min(block_rows) * cols];
                fill(first, block);
                let values = &mut storage.as_mut_slice()[first * cols..][..block.len()];
                values.iter_mut().zip(block).for_each(|(value, number)| *value = round(*number));
            }
            storage
        }
        let shape = [rows, cols, block_rows];
        let data = match dtype {
            DType::F32 => Data::F32(collect(shape, &mut fill, |value| value)),
            DType::F16 => Data::F16(collect(shape, &mut fill, f16::from_f32)),
            DType::Bf16 => Data::Bf16(collect(shape, &mut fill, bf16::from_f32)),
        };
        Tensor { rows, cols, data }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Storage type. For quantised numbers the type that they are stored in once they are changed: bf16.
    pub fn dtype(&self) -> DType {
        match &self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::Bf16(_) | Data::Blocks(..) => DType::Bf16,
        }
    }

    /// The blocks that the numbers lie in, if they are quantised.
    pub fn block_type(&self) -> Option<BlockType> {
        match &self.data {
            Data::Blocks(kind, _) => Some(*kind),
            _ => None,
        }
    }

    /// The name of how the numbers are stored.
    pub fn format(&self) -> &'static str {
        self.block_type().map_or_else(|| self.dtype().name(), BlockType::name)
    }

    /// Bytes of the numbers.
    pub fn num_bytes(&self) -> usize {
        match &self.data {
            Data::Blocks(_, words) => size_of_val(words.as_slice()),
            _ => self.rows * self.cols * self.dtype().size(),
        }
    }

    /// True where the tensor is a view of a mapped file or of the program, not a copy.
    pub fn is_shared(&self) -> bool {
        match &self.data {
            Data::F32(storage) => matches!(storage, Storage::Shared { .. }),
            Data::F16(storage) => matches!(storage, Storage::Shared { .. }),
            Data::Bf16(storage) => matches!(storage, Storage::Shared { .. }),
            Data::Blocks(_, storage) => matches!(storage, Storage::Shared { .. }),
        }
    }

    /// Says that the tensor is not needed for now; see [`crate::SharedBytes::release`].
    pub fn release(&self) {
        match &self.data {
            Data::F32(storage) => storage.release(),
            Data::F16(storage) => storage.release(),
            Data::Bf16(storage) => storage.release(),
            Data::Blocks(_, storage) => storage.release(),
        }
    }

    /// The bytes of the numbers, row by row; `None` where they are quantised.
    pub fn bytes(&self) -> Option<&[u8]> {
        match self.values() {
            Values::F32(values) => Some(bytemuck::cast_slice(values)),
            Values::F16(values) => Some(bytemuck::cast_slice(values)),
            Values::Bf16(values) => Some(bytemuck::cast_slice(values)),
            Values::Blocks(..) => None,
        }
    }

    /// True where both tensors are views of the same numbers.
    pub fn same_numbers(&self, other: &Tensor) -> bool {
        let start = |tensor: &Tensor| match tensor.values() {
            Values::F32(values) => values.as_ptr().cast::<u8>(),
            Values::F16(values) => values.as_ptr().cast(),
            Values::Bf16(values) => values.as_ptr().cast(),
            Values::Blocks(_, words) => words.as_ptr().cast(),
        };
        start(self) == start(other)
    }

    /// A matrix of seeded normal numbers of mean zero.
    pub fn random(seed: u64, std: f32, dtype: DType, rows: usize, cols: usize) -> Self {
        // The sum of four uniform numbers is normal enough for made-up weights; its variance is 4 / 12.
        let scale = std * 3f32.sqrt() / f32::from(u16::MAX);
        let number = |i: usize| {
            let bits = splitmix(seed.wrapping_add(i as u64));
            let sum: i32 = (0..4).map(|part| i32::from((bits >> (16 * part)) as u16)).sum();
            (sum - 2 * i32::from(u16::MAX)) as f32 * scale
        };
        Tensor::from_blocks(dtype, rows, cols, 1, |row, block| {
            for (col, value) in block.iter_mut().enumerate() {
                *value = number(row * cols + col);
            }
        })
    }

    /// The bytes of the numbers, to cut other tensors from.
    pub fn into_bytes(self) -> Bytes {
        fn bytes<T: bytemuck::Pod>(storage: Storage<T>) -> Bytes {
            match storage {
                Storage::Huge(memory) => memory,
                other => Arc::new(bytemuck::cast_slice::<T, u8>(other.as_slice()).to_vec()),
            }
        }
        match self.data {
            Data::F32(storage) => bytes(storage),
            Data::F16(storage) => bytes(storage),
            Data::Bf16(storage) => bytes(storage),
            Data::Blocks(_, storage) => bytes(storage),
        }
    }

    /// The numbers, by storage type.
    pub fn values(&self) -> Values<'_> {
        match &self.data {
            Data::F32(storage) => Values::F32(storage.as_slice()),
            Data::F16(storage) => Values::F16(storage.as_slice()),
            Data::Bf16(storage) => Values::Bf16(storage.as_slice()),
            Data::Blocks(kind, storage) => Values::Blocks(*kind, storage.as_slice()),
        }
    }

    /// The numbers of row `row`, widened.
    pub fn row(&self, row: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.cols];
        self.widen_row(row, &mut out);
        out
    }

    /// Writes the numbers of row `row`, widened.
    pub fn widen_row(&self, row: usize, out: &mut [f32]) {
        fn widen<T: Copy>(values: &[T], out: &mut [f32], widen: impl Fn(T) -> f32) {
            for (out, value) in out.iter_mut().zip(values) {
                *out = widen(*value);
            }
        }
        let range = row * self.cols..(row + 1) * self.cols;
        match self.values() {
            Values::F32(values) => out.copy_from_slice(&values[range]),
            Values::F16(values) => widen(&values[range], out, f16::to_f32),
            Values::Bf16(values) => widen(&values[range], out, bf16::to_f32),
            Values::Blocks(kind, words) => {
                let width = words.len() / self.rows;
                kind.widen(&words[row * width..(row + 1) * width], out);
            }
        }
    }

    /// Writes the numbers of the rows from `first` on, as many as `out` holds, in fp16.
    ///
    /// # Panics
    /// If there are fewer rows.
    pub fn narrow_rows(&self, first: usize, out: &mut [f16]) {
        let mut row = vec![0.0; self.cols];
        for (i, out) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.widen_row(first + i, &mut row);
            out.iter_mut().zip(&row).for_each(|(out, value)| *out = f16::from_f32(*value));
        }
    }

    /// All numbers, widened, row by row.
    pub fn to_f32(&self) -> Vec<f32> {
        (0..self.rows).flat_map(|row| self.row(row)).collect()
    }

    /// The same matrix in another storage type; nothing is copied where it has that type.
    pub fn cast(&self, dtype: DType) -> Tensor {
        if dtype == self.dtype() && self.block_type().is_none() {
            return self.clone();
        }
        Tensor::from_blocks(dtype, self.rows, self.cols, 1, |row, block| self.widen_row(row, block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(raw: Vec<u8>) -> Bytes {
        Arc::new(raw)
    }

    #[test]
    fn parts_have_the_rows_of_the_whole() {
        let raw: Vec<u8> = (0..7 * 3 * 2).collect();
        let shared = Tensor::from_bytes(&bytes(raw), 0, DType::Bf16, 7, 3).unwrap();
        for whole in [shared.clone(), shared.cast(DType::F32)] {
            let part = whole.part_rows(2..5);
            assert_eq!((part.rows(), part.cols(), part.dtype()), (3, 3, whole.dtype()));
            (0..3).for_each(|row| assert_eq!(part.row(row), whole.row(row + 2)));
            assert_eq!(whole.part_rows(7..7).rows(), 0);
        }
        assert!(shared.part_rows(1..2).is_shared());
    }

    #[test]
    fn aligned_bytes_are_shared_and_others_copied() {
        let mut raw = vec![0u8; 16];
        let base = raw.as_ptr().align_offset(2);
        for offset in [base, base + 5] {
            raw[offset..offset + 2].copy_from_slice(&bf16::from_f32(1.0).to_le_bytes());
            raw[offset + 2..offset + 4].copy_from_slice(&bf16::from_f32(-2.5).to_le_bytes());
        }
        let raw = bytes(raw);
        for (offset, shared) in [(base, true), (base + 5, false)] {
            let tensor = Tensor::from_bytes(&raw, offset, DType::Bf16, 1, 2).unwrap();
            assert_eq!(tensor.to_f32(), [1.0, -2.5]);
            assert_eq!(tensor.is_shared(), shared);
        }
    }

    #[test]
    fn too_few_bytes_are_refused() {
        let raw = bytes(vec![0; 8]);
        assert!(Tensor::from_bytes(&raw, 4, DType::F32, 1, 1).is_ok());
        let error = Tensor::from_bytes(&raw, 4, DType::F32, 1, 2).err().unwrap();
        assert!(error.to_string().contains("4 bytes cannot hold a 1 x 2 tensor of f32"));
        assert!(Tensor::from_bytes(&raw, 0, DType::F32, usize::MAX, 2).is_err());
        assert!(Tensor::from_bytes(&raw, 100, DType::F32, 1, 1).is_err());
        assert!(Tensor::from_bytes(&raw, 100, DType::F32, 0, 1).is_err());
        assert!(Tensor::from_quantized(&raw, 100, BlockType::Q8_0, 0, 32).is_err());
    }

    #[test]
    fn made_up_weights_have_the_spread_they_were_asked_for() {
        let numbers = Tensor::random(7, 0.02, DType::F32, 100, 200).to_f32();
        let mean = numbers.iter().sum::<f32>() / 20_000.0;
        let variance = numbers.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 20_000.0;
        assert!(mean.abs() < 1e-3 && (variance.sqrt() - 0.02).abs() < 1e-3, "{mean}, {variance}");
        assert_eq!(Tensor::random(7, 0.02, DType::F32, 100, 200).to_f32(), numbers);
        assert_ne!(Tensor::random(8, 0.02, DType::F32, 100, 200).to_f32(), numbers);
    }

    #[test]
    fn quantised_rows_are_widened_moved_and_counted() {
        // Two blocks of Q8_0: a scale in fp16, then 32 codes.
        let mut raw = Vec::new();
        for (scale, sign) in [(0.5f32, 1i8), (2.0, -1)] {
            raw.extend(f16::from_f32(scale).to_le_bytes());
            raw.extend((0..32).map(|i| (sign * i) as u8));
        }
        let expected: Vec<f32> = (0..32).map(|i| i as f32 * 0.5).chain((0..32).map(|i| i as f32 * -2.0)).collect();
        let raw = bytes(raw);
        let tensor = Tensor::from_quantized(&raw, 0, BlockType::Q8_0, 2, 32).unwrap();
        assert_eq!((tensor.to_f32(), tensor.num_bytes(), tensor.format()), (expected.clone(), 68, "Q8_0"));
        assert_eq!(tensor.row(1), expected[32..]);
        let mut narrow = [f16::ZERO; 32];
        tensor.narrow_rows(1, &mut narrow);
        assert_eq!((narrow.map(f16::to_f32).to_vec(), tensor.bytes()), (expected[32..].to_vec(), None));
        let swapped = tensor.reorder_rows(|row| 1 - row);
        assert_eq!([swapped.row(0), swapped.row(1)].concat(), [&expected[32..], &expected[..32]].concat());
        assert_eq!((swapped.block_type(), swapped.is_shared()), (Some(BlockType::Q8_0), false));
        let plain = tensor.cast(DType::Bf16);
        assert_eq!((plain.to_f32(), plain.format(), plain.num_bytes()), (expected, "bf16", 128));
        assert_eq!(plain.bytes().map(<[u8]>::len), Some(128));
        assert!(Tensor::from_quantized(&raw, 0, BlockType::Q8_0, 3, 32).is_err());
        assert!(Tensor::from_quantized(&raw, 0, BlockType::Q8_0, 1, 33).is_err());
        assert!(Tensor::from_quantized(&raw, 0, BlockType::Q8_0, usize::MAX, 64).is_err());
    }

    #[test]
    fn tensors_are_cut_from_the_bytes_of_another() {
        // The second one is large enough to have memory of its own.
        for (dtype, len) in [(DType::F32, 12), (DType::Bf16, 1 << 20)] {
            let whole = Tensor::random(3, 1.0, dtype, 1, len);
            let numbers = whole.to_f32();
            let part = Tensor::from_bytes(&whole.into_bytes(), 4 * dtype.size(), dtype, 2, 3).unwrap();
            assert_eq!(part.to_f32(), numbers[4..10]);
        }
    }

    #[test]
    fn casting_rounds_once() {
        let tensor = Tensor::from_f32(vec![1.0, 1.0 + 2f32.powi(-9)], DType::F32, 2, 1);
        assert_eq!(tensor.cast(DType::Bf16).to_f32(), [1.0, 1.0]);
        assert_eq!(tensor.cast(DType::F16).to_f32(), tensor.to_f32());
        assert_eq!((tensor.cast(DType::F16).num_bytes(), tensor.row(1).len()), (4, 1));
    }
}
