//! The contract between a dibit model and the machine that it runs on.
//!
//! [`Device`] is all that inference takes, in four parts: [`Memory`], [`Dense`], [`Experts`] and [`KvStorage`]. [`Measure`] is what
//! benchmarks take besides, [`Train`] what training does. [`KvCache`] is a cache on a device, and [`Pass`] the order of what
//! a forward pass does with it.

#[doc(hidden)]
pub use candle_core;

mod blocks;
mod budget;
mod dense;
mod device;
mod error;
mod experts;
mod kv_cache;
mod kv_storage;
mod measure;
mod memory;
mod pass;
mod storage;
mod tensor;
mod train;

pub use blocks::{Block, BlockType, cast_blocks};
pub use budget::Budget;
pub use dense::{Activation, Dense, Heads, Norm, Output, Projection};
pub use device::Device;
pub use error::DeviceError;
pub use experts::{Experts, Routing};
pub use kv_cache::{KvCache, OwnedCache};
pub use kv_storage::{Arithmetic, Attention, KvStorage, QueryHeads};
pub use measure::{Measure, Sweep};
pub use memory::{DeviceMemory, Memory};
pub use pass::{LayerPass, Pass, StagedRows};
pub use storage::{Bytes, SharedBytes};
pub use tensor::{DType, Tensor, TensorError, Values};
pub use train::{AdamStep, Place, ROW_STATISTICS, RowStatistic, Rows, Train};
