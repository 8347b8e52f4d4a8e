//! Compiles every kernel to PTX: `cargo run -p dibit-cuda --example compile_kernels FOLDER`. A program that is built with
//! `DIBIT_PTX=FOLDER` holds them, and then needs no NVRTC.

use std::process::ExitCode;

/// Virtual architectures: each PTX runs on these GPUs and all later ones.
const ARCHITECTURES: [u32; 2] = [80, 90];

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(std::path::PathBuf::from) else {
        eprintln!("name the folder that the kernels are written to");
        return ExitCode::FAILURE;
    };
    let write = || -> Result<(), Box<dyn std::error::Error>> {
        std::fs::create_dir_all(&folder)?;
        for file in dibit_cuda::kernel_files() {
            for capability in ARCHITECTURES {
                let text = file.ptx(&format!("compute_{capability}"))?;
                std::fs::write(folder.join(format!("{}.sm{capability}.ptx", file.name())), text)?;
            }
        }
        Ok(())
    };
    match write() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
