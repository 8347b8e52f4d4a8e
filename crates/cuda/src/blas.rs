//! Products of matrices by cuBLASLt.

use crate::CudaError;
use crate::gpu::Gpu;
use crate::matrix::{Matrix, Stored};
use crate::memory::Memory;
use crate::turn::Turn;
use cudarc::cublaslt::sys;
use std::collections::HashMap;
use std::ffi::{CStr, c_void};
use std::sync::{Arc, Mutex, MutexGuard};

pub(crate) const CUBLASLT: &str = if cfg!(windows) { "cublasLt64_13.dll" } else { "libcublasLt.so.13" };

/// Memory that cuBLASLt may use in a product.
const WORKSPACE: usize = 32 << 20;

/// CUBLAS_OP_T.
const TRANSPOSED: i32 = 1;

/// A handle with its workspace, and what is known of shapes.
pub(crate) struct Blas {
    gpu: Arc<Gpu>,
    handle: sys::cublasLtHandle_t,
    /// Held while a product is asked for: it may be several kernels, and none of another product may come between them.
    workspace: Mutex<Memory>,
    chosen: Mutex<HashMap<Shape, sys::cublasLtMatmulAlgo_t>>,
    /// Memory for activations in 16 bit. It grows by another piece, for a captured graph may still name the old ones.
    scratch: Mutex<Vec<Memory>>,
}

// SAFETY: cuBLASLt's functions take a handle from any thread, and products are ordered by the one stream.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

/// Memory that is its holder's until what uses it has been asked for.
pub(crate) struct Scratch<'a> {
    all: MutexGuard<'a, Vec<Memory>>,
    _turn: Turn<'a>,
}

impl Scratch<'_> {
    pub(crate) fn memory(&self) -> &Memory {
        self.all.last().expect("there is one")
    }
}

/// What the choice of an algorithm depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    stored: Stored,
    rows: usize,
    outputs: usize,
    inputs: usize,
    add: bool,
    bias: bool,
    /// Bytes that the addresses of weights, activations and results are multiples of.
    alignment: [u32; 3],
}

/// A product: `out = scale x w^T + bias`, or added to `out`.
pub(crate) struct Product<'a> {
    pub w: &'a Matrix,
    /// Address of activations, stored as the weights are.
    pub x: u64,
    pub rows: usize,
    pub scale: f32,
    /// Address of a number for each output; 0 where there is none.
    pub bias: u64,
    pub out: u64,
    pub add: bool,
}

fn check(status: sys::cublasStatus_t, call: &str) -> Result<(), CudaError> {
    if status == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS {
        return Ok(());
    }
    // SAFETY: the string that cuBLASLt gives is static.
    let text = unsafe { sys::cublasLtGetStatusString(status) };
    let message = if text.is_null() {
        format!("{status:?}")
    } else {
        // SAFETY: a string of the library, which ends with 0.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    };
    Err(CudaError::Call { call: call.to_owned(), message })
}

/// A description that cuBLASLt made, destroyed when it is dropped.
struct Owned<T> {
    raw: *mut T,
    destroy: unsafe fn(*mut T) -> sys::cublasStatus_t,
}

impl<T> Owned<T> {
    fn new(
        call: &str,
        create: impl FnOnce(&mut *mut T) -> sys::cublasStatus_t,
        destroy: unsafe fn(*mut T) -> sys::cublasStatus_t,
    ) -> Result<Self, CudaError> {
        let mut raw = std::ptr::null_mut();
        check(create(&mut raw), call)?;
        Ok(Owned { raw, destroy })
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: it was created and is destroyed once.
        unsafe { (self.destroy)(self.raw) };
    }
}

/// What a product is and where its matrices lie. Matrices are those of cuBLASLt, by columns: the rows of activations and
/// results are columns, and weights are transposed.
struct Descriptions {
    product: Owned<sys::cublasLtMatmulDescOpaque_t>,
    weights: Owned<sys::cublasLtMatrixLayoutOpaque_t>,
    x: Owned<sys::cublasLtMatrixLayoutOpaque_t>,
    out: Owned<sys::cublasLtMatrixLayoutOpaque_t>,
}

impl Descriptions {
    fn new(shape: Shape, bias: u64) -> Result<Self, CudaError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let float = sys::cudaDataType::CUDA_R_32F;
        let stored = match shape.stored {
            Stored::F32 => float,
            Stored::F16 => sys::cudaDataType::CUDA_R_16F,
            Stored::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        };
        let layout = |kind, rows: usize, cols: usize| {
            // SAFETY: the pointer is valid for the call.
            let create = |raw: &mut _| unsafe {
                sys::cublasLtMatrixLayoutCreate(raw, kind, rows as u64, cols as u64, rows as i64)
            };
            Owned::new("cublasLtMatrixLayoutCreate", create, sys::cublasLtMatrixLayoutDestroy)
        };
        // f32 is multiplied as f32, and never as TF32.
        let compute = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        // SAFETY: the pointer is valid for the call.
        let create = |raw: &mut _| unsafe { sys::cublasLtMatmulDescCreate(raw, compute, float) };
        let product = Owned::new("cublasLtMatmulDescCreate", create, sys::cublasLtMatmulDescDestroy)?;
        let own = Descriptions {
            product,
            weights: layout(stored, shape.inputs, shape.outputs)?,
            x: layout(stored, shape.inputs, shape.rows)?,
            out: layout(float, shape.outputs, shape.rows)?,
        };
        own.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if shape.bias {
            own.set(Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            own.set(Attribute::CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias)?;
        }
        Ok(own)
    }

    fn set<T: Copy>(&self, attribute: sys::cublasLtMatmulDescAttributes_t, value: &T) -> Result<(), CudaError> {
        let bytes = std::ptr::from_ref(value).cast::<c_void>();
        // SAFETY: the value is as long as said, and is copied.
        let status = unsafe { sys::cublasLtMatmulDescSetAttribute(self.product.raw, attribute, bytes, size_of::<T>()) };
        check(status, "cublasLtMatmulDescSetAttribute")
    }
}

impl Blas {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        // SAFETY: loading the library runs its initialisers.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoBlas(CUBLASLT));
        }
        let _turn = gpu.bind()?;
        let workspace = Memory::new(gpu, "cuBLASLt", WORKSPACE)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        check(unsafe { sys::cublasLtCreate(&mut handle) }, "cublasLtCreate")?;
        Ok(Blas {
            gpu: gpu.clone(),
            handle,
            workspace: Mutex::new(workspace),
            chosen: Mutex::default(),
            scratch: Mutex::default(),
        })
    }

    /// At least `bytes` bytes that hold anything.
    pub(crate) fn scratch(&self, bytes: usize) -> Result<Scratch<'_>, CudaError> {
        // The turn comes first: whoever records has no use for a lock whose holder waits for the end of it.
        let turn = self.gpu.bind()?;
        let mut all = self.scratch.lock().expect("no panic while it is held");
        let largest = all.last().map_or(0, Memory::bytes);
        if all.is_empty() || largest < bytes {
            all.push(Memory::new(&self.gpu, "activations in 16 bit", bytes.max(2 * largest))?);
        }
        Ok(Scratch { all, _turn: turn })
    }

    /// Computes a product behind everything that was asked for before.
    pub(crate) fn multiply(&self, product: Product) -> Result<(), CudaError> {
        let Product { w, x, rows, scale, bias, out, add } = product;
        if rows == 0 || w.rows == 0 {
            return Ok(());
        }
        let _turn = self.gpu.bind()?;
        let weights = w.memory.at(0);
        let shape = Shape {
            stored: w.stored,
            rows,
            outputs: w.rows,
            inputs: w.cols,
            add,
            bias: bias != 0,
            alignment: [weights, x, out].map(|address| 1 << address.trailing_zeros().min(8)),
        };
        let own = Descriptions::new(shape, bias)?;
        let algorithm = self.algorithm(shape, &own)?;
        let workspace = self.workspace.lock().expect("no panic while it is held");
        let beta = if add { 1f32 } else { 0.0 };
        // SAFETY: descriptions and addresses are valid, the matrices lie in memory of this GPU that outlives the product
        // on its stream, and the factors are read by the call.
        let status = unsafe {
            sys::cublasLtMatmul(
                self.handle,
                own.product.raw,
                std::ptr::from_ref(&scale).cast(),
                weights as *const c_void,
                own.weights.raw,
                x as *const c_void,
                own.x.raw,
                std::ptr::from_ref(&beta).cast(),
                out as *const c_void,
                own.out.raw,
                out as *mut c_void,
                own.out.raw,
                &algorithm,
                workspace.at(0) as *mut c_void,
                WORKSPACE,
                self.gpu.stream().cast(),
            )
        };
        check(status, &format!("cublasLtMatmul of {shape:?}"))
    }

    /// The algorithm for a shape, which is asked for once.
    fn algorithm(&self, shape: Shape, own: &Descriptions) -> Result<sys::cublasLtMatmulAlgo_t, CudaError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let mut chosen = self.chosen.lock().expect("no panic while it is held");
        if let Some(algorithm) = chosen.get(&shape) {
            return Ok(*algorithm);
        }
        // SAFETY: the pointer is valid for the call.
        let create = |raw: &mut _| unsafe { sys::cublasLtMatmulPreferenceCreate(raw) };
        let preference = Owned::new("cublasLtMatmulPreferenceCreate", create, sys::cublasLtMatmulPreferenceDestroy)?;
        let set = |attribute, bytes: &[u8]| {
            // SAFETY: the value is as long as said, and is copied.
            let status = unsafe {
                let value = bytes.as_ptr().cast::<c_void>();
                sys::cublasLtMatmulPreferenceSetAttribute(preference.raw, attribute, value, bytes.len())
            };
            check(status, "cublasLtMatmulPreferenceSetAttribute")
        };
        set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE as u64).to_ne_bytes())?;
        let [weights, x, out] = shape.alignment.map(u32::to_ne_bytes);
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, &weights)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, &x)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, &out)?;
        set(Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, &out)?;
        let mut found = 0;
        // SAFETY: a struct of integers and a float, for which zero bytes are a value.
        let mut best: sys::cublasLtMatmulHeuristicResult_t = unsafe { std::mem::zeroed() };
        // SAFETY: descriptions are valid, and there is room for the one result that is asked for.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                own.product.raw,
                own.weights.raw,
                own.x.raw,
                own.out.raw,
                own.out.raw,
                preference.raw,
                1,
                &mut best,
                &mut found,
            )
        };
        check(status, &format!("cublasLtMatmulAlgoGetHeuristic of {shape:?}"))?;
        if found == 0 {
            let call = format!("cublasLtMatmulAlgoGetHeuristic of {shape:?}");
            return Err(CudaError::Call { call, message: "no algorithm was found".into() });
        }
        check(best.state, &format!("the algorithm of {shape:?}"))?;
        chosen.insert(shape, best.algo);
        Ok(best.algo)
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        if let Ok(_turn) = self.gpu.bind() {
            // SAFETY: the handle was created and is destroyed once.
            unsafe { sys::cublasLtDestroy(self.handle) };
        }
    }
}
