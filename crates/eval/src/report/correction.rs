//! The linear correction: what it does to attention, what it brings and what it costs.

use super::family::gain;
use super::figure::{Figure, dot_key, line_key, pair};
use super::lines::{Across, Line, lines};
use super::number::{context, decimals, percent};
use super::strips::{Dot, Name, Strip, Ticks, strips};
use super::{ablation, features, ranges, svg::escape};
use crate::study::{ByLayer, CorrectionStudy, Study};
use crate::{Comparison, ComparisonRow, LinearChoice};

/// The part of the page that is there where a scheme has a correction with adapters; else empty.
pub(super) fn section(comparison: &Comparison, study: &Study) -> String {
    let corrected: Vec<(&ComparisonRow, &LinearChoice)> =
        comparison.rows.iter().filter_map(|row| Some((row, row.choices.correction.as_ref()?))).collect();
    if corrected.is_empty() {
        return String::new();
    }
    let mut html = String::from(
        "<h2>The linear correction</h2>\n<p>KVLinC keeps a small state for each head that sums up what the codes of all \
         packed keys miss. Trained adapters turn it into weight that is given back to attention. The tables and pictures \
         follow tables 3 and 4 and figures 5 and 6 of the paper, arXiv 2510.05373.</p>\n",
    );
    html += &ablation::ablation(comparison);
    html += &ranges::ranges(comparison);
    for figure in attention(study).into_iter().chain(features::features(comparison)).chain([cost(&corrected)]) {
        html += &figure.html();
    }
    html
}

/// Attention by layer, before and after (figure 5 of the paper).
fn attention(study: &Study) -> Option<Figure> {
    let (first, others) = study.corrections.split_first()?;
    let others: String = others
        .iter()
        .map(|own| format!("<h3>{}</h3>\n{}", escape(&own.scheme), pair(&attention_panels(own))))
        .collect();
    let less = |before: &ByLayer, after: &ByLayer| percent(gain(before.mean, after.mean));
    Some(Figure {
        question: "How much of the error of attention does the correction take away?",
        answer: format!(
            "Of the divergence of attention rows, the correction of {} takes away {}, and {} of the error of outputs, over all layers.",
            first.scheme,
            less(&first.attention_before, &first.attention_after),
            less(&first.output_before, &first.output_after)
        ),
        panels: attention_panels(first),
        legend: vec![
            line_key("red dashed", "the quantiser alone"),
            line_key("blue", "with the correction"),
            line_key("violet", "taken away, of the divergence of weights"),
            line_key("violet dashed", "taken away, of the error of outputs"),
        ],
        caption: "Every layer is given exact input, and a query sees packed tokens where the scheme's window shows them. The \
                  output is compared with that of exact keys and values, so errors of values count too."
            .into(),
        note: format!("Shown: {}.", first.scheme),
        more: if others.is_empty() {
            others
        } else {
            format!("<details><summary>The other schemes with a correction</summary>\n{others}</details>\n")
        },
    })
}

fn attention_panels(own: &CorrectionStudy) -> Vec<(String, String)> {
    let panel = |title: &str, [before, after]: [&ByLayer; 2], label: &str| {
        let drawn = [
            Line { name: "quantiser alone", class: "red dashed", values: &before.layers },
            Line { name: "corrected", class: "blue", values: &after.layers },
        ];
        let description = format!("{title} of {} by layer, before and after the correction", own.scheme);
        (title.to_string(), lines(&drawn, Across::Layers, label, &description))
    };
    let gains = |before: &ByLayer, after: &ByLayer| -> Vec<f64> {
        before.layers.iter().zip(&after.layers).map(|(before, after)| 100.0 * gain(*before, *after)).collect()
    };
    let (weights, outputs) =
        (gains(&own.attention_before, &own.attention_after), gains(&own.output_before, &own.output_after));
    let drawn = [
        Line { name: "attention weights", class: "violet", values: &weights },
        Line { name: "attention output", class: "violet dashed", values: &outputs },
    ];
    let description = format!("Share of the error of {} that the correction takes away, by layer", own.scheme);
    vec![
        panel("Attention weights", [&own.attention_before, &own.attention_after], "KL divergence, nats per row"),
        panel("Attention output", [&own.output_before, &own.output_after], "relative squared error"),
        ("What is taken away".into(), lines(&drawn, Across::SignedLayers, "percent of the error", &description)),
    ]
}

/// Share of the cache that the states take, by context length.
fn cost(corrected: &[(&ComparisonRow, &LinearChoice)]) -> Figure {
    let contexts: Vec<usize> =
        corrected.first().map_or(Vec::new(), |(_, own)| own.state_bits_at.iter().map(|at| at.0).collect());
    let shares = |own: &LinearChoice| -> Vec<(usize, f64)> {
        let pairs = own.state_bits_at.iter().zip(&own.bits_at);
        pairs.map(|((tokens, states), (_, all))| (*tokens, states / all)).collect()
    };
    let strip = |(row, own): &(&ComparisonRow, &LinearChoice)| {
        let shares = shares(own);
        let dot = |(index, (tokens, share)): (usize, &(usize, f64))| Dot {
            value: 100.0 * share,
            class: step(index, shares.len()),
            radius: 5.0,
            title: format!("{}: {} of the cache at {} tokens", row.scheme, percent(*share), context(*tokens)),
        };
        let note: Vec<String> = shares.iter().map(|(_, share)| short(100.0 * share)).collect();
        Strip {
            name: Name::Text(row.scheme.clone()),
            note: format!("{}\u{a0}%", note.join(" · ")),
            dots: shares.iter().enumerate().map(dot).collect(),
        }
    };
    let rows: Vec<Strip> = corrected.iter().map(strip).collect();
    let largest = corrected.iter().max_by(|a, b| largest_share(a.1).total_cmp(&largest_share(b.1)));
    let answer = largest.and_then(|(row, own)| {
        let shares = shares(own);
        let most = shares.iter().max_by(|a, b| a.1.total_cmp(&b.1))?;
        let last = shares.last()?;
        let (at, longest) = (context(most.0), context(last.0));
        let (most, last) = (percent(most.1), percent(last.1));
        Some(format!("The states of {} take {most} of its cache at {at} tokens, and {last} at {longest}.", row.scheme))
    });
    let description = "Share of the cache that the states of the correction take, by context length";
    Figure {
        question: "What does the correction cost?",
        answer: answer.unwrap_or_default(),
        panels: vec![(String::new(), strips(&rows, Ticks::Round, "percent of the bits in use, log scale", description))],
        legend: contexts
            .iter()
            .enumerate()
            .map(|(index, tokens)| {
                dot_key(&step(index, contexts.len()), 5.0, &format!("{} tokens", context(*tokens)))
            })
            .collect(),
        caption: "States have one size however long the text is, so they cost most where it is short. They are there from \
                  the first packed token on. The numbers at the right are the shares from the shortest text to the longest."
            .into(),
        note: String::new(),
        more: String::new(),
    }
}

fn largest_share(own: &LinearChoice) -> f64 {
    own.state_bits_at.iter().zip(&own.bits_at).map(|(states, all)| states.1 / all.1).fold(0.0, f64::max)
}

/// Percent with as many decimals as matter.
fn short(percent: f64) -> String {
    decimals(percent, usize::from(percent < 9.95))
}

/// Shade of a dot: four of them, the last for the longest context.
fn step(index: usize, count: usize) -> String {
    format!("step{}", if index + 1 == count { 3 } else { index.min(2) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choices::tests::{corrected, plain};
    use crate::comparison::tests::{comparison, row};
    use crate::study::tests::small;

    fn study_of(scheme: &str) -> CorrectionStudy {
        let layers = |layers: [f64; 2]| layers.into_iter().collect::<ByLayer>();
        CorrectionStudy {
            scheme: scheme.into(),
            features: 256,
            attention_before: layers([0.4, 0.2]),
            attention_after: layers([0.3, 0.15]),
            output_before: layers([0.02, 0.02]),
            output_after: layers([0.01, 0.02]),
        }
    }

    #[test]
    fn attention_is_shown_by_layer_before_and_after() {
        let mut study = small(2);
        study.corrections = vec![study_of("kvlinc"), study_of("<second>")];
        let figure = attention(&study).unwrap();
        assert!(figure.answer.contains("of kvlinc takes away 25.0\u{a0}%, and 25.0\u{a0}% of the error of outputs"));
        for title in ["quantiser alone, layer 1: 0.200", "corrected, layer 0: 0.300"] {
            assert!(figure.panels[0].1.contains(title), "{title}");
        }
        assert!(figure.panels[1].1.contains("corrected, layer 0: 0.0100"));
        assert!(figure.panels[2].1.contains("attention weights, layer 0: 25.0"));
        assert!(figure.panels[2].1.contains("attention output, layer 1: 0"));
        assert!(figure.more.contains("<h3>&lt;second&gt;</h3>"));
        assert!(attention(&small(1)).is_none());
    }

    #[test]
    fn states_are_a_share_of_the_bits() {
        let rows = [ComparisonRow { choices: corrected(true, 256, vec![0]), ..row("kvlinc", 3.0, 80.0) }];
        let pairs: Vec<_> = rows.iter().map(|row| (row, row.choices.correction.as_ref().unwrap())).collect();
        let figure = cost(&pairs);
        let expected = "The states of kvlinc take 33.3\u{a0}% of its cache at 1k tokens, and 9.1\u{a0}% at 8k.";
        assert_eq!(figure.answer, expected);
        assert!(figure.panels[0].1.contains("kvlinc: 9.1\u{a0}% of the cache at 8k tokens"));
        assert!(figure.panels[0].1.contains("33 · 9.1\u{a0}%"));
        assert_eq!(figure.legend.len(), 2);
    }

    #[test]
    fn without_a_correction_there_is_no_section() {
        let study = small(1);
        assert_eq!(section(&comparison(vec![]), &study), "");
        let bare = ComparisonRow { choices: plain(true), ..row("kvlinc", 3.0, 80.0) };
        assert_eq!(section(&comparison(vec![bare.clone()]), &study), "");
        let one = ComparisonRow { choices: corrected(true, 64, vec![0]), ..row("corrected", 3.5, 79.0) };
        let html = section(&comparison(vec![bare, one]), &study);
        assert!(html.contains("The linear correction") && html.contains("What does the correction cost?"));
        // Two schemes make the table of combinations; there is no sweep of features and no second range.
        assert!(html.contains("values rotated, no correction"));
        assert!(!html.contains("How many features") && !html.contains("Which layers gain"));
    }
}
