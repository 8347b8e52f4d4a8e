//! What the number of features of a correction brings (figure 6 of the KVLinC paper).

use super::family::{families, uncorrected};
use super::figure::{Figure, line_key};
use super::lines::{Across, Line, lines};
use super::number::{change, count};
use crate::{Comparison, ComparisonRow};

/// A figure for each family of schemes that differ in nothing but their features.
pub(super) fn features(comparison: &Comparison) -> Vec<Figure> {
    let all = families(comparison, |choices| {
        let own = choices.correction.as_ref()?;
        Some((choices.others.clone(), choices.rotated_values, own.layers.clone()))
    });
    all.into_iter().filter_map(|family| figure(comparison, family)).collect()
}

fn number_of(row: &ComparisonRow) -> usize {
    row.choices.correction.as_ref().map_or(0, |own| own.features)
}

fn figure(comparison: &Comparison, mut family: Vec<&ComparisonRow>) -> Option<Figure> {
    family.sort_by_key(|row| number_of(row));
    family.dedup_by_key(|row| number_of(row));
    let [first, .., last] = family[..] else { return None };
    let sizes: Vec<usize> = family.iter().map(|row| number_of(row)).collect();
    let bare = uncorrected(comparison, &first.choices);
    let panel = |title: &str, of: fn(&ComparisonRow) -> f64, label: &str| {
        let values: Vec<f64> = family.iter().map(|row| of(row)).collect();
        let level: Vec<f64> = bare.iter().flat_map(|bare| vec![of(bare); sizes.len()]).collect();
        let name = bare.map_or("", |bare| &bare.scheme);
        let mut drawn = vec![Line { name: "corrected", class: "blue", values: &values }];
        if bare.is_some() {
            drawn.push(Line { name, class: "red dashed", values: &level });
        }
        let description = format!("{title} by the features of the correction");
        (title.to_string(), lines(&drawn, Across::Features(&sizes), label, &description))
    };
    let best = family.iter().filter(|row| row.kl_mean.is_finite()).min_by(|a, b| a.kl_mean.total_cmp(&b.kl_mean));
    let answer = match (best, bare) {
        (Some(best), Some(bare)) => {
            let against = |row: &ComparisonRow| change(row.kl_mean, bare.kl_mean);
            let other = |row: &&ComparisonRow| number_of(row) != number_of(best);
            let ends: Vec<String> = [first, last]
                .into_iter()
                .filter(other)
                .map(|row| format!(" With D = {}: {}.", count(number_of(row)), against(row)))
                .collect();
            let size = count(number_of(best));
            format!(
                "KL divergence is lowest with D = {size}: {} against {}.{}",
                against(best),
                bare.scheme,
                ends.concat()
            )
        }
        (Some(best), None) => format!("KL divergence is lowest with D = {}.", count(number_of(best))),
        (None, _) => String::new(),
    };
    let names: Vec<&str> = family.iter().map(|row| &row.scheme[..]).collect();
    let mut legend = vec![line_key("blue", "with the correction")];
    legend.extend(bare.map(|bare| line_key("red dashed", &super::svg::escape(&format!("{}, without", bare.scheme)))));
    Some(Figure {
        question: "How many features does the correction need?",
        answer,
        panels: vec![
            panel("Perplexity", |row| row.perplexity, "perplexity (lower is better)"),
            panel("KL divergence", |row| row.kl_mean, "nats per token"),
        ],
        legend,
        caption: format!(
            "The states of a correction grow with D, and so does their cost; figure 6 of the KVLinC paper. Schemes: {}.",
            names.join(", ")
        ),
        note: String::new(),
        more: String::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Choices;
    use crate::choices::tests::{corrected, plain};
    use crate::comparison::tests::{comparison, row};

    fn with(scheme: &str, kl_mean: f64, choices: Choices) -> ComparisonRow {
        ComparisonRow { kl_mean, choices, ..row(scheme, 3.0, 80.0 + kl_mean) }
    }

    #[test]
    fn features_are_set_against_the_scheme_without_a_correction() {
        let all = || (0..4).collect();
        let rows = vec![
            with("d64", 0.03, corrected(true, 64, all())),
            with("d32", 0.04, corrected(true, 32, all())),
            with("d32 again", 0.04, corrected(true, 32, all())),
            with("d1024", 0.02, corrected(true, 1024, all())),
            with("rotation", 0.08, plain(true)),
            with("not rotated", 0.07, corrected(false, 64, all())),
            with("some layers", 0.06, corrected(true, 64, vec![1])),
        ];
        let figures = features(&comparison(rows));
        assert_eq!(figures.len(), 1);
        let figure = &figures[0];
        assert!(figure.answer.starts_with("KL divergence is lowest with D = 1,024: -75.0\u{a0}% against rotation."));
        assert!(figure.answer.ends_with(" With D = 32: -50.0\u{a0}%."), "{}", figure.answer);
        assert!(!figure.answer.contains("With D = 1,024"), "{}", figure.answer);
        assert!(figure.caption.contains("d32, d64, d1024."), "{}", figure.caption);
        let svg = &figure.panels[1].1;
        assert_eq!(svg.matches("<circle").count(), 6);
        for title in ["corrected, D = 64: 0.0300", "rotation, D = 1,024: 0.0800"] {
            assert!(svg.contains(title), "{title} {svg}");
        }
        for tick in ["32", "64", "1,024"] {
            assert!(svg.contains(&format!("class=\"tick\">{tick}</text>")), "{tick}");
        }
    }

    #[test]
    fn one_number_of_features_makes_no_figure() {
        let rows = vec![with("d64", 0.03, corrected(true, 64, vec![0])), with("rotation", 0.08, plain(true))];
        assert!(features(&comparison(rows)).is_empty());
        // The figure needs no scheme without a correction.
        let two = vec![
            with("d64", f64::NAN, corrected(true, 64, vec![0])),
            with("d128", f64::NAN, corrected(true, 128, vec![0])),
        ];
        let figures = features(&comparison(two));
        assert!(figures[0].answer.is_empty() && figures[0].legend.len() == 1);
    }
}
