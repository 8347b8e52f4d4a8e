//! How tokens are chosen: the parameters.

use crate::EngineError;

/// How tokens are chosen: bias, penalties, temperature, top-k, top-p and min-p, in this order.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Divisor of the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Probability mass that is sampled from, in (0, 1].
    pub top_p: f32,
    /// Number of tokens that are sampled from; 0 for all.
    pub top_k: usize,
    /// Tokens less likely than this share of the most likely one are not sampled, in [0, 1].
    pub min_p: f32,
    /// Logits of tokens that have occurred, in the prompt too, are divided by it where positive and multiplied where negative; 1
    /// for none.
    pub repetition_penalty: f32,
    /// Taken from the logit of each token that has been generated, in [-2, 2]; 0 for none.
    pub presence_penalty: f32,
    /// Taken from the logit of a token for each time it has been generated, in [-2, 2]; 0 for none.
    pub frequency_penalty: f32,
    /// The penalty on tokens that would go on with a repetition.
    pub dry: Dry,
    /// What is added to the logits of some tokens, by id; each in [-100, 100].
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// The DRY penalty ("don't repeat yourself"). Where the last n tokens have occurred before, n at least `allowed_length`, the token
/// that followed them then loses `multiplier * base^(n - allowed_length)`. No repetition reaches over a breaker.
#[derive(Debug, Clone, PartialEq)]
pub struct Dry {
    /// Strength; 0 for none.
    pub multiplier: f32,
    /// Growth with each token of the repetition, at least 1.
    pub base: f32,
    /// Tokens that may repeat without penalty, at least 1.
    pub allowed_length: usize,
    /// Strings that end a repetition: tokens that hold one match none.
    pub breakers: Vec<String>,
}

impl Default for Dry {
    fn default() -> Self {
        let breakers = ["\n", ":", "\"", "*"].map(str::to_owned).to_vec();
        Dry { multiplier: 0.0, base: 1.75, allowed_length: 2, breakers }
    }
}

impl Sampling {
    /// The most likely token, always.
    pub fn greedy() -> Self {
        Sampling {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            dry: Dry::default(),
            logit_bias: Vec::new(),
            seed: 0,
        }
    }

    /// Whether the logits are changed before a token is chosen.
    pub fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.dry.multiplier != 0.0
            || !self.logit_bias.is_empty()
    }

    /// Checks the ranges, for a model of `vocab_size` ids.
    ///
    /// # Errors
    /// [`EngineError::Sampling`] and [`EngineError::Bias`].
    pub fn validate(&self, vocab_size: usize) -> Result<(), EngineError> {
        let Sampling { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } = *self;
        let Dry { multiplier, base, allowed_length, .. } = self.dry;
        let length = allowed_length as f32;
        let openai = -2.0..=2.0;
        for (name, value, good, range) in [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "between 0 (greedy) and 100"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "between 0 and 1"),
            (
                "repetition_penalty",
                repetition_penalty,
                repetition_penalty > 0.0 && repetition_penalty <= 100.0,
                "above 0 and at most 100",
            ),
            ("presence_penalty", presence_penalty, openai.contains(&presence_penalty), "between -2 and 2"),
            ("frequency_penalty", frequency_penalty, openai.contains(&frequency_penalty), "between -2 and 2"),
            ("dry_multiplier", multiplier, (0.0..=100.0).contains(&multiplier), "between 0 (none) and 100"),
            ("dry_base", base, (1.0..=100.0).contains(&base), "between 1 and 100"),
            ("dry_allowed_length", length, allowed_length >= 1, "at least 1"),
        ] {
            if !good {
                return Err(EngineError::Sampling { name, value, range });
            }
        }
        let bad = |(id, bias): &&(u32, f32)| *id as usize >= vocab_size || !(-100.0..=100.0).contains(bias);
        match self.logit_bias.iter().find(bad) {
            Some(&(id, bias)) => Err(EngineError::Bias { id, bias, vocab_size }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        let greedy = Sampling::greedy;
        for bad in [
            Sampling { temperature: -0.1, ..greedy() },
            Sampling { temperature: f32::NAN, ..greedy() },
            Sampling { top_p: 0.0, ..greedy() },
            Sampling { top_p: 1.1, ..greedy() },
            Sampling { min_p: -0.1, ..greedy() },
            Sampling { repetition_penalty: 0.0, ..greedy() },
            Sampling { presence_penalty: 2.1, ..greedy() },
            Sampling { frequency_penalty: f32::NAN, ..greedy() },
            Sampling { dry: Dry { multiplier: -1.0, ..Dry::default() }, ..greedy() },
            Sampling { dry: Dry { base: 0.5, ..Dry::default() }, ..greedy() },
            Sampling { dry: Dry { allowed_length: 0, ..Dry::default() }, ..greedy() },
            Sampling { logit_bias: vec![(5, 1.0)], ..greedy() },
            Sampling { logit_bias: vec![(1, 101.0)], ..greedy() },
        ] {
            assert!(bad.validate(5).is_err(), "{bad:?}");
        }
        assert!(greedy().validate(5).is_ok());
        assert!(Sampling { logit_bias: vec![(4, -100.0)], ..greedy() }.validate(5).is_ok());
    }
}
