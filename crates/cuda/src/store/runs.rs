//! What leaves the window in a pass, cut by pages.

use crate::abi::Run;
use dibit_cache::{CacheLayout, PAGE_TOKENS, Schedule};
use dibit_device::Span;
use dibit_device::host::leaving;
use std::ops::Range;

/// The runs of some spans, and how many keys they hold.
#[derive(Default)]
pub(super) struct Runs {
    pub all: Vec<Run>,
    pub keys: usize,
}

impl Runs {
    /// Adds those of a span, which is number `index`; `positions` says where the positions of each class begin.
    pub(super) fn add(&mut self, layout: &CacheLayout, index: usize, span: &Span, positions: &[i32]) {
        let leaving = leaving(layout, span.cached..span.cached + span.rows.len());
        // A state in 16 bit is rounded after each flush.
        let flush = match layout.window.schedule {
            Schedule::None => 1,
            Schedule::Guaranteed => PAGE_TOKENS,
            Schedule::Kivi => layout.window.tokens.clamp(1, PAGE_TOKENS),
        };
        for (keys, tokens) in [(true, leaving[0].clone()), (false, leaving[1].clone())] {
            if span.classes.is_empty() {
                let run = Run { span: index as i32, keys: keys.into(), positions: -1, flush: flush as i32, ..NO_RUN };
                self.cut(run, tokens, &span.blocks);
                continue;
            }
            for (class, (own, positions)) in span.classes.iter().zip(positions).enumerate() {
                let own_tokens = own.packed(tokens.start)..own.packed(tokens.end);
                let token_class = class as i32;
                let run = Run { span: index as i32, keys: keys.into(), token_class, positions: *positions, ..NO_RUN };
                self.cut(run, own_tokens, &own.blocks);
            }
        }
    }

    /// Adds tokens of one block table, page by page.
    fn cut(&mut self, run: Run, tokens: Range<usize>, blocks: &[u32]) {
        let mut first = tokens.start;
        while first < tokens.end {
            let end = tokens.end.min((first / PAGE_TOKENS + 1) * PAGE_TOKENS);
            let count = end - first;
            self.all.push(Run {
                block: blocks[first / PAGE_TOKENS] as i32,
                slot: (first % PAGE_TOKENS) as i32,
                count: count as i32,
                first: first as i32,
                index: if run.keys == 1 { self.keys as i32 } else { 0 },
                ..run
            });
            if run.keys == 1 {
                self.keys += count;
            }
            first = end;
        }
    }
}

const NO_RUN: Run =
    Run { span: 0, keys: 0, token_class: 0, block: 0, slot: 0, count: 0, first: 0, positions: -1, index: 0, flush: 1 };
