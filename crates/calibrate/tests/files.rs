//! Files of calibrations: round trip, damage, and what they were made for.

mod common;

use common::{
    Folder, Parts, both, bytes, dummy, fixture, fixture_as, make, message, options, parse, resq, rotatekv, says, text,
};
use dibit_cache::CalibratedScheme;
use dibit_calibrate::{Artefact, CalibrationError, Fingerprint};
use dibit_device::DType;
use dibit_model::Pretrained;
use proptest::prelude::*;
use safetensors::tensor::Dtype;
use serde_json::json;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// A file, and what it was made for.
struct Made {
    pretrained: Pretrained,
    scheme: CalibratedScheme,
    artefact: Artefact,
    bytes: Vec<u8>,
}

impl Made {
    fn new(pretrained: Pretrained, scheme: &str) -> Self {
        let scheme = parse(scheme);
        let artefact = make(&pretrained, &scheme, &text(100, 1), &options(20));
        Made { bytes: bytes(&artefact), pretrained, scheme, artefact }
    }

    /// Puts the bytes into a file and gives it to the scheme; an error names the file and leaves the scheme alone.
    fn attach(&self, bytes: &[u8]) -> Result<CalibratedScheme, CalibrationError> {
        let folder = Folder::new();
        let path = folder.write("some.safetensors", bytes);
        attach(&path, &self.pretrained, &self.scheme)
    }

    #[track_caller]
    fn refuses(&self, words: &[&str], change: impl FnOnce(&mut Parts)) {
        let mut parts = Parts::of(&self.bytes);
        change(&mut parts);
        says(self.attach(&parts.bytes()), &[words, &["not a usable calibration", "make it again"]].concat());
    }
}

fn attach(
    path: &Path,
    pretrained: &Pretrained,
    scheme: &CalibratedScheme,
) -> Result<CalibratedScheme, CalibrationError> {
    let mut given = scheme.clone();
    let result = Artefact::attach(path, pretrained, &mut given);
    if let Err(error) = result {
        assert!(message(&error).contains(path.to_str().unwrap()), "{}", message(&error));
        assert_eq!(given, *scheme);
        return Err(error);
    }
    Ok(given)
}

/// 6 KV heads, rotated 2 at a time.
fn permuted() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| Made::new(dummy(6, 1, json!({})), &rotatekv(2, "local", "mean")))
}

fn based() -> &'static Made {
    static MADE: OnceLock<Made> = OnceLock::new();
    MADE.get_or_init(|| Made::new(dummy(2, 1, json!({})), &resq(2)))
}

#[test]
fn a_file_holds_what_was_saved() {
    for made in [permuted(), based(), &Made::new(dummy(2, 1, json!({})), &both())] {
        let folder = Folder::new();
        let path = folder.write("x.safetensors", "something else");
        made.artefact.save(&path).unwrap();
        assert_eq!(Artefact::load(&path).unwrap(), made.artefact);
        assert_eq!(folder.names(), ["x.safetensors"]);
        let given = attach(&path, &made.pretrained, &made.scheme).unwrap();
        assert_eq!(given.calibration, Some(Arc::new(made.artefact.calibration.clone())));
        assert_eq!(made.artefact.fingerprint, Fingerprint::new(&made.pretrained, &made.scheme));
        let mut divided = made.artefact.clone();
        divided.calibration.layers[0].powers.set(true, vec![0, 7]);
        divided.calibration.layers[1].powers.set(false, vec![1, 2]);
        divided.calibration.layers[1].sink_places = Some(17);
        divided.save(&path).unwrap();
        assert_eq!(Artefact::load(&path).unwrap(), divided);
    }
}

#[test]
fn a_file_that_cannot_be_written_or_read_says_so() {
    let (folder, artefact) = (Folder::new(), &permuted().artefact);
    says(artefact.save(&folder.file("nowhere/x")), &["cannot write the calibration", "nowhere/x", "No such file"]);
    std::fs::create_dir(folder.file("taken")).unwrap();
    says(artefact.save(&folder.file("taken")), &["cannot write the calibration", "taken", "not a file"]);
    says(Artefact::load(&folder.file("taken")), &["cannot read the calibration", "taken", "directory"]);
    says(Artefact::load(&folder.file("x")), &["cannot read the calibration", "x", "No such file"]);
    assert_eq!(folder.names(), ["taken"]);
}

#[test]
#[cfg(unix)]
fn a_link_is_followed_and_what_is_no_file_is_kept() {
    use std::os::unix::fs::FileTypeExt;
    let (folder, artefact) = (Folder::new(), &permuted().artefact);
    let kind = |name: &str| std::fs::symlink_metadata(folder.file(name)).unwrap().file_type();
    let _socket = std::os::unix::net::UnixListener::bind(folder.file("socket")).unwrap();
    says(artefact.save(&folder.file("socket")), &["cannot write the calibration", "socket", "not a file"]);
    assert!(kind("socket").is_socket());
    folder.write("target", "");
    std::os::unix::fs::symlink(folder.file("target"), folder.file("link")).unwrap();
    artefact.save(&folder.file("link")).unwrap();
    assert!(kind("link").is_symlink() && kind("target").is_file());
    assert_eq!(Artefact::load(&folder.file("target")).unwrap(), *artefact);
}

#[test]
fn damaged_permutations_are_refused() {
    let (made, name) = (permuted(), "layers.1.permutation");
    let order = made.artefact.calibration.layers[1].permutation.clone().unwrap();
    made.refuses(&["layer 1: the permutation is missing"], |parts| parts.remove(name));
    let twice = |parts: &mut Parts| parts.set(name, 0, order[1].to_le_bytes());
    made.refuses(&["layer 1: channel", "occurs twice"], twice);
    for channel in [384, u32::MAX] {
        let far = |parts: &mut Parts| parts.set(name, 0, channel.to_le_bytes());
        made.refuses(&[&format!("channel {channel} is not a channel")], far);
    }
    let exchanged = |parts: &mut Parts| {
        parts.set(name, 0, order[383].to_le_bytes());
        parts.set(name, 383, order[0].to_le_bytes());
    };
    made.refuses(&["leaves the heads that are rotated together"], exchanged);
    let shorter = |parts: &mut Parts| {
        let (_, shape, data) = parts.tensor(name);
        *shape = vec![383];
        data.truncate(4 * 383);
    };
    made.refuses(&["a permutation of 383 channels, and the model has 384"], shorter);
    for shape in [vec![6, 64], vec![1, 384], vec![384, 1, 1]] {
        made.refuses(&["dimensions, not 1"], |parts| *parts.tensor(name).1 = shape);
    }
    made.refuses(&["has a tensor layers.1.permutation"], |parts| *parts.tensor(name).0 = Dtype::F32);
    made.refuses(&["layers.1.permutation is of type I32"], |parts| *parts.tensor(name).0 = Dtype::I32);
}

#[test]
fn damaged_bases_are_refused() {
    let (made, d) = (based(), 64);
    let one = 1f32.to_le_bytes();
    for side in ["key", "value"] {
        let name = format!("layers.0.{side}_basis");
        let refuses = |words: &[&str], change: &dyn Fn(&mut Parts)| made.refuses(words, change);
        refuses(&[&format!("layer 0: the {side} basis is missing")], &|parts| parts.remove(&name));
        refuses(&[&format!("{side} basis of KV head 1 is not orthogonal")], &|parts| parts.set(&name, d * d + 5, one));
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            refuses(&["numbers that are not finite"], &|parts| parts.set(&name, 7, number.to_le_bytes()));
        }
        refuses(&["has 3 dimensions, not 1"], &|parts| *parts.tensor(&name).1 = vec![2, d, d]);
        let one_head = |parts: &mut Parts| {
            let (_, shape, data) = parts.tensor(&name);
            *shape = vec![d * d];
            data.truncate(4 * d * d);
        };
        refuses(&[&format!("a {side} basis of 4096 numbers"), "2 x 64 x 64"], &one_head);
        let wide = |parts: &mut Parts| {
            let (dtype, shape, _) = parts.tensor(&name);
            (*dtype, *shape) = (Dtype::F64, vec![d * d]);
        };
        refuses(&["of 64-bit numbers"], &wide);
        refuses(&["has a tensor"], &|parts| *parts.tensor(&name).0 = Dtype::U32);
    }
}

#[test]
fn what_else_is_in_a_file_is_looked_at() {
    let made = permuted();
    for name in ["bias", "layers.0.bias", "layers.2.permutation", "layers.00.permutation", "layers.-1.permutation"] {
        made.refuses(&[&format!("it has a tensor {name}")], |parts| {
            parts.tensors.push((name.to_owned(), Dtype::U32, vec![1], vec![0; 4]));
        });
    }
    let metadata = |key: &'static str, value: &'static str| {
        move |parts: &mut Parts| drop(parts.metadata.insert(key.into(), value.into()))
    };
    let without = |key: &'static str| move |parts: &mut Parts| assert!(parts.metadata.remove(key).is_some());
    made.refuses(&["it has no fingerprint"], without("dibit.fingerprint"));
    made.refuses(&["it has no fingerprint"], |parts| parts.metadata.clear());
    for value in ["", "{}", "[]", "{\"version\":1}"] {
        made.refuses(&["its fingerprint cannot be read"], metadata("dibit.fingerprint", value));
    }
    made.refuses(&["it has no layers"], without("dibit.layers"));
    for value in ["", "two", "-1", "99999999999999999999", "18446744073709551615"] {
        made.refuses(&["it has no layers"], metadata("dibit.layers", value));
    }
    made.refuses(&["it has a tensor layers.1.permutation"], metadata("dibit.layers", "1"));
    made.refuses(&["it has 3 layers, and the model 2"], metadata("dibit.layers", "3"));
    says(made.attach(b""), &["not a usable calibration"]);
    says(made.attach(b"A text that is no calibration, and longer than a header."), &["not a usable calibration"]);
    says(made.attach(&[&made.bytes[..], &[0]].concat()), &["not a usable calibration"]);

    let mut parts = Parts::of(&made.bytes);
    let fingerprint = parts.metadata.get_mut("dibit.fingerprint").unwrap();
    *fingerprint = fingerprint.replace("\"version\":\"3\"", "\"version\":\"1\"");
    let words = ["is of version 1 of calibrations, and this program reads version 3", "dibit calibrate"];
    says(made.attach(&parts.bytes()), &words);
    let Err(CalibrationError::Version { scheme, .. }) = made.attach(&parts.bytes()) else { panic!("it was read") };
    assert_eq!(scheme, made.artefact.fingerprint.scheme());
    // Whatever else an old fingerprint says.
    parts.metadata.insert("dibit.fingerprint".into(), "{\"version\":\"1\",\"model\":\"5c\"}".into());
    says(made.attach(&parts.bytes()), &words);
}

/// The file of `made` is not for this scheme.
#[track_caller]
fn other_scheme(made: &Made, changed: &str, what: &str) {
    let folder = Folder::new();
    let path = folder.write("x.safetensors", &made.bytes);
    let result = attach(&path, &made.pretrained, &parse(changed));
    says(result, &[&format!("made for another {what}: "), "and this run has", "dibit calibrate"]);
}

#[test]
fn another_scheme_is_refused_by_its_parts() {
    let base = rotatekv(2, "local", "mean");
    let made = permuted();
    let (keys, values) = base.split_once("[values]").unwrap();
    for [old, new] in [
        ["bits = 2", "bits = 3"],
        ["group = 128", "group = 32"],
        ["clip = 1.0", "clip = 0.8"],
        ["clip = 1.0", "clip = 1.0\ninclude_zero = true"],
        ["heads = 4", "heads = 1"],
        ["\"local\"", "\"global\""],
        ["\"mean\"", "\"magnitude\""],
        ["grouped-hadamard\"\nheads = 4", "none\""],
    ] {
        assert!(keys.contains(old), "{old}");
        other_scheme(made, &format!("{}[values]{values}", keys.replace(old, new)), "quantiser of keys");
    }
    for [old, new] in [["bits = 2", "bits = 4"], ["group = 128", "group = 64"], ["\"hadamard\"", "\"none\""]] {
        // What is known of keys alone suits any values.
        let folder = Folder::new();
        let path = folder.write("x.safetensors", &made.bytes);
        attach(&path, &made.pretrained, &parse(&format!("{keys}[values]{}", values.replace(old, new)))).unwrap();
    }
    let (resq_keys, resq_values) = resq(2).split_once("[values]").map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap();
    let other = format!("{resq_keys}[values]{}", resq_values.replace("bits = 2", "bits = 4"));
    other_scheme(based(), &other, "quantiser of values");
    other_scheme(made, &format!("{base}[window]\ntokens = 128\nschedule = \"guaranteed\"\n"), "window");
    other_scheme(made, &format!("{base}[sinks]\nkind = \"first\"\ncount = 4\n"), "sinks");
    let layers = format!("{base}[layers.\"0..1\"]\nkeys = {{ bits = 4 }}\n");
    other_scheme(made, &layers, "choice of single layers");
    other_scheme(based(), &resq(2).replacen("0.03125", "0.125", 1), "quantiser of keys");
    let window = format!("{base}[window]\ntokens = 128\nschedule = \"guaranteed\"\n");
    let windowed = Made::new(dummy(2, 1, json!({})), &window);
    other_scheme(&windowed, &window.replace("128\nschedule", "256\nschedule"), "window");
    other_scheme(&windowed, &window.replace("guaranteed", "kivi"), "window");
    // A name is no part of it.
    let renamed = parse(&base.replace("rotated", "other"));
    let folder = Folder::new();
    attach(&folder.write("x", &made.bytes), &made.pretrained, &renamed).unwrap();
}

#[test]
fn another_model_is_refused() {
    let folder = Folder::new();
    let made = permuted();
    let path = folder.write("x.safetensors", &made.bytes);
    let refuses = |pretrained: &Pretrained| {
        says(attach(&path, pretrained, &made.scheme), &["made for another model: ", "this run"]);
    };
    attach(&path, &dummy(6, 1, json!({})), &made.scheme).unwrap();
    // The same shape with other weights, and the same weights with another shape or rotary embedding.
    refuses(&dummy(6, 2, json!({})));
    refuses(&dummy(6, 1, json!({"rope_theta": 5000.0})));
    refuses(&dummy(6, 1, json!({"num_key_value_heads": 3})));
    refuses(&dummy(6, 1, json!({"num_hidden_layers": 3})));
    refuses(&dummy(6, 1, json!({"architectures": ["Qwen2ForCausalLM"]})));
    refuses(&fixture("llama32-old-bf16"));
}

#[test]
fn the_reason_says_what_differs() {
    let scheme = parse(&both());
    let of = |pretrained: &Pretrained| Fingerprint::new(pretrained, &scheme);
    let own = of(&dummy(2, 1, json!({})));
    let reason = |other: &Pretrained| own.difference(&of(other)).map(|(what, how)| format!("{what}: {how}")).unwrap();
    let weights = reason(&dummy(2, 2, json!({})));
    assert!(weights.starts_with("model: its weights are not those of this run: model."), "{weights}");
    assert!(weights.contains(" differs by ") && weights.ends_with(" %"), "{weights}");
    let layers = reason(&dummy(2, 1, json!({"num_hidden_layers": 3})));
    assert!(
        layers.contains("2 layers") && layers.contains("and this run has") && layers.contains("3 layers"),
        "{layers}"
    );
    let rope = reason(&dummy(2, 1, json!({"rope_theta": 5000.0})));
    assert_eq!(rope, "model: its rotary frequencies are not those of this run");
    assert_eq!(own.difference(&of(&dummy(2, 1, json!({"rope_theta": 10000.01})))), None);
}

#[test]
fn conversions_leave_the_model_what_it_is() {
    let scheme = parse(&both());
    for name in ["qwen2-bias-bf16", "qwen3-hd256-bf16", "llama2-linear-f16"] {
        let own = Fingerprint::new(&fixture(name), &scheme);
        assert_eq!(Fingerprint::new(&fixture_as(name, Some(DType::F32)), &scheme), own);
    }
}

#[test]
fn names_of_files_tell_schemes_and_weights_apart() {
    let name = |pretrained: &Pretrained, scheme: &str| Fingerprint::new(pretrained, &parse(scheme)).file_name("a/b");
    let [start, own] = name(&dummy(2, 1, json!({})), &both());
    assert!(start.starts_with("a-b-") && own.starts_with(&start) && own.ends_with(".safetensors"), "{own}");
    assert_eq!(name(&dummy(2, 1, json!({})), &both()), [start.clone(), own.clone()]);
    let [same, other] = name(&dummy(2, 2, json!({})), &both());
    assert!(same == start && other != own, "{other}");
    assert_ne!(name(&dummy(2, 1, json!({})), &resq(2))[0], start);
    assert_ne!(name(&dummy(2, 1, json!({"num_hidden_layers": 3})), &both())[0], start);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_truncated_file_is_refused(share in 0.0f64..1.0, basis in any::<bool>()) {
        let made = if basis { based() } else { permuted() };
        let len = (share * made.bytes.len() as f64) as usize;
        let error = message(&made.attach(&made.bytes[..len]).unwrap_err());
        prop_assert!(error.contains("not a usable calibration"), "{} bytes: {}", len, error);
    }

    #[test]
    fn a_flipped_byte_is_refused_or_changes_nothing_that_is_used(
        share in 0.0f64..1.0,
        header in any::<bool>(),
        flip in 1u8..=255,
    ) {
        let made = permuted();
        let mut bytes = made.bytes.clone();
        let range = if header { 8 + usize::from(bytes[0]) + 256 * usize::from(bytes[1]) } else { bytes.len() };
        let at = (share * range as f64) as usize;
        bytes[at] ^= flip;
        // Every byte of a permutation counts.
        if let Ok(given) = made.attach(&bytes) {
            prop_assert_eq!(given.calibration.as_deref(), Some(&made.artefact.calibration), "byte {}", at);
        }
    }

    #[test]
    fn flipped_bytes_of_a_basis_leave_it_orthogonal_or_are_refused(
        flips in prop::collection::vec((0.0f64..1.0, 1u8..=255), 1..8),
    ) {
        let made = based();
        let mut bytes = made.bytes.clone();
        for (share, flip) in flips {
            let at = (share * bytes.len() as f64) as usize;
            bytes[at] ^= flip;
        }
        if let Ok(given) = made.attach(&bytes) {
            for (own, given) in made.artefact.calibration.layers.iter().zip(&given.calibration.unwrap().layers) {
                for (own, given) in [(&own.key_basis, &given.key_basis), (&own.value_basis, &given.value_basis)] {
                    let pairs = own.as_ref().unwrap().iter().zip(given.as_ref().unwrap());
                    prop_assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 0.1));
                }
            }
        }
    }
}
