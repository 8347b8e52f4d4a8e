//! What documents point at is there.

use std::path::{Path, PathBuf};

const DOCUMENTS: [&str; 8] = [
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/internals.md",
    "docs/performance.md",
    "docs/schemes.md",
    "fixtures/README.md",
];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What the links of a document name, web pages left out: a file, and a heading in it.
fn links(text: &str) -> impl Iterator<Item = (&str, Option<&str>)> {
    let all = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    all.filter(|link| !link.contains("://")).map(|link| match link.split_once('#') {
        Some((file, heading)) => (file, Some(heading)),
        None => (link, None),
    })
}

/// The anchors of a document's headings, as GitHub makes them.
fn anchors(text: &str) -> Vec<String> {
    let anchor = |heading: &str| -> String {
        let kept = heading.to_lowercase().replace(' ', "-");
        kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_')).collect()
    };
    text.lines().filter(|line| line.starts_with('#')).map(|line| anchor(line.trim_start_matches('#').trim())).collect()
}

#[test]
fn links_lead_to_files_and_headings() {
    let mut count = 0;
    for document in DOCUMENTS {
        let path = repository().join(document);
        let text = std::fs::read_to_string(&path).unwrap();
        for (file, heading) in links(&text) {
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{document}: {file} is not there");
            if let Some(heading) = heading {
                let anchors = anchors(&std::fs::read_to_string(&target).unwrap());
                assert!(anchors.iter().any(|own| own == heading), "{document}: {file} has no heading #{heading}");
            }
            count += 1;
        }
    }
    assert!(count > 80, "{count} links");
}
