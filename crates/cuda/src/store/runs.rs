//! What leaves the window in a pass, as kernels see it.

use crate::abi::Run;
use dibit_cache::{CacheLayout, Group, Span};

/// The runs of some spans, and how many keys they hold.
#[derive(Default)]
pub(super) struct Runs {
    pub all: Vec<Run>,
    pub keys: usize,
}

impl Runs {
    /// Adds those of a span, which is number `index`; `positions` says where the positions of each class begin.
    pub(super) fn add(&mut self, layout: &CacheLayout, group: &Group, index: usize, span: &Span, positions: &[i32]) {
        let Some(layer) = group.layers.first() else { return };
        let (window, leaving) = (layout.window, layout.leaving(*layer, span.len()));
        let flush = if span.classes.is_empty() { window.flush_tokens() } else { 1 };
        for run in span.runs(leaving, span.cached..span.len()) {
            let count = run.tokens.len();
            self.all.push(Run {
                span: index as i32,
                keys: run.keys.into(),
                token_class: run.class as i32,
                block: run.block as i32,
                slot: run.slot as i32,
                count: count as i32,
                first: run.tokens.start as i32,
                positions: positions.get(run.class).copied().unwrap_or(-1),
                index: if run.keys { self.keys as i32 } else { 0 },
                flush: flush as i32,
            });
            if run.keys {
                self.keys += count;
            }
        }
    }
}
