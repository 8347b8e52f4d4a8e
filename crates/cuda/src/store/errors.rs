//! What kernels find wrong with numbers.

use crate::CudaError;
use crate::abi::Errors;
use crate::gpu::Gpu;
use crate::memory::{Memory, Pinned};
use dibit_cache::Batch;
use dibit_device::DeviceError;
use dibit_quant::QuantError;
use std::sync::Arc;

/// The record on the GPU.
pub(super) struct ErrorRecord {
    memory: Memory,
    host: Pinned,
}

impl ErrorRecord {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let memory = Memory::new(gpu, "errors", size_of::<Errors>())?;
        memory.write(0, bytemuck::bytes_of(&Errors::NONE))?;
        Ok(ErrorRecord { memory, host: Pinned::new(gpu, size_of::<Errors>())? })
    }

    pub(super) fn at(&self) -> u64 {
        self.memory.at(0)
    }

    /// The first error of a batch, which is forgotten.
    pub(super) fn take(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        self.memory.read(0, self.host.bytes_mut())?;
        let found: Errors = bytemuck::pod_read_unaligned(self.host.bytes());
        if found == Errors::NONE {
            return Ok(());
        }
        self.memory.write(0, bytemuck::bytes_of(&Errors::NONE)).map_err(DeviceError::from)?;
        Err(found.first(batch))
    }
}

impl Errors {
    const NONE: Self = Errors { not_finite: u64::MAX, range: u64::MAX, ends: u64::MAX };

    fn first(self, batch: &Batch) -> DeviceError {
        let float = |bits: u64| f32::from_bits(bits as u32);
        // A layer is written before it is packed.
        if self.not_finite >> 52 <= self.range >> 52 {
            let (layer, side) = ((self.not_finite >> 52) as usize, self.not_finite >> 51 & 1);
            let row = (self.not_finite >> 32 & 0x7_ffff) as usize;
            let span = batch.spans.iter().find(|span| span.rows.contains(&row));
            let token = span.map_or(row, |span| span.cached + row - span.rows.start);
            let side = if side == 0 { "key" } else { "value" };
            let (kv_head, value) = ((self.not_finite & 0xff) as usize, float(self.not_finite & !0xff));
            return DeviceError::NotFinite { side, layer, kv_head, token, value };
        }
        let source = QuantError::Range { min: float(self.ends >> 32), max: float(self.ends) };
        DeviceError::Quantize { layer: (self.range >> 52) as usize, source }
    }
}
