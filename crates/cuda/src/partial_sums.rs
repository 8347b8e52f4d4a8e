//! Memory for sums that are computed in parts.

use crate::CudaError;
use crate::gpu::Gpu;
use crate::memory::Memory;
use std::sync::{Arc, Mutex};

/// Rows and columns of a product that one block of threads computes, as the kernel has them.
pub(crate) const TILE: usize = 64;

/// Blocks that a product is to have, by parting its sums where it has few tiles: a constant, as the order of sums must
/// not depend on the GPU.
pub(crate) const PRODUCT_BLOCKS: usize = 256;

/// Memory for sums in parts, allocated when it is first needed.
#[derive(Default)]
pub(crate) struct PartialSums(Mutex<Option<Memory>>);

impl PartialSums {
    /// What the parts of any product take, and more than those of a sum.
    const BYTES: usize = PRODUCT_BLOCKS * TILE * TILE * size_of::<f32>();

    /// Runs what uses the memory. Others that use it come behind all that this asks for.
    pub(crate) fn with<R>(
        &self,
        gpu: &Arc<Gpu>,
        run: impl FnOnce(&Memory) -> Result<R, CudaError>,
    ) -> Result<R, CudaError> {
        let _turn = gpu.bind()?;
        let mut own = self.0.lock().expect("no panic while it is held");
        if own.is_none() {
            *own = Some(Memory::new(gpu, "sums in parts", Self::BYTES)?);
        }
        run(own.as_ref().expect("it was just allocated"))
    }
}
