use std::ops::Range;

/// Memory that a forward pass may take on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Rows that go through a layer together, at least and at most.
    pub tile_rows: Range<usize>,
    /// Bytes that the activations inside a layer may take.
    pub tile_bytes: usize,
    /// Tokens of a cell, in which prompts are read where nothing else is asked for.
    pub cell: usize,
    /// Prompt tokens of several sequences that are read in one pass; 0 where each sequence has passes of its own, for rows
    /// of a prompt would depend on what else is in their pass.
    pub prefill_rows: usize,
}

impl Budget {
    /// What suits the caches of a processor.
    pub const HOST: Budget = Budget { tile_rows: 16..128, tile_bytes: 24 << 20, cell: 256, prefill_rows: 256 };
}
