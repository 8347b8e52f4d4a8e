//! Figures about whole schemes: what they cost and what they save.

use super::figure::{Figure, dot_key, key};
use super::number::{change, context, decimals, number, percent, times};
use super::strips::{Dot, Name, Strip, Ticks, strips};
use super::{reference, tradeoff};
use crate::{Comparison, ComparisonRow};

/// Perplexity above the reference's that still counts as close to it.
const CLOSE: f64 = 1.05;

/// What accuracy costs in bits, as perplexity.
pub(super) fn perplexity(comparison: &Comparison) -> Figure {
    let picture = tradeoff::perplexity(comparison);
    let mut legend = vec![
        dot_key("best", 4.5, "no other scheme is both smaller and better (Pareto front)"),
        dot_key("other", 4.5, "another scheme beats it"),
    ];
    if reference(comparison).is_some() {
        legend.push(key("<path d=\"M1 7H29\" class=\"reference\"/>", "perplexity of the 16-bit cache"));
    }
    if picture.clipped {
        legend.push(key("<path d=\"M15 2l6 10h-12z\" class=\"other\"/>", "above the axis, at the number beside it"));
    }
    Figure {
        question: "How much accuracy does each bit buy?",
        answer: smallest_close(comparison),
        panels: vec![(String::new(), picture.svg)],
        legend,
        caption:
            "Each dot is a scheme: further left is a smaller cache, further down a better guess of the next word. \
                  The line joins the schemes that are worth a choice."
                .into(),
        note: missing(&picture.missing),
        more: String::new(),
    }
}

/// What accuracy costs in bits, as KL divergence.
pub(super) fn divergence(comparison: &Comparison) -> Figure {
    let picture = tradeoff::divergence(comparison);
    let moved = |row: &&ComparisonRow| row.kl_mean > 0.0 && row.kl_mean.is_finite();
    let least = comparison.rows.iter().filter(moved).filter(|row| row.bits < 4.0);
    let answer = match least.min_by(|a, b| a.kl_mean.total_cmp(&b.kl_mean)) {
        Some(row) => format!(
            "Of the schemes below 4 bits, {} moves predictions least: by {} nats a token; {} of the top tokens stay.",
            row.scheme,
            number(row.kl_mean),
            percent(row.top1_agreement)
        ),
        None => "There is no scheme below 4 bits with a divergence to show.".into(),
    };
    Figure {
        question: "How far do predictions move from those of the 16-bit cache?",
        answer,
        panels: vec![(String::new(), picture.svg)],
        legend: vec![
            dot_key("best", 4.5, "on the Pareto front of perplexity"),
            dot_key("other", 4.5, "another scheme beats it there"),
        ],
        caption:
            "KL divergence compares all probabilities of the next token, not only that of the right one, so it shows \
                  small harm earlier than perplexity does. A step down the axis is a scheme whose text differs less."
                .into(),
        note: missing(&picture.missing),
        more: String::new(),
    }
}

/// Bits in use by context length.
pub(super) fn bits(comparison: &Comparison) -> Figure {
    let mut contexts = vec![comparison.context];
    contexts.extend(super::longer_contexts(comparison));
    let longest = *contexts.last().expect("there is one");
    let at = |row: &ComparisonRow, tokens: usize| {
        if tokens == comparison.context { Some(row.bits) } else { row.bits_at(tokens) }
    };
    let class = |index: usize| format!("step{}", if index + 1 == contexts.len() { 3 } else { index.min(2) });
    let strip = |row: &ComparisonRow| {
        let dot = |(index, &tokens): (usize, &usize)| {
            let value = at(row, tokens)?;
            let title = format!("{}: {} bits at {} tokens", row.scheme, decimals(value, 2), context(tokens));
            Some(Dot { value, class: class(index), radius: 5.0, title })
        };
        Strip {
            name: Name::Text(row.scheme.clone()),
            note: contexts
                .iter()
                .filter_map(|tokens| at(row, *tokens))
                .map(|bits| decimals(bits, 2))
                .collect::<Vec<_>>()
                .join(" · "),
            dots: contexts.iter().enumerate().filter_map(dot).collect(),
        }
    };
    let rows: Vec<Strip> = comparison.sorted().into_iter().map(strip).collect();
    let known = comparison.rows.iter().filter_map(|row| at(row, longest).filter(|bits| *bits > 0.0).zip(Some(row)));
    let answer = match known.min_by(|a, b| a.0.total_cmp(&b.0)) {
        Some((bits, row)) => {
            let smaller =
                if bits < 15.0 { format!(", {} smaller than 16 bit", times(16.0, bits)) } else { String::new() };
            let (longest, bits) = (context(longest), decimals(bits, 2));
            format!("At {longest} tokens the smallest cache is {}: {bits} bits a number{smaller}.", row.scheme)
        }
        None => "No scheme has a known size.".into(),
    };
    let description = "Bits for a cached number by context length, one row of dots for each scheme";
    Figure {
        question: "How small does the cache get as the text grows?",
        answer,
        panels: vec![(String::new(), strips(&rows, Ticks::Bits, "bits for a cached number, log scale", description))],
        legend: contexts
            .iter()
            .enumerate()
            .map(|(index, tokens)| dot_key(&class(index), 5.0, &format!("{} tokens", context(*tokens))))
            .collect(),
        caption: "Recent tokens are kept in 16 bit, and their share shrinks as the text grows, so the average falls \
                  towards that of the packed tokens. The numbers at the right are the dots from right to left, scales and \
                  minimums included."
            .into(),
        note: String::new(),
        more: String::new(),
    }
}

/// The smallest scheme that stays close to the reference, in words.
fn smallest_close(comparison: &Comparison) -> String {
    let Some(reference) = reference(comparison) else {
        return "There is no 16-bit cache among the schemes to compare with.".into();
    };
    let others: Vec<&ComparisonRow> =
        comparison.sorted().into_iter().filter(|row| !std::ptr::eq(*row, reference)).collect();
    let exact = number_of(reference.perplexity);
    match others.iter().find(|row| row.perplexity <= CLOSE * reference.perplexity) {
        _ if others.is_empty() => format!("Only the 16-bit cache was measured: perplexity {exact}."),
        Some(row) => format!(
            "{} is the smallest cache within 5\u{a0}% of 16 bit: {} bits, perplexity {} against {exact} ({}).",
            row.scheme,
            decimals(row.bits, 2),
            number_of(row.perplexity),
            change(row.perplexity, reference.perplexity)
        ),
        None => format!("No scheme stays within 5\u{a0}% of the 16-bit cache and its perplexity of {exact}."),
    }
}

fn number_of(perplexity: f64) -> String {
    decimals(perplexity, 2)
}

fn missing(schemes: &[String]) -> String {
    if schemes.is_empty() { String::new() } else { format!("Not shown: {}.", schemes.join("; ")) }
}
