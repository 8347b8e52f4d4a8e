//! The choices that a scheme is made of.

use dibit_quant::{Bits, Clip, Quantizer};
use serde::Deserialize;
use std::fmt;
use std::ops::Range;

/// What shares a scale and a zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Consecutive tokens of one channel.
    Channel,
    /// Consecutive channels of one token.
    Token,
}

/// Order of the rotated channels before they are cut into groups (RotateKV, section 3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Permutation {
    /// As they are.
    #[default]
    None,
    /// Calibrated within the heads that are rotated together.
    Local,
    /// Calibrated over all KV heads of a layer.
    Global,
}

/// What channels are ordered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Statistic {
    /// The signed mean: channels of similar mean share a zero.
    #[default]
    Mean,
    /// The mean magnitude.
    Magnitude,
}

/// Keys that are stored before their rotary embedding, which is applied when they are read (RotateKV).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreRope {
    /// Adjacent KV heads that one Hadamard matrix rotates together, at most; 0 for no rotation.
    pub heads: usize,
    /// Order of the rotated channels.
    pub permutation: Permutation,
    /// What a calibrated order is calibrated by.
    pub statistic: Statistic,
}

/// Change of keys or values before they are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    /// As they are.
    None,
    /// `x H` for each head: fused into the projections for values (QuaRot, section 4; KVLinC, section 3.1), applied to
    /// queries and keys after RoPE for keys.
    Hadamard,
    /// `x U` for each head with a calibrated orthogonal `U` (ResQ, section 4).
    Basis,
    /// `H X` along the 128 tokens of a page, for the study of KVLinC's section 3.1.
    TokenHadamard,
    /// Keys before RoPE, rotated over several heads.
    PreRope(PreRope),
}

/// How a packed side is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Packed {
    /// Bits of a code; of a plane, where there are planes.
    pub bits: Bits,
    /// Average bits of a channel, where each channel has 0 to 4 planes of two bits by its calibrated importance.
    pub planes: Option<f32>,
    /// What shares a scale and a zero.
    pub axis: Axis,
    /// How many share them.
    pub group: usize,
    /// How a group becomes codes.
    pub quantizer: Quantizer,
    /// Which part of a group's range the codes span.
    pub clip: Clip,
    /// What happens before.
    pub transform: Transform,
    /// Share of the channels, the last ones after the transform, that stay in 16 bit (ResQ).
    pub high_precision: f32,
    /// Rank of the factors that hold the quantisation error (GEAR); 0 for none.
    pub low_rank: usize,
    /// Share of the largest and of the smallest values of a vector that are kept beside the codes (GEAR).
    pub outliers: f32,
    /// Whether what the code of a channel misses is taken up by the channels that are coded after it, in the metric of the
    /// queries.
    pub feedback: bool,
}

/// How keys, or values, lie in a page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Side {
    /// fp16 numbers.
    Half,
    /// Packed codes with fp16 scales and zeros.
    Packed(Packed),
}

impl Side {
    /// What happens before numbers are stored.
    pub fn transform(self) -> Transform {
        match self {
            Side::Half => Transform::None,
            Side::Packed(packed) => packed.transform,
        }
    }

    /// Whether the codes span no more of a range than what misses least.
    pub(super) fn is_clipped(self) -> bool {
        matches!(self, Side::Packed(Packed { clip: Clip::Mse, .. }))
    }

    /// Average bits of a channel, where there are planes.
    pub fn average_bits(self) -> Option<f32> {
        if let Side::Packed(Packed { planes, .. }) = self { planes } else { None }
    }

    /// Whether channels take up what others miss.
    pub fn has_feedback(self) -> bool {
        matches!(self, Side::Packed(Packed { feedback: true, .. }))
    }

    /// Whether a calibration is needed.
    pub fn is_calibrated(self) -> bool {
        if self.average_bits().is_some() || self.has_feedback() {
            return true;
        }
        match self.transform() {
            Transform::Basis => true,
            Transform::PreRope(pre) => pre.permutation != Permutation::None,
            Transform::None | Transform::Hadamard | Transform::TokenHadamard => false,
        }
    }
}

/// Tokens that stay in 16 bit wherever they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sinks {
    /// None.
    None,
    /// The first tokens of a sequence.
    First(usize),
    /// The first tokens of a sequence, and in each page and KV head the tokens whose values are small beside the others'.
    Auto(AutoSinks),
    /// In each layer, the tokens of a prompt that hold the largest activations of the residual stream that enters it:
    /// the tokens of the so many largest (RotateKV, section 3.4).
    Massive(usize),
    /// Tokens of a prompt with massive activations, found once and kept for all later layers (AKVQ-VL, section 3.2).
    Pivots(Pivots),
}

/// How tokens with small values are found when a page is packed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AutoSinks {
    /// First tokens of a sequence that are protected outside of pages.
    pub first: usize,
    /// Places of a page: tokens that it protects at most.
    pub places: usize,
    /// A token is protected where the norm of its value, in the model's own frame, is below this share of the median of its
    /// page.
    pub share: f32,
}

/// How pivot tokens are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pivots {
    /// Tokens at most.
    pub count: usize,
    /// Whether every layer finds its own.
    pub per_layer: bool,
}

impl Sinks {
    /// Tokens of a sequence and layer at most.
    pub fn capacity(self) -> usize {
        match self {
            Sinks::None => 0,
            Sinks::First(count) | Sinks::Massive(count) => count,
            Sinks::Auto(auto) => auto.first,
            // Until pivots are found, the first tokens are protected.
            Sinks::Pivots(pivots) => pivots.count.max(Pivots::FALLBACK),
        }
    }

    /// Whether they are chosen by the activations of a prompt.
    pub fn are_chosen(self) -> bool {
        matches!(self, Sinks::Massive(_) | Sinks::Pivots(_))
    }

    /// First tokens of a sequence that are never packed, whatever they hold.
    pub fn first(self) -> usize {
        match self {
            Sinks::First(count) => count,
            Sinks::Auto(auto) => auto.first,
            Sinks::None | Sinks::Massive(_) | Sinks::Pivots(_) => 0,
        }
    }

    /// Positions that every layer of an empty sequence protects.
    pub fn first_positions(self) -> Vec<u32> {
        (0..self.first() as u32).collect()
    }
}

impl AutoSinks {
    /// Places of a page, where a scheme does not say.
    pub const PLACES: usize = 8;
    /// Places of a layer's pages in plans where a calibration will say how many there are: those of two real models have three
    /// and a half on average.
    pub const PLANNED: usize = 4;
    /// Places of a page at most.
    pub const MOST: usize = 32;
    /// The share of the median, where a scheme does not say.
    pub const SHARE: f32 = 0.4;
}

impl Pivots {
    /// First tokens that are protected where no massive activation was found.
    pub const FALLBACK: usize = 4;
}

/// What the tokens of a pass see of each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sees {
    /// Exact keys and values; they are quantised after attention.
    #[default]
    Exact,
    /// What is stored: quantised before attention, as QuaRot's and RotateKV's own code does.
    Stored,
}

/// How planes are given to channels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlaneBudget {
    /// What shares a number of planes.
    pub pool: Pool,
    /// Planes of a channel at most.
    pub most: usize,
}

/// What shares a number of planes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// Keys and values of all layers.
    #[default]
    Model,
    /// Keys of all layers, and values of all layers.
    Side,
    /// Keys, or values, of one KV head.
    Head,
}

/// What gives accuracy back after quantisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Correction {
    /// KVLinC's linear correction adapters (KVLinC, section 3.2).
    pub linear: Option<Linear>,
    /// Whether what rounding adds to a logit on average is taken from it: `sum_c ln(sinh(a_c) / a_c)` with
    /// `a_c = q_c step_c / (2 sqrt(head_dim))` (arXiv 2605.26266).
    pub bias: bool,
}

/// Size of a linear correction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Linear {
    /// D, the features of a query or of what the codes of a key miss.
    pub features: usize,
    /// Numbers that the states are kept in between flushes.
    pub states: StateType,
}

/// Type of the numbers of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StateType {
    /// 32 bit.
    #[default]
    Fp32,
    /// 16 bit.
    Fp16,
}

impl Correction {
    /// No correction.
    pub const NONE: Self = Correction { linear: None, bias: false };
}

impl StateType {
    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        if self == StateType::Fp32 { 4 } else { 2 }
    }
}

/// Other choices for some layers.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerOverride {
    /// The layers.
    pub layers: Range<usize>,
    /// Their keys.
    pub keys: Side,
    /// Their values.
    pub values: Side,
    /// Their correction.
    pub correction: Correction,
}

/// Tokens of one kind, with bits and pages of their own (AKVQ-VL). Every token that is of no class is stored
/// as the scheme says for all.
#[derive(Debug, Clone, PartialEq)]
pub struct Class {
    /// Its name, as `text` or `vision`.
    pub name: String,
    /// Its keys.
    pub keys: Side,
    /// Its values.
    pub values: Side,
    /// Layers with choices of their own; ranges do not overlap.
    pub layers: Vec<LayerOverride>,
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(if *self == Axis::Channel { "channel" } else { "token" })
    }
}

impl fmt::Display for Transform {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Transform::None => f.write_str("as they are"),
            Transform::Hadamard => f.write_str("Hadamard-rotated"),
            Transform::Basis => f.write_str("in a calibrated basis"),
            Transform::TokenHadamard => f.write_str("Hadamard-rotated along tokens"),
            Transform::PreRope(PreRope { heads, permutation, statistic }) => {
                match heads {
                    0 => f.write_str("before RoPE")?,
                    heads => write!(f, "before RoPE, rotated over {heads} heads")?,
                }
                let place = match permutation {
                    Permutation::None => return Ok(()),
                    Permutation::Local => "locally",
                    Permutation::Global => "globally",
                };
                let statistic = if *statistic == Statistic::Mean { "mean" } else { "magnitude" };
                write!(f, ", reordered {place} by {statistic}")
            }
        }
    }
}

impl fmt::Display for Correction {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let parts = [
            self.linear.map(|Linear { features, states }| {
                let states = if states == StateType::Fp32 { "fp32" } else { "fp16" };
                format!("linear, {features} features, states in {states}")
            }),
            self.bias.then(|| "bias of rounding".to_owned()),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        f.write_str(if parts.is_empty() { "none" } else { "" })?;
        f.write_str(&parts.join("; "))
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Side::Packed(packed) = self else { return f.write_str("16 bit") };
        let Packed {
            bits,
            planes,
            axis,
            group,
            quantizer,
            clip,
            transform,
            high_precision,
            low_rank,
            outliers,
            feedback,
        } = packed;
        match planes {
            None => write!(f, "{} bit per {axis}", bits.count())?,
            Some(average) => write!(f, "0 to 4 planes of {} bit per {axis}, {average} bit on average", bits.count())?,
        }
        write!(f, ", groups of {group}, ")?;
        match quantizer {
            Quantizer::FloatMin => f.write_str("float minimum")?,
            Quantizer::IntegerZero { clip, include_zero } => {
                write!(f, "integer zero, clip {clip}{}", if *include_zero { ", zero in range" } else { "" })?;
            }
        }
        if *clip == Clip::Mse {
            f.write_str(", clipped for the least squared error")?;
        }
        write!(f, ", {transform}")?;
        if *high_precision > 0.0 {
            write!(f, ", {} % of channels in 16 bit", high_precision * 100.0)?;
        }
        if *low_rank > 0 {
            write!(f, ", error of rank {low_rank}")?;
        }
        if *outliers > 0.0 {
            write!(f, ", {} % outliers at both ends", outliers * 100.0)?;
        }
        if *feedback {
            f.write_str(", with error feedback")?;
        }
        Ok(())
    }
}
