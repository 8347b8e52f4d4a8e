//! Every kernel compiles for every architecture, within its registers. Needs NVRTC and no GPU. Not built with `gpu-tests`: the
//! emulator, on which those run, has a compiler of its own.
#![cfg(not(feature = "gpu-tests"))]

use dibit_cuda::{CudaError, KernelFile, Resources, kernel_files};
use std::sync::atomic::{AtomicUsize, Ordering};

const ARCHITECTURES: [&str; 2] = ["sm_80", "sm_90"];

/// Registers with which a multiprocessor still runs two blocks of 256 threads, or four of 128.
const REGISTERS: usize = 128;

/// What a kernel may take.
struct Budget {
    /// What the name of its file with macros begins with.
    file: &'static str,
    kernel: &'static str,
    registers: usize,
    /// Bytes of registers that are moved to memory, for each architecture.
    spilled: [usize; 2],
}

const fn budget(file: &'static str, kernel: &'static str, registers: usize, spilled: [usize; 2]) -> Budget {
    Budget { file, kernel, registers, spilled }
}

/// Kernels that are given more than [`REGISTERS`], or spill: as much as they take now. The first that fits a kernel counts.
const MORE: &[Budget] = &[
    // Three blocks of 128 threads run at once. A warp keeps the sums of all channels beside the weights of a page; planes
    // add a second set of sums, of which little is spilled, and from three columns on two blocks must do.
    // Where pages protect tokens, their rows are loaded beside all of that.
    budget("packed-head_dim-64-key_planes-1-value_columns-2-page_sinks", "attend_packed", 168, [140, 132]),
    budget("packed-head_dim-128-key_planes-1-value_columns-2-page_sinks", "attend_packed", 168, [252, 252]),
    budget("packed-head_dim-128-key_planes-1-value_columns-1", "attend_packed", 168, [80, 0]),
    budget("packed-head_dim-128-key_planes-1-value_columns-2", "attend_packed", 168, [128, 144]),
    budget("packed-head_dim-128-key_planes-1-value_columns-3", "attend_packed", 255, [0, 56]),
    budget("packed-head_dim-128-bias-1-span-1-softcap-1", "attend_packed", 168, [20, 4]),
    budget("packed-head_dim-128-bias-1", "attend_packed", 168, [8, 0]),
    budget("packed", "attend_packed", 168, [0, 0]),
    // Two blocks of 128 threads run at once. A warp keeps the sums of 32 queries, or of 16 with heads of 256, so that
    // tiles are read as seldom as can be.
    budget("tiles-head_dim-128", "attend_tiles", 255, [28, 4]),
    budget("tiles-head_dim-128-page_sinks", "attend_packed_tiles", 255, [192, 172]),
    budget("tiles-head_dim-128", "attend_packed_tiles", 255, [148, 116]),
    budget("tiles", "attend_tiles", 255, [0, 0]),
    budget("tiles", "attend_packed_tiles", 255, [0, 0]),
    // Three blocks of 128 threads, or with heads of 256 one. Queries stay in registers beside the sums, and while packed
    // rows are expanded there are their fields and places too.
    budget("tiles-head_dim-128-page_sinks", "attend_packed_splits", 168, [228, 168]),
    budget("tiles-head_dim-128", "attend_packed_splits", 168, [172, 112]),
    budget("tiles-head_dim-256-span-1-softcap-1", "attend_packed_splits", 255, [216, 164]),
    budget("tiles-head_dim-256-span-1-softcap-1", "attend_splits", 255, [16, 12]),
    budget("tiles-head_dim-256", "attend_packed_splits", 255, [216, 156]),
    budget("tiles-head_dim-256", "attend_splits", 255, [0, 0]),
    budget("tiles", "attend_splits", 168, [0, 0]),
    budget("tiles-head_dim-64-page_sinks", "attend_packed_splits", 168, [4, 0]),
    budget("tiles", "attend_packed_splits", 168, [0, 0]),
    // Divisions that are rounded as on the CPU leave a few registers to memory.
    budget("encode", "encode", 128, [0, 84]),
    // The compiler keeps to 48 registers here, for more blocks at once.
    budget("encode", "protect_in_pages", 48, [24, 16]),
    // Blocks of 128 threads, each with many outputs: a warp keeps more weights on their way instead of more warps.
    budget("linear", "wide_8", 145, [0, 0]),
    budget("linear", "wide_16", 176, [0, 0]),
    budget("linear", "norm_wide_4", 152, [0, 0]),
    budget("linear", "norm_wide_8", 146, [0, 0]),
    budget("linear", "norm_wide_16", 168, [0, 0]),
    // Blocks of 512 threads, for which 128 registers are all that there are. Squares of inputs take a few more.
    budget("linear", "norm_medium_16", 128, [44, 48]),
    budget("linear", "norm_narrow_4", 69, [0, 8]),
];

#[test]
fn every_kernel_compiles_within_its_registers() {
    let files = kernel_files();
    let Some(all) = resources(&files) else { return };
    let mut wrong = Vec::new();
    let mut spent = vec![false; MORE.len()];
    for (file, architecture, kernels) in &all {
        let name = files[*file].name();
        assert!(!kernels.is_empty(), "{name} holds no kernel");
        for own in kernels {
            let more = MORE.iter().position(|more| name.starts_with(more.file) && more.kernel == own.kernel);
            let most = more.map_or((REGISTERS, 0), |more| (MORE[more].registers, MORE[more].spilled[*architecture]));
            if own.registers > most.0 || own.spilled > most.1 {
                wrong.push(format!("{name} for {}: {own:?}, not {most:?}", ARCHITECTURES[*architecture]));
            }
            if let Some(more) = more {
                spent[more] |= own.registers > REGISTERS || own.spilled > 0;
            }
        }
    }
    println!("{} kernels", all.iter().map(|(.., kernels)| kernels.len()).sum::<usize>());
    assert!(wrong.is_empty(), "{wrong:#?}");
    let idle = MORE.iter().zip(spent).filter(|(_, spent)| !spent);
    let idle: Vec<_> = idle.map(|(more, _)| format!("{} of {}", more.kernel, more.file)).collect();
    assert!(idle.is_empty(), "these need no budget of their own: {idle:?}");
}

/// What the kernels of each file take, with the numbers of file and architecture; nothing without a compiler.
fn resources(files: &[KernelFile]) -> Option<Vec<(usize, usize, Vec<Resources>)>> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut own = Vec::new();
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            let (file, architecture) = (job / ARCHITECTURES.len(), job % ARCHITECTURES.len());
            let Some(source) = files.get(file) else { return Some(own) };
            match source.resources(ARCHITECTURES[architecture]) {
                Ok(kernels) => own.push((file, architecture, kernels)),
                Err(CudaError::NoCompiler(library, _)) => {
                    println!("skipped: {library} was not found");
                    return None;
                }
                Err(error) => panic!("{}: {error}", source.name()),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let parts: Option<Vec<_>> = workers.into_iter().map(|own| own.join().expect("a worker's result")).collect();
        parts.map(|parts| parts.concat())
    })
}
