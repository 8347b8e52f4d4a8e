//! The paper's notation, `Q_C(KH)`, with its index below the line.

use crate::study::{Axis, Rotation, Variant};

/// As HTML.
pub(super) fn html(notation: &str) -> String {
    notation.replace("Q_C", "Q<sub>C</sub>").replace("Q_T", "Q<sub>T</sub>")
}

/// As content of an SVG text.
pub(super) fn svg(notation: &str) -> String {
    let lowered =
        |index: &str| format!("Q<tspan dy=\"3\" font-size=\"75%\">{index}</tspan><tspan dy=\"-3\">&#8203;</tspan>");
    notation.replace("Q_C", &lowered("C")).replace("Q_T", &lowered("T"))
}

/// In words.
pub(super) fn words(variant: Variant) -> &'static str {
    match (variant.axis, variant.rotation) {
        (Axis::Channel, Rotation::None) => "per channel",
        (Axis::Channel, Rotation::Channels) => "per channel, rotated along channels",
        (Axis::Channel, Rotation::Tokens) => "per channel, rotated along tokens",
        (Axis::Token, Rotation::None) => "per token",
        (Axis::Token, Rotation::Channels) => "per token, rotated along channels",
        (Axis::Token, Rotation::Tokens) => "per token, rotated along tokens",
    }
}
