//! From `--device` to a device.

use anyhow::{Context, Result, bail};
use dibit_cpu::{Cpu, Isa};
use dibit_cuda::Cuda;
use dibit_device::Memory;
use std::str::FromStr;
use std::sync::Arc;

/// What `--device` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU, where one can be used.
    Auto,
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "auto" => Ok(DeviceChoice::Auto),
            None if text == "cpu" => Ok(DeviceChoice::Cpu),
            None if text == "cuda" => Ok(DeviceChoice::Cuda(0)),
            Some(("cuda", number)) => number
                .parse()
                .map(DeviceChoice::Cuda)
                .map_err(|_| format!("'{number}' is not a number; cuda:0 is the first GPU, cuda:1 the second one")),
            _ => Err("a device is auto, cpu, cuda or cuda:N, as in cuda:0".to_owned()),
        }
    }
}

/// A device that was found. [`on_device`] runs something on it.
pub enum AnyDevice {
    Cpu(Arc<Cpu>),
    Cuda(Arc<Cuda>),
}

/// Runs an expression with the device that an [`AnyDevice`] holds, as the type that it has.
macro_rules! on_device {
    ($any:expr, |$device:ident| $body:expr) => {
        match $any {
            $crate::device::AnyDevice::Cpu($device) => $body,
            $crate::device::AnyDevice::Cuda($device) => $body,
        }
    };
}
pub(crate) use on_device;

/// The device that was asked for. `threads` and `isa` are the CPU's: `auto` takes it where they are given.
pub fn open(choice: DeviceChoice, threads: Option<u16>, isa: Option<Isa>) -> Result<AnyDevice> {
    match choice {
        DeviceChoice::Cpu => Ok(AnyDevice::Cpu(cpu(threads, isa)?)),
        DeviceChoice::Cuda(_) if threads.is_some() => {
            bail!("--threads is for the CPU; leave it out, or choose --device cpu")
        }
        DeviceChoice::Cuda(_) if isa.is_some() => {
            bail!("--isa (or DIBIT_ISA) is for the CPU; leave it out, or choose --device cpu")
        }
        DeviceChoice::Cuda(ordinal) => {
            let cuda = Cuda::new(ordinal).with_context(|| format!("--device cuda:{ordinal}"))?;
            Ok(AnyDevice::Cuda(Arc::new(cuda)))
        }
        DeviceChoice::Auto if threads.is_some() || isa.is_some() => {
            let given = if threads.is_some() { "--threads" } else { "--isa" };
            let cpu = cpu(threads, isa)?;
            tracing::info!("device: {} ({given} is for the CPU)", cpu.describe());
            Ok(AnyDevice::Cpu(cpu))
        }
        DeviceChoice::Auto => match Cuda::new(0) {
            Ok(cuda) => {
                tracing::info!("device: {}", cuda.describe());
                Ok(AnyDevice::Cuda(Arc::new(cuda)))
            }
            Err(reason) => {
                let cpu = cpu(threads, isa)?;
                // What to do about it is for those who ask for a GPU.
                let reason = reason.to_string();
                let reason = reason.split([';', '\n']).next().unwrap_or_default();
                tracing::info!("device: {} (no GPU: {reason})", cpu.describe());
                Ok(AnyDevice::Cpu(cpu))
            }
        },
    }
}

fn cpu(threads: Option<u16>, isa: Option<Isa>) -> Result<Arc<Cpu>> {
    let cpu = Cpu::new(threads.map(usize::from))?;
    Ok(Arc::new(match isa {
        Some(isa) => cpu.with_isa(isa)?,
        None => cpu,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_names() {
        assert_eq!("auto".parse(), Ok(DeviceChoice::Auto));
        assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
        assert_eq!(["cuda", "cuda:0", "cuda:7"].map(str::parse), [0, 0, 7].map(|n| Ok(DeviceChoice::Cuda(n))));
        for (text, reason) in [("cuda:x", "'x' is not a number"), ("cuda:", "'' is not"), ("cuda:-1", "'-1' is not")] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().contains(reason), "{text}");
        }
        for text in ["", "gpu", "cpu:0", "CUDA", "auto:1"] {
            assert!(text.parse::<DeviceChoice>().unwrap_err().contains("auto, cpu, cuda or cuda:N"), "{text}");
        }
    }
}
