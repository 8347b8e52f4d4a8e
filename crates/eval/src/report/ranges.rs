//! What a correction of some layers brings (table 4 of the KVLinC paper).

use super::family::{families, gain, uncorrected};
use super::number::{UNKNOWN, context, count, decimals, number, percent};
use super::sheet::{Sheet, SheetRow, plain};
use super::svg::escape;
use crate::{Comparison, ComparisonRow, LinearChoice};

/// A table for each family of schemes that differ in nothing but the layers that are corrected.
pub(super) fn ranges(comparison: &Comparison) -> String {
    let all = families(comparison, |choices| {
        let own = choices.correction.as_ref()?;
        Some((choices.others.clone(), choices.rotated_values, own.features))
    });
    all.into_iter().filter_map(|family| table(comparison, family)).collect()
}

fn table(comparison: &Comparison, family: Vec<&ComparisonRow>) -> Option<String> {
    let mut shown: Vec<(&ComparisonRow, &LinearChoice)> =
        family.into_iter().filter_map(|row| Some((row, row.choices.correction.as_ref()?))).collect();
    // Short ranges first, then from the input to the output.
    shown.sort_by(|(_, a), (_, b)| a.layers.len().cmp(&b.layers.len()).then_with(|| a.layers.cmp(&b.layers)));
    shown.dedup_by(|(_, a), (_, b)| a.layers == b.layers);
    let [(first, _), _, ..] = shown[..] else { return None };
    let bare = uncorrected(comparison, &first.choices);
    let gained = |of: fn(&ComparisonRow) -> f64, row: &ComparisonRow| bare.map(|bare| gain(of(bare), of(row)));
    let heads = [
        ("Corrected layers", String::new()),
        ("Bits", format!("at {}", context(comparison.context))),
        ("Perplexity", String::new()),
        ("Gain", "in perplexity".into()),
        ("KL mean", "nats".into()),
        ("Gain", "in KL".into()),
    ];
    let row = |(row, own): &(&ComparisonRow, &LinearChoice)| {
        let share = |gain: Option<f64>| plain(gain.map_or(UNKNOWN.into(), percent));
        SheetRow {
            best: false,
            name: (layers(own), row.scheme.clone()),
            cells: vec![
                plain(decimals(row.bits, 2)),
                plain(decimals(row.perplexity, 2)),
                share(gained(|row| row.perplexity, row)),
                plain(number(row.kl_mean)),
                share(gained(|row| row.kl_mean, row)),
            ],
        }
    };
    let parts: Vec<_> = shown.iter().filter(|(_, own)| !own.is_everywhere()).collect();
    let best = parts.iter().filter_map(|(row, own)| Some((gained(|row| row.kl_mean, row)?, own)));
    let best = best.filter(|(gain, _)| gain.is_finite()).max_by(|a, b| a.0.total_cmp(&b.0));
    let answer = match (best, bare) {
        (Some((gain, own)), Some(bare)) => format!(
            "<p class=\"answer\">Of the parts of the model, layers {} gain most: {} of the KL divergence of {}.</p>\n",
            layers(own),
            percent(gain),
            escape(&bare.scheme)
        ),
        _ => String::new(),
    };
    let rows = shown.iter().map(row).collect();
    let heads = heads.into_iter().map(|(head, unit)| (head.to_string(), unit)).collect();
    let sheet = Sheet { label: "Gain by the range of corrected layers", heads, rows };
    Some(format!("<h3>Which layers gain from the correction?</h3>\n{answer}{}", sheet.html()))
}

/// Corrected layers as ranges, both ends included.
fn layers(own: &LinearChoice) -> String {
    if own.is_everywhere() {
        return "all".into();
    }
    let range = |range: std::ops::RangeInclusive<usize>| match (*range.start(), *range.end()) {
        (start, end) if start == end => count(start),
        (start, end) => format!("{}–{}", count(start), count(end)),
    };
    own.ranges().into_iter().map(range).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::tests::{corrected, plain};
    use crate::comparison::tests::{comparison, row};

    fn with(scheme: &str, perplexity: f64, kl_mean: f64, layers: Vec<usize>) -> ComparisonRow {
        ComparisonRow { kl_mean, choices: corrected(true, 64, layers), ..row(scheme, 3.0, perplexity) }
    }

    #[test]
    fn gains_are_against_the_scheme_without_a_correction() {
        let mut rows = vec![
            with("everywhere", 9.0, 0.02, vec![0, 1, 2, 3]),
            with("late", 9.8, 0.036, vec![2, 3]),
            with("early", 9.5, 0.03, vec![0, 1]),
            with("ends", 9.6, 0.032, vec![0, 2, 3]),
        ];
        rows.push(ComparisonRow { kl_mean: 0.04, choices: plain(true), ..row("rotation", 3.0, 10.0) });
        let html = ranges(&comparison(rows));
        let names: Vec<&str> =
            html.split("<th scope=\"row\">").skip(1).map(|row| row.split('<').next().unwrap()).collect();
        assert_eq!(names, ["0–1", "2–3", "0, 2–3", "all"]);
        let early = "0–1<small>early</small></th><td>3.00</td><td>9.50</td><td>5.0\u{a0}%</td><td>0.0300</td>\
            <td>25.0\u{a0}%</td>";
        assert!(html.contains(early), "{html}");
        assert!(html.contains("layers 0–1 gain most: 25.0\u{a0}% of the KL divergence of rotation"), "{html}");
    }

    #[test]
    fn one_range_makes_no_table_and_gains_may_be_unknown() {
        assert_eq!(ranges(&comparison(vec![with("everywhere", 9.0, 0.02, vec![0, 1, 2, 3])])), "");
        let html = ranges(&comparison(vec![with("a", 9.0, 0.02, vec![0]), with("b", 9.0, 0.02, vec![1])]));
        assert!(html.contains("<td>9.00</td><td>–</td>") && !html.contains("answer"), "{html}");
    }
}
