//! Every scheme.

use super::*;
use dibit_cache::Scheme;
use made_up::{corrected, custom, own, protecting, scheme};

/// Built-in schemes, and others that choose what those do not.
fn all() -> Vec<CalibratedScheme> {
    let mut schemes: Vec<CalibratedScheme> = Scheme::built_in().map(scheme).collect();
    schemes.extend([
        custom(4, 2, 32, "tokens = 100\nschedule = \"guaranteed\""),
        custom(16, 8, 64, "tokens = 256\nschedule = \"kivi\""),
        custom(2, 16, 64, "tokens = 0\nschedule = \"guaranteed\""),
        custom(3, 3, 32, "tokens = 128\nschedule = \"guaranteed\"\n[sinks]\nkind = \"first\"\ncount = 4"),
        custom(16, 4, 32, ""),
        own("correction = \"linear\"", "bits = 2\ntransform = \"hadamard\"", "bits = 4\ntransform = \"basis\""),
        own(
            "correction = { kind = \"linear+bias\", features = 64, states = \"fp16\" }",
            "bits = \"planes\"",
            "bits = 2",
        ),
        own("correction = \"linear\"", "bits = 2\naxis = \"token\"", "bits = 16"),
        own("correction = \"bias\"", "bits = 3\ngroup = 32", "bits = 2"),
        corrected("[window]\ntokens = 128\nschedule = \"kivi\"", "channel"),
        corrected("", "token"),
        own("", "bits = \"planes\"\naverage_bits = 2.5\ntransform = \"hadamard\"", "bits = 2"),
        own(
            "",
            "bits = 2\nlow_rank = 2\noutliers = 0.02\nhigh_precision = 0.07",
            "bits = 4\ntransform = \"basis\"\noutliers = 0.02",
        ),
        own("correction = \"linear\"", "bits = 2\noutliers = 0.02", "bits = 2\nlow_rank = 3"),
        own(
            "",
            "bits = 2\naxis = \"token\"\nclip = \"mse\"",
            "bits = 3\naxis = \"channel\"\ngroup = 32\nclip = \"mse\"",
        ),
        own("", "bits = \"planes\"\nclip = \"mse\"", "bits = 2\nquantizer = \"integer-zero\"\nclip = \"mse\""),
        own("", "bits = 2", "bits = \"planes\"\naxis = \"channel\"\ntransform = \"basis\""),
        own("", "bits = 2\nfeedback = true", "bits = 2"),
        own("correction = \"linear+bias\"", "bits = \"planes\"\nfeedback = true", "bits = 4"),
    ]);
    let only = std::env::var("DIBIT_TEST_SCHEME").unwrap_or_default();
    schemes.retain(|scheme| scheme.origin.contains(&only));
    schemes
}

/// Schemes whose pages protect tokens.
pub(super) fn with_page_sinks() -> Vec<CalibratedScheme> {
    vec![
        scheme("dibit"),
        protecting("", "bits = 2", "bits = 2"),
        protecting("", "bits = 2\naxis = \"token\"", "bits = 16"),
        protecting("", "bits = 16", "bits = 2\naxis = \"channel\""),
        protecting("correction = \"linear+bias\"", "bits = 3\nfeedback = true", "bits = 2\naxis = \"channel\""),
        protecting("", "bits = 2\nquantizer = \"integer-zero\"", "bits = 4\noutliers = 0.02"),
        protecting(
            "correction = \"bias\"",
            "bits = \"planes\"\nfeedback = true",
            "bits = \"planes\"\naxis = \"channel\"\ntransform = \"basis\"",
        ),
    ]
}

#[test]
fn sanitized_tokens_that_pages_protect_equal_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for scheme in with_page_sinks() {
        let case = Case::new(scheme, 4, 2, 64);
        println!("{}", case.scheme.origin);
        // Three pages, of which two are packed in one pass, behind 33 rows that see one.
        compare(cuda, &case.scheme.origin, &case, Mode::Chunk, &[300, 33, 260, 1, 1]);
    }
}

#[test]
fn every_scheme_equals_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for scheme in all() {
        let case = Case::new(scheme, 4, 2, 64);
        println!("{}", case.scheme.origin);
        compare(cuda, &case.scheme.origin, &case, Mode::Chunk, &[300, 37, 1]);
    }
}

#[test]
fn sanitized_heads_of_any_size_equal_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for name in ["kvlinc", "kivi", "rotatekv-window", "gear"] {
        for head_dim in [80, 96, 128, 256] {
            let case = Case::new(scheme(name), 3, 1, head_dim);
            compare(cuda, &format!("{name} {head_dim}"), &case, Mode::Chunk, &[150, 1]);
        }
    }
}

#[test]
fn heads_without_a_hadamard_matrix_equal_the_cpu() {
    let Some(cuda) = cuda() else { return };
    for name in ["kvlinc", "quarot", "rotatekv-window", "gear", "dibit"] {
        for head_dim in [8, 72, 248] {
            let case = Case::new(scheme(name), 2, 2, head_dim);
            // A page is packed before the second pass.
            compare(cuda, &format!("{name} {head_dim}"), &case, Mode::Chunk, &[300, 1]);
        }
    }
}
