//! Schemes at random.

use super::{CalibratedScheme, Case, EXACT, Mode, compare_within, cuda};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

fn side(bits: usize, channel: bool, group: usize, quantizer: usize, transform: &str, beside: bool) -> String {
    let quantizer = [
        "float-min\"",
        "integer-zero\"\nclip = 0.9",
        "integer-zero\"\ninclude_zero = true",
        "float-min\"\nclip = \"mse\"",
        "integer-zero\"\nclip = \"mse\"",
    ][quantizer];
    format!(
        "bits = {}\naxis = \"{}\"\ngroup = {}\nquantizer = \"{quantizer}\n{transform}\n{}",
        [2, 3, 4, 5, 6][bits],
        if channel { "channel" } else { "token" },
        [32, 64, 128][group],
        if beside { "low_rank = 2\noutliers = 0.02\nhigh_precision = 0.07\n" } else { "" },
    )
}

/// For what is packed: the CPU rounds weights to 16 bits, which keys that are rotated along tokens show most.
const TOLERANCE: f64 = 2.5e-2;

#[test]
fn random_schemes_equal_the_cpu() {
    let Some(cuda) = cuda() else { return };
    let transforms = [
        "transform = \"none\"",
        "transform = \"hadamard\"",
        "transform = \"basis\"",
        "transform = \"token-hadamard\"",
        "transform = \"grouped-hadamard\"\npermutation = \"global\"",
        "position = \"pre-rope\"",
    ];
    let choices = (
        (0usize..5, 0usize..5, 0usize..3, 0usize..4),
        (0usize..5, 0usize..5, 0usize..6, 0usize..4),
        (0usize..4, 0usize..3, 0usize..3, 1usize..4),
        (0usize..4, prop::bool::ANY, prop::bool::ANY),
        prop::collection::vec(1usize..300, 1..4),
    );
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(30) };
    let tried = TestRunner::new_with_rng(config, rng).run(
        &choices,
        |(
            (key_bits, value_bits, group, axes),
            (key_fit, value_fit, keys, values),
            (sinks, window, size, kv_heads),
            (seen, caps, has_sinks),
            passes,
        )| {
            let beside = [keys < 3 && axes & 2 == 0, values < 3 && axes & 1 == 0];
            let text = format!(
                "name = \"random\"\n[keys]\n{}\n[values]\n{}\n{}{}",
                side(key_bits, axes & 1 == 0, group, key_fit, transforms[keys], beside[0]),
                side(value_bits, axes & 2 != 0, group, value_fit, transforms[values], beside[1]),
                [
                    "",
                    "[window]\ntokens = 50\nschedule = \"guaranteed\"\n",
                    "[window]\ntokens = 128\nschedule = \"kivi\"\n"
                ][window],
                [
                    "",
                    "[sinks]\nkind = \"first\"\ncount = 5\n",
                    "[sinks]\nkind = \"massive\"\ncount = 1\n",
                    "[sinks]\nkind = \"auto\"\ncount = 3\nplaces = 5\n"
                ][sinks],
            );
            // Combinations that are refused are another test's.
            let scheme = CalibratedScheme::parse(&text, "random");
            prop_assume!(scheme.is_ok());
            let case = Case::new(scheme.unwrap(), 2 * kv_heads, kv_heads, [64, 80, 128][size])
                .protecting(&[0])
                .limited([None, Some(30), Some(128), Some(301)][seen], caps.then_some(3.0), has_sinks);
            prop_assume!(case.scheme.layout(&case.model()).is_ok());
            let what = format!("{text}, {kv_heads} KV heads");
            compare_within([EXACT, TOLERANCE], cuda, &what, &case, Mode::Chunk, &passes);
            Ok(())
        },
    );
    tried.unwrap();
}
