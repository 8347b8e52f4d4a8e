//! The kernels of a cache.

use crate::CudaError;
use crate::gpu::Gpu;
use crate::kernel::Kernel;
use crate::source::{ENCODE, EXACT, STATES, STORE};

/// Every kernel that a cache of one head size may need, compiled before the first pass.
pub(crate) struct Kernels {
    pub write_rows: Kernel,
    pub append_rows: Kernel,
    pub rotate_rows: Kernel,
    pub turn_back: Kernel,
    pub protect_in_pages: Kernel,
    pub encode: Kernel,
    pub missed_features: Kernel,
    pub add_states: Kernel,
    pub correct: Kernel,
    pub correct_row: Kernel,
    pub attend_exact: Kernel,
    pub join_splits: Kernel,
}

impl Kernels {
    pub(crate) fn new(gpu: &Gpu, head_dim: usize) -> Result<Self, CudaError> {
        let head_dim = [("HEAD_DIM", head_dim as i64)];
        Ok(Kernels {
            write_rows: gpu.kernel(STORE, &[], "write_rows")?,
            append_rows: gpu.kernel(STORE, &[], "append_rows")?,
            rotate_rows: gpu.kernel(STORE, &[], "rotate_rows")?,
            turn_back: gpu.kernel(ENCODE, &[], "turn_back")?,
            protect_in_pages: gpu.kernel(ENCODE, &[], "protect_in_pages")?,
            encode: gpu.kernel(ENCODE, &[], "encode")?,
            missed_features: gpu.kernel(STATES, &[], "missed_features")?,
            add_states: gpu.kernel(STATES, &[], "add_states")?,
            correct: gpu.kernel(STATES, &[], "correct")?,
            correct_row: gpu.kernel(STATES, &[], "correct_row")?,
            attend_exact: gpu.kernel(EXACT, &head_dim, "attend_exact")?,
            join_splits: gpu.kernel(EXACT, &head_dim, "join_splits")?,
        })
    }
}
