//! Choosing the next token.

use crate::EngineError;
use dibit_model::argmax;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};
use std::collections::HashSet;

/// How tokens are chosen: repetition penalty, temperature, top-k, top-p and min-p, in this order, as Hugging Face
/// does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Probability mass that is sampled from, in (0, 1].
    pub top_p: f32,
    /// Number of tokens that are sampled from; 0 for all.
    pub top_k: usize,
    /// Tokens less likely than this share of the most likely one are not sampled, in [0, 1].
    pub min_p: f32,
    /// Logits of tokens that have occurred are divided by it where positive and multiplied where negative; 1 for none.
    pub repetition_penalty: f32,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token, always.
    pub const GREEDY: Sampling =
        Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 };

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`EngineError::Sampling`].
    pub fn validate(&self) -> Result<(), EngineError> {
        let Sampling { temperature, top_p, min_p, repetition_penalty: penalty, .. } = *self;
        for (name, value, good, range) in [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "between 0 (greedy) and 100"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
            ("repetition_penalty", penalty, penalty > 0.0 && penalty <= 100.0, "above 0 and at most 100"),
        ] {
            if !good {
                return Err(EngineError::Sampling { name, value, range });
            }
        }
        Ok(())
    }
}

/// Chooses the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Tokens that have occurred, where there is a penalty on them.
    seen: HashSet<u32>,
    logits: Vec<f32>,
    /// Candidates with their logits, then their weights.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler that begins its random numbers, for a sequence in which the tokens `seen` have occurred.
    pub fn new(sampling: Sampling, seen: impl IntoIterator<Item = u32>) -> Self {
        Sampler {
            sampling,
            random: ChaCha8Rng::seed_from_u64(sampling.seed),
            seen: if sampling.repetition_penalty == 1.0 { HashSet::new() } else { seen.into_iter().collect() },
            logits: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Whether the most likely token is chosen, whatever came before.
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && self.sampling.repetition_penalty == 1.0
    }

    /// Chooses from the finite logits of all tokens, of which there is at least one.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let penalty = self.sampling.repetition_penalty;
        if penalty == 1.0 {
            return self.choose(logits);
        }
        let mut penalised = std::mem::take(&mut self.logits);
        penalised.clear();
        penalised.extend_from_slice(logits);
        for &id in &self.seen {
            if let Some(logit) = penalised.get_mut(id as usize) {
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        let id = self.choose(&penalised);
        self.logits = penalised;
        self.seen.insert(id);
        id
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_p, top_k, min_p, .. } = self.sampling;
        let top = argmax(logits);
        if temperature == 0.0 {
            return top as u32;
        }
        let all = &mut self.candidates;
        all.clear();
        // The largest becomes 0 before the division, so that no temperature is too small.
        all.extend(logits.iter().zip(0u32..).map(|(&logit, id)| ((logit - logits[top]) / temperature, id)));
        let descending = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if (1..all.len()).contains(&top_k) {
            all.select_nth_unstable_by(top_k - 1, descending);
            all.truncate(top_k);
        }
        for candidate in all.iter_mut() {
            candidate.0 = candidate.0.exp();
        }
        if top_p < 1.0 {
            all.sort_unstable_by(descending);
            let total: f32 = all.iter().map(|c| c.0).sum();
            let mut mass = 0.0;
            let enough = all.iter().position(|c| {
                mass += c.0;
                mass >= top_p * total
            });
            all.truncate(enough.map_or(all.len(), |last| last + 1));
        }
        // The most likely token weighs 1.
        all.retain(|c| c.0 >= min_p);
        let total: f32 = all.iter().map(|c| c.0).sum();
        // 53 random bits make a uniform number in [0, 1).
        let uniform = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * f64::from(total);
        for &(weight, id) in all.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return id;
            }
        }
        // Rounding left something over.
        top as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn counts(sampling: Sampling, draws: usize) -> [usize; 5] {
        let mut sampler = Sampler::new(sampling, []);
        let mut counts = [0; 5];
        for _ in 0..draws {
            counts[sampler.sample(&LOGITS) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(counts(Sampling::GREEDY, 3), [0, 3, 0, 0, 0]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let counts = counts(Sampling { temperature: 1.0, seed: 1, ..Sampling::GREEDY }, 100_000);
        let total: f64 = LOGITS.iter().map(|x| f64::from(*x).exp()).sum();
        for (count, logit) in counts.into_iter().zip(LOGITS) {
            assert!((count as f64 / 1e5 - f64::from(logit).exp() / total).abs() < 5e-3);
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let sampling = Sampling { temperature: 1.0, seed: 1, ..Sampling::GREEDY };
        let top_k = counts(Sampling { top_k: 3, ..sampling }, 2000);
        assert!(top_k[0] == 0 && top_k[4] == 0 && top_k[2] > 0);
        // The two largest hold 0.8 of the mass.
        let top_p = counts(Sampling { top_p: 0.75, ..sampling }, 2000);
        assert!(top_p[1] > 0 && top_p[3] > 0 && top_p[1] + top_p[3] == 2000);
        assert_eq!(counts(Sampling { top_k: 1, ..sampling }, 10)[1], 10);
        assert_eq!(counts(Sampling { top_k: 50, top_p: 1e-6, ..sampling }, 10)[1], 10);
    }

    #[test]
    fn min_p_is_a_share_of_the_most_likely() {
        // Relative to the largest, the weights are 0.14, 1, 0.37, 1 and 0.02.
        let sampling = Sampling { temperature: 1.0, seed: 1, ..Sampling::GREEDY };
        let cut = counts(Sampling { min_p: 0.3, ..sampling }, 2000);
        assert!(cut[0] == 0 && cut[4] == 0 && cut[2] > 0);
        assert_eq!(counts(Sampling { min_p: 1.0, ..sampling }, 500)[2], 0);
    }

    #[test]
    fn a_penalty_turns_away_from_what_has_occurred() {
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::GREEDY };
        let mut sampler = Sampler::new(greedy, [1]);
        // 3 becomes 1.5 for token 1; after token 3 it does for that, too, and 2 is the largest.
        assert_eq!([sampler.sample(&LOGITS), sampler.sample(&LOGITS), sampler.sample(&LOGITS)], [3, 2, 1]);
        assert_eq!(Sampler::new(greedy, []).sample(&[-1.0, -1.5]), 0);
        assert_eq!(Sampler::new(greedy, [0]).sample(&[-1.0, -1.5]), 1);
    }

    #[test]
    fn a_temperature_close_to_zero_is_greedy() {
        for temperature in [1e-39, f32::MIN_POSITIVE, 1e-3] {
            let counts = counts(Sampling { temperature, seed: 5, ..Sampling::GREEDY }, 20);
            assert_eq!(counts[1] + counts[3], 20);
        }
    }

    #[test]
    fn a_seed_repeats_its_tokens() {
        let sampling = Sampling { temperature: 2.0, seed: 7, ..Sampling::GREEDY };
        let draw = |sampling| {
            let mut sampler = Sampler::new(sampling, []);
            (0..50).map(|_| sampler.sample(&LOGITS)).collect::<Vec<_>>()
        };
        assert_eq!(draw(sampling), draw(sampling));
        assert_ne!(draw(sampling), draw(Sampling { seed: 8, ..sampling }));
    }

    #[test]
    fn ranges_are_checked() {
        for bad in [
            Sampling { temperature: -0.1, ..Sampling::GREEDY },
            Sampling { temperature: f32::NAN, ..Sampling::GREEDY },
            Sampling { top_p: 0.0, ..Sampling::GREEDY },
            Sampling { top_p: 1.1, ..Sampling::GREEDY },
            Sampling { min_p: -0.1, ..Sampling::GREEDY },
            Sampling { repetition_penalty: 0.0, ..Sampling::GREEDY },
        ] {
            assert!(bad.validate().is_err());
        }
        assert!(Sampling::GREEDY.validate().is_ok());
    }
}
