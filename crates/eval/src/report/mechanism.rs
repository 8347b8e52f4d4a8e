//! Figures about keys and values: why schemes differ. They follow figures 2 to 5 of the KVLinC paper.

use super::figure::{Figure, dot_key, key, line_key, pair};
use super::lines::{Across, Line, lines};
use super::number::{number, times};
use super::scale::extent;
use super::strips::{Dot, Name, Strip, Ticks, strips};
use super::{bands, notation};
use crate::study::{Axis, ByLayer, HeadSpread, PairStudy, Rotation, Study, VariantStudy};

/// Ratio of two errors up to which a choice is said to matter little.
const LITTLE: f64 = 1.3;

/// Ratio of two errors up to which they are said to be level.
const LEVEL: f64 = 1.05;

/// Spread of channels (figure 2 of the paper).
pub(super) fn spread(study: &Study) -> Figure {
    let mut spreads = study.spreads.iter();
    let first = spreads.next();
    let others: String = spreads
        .map(|spread| {
            format!("<h3>Layer {}, KV head {}</h3>\n{}", spread.layer, spread.head, pair(&spread_panels(spread)))
        })
        .collect();
    let answer = first.map_or(String::new(), |spread| {
        format!(
            "Keys have outlier channels: in layer {}, KV head {}, the largest reaches {} as far as a typical one.",
            spread.layer,
            spread.head,
            times(spread.key_outlier, 1.0)
        )
    });
    let bar =
        |class: &str, text: &str| key(&format!("<path d=\"M15 1V13\" class=\"{class}\" stroke-width=\"8\"/>"), text);
    Figure {
        question: "Which numbers are hard to store in two bits?",
        answer,
        panels: first.map_or(Vec::new(), spread_panels),
        legend: vec![
            bar("range", "smallest to largest number of the channel"),
            bar("most", "nine of ten numbers"),
            key("<path d=\"M9 7H21\" class=\"median\" stroke-width=\"1.5\"/>", "median"),
        ],
        caption: "Two bits have four levels for a group of numbers, so a group with one far number leaves none for the \
                  others. A rotation mixes all channels of a token: it flattens the outliers, and gives every channel a \
                  part of them."
            .into(),
        note: String::new(),
        more: if others.is_empty() {
            others
        } else {
            format!("<details><summary>The same head in other layers</summary>\n{others}</details>\n")
        },
    }
}

fn spread_panels(spread: &HeadSpread) -> Vec<(String, String)> {
    let place = format!("layer {}, KV head {}", spread.layer, spread.head);
    let panel = |title: &str, own, other| {
        let description = format!("{title}, {place}: spread of each channel over all tokens");
        (title.to_string(), bands::bands(own, other, "value, in units of the tensor", &description))
    };
    vec![
        panel("Keys, K", &spread.keys, &spread.rotated_keys),
        panel("Keys rotated, KH", &spread.rotated_keys, &spread.keys),
        panel("Values, V", &spread.values, &spread.rotated_values),
        panel("Values rotated, VH", &spread.rotated_values, &spread.values),
    ]
}

/// Errors by axis and rotation (figure 3 of the paper).
pub(super) fn grid(study: &Study) -> Figure {
    let panel = |title: &str, variants: &[VariantStudy], of: fn(&VariantStudy) -> &ByLayer, axis: &str| {
        let strip = |variant: &VariantStudy| {
            let figure = of(variant);
            let class = colour(variant);
            let layer = |(layer, &value): (usize, &f64)| Dot {
                value,
                class: format!("{class} faint"),
                radius: 3.0,
                title: format!("{}, layer {layer}: {}", variant.notation, number(value)),
            };
            let mut dots: Vec<Dot> = figure.layers.iter().enumerate().map(layer).collect();
            let hollow = if variant.variant.rotation == Rotation::None { "" } else { " hollow" };
            dots.push(Dot {
                value: figure.mean,
                class: format!("{class} dot{hollow}"),
                radius: 5.5,
                title: format!("{}, mean: {}", variant.notation, number(figure.mean)),
            });
            let words = notation::words(variant.variant);
            let name = format!("{} <tspan class=\"soft\">{words}</tspan>", notation::svg(&variant.notation));
            Strip { name: Name::Markup(name), note: number(figure.mean), dots }
        };
        let rows: Vec<Strip> = variants.iter().map(strip).collect();
        (title.to_string(), strips(&rows, Ticks::Round, axis, &format!("{title}: {axis}, by axis and rotation")))
    };
    let relative = "relative squared error, log scale";
    Figure {
        question: "Along which axis should keys and values be quantised, and does rotating help?",
        answer: grid_answer(study),
        panels: vec![
            panel(
                "Keys: how far attention moves",
                &study.keys,
                |v| &v.attention_error,
                "KL divergence, nats per row, log scale",
            ),
            panel("Values: error of the attention output", &study.values, |v| &v.attention_error, relative),
            panel("Keys: error of the numbers", &study.keys, |v| &v.tensor_error, relative),
            panel("Values: error of the numbers", &study.values, |v| &v.tensor_error, relative),
        ],
        legend: vec![
            dot_key("blue dot", 5.5, &notation::html("Q_C: per channel, mean of layers")),
            dot_key("red dot", 5.5, &notation::html("Q_T: per token, mean of layers")),
            dot_key("blue dot hollow", 5.5, "rotated before quantisation"),
            dot_key("blue faint", 3.0, "one layer"),
        ],
        caption:
            "Above is the error that matters, in attention, and below the plain error of the stored numbers; further \
                  left is better. The number at the right of a row is its mean over all layers."
                .into(),
        note: String::new(),
        more: String::new(),
    }
}

fn grid_answer(study: &Study) -> String {
    let (Some(keys), Some(values)) = (ranked(&study.keys), ranked(&study.values)) else {
        return "Attention could not be compared.".into();
    };
    let best = keys[0];
    let turned = keys.iter().find(|other| {
        let rotations = [best.variant.rotation, other.variant.rotation];
        other.variant.axis == best.variant.axis
            && rotations.contains(&Rotation::None)
            && rotations.contains(&Rotation::Channels)
    });
    let against = turned.map_or(String::new(), |other| {
        let rotating = if best.variant.rotation == Rotation::None { "rotating" } else { "not rotating" };
        let ratio = times(other.attention_error.mean, best.attention_error.mean);
        format!("; {rotating} them moves attention {ratio} as far")
    });
    let [low, high] = [values[0], values[values.len() - 1]].map(|variant| variant.attention_error.mean);
    let values = if high <= LITTLE * low {
        format!("For values the choice matters little: {} to {}.", number(low), number(high))
    } else {
        format!("Values are best quantised {}.", best_ways(&values))
    };
    format!("Keys are best quantised {}{against}. {values}", best_ways(&keys))
}

/// The first of ranked variants and those that are level with it, in words.
fn best_ways(ranked: &[&VariantStudy]) -> String {
    let level = |variant: &&&VariantStudy| variant.attention_error.mean <= LEVEL * ranked[0].attention_error.mean;
    let mut ways: Vec<&str> = ranked.iter().filter(level).map(|variant| notation::words(variant.variant)).collect();
    ways.sort_by_key(|way| way.len());
    ways.join(" or ")
}

/// Variants by ascending error of attention; `None` where there is none to compare.
fn ranked(variants: &[VariantStudy]) -> Option<Vec<&VariantStudy>> {
    let mut finite: Vec<&VariantStudy> =
        variants.iter().filter(|variant| variant.attention_error.mean.is_finite()).collect();
    finite.sort_by(|a, b| a.attention_error.mean.total_cmp(&b.attention_error.mean));
    (!finite.is_empty()).then_some(finite)
}

/// Quantisation steps by layer (figure 4 of the paper).
pub(super) fn steps(study: &Study) -> Figure {
    let panel = |title: &str, variants: &[VariantStudy], wanted: &[(Axis, Rotation)]| {
        let shown: Vec<(&VariantStudy, String)> = variants
            .iter()
            .filter(|variant| wanted.contains(&(variant.variant.axis, variant.variant.rotation)))
            .map(|variant| (variant, format!("{} {}", colour(variant), dashes(variant))))
            .collect();
        let drawn: Vec<Line> = shown
            .iter()
            .map(|(variant, class)| Line { name: &variant.notation, class, values: &variant.scale.layers })
            .collect();
        let keys = shown.iter().map(|(variant, class)| {
            let words = notation::words(variant.variant);
            line_key(class, &format!("{} {words}", notation::html(&variant.notation)))
        });
        let legend = format!("<ul class=\"legend\">{}</ul>", keys.collect::<String>());
        let picture =
            lines(&drawn, Across::Layers, "mean step, in units of the tensor", &format!("{title}: mean step by layer"));
        (title.to_string(), picture + &legend)
    };
    let (channel, token) = (Axis::Channel, Axis::Token);
    let (plain, rotated) = (Rotation::None, Rotation::Channels);
    let step =
        |axis, rotation| study.keys.iter().find(|keys| (keys.variant.axis, keys.variant.rotation) == (axis, rotation));
    let answer = match (step(channel, plain), step(token, plain), step(token, rotated)) {
        (Some(channel), Some(token), Some(rotated)) => format!(
            "Keys per token need steps of {} on average, {} when rotated, and {} per channel.",
            number(token.scale.mean),
            number(rotated.scale.mean),
            number(channel.scale.mean)
        ),
        _ => String::new(),
    };
    Figure {
        question: "How coarse are two bits?",
        answer,
        panels: vec![
            panel("Keys", &study.keys, &[(channel, plain), (channel, rotated), (token, plain), (token, rotated)]),
            panel("Values", &study.values, &[(token, plain), (token, rotated)]),
        ],
        legend: Vec::new(),
        caption:
            "The step is the distance between two of the four levels that a group can store. A number is off by up to \
                  half a step, so a lower line is a finer copy."
                .into(),
        note: String::new(),
        more: String::new(),
    }
}

/// Errors of methods by layer (figure 5 of the paper).
pub(super) fn layers(study: &Study) -> Figure {
    // The first two quantise keys alike: their lines lie on each other.
    let classes = ["violet wide", "blue", "blue dashed", "red dashed"];
    let panel = |title: &str, of: fn(&PairStudy) -> &[f64], label: &str| {
        let drawn: Vec<Line> = study
            .pairs
            .iter()
            .zip(classes)
            .map(|(pair, class)| Line { name: &pair.notation, class, values: of(pair) })
            .collect();
        (title.to_string(), lines(&drawn, Across::Layers, label, &format!("{title} by layer")))
    };
    let named = |pair: &PairStudy| match &pair.method {
        Some(method) => format!("{} ({method})", notation::html(&pair.notation)),
        None => notation::html(&pair.notation),
    };
    let errors = || study.pairs.iter().map(|pair| pair.output_error.mean);
    let answer = extent(errors()).map_or(String::new(), |[best, worst]| {
        let name = |pair: &PairStudy| pair.method.clone().unwrap_or_else(|| pair.notation.replace('_', ""));
        let near = study.pairs.iter().filter(|pair| pair.output_error.mean <= LEVEL * best);
        let names: Vec<String> = near.map(name).collect();
        let keep = if names.len() == 1 { "keeps" } else { "keep" };
        let names = names.join(" and ");
        format!(
            "{names} {keep} the output of attention best; the worst of the four is off {} as much.",
            times(worst, best)
        )
    });
    Figure {
        question: "Where in the model does the error arise?",
        answer,
        panels: vec![
            panel("Attention weights", |pair| &pair.attention_error.layers, "KL divergence, nats per row"),
            panel("Attention output", |pair| &pair.output_error.layers, "relative squared error"),
        ],
        legend: study.pairs.iter().zip(classes).map(|(pair, class)| line_key(class, &named(pair))).collect(),
        caption:
            "Keys and values are quantised together, and every layer is given exact input, so errors do not add up. \
                  KIVI and KVLinC treat keys alike, which is why their lines lie on each other at the left."
                .into(),
        note: String::new(),
        more: String::new(),
    }
}

fn colour(variant: &VariantStudy) -> &'static str {
    match variant.variant.axis {
        Axis::Channel => "blue",
        Axis::Token => "red",
    }
}

fn dashes(variant: &VariantStudy) -> &'static str {
    match variant.variant.rotation {
        Rotation::None => "solid",
        _ => "dashed",
    }
}
