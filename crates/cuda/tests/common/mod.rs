//! What tests of the device share.

use dibit_cuda::{Cuda, CudaError};
use std::cell::RefCell;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// Held by the test that uses the GPU: a pass that is recorded would record what others ask of the GPU meanwhile.
static TURN: Mutex<()> = Mutex::new(());

thread_local! {
    /// A test has a thread of its own, with which its turn ends.
    static OWN_TURN: RefCell<Option<MutexGuard<'static, ()>>> = const { RefCell::new(None) };
}

/// The GPU that tests run on, or the emulator in its place; says what was skipped where there is neither.
pub fn cuda() -> Option<&'static Cuda> {
    static CUDA: OnceLock<Option<Cuda>> = OnceLock::new();
    wait_for_turn();
    CUDA.get_or_init(open).as_ref()
}

fn wait_for_turn() {
    OWN_TURN.with_borrow_mut(|own| {
        own.get_or_insert_with(|| TURN.lock().unwrap_or_else(|failed| failed.into_inner()));
    });
}

fn open() -> Option<Cuda> {
    match Cuda::new(0) {
        Ok(cuda) => Some(cuda),
        Err(
            error @ (CudaError::NoDriver(_)
            | CudaError::OldDriver { .. }
            | CudaError::NoDevice { .. }
            | CudaError::OldDevice { .. }
            | CudaError::NoBlas(_)
            | CudaError::NoCompiler(..)),
        ) => {
            println!("skipped: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}
