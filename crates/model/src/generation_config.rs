//! `generation_config.json`: how the model's makers sample from it.

use crate::json::{ids, shown, whole};
use crate::{ModelError, impostor};
use serde_json::{Map, Value};

/// The field of a problem with the file as a whole.
const WHOLE_FILE: &str = "";

/// Sampling defaults of a model. What is `None` is not said.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// True asks for sampling; without it, decoding is greedy.
    pub do_sample: Option<bool>,
    /// Divisor of the logits; 0 is greedy.
    pub temperature: Option<f32>,
    /// Probability mass that is sampled from.
    pub top_p: Option<f32>,
    /// Number of tokens that are sampled from; 0 is all.
    pub top_k: Option<usize>,
    /// Share of the most likely token below which tokens are not sampled.
    pub min_p: Option<f32>,
    /// Penalty on tokens that have occurred.
    pub repetition_penalty: Option<f32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// What cannot be understood. It matters only to who samples: see [`GenerationConfig::check`].
    pub problems: Vec<GenerationProblem>,
    /// Names the file in errors.
    origin: String,
    /// Fields that ask for what dibit does not do, with their values.
    unread: Vec<String>,
}

/// A field of a `generation_config.json` that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GenerationProblem {
    /// Its name; empty for the file as a whole.
    pub field: &'static str,
    /// What is wrong, and what to do.
    pub message: String,
}

/// Fields that change what is generated and are not followed, and the numbers at which they change nothing.
const UNREAD: [(&str, &[f64]); 16] = [
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beams", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("sequence_bias", &[]),
    ("suppress_tokens", &[]),
    ("top_h", &[]),
    ("typical_p", &[1.0]),
];

/// The fields of a file that are being read.
struct Reader {
    object: Map<String, Value>,
    problems: Vec<GenerationProblem>,
}

impl Reader {
    /// A field, read by `read`. Null is as absent; what cannot be read is a problem, and as absent too.
    fn field<T>(&mut self, field: &'static str, wanted: &str, read: impl FnOnce(&Value) -> Option<T>) -> Option<T> {
        let value = self.object.get(field).filter(|value| !value.is_null())?;
        let found = read(value);
        if found.is_none() {
            // No option says which tokens end a text.
            let advice = if field == "eos_token_id" { "correct it there" } else { "correct it or give your own" };
            let message = format!("{field} is {}, not {wanted}; {advice}", shown(value));
            self.problems.push(GenerationProblem { field, message });
        }
        found
    }

    fn number(&mut self, field: &'static str, wanted: &str, fits: impl Fn(f32) -> bool) -> Option<f32> {
        self.field(field, wanted, |value| value.as_f64().map(|x| x as f32).filter(|x| fits(*x)))
    }
}

impl GenerationConfig {
    /// Reads the text of a `generation_config.json`; `origin` names it in errors. What cannot be understood becomes one of
    /// [`GenerationConfig::problems`].
    pub fn parse(text: &str, origin: &str) -> Self {
        let object = match impostor::find(origin, text.as_bytes()) {
            Some(error) => Err(error.to_string()),
            None => serde_json::from_str::<Map<String, Value>>(text)
                .map_err(|error| format!("{origin} is malformed: {error}; correct or delete it")),
        };
        let (object, problems) = match object {
            Ok(object) => (object, Vec::new()),
            Err(message) => (Map::new(), vec![GenerationProblem { field: WHOLE_FILE, message }]),
        };
        let mut reader = Reader { object, problems };
        GenerationConfig {
            do_sample: reader.field("do_sample", "true or false", Value::as_bool),
            temperature: reader
                .number("temperature", "a number from 0 (greedy) to 100", |x| (0.0..=100.0).contains(&x)),
            // Of no mass, the most likely token is left.
            top_p: reader
                .number("top_p", "a number from 0 to 1", |x| (0.0..=1.0).contains(&x))
                .map(|x| x.max(f32::MIN_POSITIVE)),
            top_k: reader.field("top_k", "a whole number, where 0 and -1 are off", |value| {
                whole(value).filter(|x| *x >= -1).map(|x| x.max(0)).and_then(|x| x.try_into().ok())
            }),
            min_p: reader.number("min_p", "a number from 0 (off) to 1", |x| (0.0..=1.0).contains(&x)),
            repetition_penalty: reader
                .number("repetition_penalty", "a number above 0, where 1 is off", |x| x > 0.0 && x.is_normal()),
            eos_token_ids: reader.field("eos_token_id", "a token id or a list of them", ids).unwrap_or_default(),
            unread: unread(&reader.object),
            problems: reader.problems,
            origin: origin.to_owned(),
        }
    }

    /// Whether all that a generation needs is understood: to be called before one. `overridden` are the fields that the
    /// user says something else for, and that therefore may be wrong. Warns of fields that are not followed.
    ///
    /// # Errors
    /// [`ModelError::Generation`] with the first problem that is not overridden.
    pub fn check(&self, overridden: &[&str]) -> Result<(), ModelError> {
        if let Some(problem) = self.problems.iter().find(|problem| !overridden.contains(&problem.field)) {
            let origin = if problem.field == WHOLE_FILE { String::new() } else { format!("{}: ", self.origin) };
            return Err(ModelError::Generation(format!("{origin}{}", problem.message)));
        }
        if !self.unread.is_empty() {
            tracing::warn!("{}: not followed: {}", self.origin, self.unread.join(", "));
        }
        Ok(())
    }
}

/// The fields that ask for what dibit does not do.
fn unread(object: &Map<String, Value>) -> Vec<String> {
    let neutral = |value: &Value, numbers: &[f64]| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(values) => values.is_empty(),
        value => value.as_f64().is_some_and(|value| numbers.contains(&value)),
    };
    UNREAD
        .iter()
        .filter_map(|(field, numbers)| Some((field, object.get(*field).filter(|value| !neutral(value, numbers))?)))
        .map(|(field, value)| format!("{field} {}", shown(value)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> GenerationConfig {
        GenerationConfig::parse(text, "generation_config.json")
    }

    #[test]
    fn one_or_several_ids_end_a_text() {
        for (text, expected) in [
            (r#"{"eos_token_id": [1, 4], "top_k": 20}"#, &[1, 4][..]),
            (r#"{"eos_token_id": 2, "unknown": 1}"#, &[2]),
            (r#"{"eos_token_id": 2.0}"#, &[2]),
            (r#"{"eos_token_id": null}"#, &[]),
            (r#"{"eos_token_id": -1}"#, &[]),
            (r#"{"eos_token_id": [-1, 3]}"#, &[3]),
        ] {
            let config = parse(text);
            assert_eq!((&config.eos_token_ids[..], &config.problems[..]), (expected, &[][..]), "{text}");
        }
    }

    #[test]
    fn what_other_programs_write_for_off_is_understood() {
        let top_k = |value: &str| {
            let config = parse(&format!("{{\"top_k\": {value}}}"));
            assert_eq!(config.problems, [], "{value}");
            config.top_k
        };
        assert_eq!(
            ["50", "50.0", "0", "-1", "-1.0", "null"].map(top_k),
            [Some(50), Some(50), Some(0), Some(0), Some(0), None]
        );
        let config = parse(
            r#"{"temperature": 0, "top_p": 0, "min_p": 0, "repetition_penalty": 1, "do_sample": null, "num_beams": 1}"#,
        );
        assert_eq!(config.problems, []);
        assert_eq!((config.temperature, config.min_p, config.do_sample), (Some(0.0), Some(0.0), None));
        assert!(config.top_p.is_some_and(|x| x > 0.0 && x < 1e-30));
        config.check(&[]).unwrap();
    }

    #[test]
    fn a_problem_matters_only_where_the_field_is_used() {
        let config = parse(r#"{"temperature": "hot", "top_k": 50.5, "top_p": 0.9, "num_beams": 4}"#);
        assert_eq!((config.temperature, config.top_k, config.top_p), (None, None, Some(0.9)));
        let message = |overridden: &[&str]| config.check(overridden).unwrap_err().to_string();
        let both = message(&[]);
        assert!(both.contains("generation_config.json: temperature is \"hot\", not a number from 0"), "{both}");
        assert!(message(&["temperature"]).contains("top_k is 50.5"));
        config.check(&["top_k", "temperature"]).unwrap();
        assert_eq!(config.unread, ["num_beams 4"]);
        for (field, value) in [
            ("top_p", "-1"),
            ("top_p", "1.5"),
            ("min_p", "2"),
            ("temperature", "-1"),
            ("temperature", "1e40"),
            ("repetition_penalty", "0"),
            ("top_k", "-2"),
            ("top_k", "[1]"),
            ("do_sample", "1"),
            ("eos_token_id", "\"</s>\""),
        ] {
            let problems = parse(&format!("{{\"{field}\": {value}}}")).problems;
            assert!(problems.len() == 1 && problems[0].field == field, "{field} {value}: {problems:?}");
        }
    }

    #[test]
    fn a_file_that_is_none_is_one_problem() {
        for (text, words) in [
            ("{", "generation_config.json is malformed: EOF"),
            ("[]", "is malformed"),
            ("", "is empty"),
            ("<!DOCTYPE html>", "is a web page"),
            ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ] {
            let config = parse(text);
            let message = config.check(&["temperature", "top_k"]).unwrap_err().to_string();
            assert!(message.contains(words) && config.problems.len() == 1, "{message}");
        }
    }
}
