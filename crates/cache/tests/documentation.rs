//! What docs/schemes.md shows is what the program takes.

use dibit_cache::Scheme;

const GUIDE: &str = include_str!("../../../docs/schemes.md");
const README: &str = include_str!("../../../README.md");

/// Files in a document: its TOML with a name.
fn files(document: &str) -> impl Iterator<Item = &str> {
    let blocks = document.split("```toml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    blocks.filter(|block| block.contains("name = "))
}

#[test]
fn every_file_in_the_documents_is_a_scheme() {
    let mut count = 0;
    for file in files(GUIDE).chain(files(README)) {
        Scheme::parse(file, "a document").unwrap();
        count += 1;
    }
    assert_eq!(count, 5);
}

#[test]
fn every_built_in_scheme_is_in_the_tables() {
    for name in Scheme::built_in() {
        for document in [GUIDE, README] {
            assert!(document.contains(&format!("\n| `{name}`")), "{name}");
        }
    }
}
