//! RULER: what a model finds again in a long context.
//!
//! The tasks, their wording, their settings and their scoring are those of
//! [RULER](https://github.com/NVIDIA/RULER) (Hsieh et al., [arXiv 2404.06654](https://arxiv.org/abs/2404.06654);
//! copyright NVIDIA CORPORATION, Apache-2.0): needles in a haystack, variable tracking, common and frequent words.
//! The two question answering tasks need data sets and are not here. The prompts are not those of the original,
//! word by word, as its random numbers are Python's:
//!
//! - Keys and word lists are of a smaller vocabulary; where a list needs more, keys (`quiet-river`) are added.
//! - Keys, values and names that must be told apart always differ. The original draws them independently.
//! - Sentences of an essay end at `.`, `!` or `?` before a capital, where the original asks NLTK.
//! - A prompt is filled up to less than one unit of haystack for its first sample, and as good as that for the
//!   others; the original searches in steps of 5 to 500 units and takes no length that is below the first step.
//! - The solved example of variable tracking is made anew for each sample; the original changes its names only.
//!
//! A task of our own is [`copying`].

mod common;
mod copying;
mod frequent;
mod haystack;
mod needle;
mod random;
mod sample;
mod score;
mod task;
mod variables;
mod vocabulary;

pub use copying::{COPIED, COPYING, Copying, CopyingOptions, CopyingResult, copying, copying_context};
pub use haystack::Haystack;
pub use sample::{Sample, SampleOptions, samples};
pub use score::score;
pub use task::Task;

use dibit_model::ModelError;
use thiserror::Error;

/// Why there are no prompts.
#[derive(Debug, Error)]
pub enum RulerError {
    /// No task has this name.
    #[error("unknown task '{name}'{suggestion}; there are {known}")]
    UnknownTask {
        /// The name that was asked for.
        name: String,
        /// ` (did you mean '...'?)`, or empty.
        suggestion: String,
        /// The names of all tasks, separated by commas.
        known: String,
    },
    /// The haystack has no words.
    #[error("the haystack is empty; give some pages of text")]
    EmptyHaystack,
    /// The smallest prompt of the task is too long.
    #[error(
        "{task} needs {needed} tokens at least, {answer} of them for the answer, and the context is {length}; \
         give a longer --context, or leave the task out of --tasks"
    )]
    TooShort {
        /// The task.
        task: Task,
        /// Tokens of the smallest prompt and its answer.
        needed: usize,
        /// Tokens of the answer.
        answer: usize,
        /// Tokens that were allowed.
        length: usize,
    },
    /// The tokenizer or the chat template failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}
