use super::*;
use crate::{CalibratedScheme, Schedule};
use dibit_quant::{Bits, Clip, Quantizer};

const BASE: &str = "name = \"mine\"\n[keys]\nbits = 2\n[values]\nbits = 4\ngroup = 32\n[window]\ntokens = 64\nschedule = \"guaranteed\"\n";

fn message(text: &str) -> String {
    Scheme::parse(text, "mine.toml").unwrap_err().to_string()
}

#[test]
fn every_built_in_scheme_loads_under_its_own_name() {
    for name in Scheme::built_in() {
        let scheme = Scheme::load(name).unwrap();
        assert_eq!(scheme.name, name);
        assert!(!scheme.summary.is_empty());
    }
    let kvlinc = Scheme::load("kvlinc").unwrap();
    assert_eq!(kvlinc.values.transform(), Transform::Hadamard);
    assert!(CalibratedScheme::from(kvlinc.clone()).notice().unwrap().contains("linear correction"));
    assert_eq!(CalibratedScheme::load("kivi").unwrap().notice(), None);
}

#[test]
fn a_file_of_ones_own() {
    let scheme = Scheme::parse(BASE, "mine.toml").unwrap();
    let packed = Packed {
        bits: Bits::Two,
        planes: None,
        axis: Axis::Channel,
        group: 128,
        quantizer: Quantizer::FloatMin,
        clip: Clip::None,
        transform: Transform::None,
        high_precision: 0.0,
        low_rank: 0,
        outliers: 0.0,
        feedback: false,
    };
    assert_eq!(scheme.keys, Side::Packed(packed));
    assert_eq!(scheme.values, Side::Packed(Packed { bits: Bits::Four, group: 32, axis: Axis::Token, ..packed }));
    assert_eq!(scheme.window, Window { tokens: 64, schedule: Schedule::Guaranteed });
}

#[test]
fn unknown_names_get_the_nearest() {
    let error = Scheme::load("kvlink").unwrap_err().to_string();
    assert!(error.contains("did you mean 'kvlinc'?") && error.contains("fp16, kivi"), "{error}");
    assert!(!Scheme::load("turboquant").unwrap_err().to_string().contains("did you mean"));
    assert!(matches!(Scheme::load("nowhere/x.toml"), Err(SchemeError::Read { .. })));
}

#[test]
fn unsupported_combinations_name_what_is_supported() {
    let two = |more: &str| BASE.replace("bits = 2", &format!("bits = 2\n{more}"));
    let no_window = BASE.split("[window]").next().unwrap().to_owned();
    let cases = [
        (BASE.replace("bits = 2", "bits = 7"), "2, 3, 4, 5, 6, 8, 16"),
        (BASE.replace("mine", " "), "a name"),
        (BASE.replace("group = 32", "group = 48"), "32, 64, 128"),
        (BASE.replace("\"guaranteed\"", "\"kivi\""), "multiples of 128"),
        (BASE.replace("tokens = 64", "tokens = 100000"), "at most 4096"),
        (BASE.replace("bits = 4\n", "bits = 16\n"), "packed codes"),
        (no_window.clone(), "a [window]"),
        (no_window.replace("bits = 2", "bits = 2\naxis = \"token\"\ntransform = \"token-hadamard\""), "a [window]"),
        (BASE.replace("bits = 4\ngroup = 32", "bits = 16\ntransform = \"hadamard\""), "packed codes"),
        (
            BASE.replace("bits = 4", "bits = 4\naxis = \"channel\"")
                .replace("64\nschedule = \"guaranteed\"", "128\nschedule = \"kivi\""),
            "guaranteed",
        ),
        (format!("correction = \"linear\"\n{}", BASE.replace("bits = 2", "bits = 16")), "packed keys"),
        (BASE.replace("bits = 2", "bits = \"crumbs\""), "\"planes\""),
        (BASE.replace("bits = 4", "bits = \"planes\"\naxis = \"channel\""), "of values in a basis"),
        (format!("{}[planes]\nmost = 5\n", BASE.replace("bits = 2", "bits = \"planes\"")), "1 to 4"),
        (
            format!("{}[planes]\nmost = 1\n", BASE.replace("bits = 2", "bits = \"planes\"\naverage_bits = 4")),
            "two bits for each plane",
        ),
        (format!("{BASE}[planes]\nmost = 2\n"), "bits = \"planes\""),
        (two("average_bits = 2"), "bits = \"planes\""),
        (format!("correction = {{ kind = \"linear\", features = 40 }}\n{BASE}"), "multiples of 32"),
        (format!("correction = {{ kind = \"bias\", features = 64 }}\n{BASE}"), "kind = \"linear\""),
        (format!("correction = \"bias\"\n{}", two("axis = \"token\"")), "keys.axis = \"channel\""),
        (format!("correction = \"linear\"\n{}", two("low_rank = 2")), "one of the two"),
        (format!("correction = \"linear\"\n{}", two("position = \"pre-rope\"")), "after RoPE"),
        (two("clip = 0.8"), "quantizer = \"integer-zero\""),
        (two("quantizer = \"integer-zero\"\nclip = 1.5"), "at most 1"),
        (two("clip = \"least\""), "\"mse\""),
        (two("transform = \"grouped-hadamard\"\nposition = \"post-rope\""), "pre-rope"),
        (two("transform = \"grouped-hadamard\"\nheads = 3"), "powers of two"),
        (two("permutation = \"local\""), "pre-rope"),
        (two("position = \"pre-rope\"\nstatistic = \"mean\""), "permutation"),
        (two("position = \"pre-rope\"\nlow_rank = 2"), "after RoPE"),
        (two("position = \"pre-rope\"\ntransform = \"basis\""), "before RoPE"),
        (BASE.replace("bits = 4", "bits = 4\nposition = \"pre-rope\""), "keys.position"),
        (two("low_rank = 17"), "0 to 16"),
        (two("high_precision = 0.9"), "at most 0.5"),
        (two("outliers = -1.0"), "at most 0.25"),
        (format!("attention = \"stored\"\n{}", two("low_rank = 2")), "attention = \"exact\""),
        (format!("{BASE}[sinks]\nkind = \"first\"\ncount = 0\n"), "1 to 1024"),
        (format!("{BASE}[sinks]\nkind = \"massive\"\ncount = 65\n"), "1 to 64"),
        (format!("{BASE}[sinks]\nkind = \"auto\"\ncount = 2000\n"), "0 to 1024"),
        (format!("{BASE}[sinks]\nkind = \"auto\"\ncount = 4\nplaces = 33\n"), "1 to 32"),
        (format!("{BASE}[sinks]\nkind = \"auto\"\ncount = 4\nshare = 1.0\n"), "below 1"),
        (format!("{BASE}[sinks]\nkind = \"first\"\ncount = 4\nplaces = 8\n"), "kind = \"auto\""),
        (
            format!(
                "{}[sinks]\nkind = \"auto\"\ncount = 4\n",
                BASE.replace("64\nschedule = \"guaranteed\"", "128\nschedule = \"kivi\"")
            ),
            "schedule = \"guaranteed\"",
        ),
        (format!("attention = \"stored\"\n{BASE}[sinks]\nkind = \"auto\"\ncount = 4\n"), "attention = \"exact\""),
        (format!("{}[sinks]\nkind = \"auto\"\ncount = 4\n", two("position = \"pre-rope\"")), "keys after RoPE"),
        (two("axis = \"token\"\nfeedback = true"), "keys per channel"),
        (two("transform = \"hadamard\"\nfeedback = true"), "no transform"),
        (BASE.replace("bits = 4", "bits = 4\nfeedback = true"), "keys per channel"),
        (format!("{BASE}[sinks]\nkind = \"first\"\ncount = 4\nper_layer = true\n"), "pivots"),
        (format!("{}[sinks]\nkind = \"first\"\ncount = 4\n", two("transform = \"token-hadamard\"")), "one of the two"),
        (format!("{BASE}[layers.\"0..3\"]\nkeys = {{ bits = 4 }}\n[layers.2]\nkeys = {{ bits = 8 }}\n"), "overlap"),
        (format!("{BASE}[layers.\"3..3\"]\nkeys = {{ bits = 4 }}\n"), "0..4"),
    ];
    for (text, expected) in cases {
        let message = message(&text);
        assert!(message.contains("mine.toml") && message.contains(expected), "{message}");
    }
}

#[test]
fn small_values_and_feedback_are_choices() {
    let text = BASE.replace("bits = 2", "bits = 2\nfeedback = true") + "[sinks]\nkind = \"auto\"\ncount = 2\n";
    let scheme = Scheme::parse(&text, "mine.toml").unwrap();
    assert_eq!(scheme.sinks, Sinks::Auto(AutoSinks { first: 2, places: 8, share: 0.4 }));
    assert_eq!((scheme.sinks.capacity(), scheme.sinks.first()), (2, 2));
    assert!(scheme.is_calibrated() && scheme.protects_small_values() && scheme.keys.has_feedback());
    assert!(scheme.keys.to_string().ends_with("with error feedback"), "{}", scheme.keys);
    // Places can do without a calibration, and use one.
    let scheme = Scheme::parse(&text.replace("feedback = true", ""), "mine.toml").unwrap();
    assert!(!scheme.is_calibrated() && scheme.takes_calibration());
}

#[test]
fn clipping_is_a_choice_of_any_packed_side() {
    let clipped = BASE.replace("bits = 4", "bits = 4\nquantizer = \"integer-zero\"\nclip = \"mse\"");
    let scheme = Scheme::parse(&clipped, "mine.toml").unwrap();
    assert!(scheme.values.is_clipped() && !scheme.keys.is_clipped() && scheme.warnings().is_empty());
    assert!(scheme.values.to_string().contains("clip 1, clipped for the least squared error"), "{}", scheme.values);
    // Other values of the same layer take it back.
    let text = format!("{clipped}[layers.1]\nvalues = {{ quantizer = \"float-min\" }}\n");
    assert!(!Scheme::parse(&text, "mine.toml").unwrap().sides(0, 1).1.is_clipped());
    for name in ["k3v2", "k2v2"] {
        let scheme = Scheme::load(name).unwrap();
        assert!(scheme.keys.is_clipped() && !scheme.values.is_clipped() && scheme.warnings().is_empty());
    }
}

#[test]
fn clipped_keys_need_sinks_and_no_correction() {
    let clipped = BASE.replace("bits = 2", "bits = 2\nclip = \"mse\"");
    let sinks = "[sinks]\nkind = \"first\"\ncount = 4\n";
    let layer = "[layers.1]\nkeys = { bits = 4, clip = \"mse\" }\n";
    let warnings = |text: &str| Scheme::parse(text, "mine.toml").unwrap().warnings();
    for text in [clipped.clone(), format!("{BASE}{layer}")] {
        let said = warnings(&text);
        assert!(said.len() == 1 && said[0].starts_with("mine: keys.clip = \"mse\" without [sinks]"), "{said:?}");
    }
    for (correction, text) in [("bias", format!("{clipped}{sinks}")), ("linear", format!("{BASE}{layer}{sinks}"))] {
        let said = warnings(&format!("correction = \"{correction}\"\n{text}"));
        assert!(said.len() == 1 && said[0].contains("a correction with keys.clip = \"mse\""), "{said:?}");
    }
    let without = layer.replacen("\n", "\ncorrection = \"none\"\n", 1);
    let elsewhere = format!("correction = \"bias\"\n{BASE}{without}{sinks}");
    for text in [BASE.to_owned(), format!("{clipped}{sinks}"), elsewhere] {
        assert_eq!(warnings(&text), [""; 0]);
    }
    assert_eq!(warnings(&format!("correction = \"bias\"\n{clipped}")).len(), 2);
}

#[test]
fn llama_cpp_names_are_schemes() {
    for name in ["f16", "bf16"] {
        assert!(Scheme::load(name).unwrap().is_exact());
    }
    for (name, bits) in [("q8_0", Bits::Eight), ("q5_1", Bits::Five), ("q4_0", Bits::Four)] {
        let scheme = Scheme::load(name).unwrap();
        let Side::Packed(keys) = scheme.keys else { panic!("{name}") };
        assert_eq!((keys.bits, keys.group, keys.axis, keys.transform), (bits, 32, Axis::Token, Transform::None));
        assert_eq!((scheme.values, scheme.window.schedule, scheme.sinks), (scheme.keys, Schedule::None, Sinks::None));
    }
}

#[test]
fn malformed_files_say_where() {
    assert!(message("name = ").contains("line 1"));
    let unknown = message(&format!("{BASE}[sink]\nfirst = 4\n"));
    assert!(unknown.contains("unknown field `sink`") && unknown.contains("`window`"), "{unknown}");
    let unknown = message(&BASE.replace("bits = 2", "bit = 2"));
    assert!(unknown.contains("[keys]") && unknown.contains("`bit`"), "{unknown}");
    assert!(message(&BASE.replace("guaranteed", "lazy")).contains("`guaranteed`"));
}

#[test]
fn choices_of_some_layers_lie_over_those_of_all() {
    let text = format!(
        "{BASE}[layers.\"0..2\"]\nkeys = {{ bits = 4 }}\n[layers.5]\nkeys = {{ bits = 16 }}\nvalues = {{ group = 64 }}\n"
    );
    let scheme = Scheme::parse(&text, "mine.toml").unwrap();
    let bits = |side: Side| match side {
        Side::Half => (16, 0),
        Side::Packed(packed) => (packed.bits.count(), packed.group),
    };
    let all: Vec<_> =
        [0, 1, 2, 5].map(|layer| scheme.sides(0, layer)).iter().map(|(k, v)| (bits(*k), bits(*v))).collect();
    assert_eq!(all[0], ((4, 128), (4, 32)));
    assert_eq!((all[1], all[2]), (all[0], ((2, 128), (4, 32))));
    assert_eq!(all[3], ((16, 0), (4, 64)));
    assert!(!scheme.is_exact() && !scheme.is_calibrated() && Scheme::load("resq").unwrap().is_calibrated());
}

#[test]
fn choices_of_a_layer_take_back_what_belongs_to_others() {
    let text = format!(
        "{}[layers.0]\nkeys = {{ quantizer = \"float-min\", low_rank = 0 }}\n[layers.1]\nkeys = {{ clip = 7.0 }}\n",
        BASE.replace("bits = 2", "bits = 2\nquantizer = \"integer-zero\"\nclip = 0.8\nlow_rank = 2")
    );
    let error = message(&text);
    assert!(error.contains("[layers.\"1\"]: keys.clip = 7"), "{error}");
    let scheme = Scheme::parse(text.split("[layers.1]").next().unwrap(), "mine.toml").unwrap();
    assert_eq!(scheme.sides(0, 0).0.to_string(), "2 bit per channel, groups of 128, float minimum, as they are");
    assert!(scheme.sides(0, 1).0.to_string().contains("clip 0.8, as they are, error of rank 2"));
}

#[test]
fn sides_describe_themselves() {
    let keys = |name: &str| Scheme::load(name).unwrap().keys.to_string();
    assert_eq!(keys("kivi"), "2 bit per channel, groups of 128, float minimum, as they are");
    assert_eq!(
        keys("rotatekv"),
        "2 bit per token, groups of 128, integer zero, clip 0.8, before RoPE, rotated over 4 heads, reordered locally by mean"
    );
    assert_eq!(keys("fp16"), "16 bit");
}

#[test]
fn classes_of_tokens_have_choices_of_their_own() {
    let base = "name = \"vl\"\n[keys]\nbits = 2\naxis = \"token\"\ntransform = \"hadamard\"\n[values]\nbits = 2\n\
        [classes.text]\n[classes.text.layers.\"0..2\"]\nkeys = { bits = 4 }\nvalues = { bits = 4 }\n";
    let scheme = Scheme::parse(base, "vl.toml").unwrap();
    assert_eq!((scheme.classes.len(), scheme.classes[0].name.as_str()), (1, "text"));
    assert_eq!(scheme.sides(1, 5), scheme.sides(0, 5));
    assert!(scheme.sides(1, 1).0.to_string().starts_with("4 bit") && scheme.sides(0, 1).0 == scheme.keys);
    for (text, expected) in [
        (
            base.replace("axis = \"token\"", "axis = \"channel\"")
                + "[window]\ntokens = 128\nschedule = \"guaranteed\"\n",
            "axis",
        ),
        (base.replace("{ bits = 4 }\nvalues", "{ bits = 4, transform = \"none\" }\nvalues"), "one transform"),
        (format!("{base}[window]\ntokens = 128\nschedule = \"kivi\"\n"), "guaranteed"),
    ] {
        let message = Scheme::parse(&text, "vl.toml").unwrap_err().to_string();
        assert!(message.contains("[classes]") && message.contains(expected), "{message}");
    }
}
