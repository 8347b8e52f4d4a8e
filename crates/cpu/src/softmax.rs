//! The online softmax: logits become weights in the frame of the largest logit so far.

use super::exp::exp;
use super::simd::{BASELINE_FMA, WIDTH, dispatch, join};

/// The largest of some numbers.
#[inline(always)]
pub(super) fn largest(values: &[f32]) -> f32 {
    let greater = |a: f32, b: f32| if a > b { a } else { b };
    let (whole, rest) = values.as_chunks::<WIDTH>();
    let mut lanes = [f32::NEG_INFINITY; WIDTH];
    for values in whole {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane = greater(*value, *lane);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, value| greater(*value, most))
}

#[inline(always)]
fn body<const FMA: bool>(logits: &mut [f32], state: &mut [f32]) {
    let largest = largest(logits);
    if largest > state[0] {
        let shrink = (state[0] - largest).exp();
        for sum in &mut state[1..] {
            *sum *= shrink;
        }
        state[0] = largest;
    }
    let offset = state[0];
    if offset == f32::NEG_INFINITY {
        return logits.fill(0.0);
    }
    let (whole, rest) = logits.as_chunks_mut::<WIDTH>();
    let mut lanes = [0f32; WIDTH];
    for logits in whole {
        for (lane, logit) in lanes.iter_mut().zip(logits) {
            *logit = exp::<FMA>(*logit - offset);
            *lane += *logit;
        }
    }
    for (lane, logit) in lanes.iter_mut().zip(rest) {
        *logit = exp::<FMA>(*logit - offset);
        *lane += *logit;
    }
    state[1] += join(lanes);
}

dispatch! {
    /// Turns logits into weights `exp(logit - maximum)` and moves the sums of `state`, which are `[maximum, normaliser,
    /// weighted values ...]`, to the new maximum; the weights are added to the normaliser. Logits of minus infinity
    /// weigh nothing.
    fn softmax<>(logits: &mut [f32], state: &mut [f32]);
    baseline: body::<BASELINE_FMA>(logits, state);
    avx2: body::<true>(logits, state);
    avx512: body::<true>(logits, state);
    neon: body::<true>(logits, state);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Isa;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn blocks_join_to_the_softmax_of_all(
            logits in prop::collection::vec(prop_oneof![8 => -40f32..40.0, 1 => Just(f32::NEG_INFINITY)], 1..300),
            cut in 0usize..300,
        ) {
            let cut = cut.min(logits.len());
            let maximum = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exact: f64 = logits.iter().map(|x| f64::from(x - maximum).exp()).sum();
            prop_assume!(maximum > f32::NEG_INFINITY);
            for isa in Isa::available() {
                // A third number of the state stands for weighted values: here it counts the first block.
                let mut state = [f32::NEG_INFINITY, 0.0, 0.0];
                let mut first = logits[..cut].to_vec();
                softmax(isa, &mut first, &mut state);
                state[2] = state[1];
                let mut second = logits[cut..].to_vec();
                softmax(isa, &mut second, &mut state);
                prop_assert_eq!(state[0], maximum);
                prop_assert!((f64::from(state[1]) / exact - 1.0).abs() < 1e-5, "{:?}", state);
                let part: f64 = logits[..cut].iter().map(|x| f64::from(x - maximum).exp()).sum();
                prop_assert!((f64::from(state[2]) - part).abs() < 1e-5 * exact);
                for (weight, logit) in second.iter().zip(&logits[cut..]) {
                    prop_assert!((f64::from(*weight) - f64::from(logit - maximum).exp()).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn nothing_visible_weighs_nothing() {
        let mut state = [f32::NEG_INFINITY, 0.0, 0.0];
        let mut logits = [f32::NEG_INFINITY; 3];
        softmax(Isa::detect(), &mut logits, &mut state);
        assert_eq!((logits, state), ([0.0; 3], [f32::NEG_INFINITY, 0.0, 0.0]));
    }
}
