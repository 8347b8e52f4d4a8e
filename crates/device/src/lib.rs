//! The operations that a dibit model is made of.
//!
//! [`Device`] is the whole contract between a model and the machine it runs on. [`Cpu`] is its
//! reference implementation; any other device is tested against it.

mod batch;
mod blocks;
mod budget;
mod cpu;
mod device;
mod error;
pub mod host;
mod tensor;
mod train;

pub use batch::{Batch, Mode, Phase, Span};
pub use blocks::BlockType;
pub use budget::Budget;
pub use cpu::{Cpu, CpuCache, Isa};
pub use device::{Device, DeviceMemory, Heads, Norm, Output, Projection, Sweep};
pub use error::DeviceError;
pub use tensor::{Bytes, DType, SharedBytes, Tensor, TensorError};
pub use train::{AdamStep, Place, ROW_STATISTICS, RowStatistic, Rows, Train};
