//! Compiling all kernels without a GPU: for the checks of this project, and to build them into a program.

use crate::kernel::{NVRTC, compile};
use crate::source::{self, Source};
use crate::{CudaError, embedded};

/// A kernel file with the macros that it is compiled with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFile {
    source: Source,
    macros: Vec<(&'static str, i64)>,
}

/// What the compiler gave a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: usize,
    /// Bytes of registers that are moved to memory and back.
    pub spilled: usize,
    /// Bytes of a thread's stack frame.
    pub stack: usize,
}

/// Every file that dibit uses, with all macros that it has built-in schemes and usual head sizes for.
pub fn kernel_files() -> Vec<KernelFile> {
    source::ALL
        .iter()
        .flat_map(|(source, variants)| {
            variants.iter().map(|macros| KernelFile { source: *source, macros: macros.to_vec() })
        })
        .collect()
}

impl KernelFile {
    /// Its name with its macros: `packed-head_dim-128`.
    pub fn name(&self) -> String {
        embedded::name(self.source.file, &self.macros)
    }

    /// Compiles it to machine code for an architecture, such as `sm_90`, and says what each kernel takes.
    ///
    /// # Errors
    /// [`CudaError::NoCompiler`], [`CudaError::Compile`].
    pub fn resources(&self, architecture: &str) -> Result<Vec<Resources>, CudaError> {
        let (_, log) = self.run(architecture, &["--ptxas-options=-v"])?;
        Ok(resources(&log))
    }

    /// Compiles it to PTX for a virtual architecture, such as `compute_80`.
    ///
    /// # Errors
    /// [`CudaError::NoCompiler`], [`CudaError::Compile`].
    pub fn ptx(&self, architecture: &str) -> Result<Vec<u8>, CudaError> {
        let (mut text, _) = self.run(architecture, &[])?;
        while text.last() == Some(&0) {
            text.pop();
        }
        Ok(text)
    }

    fn run(&self, architecture: &str, more: &[&str]) -> Result<(Vec<u8>, String), CudaError> {
        // SAFETY: loading the library runs its initialisers.
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            return Err(CudaError::NoCompiler(NVRTC, architecture.to_owned()));
        }
        let mut options = self.source.options(architecture, &self.macros);
        options.extend(more.iter().map(|option| (*option).to_owned()));
        compile(self.source.file, &self.source.text(), &options)
    }
}

/// Reads what ptxas says of each kernel.
fn resources(log: &str) -> Vec<Resources> {
    let mut all: Vec<Resources> = Vec::new();
    let number = |line: &str, after: &str| -> Option<usize> {
        let before = &line[..line.find(after)?];
        before.trim_end().rsplit(' ').next()?.parse().ok()
    };
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            all.push(Resources { kernel, registers: 0, spilled: 0, stack: 0 });
        }
        let Some(own) = all.last_mut() else { continue };
        if let Some(stack) = number(line, "bytes stack frame") {
            own.stack = stack;
            own.spilled = number(line, "bytes spill stores").unwrap_or(0);
        }
        if let Some(registers) = number(line, "registers,") {
            own.registers = registers;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_are_read_from_the_compilers_words() {
        let log = "ptxas info    : 0 bytes gmem\n\
                   ptxas info    : Compiling entry function 'k' for 'sm_90'\n\
                   ptxas info    : Function properties for k\n\
                   ptxas         .     256 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
                   ptxas info    : Used 32 registers, used 0 barriers, 256 bytes cumulative stack size\n";
        let expected = Resources { kernel: "k".into(), registers: 32, spilled: 12, stack: 256 };
        assert_eq!(resources(log), [expected]);
    }
}
