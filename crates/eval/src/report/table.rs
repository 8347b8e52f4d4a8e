//! The table of schemes.

use super::number::{UNKNOWN, bytes, change, context, decimals, number, percent};
use super::sheet::{Sheet, SheetRow, plain};
use crate::{Comparison, ComparisonRow};

/// All figures of all schemes, by ascending bits.
pub(super) fn table(comparison: &Comparison) -> String {
    let reference = super::reference(comparison);
    let pareto = comparison.pareto();
    let attention = comparison.rows.iter().any(|row| row.attention_micros.is_some());
    let longest = super::longer_contexts(comparison).last().copied();
    let at = format!("at {}", context(comparison.context));
    let mut heads = vec![("Scheme", String::new()), ("Bits", at.clone())];
    heads.extend(longest.map(|tokens| ("Bits", format!("at {}", context(tokens)))));
    heads.extend([
        ("Perplexity", reference.map_or(String::new(), |row| format!("against {}", row.scheme))),
        ("KL mean", "nats".into()),
        ("KL 99.9 %", "nats".into()),
        ("Same top", "token".into()),
    ]);
    let mut heads: Vec<(String, String)> = heads.into_iter().map(|(head, unit)| (head.to_string(), unit)).collect();
    heads.extend(retrieval_heads(comparison));
    heads.push(("Cache".into(), at));
    if attention {
        heads.push(("Attention".into(), "per step".into()));
    }
    let row = |row: &ComparisonRow| {
        let mut cells = vec![plain(decimals(row.bits, 2))];
        cells.extend(longest.map(|at| plain(row.bits_at(at).map_or(UNKNOWN.into(), |bits| decimals(bits, 2)))));
        let against = reference.filter(|reference| !std::ptr::eq(*reference, row));
        let against = against.map_or(String::new(), |reference| change(row.perplexity, reference.perplexity));
        cells.push((decimals(row.perplexity, 2), against));
        cells.extend([row.kl_mean, row.kl_p999].map(|nats| plain(number(nats))));
        cells.push(plain(percent(row.top1_agreement)));
        cells.extend(retrieval_cells(comparison, row));
        cells.push(plain(bytes(row.cache_bytes)));
        if attention {
            let micros = row.attention_micros.filter(|x| x.is_finite());
            cells.push(plain(micros.map_or(UNKNOWN.into(), |micros| format!("{} µs", number(micros)))));
        }
        let best = pareto.iter().any(|other| std::ptr::eq(*other, row));
        SheetRow { best, name: (row.scheme.clone(), row.summary.clone()), cells }
    };
    let rows = comparison.sorted().into_iter().map(row).collect();
    Sheet { label: "Table of schemes", heads, rows }.html()
}

/// A column for each length of retrieval prompts.
pub(super) fn retrieval_heads(comparison: &Comparison) -> impl Iterator<Item = (String, String)> {
    comparison.retrieval_contexts().into_iter().map(|at| ("Retrieval".into(), format!("at {}", context(at))))
}

/// The cells of these columns.
pub(super) fn retrieval_cells(comparison: &Comparison, row: &ComparisonRow) -> impl Iterator<Item = (String, String)> {
    let share = |tokens| plain(row.retrieval_at(tokens).map_or(UNKNOWN.into(), percent));
    comparison.retrieval_contexts().into_iter().map(share)
}
