//! The table of schemes.

use super::number::{UNKNOWN, bytes, change, context, decimals, number, percent};
use super::svg::escape;
use crate::{Comparison, ComparisonRow};
use std::fmt::Write;

/// All figures of all schemes, by ascending bits.
pub(super) fn table(comparison: &Comparison) -> String {
    let reference = super::reference(comparison);
    let pareto = comparison.pareto();
    let retrieval = comparison.rows.iter().any(|row| row.retrieval.is_some());
    let attention = comparison.rows.iter().any(|row| row.attention_micros.is_some());
    let longest = super::longer_contexts(comparison).last().copied();
    let mut heads = vec![("Scheme", String::new()), ("Bits", format!("at {}", context(comparison.context)))];
    heads.extend(longest.map(|tokens| ("Bits", format!("at {}", context(tokens)))));
    heads.extend([
        ("Perplexity", reference.map_or(String::new(), |row| format!("against {}", row.scheme))),
        ("KL mean", "nats".into()),
        ("KL 99.9 %", "nats".into()),
        ("Same top", "token".into()),
    ]);
    if retrieval {
        heads.push((
            "Retrieval",
            comparison.retrieval_context.map_or(String::new(), |at| format!("at {}", context(at))),
        ));
    }
    heads.push(("Cache", format!("at {}", context(comparison.context))));
    if attention {
        heads.push(("Attention", "per step".into()));
    }
    let mut html = String::from(
        "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"Table of schemes\"><table>\n<thead><tr>",
    );
    for (head, unit) in &heads {
        let _ = write!(html, "<th scope=\"col\">{head}<small>{}</small></th>", escape(unit));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in comparison.sorted() {
        let best = pareto.iter().any(|other| std::ptr::eq(*other, row));
        let _ = write!(
            html,
            "<tr{}><th scope=\"row\">{}<small>{}</small></th>",
            if best { " class=\"best\"" } else { "" },
            escape(&row.scheme),
            escape(&row.summary)
        );
        for (figure, small) in cells(row, reference, longest, retrieval, attention) {
            let small = if small.is_empty() { small } else { format!("<small>{}</small>", escape(&small)) };
            let _ = write!(html, "<td>{}{small}</td>", escape(&figure));
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
    html
}

/// The cells of a row behind its name: a figure, and a second one in small print.
fn cells(
    row: &ComparisonRow,
    reference: Option<&ComparisonRow>,
    longest: Option<usize>,
    retrieval: bool,
    attention: bool,
) -> Vec<(String, String)> {
    let plain = |text: String| (text, String::new());
    let mut cells = vec![plain(decimals(row.bits, 2))];
    cells.extend(longest.map(|at| plain(row.bits_at(at).map_or(UNKNOWN.into(), |bits| decimals(bits, 2)))));
    let against = reference.filter(|reference| !std::ptr::eq(*reference, row));
    let against = against.map_or(String::new(), |reference| change(row.perplexity, reference.perplexity));
    cells.push((decimals(row.perplexity, 2), against));
    cells.extend([row.kl_mean, row.kl_p999].map(|nats| plain(number(nats))));
    cells.push(plain(percent(row.top1_agreement)));
    if retrieval {
        cells.push(plain(row.retrieval.map_or(UNKNOWN.into(), percent)));
    }
    cells.push(plain(bytes(row.cache_bytes)));
    if attention {
        cells.push(plain(
            row.attention_micros
                .filter(|x| x.is_finite())
                .map_or(UNKNOWN.into(), |micros| format!("{} µs", number(micros))),
        ));
    }
    cells
}
