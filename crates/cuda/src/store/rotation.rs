//! Rotations of heads on a GPU.

use crate::CudaError;
use crate::abi;
use crate::gpu::Gpu;
use crate::memory::Memory;
use bytemuck::Zeroable;
use dibit_quant::{Hadamard, QuantError};
use std::sync::Arc;

/// An orthogonal matrix for each KV head, or one for all.
pub(crate) enum Rotation {
    None,
    /// Hadamard matrices on the diagonal.
    Hadamard {
        order: usize,
        blocks: Memory,
        block_count: usize,
        signs: Memory,
    },
    Basis {
        order: usize,
        /// `[kv head][order][order]`
        matrix: Memory,
        transposed: Memory,
    },
}

impl Rotation {
    /// The normalised Hadamard matrix of this order, or one of such blocks.
    pub(super) fn hadamard(gpu: &Arc<Gpu>, order: usize) -> Result<Result<Self, QuantError>, CudaError> {
        let whole = match Hadamard::new(order) {
            Ok(whole) => whole,
            Err(error) => return Ok(Err(error)),
        };
        let (mut blocks, mut signs) = (Vec::new(), Vec::new());
        for order in whole.blocks() {
            let fits = |outer: &usize| order.is_multiple_of(*outer) && (order / outer).is_power_of_two();
            let outer = [1, 12, 20].into_iter().find(fits).expect("the matrix exists");
            blocks.push(abi::HadamardBlock {
                order: order as i32,
                outer: outer as i32,
                signs: signs.len() as i32,
                norm: 1.0 / (order as f32).sqrt(),
            });
            signs.extend(outer_signs(outer));
        }
        Ok(Ok(Rotation::Hadamard {
            order,
            block_count: blocks.len(),
            blocks: Memory::of(gpu, "a rotation", &blocks)?,
            signs: Memory::of(gpu, "a rotation", &signs)?,
        }))
    }

    /// A basis for each KV head.
    pub(super) fn basis(gpu: &Arc<Gpu>, order: usize, matrix: &[f32]) -> Result<Self, CudaError> {
        let mut transposed = vec![0f32; matrix.len()];
        for (to, from) in transposed.chunks_exact_mut(order * order).zip(matrix.chunks_exact(order * order)) {
            for (at, x) in from.iter().enumerate() {
                to[at % order * order + at / order] = *x;
            }
        }
        Ok(Rotation::Basis {
            order,
            matrix: Memory::of(gpu, "a basis", matrix)?,
            transposed: Memory::of(gpu, "a basis", &transposed)?,
        })
    }

    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Rotation::None)
    }

    pub(crate) fn for_kernels(&self) -> abi::Rotation {
        match self {
            Rotation::None => abi::Rotation::zeroed(),
            Rotation::Hadamard { order, blocks, block_count, signs } => abi::Rotation {
                kind: 1,
                order: *order as i32,
                block_count: *block_count as i32,
                padding: 0,
                blocks: blocks.at(0),
                matrix: signs.at(0),
                transposed: 0,
            },
            Rotation::Basis { order, matrix, transposed } => abi::Rotation {
                kind: 2,
                order: *order as i32,
                block_count: 0,
                padding: 0,
                blocks: 0,
                matrix: matrix.at(0),
                transposed: transposed.at(0),
            },
        }
    }
}

/// Signs of a Hadamard matrix that is an outer factor, `[outer][outer]`.
fn outer_signs(outer: usize) -> Vec<f32> {
    let own = Hadamard::new(outer).expect("one of the outer matrices");
    let mut signs = vec![0f32; outer * outer];
    for (i, row) in signs.chunks_exact_mut(outer).enumerate() {
        row[i] = 1.0;
        own.apply(row);
        row.iter_mut().for_each(|x| *x = x.signum());
    }
    signs
}
