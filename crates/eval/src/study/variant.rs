use serde::Serialize;

/// The numbers that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// 128 consecutive tokens of one channel: `Q_C`.
    Channel,
    /// 128 channels of one token: `Q_T`.
    Token,
}

/// Where a Hadamard matrix is applied before quantisation; it is undone afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rotation {
    /// Nowhere.
    None,
    /// Along channels, token by token: `XH`.
    Channels,
    /// Along tokens, channel by channel, within each group of 128 tokens: `HX`.
    Tokens,
}

/// A way to quantise a tensor to two bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Variant {
    /// The numbers that share a scale.
    pub axis: Axis,
    /// The rotation.
    pub rotation: Rotation,
}

impl Variant {
    const fn new(axis: Axis, rotation: Rotation) -> Self {
        Variant { axis, rotation }
    }

    /// Position in [`VARIANTS`].
    pub(super) fn index(self) -> usize {
        VARIANTS.iter().position(|variant| *variant == self).expect("the grid holds every combination")
    }

    /// The paper's notation for this variant of `tensor`, such as `Q_C(KH)`.
    pub fn notation(self, tensor: char) -> String {
        let axis = match self.axis {
            Axis::Channel => 'C',
            Axis::Token => 'T',
        };
        match self.rotation {
            Rotation::None => format!("Q_{axis}({tensor})"),
            Rotation::Channels => format!("Q_{axis}({tensor}H)"),
            Rotation::Tokens => format!("Q_{axis}(H{tensor})"),
        }
    }
}

/// The grid of figure 3.
pub(super) const VARIANTS: [Variant; 6] = [
    Variant::new(Axis::Channel, Rotation::None),
    Variant::new(Axis::Channel, Rotation::Channels),
    Variant::new(Axis::Channel, Rotation::Tokens),
    Variant::new(Axis::Token, Rotation::None),
    Variant::new(Axis::Token, Rotation::Channels),
    Variant::new(Axis::Token, Rotation::Tokens),
];

/// Keys and values quantised together.
pub(super) struct Pair {
    pub keys: Variant,
    pub values: Variant,
    pub method: Option<&'static str>,
}

/// The methods of figure 5.
pub(super) const PAIRS: [Pair; 4] = [
    Pair { keys: VARIANTS[0], values: VARIANTS[3], method: Some("KIVI") },
    Pair { keys: VARIANTS[0], values: VARIANTS[4], method: Some("KVLinC without its correction") },
    Pair { keys: VARIANTS[1], values: VARIANTS[4], method: None },
    Pair { keys: VARIANTS[4], values: VARIANTS[4], method: Some("QuaRot") },
];
