//! Timing on the GPU's own clock, and reading memory as fast as it can be read.

use crate::gpu::{Gpu, check};
use crate::kernel::{Grid, Kernel, launch};
use crate::memory::Memory;
use crate::{CudaError, source};
use cudarc::driver::sys;
use dibit_device::Sweep;
use std::sync::Arc;
use std::time::Duration;

/// Threads of a block that reads.
const THREADS: usize = 512;

/// A moment in a stream.
struct Event(sys::CUevent);

impl Event {
    /// The moment when everything that was asked for before is done.
    fn now(gpu: &Gpu) -> Result<Self, CudaError> {
        let _turn = gpu.bind()?;
        let mut event = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        check(unsafe { sys::cuEventCreate(&mut event, 0) }, || "cuEventCreate".into())?;
        let event = Event(event);
        // SAFETY: event and stream are valid.
        check(unsafe { sys::cuEventRecord(event.0, gpu.stream()) }, || "cuEventRecord".into())?;
        Ok(event)
    }

    /// The time since an earlier one. Both have passed.
    fn since(&self, earlier: &Event) -> Result<Duration, CudaError> {
        let mut milliseconds = 0.0;
        // SAFETY: the pointer is valid for the call, and the events are.
        let result = unsafe { sys::cuEventElapsedTime_v2(&mut milliseconds, earlier.0, self.0) };
        check(result, || "cuEventElapsedTime".into())?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the event came from cuEventCreate.
        unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// How long the GPU takes for what `work` asks of it. Where that cannot be said, the reason is kept for
/// [`Gpu::synchronize`].
pub(crate) fn timed<R>(gpu: &Gpu, work: impl FnOnce() -> R) -> (R, Duration) {
    let start = Event::now(gpu);
    let result = work();
    let time = start.and_then(|start| {
        let end = Event::now(gpu)?;
        gpu.synchronize()?;
        end.since(&start)
    });
    let time = time.unwrap_or_else(|error| {
        gpu.fail(error);
        Duration::ZERO
    });
    (result, time)
}

/// Memory of a GPU that is read whole.
pub(crate) struct CudaSweep {
    memory: Memory,
    out: Memory,
    kernel: Kernel,
    blocks: usize,
}

impl CudaSweep {
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        let kernel = gpu.kernel(source::SWEEP, &[], "sweep")?;
        let blocks = gpu.limits.multiprocessors as usize * gpu.resident(kernel, THREADS, 0);
        let memory = Memory::zeros(gpu, "memory to be read", bytes.next_multiple_of(16))?;
        // Zeros could be read faster than other numbers.
        let pattern: Vec<u32> = (0..1u32 << 18).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
        let pattern: &[u8] = bytemuck::cast_slice(&pattern);
        for start in (0..memory.bytes()).step_by(pattern.len()) {
            memory.write(start, &pattern[..pattern.len().min(memory.bytes() - start)])?;
        }
        Ok(CudaSweep { out: Memory::new(gpu, "memory to be read", 16)?, memory, kernel, blocks })
    }
}

impl Sweep for CudaSweep {
    fn bytes(&self) -> usize {
        self.memory.bytes()
    }

    fn read(&self) -> Duration {
        let gpu = self.memory.gpu();
        let count = (self.memory.bytes() / 16) as i64;
        let grid = Grid::new([self.blocks, 1, 1], THREADS);
        timed(gpu, || launch!(gpu, self.kernel, grid, self.memory.at(0), count, self.out.at(0))).1
    }
}
