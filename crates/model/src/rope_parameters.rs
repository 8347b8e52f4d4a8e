//! Rope settings of a configuration.

use crate::json::shown;
use crate::{Architecture, ModelError, Rope, RopeScaling};
use serde_json::{Map, Value};
use std::sync::Arc;

/// Keys of rope parameters that are read whatever the type, or that say nothing of their own.
const COMMON_KEYS: [&str; 6] =
    ["rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned"];

const SUPPORTED: &str = "default, linear, llama3, dynamic, yarn, longrope";

const ORIGINAL: &str = "original_max_position_embeddings";

const YARN_KEYS: [&str; 7] =
    ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"];

/// One set of rope parameters, with the rest of the configuration.
struct Parameters<'a> {
    config: &'a Map<String, Value>,
    set: Option<&'a Map<String, Value>>,
    architecture: Architecture,
    head_dim: usize,
    max_position_embeddings: usize,
    origin: &'a str,
}

impl Rope {
    /// Reads either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`, for heads of `head_dim`, and yields how
    /// many of their channels turn, too. Null is as absent. As in transformers 5, `rope_scaling` replaces `rope_parameters` where a configuration has both.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for rope types that are not read, and [`ModelError::Malformed`] for missing or
    /// senseless numbers, a factor without a type, and two sets of parameters that contradict each other.
    pub(crate) fn parse(
        config: &Map<String, Value>,
        architecture: Architecture,
        head_dim: usize,
        max_position_embeddings: usize,
        origin: &str,
    ) -> Result<(Self, usize), ModelError> {
        let parameters = |set| Parameters { config, set, architecture, head_dim, max_position_embeddings, origin };
        let set = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(set)) => Ok(Some(set).filter(|set| !set.values().all(Value::is_null))),
            Some(other) => Err(parameters(None).malformed(format!("{key} is {}, not an object", shown(other)))),
        };
        let (scaling, newer) = (set("rope_scaling")?, set("rope_parameters")?);
        let rope = parameters(scaling.or(newer)).read()?;
        if scaling.is_some() && newer.is_some() {
            let other = parameters(newer).read()?;
            let is_silent = other.scaling == RopeScaling::Default && other.theta == rope.theta;
            if !is_silent && other != rope {
                return Err(parameters(None).malformed(
                    "rope_scaling and rope_parameters contradict each other; put all of it, rope_theta included, into \
                     rope_parameters and take rope_scaling out"
                        .into(),
                ));
            }
        }
        Ok((rope, parameters(scaling.or(newer)).rotary()?))
    }
}

impl Parameters<'_> {
    fn malformed(&self, reason: String) -> ModelError {
        ModelError::Malformed { path: self.origin.to_owned(), reason }
    }

    /// A value of the set that is not null.
    fn own(&self, key: &str) -> Option<&Value> {
        self.set.and_then(|set| set.get(key)).filter(|value| !value.is_null())
    }

    /// A value of the set, or else one beside it.
    fn own_or_beside(&self, key: &str) -> Option<&Value> {
        self.own(key).or_else(|| self.config.get(key).filter(|value| !value.is_null()))
    }

    fn positive(&self, key: &str, value: &Value) -> Result<f32, ModelError> {
        let number = value.as_f64().map(|x| x as f32).filter(|x| *x > 0.0 && x.is_normal());
        number.ok_or_else(|| self.malformed(format!("{key} is {}, not a positive number", shown(value))))
    }

    fn number(&self, key: &str) -> Result<f32, ModelError> {
        let missing = || self.malformed(format!("rope scaling needs a positive number '{key}'"));
        self.positive(key, self.own(key).ok_or_else(missing)?)
    }

    fn read(&self) -> Result<Rope, ModelError> {
        let theta =
            self.own_or_beside("rope_theta").map_or(Ok(10_000.0), |theta| self.positive("rope_theta", theta))?;
        let part = self.own_or_beside("partial_rotary_factor").filter(|x| x.as_f64() != Some(1.0));
        if let Some(factor) = part.filter(|_| !self.architecture.may_turn_in_part()) {
            return Err(ModelError::Unsupported {
                what: format!("partial_rotary_factor {}", shown(factor)),
                supported: format!("1 (the whole head is rotated) in a {}", self.architecture.name()),
            });
        }
        if self.set.is_some_and(|set| set.values().any(Value::is_object)) {
            return Err(ModelError::Unsupported {
                what: "rope_parameters by layer type".into(),
                supported: "one set of rope parameters for all layers".into(),
            });
        }
        let kind = self.kind()?;
        let (scaling, keys): (_, &[&str]) = match kind {
            None | Some("default") => (RopeScaling::Default, &[]),
            // Its factor depends on the context, and is 1 up to max_position_embeddings, where dibit's contexts end.
            Some("dynamic") => (RopeScaling::Default, &["factor"]),
            Some("linear") => (RopeScaling::Linear { factor: self.number("factor")? }, &["factor"]),
            Some("yarn") => (self.yarn()?, &YARN_KEYS),
            // The first files of Phi-3 call it su.
            Some(own) if own == "longrope" || (own == "su" && self.architecture == Architecture::Phi3) => {
                (self.long_rope()?, &["factor", "attention_factor", "short_factor", "long_factor"])
            }
            Some("llama3") => (self.llama3()?, &["factor", "low_freq_factor", "high_freq_factor"]),
            Some("divisors") => (self.divisors()?, &["divisors"]),
            Some(other) => {
                return Err(ModelError::Unsupported {
                    what: format!("rope type '{other}'"),
                    supported: SUPPORTED.into(),
                });
            }
        };
        self.check_keys(kind, keys)?;
        let rope = Rope { theta, scaling };
        let factor = rope.attention_factor();
        if !(factor.is_finite() && factor > 0.0) {
            return Err(self.malformed(format!("rope scaling multiplies heads by {factor}; its numbers make no sense")));
        }
        if !rope.inv_freq(self.rotary()?).iter().all(|frequency| frequency.is_finite()) {
            return Err(self.malformed(format!("rope_theta {theta} and its scaling give no finite frequencies")));
        }
        Ok(rope)
    }

    /// The type, under its newer or its older name.
    fn kind(&self) -> Result<Option<&str>, ModelError> {
        let name = |key: &str| match self.own(key) {
            None => Ok(None),
            Some(Value::String(name)) => Ok(Some(name.as_str())),
            Some(other) => Err(self.malformed(format!("{key} of rope scaling is {}, not a name", shown(other)))),
        };
        match (name("rope_type")?, name("type")?) {
            (Some(newer), Some(older)) if newer != older => Err(self.malformed(format!(
                "rope scaling has rope_type '{newer}' beside type '{older}'; keep the one that is right"
            ))),
            (newer, older) => Ok(newer.or(older)),
        }
    }

    fn llama3(&self) -> Result<RopeScaling, ModelError> {
        let (low_freq_factor, high_freq_factor) = (self.number("low_freq_factor")?, self.number("high_freq_factor")?);
        if high_freq_factor <= low_freq_factor {
            return Err(self.malformed(format!(
                "high_freq_factor {high_freq_factor} of rope scaling is not above low_freq_factor {low_freq_factor}"
            )));
        }
        // Where transformers 5 takes it from.
        let beside = self.config.get(ORIGINAL).filter(|value| !value.is_null());
        let original = beside.or_else(|| self.own(ORIGINAL));
        Ok(RopeScaling::Llama3 {
            factor: self.number("factor")?,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original
                .map_or(Ok(self.max_position_embeddings as f32), |value| self.positive(ORIGINAL, value))?,
        })
    }

    /// The context that a model was trained with first, and by what scaling extends it.
    fn original_and_factor(&self) -> Result<(f32, f32), ModelError> {
        let original = self.own_or_beside(ORIGINAL);
        let original = original.map_or(Ok(self.max_position_embeddings as f32), |own| self.positive(ORIGINAL, own))?;
        let factor = match self.own("factor") {
            None => self.max_position_embeddings as f32 / original,
            Some(_) => self.number("factor")?,
        };
        Ok((original, factor))
    }

    fn yarn(&self) -> Result<RopeScaling, ModelError> {
        let or = |key: &str, silent: f32| self.own(key).map_or(Ok(silent), |value| self.positive(key, value));
        let (original, factor) = self.original_and_factor()?;
        let beta = [or("beta_fast", 32.0)?, or("beta_slow", 1.0)?];
        if beta[0] <= beta[1] {
            return Err(
                self.malformed(format!("beta_fast {} of rope scaling is not above beta_slow {}", beta[0], beta[1]))
            );
        }
        let growth = |mscale: f32| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let attention_factor = match (self.own("attention_factor"), self.own("mscale"), self.own("mscale_all_dim")) {
            (Some(value), ..) => self.positive("attention_factor", value)?,
            (None, Some(own), Some(all)) => {
                growth(self.positive("mscale", own)?) / growth(self.positive("mscale_all_dim", all)?)
            }
            (None, ..) => growth(1.0),
        };
        let truncate = match self.own("truncate") {
            None => true,
            Some(Value::Bool(own)) => *own,
            Some(other) => return Err(self.malformed(format!("truncate is {}, not true or false", shown(other)))),
        };
        let original_max_position_embeddings = original;
        Ok(RopeScaling::Yarn { factor, original_max_position_embeddings, beta, truncate, attention_factor })
    }

    fn long_rope(&self) -> Result<RopeScaling, ModelError> {
        let (original, factor) = self.original_and_factor()?;
        let attention_factor = match self.own("attention_factor") {
            Some(value) => self.positive("attention_factor", value)?,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short: self.positives("short_factor")?,
            long: self.positives("long_factor")?,
            original_max_position_embeddings: original,
            attention_factor,
            is_long: self.max_position_embeddings as f32 > original,
        })
    }

    /// Channels of a head that turn.
    fn rotary(&self) -> Result<usize, ModelError> {
        let Some(value) = self.own_or_beside("partial_rotary_factor") else { return Ok(self.head_dim) };
        let factor = value.as_f64().filter(|own| *own > 0.0 && *own <= 1.0);
        let rotary = factor.map(|own| (self.head_dim as f64 * own) as usize);
        rotary.filter(|own| *own > 0 && own.is_multiple_of(2)).ok_or_else(|| {
            self.malformed(format!(
                "partial_rotary_factor is {}, which leaves no even number of {} channels",
                shown(value),
                self.head_dim
            ))
        })
    }

    fn divisors(&self) -> Result<RopeScaling, ModelError> {
        Ok(RopeScaling::Divisors(self.positives("divisors")?))
    }

    /// A positive number for each pair of channels that turns.
    fn positives(&self, key: &str) -> Result<Arc<[f32]>, ModelError> {
        let list = self.own(key).and_then(Value::as_array);
        let positive = |x: &Value| x.as_f64().map(|x| x as f32).filter(|x| *x > 0.0);
        let numbers: Option<Vec<f32>> = list.into_iter().flatten().map(positive).collect();
        let pairs = self.rotary()? / 2;
        let missing = || self.malformed(format!("rope scaling needs {pairs} positive numbers {key}"));
        Ok(numbers.filter(|numbers| numbers.len() == pairs).ok_or_else(missing)?.into())
    }

    /// No key of the set goes unread without a word; without a type, one that scales is an error.
    fn check_keys(&self, kind: Option<&str>, read: &[&str]) -> Result<(), ModelError> {
        let says_nothing = |key: &str, value: &Value| {
            value.is_null() || COMMON_KEYS.contains(&key) || read.contains(&key) || key == "factor" && *value == 1.0
        };
        let unread: Vec<&str> = (self.set.into_iter().flatten())
            .filter(|(key, value)| !says_nothing(key, value))
            .map(|(key, _)| key.as_str())
            .collect();
        if unread.is_empty() {
            return Ok(());
        }
        let names = unread.join(", ");
        let Some(kind) = kind else {
            return Err(self.malformed(format!(
                "rope scaling has {names} and no rope_type; add the rope_type (one of {SUPPORTED}), or take {names} out"
            )));
        };
        tracing::warn!("{}: rope type '{kind}' does not read {names}", self.origin);
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Of heads of 4 channels, and a context of 512.
    pub(crate) fn parse_for(architecture: Architecture, text: &str) -> Result<(Rope, usize), ModelError> {
        let config: Value = serde_json::from_str(text).unwrap();
        Rope::parse(config.as_object().unwrap(), architecture, 4, 512, "config.json")
    }

    pub(crate) fn parse(text: &str) -> Result<Rope, ModelError> {
        parse_for(Architecture::Llama, text).map(|(rope, _)| rope)
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
    fn spellings_are_read_as_transformers_5_reads_them() {
        let linear = |theta, factor| Rope { theta, scaling: RopeScaling::Linear { factor } };
        let plain = |theta| Rope { theta, scaling: RopeScaling::Default };
        for (text, expected) in [
            // rope_scaling replaces rope_parameters, with the theta beside both.
            (
                r#"{"rope_theta":7,"rope_scaling":{"type":"linear","factor":2},
                    "rope_parameters":{"rope_type":"default","rope_theta":7.0}}"#,
                linear(7.0, 2.0),
            ),
            (r#"{"rope_scaling":{},"rope_parameters":{"rope_type":"linear","factor":3}}"#, linear(10_000.0, 3.0)),
            (r#"{"rope_scaling":null,"rope_parameters":{"type":"linear","factor":3}}"#, linear(10_000.0, 3.0)),
            (
                r#"{"rope_scaling":{"type":"linear","factor":2},"rope_parameters":{"rope_type":"linear","factor":2.0}}"#,
                linear(10_000.0, 2.0),
            ),
            // A theta within has precedence, and null is as absent.
            (r#"{"rope_theta":7,"rope_scaling":{"rope_theta":9,"type":"linear","factor":2}}"#, linear(9.0, 2.0)),
            (r#"{"rope_theta":7,"rope_parameters":{"rope_theta":null,"rope_type":"default"}}"#, plain(7.0)),
            (r#"{"rope_theta":null,"rope_parameters":null}"#, plain(10_000.0)),
            (r#"{"rope_scaling":{"rope_type":null,"type":"linear","factor":2}}"#, linear(10_000.0, 2.0)),
            (r#"{"rope_scaling":{"rope_type":"linear","type":"linear","factor":2}}"#, linear(10_000.0, 2.0)),
            (r#"{"rope_scaling":{"factor":1.0}}"#, plain(10_000.0)),
            (r#"{"rope_scaling":{"type":"default","factor":4}}"#, plain(10_000.0)),
            (r#"{"rope_scaling":{"type":"dynamic","factor":4}}"#, plain(10_000.0)),
            (r#"{"rope_parameters":{"partial_rotary_factor":1},"partial_rotary_factor":0.5}"#, plain(10_000.0)),
        ] {
            assert_eq!(parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn the_original_context_of_llama3_is_found_beside_within_or_implied() {
        let original = |within: &str, beside: &str| {
            let factors = r#""rope_type":"llama3","factor":8,"low_freq_factor":1,"high_freq_factor":4"#;
            match parse(&format!(r#"{{"rope_scaling":{{{factors}{within}}}{beside}}}"#)).unwrap().scaling {
                RopeScaling::Llama3 { original_max_position_embeddings, .. } => original_max_position_embeddings,
                other => panic!("{other:?}"),
            }
        };
        let (within, beside) =
            (r#","original_max_position_embeddings":64"#, r#","original_max_position_embeddings":128"#);
        assert_eq!((original(within, ""), original("", beside), original(within, beside)), (64.0, 128.0, 128.0));
        assert_eq!(original("", ""), 512.0);
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, expected) in [
            (
                r#"{"rope_scaling":{"rope_type":"proportional","factor":4.0}}"#,
                "rope type 'proportional' is not supported; supported: default, linear, llama3",
            ),
            (r#"{"rope_scaling":{"type":"yarn","factor":4,"beta_fast":1}}"#, "beta_fast 1 of rope scaling"),
            (r#"{"rope_scaling":{"type":"yarn","factor":4,"truncate":"no"}}"#, "truncate is \"no\", not true"),
            (r#"{"rope_scaling":{"type":"yarn","factor":4,"attention_factor":0}}"#, "attention_factor is 0"),
            (r#"{"partial_rotary_factor":0.5}"#, "partial_rotary_factor 0.5"),
            (r#"{"rope_parameters":{"full_attention":{"rope_type":"default"}}}"#, "by layer type"),
            (r#"{"rope_scaling":{"type":"linear"}}"#, "positive number 'factor'"),
            (r#"{"rope_scaling":{"type":"divisors","divisors":[1.0, 0.0]}}"#, "needs 2 positive numbers divisors"),
            (r#"{"rope_theta":-1}"#, "rope_theta is -1"),
            (r#"{"rope_theta":1e300}"#, "rope_theta is 1e+300"),
            (r#"{"rope_scaling":{"factor":2.0}}"#, "has factor and no rope_type"),
            (r#"{"rope_scaling":{"type":null,"factor":2.0}}"#, "add the rope_type"),
            (
                r#"{"rope_scaling":{"type":"dynamic","rope_type":"linear","factor":2}}"#,
                "'linear' beside type 'dynamic'",
            ),
            (r#"{"rope_scaling":{"type":"linear","factor":"2"}}"#, "factor is \"2\", not a positive number"),
            (r#"{"rope_scaling":{"type":"linear","factor":-2}}"#, "factor is -2"),
            (r#"{"rope_scaling":{"type":1,"factor":2}}"#, "type of rope scaling is 1"),
            (r#"{"rope_scaling":"linear"}"#, "rope_scaling is \"linear\", not an object"),
            (r#"{"rope_parameters":[1]}"#, "rope_parameters is [1]"),
            (r#"{"partial_rotary_factor":"half"}"#, "partial_rotary_factor \"half\""),
            (
                r#"{"rope_scaling":{"type":"llama3","factor":8,"low_freq_factor":4,"high_freq_factor":4}}"#,
                "high_freq_factor 4",
            ),
            // transformers 5 runs this one with a theta of 10000.
            (
                r#"{"rope_scaling":{"type":"linear","factor":2},"rope_parameters":{"rope_type":"default","rope_theta":7}}"#,
                "contradict each other",
            ),
            (
                r#"{"rope_scaling":{"type":"linear","factor":2},"rope_parameters":{"rope_type":"linear","factor":4}}"#,
                "contradict each other",
            ),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
