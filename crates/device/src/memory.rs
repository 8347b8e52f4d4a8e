use crate::{Budget, DeviceError};
use std::ops::Range;

/// Memory of a machine, and passes on it.
///
/// Activations are row-major matrices of f32 precision in [`Memory::Buffer`]s, allocated once and reused.
/// All shapes are in numbers, not bytes. Operations panic on buffers that are too short: their shapes
/// follow from a validated model configuration, so this is a defect of the caller and not an input error.
pub trait Memory: Send + Sync {
    /// Activations.
    type Buffer: Send + Sync;
    /// Token ids, positions or row numbers.
    type Ids: Send + Sync;

    /// The device in words.
    fn describe(&self) -> String;

    /// Runs a whole forward pass. Operations may be called outside of it, but start more slowly there.
    fn scope<R: Send>(&self, pass: impl FnOnce() -> R + Send) -> R;

    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn buffer(&self, len: usize) -> Result<Self::Buffer, DeviceError>;

    /// A buffer of these numbers.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn upload(&self, values: &[f32]) -> Result<Self::Buffer, DeviceError>;

    /// Copies `buffer[range]` to the host, once everything that was asked for before is done.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] where any of that failed.
    fn download(&self, buffer: &Self::Buffer, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), DeviceError>;

    /// Room for `capacity` ids.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`].
    fn ids(&self, capacity: usize) -> Result<Self::Ids, DeviceError>;

    /// Overwrites the first ids.
    fn write_ids(&self, ids: &mut Self::Ids, values: &[u32]);

    /// What passes on this device may take.
    fn budget(&self) -> Budget {
        Budget::HOST
    }

    /// Memory of the device, where it has some of its own.
    fn memory(&self) -> Option<DeviceMemory> {
        None
    }
}

/// Memory of a device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What can still be had.
    pub free: usize,
    /// All of it, what others use included.
    pub total: usize,
}
