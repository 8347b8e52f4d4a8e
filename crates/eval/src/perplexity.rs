//! Perplexity and KL divergence of schemes under streaming semantics.
//!
//! With [`Prefill::Streaming`] a row at position `t` sees the packed keys and values that decoding token by token would show
//! it (docs/schemes.md): within each layer tokens are stored, and the window flushed, one after the other. Other ways of
//! reading show it what they show the tokens of a prompt. The reference `fp16` has nothing packed; it is evaluated as one
//! exact prefill.

use crate::EvalError;
use dibit_cache::{CacheLayout, CalibratedScheme, PAGE_TOKENS, Sequence, Usage};
use dibit_device::Device;
use dibit_model::{Distribution, Pretrained, windows};
use dibit_runner::{Capacity, Executor, Models, Prefill, Runner};
use rayon::prelude::*;
use serde::Serialize;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

/// Rows whose logits are looked at together.
pub(crate) const LOGIT_ROWS: usize = PAGE_TOKENS;

/// What is evaluated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PerplexityOptions {
    /// Tokens of a window.
    pub context: usize,
    /// Number of windows; `None` for the whole text.
    pub windows: Option<usize>,
    /// How windows are read; every scheme is evaluated with each.
    pub prefills: Vec<Prefill>,
}

/// Figures of all schemes on the same text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Perplexity {
    /// Tokens of a window.
    pub context: usize,
    /// Number of windows.
    pub windows: usize,
    /// The token that begins each window, if one does.
    pub bos: Option<u32>,
    /// Scored tokens.
    pub tokens: usize,
    /// One entry for each scheme; the reference comes first.
    pub schemes: Vec<SchemeResult>,
}

/// Figures of one scheme. KL and agreement are against the 16-bit cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SchemeResult {
    /// Name of the scheme.
    pub scheme: String,
    /// How windows were read.
    pub prefill: String,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean KL divergence in nats per token.
    pub kl_mean: f64,
    /// 99.9th percentile of the KL divergence.
    pub kl_p999: f64,
    /// Share of tokens whose most likely token is the reference's.
    pub top1_agreement: f64,
    /// Measured bits in use for a cached scalar at the end of a window.
    pub bits: f64,
    /// Bits allocated.
    pub allocated_bits: f64,
    /// Bits of a scalar in a page, the window not counted.
    pub packed_bits: f64,
    /// Negative log-likelihood of every scored token, in nats, window after window.
    pub nll: Vec<f32>,
    /// KL divergence of every scored token.
    pub kl: Vec<f32>,
}

/// How far an evaluation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Window that is being evaluated, from 0.
    pub window: usize,
    /// Windows in all.
    pub windows: usize,
    /// Forward passes of all windows, those of the reference included.
    pub passes: usize,
    /// Scheme whose forward pass comes next.
    pub scheme: &'a str,
}

/// One scheme, read in one way, in the middle of a window.
pub(crate) struct Contender<D: Device> {
    pub scheme: CalibratedScheme,
    prefill: Prefill,
    runner: Runner<D>,
    /// The window in flight, and the tokens of its last pass.
    sequence: Option<Sequence>,
    pass: Range<usize>,
    /// What the last window took.
    usage: Usage,
    nll: Vec<f32>,
    kl: Vec<f32>,
    /// Tokens whose most likely token is the reference's.
    pub agreements: usize,
    /// Tokens that are the most likely ones.
    pub hits: usize,
    logits: Vec<f32>,
}

/// Evaluates schemes on a tokenised text. The reference `fp16` is added where it is not among them. `None` where
/// `progress` broke it off.
///
/// Schemes that transform values alike run side by side, one such group after the other, and the reference with each: so
/// the device holds the value and output projections of one group at a time, beside the plain ones, and everything else
/// once.
///
/// # Errors
/// [`EvalError`].
pub fn perplexity<D: Device>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    schemes: &[CalibratedScheme],
    ids: &[u32],
    options: PerplexityOptions,
    progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Perplexity>, EvalError> {
    let config = &pretrained.config;
    let (context, limit) = (options.context, config.max_position_embeddings);
    if !(2..=limit).contains(&context) {
        return Err(EvalError::Context { context, limit });
    }
    let windows = windows(ids, pretrained.window_bos, context, options.windows);
    if windows.is_empty() {
        let needed = context - pretrained.window_bos.iter().len();
        return Err(EvalError::TextTooShort { tokens: ids.len(), needed });
    }
    let scored = 0..context - 1;
    let finish = |contender: Contender<D>| contender.result();
    let ways = (schemes, &options.prefills[..]);
    let Some(schemes) = run_windows(device, pretrained, ways, (context, &windows), scored, finish, progress)? else {
        return Ok(None);
    };
    Ok(Some(Perplexity {
        context,
        windows: windows.len(),
        bos: pretrained.window_bos,
        tokens: windows.len() * (context - 1),
        schemes,
    }))
}

/// Runs windows of up to `context` tokens with all schemes, and scores these rows of each; what `finish` makes of each
/// scheme, the reference first. Schemes are run by the transforms of values that are fused into the model, one after the
/// other, each beside the reference. `None` where `progress` broke it off.
pub(crate) fn run_windows<D: Device, R>(
    device: &Arc<D>,
    pretrained: &Pretrained,
    (schemes, prefills): (&[CalibratedScheme], &[Prefill]),
    (context, windows): (usize, &[Vec<u32>]),
    scored: Range<usize>,
    finish: impl Fn(Contender<D>) -> R,
    mut progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Option<Vec<R>>, EvalError> {
    let schemes = CalibratedScheme::with_reference(schemes)?;
    let layouts = schemes.iter().map(|scheme| pretrained.cache_layout(scheme)).collect::<Result<Vec<_>, _>>()?;
    let groups = groups(&layouts);
    // Where nothing is packed, all ways are the exact one.
    let ways = |index: usize| if schemes[index].is_exact() { &[Prefill::Exact][..] } else { prefills };
    let of_scheme =
        |index: usize| ways(index).iter().flat_map(|way| windows.iter().map(|own| way.passes(0..own.len()).count()));
    let of_group = |group: &Vec<usize>| {
        std::iter::once(&0).chain(group).map(|index| of_scheme(*index).sum::<usize>()).sum::<usize>()
    };
    let passes = groups.iter().map(of_group).sum();
    let mut models = Models::new(device, pretrained);
    let count = prefills.len();
    let mut results: Vec<Option<R>> = (0..1 + (schemes.len() - 1) * count).map(|_| None).collect();
    for group in &groups {
        models.keep_first();
        let mut contenders = Vec::new();
        for (index, scheme) in std::iter::once(&0).chain(group).map(|index| (*index, &schemes[*index])) {
            for (place, prefill) in ways(index).iter().enumerate() {
                let place = if index == 0 { 0 } else { 1 + (index - 1) * count + place };
                let own = Contender::new(&mut models, scheme, layouts[index].clone(), context, *prefill)?;
                contenders.push((place, own));
            }
        }
        let (places, mut contenders): (Vec<usize>, Vec<Contender<D>>) = contenders.into_iter().unzip();
        for (index, window) in windows.iter().enumerate() {
            contenders.iter_mut().try_for_each(Contender::begin)?;
            let mut go_on = |scheme: &str| {
                progress(Progress { window: index, windows: windows.len(), passes, scheme }).is_continue()
            };
            let mut first = scored.start;
            while first < scored.end {
                // Rows of one pass, wherever passes end.
                let end = scored.end.min((first / LOGIT_ROWS + 1) * LOGIT_ROWS);
                for contender in &mut contenders {
                    if !contender.read_to(window, first, &mut go_on)? {
                        return Ok(None);
                    }
                }
                Contender::score_all(&mut contenders, device, first..end, window, pretrained.config.vocab_size)?;
                first = end;
            }
            for contender in &mut contenders {
                if !contender.read_to(window, window.len() - 1, &mut go_on)? {
                    return Ok(None);
                }
                contender.end();
            }
        }
        for (place, contender) in places.into_iter().zip(contenders) {
            results[place] = Some(finish(contender));
        }
    }
    Ok(Some(results.into_iter().flatten().collect()))
}

/// The schemes behind the reference, the first one, grouped by the transforms of values that are fused into the model.
/// One group is empty where there are none.
fn groups(layouts: &[CacheLayout]) -> Vec<Vec<usize>> {
    let mut groups: Vec<(Vec<_>, Vec<usize>)> = Vec::new();
    for (index, layout) in layouts.iter().enumerate().skip(1) {
        let fused = layout.fused_values();
        match groups.iter_mut().find(|(other, _)| *other == fused) {
            Some((_, group)) => group.push(index),
            None => groups.push((fused, vec![index])),
        }
    }
    if groups.is_empty() {
        return vec![Vec::new()];
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

impl<D: Device> Contender<D> {
    fn new(
        models: &mut Models<D>,
        scheme: &CalibratedScheme,
        layout: CacheLayout,
        context: usize,
        prefill: Prefill,
    ) -> Result<Self, EvalError> {
        let capacity = Capacity { rows: prefill.rows(context), ..Capacity::of_one(&layout, context, LOGIT_ROWS) };
        Ok(Contender {
            runner: Runner::new(models.get(&layout)?, layout, capacity)?,
            scheme: scheme.clone(),
            prefill,
            sequence: None,
            pass: 0..0,
            usage: Usage::default(),
            nll: Vec::new(),
            kl: Vec::new(),
            agreements: 0,
            hits: 0,
            logits: Vec::new(),
        })
    }

    /// Begins a window.
    fn begin(&mut self) -> Result<(), EvalError> {
        self.sequence = Some(self.runner.open()?);
        self.pass = 0..0;
        Ok(())
    }

    /// Runs passes until the one with this row has run; false where `go_on`, asked before each, says no.
    fn read_to(&mut self, window: &[u32], row: usize, go_on: &mut impl FnMut(&str) -> bool) -> Result<bool, EvalError> {
        let Contender { runner, sequence, prefill, pass, scheme, .. } = self;
        let sequence = sequence.as_mut().expect("a window that has begun");
        while pass.end <= row {
            if !go_on(&scheme.name) {
                return Ok(false);
            }
            let next = pass.end..prefill.end(pass.end..window.len());
            *pass = match runner.step(prefill.mode(), &mut [(&mut *sequence, &window[next.clone()])]) {
                Ok(()) => next,
                // The sequence is empty again; what was scored stays.
                Err(error) if error.wants_replay() => {
                    tracing::warn!("{error}");
                    0..0
                }
                Err(error) => return Err(error.into()),
            };
        }
        Ok(true)
    }

    /// Ends a window.
    fn end(&mut self) {
        if let Some(sequence) = self.sequence.take() {
            self.usage = self.runner.usage(&sequence);
            self.runner.close(sequence);
        }
    }

    /// Scores what these rows of a window, which lie in one pass that has run, expect next, by all schemes.
    fn score_all(
        contenders: &mut [Self],
        device: &D,
        rows: Range<usize>,
        window: &[u32],
        vocab_size: usize,
    ) -> Result<(), EvalError> {
        let targets = &window[rows.start + 1..rows.end + 1];
        for own in contenders.iter_mut() {
            let in_pass: Vec<usize> = rows.clone().map(|row| row - own.pass.start).collect();
            own.runner.logits(&in_pass, &mut own.logits)?;
        }
        let (reference, others) = contenders.split_first_mut().expect("the reference is there");
        reference.score(device, None, targets, vocab_size)?;
        others.iter_mut().try_for_each(|own| own.score(device, Some(&reference.logits), targets, vocab_size))
    }

    fn score(
        &mut self,
        device: &D,
        reference: Option<&[f32]>,
        targets: &[u32],
        vocab_size: usize,
    ) -> Result<(), EvalError> {
        let rows: Vec<(f32, f32, bool, bool)> = device.scope(|| {
            self.logits
                .par_chunks(vocab_size)
                .zip(targets)
                .enumerate()
                .map(|(row, (logits, &target))| {
                    let own = Distribution::new(logits);
                    let nll = own.nll(target) as f32;
                    let hit = own.top == target as usize;
                    let Some(reference) = reference else { return (nll, 0.0, true, hit) };
                    let reference = Distribution::new(&reference[row * vocab_size..(row + 1) * vocab_size]);
                    (nll, reference.kl(&own) as f32, reference.top == own.top, hit)
                })
                .collect()
        });
        for (nll, kl, agrees, hit) in rows {
            if !(nll.is_finite() && kl.is_finite()) {
                return Err(EvalError::NotFinite { scheme: self.scheme.name.clone() });
            }
            self.nll.push(nll);
            self.kl.push(kl);
            self.agreements += usize::from(agrees);
            self.hits += usize::from(hit);
        }
        Ok(())
    }

    /// A count of tokens as a share of all.
    pub fn share(&self, count: usize) -> f64 {
        count as f64 / self.nll.len() as f64
    }

    pub fn kl_mean(&self) -> f64 {
        mean(&self.kl)
    }

    fn result(self) -> SchemeResult {
        let (layout, usage) = (self.runner.layout(), self.usage);
        SchemeResult {
            perplexity: mean(&self.nll).exp(),
            kl_mean: self.kl_mean(),
            kl_p999: percentile(&self.kl, 0.999),
            top1_agreement: self.share(self.agreements),
            bits: usage.bits(),
            allocated_bits: usage.allocated_bits(),
            packed_bits: layout.packed_bits(),
            scheme: self.scheme.scheme.name,
            prefill: self.prefill.to_string(),
            nll: self.nll,
            kl: self.kl,
        }
    }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&x| f64::from(x)).sum::<f64>() / values.len() as f64
}

/// The smallest value that at least the share `at` of all values does not exceed.
fn percentile(values: &[f32], at: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let rank = (at * sorted.len() as f64).ceil() as usize;
    f64::from(sorted[rank.clamp(1, sorted.len()) - 1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_count_from_below() {
        let values: Vec<f32> = (1..=1000).rev().map(|x| x as f32).collect();
        assert_eq!(
            (percentile(&values, 0.999), percentile(&values, 0.5), percentile(&values, 1.0)),
            (999.0, 500.0, 1000.0)
        );
        assert_eq!(percentile(&[4.0], 0.999), 4.0);
    }
}
