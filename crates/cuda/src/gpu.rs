//! One GPU: its context, the stream that orders everything, and what has gone wrong on it.

use crate::CudaError;
use crate::modules::Modules;
use crate::turn::{Alone, Turn, Turns};
use cudarc::driver::sys;
use std::ffi::CStr;
use std::sync::{Arc, Mutex};

/// The CUDA version that a driver must support.
pub(crate) const DRIVER: i32 = 13_000;

/// Compute capability that the kernels need, 10 major + minor.
pub(crate) const CAPABILITY: u32 = 80;

/// What is asked of a GPU's attributes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// 10 major + minor.
    pub capability: u32,
    pub multiprocessors: u32,
    /// Shared memory that a block can have.
    pub shared_bytes: usize,
}

/// A GPU with a context and one stream.
pub(crate) struct Gpu {
    pub(crate) name: String,
    pub(crate) limits: Limits,
    pub(crate) modules: Modules,
    turns: Turns,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// The first call that failed since it was last asked for.
    failed: Mutex<Option<CudaError>>,
}

// SAFETY: a CUDA context and its streams may be used from any thread to which the context is bound, which `bind` does.
unsafe impl Send for Gpu {}
// SAFETY: the driver's functions are safe to call from several threads; what they order is ordered by the one stream.
unsafe impl Sync for Gpu {}

/// What a result means.
pub(crate) fn message(result: sys::CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the pointer is valid for the call; the string that it is set to is static.
    let known = unsafe { sys::cuGetErrorString(result, &mut text) } == sys::CUresult::CUDA_SUCCESS && !text.is_null();
    if known {
        // SAFETY: a string of the driver, which ends with 0.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    } else {
        format!("{result:?}")
    }
}

pub(crate) fn check(result: sys::CUresult, call: impl FnOnce() -> String) -> Result<(), CudaError> {
    match result {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(CudaError::Call { call: call(), message: message(other) }),
    }
}

/// Loads the driver and says how many GPUs it has.
pub(crate) fn initialise() -> Result<usize, CudaError> {
    // SAFETY: loading the driver's library runs its initialisers, as every CUDA program does.
    if !unsafe { sys::is_culib_present() } {
        return Err(CudaError::NoDriver(if cfg!(windows) { "nvcuda.dll" } else { "libcuda.so.1" }));
    }
    let mut found = 0;
    // SAFETY: the pointers are valid for the calls.
    unsafe {
        check(sys::cuDriverGetVersion(&mut found), || "cuDriverGetVersion".into())?;
        if found < DRIVER {
            return Err(CudaError::OldDriver { found, needed: DRIVER });
        }
        let result = sys::cuInit(0);
        if result == sys::CUresult::CUDA_ERROR_NO_DEVICE {
            return Ok(0);
        }
        check(result, || "cuInit".into())?;
        let mut count = 0;
        check(sys::cuDeviceGetCount(&mut count), || "cuDeviceGetCount".into())?;
        Ok(count as usize)
    }
}

/// Handle, name and limits of a GPU.
pub(crate) fn look(ordinal: usize) -> Result<(sys::CUdevice, String, Limits, usize), CudaError> {
    let count = initialise()?;
    if ordinal >= count {
        return Err(CudaError::NoDevice { ordinal, count });
    }
    let mut device = 0;
    let mut name = [0; 256];
    let mut total = 0;
    // SAFETY: the pointers are valid for the calls, and the name's buffer is as long as said.
    unsafe {
        check(sys::cuDeviceGet(&mut device, ordinal as i32), || format!("cuDeviceGet({ordinal})"))?;
        check(sys::cuDeviceGetName(name.as_mut_ptr(), 256, device), || "cuDeviceGetName".into())?;
        check(sys::cuDeviceTotalMem_v2(&mut total, device), || "cuDeviceTotalMem".into())?;
    }
    // SAFETY: the driver ends the name with 0 within the buffer.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
    let attribute = |which: sys::CUdevice_attribute| -> Result<usize, CudaError> {
        let mut value = 0;
        // SAFETY: the pointer is valid for the call.
        check(unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) }, || {
            format!("cuDeviceGetAttribute({which:?})")
        })?;
        Ok(value as usize)
    };
    use sys::CUdevice_attribute_enum as Attribute;
    let limits = Limits {
        capability: (10 * attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
            + attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?) as u32,
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
    };
    Ok((device, name, limits, total))
}

impl Gpu {
    pub(crate) fn new(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let (device, name, limits, _) = look(ordinal)?;
        if limits.capability < CAPABILITY {
            return Err(CudaError::OldDevice { name, capability: limits.capability });
        }
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) };
        check(result, || format!("cuDevicePrimaryCtxRetain({ordinal})"))?;
        let mut gpu = Gpu {
            name,
            limits,
            modules: Modules::new(limits.capability),
            turns: Turns::default(),
            device,
            context,
            stream: std::ptr::null_mut(),
            failed: Mutex::new(None),
        };
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        let turn = gpu.bind()?;
        // SAFETY: the pointer is valid for the call.
        check(unsafe { sys::cuStreamCreate(&mut stream, flags) }, || "cuStreamCreate".into())?;
        drop(turn);
        gpu.stream = stream;
        Ok(Arc::new(gpu))
    }

    /// Makes the context this thread's, for calls as long as the turn lasts.
    pub(crate) fn bind(&self) -> Result<Turn<'_>, CudaError> {
        let turn = self.turns.begin();
        // SAFETY: the context is retained as long as `self` lives.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, || "cuCtxSetCurrent".into())?;
        Ok(turn)
    }

    /// Waits until no other thread is calling, and lets none call.
    pub(crate) fn alone(&self) -> Alone<'_> {
        self.turns.alone()
    }

    pub(crate) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Free and total memory in bytes.
    pub(crate) fn memory(&self) -> Result<(usize, usize), CudaError> {
        let _turn = self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are valid for the call.
        check(unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }, || "cuMemGetInfo".into())?;
        Ok((free, total))
    }

    /// Does what cannot return an error now; a failure is kept for [`Gpu::synchronize`].
    pub(crate) fn note(&self, call: impl FnOnce() -> sys::CUresult) {
        if let Err(error) = self.bind().and_then(|_turn| check(call(), || "an operation".into())) {
            self.fail(error);
        }
    }

    /// Keeps the first failure.
    pub(crate) fn fail(&self, error: CudaError) {
        self.failed.lock().expect("no panic while it is held").get_or_insert(error);
    }

    /// Whether a failure is kept.
    pub(crate) fn has_failed(&self) -> bool {
        self.failed.lock().expect("no panic while it is held").is_some()
    }

    /// The first failure since it was last asked for.
    pub(crate) fn take_failure(&self) -> Option<CudaError> {
        self.failed.lock().expect("no panic while it is held").take()
    }

    /// Waits until everything that was asked for is done.
    ///
    /// # Errors
    /// The first failure since the last call.
    pub(crate) fn synchronize(&self) -> Result<(), CudaError> {
        let _turn = self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        let result = unsafe { sys::cuStreamSynchronize(self.stream) };
        if let Some(error) = self.take_failure() {
            return Err(error);
        }
        check(result, || "waiting for kernels".into())
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if let Ok(_turn) = self.bind() {
            // SAFETY: nothing holds the stream or, by the reference count of `Gpu`, memory of the context.
            unsafe {
                if !self.stream.is_null() {
                    sys::cuStreamSynchronize(self.stream);
                    sys::cuStreamDestroy_v2(self.stream);
                }
                sys::cuDevicePrimaryCtxRelease_v2(self.device);
            }
        }
    }
}
