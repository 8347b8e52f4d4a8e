//! A scheme: how keys and values are stored, as data.
//!
//! A scheme is a small TOML file over a few orthogonal choices. It is parsed, validated as a whole
//! and then compiled into a [`crate::CacheLayout`].

use crate::{PAGE_TOKENS, Schedule, SchemeError, Window};
use dibit_quant::Bits;
use serde::Deserialize;
use std::path::Path;

const BUILT_IN: [(&str, &str); 4] = [
    ("fp16", include_str!("schemes/fp16.toml")),
    ("kivi", include_str!("schemes/kivi.toml")),
    ("kivi-paper", include_str!("schemes/kivi-paper.toml")),
    ("kvlinc", include_str!("schemes/kvlinc.toml")),
];

const GROUPS: [usize; 3] = [32, 64, 128];
const MAX_WINDOW: usize = 4096;

/// Rotation of the values before they are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ValueTransform {
    /// Values as they are.
    #[default]
    None,
    /// `V H` for each head, fused into the value and output projections (QuaRot, section 4; KVLinC, section 3.1).
    Hadamard,
}

/// What gives accuracy back after quantisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Correction {
    /// Nothing.
    #[default]
    None,
    /// KVLinC's linear correction adapters (KVLinC, section 3.2).
    Linear,
}

/// Code width and group of a packed side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    /// Bits per code.
    pub bits: Bits,
    /// Values that share one scale and minimum: tokens of a channel for keys, channels of a token for values.
    pub group: usize,
}

/// How keys, or values, lie in a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// fp16 numbers.
    Half,
    /// Packed codes with fp16 scales and minimums.
    Packed(Packed),
}

/// A validated scheme.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheme {
    /// Its name.
    pub name: String,
    /// One line of description.
    pub summary: String,
    /// Keys: post-RoPE, per channel where packed.
    pub keys: Side,
    /// Values: per token where packed.
    pub values: Side,
    /// Rotation of the values.
    pub value_transform: ValueTransform,
    /// Recent tokens in 16 bit.
    pub window: Window,
    /// The correction that the method asks for.
    pub correction: Correction,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SchemeFile {
    name: String,
    #[serde(default)]
    summary: String,
    #[serde(default)]
    correction: Correction,
    keys: SideFile,
    values: SideFile,
    window: Option<WindowFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SideFile {
    bits: u32,
    axis: Option<Axis>,
    group: Option<usize>,
    quantizer: Option<Quantizer>,
    #[serde(default)]
    transform: ValueTransform,
}

/// What shares a scale and a minimum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Consecutive tokens of one channel.
    Channel,
    /// Consecutive channels of one token.
    Token,
}

#[derive(Deserialize)]
enum Quantizer {
    #[serde(rename = "float-min")]
    FloatMin,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WindowFile {
    tokens: usize,
    schedule: ScheduleFile,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ScheduleFile {
    Guaranteed,
    Kivi,
}

impl Scheme {
    /// Names of the built-in schemes.
    pub fn built_in() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|(name, _)| *name)
    }

    /// A built-in scheme by its name, or one's own by the path of its file (anything that ends in `.toml`).
    ///
    /// # Errors
    /// Every [`SchemeError`].
    pub fn load(name: &str) -> Result<Self, SchemeError> {
        if name.ends_with(".toml") {
            let text = std::fs::read_to_string(Path::new(name))
                .map_err(|source| SchemeError::Read { path: name.to_owned(), source })?;
            return Self::parse(&text, name);
        }
        match BUILT_IN.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Self::parse(text, name),
            None => Err(unknown(name)),
        }
    }

    /// A scheme from the text of its file; `origin` names it in errors.
    ///
    /// # Errors
    /// [`SchemeError::Parse`] and [`SchemeError::Unsupported`].
    pub fn parse(text: &str, origin: &str) -> Result<Self, SchemeError> {
        let file: SchemeFile = toml::from_str(text).map_err(|error| SchemeError::Parse {
            name: origin.to_owned(),
            message: error.to_string().trim().to_owned(),
        })?;
        file.validate().map_err(|(problem, supported)| SchemeError::Unsupported {
            name: origin.to_owned(),
            problem,
            supported,
        })
    }

    /// What the scheme asks for and this version does not do, as a sentence; `None` where nothing is missing.
    pub fn notice(&self) -> Option<String> {
        match self.correction {
            Correction::None => None,
            Correction::Linear => Some(format!(
                "{}: the linear correction is not implemented yet; running the quantiser without it",
                self.name
            )),
        }
    }
}

fn unknown(name: &str) -> SchemeError {
    let nearest = Scheme::built_in()
        .map(|known| (strsim::damerau_levenshtein(name, known), known))
        .min()
        .filter(|(distance, _)| *distance <= 3);
    SchemeError::Unknown {
        name: name.to_owned(),
        suggestion: nearest.map(|(_, known)| format!(" (did you mean '{known}'?)")).unwrap_or_default(),
        known: Scheme::built_in().collect::<Vec<_>>().join(", "),
    }
}

type Unsupported = (String, String);

fn unsupported<T>(problem: impl Into<String>, supported: impl Into<String>) -> Result<T, Unsupported> {
    Err((problem.into(), supported.into()))
}

impl SchemeFile {
    fn validate(self) -> Result<Scheme, Unsupported> {
        if self.keys.transform != ValueTransform::None {
            return unsupported("keys.transform = \"hadamard\"", "keys.transform = \"none\"");
        }
        let keys = self.keys.side("keys", Axis::Channel)?;
        let values = self.values.side("values", Axis::Token)?;
        if values == Side::Half && self.values.transform != ValueTransform::None {
            return unsupported("values.transform on 16-bit values", "a transform on packed values");
        }
        let packed_keys = matches!(keys, Side::Packed(_));
        let window = match self.window {
            None if packed_keys => {
                return unsupported(
                    "keys per channel without a [window]",
                    "a window, since a group of a channel needs 128 tokens",
                );
            }
            None => Window { tokens: 0, schedule: Schedule::None },
            Some(window) => window.validate()?,
        };
        let correction_needs = self.correction != Correction::None && !packed_keys;
        if correction_needs {
            return unsupported("a correction on 16-bit keys", "a correction on packed keys");
        }
        Ok(Scheme {
            name: self.name,
            summary: self.summary,
            keys,
            values,
            value_transform: self.values.transform,
            window,
            correction: self.correction,
        })
    }
}

impl SideFile {
    fn side(&self, name: &str, supported_axis: Axis) -> Result<Side, Unsupported> {
        let Self { bits, axis, group, quantizer, .. } = self;
        if *bits == 16 {
            if axis.is_some() || group.is_some() || quantizer.is_some() {
                return unsupported(
                    format!("{name}.axis, {name}.group or {name}.quantizer with {name}.bits = 16"),
                    "these choices on packed codes (bits = 2, 4 or 8)",
                );
            }
            return Ok(Side::Half);
        }
        let Ok(bits) = Bits::try_from(*bits) else {
            return unsupported(format!("{name}.bits = {bits}"), "2, 4, 8, 16");
        };
        let axis_name = |axis| if axis == Axis::Channel { "channel" } else { "token" };
        if let Some(axis) = axis
            && *axis != supported_axis
        {
            return unsupported(
                format!("{name}.axis = \"{}\"", axis_name(*axis)),
                format!("\"{}\"", axis_name(supported_axis)),
            );
        }
        let group = group.unwrap_or(PAGE_TOKENS);
        if !GROUPS.contains(&group) {
            return unsupported(format!("{name}.group = {group}"), "32, 64, 128");
        }
        Ok(Side::Packed(Packed { bits, group }))
    }
}

impl WindowFile {
    fn validate(self) -> Result<Window, Unsupported> {
        let Self { tokens, schedule } = self;
        if tokens > MAX_WINDOW {
            return unsupported(format!("window.tokens = {tokens}"), format!("at most {MAX_WINDOW}"));
        }
        let schedule = match schedule {
            ScheduleFile::Guaranteed => Schedule::Guaranteed,
            ScheduleFile::Kivi if tokens == 0 || !tokens.is_multiple_of(PAGE_TOKENS) => {
                return unsupported(
                    format!("window.tokens = {tokens} under the kivi schedule"),
                    "multiples of 128 from 128 on",
                );
            }
            ScheduleFile::Kivi => Schedule::Kivi,
        };
        Ok(Window { tokens, schedule })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "name = \"mine\"\n[keys]\nbits = 2\n[values]\nbits = 4\ngroup = 32\n[window]\ntokens = 64\nschedule = \"guaranteed\"\n";

    fn message(text: &str) -> String {
        Scheme::parse(text, "mine.toml").unwrap_err().to_string()
    }

    #[test]
    fn every_built_in_scheme_loads_under_its_own_name() {
        for name in Scheme::built_in() {
            let scheme = Scheme::load(name).unwrap();
            assert_eq!(scheme.name, name);
            assert!(!scheme.summary.is_empty());
        }
        let kvlinc = Scheme::load("kvlinc").unwrap();
        assert_eq!(kvlinc.value_transform, ValueTransform::Hadamard);
        assert!(kvlinc.notice().unwrap().contains("linear correction"));
        assert_eq!(Scheme::load("kivi").unwrap().notice(), None);
    }

    #[test]
    fn a_file_of_ones_own() {
        let scheme = Scheme::parse(BASE, "mine.toml").unwrap();
        assert_eq!(scheme.keys, Side::Packed(Packed { bits: Bits::Two, group: 128 }));
        assert_eq!(scheme.values, Side::Packed(Packed { bits: Bits::Four, group: 32 }));
        assert_eq!(scheme.window, Window { tokens: 64, schedule: Schedule::Guaranteed });
    }

    #[test]
    fn unknown_names_get_the_nearest() {
        let error = Scheme::load("kvlink").unwrap_err().to_string();
        assert!(error.contains("did you mean 'kvlinc'?") && error.contains("fp16, kivi"), "{error}");
        assert!(!Scheme::load("turboquant").unwrap_err().to_string().contains("did you mean"));
        assert!(matches!(Scheme::load("nowhere/x.toml"), Err(SchemeError::Read { .. })));
    }

    #[test]
    fn unsupported_combinations_name_what_is_supported() {
        let cases = [
            (BASE.replace("bits = 2", "bits = 5"), "2, 4, 8, 16"),
            (BASE.replace("bits = 2", "bits = 2\naxis = \"token\""), "\"channel\""),
            (BASE.replace("group = 32", "group = 48"), "32, 64, 128"),
            (BASE.replace("bits = 2", "bits = 2\ntransform = \"hadamard\""), "keys.transform = \"none\""),
            (BASE.replace("\"guaranteed\"", "\"kivi\""), "multiples of 128"),
            (BASE.replace("tokens = 64", "tokens = 100000"), "at most 4096"),
            (BASE.replace("bits = 4\n", "bits = 16\n"), "packed codes"),
            (BASE.split("[window]").next().unwrap().to_owned(), "a window"),
            (BASE.replace("bits = 4\ngroup = 32", "bits = 16\ntransform = \"hadamard\""), "packed values"),
            (format!("correction = \"linear\"\n{}", BASE.replace("bits = 2", "bits = 16")), "packed keys"),
        ];
        for (text, expected) in cases {
            let message = message(&text);
            assert!(message.contains("mine.toml") && message.contains(expected), "{message}");
        }
    }

    #[test]
    fn malformed_files_say_where() {
        assert!(message("name = ").contains("line 1"));
        let unknown = message(&format!("{BASE}[sinks]\nfirst = 4\n"));
        assert!(unknown.contains("unknown field `sinks`") && unknown.contains("`window`"), "{unknown}");
        assert!(message(&BASE.replace("guaranteed", "lazy")).contains("`guaranteed`"));
    }
}
