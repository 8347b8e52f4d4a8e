//! Copying: random tokens, twice. What comes next in the second copy stands in the first, and nowhere else.
//!
//! The task is none of RULER's. It is scored by what a model expects next, under streaming semantics
//! ([`crate::perplexity`]): the first copy has left the window, token by token, when the second one reads it.

use super::random::Random;
use crate::EvalError;
use crate::perplexity::{Contender, Progress, run_windows};
use dibit_cache::CalibratedScheme;
use dibit_device::Device;
use dibit_model::Pretrained;
use dibit_runner::Prefill;
use serde::Serialize;
use std::ops::ControlFlow;
use std::sync::Arc;

/// The name of the task.
pub const COPYING: &str = "copying";

/// Tokens of a copy.
pub const COPIED: usize = 380;

/// Which sequences are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyingOptions {
    /// Number of sequences.
    pub samples: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Figures of all schemes on the same sequences.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Copying {
    /// Tokens of a copy.
    pub copied_tokens: usize,
    /// Tokens of a sequence: both copies, and the token that begins it, if one does.
    pub context: usize,
    /// Number of sequences.
    pub samples: usize,
    /// Tokens that are scored: those of the second copies but for the first of each, which nothing tells.
    pub tokens: usize,
    /// One entry for each scheme; the reference comes first.
    pub schemes: Vec<CopyingResult>,
}

/// Figures of one scheme on the second copies.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CopyingResult {
    /// Name of the scheme.
    pub scheme: String,
    /// Share of tokens that are the most likely ones.
    pub copied: f64,
    /// Share of tokens whose most likely token is the reference's.
    pub top1_agreement: f64,
    /// Mean KL divergence from the 16-bit cache in nats per token.
    pub kl_mean: f64,
}

/// Tokens of a sequence for a model.
pub fn copying_context(pretrained: &Pretrained) -> usize {
    pretrained.window_bos.iter().len() + 2 * COPIED
}

/// Sequences for a model, of all its tokens that are text. A sequence depends on nothing but the vocabulary, the seed and
/// its index.
fn sequences(pretrained: &Pretrained, options: CopyingOptions) -> Vec<Vec<u32>> {
    let is_text = |id: &u32| pretrained.tokenizer.decode(&[*id]).is_ok_and(|text| !text.is_empty());
    let mut ids: Vec<u32> = (0..pretrained.config.vocab_size as u32).filter(is_text).collect();
    if ids.is_empty() {
        ids.extend(0..pretrained.config.vocab_size as u32);
    }
    let sequence = |index: usize| {
        // The streams of the other tasks have smaller numbers.
        let mut random = Random::new(options.seed, u64::MAX << 32 | index as u64);
        let copy: Vec<u32> = (0..COPIED).map(|_| ids[random.below(ids.len())]).collect();
        pretrained.window_bos.iter().chain(&copy).chain(&copy).copied().collect()
    };
    (0..options.samples).map(sequence).collect()
}

/// Runs schemes over sequences, all in one pass. The reference `fp16` is added where it is not among them. `None` where
/// `progress`, which gets a sequence as a window, broke it off.
///
/// # Errors
/// [`EvalError`].
pub fn copying<D: Device>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    options: CopyingOptions,
    progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Copying>, EvalError> {
    let (context, limit) = (copying_context(pretrained), pretrained.config.max_position_embeddings);
    if context > limit {
        return Err(EvalError::Context { context, limit });
    }
    let sequences = sequences(pretrained, options);
    // The row of a token expects the next one.
    let scored = context - COPIED..context - 1;
    let finish = |contender: Contender<D>| CopyingResult {
        scheme: contender.scheme.name.clone(),
        copied: contender.share(contender.hits),
        top1_agreement: contender.share(contender.agreements),
        kl_mean: contender.kl_mean(),
    };
    let windows = (context, &sequences[..]);
    let prefills = [Prefill::streaming(context)];
    let Some(schemes) =
        run_windows(device, pretrained, (schemes, &prefills), windows, scored.clone(), finish, progress)?
    else {
        return Ok(None);
    };
    Ok(Some(Copying {
        copied_tokens: COPIED,
        context,
        samples: sequences.len(),
        tokens: sequences.len() * scored.len(),
        schemes,
    }))
}
