//! Scheme files of strangers are errors or schemes, whatever stands in them.

use dibit_cache::{CacheModel, CacheShape, Scheme};
use proptest::prelude::*;
use std::path::Path;

/// As many cases as `PROPTEST_CASES` says.
fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

/// The lines of all built-in schemes.
fn lines() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/schemes");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let texts = paths.iter().map(|path| std::fs::read_to_string(path).unwrap());
    let mut lines: Vec<String> = texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    lines.extend(["[[layers]]", "range = \"0..2\"", "[classes.text]", "[planes]"].map(str::to_owned));
    lines
}

fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        (-2i64..300).prop_map(|number| number.to_string()),
        any::<f64>().prop_map(|number| format!("{number:?}")),
        any::<bool>().prop_map(|flag| flag.to_string()),
        "[a-z0-9.\\-]{0,12}".prop_map(|text| format!("\"{text}\"")),
        Just("[]".to_owned()),
        Just("{}".to_owned()),
        Just("[1, 2, [3]]".to_owned()),
        ".{0,12}",
    ]
}

/// A built-in scheme with lines of others, or with other values.
fn scheme() -> impl Strategy<Value = String> {
    let names: Vec<&str> = Scheme::built_in().collect();
    let change = (
        any::<usize>(),
        prop_oneof![
            prop::sample::select(lines()).prop_map(|line| (0, line)),
            prop::sample::select(lines()).prop_map(|line| (1, line)),
            value().prop_map(|value| (2, value)),
        ],
    );
    (prop::sample::select(names), prop::collection::vec(change, 0..6)).prop_map(|(name, changes)| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/schemes/{name}.toml"));
        let mut lines: Vec<String> = std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect();
        for (place, (kind, text)) in changes {
            let place = place % lines.len();
            match (kind, lines[place].split_once('=')) {
                (0, _) => lines.insert(place, text),
                (2, Some((key, _))) => lines[place] = format!("{key}= {text}"),
                _ => lines[place] = text,
            }
        }
        lines.join("\n")
    })
}

fn check(text: &str) -> bool {
    let Ok(scheme) = Scheme::parse(text, "stranger.toml") else { return false };
    for (layers, heads, head_dim) in [(2, 1, 64), (3, 4, 72), (1, 3, 128), (1, 1, 256)] {
        let shape = CacheShape { num_layers: layers, num_key_value_heads: heads, head_dim };
        if let Ok(layout) = scheme.plan(&CacheModel::of_shape(shape)) {
            // Counts of bytes come of it.
            assert!(layout.planned_bytes(1000) >= layout.planned_usage(1000, 128).used_bytes, "{text}");
        }
    }
    true
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn changed_schemes_do_not_panic(text in scheme()) {
        check(&text);
    }

    #[test]
    fn texts_do_not_panic(text in "(?s).{0,200}") {
        check(&text);
    }
}

#[test]
fn the_schemes_that_are_changed_are_read() {
    for name in Scheme::built_in() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/schemes/{name}.toml"));
        assert!(check(&std::fs::read_to_string(path).unwrap()), "{name}");
    }
}
