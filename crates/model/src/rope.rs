//! Rotary position embedding: inverse frequencies and their scaling.

use crate::ModelError;
use serde_json::{Map, Value};
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
    /// Reads either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`, for heads of `head_dim`.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for a rope type that is not default, linear or llama3, and
    /// [`ModelError::Malformed`] for missing or non-positive numbers.
    pub(crate) fn parse(config: &Map<String, Value>, head_dim: usize, origin: &str) -> Result<Self, ModelError> {
        let object = |key: &str| config.get(key).and_then(Value::as_object);
        let parameters = object("rope_parameters").or_else(|| object("rope_scaling"));
        let malformed = |reason: String| ModelError::Malformed { path: origin.to_owned(), reason };
        let number = |key: &str| -> Result<f32, ModelError> {
            parameters
                .and_then(|p| p.get(key))
                .and_then(Value::as_f64)
                .filter(|x| *x > 0.0)
                .map(|x| x as f32)
                .ok_or_else(|| malformed(format!("rope scaling needs a positive number '{key}'")))
        };
        let theta = match parameters.and_then(|p| p.get("rope_theta")).or_else(|| config.get("rope_theta")) {
            None | Some(Value::Null) => 10_000.0,
            Some(value) => value
                .as_f64()
                .filter(|theta| *theta > 0.0)
                .ok_or_else(|| malformed(format!("rope_theta is {value}, not a positive number")))?
                as f32,
        };
        let partial =
            parameters.and_then(|p| p.get("partial_rotary_factor")).or_else(|| config.get("partial_rotary_factor"));
        if let Some(factor) = partial.and_then(Value::as_f64).filter(|factor| *factor != 1.0) {
            return Err(ModelError::Unsupported {
                what: format!("partial_rotary_factor {factor}"),
                supported: "1 (the whole head is rotated)".into(),
            });
        }
        let kind = parameters.and_then(|p| p.get("rope_type").or_else(|| p.get("type"))).and_then(Value::as_str);
        let scaling = match kind {
            None if parameters.is_some_and(|p| p.values().any(Value::is_object)) => {
                return Err(ModelError::Unsupported {
                    what: "rope_parameters by layer type".into(),
                    supported: "one set of rope parameters for all layers".into(),
                });
            }
            None | Some("default") => RopeScaling::Default,
            Some("linear") => RopeScaling::Linear { factor: number("factor")? },
            Some("llama3") => RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            },
            Some("divisors") => {
                let list = parameters.and_then(|p| p.get("divisors")).and_then(Value::as_array);
                let positive = |x: &Value| x.as_f64().map(|x| x as f32).filter(|x| *x > 0.0);
                let divisors: Option<Vec<f32>> = list.into_iter().flatten().map(positive).collect();
                let divisors = divisors.filter(|divisors| divisors.len() == head_dim / 2);
                let missing = || malformed(format!("rope scaling needs {} positive divisors", head_dim / 2));
                RopeScaling::Divisors(divisors.ok_or_else(missing)?.into())
            }
            Some(other) => {
                return Err(ModelError::Unsupported {
                    what: format!("rope type '{other}'"),
                    supported: "default, linear, llama3".into(),
                });
            }
        };
        Ok(Rope { theta, scaling })
    }

    /// `head_dim / 2` inverse frequencies, in radians per token.
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                let frequency = 1.0 / self.theta.powf((2 * i) as f32 / head_dim as f32);
                self.scaling.apply(i, frequency)
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(&self, index: usize, frequency: f32) -> f32 {
        match *self {
            RopeScaling::Default => frequency,
            RopeScaling::Linear { factor } => frequency / factor,
            RopeScaling::Divisors(ref divisors) => frequency / divisors[index],
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

    fn parse(text: &str) -> Result<Rope, ModelError> {
        Rope::parse(serde_json::from_str::<Value>(text).unwrap().as_object().unwrap(), 4, "config.json")
    }

    #[test]
    fn both_spellings_mean_the_same() {
        let llama3 =
            r#""factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192"#;
        let old =
            parse(&format!(r#"{{"rope_theta":500000.0,"rope_scaling":{{"rope_type":"llama3",{llama3}}}}}"#)).unwrap();
        let new = parse(&format!(r#"{{"rope_parameters":{{"rope_theta":500000.0,"rope_type":"llama3",{llama3}}}}}"#))
            .unwrap();
        assert_eq!(old, new);
        let linear = parse(r#"{"rope_scaling":{"type":"linear","factor":2.0}}"#).unwrap();
        assert_eq!(linear, Rope { theta: 10_000.0, scaling: RopeScaling::Linear { factor: 2.0 } });
        let divisors = parse(r#"{"rope_scaling":{"type":"divisors","divisors":[1.0, 8.0]}}"#).unwrap();
        assert_eq!(divisors.inv_freq(4), [1.0, 0.01 / 8.0]);
        assert_eq!(parse(r#"{"rope_scaling":null}"#).unwrap().scaling, RopeScaling::Default);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, expected) in [
            (
                r#"{"rope_scaling":{"rope_type":"yarn","factor":4.0}}"#,
                "rope type 'yarn' is not supported; supported: default, linear, llama3",
            ),
            (r#"{"partial_rotary_factor":0.5}"#, "partial_rotary_factor 0.5"),
            (r#"{"rope_parameters":{"full_attention":{"rope_type":"default"}}}"#, "by layer type"),
            (r#"{"rope_scaling":{"type":"linear"}}"#, "positive number 'factor'"),
            (r#"{"rope_scaling":{"type":"divisors","divisors":[1.0, 0.0]}}"#, "needs 2 positive divisors"),
            (r#"{"rope_theta":-1}"#, "rope_theta is -1"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

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
}
