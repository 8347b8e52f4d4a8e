//! Choosing the next token.

use crate::Sampling;
use crate::penalties::Penalties;
use dibit_model::argmax;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Chooses the tokens of one sequence.
pub struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
    /// Where there are any.
    penalties: Option<Penalties>,
    /// Whether a token ends a repetition.
    breaks: Box<dyn Fn(u32) -> bool + Send>,
    logits: Vec<f32>,
    /// Candidates with their logits, then their weights.
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A sampler that begins its random numbers, those of one `stream` of the seed, for a sequence that holds the tokens
    /// `context`. `breaks` says which tokens end a repetition ([`crate::Dry`]).
    pub fn new(
        sampling: Sampling,
        stream: u64,
        context: &[u32],
        breaks: impl Fn(u32) -> bool + Send + 'static,
    ) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(sampling.seed);
        random.set_stream(stream);
        let penalties = sampling.changes_logits().then(|| Penalties::new(&sampling, context, &breaks));
        Sampler { sampling, random, penalties, breaks: Box::new(breaks), logits: Vec::new(), candidates: Vec::new() }
    }

    /// Whether the most likely token is chosen, whatever came before.
    pub fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && self.penalties.is_none()
    }

    /// Chooses from the finite logits of all tokens, of which there is at least one.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let Some(mut penalties) = self.penalties.take() else { return self.choose(logits) };
        let mut changed = std::mem::take(&mut self.logits);
        changed.clear();
        changed.extend_from_slice(logits);
        for &(id, bias) in &self.sampling.logit_bias {
            if let Some(logit) = changed.get_mut(id as usize) {
                *logit += bias;
            }
        }
        penalties.apply(&mut changed);
        let id = self.choose(&changed);
        penalties.push(id, &self.breaks);
        self.penalties = Some(penalties);
        self.logits = changed;
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

    fn sampler(sampling: Sampling, stream: u64, context: &[u32]) -> Sampler {
        Sampler::new(sampling, stream, context, |_| false)
    }

    fn counts(sampling: Sampling, draws: usize) -> [usize; 5] {
        let mut sampler = sampler(sampling, 0, &[]);
        let mut counts = [0; 5];
        for _ in 0..draws {
            counts[sampler.sample(&LOGITS) as usize] += 1;
        }
        counts
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(counts(Sampling::greedy(), 3), [0, 3, 0, 0, 0]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let counts = counts(Sampling { temperature: 1.0, seed: 1, ..Sampling::greedy() }, 100_000);
        let total: f64 = LOGITS.iter().map(|x| f64::from(*x).exp()).sum();
        for (count, logit) in counts.into_iter().zip(LOGITS) {
            assert!((count as f64 / 1e5 - f64::from(logit).exp() / total).abs() < 5e-3);
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let sampling = Sampling { temperature: 1.0, seed: 1, ..Sampling::greedy() };
        let top_k = counts(Sampling { top_k: 3, ..sampling.clone() }, 2000);
        assert!(top_k[0] == 0 && top_k[4] == 0 && top_k[2] > 0);
        // The two largest hold 0.8 of the mass.
        let top_p = counts(Sampling { top_p: 0.75, ..sampling.clone() }, 2000);
        assert!(top_p[1] > 0 && top_p[3] > 0 && top_p[1] + top_p[3] == 2000);
        assert_eq!(counts(Sampling { top_k: 1, ..sampling.clone() }, 10)[1], 10);
        assert_eq!(counts(Sampling { top_k: 50, top_p: 1e-6, ..sampling.clone() }, 10)[1], 10);
    }

    #[test]
    fn min_p_is_a_share_of_the_most_likely() {
        // Relative to the largest, the weights are 0.14, 1, 0.37, 1 and 0.02.
        let sampling = Sampling { temperature: 1.0, seed: 1, ..Sampling::greedy() };
        let cut = counts(Sampling { min_p: 0.3, ..sampling.clone() }, 2000);
        assert!(cut[0] == 0 && cut[4] == 0 && cut[2] > 0);
        assert_eq!(counts(Sampling { min_p: 1.0, ..sampling.clone() }, 500)[2], 0);
    }

    #[test]
    fn a_penalty_turns_away_from_what_has_occurred() {
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        let mut one = sampler(greedy.clone(), 0, &[1]);
        // 3 becomes 1.5 for token 1; after token 3 it does for that, too, and 2 is the largest.
        assert_eq!([one.sample(&LOGITS), one.sample(&LOGITS), one.sample(&LOGITS)], [3, 2, 1]);
        assert_eq!(sampler(greedy.clone(), 0, &[]).sample(&[-1.0, -1.5]), 0);
        assert_eq!(sampler(greedy, 0, &[0]).sample(&[-1.0, -1.5]), 1);
    }

    #[test]
    fn a_temperature_close_to_zero_is_greedy() {
        for temperature in [1e-39, f32::MIN_POSITIVE, 1e-3] {
            let counts = counts(Sampling { temperature, seed: 5, ..Sampling::greedy() }, 20);
            assert_eq!(counts[1] + counts[3], 20);
        }
    }

    #[test]
    fn a_seed_repeats_its_tokens_and_its_streams_differ() {
        let sampling = Sampling { temperature: 2.0, seed: 7, ..Sampling::greedy() };
        let draw = |sampling: &Sampling, stream| {
            let mut sampler = sampler(sampling.clone(), stream, &[]);
            (0..50).map(|_| sampler.sample(&LOGITS)).collect::<Vec<_>>()
        };
        assert_eq!(draw(&sampling, 0), draw(&sampling, 0));
        assert_ne!(draw(&sampling, 0), draw(&Sampling { seed: 8, ..sampling.clone() }, 0));
        assert_ne!(draw(&sampling, 0), draw(&sampling, 1));
        assert_eq!(draw(&sampling, 3), draw(&sampling, 3));
    }

    #[test]
    fn a_bias_is_added_to_its_tokens() {
        let bias = |logit_bias| counts(Sampling { logit_bias, ..Sampling::greedy() }, 1);
        assert_eq!(bias(vec![(4, 5.0)]), [0, 0, 0, 0, 1]);
        assert_eq!(bias(vec![(1, -100.0), (3, -100.0)]), [0, 0, 1, 0, 0]);
    }
}
