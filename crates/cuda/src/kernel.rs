//! Kernels: compiling, keeping and launching them.

use crate::CudaError;
use crate::gpu::{Gpu, check};
pub(crate) use crate::modules::Kernel;
use crate::modules::Loaded;
use crate::source::Source;
use cudarc::driver::sys;
use cudarc::nvrtc::sys as nvrtc;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

pub(crate) const NVRTC: &str = if cfg!(windows) { "nvrtc64_130_0.dll" } else { "libnvrtc.so.13" };

/// How many threads run a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Grid {
    /// Blocks.
    pub blocks: [usize; 3],
    /// Threads of a block.
    pub threads: usize,
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
}

impl Grid {
    pub(crate) const fn new(blocks: [usize; 3], threads: usize) -> Self {
        Grid { blocks, threads, shared: 0 }
    }

    pub(crate) const fn shared(self, bytes: usize) -> Self {
        Grid { shared: bytes, ..self }
    }

    /// A thread for each of `count` things.
    pub(crate) const fn each(count: usize, threads: usize) -> Self {
        Grid::new([count.div_ceil(threads), 1, 1], threads)
    }
}

/// The address of an argument, for [`Gpu::launch`].
pub(crate) fn argument<T: Copy>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// Launches a kernel: `launch!(gpu, kernel, grid, argument, ...)`. Arguments have exactly the types of the kernel's
/// parameters; a pointer is the `u64` that [`crate::memory::Memory::at`] gives.
macro_rules! launch {
    ($gpu:expr, $kernel:expr, $grid:expr, $($argument:expr),* $(,)?) => {
        $gpu.launch($kernel, $grid, &mut [$($crate::kernel::argument(&$argument)),*])
    };
}
pub(crate) use launch;

impl Gpu {
    /// A kernel of a file compiled with these macros.
    pub(crate) fn kernel(
        &self,
        source: Source,
        macros: &[(&'static str, i64)],
        name: &'static str,
    ) -> Result<Kernel, CudaError> {
        let _turn = self.bind()?;
        let mut loaded = self.modules.loaded.lock().expect("no panic while it is held");
        let key = (source.file, macros.to_vec());
        if !loaded.contains_key(&key) {
            let image = image(source, macros, self.modules.capability)?;
            let mut module = std::ptr::null_mut();
            // SAFETY: the image ends with 0, which PTX needs, and the driver copies it.
            let result = unsafe { sys::cuModuleLoadData(&mut module, image.as_ptr().cast()) };
            check(result, || format!("loading {}", source.file))?;
            loaded.insert(key.clone(), Loaded { module, functions: HashMap::new() });
        }
        let own = loaded.get_mut(&key).expect("it was inserted");
        if let Some(kernel) = own.functions.get(name) {
            return Ok(*kernel);
        }
        let mut function = std::ptr::null_mut();
        let text = CString::new(name).expect("a name");
        // SAFETY: module and name are valid.
        let result = unsafe { sys::cuModuleGetFunction(&mut function, own.module, text.as_ptr()) };
        check(result, || format!("kernel {name} of {}", source.file))?;
        use sys::CUfunction_attribute_enum as Attribute;
        let mut fixed = 0;
        let dynamic;
        // SAFETY: the function is valid.
        unsafe {
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            check(sys::cuFuncGetAttribute(&mut fixed, attribute, function), || format!("shared memory of {name}"))?;
            dynamic = self.limits.shared_bytes as i32 - fixed;
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check(sys::cuFuncSetAttribute(function, attribute, dynamic), || format!("shared memory of {name}"))?;
        }
        let kernel = Kernel { function, name, most_shared: dynamic.max(0) as usize };
        own.functions.insert(name, kernel);
        Ok(kernel)
    }

    /// Runs a kernel behind everything that was asked for before. A failure is kept for [`Gpu::synchronize`].
    pub(crate) fn launch(&self, kernel: Kernel, grid: Grid, arguments: &mut [*mut c_void]) {
        if grid.blocks.contains(&0) {
            return;
        }
        let [x, y, z] = grid.blocks.map(|count| count as u32);
        let result = self.bind().and_then(|_turn| {
            // SAFETY: the kernel is of this GPU, and its arguments point to values of its parameters' types, which the
            // call copies. That they name memory of the right size is the caller's duty.
            let result = unsafe {
                sys::cuLaunchKernel(
                    kernel.function,
                    x,
                    y,
                    z,
                    grid.threads as u32,
                    1,
                    1,
                    grid.shared as u32,
                    self.stream(),
                    arguments.as_mut_ptr(),
                    std::ptr::null_mut(),
                )
            };
            check(result, || format!("kernel {} on {:?} blocks of {} threads", kernel.name, grid.blocks, grid.threads))
        });
        if let Err(error) = result {
            self.fail(error);
        }
    }

    /// Blocks of a kernel that run on one multiprocessor at once.
    pub(crate) fn resident(&self, kernel: Kernel, threads: usize, shared: usize) -> usize {
        let mut blocks = 0;
        self.note(|| {
            // SAFETY: the pointer is valid for the call and the function is of this GPU.
            unsafe {
                sys::cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, kernel.function, threads as i32, shared)
            }
        });
        blocks.max(1) as usize
    }
}

/// Machine code, or PTX, of a file for a GPU, with a 0 behind it.
fn image(source: Source, macros: &[(&'static str, i64)], capability: u32) -> Result<Vec<u8>, CudaError> {
    // SAFETY: loading the library runs its initialisers.
    if !unsafe { nvrtc::is_culib_present() } {
        let missing = || CudaError::NoCompiler(NVRTC, format!("compute capability {capability}"));
        return crate::embedded::ptx(source, macros, capability).ok_or_else(missing);
    }
    let text = source.text();
    let options = source.options(&architecture(capability), macros);
    let path = cached(&text, &options);
    if let Some(image) = path.as_ref().and_then(|path| std::fs::read(path).ok()) {
        return Ok(image);
    }
    let (image, _) = compile(source.file, &text, &options)?;
    if let Some(path) = path {
        keep(&path, &image);
    }
    Ok(image)
}

/// What NVRTC is told to compile for: the GPU itself where it knows it.
fn architecture(capability: u32) -> String {
    let mut count = 0;
    // SAFETY: the pointer is valid, and then the list is as long as was said.
    let known = unsafe {
        nvrtc::nvrtcGetNumSupportedArchs(&mut count);
        let mut known = vec![0; count.max(0) as usize];
        nvrtc::nvrtcGetSupportedArchs(known.as_mut_ptr());
        known
    };
    match known.iter().copied().filter(|own| *own <= capability as i32).max() {
        Some(newest) if newest < capability as i32 => format!("compute_{newest}"),
        _ => format!("sm_{capability}"),
    }
}

/// Compiles a file, and returns what the compiler said too. Options that ask for `sm_` yield machine code, others PTX.
pub(crate) fn compile(file: &str, text: &str, options: &[String]) -> Result<(Vec<u8>, String), CudaError> {
    let ok = nvrtc::nvrtcResult::NVRTC_SUCCESS;
    let machine = options.iter().any(|option| option.contains("=sm_"));
    let strings: Vec<CString> = options.iter().map(|option| CString::new(option.as_str()).expect("no 0")).collect();
    let pointers: Vec<_> = strings.iter().map(|option| option.as_ptr()).collect();
    let [name, text] = [file, text].map(|text| CString::new(text).expect("no 0"));
    let mut program = std::ptr::null_mut();
    let call = |what: &str, result: nvrtc::nvrtcResult| match result {
        result if result == ok => Ok(()),
        other => Err(CudaError::Call { call: format!("{what} for {file}"), message: format!("{other:?}") }),
    };
    // SAFETY: all strings end with 0 and outlive the calls; buffers are as long as NVRTC says.
    unsafe {
        let created = nvrtc::nvrtcCreateProgram(
            &mut program,
            text.as_ptr(),
            name.as_ptr(),
            0,
            std::ptr::null(),
            std::ptr::null(),
        );
        call("nvrtcCreateProgram", created)?;
        let compiled = nvrtc::nvrtcCompileProgram(program, pointers.len() as i32, pointers.as_ptr());
        let result = if compiled == ok {
            let mut bytes = 0;
            let sized = match machine {
                true => nvrtc::nvrtcGetCUBINSize(program, &mut bytes),
                false => nvrtc::nvrtcGetPTXSize(program, &mut bytes),
            };
            let mut image = vec![0u8; bytes + 1];
            let got = match machine {
                true => nvrtc::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()),
                false => nvrtc::nvrtcGetPTX(program, image.as_mut_ptr().cast()),
            };
            call("nvrtcGetCUBIN", sized).and_then(|()| call("nvrtcGetCUBIN", got)).map(|()| (image, log(program)))
        } else {
            Err(CudaError::Compile {
                file: file.to_owned(),
                architecture: options.first().map_or(String::new(), |own| own.replace("--gpu-architecture=", "")),
                log: log(program),
            })
        };
        nvrtc::nvrtcDestroyProgram(&mut program);
        result
    }
}

/// What the compiler said.
///
/// # Safety
/// The program must be one that was created and not destroyed.
unsafe fn log(program: nvrtc::nvrtcProgram) -> String {
    let mut bytes = 0;
    // SAFETY: the caller's duty; the buffer is as long as NVRTC says.
    let log = unsafe {
        nvrtc::nvrtcGetProgramLogSize(program, &mut bytes);
        let mut log = vec![0u8; bytes.max(1)];
        nvrtc::nvrtcGetProgramLog(program, log.as_mut_ptr().cast());
        log
    };
    String::from_utf8_lossy(&log).trim_end_matches('\0').trim().to_owned()
}

/// Where a compiled file is kept, by all that it depends on.
fn cached(text: &str, options: &[String]) -> Option<PathBuf> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are valid for the call.
    unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) };
    let mut hash = Sha256::new();
    hash.update(format!("nvrtc {major}.{minor}\n{}\n{text}", options.join(" ")));
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let folder = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let folder = folder.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(folder.join("dibit").join("kernels").join(name))
}

/// Keeps a compiled file; that it cannot be kept costs time at the next start and nothing else.
fn keep(path: &std::path::Path, image: &[u8]) {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(path.parent().expect("a folder"))?;
        static FILES: AtomicU32 = AtomicU32::new(0);
        let number = FILES.fetch_add(1, Ordering::Relaxed);
        let own = path.with_extension(format!("{}-{number}", std::process::id()));
        std::fs::write(&own, image)?;
        std::fs::rename(own, path)
    };
    if let Err(error) = write() {
        tracing::debug!("a compiled kernel cannot be kept at {}: {error}", path.display());
    }
}
