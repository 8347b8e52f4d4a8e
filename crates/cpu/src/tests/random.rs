//! Choices at random against the reference.

use super::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn random_choices(
        (key_bits, value_bits) in (0usize..6, 0usize..6), group in 0usize..3, axes in 0usize..4,
        (key_quantizer, value_quantizer) in (0usize..5, 0usize..5), (key_transform, value_transform) in (0usize..6, 0usize..4),
        sinks in 0usize..3, window in 0usize..3, head_dim in 1usize..33, kv_heads in 1usize..5,
        passes in prop::collection::vec(1usize..300, 1..4),
        (seen, caps, has_sinks) in (0usize..4, prop::bool::ANY, prop::bool::ANY),
    ) {
        let quantizer = |which: usize| [
            "float-min\"", "integer-zero\"\nclip = 0.9", "integer-zero\"\ninclude_zero = true",
            "float-min\"\nclip = \"mse\"", "integer-zero\"\nclip = \"mse\"",
        ][which];
        let transform = |which: usize| [
            "transform = \"none\"", "transform = \"hadamard\"", "transform = \"basis\"", "transform = \"token-hadamard\"",
            "transform = \"grouped-hadamard\"\npermutation = \"global\"", "position = \"pre-rope\"",
        ][which];
        let beside = |on: bool| if on { "low_rank = 2\noutliers = 0.02\nhigh_precision = 0.07\n" } else { "" };
        let side = |bits: usize, channel: bool, which: usize, form: usize, more: &str| format!(
            "bits = {}\naxis = \"{}\"\ngroup = {}\nquantizer = \"{}\n{}\n{more}",
            [2, 3, 4, 5, 6, 8][bits], if channel { "channel" } else { "token" }, [32, 64, 128][group], quantizer(which), transform(form)
        );
        let keys = side(key_bits, axes & 1 == 0, key_quantizer, key_transform, beside(key_transform < 3 && axes & 2 == 0));
        let values = side(value_bits, axes & 2 != 0, value_quantizer, value_transform, beside(value_transform < 3 && axes & 1 == 0));
        let text = format!(
            "name = \"random\"\n[keys]\n{keys}\n[values]\n{values}\n{}{}",
            ["", "[window]\ntokens = 50\nschedule = \"guaranteed\"\n", "[window]\ntokens = 128\nschedule = \"kivi\"\n"][window],
            ["", "[sinks]\nkind = \"first\"\ncount = 5\n", "[sinks]\nkind = \"massive\"\ncount = 1\n"][sinks],
        );
        // Combinations that are refused are another test's.
        let scheme = CalibratedScheme::parse(&text, "random");
        prop_assume!(scheme.is_ok());
        let scheme = scheme.unwrap();
        let case = Case::new(scheme, 2 * kv_heads, kv_heads, 8 * head_dim)
            .protecting(&[0])
            .limited([None, Some(30), Some(128), Some(301)][seen], caps.then_some(3.0), has_sinks);
        // Factors of pages do not go with windows.
        prop_assume!(case.scheme.layout(&case.model()).is_ok());
        let tokens = passes.iter().sum();
        let [q, k, v] = data(&case, tokens);
        let out = run(&Cpu::new(Some(2)).unwrap(), &case, Mode::Chunk, &passes, &q, &k, &v);
        let width = case.heads * case.head_dim;
        let expected = case.reference(&q, &k, &v, tokens - 1, &passes);
        close(&text, &out[(tokens - 1) * width..], &expected);
    }
}
