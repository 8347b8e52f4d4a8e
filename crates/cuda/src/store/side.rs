use crate::memory::Memory;

/// Keys, or values, outside of pages.
pub(super) struct Side {
    /// fp16 `[layer][sequence][kv head][slot][head_dim]`; token `t` lies in slot `t % slots`.
    pub ring: Memory,
    pub slots: usize,
    /// fp16 `[layer][sequence][kv head][sink][head_dim]`
    pub sinks: Memory,
    /// f32 `[kv head][row of the batch][head_dim]`
    pub incoming: Memory,
}
