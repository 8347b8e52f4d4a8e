//! Calibration files of strangers are errors or calibrations, whatever stands in them.

use dibit_cache::{CacheModel, CacheShape, CalibratedScheme};
use dibit_calibrate::Artefact;
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// As many cases as `PROPTEST_CASES` says.
fn cases() -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

fn file() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny/calibration/dibit.safetensors");
    FILE.get_or_init(|| std::fs::read(path).unwrap())
}

/// The length of the header, and the header.
fn header() -> (usize, String) {
    let length = u64::from_le_bytes(file()[..8].try_into().unwrap()) as usize;
    (length, String::from_utf8(file()[8..8 + length].to_vec()).unwrap())
}

/// The file with another header.
fn with_header(header: &str) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &file()[8 + self::header().0..]].concat()
}

/// Reads it and, where that works, puts it into a layout of the bundled model's shape.
fn check(bytes: &[u8]) -> bool {
    let Ok(artefact) = Artefact::parse(bytes, &PathBuf::from("stranger.safetensors")) else { return false };
    let mut scheme = CalibratedScheme::load("dibit").unwrap();
    scheme.calibration = Some(Arc::new(artefact.calibration));
    let shape = CacheShape { num_layers: 6, num_key_value_heads: 2, head_dim: 64 };
    scheme.layout(&CacheModel::of_shape(shape)).is_ok()
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_files_do_not_panic(
        changes in prop::collection::vec((any::<usize>(), any::<u8>()), 1..6),
        cut in prop::option::of(any::<usize>()),
    ) {
        // The header is where a file says what it is; the numbers behind it are planes and bases.
        let mut bytes = file().to_vec();
        let within = 8 + header().0 + 512;
        for (at, byte) in changes {
            bytes[at % within] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut % bytes.len());
        }
        check(&bytes);
    }

    #[test]
    fn changed_headers_do_not_panic(
        place in any::<usize>(),
        word in prop::sample::select(vec![
            "\"0\"", "\"-1\"", "\"99999999999\"", "[0,4]", "[18446744073709551615]", "[]", "null", "\"F64\"", "\"I32\"", "\"BF16\"",
            "layers.7.", "layers.06.", "{}", "\"\"", "1e308", "-1",
        ]),
    ) {
        // Puts the word in place of one token of the header.
        let (_, header) = header();
        let starts: Vec<usize> =
            header.char_indices().filter(|(_, c)| matches!(c, '"' | '[' | '{' | ':' | ',')).map(|(at, _)| at).collect();
        let start = starts[place % starts.len()];
        let end = header[start + 1..].find(['"', ',', ']', '}']).map_or(header.len(), |at| start + 1 + at);
        check(&with_header(&format!("{}{word}{}", &header[..start], &header[end..])));
        check(&with_header(&format!("{}{word}{}", &header[..=start], &header[end..])));
    }
}

#[test]
fn the_file_that_is_changed_is_read() {
    assert!(check(file()));
    assert!(check(&with_header(&header().1)));
}
