//! Rotations of heads on a GPU, and other bases.

use crate::CudaError;
use crate::abi;
use crate::gpu::Gpu;
use crate::memory::Memory;
use bytemuck::Zeroable;
use dibit_cache::{Basis, HeadTransform};
use dibit_quant::Hadamard;
use std::sync::Arc;

/// An invertible matrix for each KV head, or one for all; one that turns, for keys.
pub(crate) enum Rotation {
    None,
    /// Hadamard matrices on the diagonal.
    Hadamard {
        order: usize,
        blocks: Memory,
        block_count: usize,
        signs: Memory,
        /// Signs of the transposed matrices: the way back.
        back: Memory,
    },
    Basis {
        order: usize,
        /// `[kv head][order][order]`
        there: Memory,
        /// The inverses.
        back: Memory,
    },
}

impl Rotation {
    /// The transform of heads of `order` channels.
    pub(super) fn new(gpu: &Arc<Gpu>, order: usize, own: Option<&HeadTransform>) -> Result<Self, CudaError> {
        match own {
            None => Ok(Rotation::None),
            Some(HeadTransform::Hadamard(whole)) => Rotation::hadamard(gpu, whole),
            Some(HeadTransform::Basis(basis)) => Rotation::basis(gpu, order, basis),
        }
    }

    /// A Hadamard matrix, or one of such blocks.
    fn hadamard(gpu: &Arc<Gpu>, whole: &Hadamard) -> Result<Self, CudaError> {
        let (mut blocks, mut signs, mut back) = (Vec::new(), Vec::new(), Vec::new());
        for order in whole.blocks() {
            let fits = |outer: &usize| order.is_multiple_of(*outer) && (order / outer).is_power_of_two();
            let outer = [1, 12, 20].into_iter().find(fits).expect("the matrix exists");
            blocks.push(abi::HadamardBlock {
                order: order as i32,
                outer: outer as i32,
                signs: signs.len() as i32,
                norm: 1.0 / (order as f32).sqrt(),
            });
            let own = outer_signs(outer);
            back.extend(transposed(&own, outer));
            signs.extend(own);
        }
        Ok(Rotation::Hadamard {
            order: whole.order(),
            block_count: blocks.len(),
            blocks: Memory::of(gpu, "a rotation", &blocks)?,
            signs: Memory::of(gpu, "a rotation", &signs)?,
            back: Memory::of(gpu, "a rotation", &back)?,
        })
    }

    /// A basis for each KV head.
    fn basis(gpu: &Arc<Gpu>, order: usize, basis: &Basis) -> Result<Self, CudaError> {
        Ok(Rotation::Basis {
            order,
            there: Memory::of(gpu, "a basis", &basis.there)?,
            back: Memory::of(gpu, "a basis", &basis.inverse(order))?,
        })
    }

    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Rotation::None)
    }

    pub(crate) fn for_kernels(&self) -> abi::Rotation {
        match self {
            Rotation::None => abi::Rotation::zeroed(),
            Rotation::Hadamard { order, blocks, block_count, signs, back } => abi::Rotation {
                kind: 1,
                order: *order as i32,
                block_count: *block_count as i32,
                padding: 0,
                blocks: blocks.at(0),
                matrix: signs.at(0),
                back: back.at(0),
            },
            Rotation::Basis { order, there, back } => abi::Rotation {
                kind: 2,
                order: *order as i32,
                block_count: 0,
                padding: 0,
                blocks: 0,
                matrix: there.at(0),
                back: back.at(0),
            },
        }
    }
}

/// A square matrix with its rows as columns.
fn transposed(matrix: &[f32], order: usize) -> Vec<f32> {
    (0..matrix.len()).map(|at| matrix[at % order * order + at / order]).collect()
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
