//! The operations of a dibit model on NVIDIA GPUs.
//!
//! Nothing of CUDA is needed to build this crate. Driver, cuBLASLt and NVRTC are found when a program runs, and
//! [`Cuda::new`] says what is missing where one of them is not there. Kernels are CUDA C++ (`kernels/`), compiled by NVRTC
//! when they are first used and kept on disk.

#![deny(missing_docs)]

mod abi;
mod attention;
mod blas;
mod cuda;
mod device;
mod embedded;
mod error;
mod experts;
mod files;
mod gpu;
mod graph;
mod kernel;
mod linear;
mod matrix;
mod memory;
mod modules;
mod partial_sums;
mod paths;
mod probe;
mod rows;
mod source;
mod store;
mod timing;
mod train;
mod turn;

pub use cuda::Cuda;
pub use device::CudaCache;
pub use error::CudaError;
pub use experts::{ChosenExperts, ExpertStack};
pub use files::{KernelFile, Resources, kernel_files};
pub use probe::{DeviceInfo, Probe, probe};
