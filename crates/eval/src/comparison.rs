//! Schemes side by side on one model and one text.

use crate::Choices;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write;

/// What every scheme of a comparison cost, measured on the same text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Name of the model.
    pub model: String,
    /// Name of the text.
    pub text: String,
    /// Tokens of a window.
    pub context: usize,
    /// Windows of the text that were read.
    pub windows: usize,
    /// Scored tokens, of all windows together.
    pub tokens: usize,
    /// Tokens of the longest retrieval prompts; `None` where retrieval was not measured.
    pub retrieval_context: Option<usize>,
    /// One row for each scheme, in any order.
    pub rows: Vec<ComparisonRow>,
}

/// Figures of one scheme. KL and agreement are against the model with a 16-bit cache.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ComparisonRow {
    /// Name of the scheme.
    pub scheme: String,
    /// The scheme in a few words.
    pub summary: String,
    /// Bits in use for a cached scalar at the end of a window, counted from bytes.
    pub bits: f64,
    /// Bits in use at longer contexts: tokens, bits for a cached scalar.
    pub bits_at: Vec<(usize, f64)>,
    /// `exp` of the mean negative log-likelihood.
    pub perplexity: f64,
    /// Mean KL divergence of the next-token distribution, in nats per token.
    pub kl_mean: f64,
    /// 99.9th percentile of that KL divergence, in nats.
    pub kl_p999: f64,
    /// Share of tokens whose most likely next token is the reference's, 0 to 1.
    pub top1_agreement: f64,
    /// Share of facts that were found again in long prompts, 0 to 1: the mean over their lengths.
    pub retrieval: Option<f64>,
    /// The same by the length of the prompts: tokens, share.
    pub retrieval_at: Vec<(usize, f64)>,
    /// Bytes allocated for the cache of one sequence of `context` tokens.
    pub cache_bytes: usize,
    /// Time of attention in one decoding step, all layers together, in microseconds.
    pub attention_micros: Option<f64>,
    /// What the scheme is sorted by.
    pub choices: Choices,
}

impl Comparison {
    /// Lengths of retrieval prompts, ascending.
    pub fn retrieval_contexts(&self) -> Vec<usize> {
        let lengths: BTreeSet<usize> =
            self.rows.iter().flat_map(|row| row.retrieval_at.iter().map(|at| at.0)).collect();
        lengths.into_iter().collect()
    }

    /// Rows by ascending bits; rows of equal bits by ascending perplexity.
    pub fn sorted(&self) -> Vec<&ComparisonRow> {
        let mut rows: Vec<&ComparisonRow> = self.rows.iter().collect();
        rows.sort_by(|a, b| a.bits.total_cmp(&b.bits).then(a.perplexity.total_cmp(&b.perplexity)));
        rows
    }

    /// The Pareto-optimal rows by ascending bits: no other row has both at most their bits and at most their
    /// perplexity, and less of one of them. A row whose bits or perplexity are not finite is never among them.
    pub fn pareto(&self) -> Vec<&ComparisonRow> {
        let beats = |a: &ComparisonRow, b: &ComparisonRow| {
            a.bits <= b.bits && a.perplexity <= b.perplexity && (a.bits < b.bits || a.perplexity < b.perplexity)
        };
        let mut rows = self.sorted();
        rows.retain(|row| {
            row.bits.is_finite() && row.perplexity.is_finite() && !self.rows.iter().any(|other| beats(other, row))
        });
        rows
    }

    /// The table as CSV (RFC 4180, lines end in `\n`), by ascending bits. What is unknown or not finite is empty.
    pub fn csv(&self) -> String {
        let contexts: BTreeSet<usize> = self.rows.iter().flat_map(|row| row.bits_at.iter().map(|at| at.0)).collect();
        let mut csv = String::from("scheme,summary,bits");
        for context in &contexts {
            let _ = write!(csv, ",bits_at_{context}");
        }
        csv.push_str(",perplexity,kl_mean,kl_p999,top1_agreement,retrieval,cache_bytes,attention_micros");
        // One length says nothing more than the mean.
        let lengths = Some(self.retrieval_contexts()).filter(|lengths| lengths.len() > 1).unwrap_or_default();
        for tokens in &lengths {
            let _ = write!(csv, ",retrieval_at_{tokens}");
        }
        csv.push('\n');
        for row in self.sorted() {
            let mut fields = vec![csv_field(&row.scheme), csv_field(&row.summary), number(Some(row.bits))];
            fields.extend(contexts.iter().map(|context| number(row.bits_at(*context))));
            fields.extend([row.perplexity, row.kl_mean, row.kl_p999, row.top1_agreement].map(|x| number(Some(x))));
            fields.extend([number(row.retrieval), row.cache_bytes.to_string(), number(row.attention_micros)]);
            fields.extend(lengths.iter().map(|tokens| number(row.retrieval_at(*tokens))));
            csv.push_str(&fields.join(","));
            csv.push('\n');
        }
        csv
    }
}

impl ComparisonRow {
    /// Bits in use at one of the contexts of `bits_at`.
    pub fn bits_at(&self, context: usize) -> Option<f64> {
        self.bits_at.iter().find(|at| at.0 == context).map(|at| at.1)
    }

    /// Share of facts that were found again in prompts of so many tokens.
    pub fn retrieval_at(&self, tokens: usize) -> Option<f64> {
        self.retrieval_at.iter().find(|at| at.0 == tokens).map(|at| at.1)
    }
}

fn number(value: Option<f64>) -> String {
    value.filter(|x| x.is_finite()).map(|x| x.to_string()).unwrap_or_default()
}

/// A field of CSV, quoted where it must be (RFC 4180).
pub fn csv_field(field: &str) -> String {
    if field.contains([',', '"', '\r', '\n']) { format!("\"{}\"", field.replace('"', "\"\"")) } else { field.into() }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(scheme: &str, bits: f64, perplexity: f64) -> ComparisonRow {
        ComparisonRow {
            scheme: scheme.into(),
            summary: format!("{scheme} in words"),
            bits,
            bits_at: vec![(8192, bits - 0.5), (32768, bits - 0.7)],
            perplexity,
            kl_mean: 0.02,
            kl_p999: 0.9,
            top1_agreement: 0.925,
            retrieval: Some(0.5),
            retrieval_at: vec![(4096, 0.5)],
            cache_bytes: 1 << 20,
            attention_micros: None,
            choices: Choices::default(),
        }
    }

    pub(crate) fn comparison(rows: Vec<ComparisonRow>) -> Comparison {
        Comparison {
            model: "test".into(),
            text: "text".into(),
            context: 2048,
            windows: 4,
            tokens: 8188,
            retrieval_context: Some(4096),
            rows,
        }
    }

    fn names(rows: Vec<&ComparisonRow>) -> Vec<&str> {
        rows.into_iter().map(|row| row.scheme.as_str()).collect()
    }

    #[test]
    fn the_front_is_what_nothing_beats() {
        let rows = vec![
            row("fp16", 16.0, 10.0),
            row("good", 3.0, 11.0),
            row("beaten", 3.5, 11.5),
            row("worse at equal bits", 3.0, 12.0),
            row("small", 2.0, 20.0),
            row("broken", 1.0, f64::NAN),
            row("equal", 3.0, 11.0),
        ];
        let comparison = comparison(rows);
        assert_eq!(names(comparison.pareto()), ["small", "good", "equal", "fp16"]);
        assert_eq!(comparison.sorted()[0].scheme, "broken");
    }

    #[test]
    fn csv_quotes_what_needs_it() {
        let mut rows = vec![row("a,\"b\"\nc", 3.0, 11.0), row("plain", 2.5, f64::INFINITY)];
        rows[1].bits_at = vec![(131072, 2.25)];
        let csv = comparison(rows).csv();
        let expected = "scheme,summary,bits,bits_at_8192,bits_at_32768,bits_at_131072,perplexity,kl_mean,kl_p999,\
            top1_agreement,retrieval,cache_bytes,attention_micros\n\
            plain,plain in words,2.5,,,2.25,,0.02,0.9,0.925,0.5,1048576,\n\
            \"a,\"\"b\"\"\nc\",\"a,\"\"b\"\"\nc in words\",3,2.5,2.3,,11,0.02,0.9,0.925,0.5,1048576,\n";
        assert_eq!(csv, expected);
    }

    #[test]
    fn several_lengths_of_prompts_are_columns_behind_the_others() {
        let mut rows = vec![row("a", 2.0, 11.0), row("b", 3.0, 10.0)];
        rows[0].retrieval_at = vec![(2048, 0.75), (4096, 0.25)];
        let comparison = comparison(rows);
        assert_eq!(comparison.retrieval_contexts(), [2048, 4096]);
        let csv = comparison.csv();
        let lines: Vec<&str> = csv.lines().collect();
        assert!(lines[0].ends_with(",attention_micros,retrieval_at_2048,retrieval_at_4096"), "{csv}");
        assert!(lines[1].ends_with(",1048576,,0.75,0.25") && lines[2].ends_with(",1048576,,,0.5"), "{csv}");
    }
}
