//! Log-probabilities of tokens.

use crate::TokenLogprob;

/// The log-probability of `id` by the finite logits of all tokens, with those of the `count` most likely ones.
pub(crate) fn logprob(logits: &[f32], id: u32, count: usize) -> TokenLogprob {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    let normaliser = f64::from(largest) + sum.ln();
    let of = |logit: f32| (f64::from(logit) - normaliser) as f32;
    let mut top: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
    let falling = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if (1..top.len()).contains(&count) {
        top.select_nth_unstable_by(count - 1, falling);
    }
    top.truncate(count);
    top.sort_unstable_by(falling);
    top.iter_mut().for_each(|entry| entry.1 = of(entry.1));
    TokenLogprob { id, logprob: of(logits[id as usize]), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_the_log_softmax() {
        let logits = [0.5f32, 2.0, -1.0, 2.0];
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let of = |id: usize| (f64::from(logits[id]) - sum.ln()) as f32;
        let found = logprob(&logits, 2, 3);
        assert!((found.logprob - of(2)).abs() < 1e-6);
        let ids: Vec<u32> = found.top.iter().map(|entry| entry.0).collect();
        assert_eq!(ids, [1, 3, 0]);
        assert!(found.top.iter().all(|(id, logprob)| (logprob - of(*id as usize)).abs() < 1e-6));
        assert_eq!(logprob(&logits, 0, 0).top, []);
        assert_eq!(logprob(&logits, 0, 9).top.len(), 4);
    }

    #[test]
    fn the_same_token_has_the_same_number_everywhere() {
        let logits: Vec<f32> = (0..100).map(|i| (i as f32 * 0.77).sin() * 9.0).collect();
        for id in 0..100 {
            let found = logprob(&logits, id, 100);
            assert!(found.top.contains(&(id, found.logprob)), "{id}");
        }
    }
}
