use super::*;
use crate::choices::tests::{corrected, plain};
use crate::comparison::tests::{comparison, row};
use crate::study::tests::small;

/// Checks what holds for every page, and gives it back.
fn checked(comparison: &Comparison, study: &Study) -> String {
    let page = html(comparison, study);
    assert!(!page.contains("NaN") && !page.contains(">inf") && !page.contains("Infinity"));
    assert!(!page.contains("http"), "the page needs nothing else");
    assert!(!page.contains("<script") && page.contains("prefers-color-scheme: dark"));
    for row in &comparison.rows {
        assert!(page.contains(&escape(&row.scheme)), "{}", row.scheme);
    }
    balanced(&page);
    page
}

/// Every element ends, in the right order.
fn balanced(page: &str) {
    let body = &page[page.find("<body>").unwrap()..];
    let mut open = Vec::new();
    for tag in body.split('<').skip(1) {
        let tag = &tag[..tag.find('>').expect("a tag ends")];
        let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
        if tag.starts_with('/') {
            let expected = (!(open.is_empty() && name == "html")).then(|| open.pop()).flatten();
            assert!(expected.is_none_or(|expected| expected == name), "</{name}> ends <{expected:?}>");
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert!(open.is_empty(), "{open:?} do not end");
}

fn usual() -> Vec<ComparisonRow> {
    vec![row("fp16", 16.0, 75.81), row("kvlinc", 3.11, 77.49), row("kivi", 3.11, 77.44), row("quarot", 3.11, 146.7)]
}

#[test]
fn a_usual_page_has_every_part() {
    let page = checked(&comparison(usual()), &small(3));
    assert!(
        page.contains(
            "kivi is the smallest cache within 5\u{a0}% of 16 bit: 3.11 bits, perplexity 77.44 against 75.81"
        )
    );
    assert!(page.contains("quarot 147"), "what lies above the axis says its number");
    assert_eq!(page.matches("<figure").count(), 7);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    for svg in page.split("<svg ").skip(1) {
        assert!(svg.contains("viewBox") && (svg.contains("aria-label=") || svg.contains("aria-hidden")));
    }
    for term in ["KL divergence", "Top-1 agreement", "Sinks", "Window", "Rotation", "Per channel, per token"] {
        assert!(page.contains(term), "{term}");
    }
}

#[test]
fn corrected_schemes_have_a_part_of_their_own() {
    let mut comparison = comparison(usual());
    let page = checked(&comparison, &small(2));
    assert!(!page.contains("<h2>The linear correction</h2>"));
    comparison.rows[1].choices = corrected(true, 256, vec![0, 1, 2, 3]);
    comparison.rows[2].choices = plain(false);
    for (name, choices) in [
        ("<d64>", corrected(true, 64, vec![0, 1, 2, 3])),
        ("<early>", corrected(true, 64, vec![0, 1])),
        ("<rotation>", plain(true)),
    ] {
        comparison.rows.push(ComparisonRow { choices, ..row(name, 2.9, f64::NAN) });
    }
    comparison.rows[3].retrieval_at = vec![(2048, f64::NAN)];
    let page = checked(&comparison, &small(2));
    assert_eq!(page.matches("<h2>The linear correction</h2>").count(), 1);
    for part in
        ["How many features", "Which layers gain", "What does the correction cost?", "&lt;rotation&gt;, without"]
    {
        assert!(page.contains(part), "{part}");
    }
    assert!(page.contains("2,048, 4,096 tokens"));
}

#[test]
fn text_is_escaped_everywhere() {
    let mut comparison = comparison(usual());
    comparison.rows[1].scheme = "<b>\"mine\" & 'yours'</b>".into();
    comparison.rows[1].summary = "</table><script>".into();
    comparison.model = "<model>".into();
    comparison.text = "<text>".into();
    let page = checked(&comparison, &small(1));
    assert!(page.contains("&lt;b&gt;&quot;mine&quot; &amp; &#39;yours&#39;&lt;/b&gt;"));
    assert!(!page.contains("<model>") && !page.contains("<b>"));
}

#[test]
fn extreme_figures_still_make_a_page() {
    let study = small(2);
    checked(&comparison(vec![]), &study);
    let page = checked(&comparison(vec![row("fp16", 16.0, 75.81)]), &study);
    assert!(page.contains("Only the 16-bit cache was measured"));
    checked(&comparison(vec![row("kvlinc", 3.0, 12.0)]), &study);
    let mut rows = usual();
    rows.push(row("exploded", 2.2, 7581.0));
    rows.push(row("broken", f64::NAN, f64::NAN));
    rows.push(row("unbounded", 2.0, f64::INFINITY));
    rows[0].kl_mean = 0.0;
    rows[1].bits_at.clear();
    rows[2].retrieval = None;
    rows[2].kl_p999 = f64::NAN;
    rows[3].attention_micros = Some(f64::NAN);
    rows[5].kl_mean = f64::NAN;
    let page = checked(&comparison(rows), &study);
    assert!(page.contains("exploded 7,581"));
    assert!(page.contains("fp16, whose divergence is 0"));
    let mut study = study;
    study.keys[0].attention_error.mean = f64::NAN;
    study.pairs[1].output_error.layers[0] = f64::INFINITY;
    study.values.clear();
    study.spreads.clear();
    checked(&comparison(usual()), &study);
}
