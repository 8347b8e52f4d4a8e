//! The machine's memory, and this program's share of it.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Bytes that programs could still take.
pub fn available() -> usize {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    System::new_with_specifics(memory).available_memory() as usize
}

/// The most bytes that were resident at once, mapped weights included; `None` where the system does not say.
pub fn peak() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? * 1024)
}
