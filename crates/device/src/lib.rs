//! The operations that a dibit model is made of.
//!
//! [`Device`] is the whole contract between a model and the machine it runs on. [`Cpu`] is its
//! reference implementation; any other device is tested against it.

mod batch;
mod blocks;
mod cpu;
mod device;
mod error;
mod tensor;
mod train;

pub use batch::{Batch, Mode, Phase, Span};
pub use blocks::BlockType;
pub use cpu::{Cpu, Isa};
pub use device::{Device, Output};
pub use error::DeviceError;
pub use tensor::{Bytes, DType, SharedBytes, Tensor, TensorError};
pub use train::{AdamStep, Place, ROW_STATISTICS, RowStatistic, Rows, Train};
