//! Linear layers on quantised weights.
//!
//! As in llama.cpp, activations are rounded to 8 bits in blocks, and blocks are multiplied as integers. That holds for
//! any number of rows, so a batch computes exactly what each of its rows computes alone.

use super::dot::Shape;
use super::shared_output::{Shared, each_tile, store};
use candle_core::quantized::GgmlType;
use dibit_device::{Block, Output};
use rayon::prelude::*;

/// `out = x w^T + bias`, or added to `out`.
pub(super) fn linear<T: Block>(
    x: &[f32],
    w: &[T],
    shape: Shape,
    bias: Option<&[f32]>,
    out: &mut [f32],
    output: Output,
) {
    let Shape { m, n, k } = shape;
    let (Output::Write(first) | Output::Add(first)) = output;
    let width = k / T::BLCK_SIZE;
    let x = round::<T::VecDotType>(&x[..m * k], k);
    let shared = Shared::new(&mut out[first * n..(first + m) * n]);
    each_tile(m, 0..n, |rows, columns| {
        for column in columns {
            let weights = &w[column * width..(column + 1) * width];
            for row in rows.clone() {
                let sum = T::vec_dot(k, weights, &x[row * width..(row + 1) * width]);
                // SAFETY: tiles do not overlap, and each number of a tile is written once.
                let out = unsafe { shared.slice(row * n + column, 1) };
                store(out, &[sum], bias.map(|bias| &bias[column..]), output);
            }
        }
    });
}

/// Rows of `k` numbers as blocks.
fn round<T: GgmlType>(x: &[f32], k: usize) -> Vec<T> {
    let width = k / T::BLCK_SIZE;
    let mut blocks = vec![T::zeros(); x.len() / k * width];
    x.par_chunks(k).zip(blocks.par_chunks_mut(width)).for_each(|(x, blocks)| T::from_float(x, blocks));
    blocks
}

#[cfg(test)]
mod tests {
    use crate::Cpu;
    use candle_core::quantized::{GgmlDType, QTensor};
    use dibit_cache::Phase;
    use dibit_device::{Bytes, DType, Dense, Memory, Output, Tensor};
    use std::sync::Arc;

    const KINDS: [(dibit_device::BlockType, GgmlDType); 11] = [
        (dibit_device::BlockType::Q5_0, GgmlDType::Q5_0),
        (dibit_device::BlockType::Q5_1, GgmlDType::Q5_1),
        (dibit_device::BlockType::Q8_0, GgmlDType::Q8_0),
        (dibit_device::BlockType::Q4_0, GgmlDType::Q4_0),
        (dibit_device::BlockType::Q4_1, GgmlDType::Q4_1),
        (dibit_device::BlockType::Q2K, GgmlDType::Q2K),
        (dibit_device::BlockType::Q3K, GgmlDType::Q3K),
        (dibit_device::BlockType::Q4K, GgmlDType::Q4K),
        (dibit_device::BlockType::Q5K, GgmlDType::Q5K),
        (dibit_device::BlockType::Q6K, GgmlDType::Q6K),
        (dibit_device::BlockType::Q8K, GgmlDType::Q8K),
    ];

    fn run(threads: usize, x: &[f32], rows: usize, w: &Tensor, bias: Option<&Vec<f32>>) -> Vec<f32> {
        let cpu = Cpu::new(Some(threads)).unwrap();
        let mut out = vec![1.0; rows * w.rows()];
        cpu.scope(|| cpu.linear(Phase::Prefill, &x.to_vec(), 0..rows, w, bias, &mut out, Output::Add(0)));
        out
    }

    #[test]
    fn every_format_multiplies_as_its_numbers_do() {
        let (rows, n, k) = (70, 131, 512);
        let x = Tensor::random(1, 1.0, DType::F32, rows, k).to_f32();
        let bias = Tensor::random(3, 1.0, DType::F32, 1, n).to_f32();
        for (kind, ggml) in KINDS {
            let plain = Tensor::random(2, 1.0, DType::F32, n, k).to_f32();
            let plain = candle_core::Tensor::from_vec(plain, (n, k), &candle_core::Device::Cpu).unwrap();
            let raw = QTensor::quantize(&plain, ggml).unwrap().data().unwrap().to_vec();
            assert_eq!(raw.len(), n * k / kind.numbers() * kind.bytes(), "{kind:?}");
            let bytes: Bytes = Arc::new(raw);
            let w = Tensor::from_quantized(&bytes, 0, kind, n, k).unwrap();
            let expected = run(1, &x, rows, &w.cast(DType::F32), Some(&bias));
            let found = run(1, &x, rows, &w, Some(&bias));
            // The sums' standard deviation is sqrt(k); 8 bits of activations move them by less than a hundredth of it.
            let worst = expected.iter().zip(&found).fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
            assert!(worst < 0.05 * (k as f32).sqrt(), "{kind:?}: {worst}");
            assert_eq!(run(3, &x, rows, &w, Some(&bias)), found, "{kind:?}: threads change a result");
            for row in [0, 69] {
                let alone = run(1, &x[row * k..(row + 1) * k], 1, &w, Some(&bias));
                assert_eq!(alone, found[row * n..(row + 1) * n], "{kind:?}: a batch changes a result");
            }
        }
    }
}
