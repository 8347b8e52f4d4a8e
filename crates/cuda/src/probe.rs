//! What there is of CUDA on this machine.

use crate::blas::CUBLASLT;
use crate::kernel::NVRTC;
use crate::{CudaError, gpu};
use cudarc::driver::sys;

/// One GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Its name.
    pub name: String,
    /// Bytes of memory.
    pub memory: usize,
    /// Compute capability, 10 major + minor.
    pub capability: u32,
    /// Multiprocessors.
    pub multiprocessors: u32,
}

/// What was found.
#[derive(Debug)]
pub struct Probe {
    /// The CUDA version that the driver supports, 1000 major + 10 minor.
    pub driver: Result<i32, CudaError>,
    /// The GPUs in the order of their numbers.
    pub devices: Vec<DeviceInfo>,
    /// Whether cuBLASLt is there.
    pub cublaslt: bool,
    /// Whether NVRTC is there.
    pub nvrtc: bool,
}

/// Looks for driver, libraries and GPUs.
pub fn probe() -> Probe {
    let mut devices = Vec::new();
    let driver = gpu::initialise().and_then(|count| {
        for ordinal in 0..count {
            let (_, name, limits, memory) = gpu::look(ordinal)?;
            let gpu::Limits { capability, multiprocessors, .. } = limits;
            devices.push(DeviceInfo { name, memory, capability, multiprocessors });
        }
        let mut version = 0;
        // SAFETY: the driver is there, or `initialise` had failed; the pointer is valid for the call.
        gpu::check(unsafe { sys::cuDriverGetVersion(&mut version) }, || "cuDriverGetVersion".into())?;
        Ok(version)
    });
    // SAFETY: loading these libraries runs their initialisers.
    let (cublaslt, nvrtc) =
        unsafe { (cudarc::cublaslt::sys::is_culib_present(), cudarc::nvrtc::sys::is_culib_present()) };
    Probe { driver, devices, cublaslt, nvrtc }
}

impl Probe {
    /// What was looked for, and what was found.
    pub fn lines(&self) -> Vec<(String, String)> {
        let driver = match &self.driver {
            Ok(version) => format!("CUDA {}.{}", version / 1000, version % 1000 / 10),
            Err(error) => error.to_string(),
        };
        let library = |there: bool, name: &str| format!("{name} {}", if there { "found" } else { "not found" });
        let mut lines = vec![
            ("NVIDIA driver".to_owned(), driver),
            ("cuBLASLt".to_owned(), library(self.cublaslt, CUBLASLT)),
            ("NVRTC".to_owned(), library(self.nvrtc, NVRTC)),
        ];
        lines.extend(self.devices.iter().enumerate().map(|(ordinal, own)| {
            let DeviceInfo { name, memory, capability, multiprocessors } = own;
            let what = format!(
                "{name}, {:.1} GiB, compute capability {}.{}, {multiprocessors} multiprocessors",
                *memory as f64 / (1u64 << 30) as f64,
                capability / 10,
                capability % 10
            );
            (format!("cuda:{ordinal}"), what)
        }));
        lines
    }
}
