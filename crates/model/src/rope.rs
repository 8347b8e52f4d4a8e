//! Rotary position embedding: inverse frequencies and their scaling.

use std::ops::Range;
use std::sync::Arc;

/// How the frequencies are stretched for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    Default,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth passage between.
    Llama3 {
        /// The divisor.
        factor: f32,
        /// Wavelengths above `original / low_freq_factor` are divided whole.
        low_freq_factor: f32,
        /// Wavelengths below `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length of pre-training, in tokens.
        original_max_position_embeddings: f32,
    },
    /// YaRN (arXiv 2309.00071): low frequencies divided, high ones kept, a ramp over the pairs between, and heads that grow.
    Yarn {
        /// The divisor.
        factor: f32,
        /// Context length of pre-training, in tokens.
        original_max_position_embeddings: f32,
        /// Turns in that context from which a pair is kept, and up to which it is divided.
        beta: [f32; 2],
        /// Whether the ramp begins and ends at whole pairs.
        truncate: bool,
        /// What queries and keys are multiplied by.
        attention_factor: f32,
    },
    /// LongRoPE (arXiv 2402.13753): each divided by a number of its own, others for long contexts, and heads that grow.
    LongRope {
        /// Divisors for contexts up to that of pre-training.
        short: Arc<[f32]>,
        /// Those for longer ones.
        long: Arc<[f32]>,
        /// Context length of pre-training, in tokens.
        original_max_position_embeddings: f32,
        /// What queries and keys are multiplied by.
        attention_factor: f32,
        /// Whether contexts are long.
        is_long: bool,
    },
    /// Each divided by a number of its own, as GGUF files store Llama 3.1's scaling.
    Divisors(Arc<[f32]>),
}

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Their scaling.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Chooses the frequencies for contexts of so many tokens.
    pub(crate) fn set_context(&mut self, tokens: usize) {
        if let RopeScaling::LongRope { original_max_position_embeddings, is_long, .. } = &mut self.scaling {
            *is_long = tokens as f32 > *original_max_position_embeddings;
        }
    }

    /// `head_dim / 2` inverse frequencies, in radians per token.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let ramp = self.ramp(head_dim);
        (0..head_dim / 2)
            .map(|i| {
                let frequency = 1.0 / self.theta.powf((2 * i) as f32 / head_dim as f32);
                self.scaling.apply(i, frequency, &ramp)
            })
            .collect()
    }

    /// What queries and keys are multiplied by when they are turned.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::LongRope { attention_factor, .. } => {
                attention_factor
            }
            _ => 1.0,
        }
    }

    /// The pairs between which YaRN goes from frequencies that are kept to those that are divided.
    fn ramp(&self, head_dim: usize) -> Range<f32> {
        let RopeScaling::Yarn { original_max_position_embeddings: original, beta, truncate, .. } = self.scaling else {
            return 0.0..0.0;
        };
        // The pair that turns so often in the original context.
        let pair = |turns: f32| {
            let turned = f64::from(original) / (f64::from(turns) * 2.0 * std::f64::consts::PI);
            head_dim as f64 * turned.ln() / (2.0 * f64::from(self.theta).ln())
        };
        let [low, high] = match truncate {
            true => [pair(beta[0]).floor(), pair(beta[1]).ceil()],
            false => beta.map(pair),
        };
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        // A ramp of no width would be none.
        let high = if low == high { high + 0.001 } else { high };
        low as f32..high as f32
    }
}

impl RopeScaling {
    /// The frequency of a pair that has this one unscaled.
    fn apply(&self, index: usize, frequency: f32, ramp: &Range<f32>) -> f32 {
        match *self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Divisors(ref divisors) => frequency / divisors[index],
            RopeScaling::LongRope { ref short, ref long, is_long, .. } => {
                frequency / if is_long { long } else { short }[index]
            }
            RopeScaling::Yarn { factor, .. } => {
                let divided = ((index as f32 - ramp.start) / (ramp.end - ramp.start)).clamp(0.0, 1.0);
                frequency / factor * divided + frequency * (1.0 - divided)
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let wavelength = 2.0 * std::f32::consts::PI / frequency;
                if wavelength < original_max_position_embeddings / high_freq_factor {
                    return frequency;
                }
                if wavelength > original_max_position_embeddings / low_freq_factor {
                    return frequency / factor;
                }
                let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                    / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * frequency / factor + smooth * frequency
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Architecture;
    use crate::rope_parameters::tests::{parse, parse_for};

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        };
        let plain = Rope { theta: 500_000.0, scaling: RopeScaling::Default }.inv_freq(128);
        let scaled = Rope { theta: 500_000.0, scaling }.inv_freq(128);
        assert_eq!((plain.len(), scaled[0]), (64, plain[0]));
        assert_eq!(scaled[63], plain[63] / 8.0);
        assert!(plain.iter().zip(&scaled).all(|(p, s)| s <= p && *s >= p / 8.0));
        assert!(plain.iter().zip(&scaled).any(|(p, s)| s < p && *s > p / 8.0));
    }

    #[test]
    fn longrope_has_frequencies_for_short_and_long_contexts() {
        let of = |more: &str| {
            let text = format!(
                r#"{{"partial_rotary_factor":0.5,"rope_scaling":{{"type":"su","short_factor":[2],"long_factor":[4]{more}}}}}"#
            );
            parse_for(Architecture::Phi3, &text)
        };
        let (mut rope, rotary) = of(r#","original_max_position_embeddings":256"#).unwrap();
        assert_eq!((rotary, rope.inv_freq(rotary)), (2, vec![0.25]));
        // sqrt(1 + ln 2 / ln 256)
        assert!((rope.attention_factor() - 1.125f32.sqrt()).abs() < 1e-6);
        rope.set_context(256);
        assert_eq!(rope.inv_freq(rotary), [0.5]);
        rope.set_context(257);
        assert_eq!(rope.inv_freq(rotary), [0.25]);
        assert_eq!(of("").unwrap().0.attention_factor(), 1.0);
        let message = of(r#","factor":0"#).unwrap_err().to_string();
        assert!(message.contains("factor is 0"), "{message}");
        let text = r#"{"rope_scaling":{"type":"longrope","short_factor":[2],"long_factor":[1,1]}}"#;
        let message = parse(text).unwrap_err().to_string();
        assert!(message.contains("needs 2 positive numbers short_factor"), "{message}");
    }

    #[test]
    fn yarn_keeps_high_and_divides_low_frequencies_and_scales_heads() {
        let yarn = |more: &str| {
            let text = format!(
                r#"{{"rope_scaling":{{"type":"yarn","factor":4,"original_max_position_embeddings":128{more}}}}}"#
            );
            parse(&text).unwrap()
        };
        let plain = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
        assert_eq!(plain.attention_factor(), 1.0);
        let (own, whole) = (yarn(""), plain.inv_freq(64));
        let scaled = own.inv_freq(64);
        // 0.1 ln 4 + 1, as the paper has it.
        assert!((own.attention_factor() - 1.138_629_4).abs() < 1e-6);
        assert_eq!((scaled[0], scaled[31]), (whole[0], whole[31] / 4.0));
        assert!(whole.iter().zip(&scaled).all(|(p, s)| s <= p && *s >= p / 4.0));
        assert!(whole.iter().zip(&scaled).any(|(p, s)| s < p && *s > p / 4.0));
        assert_ne!(yarn(r#","truncate":false"#).inv_freq(64), scaled);
        assert_eq!(yarn(r#","attention_factor":1.5"#).attention_factor(), 1.5);
        assert_eq!(yarn(r#","mscale":2,"mscale_all_dim":2"#).attention_factor(), 1.0);
    }
}
