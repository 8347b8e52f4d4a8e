//! Pages to read, of a comparison of schemes and of their throughput: HTML with inline SVG, without scripts and without
//! other files.

mod ablation;
mod bands;
mod correction;
mod family;
mod features;
mod figure;
mod glossary;
mod label;
mod lines;
mod mechanism;
mod notation;
mod number;
mod ranges;
mod scale;
mod schemes;
mod sheet;
mod strips;
mod svg;
mod table;
mod throughput;
mod tradeoff;

use crate::study::Study;
use crate::{Comparison, ComparisonRow};
use number::count;
use std::collections::BTreeSet;
use std::fmt::Write;
use svg::escape;
pub use throughput::{throughput_html, throughput_svg};

/// The page: the table of schemes, what they cost in accuracy and save in bits, what the linear correction does where
/// schemes have one (tables 3 and 4 and figures 5 and 6 of the KVLinC paper), and what quantisation does to the keys and
/// values of the model (figures 2 to 5). Text of the comparison is escaped.
pub fn html(comparison: &Comparison, study: &Study) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta name=\"color-scheme\" content=\"light dark\">\n\
         <title>{model}: cache schemes compared</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n\
         <h1>What a smaller cache costs {model}</h1>\n\
         <p class=\"lead\">A language model keeps the keys and values of every token that it has read. Stored in two bits a \
         number instead of sixteen, those of a long text take a seventh of the memory. This page shows what that costs in accuracy, scheme by \
         scheme, and why.</p>\n{facts}",
        model = escape(&comparison.model),
        style = include_str!("style.css"),
        facts = facts(comparison, study),
    );
    let _ = write!(
        page,
        "<h2>The schemes</h2>\n<p>Smallest cache first. Shaded schemes are on the Pareto front: no other one is both smaller \
         and better.</p>\n{}<div class=\"pair\">\n{}{}</div>\n{}",
        table::table(comparison),
        schemes::perplexity(comparison).html(),
        schemes::divergence(comparison).html(),
        schemes::bits(comparison).html(),
    );
    page += &correction::section(comparison, study);
    let _ = write!(
        page,
        "<h2>Why schemes differ</h2>\n<p>The keys and values of the model itself, for {} tokens of the text. They are \
         quantised to {} bits, {} tokens of a channel or {} channels of a token at a time, without a window of recent tokens; \
         so errors are larger than those of a scheme. Attention is measured at {}, in all heads. The pictures follow figures 2 \
         to 5 of the KVLinC paper, arXiv 2510.05373.</p>\n",
        count(study.shape.tokens),
        study.bits,
        study.group_tokens,
        study.group_channels,
        every(study.query_stride),
    );
    for figure in [mechanism::spread(study), mechanism::grid(study), mechanism::steps(study), mechanism::layers(study)]
    {
        page.push_str(&figure.html());
    }
    let _ = write!(
        page,
        "<h2>Terms</h2>\n{}<footer>Made by <code>dibit compare</code>. Everything on this page is in this one file.</footer>\n\
         </main>\n</body>\n</html>\n",
        glossary::glossary(),
    );
    page
}

/// What was measured.
fn facts(comparison: &Comparison, study: &Study) -> String {
    let shape = study.shape;
    let windows = if comparison.windows == 1 { "window" } else { "windows" };
    let mut facts = vec![
        ("Model", comparison.model.clone()),
        ("Text", comparison.text.clone()),
        ("Read", format!("{} {windows} of {} tokens", count(comparison.windows), count(comparison.context))),
        ("Scored", format!("{} tokens", count(comparison.tokens))),
        (
            "Cached for each token",
            format!(
                "{} layers, {} KV heads of {} channels",
                count(study.layers),
                count(shape.num_key_value_heads),
                count(shape.head_dim)
            ),
        ),
    ];
    let lengths: Vec<String> = comparison.retrieval_contexts().into_iter().map(count).collect();
    if !lengths.is_empty() {
        facts.push(("Retrieval prompts", format!("{} tokens", lengths.join(", "))));
    }
    let fact = |(name, value): &(&str, String)| format!("<div><dt>{name}</dt><dd>{}</dd></div>\n", escape(value));
    format!("<dl class=\"facts\">\n{}</dl>\n", facts.iter().map(fact).collect::<String>())
}

fn every(stride: usize) -> String {
    if stride == 1 { "every token".into() } else { format!("one token in {}", count(stride)) }
}

/// The row that others are measured against: the 16-bit cache.
fn reference(comparison: &Comparison) -> Option<&ComparisonRow> {
    comparison.rows.iter().find(|row| row.scheme == "fp16" && row.perplexity.is_finite())
}

/// The contexts of `bits_at` besides the measured one.
fn longer_contexts(comparison: &Comparison) -> Vec<usize> {
    let contexts: BTreeSet<usize> = comparison.rows.iter().flat_map(|row| row.bits_at.iter().map(|at| at.0)).collect();
    contexts.into_iter().filter(|tokens| *tokens > comparison.context).collect()
}

#[cfg(test)]
mod tests;
