//! Choosing the next token.

use crate::EngineError;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// How tokens are chosen: temperature first, then top-k, then top-p, as Hugging Face does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Probability mass that is sampled from, in (0, 1].
    pub top_p: f32,
    /// Number of tokens that are sampled from; 0 for all.
    pub top_k: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Sampling {
    /// The most likely token, always.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };

    /// Checks the ranges.
    ///
    /// # Errors
    /// [`EngineError::Sampling`].
    pub fn validate(&self) -> Result<(), EngineError> {
        if !(0.0..=100.0).contains(&self.temperature) {
            let (name, value) = ("temperature", self.temperature);
            return Err(EngineError::Sampling { name, value, range: "between 0 (greedy) and 100" });
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(EngineError::Sampling { name: "top_p", value: self.top_p, range: "above 0 and at most 1" });
        }
        Ok(())
    }
}

/// Chooses the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Candidates with their logits, then their weights.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler that begins its random numbers.
    pub fn new(sampling: Sampling) -> Self {
        Sampler { sampling, random: ChaCha8Rng::seed_from_u64(sampling.seed), candidates: Vec::new() }
    }

    /// Chooses from the logits of all tokens.
    ///
    /// # Panics
    /// If there are no logits.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature == 0.0 {
            return most_likely(logits);
        }
        let all = &mut self.candidates;
        all.clear();
        all.extend(logits.iter().zip(0u32..).map(|(&logit, id)| (logit / self.sampling.temperature, id)));
        let descending = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if (1..all.len()).contains(&self.sampling.top_k) {
            all.select_nth_unstable_by(self.sampling.top_k - 1, descending);
            all.truncate(self.sampling.top_k);
        }
        let largest = all.iter().map(|c| c.0).fold(f32::NEG_INFINITY, f32::max);
        for candidate in all.iter_mut() {
            candidate.0 = (candidate.0 - largest).exp();
        }
        if self.sampling.top_p < 1.0 {
            all.sort_unstable_by(descending);
            let total: f32 = all.iter().map(|c| c.0).sum();
            let mut mass = 0.0;
            let enough = all.iter().position(|c| {
                mass += c.0;
                mass >= self.sampling.top_p * total
            });
            all.truncate(enough.map_or(all.len(), |last| last + 1));
        }
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
        all.last().expect("there is a token").1
    }
}

/// The largest logit's token, the first of equals.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 3.0, -1.0];

    fn counts(sampling: Sampling, draws: usize) -> [usize; 5] {
        let mut sampler = Sampler::new(sampling);
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
    fn a_seed_repeats_its_tokens() {
        let sampling = Sampling { temperature: 2.0, seed: 7, ..Sampling::GREEDY };
        let draw = |sampling| {
            let mut sampler = Sampler::new(sampling);
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
        ] {
            assert!(bad.validate().is_err());
        }
        assert!(Sampling::GREEDY.validate().is_ok());
    }
}
