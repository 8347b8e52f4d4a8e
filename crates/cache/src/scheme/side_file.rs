//! Keys, or values, in a scheme's file.

use super::check::{Problem, Which, check_feedback, check_planes, unsupported};
use super::choices::{Axis, Packed, Permutation, PreRope, Side, Statistic, Transform};
use crate::PAGE_TOKENS;
use dibit_quant::{Bits, Clip, Quantizer};
use serde::Deserialize;

const GROUPS: [usize; 3] = [32, 64, 128];
const MAX_RANK: usize = 16;

/// Bits of a code, or planes.
#[derive(Deserialize)]
#[serde(untagged)]
enum BitsFile {
    Count(u32),
    Word(String),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SideFile {
    bits: BitsFile,
    average_bits: Option<f32>,
    axis: Option<Axis>,
    group: Option<usize>,
    quantizer: Option<QuantizerFile>,
    clip: Option<ClipFile>,
    include_zero: Option<bool>,
    transform: Option<TransformFile>,
    position: Option<PositionFile>,
    heads: Option<usize>,
    permutation: Option<Permutation>,
    statistic: Option<Statistic>,
    high_precision: Option<f32>,
    low_rank: Option<usize>,
    outliers: Option<f32>,
    feedback: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum QuantizerFile {
    FloatMin,
    IntegerZero,
}

/// What both ends are multiplied by, or how the part of the range is found.
#[derive(Deserialize)]
#[serde(untagged)]
enum ClipFile {
    Share(f32),
    Word(String),
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum TransformFile {
    None,
    Hadamard,
    Basis,
    TokenHadamard,
    GroupedHadamard,
}

#[derive(Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum PositionFile {
    PostRope,
    PreRope,
}

impl SideFile {
    pub(super) fn side(self, which: Which) -> Result<Side, Problem> {
        let name = which.name();
        let (count, planes) = match &self.bits {
            BitsFile::Count(count) => (*count, None),
            BitsFile::Word(word) if word == "planes" => (2, Some(self.average_bits.unwrap_or(2.0))),
            BitsFile::Word(word) => {
                return unsupported(format!("{name}.bits = \"{word}\""), "2, 3, 4, 5, 6, 8, 16, \"planes\"");
            }
        };
        if self.average_bits.is_some() && planes.is_none() {
            return unsupported(format!("{name}.average_bits without planes"), format!("{name}.bits = \"planes\""));
        }
        if planes.is_some_and(|average| !(0.25..=4.0).contains(&average)) {
            return unsupported(format!("{name}.average_bits out of range"), "0.25 to 4");
        }
        if count == 16 {
            if self.has_choices() {
                return unsupported(
                    format!("other choices of [{name}] with {name}.bits = 16"),
                    "these choices on packed codes (bits = 2, 3, 4, 5, 6, 8 or \"planes\")",
                );
            }
            return Ok(Side::Half);
        }
        let Ok(bits) = Bits::try_from(count) else {
            return unsupported(format!("{name}.bits = {count}"), "2, 3, 4, 5, 6, 8, 16, \"planes\"");
        };
        let group = self.group.unwrap_or(PAGE_TOKENS);
        if !GROUPS.contains(&group) {
            return unsupported(format!("{name}.group = {group}"), "32, 64, 128");
        }
        let packed = Packed {
            bits,
            planes,
            axis: self.axis.unwrap_or(which.default_axis()),
            group,
            quantizer: self.quantizer(name)?,
            clip: if let Some(ClipFile::Word(_)) = self.clip { Clip::Mse } else { Clip::None },
            transform: self.transform(which)?,
            high_precision: share(&format!("{name}.high_precision"), self.high_precision, 0.5)?,
            low_rank: self.low_rank.unwrap_or(0),
            outliers: share(&format!("{name}.outliers"), self.outliers, 0.25)?,
            feedback: self.feedback.unwrap_or(false),
        };
        if packed.low_rank > MAX_RANK {
            return unsupported(format!("{name}.low_rank = {}", packed.low_rank), format!("0 to {MAX_RANK}"));
        }
        let beside_codes = packed.high_precision > 0.0 || packed.low_rank > 0 || packed.outliers > 0.0;
        if beside_codes && matches!(packed.transform, Transform::PreRope(_) | Transform::TokenHadamard) {
            return unsupported(
                format!("{name}.high_precision, low_rank or outliers on {name} {}", packed.transform),
                "these on keys and values after RoPE, with transform none, hadamard or basis",
            );
        }
        check_planes(&packed, which)?;
        check_feedback(&packed, which)?;
        Ok(Side::Packed(packed))
    }

    fn has_choices(&self) -> bool {
        self.axis.is_some()
            || self.group.is_some()
            || self.quantizer.is_some()
            || self.clip.is_some()
            || self.include_zero.is_some()
            || self.transform.is_some_and(|transform| transform != TransformFile::None)
            || self.position.is_some_and(|position| position != PositionFile::PostRope)
            || self.heads.is_some()
            || self.permutation.is_some()
            || self.statistic.is_some()
            || self.high_precision.is_some()
            || self.low_rank.is_some()
            || self.outliers.is_some()
            || self.feedback.is_some()
    }

    fn quantizer(&self, name: &str) -> Result<Quantizer, Problem> {
        let clip = match &self.clip {
            None => None,
            Some(ClipFile::Share(clip)) => Some(*clip),
            Some(ClipFile::Word(word)) if word == "mse" => None,
            Some(ClipFile::Word(word)) => {
                return unsupported(format!("{name}.clip = \"{word}\""), "\"mse\", or a number above 0, at most 1");
            }
        };
        if self.quantizer != Some(QuantizerFile::IntegerZero) {
            if clip.is_some() || self.include_zero.is_some() {
                return unsupported(
                    format!("a number as {name}.clip, or {name}.include_zero, with the float-min quantizer"),
                    "these with quantizer = \"integer-zero\", or clip = \"mse\"",
                );
            }
            return Ok(Quantizer::FloatMin);
        }
        let clip = clip.unwrap_or(1.0);
        if !(clip > 0.0 && clip <= 1.0) {
            return unsupported(format!("{name}.clip = {clip}"), "above 0, at most 1");
        }
        Ok(Quantizer::IntegerZero { clip, include_zero: self.include_zero.unwrap_or(false) })
    }

    fn transform(&self, which: Which) -> Result<Transform, Problem> {
        let grouped = self.transform == Some(TransformFile::GroupedHadamard);
        let pre_rope = self.position.map_or(grouped, |position| position == PositionFile::PreRope);
        let name = which.name();
        if !pre_rope {
            if self.heads.is_some() || self.permutation.is_some() || self.statistic.is_some() || grouped {
                return unsupported(
                    format!("{name}.heads, permutation, statistic or grouped-hadamard after RoPE"),
                    "these with position = \"pre-rope\"",
                );
            }
            return Ok(match self.transform {
                None | Some(TransformFile::None) => Transform::None,
                Some(TransformFile::Hadamard) => Transform::Hadamard,
                Some(TransformFile::Basis) => Transform::Basis,
                Some(TransformFile::TokenHadamard) => Transform::TokenHadamard,
                Some(TransformFile::GroupedHadamard) => unreachable!("handled above"),
            });
        }
        if which == Which::Values {
            return unsupported("values.position or grouped-hadamard: values have no RoPE", "keys.position");
        }
        let heads = match (self.transform, self.heads) {
            (None | Some(TransformFile::None), None) => 0,
            (Some(TransformFile::Hadamard), None) => 1,
            (Some(TransformFile::GroupedHadamard), heads) => heads.unwrap_or(4),
            (Some(TransformFile::Basis | TransformFile::TokenHadamard), _) => {
                return unsupported(
                    "keys.position = \"pre-rope\" with this transform",
                    "none, hadamard, grouped-hadamard before RoPE",
                );
            }
            (_, Some(_)) => {
                return unsupported("keys.heads without grouped-hadamard", "transform = \"grouped-hadamard\"");
            }
        };
        if heads > 64 || (heads > 0 && !heads.is_power_of_two()) {
            return unsupported(format!("keys.heads = {heads}"), "powers of two up to 64");
        }
        let permutation = self.permutation.unwrap_or_default();
        if self.statistic.is_some() && permutation == Permutation::None {
            return unsupported("keys.statistic without a permutation", "permutation = \"local\" or \"global\"");
        }
        Ok(Transform::PreRope(PreRope { heads, permutation, statistic: self.statistic.unwrap_or_default() }))
    }
}

fn share(name: &str, value: Option<f32>, most: f32) -> Result<f32, Problem> {
    match value {
        None => Ok(0.0),
        Some(value) if (0.0..=most).contains(&value) => Ok(value),
        Some(value) => unsupported(format!("{name} = {value}"), format!("a share, at most {most}")),
    }
}
