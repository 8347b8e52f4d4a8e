use dibit_device::DeviceError;
use thiserror::Error;

/// Why there is no GPU to run on.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver's library is missing.
    #[error("the NVIDIA driver library {0} was not found; install the driver, or run with --device cpu")]
    NoDriver(&'static str),
    /// The driver is older than what dibit asks of it.
    #[error(
        "the NVIDIA driver supports CUDA {}.{}, and dibit needs {}.{}; update the driver, or run with --device cpu",
        .found / 1000, .found % 1000 / 10, .needed / 1000, .needed % 1000 / 10
    )]
    OldDriver {
        /// CUDA version of the driver: 1000 major + 10 minor.
        found: i32,
        /// The oldest that will do.
        needed: i32,
    },
    /// There is no GPU, or none of this number.
    #[error("there is no GPU {ordinal}: the NVIDIA driver shows {count}; run with --device cpu")]
    NoDevice {
        /// What was asked for.
        ordinal: usize,
        /// GPUs that there are.
        count: usize,
    },
    /// The GPU is older than the kernels.
    #[error("{name} has compute capability {}.{}, and dibit needs 8.0 (Ampere) or later; run with --device cpu", .capability / 10, .capability % 10)]
    OldDevice {
        /// Its name.
        name: String,
        /// 10 major + minor.
        capability: u32,
    },
    /// cuBLASLt is missing.
    #[error(
        "the library {0} was not found: install CUDA 13's cuBLAS (for Python: pip install nvidia-cublas) and let LD_LIBRARY_PATH name its folder, or run with --device cpu"
    )]
    NoBlas(&'static str),
    /// There is no compiler for kernels, and none were built in.
    #[error(
        "the library {0} was not found and this build holds no kernels for {1}: install CUDA 13's NVRTC (for Python: pip install nvidia-cuda-nvrtc) and let LD_LIBRARY_PATH name its folder, or run with --device cpu"
    )]
    NoCompiler(&'static str, String),
    /// A kernel does not compile.
    #[error("NVRTC cannot compile {file} for {architecture}; please report this with what it says:\n{log}")]
    Compile {
        /// Source of the kernel.
        file: String,
        /// What it was compiled for.
        architecture: String,
        /// What the compiler says.
        log: String,
    },
    /// A call of a CUDA library failed.
    #[error("{call}: {message}")]
    Call {
        /// The function, with what it was for.
        call: String,
        /// What the library says.
        message: String,
    },
    /// Memory could not be had.
    #[error(transparent)]
    Memory(DeviceError),
}

impl From<CudaError> for DeviceError {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Memory(error) => error,
            other => DeviceError::Failed(other.to_string()),
        }
    }
}
