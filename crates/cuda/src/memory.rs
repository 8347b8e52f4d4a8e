//! Memory of a GPU, and host memory that it reads without a copy.

use crate::gpu::{Gpu, check};
use crate::{CudaError, gpu};
use cudarc::driver::sys;
use dibit_device::DeviceError;
use std::ffi::c_void;
use std::sync::Arc;

/// Bytes on a GPU, given back when it is dropped.
pub(crate) struct Memory {
    gpu: Arc<Gpu>,
    address: sys::CUdeviceptr,
    bytes: usize,
}

/// Page-locked bytes of the host.
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    address: *mut u8,
    bytes: usize,
}

// SAFETY: the pointer is to memory that only this owner gives back, and all access goes through `&self` and `&mut self`.
unsafe impl Send for Pinned {}
// SAFETY: shared access only reads.
unsafe impl Sync for Pinned {}

impl Memory {
    /// `bytes` bytes that hold anything.
    pub(crate) fn new(gpu: &Arc<Gpu>, what: &'static str, bytes: usize) -> Result<Self, CudaError> {
        let _turn = gpu.bind()?;
        let mut address = 0;
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(16)) };
        if result == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            let (free, total) = gpu.memory()?;
            return Err(CudaError::Memory(DeviceError::GpuMemory { what, bytes, free, total }));
        }
        check(result, || format!("cuMemAlloc of {bytes} bytes for {what}"))?;
        Ok(Memory { gpu: gpu.clone(), address, bytes })
    }

    /// The same, filled with zeros.
    pub(crate) fn zeros(gpu: &Arc<Gpu>, what: &'static str, bytes: usize) -> Result<Self, CudaError> {
        let memory = Memory::new(gpu, what, bytes)?;
        memory.clear(0, bytes);
        Ok(memory)
    }

    /// The same, holding a copy of these numbers.
    pub(crate) fn of<T: bytemuck::NoUninit>(
        gpu: &Arc<Gpu>,
        what: &'static str,
        values: &[T],
    ) -> Result<Self, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let memory = Memory::new(gpu, what, bytes.len())?;
        memory.write(0, bytes)?;
        Ok(memory)
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The GPU that it belongs to.
    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Address of the byte at `offset`, as kernels take it.
    pub(crate) fn at(&self, offset: usize) -> u64 {
        assert!(offset <= self.bytes.max(16), "byte {offset} of {}", self.bytes);
        self.address + offset as u64
    }

    /// Sets bytes to zero, behind what was asked for before.
    pub(crate) fn clear(&self, offset: usize, bytes: usize) {
        assert!(offset + bytes <= self.bytes, "bytes {offset} to {} of {}", offset + bytes, self.bytes);
        // SAFETY: the range lies in this allocation, and the stream orders it with everything else that touches it.
        self.gpu.note(|| unsafe { sys::cuMemsetD8Async(self.address + offset as u64, 0, bytes, self.gpu.stream()) });
    }

    /// Copies bytes of the host to `offset`, behind what was asked for before; they may change afterwards.
    pub(crate) fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), CudaError> {
        assert!(offset + bytes.len() <= self.bytes, "bytes {offset} to {} of {}", offset + bytes.len(), self.bytes);
        let _turn = self.gpu.bind()?;
        // SAFETY: both ranges are valid. From pageable memory the call returns once the bytes have been staged.
        let result = unsafe {
            sys::cuMemcpyHtoDAsync_v2(
                self.address + offset as u64,
                bytes.as_ptr().cast::<c_void>(),
                bytes.len(),
                self.gpu.stream(),
            )
        };
        check(result, || format!("cuMemcpyHtoDAsync of {} bytes", bytes.len()))
    }

    /// Copies bytes to the host once everything before is done.
    pub(crate) fn read(&self, offset: usize, out: &mut [u8]) -> Result<(), CudaError> {
        assert!(offset + out.len() <= self.bytes, "bytes {offset} to {} of {}", offset + out.len(), self.bytes);
        let _turn = self.gpu.bind()?;
        // SAFETY: both ranges are valid, and the copy is waited for.
        let result = unsafe {
            sys::cuMemcpyDtoHAsync_v2(
                out.as_mut_ptr().cast::<c_void>(),
                self.address + offset as u64,
                out.len(),
                self.gpu.stream(),
            )
        };
        check(result, || format!("cuMemcpyDtoHAsync of {} bytes", out.len()))?;
        self.gpu.synchronize()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if let Ok(_turn) = self.gpu.bind() {
            // SAFETY: the address came from cuMemAlloc, which waits for what uses the memory before it is given back.
            let result = unsafe { sys::cuMemFree_v2(self.address) };
            if result != sys::CUresult::CUDA_SUCCESS {
                tracing::debug!("cuMemFree: {}", gpu::message(result));
            }
        }
    }
}

impl Pinned {
    /// `bytes` zeros.
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        let _turn = gpu.bind()?;
        let mut address = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { sys::cuMemHostAlloc(&mut address, bytes.max(1), 0) };
        check(result, || format!("cuMemHostAlloc of {bytes} bytes"))?;
        // SAFETY: so many bytes were allocated.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        Ok(Pinned { gpu: gpu.clone(), address: address.cast(), bytes })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: so many bytes were allocated and set.
        unsafe { std::slice::from_raw_parts(self.address, self.bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes were allocated and set, and nobody else has them.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Ok(_turn) = self.gpu.bind() {
            // SAFETY: the address came from cuMemHostAlloc. What reads it is waited for first.
            unsafe {
                sys::cuStreamSynchronize(self.gpu.stream());
                sys::cuMemFreeHost(self.address.cast());
            }
        }
    }
}

/// A kernel's argument.
pub(crate) fn at(memory: &Memory, numbers: usize) -> u64 {
    memory.at(numbers * size_of::<f32>())
}

/// Makes sure that a buffer has so many bytes; returns its address.
pub(crate) fn room(
    gpu: &Arc<Gpu>,
    buffer: &mut Option<Memory>,
    what: &'static str,
    bytes: usize,
) -> Result<u64, DeviceError> {
    if buffer.as_ref().is_none_or(|own| own.bytes() < bytes) {
        *buffer = None;
        *buffer = Some(Memory::new(gpu, what, bytes)?);
    }
    Ok(buffer.as_ref().expect("a buffer").at(0))
}
