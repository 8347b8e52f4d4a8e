//! Which tokens enter which pages when a sequence grows.

use crate::{Leaving, PAGE_TOKENS, Span};
use std::ops::Range;

/// Keys, or values, that enter consecutive slots of one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Whether they are keys.
    pub keys: bool,
    /// Class of the tokens; 0 where they have none.
    pub class: usize,
    /// Their numbers among the tokens of the class; positions where the scheme has no classes.
    pub tokens: Range<usize>,
    /// The block.
    pub block: u32,
    /// Slot of the first one.
    pub slot: usize,
}

impl Span {
    /// Shows the runs that leave the window, and enter pages, while the sequence grows from `cached.start` to `cached.end`
    /// tokens: keys, then values, by rising pages of each class. Pages that nobody will see again are left out.
    ///
    /// # Errors
    /// The first error of `run`, after which nothing more is shown.
    pub fn try_each_run<E>(
        &self,
        leaving: Leaving,
        cached: Range<usize>,
        mut run: impl FnMut(Run) -> Result<(), E>,
    ) -> Result<(), E> {
        for (keys, tokens) in [true, false].into_iter().zip(leaving.window.leaving(cached)) {
            let mut cut = |class: usize, block: &dyn Fn(usize) -> u32, tokens: Range<usize>| {
                let mut first = tokens.start;
                while first < tokens.end {
                    let (page, slot) = (first / PAGE_TOKENS, first % PAGE_TOKENS);
                    let end = tokens.end.min((page + 1) * PAGE_TOKENS);
                    if (page + 1) * PAGE_TOKENS > leaving.kept {
                        run(Run { keys, class, tokens: first..end, block: block(page), slot })?;
                    }
                    first = end;
                }
                Ok(())
            };
            if self.classes.is_empty() {
                cut(0, &|page| self.block(leaving.group, page), tokens)?;
                continue;
            }
            for (class, own) in self.classes.iter().enumerate() {
                cut(class, &|page| own.blocks[page], own.packed(tokens.start)..own.packed(tokens.end))?;
            }
        }
        Ok(())
    }

    /// All of these runs.
    pub fn runs(&self, leaving: Leaving, cached: Range<usize>) -> Vec<Run> {
        let mut all = Vec::new();
        let Ok(()) = self.try_each_run(leaving, cached, |run| {
            all.push(run);
            Ok::<_, std::convert::Infallible>(())
        });
        all
    }

    /// Blocks that tokens enter while the sequence grows so, by rising numbers, each with its class.
    pub fn filled_blocks(&self, leaving: Leaving, cached: Range<usize>) -> Vec<(u32, usize)> {
        let mut blocks: Vec<(u32, usize)> =
            self.runs(leaving, cached).into_iter().map(|run| (run.block, run.class)).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ClassTokens, Schedule, Window};
    use proptest::prelude::*;

    fn window(schedule: Schedule, tokens: usize) -> Window {
        Window { tokens, schedule }
    }

    proptest! {
        /// However a sequence comes in, each token of each side enters one slot once: that of its number in its class.
        #[test]
        fn every_token_that_leaves_has_one_slot(
            schedule in 0usize..3, classes in 0usize..3, steps in prop::collection::vec(1usize..300, 1..6),
        ) {
            let window = match schedule {
                0 => window(Schedule::None, 0),
                1 => window(Schedule::Guaranteed, 100),
                _ => window(Schedule::Kivi, 128),
            };
            let len: usize = steps.iter().sum();
            let own = |class: usize| ClassTokens {
                tokens: (0..len as u32).filter(|token| *token as usize % classes == class).collect(),
                blocks: (0..12).map(|block| (20 * (class + 1) + block) as u32).collect(),
            };
            let span = Span {
                slot: 0,
                blocks: vec![if classes == 0 { (50..65).collect() } else { Vec::new() }],
                chunks: Vec::new(),
                classes: (0..classes).map(own).collect(),
                cached: 0,
                rows: 0..len,
            };
            let mut seen = std::collections::HashSet::new();
            let mut cached = 0;
            for rows in steps {
                let grown = cached..cached + rows;
                let leaving = Leaving { window, group: 0, kept: 0 };
                let runs = span.runs(leaving, grown.clone());
                let mut blocks: Vec<_> = runs.iter().map(|run| (run.block, run.class)).collect();
                blocks.sort_unstable();
                blocks.dedup();
                prop_assert_eq!(blocks, span.filled_blocks(leaving, grown));
                for run in runs {
                    prop_assert!(run.slot + run.tokens.len() <= PAGE_TOKENS);
                    for (i, token) in run.tokens.enumerate() {
                        let table = span.classes.get(run.class).map_or(&span.blocks[0], |own| &own.blocks);
                        prop_assert_eq!((run.block, run.slot + i), (table[token / PAGE_TOKENS], token % PAGE_TOKENS));
                        prop_assert!(seen.insert((run.keys, run.block, run.slot + i)));
                    }
                }
                cached += rows;
            }
            prop_assert_eq!(seen.len(), window.packed_keys(len) + window.packed_values(len));
        }
    }
}
