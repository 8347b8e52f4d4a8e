//! A GPU as operations take it.

use crate::CudaError;
use crate::blas::Blas;
use crate::gpu::Gpu;
use crate::memory::Memory;
use crate::partial_sums::PartialSums;
use std::sync::Arc;

/// An NVIDIA GPU.
///
/// Operations that cannot return an error leave it to whoever waits next, so use a `Cuda` from one thread at a time where it
/// matters whose failure it was.
pub struct Cuda {
    pub(crate) gpu: Arc<Gpu>,
    pub(crate) blas: Blas,
    pub(crate) partial_sums: PartialSums,
    /// Whether passes of single tokens are recorded and done again.
    pub(crate) records: bool,
}

/// Activations on a GPU.
pub struct Buffer {
    pub(crate) memory: Memory,
    pub(crate) len: usize,
}

/// Ids on a GPU.
pub struct Ids {
    pub(crate) memory: Memory,
}

impl Cuda {
    /// The same, doing each pass anew, for tests.
    #[doc(hidden)]
    pub fn without_graphs(self) -> Self {
        Cuda { records: false, ..self }
    }

    /// Keeps a failure that an operation cannot return.
    pub(crate) fn keep(&self, result: Result<(), CudaError>) {
        if let Err(error) = result {
            self.gpu.fail(error);
        }
    }
}
