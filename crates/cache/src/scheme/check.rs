//! Which choices go together.

use super::Scheme;
use super::choices::{Axis, Class, Correction, Packed, Sees, Side, Sinks, Transform};
use crate::{PAGE_TOKENS, Schedule, Window};
use dibit_quant::Quantizer;

/// Why a scheme is none: what the text says wrongly, or choices that do not go together.
pub(super) enum Problem {
    Parse(String),
    Unsupported { problem: String, supported: String },
}

impl Problem {
    /// Says where in the file the problem is.
    pub(super) fn within(self, place: &str) -> Self {
        match self {
            Problem::Parse(message) => Problem::Parse(format!("[{place}]: {message}")),
            Problem::Unsupported { problem, supported } => {
                Problem::Unsupported { problem: format!("[{place}]: {problem}"), supported }
            }
        }
    }
}

pub(super) fn unsupported<T>(problem: impl Into<String>, supported: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Unsupported { problem: problem.into(), supported: supported.into() })
}

impl From<toml::de::Error> for Problem {
    fn from(error: toml::de::Error) -> Self {
        Problem::Parse(error.to_string().trim().to_owned())
    }
}

/// One of the two sides, by its name in the file.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Which {
    Keys,
    Values,
}

impl Which {
    pub(super) fn name(self) -> &'static str {
        if self == Which::Keys { "keys" } else { "values" }
    }

    pub(super) fn default_axis(self) -> Axis {
        if self == Which::Keys { Axis::Channel } else { Axis::Token }
    }
}

pub(super) fn needs_chunks(side: Side) -> bool {
    matches!(side, Side::Packed(Packed { low_rank: 1.., .. }))
}

/// What only whole pages can hold needs a schedule that packs whole pages.
pub(super) fn check_pages(side: Side, which: Which, window: Window, sinks: Sinks) -> Result<(), Problem> {
    let Side::Packed(packed) = side else { return Ok(()) };
    let name = which.name();
    let along_tokens = if packed.axis == Axis::Channel {
        Some(format!("{name} per channel"))
    } else if packed.transform == Transform::TokenHadamard {
        Some(format!("{name}.transform = \"token-hadamard\""))
    } else if packed.low_rank > 0 {
        Some(format!("{name}.low_rank"))
    } else if packed.outliers > 0.0 && which == Which::Keys {
        Some("keys.outliers".to_owned())
    } else {
        None
    };
    if let Some(what) = along_tokens {
        match (window.schedule, which) {
            (Schedule::Guaranteed, _) | (Schedule::Kivi, Which::Keys) => {}
            (Schedule::None, _) => {
                return unsupported(
                    format!("{what} without a [window]"),
                    "a [window], as with tokens = 128 and schedule = \"guaranteed\": a group along tokens needs 128 of them",
                );
            }
            (Schedule::Kivi, Which::Values) => {
                return unsupported(
                    format!("{what} under the kivi schedule, which packs values one by one"),
                    "schedule = \"guaranteed\"",
                );
            }
        }
    }
    if packed.low_rank > 0 && window.schedule == Schedule::Kivi {
        return unsupported(format!("{name}.low_rank under the kivi schedule"), "schedule = \"guaranteed\"");
    }
    if packed.transform == Transform::TokenHadamard && sinks != Sinks::None {
        return unsupported(format!("{name}.transform = \"token-hadamard\" with [sinks]"), "one of the two");
    }
    Ok(())
}

pub(super) fn check_correction(correction: Correction, keys: Side) -> Result<(), Problem> {
    if correction == Correction::NONE {
        return Ok(());
    }
    let Side::Packed(keys) = keys else {
        return unsupported("a correction on 16-bit keys", "a correction on packed keys");
    };
    if matches!(keys.transform, Transform::PreRope(_) | Transform::TokenHadamard) {
        return unsupported(
            format!("a correction of keys {}", keys.transform),
            "a correction of keys after RoPE, with transform none, hadamard or basis",
        );
    }
    if correction.linear.is_some() && keys.low_rank > 0 {
        return unsupported("correction = \"linear\" with keys.low_rank", "one of the two");
    }
    if correction.bias && keys.axis == Axis::Token {
        return unsupported("correction = \"bias\" of keys per token", "keys.axis = \"channel\"");
    }
    Ok(())
}

/// One size of features serves all layers.
pub(super) fn check_features(scheme: &Scheme) -> Result<(), Problem> {
    let mut all = scheme.corrections().filter_map(|own| own.linear);
    let first = all.next();
    if all.any(|linear| Some(linear) != first) {
        return unsupported("layers with different correction.features or states", "the same in all layers");
    }
    if scheme.corrections().any(|own| own != Correction::NONE) && !scheme.classes.is_empty() {
        return unsupported("a correction with [classes]", "one of the two");
    }
    Ok(())
}

/// Channels of planes are cut by their importance, which nothing else may reorder.
pub(super) fn check_planes(packed: &Packed, which: Which) -> Result<(), Problem> {
    if packed.planes.is_none() {
        return Ok(());
    }
    let beside_codes = packed.high_precision > 0.0 || packed.low_rank > 0 || packed.outliers > 0.0;
    let turned = matches!(packed.transform, Transform::PreRope(_) | Transform::TokenHadamard);
    let whole = packed.axis == Axis::Channel && packed.group == PAGE_TOKENS;
    let basis = which == Which::Keys || packed.transform == Transform::Basis;
    if !whole || !basis || packed.quantizer != Quantizer::FloatMin || beside_codes || turned {
        return unsupported(
            format!("{}.bits = \"planes\" with these choices", which.name()),
            "planes per channel in groups of 128, with the float-min quantizer, of keys after RoPE and of values in \
             a basis, without high_precision, low_rank or outliers",
        );
    }
    Ok(())
}

/// What a channel misses goes to the others of the same tokens, in the frame in which queries meet them.
pub(super) fn check_feedback(packed: &Packed, which: Which) -> Result<(), Problem> {
    let beside_codes = packed.high_precision > 0.0 || packed.low_rank > 0 || packed.outliers > 0.0;
    let whole = packed.axis == Axis::Channel && packed.group == PAGE_TOKENS;
    let plain = packed.transform == Transform::None && packed.quantizer == Quantizer::FloatMin && !beside_codes;
    if packed.feedback && !(which == Which::Keys && whole && plain) {
        return unsupported(
            format!("{}.feedback with these choices", which.name()),
            "keys per channel in groups of 128, with the float-min quantizer and no transform, without high_precision, \
             low_rank or outliers",
        );
    }
    Ok(())
}

/// Places inside a page are filled from its 128 tokens at once.
pub(super) fn check_auto_sinks(scheme: &Scheme) -> Result<(), Problem> {
    if !matches!(scheme.sinks, Sinks::Auto(_)) {
        return Ok(());
    }
    if scheme.window.schedule != Schedule::Guaranteed {
        return unsupported(
            "sinks.kind = \"auto\" without a guaranteed window",
            "a [window] with schedule = \"guaranteed\": keys and values of a page must leave it together",
        );
    }
    if !scheme.classes.is_empty() {
        return unsupported("sinks.kind = \"auto\" with [classes]", "one of the two");
    }
    let before_rope = |side: Side| matches!(side.transform(), Transform::PreRope(_));
    if scheme.all_sides().any(before_rope) {
        return unsupported("sinks.kind = \"auto\" with keys before RoPE", "keys after RoPE");
    }
    if scheme.sees == Sees::Stored {
        return unsupported("sinks.kind = \"auto\" with attention = \"stored\"", "attention = \"exact\"");
    }
    Ok(())
}

/// Tokens of a class leave the window one by one, each to the next place in the pages of its class.
pub(super) fn check_classes(scheme: &Scheme) -> Result<(), Problem> {
    if scheme.window.schedule == Schedule::Kivi {
        return unsupported("[classes] under the kivi schedule", "schedule = \"guaranteed\", or no window");
    }
    for side in scheme.all_sides() {
        let Side::Packed(packed) = side else { continue };
        let along_tokens = packed.axis == Axis::Channel || packed.low_rank > 0 || packed.outliers > 0.0;
        if along_tokens || matches!(packed.transform, Transform::TokenHadamard | Transform::PreRope(_)) {
            return unsupported(
                "[classes] with groups, factors or outliers along tokens, or keys before RoPE",
                "axis = \"token\" and transform none, hadamard or basis, for keys and values of all classes",
            );
        }
    }
    let transforms = |class: &Class| (class.keys.transform(), class.values.transform());
    let base = (scheme.keys.transform(), scheme.values.transform());
    if scheme.classes.iter().any(|class| transforms(class) != base)
        || scheme.overrides().any(|own| (own.keys.transform(), own.values.transform()) != base)
    {
        return unsupported(
            "[classes] with different transforms",
            "one transform of keys and one of values, 16 bit counting as none",
        );
    }
    Ok(())
}
