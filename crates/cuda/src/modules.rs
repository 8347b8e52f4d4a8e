//! Kernels that have been loaded, as the driver knows them.

use cudarc::driver::sys;
use std::collections::HashMap;
use std::sync::Mutex;

/// A function on a GPU.
#[derive(Clone, Copy)]
pub(crate) struct Kernel {
    pub function: sys::CUfunction,
    pub name: &'static str,
    /// Dynamic shared memory that a block of it can have.
    pub most_shared: usize,
}

// SAFETY: a handle that the driver's functions take from any thread; modules are never unloaded before the GPU is.
unsafe impl Send for Kernel {}
// SAFETY: as above.
unsafe impl Sync for Kernel {}

/// What tells modules apart: the file's name, and its macros.
pub(crate) type Key = (&'static str, Vec<(&'static str, i64)>);

/// The modules that have been loaded.
pub(crate) struct Modules {
    pub capability: u32,
    pub loaded: Mutex<HashMap<Key, Loaded>>,
}

pub(crate) struct Loaded {
    pub module: sys::CUmodule,
    pub functions: HashMap<&'static str, Kernel>,
}

// SAFETY: handles of the driver, used under the mutex.
unsafe impl Send for Loaded {}

impl Modules {
    pub(crate) fn new(capability: u32) -> Self {
        Modules { capability, loaded: Mutex::default() }
    }
}
