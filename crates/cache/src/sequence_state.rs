//! What is known of one sequence beside its length and its blocks.

use crate::{CachePlan, Extras, PAGE_TOKENS, SinkTokens};
use std::ops::Range;

/// Which of its tokens are sinks, and which of its pages came in together.
#[derive(Debug, Clone)]
pub struct SequenceState {
    /// The protected tokens.
    pub sinks: SinkTokens,
    /// For each packed block, the first block of its chunk; empty where the scheme has no chunks.
    chunks: Vec<u32>,
    /// Whether it was stored before what heads are divided by changed.
    pub is_stale: bool,
}

impl SequenceState {
    /// That of an empty sequence.
    pub(crate) fn new(plan: &CachePlan) -> Self {
        SequenceState { sinks: SinkTokens::new(plan.sinks, plan.shape.num_layers), chunks: Vec::new(), is_stale: false }
    }

    pub(crate) fn chunks(&self) -> &[u32] {
        &self.chunks
    }

    /// Notes the pages that are filled while the sequence grows from `cached.start` to `cached.end` tokens. Those of one
    /// pass are a chunk, but where its rows were stored one by one.
    pub(crate) fn fill(&mut self, plan: &CachePlan, cached: Range<usize>, stepwise: bool) {
        if plan.chunk_bytes() == 0 {
            return;
        }
        let filled = plan.window.filled_pages(cached);
        self.chunks.truncate(filled.start);
        self.chunks.extend(filled.clone().map(|block| if stepwise { block } else { filled.start } as u32));
    }

    /// What a sequence of `len` tokens holds beside pages and window: of each layer the protected tokens that are packed,
    /// and the chunks that its blocks begin.
    pub(crate) fn extras(&self, plan: &CachePlan, len: usize) -> Extras {
        let packed = plan.window.packed_keys(len);
        let own = |layer: usize| self.sinks.layer(layer).iter().filter(|token| (**token as usize) < packed).count();
        let begins = |(block, first): (usize, &u32)| block == *first as usize;
        Extras {
            sinks: (0..plan.layers.len()).map(own).sum(),
            chunks: self.chunks.iter().take(packed / PAGE_TOKENS).enumerate().filter(|block| begins(*block)).count(),
        }
    }
}
