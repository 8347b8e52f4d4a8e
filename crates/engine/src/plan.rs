//! How much memory a run takes, known before it starts.

use crate::{EngineError, Prefill};
use dibit_cache::CachePlan;
use dibit_device::Budget;
use dibit_model::{ModelConfig, pass_bytes};
use dibit_runner::Capacity;

/// What an engine is planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Longest context of a sequence, in tokens.
    pub context: usize,
    /// Sequences at once.
    pub sequences: usize,
    /// How prompts are read.
    pub prefill: Prefill,
}

impl Options {
    /// Refuses room that a model cannot use, or that is none.
    ///
    /// # Errors
    /// [`EngineError::NoRoom`], [`EngineError::ContextTooLong`] and [`EngineError::Cell`].
    pub fn check(&self, config: &ModelConfig) -> Result<(), EngineError> {
        if self.sequences == 0 || self.context == 0 {
            return Err(EngineError::NoRoom);
        }
        let (context, limit) = (self.context, config.max_position_embeddings);
        if context > limit {
            return Err(EngineError::ContextTooLong { context, limit });
        }
        Ok(self.prefill.check()?)
    }
}

/// Memory of a run, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Cache of one sequence of the whole context: blocks, window rings and block table.
    pub sequence_bytes: usize,
    /// Blocks of one sequence.
    pub sequence_blocks: usize,
    /// Blocks of all sequences.
    pub blocks: usize,
    /// Cache of all sequences.
    pub cache_bytes: usize,
    /// What all sequences would take in 16 bit.
    pub fp16_bytes: usize,
    /// Prompt tokens of a pass, all sequences together.
    pub pass_rows: usize,
    /// Those of a pass that reads several prompts; 0 where each has passes of its own.
    pub shared_rows: usize,
    /// What a pass takes besides the cache.
    pub pass_bytes: usize,
}

impl MemoryPlan {
    /// Plans a run on a device with this budget. A context longer than the model supports can be planned, but not run.
    pub fn new(config: &ModelConfig, layout: &CachePlan, options: Options, budget: &Budget) -> Self {
        let Options { context, sequences, prefill } = options;
        let own = prefill.rows(context);
        let shared_rows = budget.prefill_rows.min(sequences.saturating_mul(own));
        let pass_rows = own.max(shared_rows);
        let sequence_bytes = layout.planned_bytes(context);
        let sequence_blocks = layout.blocks(context);
        let fp16_bytes = context.saturating_mul(layout.shape.scalars_per_token() * size_of::<u16>());
        MemoryPlan {
            sequence_bytes,
            sequence_blocks,
            blocks: sequences.saturating_mul(sequence_blocks),
            cache_bytes: sequences.saturating_mul(sequence_bytes),
            fp16_bytes: sequences.saturating_mul(fp16_bytes),
            pass_rows,
            shared_rows,
            pass_bytes: pass_bytes(config, pass_rows.max(sequences), sequences, budget),
        }
    }

    /// The room that a runner needs for it.
    pub fn capacity(&self, options: Options) -> Capacity {
        Capacity {
            blocks: self.blocks,
            sequences: options.sequences,
            // A decoding step has a row for each sequence.
            rows: self.pass_rows.max(options.sequences),
            outputs: options.sequences,
        }
    }
}
