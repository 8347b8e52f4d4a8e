//! What tokens that have occurred lose of their logits.

use crate::Sampling;
use std::collections::{HashMap, HashSet};

/// What a repetition takes from a logit at most, so that sums of logits stay finite.
const MOST: f32 = 1e6;

/// The tokens of a sequence as far as penalties look at them.
pub(crate) struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
    dry: Dry,
    /// Tokens of prompt and answer, where there is a repetition penalty.
    seen: HashSet<u32>,
    /// How often tokens have been generated, where that counts.
    generated: HashMap<u32, u32>,
}

struct Dry {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    /// All tokens, `None` for a breaker; empty where there is no such penalty.
    history: Vec<Option<u32>>,
    /// For each place from the end, how many tokens before it equal those at the end.
    lengths: Vec<usize>,
}

impl Penalties {
    /// Penalties of a sequence that holds `context`; `breaks` says which tokens end a repetition.
    pub(crate) fn new(sampling: &Sampling, context: &[u32], breaks: impl Fn(u32) -> bool) -> Self {
        let dry = &sampling.dry;
        let history = match dry.multiplier {
            0.0 => Vec::new(),
            _ => context.iter().map(|id| (!breaks(*id)).then_some(*id)).collect(),
        };
        Penalties {
            repetition: sampling.repetition_penalty,
            presence: sampling.presence_penalty,
            frequency: sampling.frequency_penalty,
            dry: Dry {
                multiplier: dry.multiplier,
                base: dry.base,
                allowed_length: dry.allowed_length,
                history,
                lengths: Vec::new(),
            },
            seen: if sampling.repetition_penalty == 1.0 { HashSet::new() } else { context.iter().copied().collect() },
            generated: HashMap::new(),
        }
    }

    /// Takes the penalties from the logits of all tokens.
    pub(crate) fn apply(&mut self, logits: &mut [f32]) {
        for id in &self.seen {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
            }
        }
        for (id, count) in &self.generated {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= self.presence + self.frequency * *count as f32;
            }
        }
        for (id, length) in self.dry.repetitions() {
            if let Some(logit) = logits.get_mut(id as usize) {
                let growth = self.dry.base.powf((length - self.dry.allowed_length) as f32);
                *logit -= (self.dry.multiplier * growth).min(MOST);
            }
        }
    }

    /// Takes note of a token that has been generated.
    pub(crate) fn push(&mut self, id: u32, breaks: impl Fn(u32) -> bool) {
        if self.repetition != 1.0 {
            self.seen.insert(id);
        }
        if self.presence != 0.0 || self.frequency != 0.0 {
            *self.generated.entry(id).or_default() += 1;
        }
        if self.dry.multiplier != 0.0 {
            self.dry.history.push((!breaks(id)).then_some(id));
        }
    }
}

impl Dry {
    /// Tokens that would go on with a repetition of at least the allowed length, each with the longest of its lengths.
    fn repetitions(&mut self) -> HashMap<u32, usize> {
        self.find();
        let mut longest = HashMap::new();
        for (place, &length) in self.lengths.iter().enumerate().skip(1) {
            let next = self.history[self.history.len() - place];
            if let Some(next) = next.filter(|_| length >= self.allowed_length) {
                longest.entry(next).and_modify(|most: &mut usize| *most = length.max(*most)).or_insert(length);
            }
        }
        longest
    }

    /// The Z function of the tokens read backwards.
    fn find(&mut self) {
        let count = self.history.len();
        let at = |place: usize| self.history[count - 1 - place];
        self.lengths.clear();
        self.lengths.resize(count, 0);
        let (mut start, mut end) = (0, 0);
        for place in 1..count {
            let mut length = if place < end { self.lengths[place - start].min(end - place) } else { 0 };
            while place + length < count && at(length).is_some() && at(length) == at(place + length) {
                length += 1;
            }
            if place + length > end {
                (start, end) = (place, place + length);
            }
            self.lengths[place] = length;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Dry as Parameters;
    use proptest::prelude::*;

    /// The token that breaks repetitions.
    const BREAKER: u32 = 9;

    fn dry(allowed_length: usize) -> Sampling {
        let dry = Parameters { multiplier: 2.0, base: 1.5, allowed_length, breakers: Vec::new() };
        Sampling { dry, ..Sampling::greedy() }
    }

    fn loss(sampling: &Sampling, context: &[u32], generated: &[u32]) -> Vec<f32> {
        let breaks = |id| id == BREAKER;
        let mut penalties = Penalties::new(sampling, context, breaks);
        generated.iter().for_each(|id| penalties.push(*id, breaks));
        let mut logits = vec![1.0; 10];
        penalties.apply(&mut logits);
        logits.iter().map(|logit| 1.0 - logit).collect()
    }

    #[test]
    fn presence_counts_once_and_frequency_each_time_and_neither_the_prompt() {
        let sampling = Sampling { presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::greedy() };
        assert_eq!(loss(&sampling, &[1, 1, 2], &[3, 4, 3])[..6], [0.0, 0.0, 0.0, 1.0, 0.75, 0.0]);
    }

    #[test]
    fn a_token_that_goes_on_with_a_repetition_loses_by_its_length() {
        // 1 2 3 has been followed by 4, and 2 3 alone by 5.
        let found = loss(&dry(2), &[1, 2, 3, 4, 2, 3, 5, 1, 2], &[3]);
        assert_eq!(found, [0.0, 0.0, 0.0, 0.0, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0]);
        // Over a breaker there is no repetition.
        assert_eq!(loss(&dry(2), &[1, BREAKER, 3, 4, 1, BREAKER], &[3])[4], 0.0);
        assert_eq!(loss(&dry(1), &[1, BREAKER, 3, 4, 1, BREAKER], &[3])[4], 2.0);
    }

    #[test]
    fn long_repetitions_stay_finite() {
        let found = loss(&dry(1), &[1; 5000], &[1]);
        assert_eq!(found[1], MOST);
    }

    proptest! {
        #[test]
        fn repetitions_are_those_that_a_plain_search_finds(ids in prop::collection::vec(0u32..3, 0..40), allowed in 1usize..4) {
            let ids: Vec<u32> = ids.into_iter().map(|id| if id == 2 { BREAKER } else { id }).collect();
            let mut expected: HashMap<u32, usize> = HashMap::new();
            for end in 1..ids.len() {
                // Tokens before `end` against those at the end of all.
                let equal = ids[..end].iter().rev().zip(ids.iter().rev());
                let length = equal.take_while(|(a, b)| a == b && **a != BREAKER).count();
                if length >= allowed && ids[end] != BREAKER {
                    let most = expected.entry(ids[end]).or_default();
                    *most = length.max(*most);
                }
            }
            let mut penalties = Penalties::new(&dry(allowed), &ids, |id| id == BREAKER);
            prop_assert_eq!(penalties.dry.repetitions(), expected);
        }
    }
}
