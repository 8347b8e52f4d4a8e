//! How prompts are read.

use dibit_cache::{Mode, PAGE_TOKENS};
use std::fmt;
use std::ops::Range;
use thiserror::Error;

/// Cells that are no whole pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("cells of {0} tokens; their size must be a multiple of 128 (--cell)")]
pub struct CellError(pub usize);

/// How a prompt is cut into passes. A token sees the tokens of its own pass exactly, and earlier ones as they are stored; so
/// where passes end is part of the answer, and depends on the request alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefill {
    /// Passes end at the multiples of so many tokens, counted from the beginning of the sequence.
    Cells(usize),
    /// A prompt is one pass, as papers read it.
    Exact,
    /// Every token sees what decoding token by token would show it; passes of so many tokens.
    Streaming(usize),
}

impl Prefill {
    /// [`Prefill::Streaming`] in one pass of a context: where its passes end changes nothing, but for sinks that are chosen
    /// from a prompt.
    pub fn streaming(context: usize) -> Self {
        Prefill::Streaming(context.max(1).next_multiple_of(PAGE_TOKENS))
    }

    /// Refuses cells that are no whole pages.
    ///
    /// # Errors
    /// [`CellError`].
    pub fn check(self) -> Result<(), CellError> {
        match self {
            Prefill::Cells(cell) | Prefill::Streaming(cell) if cell == 0 || !cell.is_multiple_of(PAGE_TOKENS) => {
                Err(CellError(cell))
            }
            _ => Ok(()),
        }
    }

    /// Rows of a pass of one sequence at most, in a context.
    pub fn rows(self, context: usize) -> usize {
        match self {
            Prefill::Cells(cell) | Prefill::Streaming(cell) => cell.min(context).max(1),
            Prefill::Exact => context.max(1),
        }
    }

    /// Tokens of a context that come in at once, at most: its pages share what a scheme stores for a chunk.
    pub fn chunk(self, context: usize) -> usize {
        match self {
            Prefill::Streaming(_) => PAGE_TOKENS,
            Prefill::Cells(_) | Prefill::Exact => self.rows(context),
        }
    }

    /// Where the pass ends that begins with token `tokens.start` of a sequence, of a prompt that ends at `tokens.end`.
    pub fn end(self, tokens: Range<usize>) -> usize {
        match self {
            Prefill::Cells(cell) | Prefill::Streaming(cell) => tokens.end.min((tokens.start / cell + 1) * cell),
            Prefill::Exact => tokens.end,
        }
    }

    /// What to know of a prompt, at these positions of a sequence, that is not read as one exact pass.
    pub fn note(self, tokens: Range<usize>) -> Option<String> {
        let (count, passes) = (tokens.len(), self.passes(tokens).count());
        match self {
            Prefill::Streaming(_) => Some("prompts are read as they would be decoded, token by token".to_owned()),
            _ if passes < 2 => None,
            Prefill::Cells(_) | Prefill::Exact => Some(format!(
                "a prompt of {count} tokens is read in {passes} passes, {self}: each sees itself exactly, and those before it as \
                 they are stored"
            )),
        }
    }

    /// Cuts a prompt into the tokens of its passes: positions of a sequence.
    pub fn passes(self, tokens: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let mut start = tokens.start;
        std::iter::from_fn(move || {
            let pass = start..self.end(start..tokens.end);
            start = pass.end;
            (!pass.is_empty()).then_some(pass)
        })
    }

    /// How the rows of a pass see the cache.
    pub fn mode(self) -> Mode {
        match self {
            Prefill::Cells(_) | Prefill::Exact => Mode::Chunk,
            Prefill::Streaming(_) => Mode::Streaming,
        }
    }
}

impl fmt::Display for Prefill {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Prefill::Cells(cell) => write!(f, "cells of {cell}"),
            Prefill::Exact => f.write_str("one exact pass"),
            Prefill::Streaming(_) => f.write_str("streaming mode"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_end_at_fixed_places() {
        let cells = |tokens| Prefill::Cells(256).passes(tokens).collect::<Vec<_>>();
        assert_eq!(cells(0..600), [0..256, 256..512, 512..600]);
        // A later turn goes on in the cell that the one before it began.
        assert_eq!(cells(600..800), [600..768, 768..800]);
        assert!(cells(512..512).is_empty());
        assert!(Prefill::Exact.passes(3..9000).eq(std::iter::once(3..9000)));
        assert_eq!((Prefill::Cells(256).rows(100), Prefill::Exact.rows(4096)), (100, 4096));
    }

    #[test]
    fn cells_are_whole_pages() {
        for bad in [0, 64, 200] {
            assert!(Prefill::Cells(bad).check().unwrap_err().to_string().contains("multiple of 128"), "{bad}");
        }
        assert!(Prefill::Cells(1024).check().is_ok() && Prefill::Exact.check().is_ok());
    }
}
