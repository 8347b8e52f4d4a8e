//! Weight matrices.

use crate::CudaError;
use crate::gpu::Gpu;
use crate::memory::Memory;
use dibit_device::{DType, Tensor};
use half::f16;
use std::ops::Range;
use std::sync::{Arc, Once};

/// Bytes of a matrix that are copied, or widened, at a time.
const CHUNK: usize = 64 << 20;

/// How the numbers of a matrix are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Stored {
    F32,
    F16,
    Bf16,
}

impl Stored {
    /// What kernels call it.
    pub(crate) const fn number(self) -> i32 {
        match self {
            Stored::F32 => 0,
            Stored::F16 => 1,
            Stored::Bf16 => 2,
        }
    }

    /// Bytes of a number.
    pub(crate) const fn bytes(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::F16 | Stored::Bf16 => 2,
        }
    }
}

impl From<DType> for Stored {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Stored::F32,
            DType::F16 => Stored::F16,
            DType::Bf16 => Stored::Bf16,
        }
    }
}

/// A weight matrix `[out, in]` on a GPU.
#[derive(Clone)]
pub struct Matrix {
    pub(crate) memory: Arc<Memory>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) stored: Stored,
}

impl Matrix {
    /// A copy of a tensor on the GPU; quantised numbers are widened to fp16.
    pub(crate) fn new(gpu: &Arc<Gpu>, tensor: &Tensor) -> Result<Self, CudaError> {
        let (rows, cols) = (tensor.rows(), tensor.cols());
        let stored = match tensor.block_type() {
            Some(_) => Stored::F16,
            None => tensor.dtype().into(),
        };
        let memory = Memory::new(gpu, "weights", rows * cols * stored.bytes())?;
        match tensor.bytes() {
            Some(bytes) => {
                for (index, chunk) in bytes.chunks(CHUNK).enumerate() {
                    memory.write(index * CHUNK, chunk)?;
                }
            }
            None => upload_widened(&memory, tensor)?,
        }
        // The numbers have been copied: pages of a mapped file need not stay.
        tensor.release();
        Ok(Matrix { memory: Arc::new(memory), rows, cols, stored })
    }
}

/// Copies a quantised tensor as fp16.
fn upload_widened(memory: &Memory, tensor: &Tensor) -> Result<(), CudaError> {
    static NOTE: Once = Once::new();
    NOTE.call_once(|| tracing::info!("quantised weights are widened to fp16 on the GPU"));
    let (rows, cols) = (tensor.rows(), tensor.cols());
    let chunk_rows = (CHUNK / (cols * size_of::<f16>()).max(1)).clamp(1, rows.max(1));
    let mut numbers = vec![f16::ZERO; chunk_rows * cols];
    for first in (0..rows).step_by(chunk_rows) {
        let chunk = first..rows.min(first + chunk_rows);
        let numbers = &mut numbers[..chunk.len() * cols];
        widen(tensor, chunk, numbers);
        memory.write(first * cols * size_of::<f16>(), bytemuck::cast_slice(numbers))?;
    }
    Ok(())
}

/// Widens some rows on all cores.
fn widen(tensor: &Tensor, rows: Range<usize>, out: &mut [f16]) {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let share = rows.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (index, part) in out.chunks_mut((share * tensor.cols()).max(1)).enumerate() {
            let first = rows.start + index * share;
            scope.spawn(move || tensor.narrow_rows(first, part));
        }
    });
}
