use crate::{DeviceError, Memory};
use std::time::{Duration, Instant};

/// What measuring takes of a device.
pub trait Measure: Memory {
    /// Threads of the host that operations run on; 0 where they run elsewhere.
    fn threads(&self) -> usize {
        0
    }

    /// Waits until everything that was asked for is done. [`Memory::download`] does so too.
    fn synchronize(&self) {}

    /// How long `work` takes, to its end on the device.
    fn timed<R: Send>(&self, work: impl FnOnce() -> R + Send) -> (R, Duration) {
        self.synchronize();
        let start = Instant::now();
        let result = work();
        self.synchronize();
        (result, start.elapsed())
    }

    /// Memory of this size, to be read from one end to the other.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn sweep(&self, bytes: usize) -> Result<Box<dyn Sweep>, DeviceError>;
}

/// Memory that is read from one end to the other: how fast that is, and a way to empty caches. On the CPU it is read by
/// the threads of the [`Memory::scope`] that it is called in.
pub trait Sweep: Send + Sync {
    /// Its size.
    fn bytes(&self) -> usize;

    /// Reads all of it once, and says how long that took.
    fn read(&self) -> Duration;
}
