//! Rotation of values and linear correction, each alone and both (table 3 of the KVLinC paper).

use super::family::families;
use super::number::{change, context, count, decimals, number};
use super::sheet::{Sheet, SheetRow, plain};
use super::svg::escape;
use super::table::{retrieval_cells, retrieval_heads};
use crate::{Comparison, ComparisonRow};
use std::cmp::Reverse;

/// D of the paper.
const FEATURES: usize = 256;

/// A table for each family of schemes that shows at least two of the four combinations, one of them corrected.
pub(super) fn ablation(comparison: &Comparison) -> String {
    let all = families(comparison, |choices| Some(choices.others.clone()));
    all.iter().filter_map(|family| table(comparison, family)).collect()
}

fn table(comparison: &Comparison, family: &[&ComparisonRow]) -> Option<String> {
    let combinations = [(false, false), (false, true), (true, false), (true, true)];
    let shown: Vec<&ComparisonRow> =
        combinations.into_iter().filter_map(|(rotated, corrected)| chosen(family, rotated, corrected)).collect();
    if shown.len() < 2 || shown.iter().all(|row| row.choices.correction.is_none()) {
        return None;
    }
    let bare = shown[0];
    let mut heads: Vec<(String, String)> = vec![
        ("Scheme".into(), String::new()),
        ("Bits".into(), format!("at {}", context(comparison.context))),
        ("Perplexity".into(), format!("against {}", bare.scheme)),
        ("KL mean".into(), "nats".into()),
    ];
    heads.extend(retrieval_heads(comparison));
    let row = |row: &&ComparisonRow| {
        let against = |value: f64, other: f64| match std::ptr::eq(*row, bare) {
            true => String::new(),
            false => change(value, other),
        };
        let mut cells = vec![
            plain(decimals(row.bits, 2)),
            (decimals(row.perplexity, 2), against(row.perplexity, bare.perplexity)),
            (number(row.kl_mean), against(row.kl_mean, bare.kl_mean)),
        ];
        cells.extend(retrieval_cells(comparison, row));
        SheetRow { best: false, name: (row.scheme.clone(), words(row)), cells }
    };
    let rows = shown.iter().map(row).collect();
    let sheet = Sheet { label: "Rotation of values and linear correction", heads, rows };
    Some(format!("<p class=\"answer\">{}</p>\n{}", escape(&answer(&shown)), sheet.html()))
}

/// The row of a combination: where several are corrected, one that is so in all layers, with the paper's number of
/// features or the largest.
fn chosen<'a>(family: &[&'a ComparisonRow], rotated: bool, corrected: bool) -> Option<&'a ComparisonRow> {
    let suits =
        |row: &&&ComparisonRow| row.choices.rotated_values == rotated && row.choices.correction.is_some() == corrected;
    let rank = |row: &&&ComparisonRow| {
        row.choices
            .correction
            .as_ref()
            .map(|own| (Reverse(own.layers.len()), Reverse(own.features == FEATURES), Reverse(own.features)))
    };
    family.iter().filter(suits).min_by_key(rank).copied()
}

fn words(row: &ComparisonRow) -> String {
    let values = if row.choices.rotated_values { "values rotated" } else { "values as they are" };
    match &row.choices.correction {
        Some(own) => format!("{values}, linear correction with D = {}", count(own.features)),
        None => format!("{values}, no correction"),
    }
}

/// What each step brings, in words.
fn answer(shown: &[&ComparisonRow]) -> String {
    let bare = shown[0];
    let part = |row: &&ComparisonRow| format!("{} with {}", change(row.kl_mean, bare.kl_mean), row.scheme);
    let parts: Vec<String> = shown[1..].iter().map(part).collect();
    format!("KL divergence against that of {}: {}.", bare.scheme, parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Choices;
    use crate::choices::tests::{corrected, plain};
    use crate::comparison::tests::{comparison, row};

    fn with(scheme: &str, perplexity: f64, kl_mean: f64, choices: Choices) -> ComparisonRow {
        ComparisonRow { kl_mean, choices, ..row(scheme, 3.0, perplexity) }
    }

    #[test]
    fn the_four_combinations_come_in_the_order_of_the_paper() {
        let all = || (0..4).collect();
        let mut rows = vec![
            with("both", 8.0, 0.01, corrected(true, 256, all())),
            with("fewer features", 8.5, 0.015, corrected(true, 512, all())),
            with("some layers", 8.5, 0.015, corrected(true, 256, vec![0])),
            with("kivi", 10.0, 0.04, plain(false)),
            with("rotation", 9.0, 0.02, plain(true)),
            with("linc", 9.5, 0.03, corrected(false, 64, all())),
            row("fp16", 16.0, 7.0),
        ];
        rows[3].retrieval_at = vec![(2048, 0.75), (4096, 0.25)];
        let html = ablation(&comparison(rows));
        let names: Vec<&str> =
            html.split("<th scope=\"row\">").skip(1).map(|row| row.split('<').next().unwrap()).collect();
        assert_eq!(names, ["kivi", "linc", "rotation", "both"]);
        assert!(html.contains("values as they are, linear correction with D = 64"));
        assert!(html.contains("<td>10.00</td><td>0.0400</td><td>75.0\u{a0}%</td><td>25.0\u{a0}%</td>"), "{html}");
        assert!(html.contains("<td>8.00<small>-20.0\u{a0}%</small></td><td>0.0100<small>-75.0\u{a0}%</small></td>"));
        assert!(html.contains("at 2k") && html.contains("at 4k"));
        assert!(html.contains("of kivi: -25.0\u{a0}% with linc, -50.0\u{a0}% with rotation, -75.0\u{a0}% with both."));
    }

    #[test]
    fn without_a_correction_or_something_to_compare_it_with_there_is_no_table() {
        let rows = vec![with("kivi", 10.0, 0.04, plain(false)), with("rotation", 9.0, 0.02, plain(true))];
        assert_eq!(ablation(&comparison(rows)), "");
        let mut alone = corrected(true, 256, vec![0]);
        alone.others = "another window".into();
        let rows = vec![with("kivi", 10.0, 0.04, plain(false)), with("both", 9.0, 0.02, alone)];
        assert_eq!(ablation(&comparison(rows)), "");
        assert_eq!(ablation(&comparison(vec![])), "");
    }
}
