//! The tokens of one forward pass.

use crate::{CacheManager, CachePlan, ClassTokens, PAGE_TOKENS, Sees, Sequence};
use std::ops::Range;

/// How the rows of a forward pass see the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The new tokens see each other exactly and are stored once all of them have been attended to.
    Chunk,
    /// Every token is stored, and the window flushed, before the next one attends: what decoding token by
    /// token computes, in one pass.
    Streaming,
}

/// What the rows of a pass are. A device may have an arithmetic for prompts that is faster for many rows; a row's results
/// depend on the phase of its pass, and on nothing else that is in it. Prompts and single tokens that must not depend on
/// each other are run in passes of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Prompts: several new tokens of every sequence.
    Prefill,
    /// Single tokens, or tokens that are passed as if they came one by one.
    Decode,
}

/// The new tokens of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// The sequence's window rings.
    pub slot: u32,
    /// Its block table for each group of layers, long enough for the new tokens; empty where the scheme has classes.
    pub blocks: Vec<Vec<u32>>,
    /// For each packed block the place in the table of the first one of its chunk; empty where the scheme has no chunks.
    pub chunks: Vec<u32>,
    /// Its tokens by their classes, the new ones included; empty where the scheme has none.
    pub classes: Vec<ClassTokens>,
    /// Tokens cached before this pass.
    pub cached: usize,
    /// Its rows in the batch.
    pub rows: Range<usize>,
}

/// The tokens of one forward pass: the new tokens of one or more sequences, one after the other.
#[derive(Debug, Clone)]
pub struct Batch {
    /// One span for each sequence, in the order of their rows.
    pub spans: Vec<Span>,
    /// How rows see the cache.
    pub mode: Mode,
    /// What each row is turned by (RoPE).
    rotary: Vec<u32>,
}

impl Span {
    /// The block of a page of a group of layers. Where these see no more than so many tokens, blocks are used in turn.
    pub fn block(&self, group: usize, page: usize) -> u32 {
        let blocks = &self.blocks[group];
        blocks[page % blocks.len()]
    }

    /// The place in the block table of the first block of the chunk that block number `index` belongs to.
    pub fn chunk_start(&self, index: usize) -> usize {
        self.chunks.get(index).map_or(index, |first| *first as usize)
    }

    /// Whether sinks are looked for among its rows: tokens that are decoded one by one are never protected for their
    /// activations.
    pub fn shows_sinks(&self) -> bool {
        self.rows.len() > 1 || self.cached == 0
    }

    /// Tokens once its rows are stored.
    pub fn len(&self) -> usize {
        self.cached + self.rows.len()
    }

    /// True where it has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Batch {
    /// An empty batch.
    pub fn new(mode: Mode) -> Self {
        Batch { spans: Vec::new(), mode, rotary: Vec::new() }
    }

    /// Appends `tokens` new tokens of a sequence whose blocks have been reserved, each turned by its place in the sequence.
    ///
    /// # Panics
    /// If the sequence lacks blocks for the new tokens.
    pub fn push(&mut self, manager: &CacheManager, sequence: &Sequence, tokens: usize) {
        self.push_at(manager, sequence, (sequence.len()..sequence.len() + tokens).map(|at| at as u32));
    }

    /// [`Batch::push`] of tokens that are turned by these positions, which need not be their places in the sequence. What a
    /// token sees, and where it is stored, follows from its place.
    ///
    /// # Panics
    /// As there.
    pub fn push_at(&mut self, manager: &CacheManager, sequence: &Sequence, positions: impl IntoIterator<Item = u32>) {
        let before = self.rotary.len();
        self.rotary.extend(positions);
        let tokens = self.rotary.len() - before;
        let window = manager.plan().window;
        let start = self.rows();
        let len = sequence.len() + tokens;
        let classes = sequence.class_tokens(len);
        let reserved = match classes.as_slice() {
            [] => manager.plan().group_blocks(len).zip(&sequence.blocks).all(|(own, table)| table.len() >= own),
            classes => {
                classes.iter().all(|own| own.blocks.len() >= own.packed(window.packed_keys(len)).div_ceil(PAGE_TOKENS))
            }
        };
        assert!(reserved, "blocks must be reserved first");
        self.spans.push(Span {
            slot: sequence.slot(),
            blocks: sequence.blocks.clone(),
            chunks: manager.chunks(sequence),
            classes,
            cached: sequence.len(),
            rows: start..start + tokens,
        });
    }

    /// Whether the rows are stored one by one as they attend.
    pub fn is_stepwise(&self, plan: &CachePlan) -> bool {
        self.mode == Mode::Streaming || plan.sees == Sees::Stored
    }

    /// Whether a pass decides nothing on the host that depends on more than its shape: single tokens, of which none is
    /// looked at to find sinks.
    pub fn repeats(&self, plan: &CachePlan) -> bool {
        let single = |span: &Span| span.rows.len() == 1 && !(plan.sinks.are_chosen() && span.shows_sinks());
        !self.is_stepwise(plan) && plan.classes.is_empty() && self.spans.iter().all(single)
    }

    /// What its rows are.
    pub fn phase(&self) -> Phase {
        let prompts = self.mode == Mode::Chunk && self.spans.iter().all(|span| span.rows.len() > 1);
        if prompts { Phase::Prefill } else { Phase::Decode }
    }

    /// Rows of all spans.
    pub fn rows(&self) -> usize {
        self.spans.last().map_or(0, |span| span.rows.end)
    }

    /// What every row is turned by (RoPE): its position in the sequence, where nothing else was said.
    ///
    /// # Panics
    /// If spans were not added by [`Batch::push`].
    pub fn rotary_positions(&self) -> &[u32] {
        assert_eq!(self.rotary.len(), self.rows(), "a position for each row");
        &self.rotary
    }

    /// Position in its sequence of every row.
    pub fn positions(&self) -> impl Iterator<Item = u32> + '_ {
        self.spans.iter().flat_map(|span| (0..span.rows.len()).map(|i| (span.cached + i) as u32))
    }
}

impl CacheManager {
    /// Notes what a pass has stored, before the sequences advance.
    pub fn note(&mut self, batch: &Batch) {
        let (plan, states) = self.split_states();
        let stepwise = batch.is_stepwise(plan);
        for span in &batch.spans {
            states[span.slot as usize].fill(plan, span.cached..span.len(), stepwise);
        }
    }
}
