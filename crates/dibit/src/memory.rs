//! The machine's memory.

use sysinfo::{MemoryRefreshKind, RefreshKind, System};

/// Bytes that programs could still take.
pub fn available() -> u64 {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let system = System::new_with_specifics(memory);
    system.available_memory()
}
