//! The loss of an attention row under the linear correction, and its derivative.

use crate::exp::exp;
use crate::ln::ln;
use crate::simd::{BASELINE_FMA, WIDTH, dispatch, join, mul_add};
use crate::softmax::largest;
use dibit_device::RowStatistic;

/// Probabilities below this one count as this one.
const LEAST: f32 = 1e-12;

/// What one row sees.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// Keys that it sees.
    pub visible: usize,
    /// The first of them, which are packed.
    pub packed: usize,
    /// The first of those, which are kept exactly.
    pub exact: usize,
}

/// Runs the body for numbers of the same place in slices of one length, and the lane of that place: in whole chunks
/// first, which compilers vectorise.
macro_rules! by_lanes {
    (|$lane:ident, $a:ident| $body:expr) => {{
        let (whole, rest) = $a.as_chunks_mut::<WIDTH>();
        for chunk in whole {
            for $lane in 0..WIDTH {
                let $a = &mut chunk[$lane];
                $body
            }
        }
        for ($lane, $a) in rest.iter_mut().enumerate() {
            $body
        }
    }};
    (|$lane:ident, $a:ident, $b:ident, $c:ident| $body:expr) => {{
        let (a_whole, a_rest) = $a.as_chunks_mut::<WIDTH>();
        let (b_whole, b_rest) = $b.as_chunks_mut::<WIDTH>();
        let (c_whole, c_rest) = $c.as_chunks_mut::<WIDTH>();
        for ((a_chunk, b_chunk), c_chunk) in a_whole.iter_mut().zip(b_whole).zip(c_whole) {
            for $lane in 0..WIDTH {
                let ($a, $b, $c) = (&mut a_chunk[$lane], &mut b_chunk[$lane], &mut c_chunk[$lane]);
                $body
            }
        }
        for ($lane, (($a, $b), $c)) in a_rest.iter_mut().zip(b_rest).zip(c_rest).enumerate() {
            $body
        }
    }};
}

/// `value`, or `least` where that is more.
#[inline(always)]
fn at_least(value: f32, least: f32) -> f32 {
    if value > least { value } else { least }
}

#[inline(always)]
fn loss_body<const FMA: bool>(
    row: Row,
    exact: &mut [f32],
    missed: &mut [f32],
    correction: &mut [f32],
    statistics: &mut [f32],
    outputs: bool,
) {
    let Row { visible, packed, exact: kept } = row;
    let (seen, unseen) = exact.split_at_mut(visible);
    let (old, recent) = seen.split_at_mut(packed);
    let (mixed, beside) = missed.split_at_mut(packed);
    let (added, never) = correction.split_at_mut(packed);
    // What the row does not see, and what it sees exactly, has no correction.
    added[..kept].fill(0.0);
    never.fill(0.0);

    // Logits of what the cache holds, and the largest of both kinds.
    for (mixed, old) in mixed.iter_mut().zip(old.iter()) {
        *mixed = old - *mixed;
    }
    let newest = largest(recent);
    let exact_most = largest(old).max(newest);
    let mixed_most = largest(mixed).max(newest);

    // Sums of the exact weights, of these times their logits, of the other weights with and without the correction.
    let [mut exact_sum, mut energy, mut sum, mut plain_sum] = [[0f32; WIDTH]; 4];
    by_lanes!(|lane, old, mixed, added| {
        let logit = *old - exact_most;
        let weight = exp::<FMA>(logit);
        exact_sum[lane] += weight;
        energy[lane] = mul_add::<FMA>(weight, logit, energy[lane]);
        *old = weight;
        *mixed -= mixed_most;
        let plain = exp::<FMA>(*mixed);
        plain_sum[lane] += plain;
        *added += plain;
        sum[lane] += *added;
    });
    by_lanes!(|lane, recent| {
        let logit = *recent - exact_most;
        let weight = exp::<FMA>(logit);
        exact_sum[lane] += weight;
        energy[lane] = mul_add::<FMA>(weight, logit, energy[lane]);
        let plain = exp::<FMA>(*recent - mixed_most);
        plain_sum[lane] += plain;
        sum[lane] += plain;
    });
    let [exact_sum, energy, sum, plain_sum] = [exact_sum, energy, sum, plain_sum].map(join);
    let (share, inverse) = (1.0 / exact_sum, 1.0 / sum);
    let (sum_ln, plain_ln, least_ln) = (sum.ln(), plain_sum.ln(), LEAST.ln());

    // The cross-entropy with and without the correction, and -A / a; targets that the clamp leaves out pull at nothing.
    let [mut cross, mut plain_cross, mut pulling] = [[0f32; WIDTH]; 3];
    by_lanes!(|lane, old, mixed, added| {
        let target = *old * share;
        let probability = *added * inverse;
        let clamped = at_least(probability, LEAST);
        cross[lane] = mul_add::<FMA>(target, ln::<FMA>(clamped), cross[lane]);
        plain_cross[lane] = mul_add::<FMA>(target, at_least(*mixed - plain_ln, least_ln), plain_cross[lane]);
        let pulled = if probability > LEAST { target } else { 0.0 };
        pulling[lane] += pulled;
        *added = -pulled / (clamped * sum);
        *old = probability - target;
        *mixed = probability;
    });
    // A recent key has no correction, and its weight is the power of a known logit: no logarithm is taken.
    by_lanes!(|lane, recent| {
        let target = exp::<FMA>(*recent - exact_most) * share;
        let logit = *recent - mixed_most;
        let own = at_least(logit - sum_ln, least_ln);
        cross[lane] = mul_add::<FMA>(target, own, cross[lane]);
        plain_cross[lane] = mul_add::<FMA>(target, at_least(logit - plain_ln, least_ln), plain_cross[lane]);
        pulling[lane] += if own > least_ln { target } else { 0.0 };
    });
    let [cross, plain_cross, pulling] = [cross, plain_cross, pulling].map(join);
    let pushed = pulling * inverse;
    let (kept, corrected) = added.split_at_mut(kept);
    kept.fill(0.0);
    corrected.iter_mut().for_each(|added| *added += pushed);

    if outputs {
        let (beside, hidden) = beside.split_at_mut(visible - packed);
        for (recent, beside) in recent.iter_mut().zip(beside) {
            let target = exp::<FMA>(*recent - exact_most) * share;
            *beside = exp::<FMA>(*recent - mixed_most) * inverse;
            *recent = *beside - target;
        }
        hidden.fill(0.0);
        unseen.fill(0.0);
    }
    let entropy = exact_sum.ln() - energy * share;
    statistics[RowStatistic::CrossEntropy as usize] = -cross;
    statistics[RowStatistic::Divergence as usize] = -cross - entropy;
    statistics[RowStatistic::Uncorrected as usize] = -plain_cross - entropy;
    statistics[RowStatistic::Inverse as usize] = inverse;
}

dispatch! {
    /// [`dibit_device::Train::row_loss`] of one row.
    fn loss<>(
        row: Row,
        exact: &mut [f32],
        missed: &mut [f32],
        correction: &mut [f32],
        statistics: &mut [f32],
        outputs: bool,
    );
    baseline: loss_body::<BASELINE_FMA>(row, exact, missed, correction, statistics, outputs);
    avx2: loss_body::<true>(row, exact, missed, correction, statistics, outputs);
    avx512: loss_body::<true>(row, exact, missed, correction, statistics, outputs);
    neon: loss_body::<true>(row, exact, missed, correction, statistics, outputs);
}

#[inline(always)]
fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<WIDTH>(), b.as_chunks::<WIDTH>());
    let mut lanes = [0f32; WIDTH];
    for (a, b) in a.iter().zip(b) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = mul_add::<FMA>(*a, *b, *lane);
        }
    }
    for ((lane, a), b) in lanes.iter_mut().zip(a_rest).zip(b_rest) {
        *lane = mul_add::<FMA>(*a, *b, *lane);
    }
    join(lanes)
}

#[inline(always)]
fn output_body<const FMA: bool>(
    row: Row,
    weight: f32,
    weights: &[f32],
    errors: &[f32],
    toward: &[f32],
    correction: &mut [f32],
    statistics: &mut [f32],
) {
    let Row { visible, packed, exact: kept } = row;
    let scale = 2.0 * weight / errors.len() as f32 * statistics[RowStatistic::Inverse as usize];
    let mean = dot::<FMA>(&weights[..visible], &toward[..visible]);
    for (derivative, toward) in correction[kept..packed].iter_mut().zip(&toward[kept..packed]) {
        *derivative = mul_add::<FMA>(scale, toward - mean, *derivative);
    }
    statistics[RowStatistic::Output as usize] = dot::<FMA>(errors, errors) / errors.len() as f32;
}

dispatch! {
    /// [`dibit_device::Train::output_loss`] of one row.
    fn output<>(
        row: Row,
        weight: f32,
        weights: &[f32],
        errors: &[f32],
        toward: &[f32],
        correction: &mut [f32],
        statistics: &mut [f32],
    );
    baseline: output_body::<BASELINE_FMA>(row, weight, weights, errors, toward, correction, statistics);
    avx2: output_body::<true>(row, weight, weights, errors, toward, correction, statistics);
    avx512: output_body::<true>(row, weight, weights, errors, toward, correction, statistics);
    neon: output_body::<true>(row, weight, weights, errors, toward, correction, statistics);
}
