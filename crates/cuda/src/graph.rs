//! Passes that are recorded once and done again with one call (CUDA graphs).

use crate::CudaError;
use crate::gpu::{Gpu, check};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::hash::Hash;
use std::sync::Arc;

/// Graphs that are kept at most.
const MOST: usize = 64;

/// Launches of one pass.
pub(crate) struct Graph {
    gpu: Arc<Gpu>,
    instance: sys::CUgraphExec,
}

// SAFETY: a handle that the driver's functions take from any thread, one at a time, which `&mut` of its owner sees to.
unsafe impl Send for Graph {}

impl Graph {
    /// Records what `work` asks of the GPU, none of which is done. It allocates and waits for nothing.
    ///
    /// # Errors
    /// Why it cannot be recorded. The stream is as it was before.
    pub(crate) fn record<E>(gpu: &Arc<Gpu>, work: impl FnOnce() -> Result<(), E>) -> Result<Self, CudaError> {
        let _alone = gpu.alone();
        let _turn = gpu.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the GPU, and no other thread asks anything of it as long as this one is alone.
        check(unsafe { sys::cuStreamBeginCapture_v2(gpu.stream(), mode) }, || "cuStreamBeginCapture".into())?;
        let worked = work();
        let mut graph = std::ptr::null_mut();
        // SAFETY: the pointer is valid for the call.
        let ended = unsafe { sys::cuStreamEndCapture(gpu.stream(), &mut graph) };
        let failed = gpu.take_failure();
        check(ended, || "cuStreamEndCapture".into())?;
        let mut instance = std::ptr::null_mut();
        // SAFETY: the graph is valid until it is destroyed, once.
        let instantiated = unsafe {
            let result = sys::cuGraphInstantiateWithFlags(&mut instance, graph, 0);
            sys::cuGraphDestroy(graph);
            result
        };
        check(instantiated, || "cuGraphInstantiate".into())?;
        let own = Graph { gpu: gpu.clone(), instance };
        match (worked, failed) {
            (Ok(()), None) => Ok(own),
            (_, failed) => {
                let message = failed.map_or_else(|| "an operation failed".to_owned(), |error| error.to_string());
                Err(CudaError::Call { call: "recording a pass".to_owned(), message })
            }
        }
    }

    /// Does what was recorded, behind everything that was asked for before.
    pub(crate) fn launch(&self) {
        // SAFETY: the instance is valid, and memory that it names is still there by the duty of its keeper.
        self.gpu.note(|| unsafe { sys::cuGraphLaunch(self.instance, self.gpu.stream()) });
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_turn) = self.gpu.bind() {
            // SAFETY: it was instantiated and is destroyed once; the driver keeps what is under way.
            unsafe { sys::cuGraphExecDestroy(self.instance) };
        }
    }
}

/// Graphs by all that the launches of a pass depend on.
pub(crate) struct Graphs<K> {
    /// None for a pass that was seen once: its first run takes the memory that it needs.
    all: HashMap<K, Option<Graph>>,
    /// Addresses of memory that may move, as graphs know them.
    addresses: Vec<u64>,
    /// Whether recording has failed.
    refused: bool,
}

impl<K: Eq + Hash> Graphs<K> {
    pub(crate) fn new() -> Self {
        Graphs { all: HashMap::new(), addresses: Vec::new(), refused: false }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.all.values().flatten().count()
    }

    /// Runs a pass: as it is for the first time, recording it for the second, and what was recorded from then on.
    pub(crate) fn run<E>(
        &mut self,
        gpu: &Arc<Gpu>,
        key: K,
        addresses: Vec<u64>,
        mut pass: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        if self.refused {
            return pass();
        }
        if self.addresses != addresses {
            self.all.clear();
            self.addresses = addresses;
        }
        match self.all.get(&key) {
            Some(Some(graph)) => {
                graph.launch();
                Ok(())
            }
            // What failed before is no failure of recording, and is told when the pass ends.
            Some(None) if gpu.has_failed() => pass(),
            Some(None) => match Graph::record(gpu, &mut pass) {
                Ok(graph) => {
                    graph.launch();
                    if self.all.len() > MOST {
                        self.all.clear();
                    }
                    self.all.insert(key, Some(graph));
                    Ok(())
                }
                Err(error) => {
                    tracing::warn!("passes are not recorded from now on: {error}");
                    self.refused = true;
                    self.all.clear();
                    pass()
                }
            },
            None => {
                pass()?;
                self.all.insert(key, None);
                Ok(())
            }
        }
    }
}
