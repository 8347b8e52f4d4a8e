//! `dibit compare` as a user runs it.

mod common;

use common::{Folder, fixture, run};
use dibit_cache::{Adapters, Calibration, LayerCalibration, Scheme};
use dibit_calibrate::{Artefact, Fingerprint};
use dibit_model::{ModelFiles, Pretrained, WeightSource};
use serde_json::Value;
use std::path::Path;

/// English sentences, some 2000 tokens of the bundled model.
fn english() -> String {
    let subjects = ["The river", "An old man", "The king", "A small boat", "My sister"];
    let verbs = ["went down to", "looked for", "came back from", "was afraid of"];
    let objects = ["the sea", "a house on the hill", "the city of his father", "the long winter"];
    (0..220).map(|i| format!("{} {} {}. ", subjects[i % 5], verbs[i / 2 % 4], objects[i / 3 % 4])).collect()
}

/// Writes made-up adapters for a scheme, and returns the path of the file.
fn adapters(folder: &Folder, model: &str, scheme: &str) -> String {
    let pretrained =
        Pretrained::load(&ModelFiles::open(Path::new(model)).unwrap(), WeightSource::Checkpoint, None).unwrap();
    let scheme = Scheme::load(scheme).unwrap();
    let config = &pretrained.config;
    let features = scheme.linear().unwrap().features;
    let map = |heads: usize, seed: usize| -> Vec<f32> {
        let number = |i: usize| ((i * 7919 + seed * 104_729) % 1000) as f32 / 1000.0 - 0.5;
        (0..heads * config.head_dim * features / 2).map(number).collect()
    };
    let layer = |layer: usize| LayerCalibration {
        adapters: Some(Adapters {
            features,
            query: [1, 2].map(|seed| map(config.num_attention_heads, seed + 4 * layer)),
            key: [3, 4].map(|seed| map(config.num_key_value_heads, seed + 4 * layer)),
            gates: vec![1.0; config.num_attention_heads],
        }),
        ..LayerCalibration::default()
    };
    let artefact = Artefact {
        fingerprint: Fingerprint::new(&pretrained, &scheme),
        source: "made up".into(),
        calibration: Calibration { layers: (0..config.num_hidden_layers).map(layer).collect() },
        training: None,
    };
    let file = folder.file(&format!("{}.safetensors", scheme.name));
    artefact.save(Path::new(&file)).unwrap();
    file
}

/// KVLinC's quantiser with another correction.
fn variant(folder: &Folder, name: &str, features: usize, layers: &str) -> String {
    let text = format!(
        "name = \"{name}\"\ncorrection = {{ kind = \"linear\", features = {features} }}\n\
         [keys]\nbits = 2\n[values]\nbits = 2\ntransform = \"hadamard\"\n\
         [window]\ntokens = 128\nschedule = \"guaranteed\"\n{layers}"
    );
    folder.write(&format!("{name}.toml"), text)
}

#[test]
fn a_linear_correction_is_taken_apart() {
    let folder = Folder::new();
    let model = fixture("qwen2-bias-bf16");
    let (text, report) = (folder.write("text.txt", english()), folder.file("report"));
    let d32 = variant(&folder, "d32", 32, "");
    let early = variant(&folder, "early", 32, "[layers.1]\ncorrection = \"none\"\n");
    let files = ["kivi-linc", "kvlinc", &d32].map(|scheme| adapters(&folder, &model, scheme));
    let schemes = ["kivi", "kivi-linc", "kvlinc-rotation", "kvlinc", &d32, &early].join(",");
    let (json, files) = (folder.file("out.json"), files.join(","));
    let options =
        ["compare", "--model", &model, "--text", &text, "--context", "512", "--windows", "1", "--samples", "0"];
    let further = ["--schemes", &schemes, "--calibration", &files, "--report", &report, "--json", &json];
    let done = run(&[&options[..], &further].concat()).succeeds();
    assert!(!done.stderr.contains("no adapters"), "{}", done.stderr);

    let value: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    let rows = value["comparison"]["rows"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|row| row["scheme"] == name).unwrap();
    let bits = |name: &str| row(name)["bits"].as_f64().unwrap();
    // fp32 states: D (d + 1) numbers for 2 N d scalars.
    let states = 32.0 * 256.0 * 81.0 / (2.0 * 512.0 * 80.0);
    assert!((bits("kvlinc") - bits("kvlinc-rotation") - states).abs() < 1e-3, "{}", bits("kvlinc"));
    assert!((bits("d32") - bits("kvlinc-rotation") - states / 8.0).abs() < 1e-3);
    assert!((bits("early") - bits("kvlinc-rotation") - states / 16.0).abs() < 1e-3);
    assert_eq!(row("early")["choices"]["correction"]["layers"], serde_json::json!([0]));
    assert!(row("kivi")["choices"]["correction"].is_null());
    // The forward pass uses them.
    assert_ne!(row("kvlinc")["kl_mean"], row("kvlinc-rotation")["kl_mean"]);

    let corrections = value["study"]["corrections"].as_array().unwrap();
    let names: Vec<&str> = corrections.iter().map(|own| own["scheme"].as_str().unwrap()).collect();
    assert_eq!(names, ["kivi-linc", "kvlinc", "d32", "early"]);
    let layers = |own: &Value, part: &str| -> Vec<f64> { serde_json::from_value(own[part]["layers"].clone()).unwrap() };
    for own in corrections {
        let (before, after) = (layers(own, "attention_before"), layers(own, "attention_after"));
        // All of them quantise keys alike.
        assert_eq!(before, layers(&corrections[0], "attention_before"));
        assert!(before.len() == 2 && before[0] > 0.0 && before[0] != after[0]);
        assert_eq!(before[1] == after[1], own["scheme"] == "early");
        assert!(layers(own, "output_after").iter().all(|error| *error > 0.0 && error.is_finite()));
    }

    let page = std::fs::read_to_string(format!("{report}/index.html")).unwrap();
    for part in [
        "The linear correction",
        "values rotated, linear correction with D = 256",
        "How much of the error of attention does the correction take away?",
        "How many features does the correction need?",
        "Which layers gain from the correction?",
        "What does the correction cost?",
    ] {
        assert!(page.contains(part), "{part}");
    }
    // Other schemes may go without; a file that is none's is refused.
    let kvlinc = folder.file("kvlinc.safetensors");
    let alone = ["--schemes", "kivi", "--calibration", &kvlinc];
    run(&[&options[..], &alone].concat()).fails_with(&["none of the schemes kivi needs a calibration"]);
    let small = folder.file("d32.safetensors");
    let all = run(&[&options[..], &["--calibration", &small]].concat()).succeeds();
    assert!(all.stderr.contains("kvlinc: no adapters") && all.stdout.contains("kivi-linc"), "{}", all.stderr);
    assert!(all.stderr.contains("dibit is left out"), "{}", all.stderr);
}

#[test]
fn one_table_sorted_by_bits_and_a_page_of_pictures() {
    let folder = Folder::new();
    let text = folder.write("text.txt", english());
    let (json, csv, report) = (folder.file("out.json"), folder.file("out.csv"), folder.file("report"));
    let options = ["compare", "--text", &text, "--schemes", "kivi,quarot", "--context", "512", "--windows", "1"];
    let files = ["--samples", "0", "--json", &json, "--csv", &csv, "--report", &report];
    let done = run(&[&options[..], &files].concat()).succeeds();

    let lines: Vec<Vec<&str>> = done.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    let names: Vec<&str> = lines[1..4].iter().map(|line| line[0]).collect();
    assert_eq!((lines[0][0], names.last()), ("scheme", Some(&"fp16")), "{}", done.stdout);
    let bits: Vec<f64> = lines[1..4].iter().map(|line| line[1].parse().unwrap()).collect();
    assert!(bits.is_sorted() && bits[2] == 16.0, "{bits:?}");

    let value: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    let comparison = &value["comparison"];
    assert_eq!((&comparison["context"], &comparison["windows"]), (&512.into(), &1.into()));
    let rows = comparison["rows"].as_array().unwrap();
    let row = |name: &str| rows.iter().find(|row| row["scheme"] == name).unwrap();
    let number = |row: &Value, key: &str| row[key].as_f64().unwrap();
    let (half, kivi, quarot) = (row("fp16"), row("kivi"), row("quarot"));
    assert_eq!((number(half, "kl_mean"), number(half, "top1_agreement")), (0.0, 1.0));
    // Keys per token fail even when they are rotated (KVLinC, observation 2).
    assert!(number(quarot, "kl_mean") > 2.0 * number(kivi, "kl_mean"));
    assert!(number(kivi, "attention_micros") > 0.0 && kivi["retrieval"].is_null());
    let at: Vec<u64> = kivi["bits_at"].as_array().unwrap().iter().map(|pair| pair[0].as_u64().unwrap()).collect();
    assert_eq!(at, [8192, 32768, 131_072]);
    // head_dim 64: 2 bit, scales and minimums in groups of 128 tokens and of 64 channels, 128 of 131,072 tokens in 16 bit.
    let longest = kivi["bits_at"][2][1].as_f64().unwrap();
    let packed = 2.0 + (0.25 + 0.5) / 2.0;
    assert!((longest - (packed + (16.0 - packed) * 128.0 / 131_072.0)).abs() < 1e-6, "{longest}");
    assert!(value["study"]["keys"].as_array().is_some_and(|keys| keys.len() == 6));

    let table = String::from_utf8(folder.read("out.csv")).unwrap();
    assert_eq!(table.lines().count(), 4);
    assert!(table.starts_with("scheme,summary,bits,bits_at_8192"), "{table}");

    let page = std::fs::read_to_string(format!("{report}/index.html")).unwrap();
    assert!(["kivi", "quarot", "fp16", "<svg", "prefers-color-scheme"].iter().all(|part| page.contains(part)));
    assert!(!page.contains("NaN") && !page.contains("<script") && !page.contains("src="));
    let links = page.matches("http").count();
    assert_eq!(links, page.matches("http://www.w3.org/2000/svg").count(), "the page asks for nothing");
}

#[test]
fn retrieval_is_a_column_of_its_own() {
    let folder = Folder::new();
    let (text, json) = (folder.write("text.txt", english()), folder.file("out.json"));
    let options = ["compare", "--text", &text, "--schemes", "kivi", "--context", "1024", "--windows", "1"];
    let done = run(&[&options[..], &["--samples", "1", "--json", &json]].concat()).succeeds();
    assert!(done.stderr.contains("noise sentences stand in for essays"), "{}", done.stderr);
    let value: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    assert_eq!(value["comparison"]["retrieval_context"], 1024);
    for row in value["comparison"]["rows"].as_array().unwrap() {
        let share = row["retrieval"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&share), "{row}");
    }
    // The model finds a number in noise again as long as its cache is whole.
    assert!(value["comparison"]["rows"][0]["retrieval"].as_f64().unwrap() > 0.0);
}

#[test]
fn prompts_of_several_lengths_have_columns_of_their_own() {
    let folder = Folder::new();
    let (text, json, csv) = (folder.write("text.txt", english()), folder.file("out.json"), folder.file("out.csv"));
    let options = ["compare", "--text", &text, "--schemes", "kivi", "--context", "256", "--windows", "1"];
    let prompts = ["--samples", "1", "--retrieval-context", "512,320", "--json", &json, "--csv", &csv];
    let done = run(&[&options[..], &prompts].concat()).succeeds();
    assert!(done.stdout.contains("retrieval at 320  retrieval at 512"), "{}", done.stdout);
    let value: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    assert_eq!(value["comparison"]["retrieval_context"], 512);
    for row in value["comparison"]["rows"].as_array().unwrap() {
        let at: Vec<(usize, f64)> = serde_json::from_value(row["retrieval_at"].clone()).unwrap();
        assert_eq!([at[0].0, at[1].0], [320, 512]);
        assert_eq!(row["retrieval"].as_f64().unwrap(), (at[0].1 + at[1].1) / 2.0);
    }
    let table = String::from_utf8(folder.read("out.csv")).unwrap();
    assert!(table.lines().next().unwrap().ends_with(",retrieval_at_320,retrieval_at_512"), "{table}");
    run(&[&options[..], &["--retrieval-context", "512,9000"]].concat()).fails_with(&["9000", "8192"]);
}

#[test]
fn schemes_without_their_calibration_are_left_out_of_all_and_refused_by_name() {
    let folder = Folder::new();
    let text = folder.write("text.txt", english());
    let model = fixture("llama32-old-bf16");
    let options = ["compare", "-m", &model, "--text", &text, "--context", "256", "--windows", "1", "--samples", "0"];
    let done = run(&options).succeeds();
    for name in ["rotatekv", "resq", "dibit"] {
        assert!(done.stderr.contains(&format!("{name} is left out")), "{}", done.stderr);
        assert!(done.stderr.contains(&format!("dibit calibrate --kv {name}")), "{}", done.stderr);
    }
    assert!(!done.stdout.contains("rotatekv") && done.stdout.contains("akvq-vl"), "{}", done.stdout);
    // Without its adapters a corrected scheme runs, which is said.
    assert!(done.stderr.contains("kvlinc: no adapters") && done.stdout.contains("kvlinc "), "{}", done.stderr);
    run(&[&options[..], &["--schemes", "rotatekv"]].concat())
        .fails_with(&["rotatekv needs a calibration", "--calibration"]);
}

#[test]
fn what_cannot_run_is_said_before_anything_does() {
    let folder = Folder::new();
    let text = folder.write("text.txt", english());
    let compare = |more: &[&str]| run(&[&["compare", "--text", &text, "--context", "256"], more].concat());
    compare(&["--schemes", "kiwi"]).fails_with(&["did you mean 'kivi'"]);
    compare(&["--schemes", "kivi", "--report", &text]).fails_with(&["cannot make the directory", "text.txt"]);
    compare(&["--schemes", "kivi", "--csv", &folder.file("none/out.csv")]).fails_with(&["directory does not exist"]);
    compare(&["--schemes", "kivi", "--haystack", &folder.file("none.txt")]).fails_with(&["none.txt"]);
    compare(&["--schemes", "kivi"]).fails_with(&["--samples 0", "needs 283 tokens"]);
    compare(&["--schemes", "resq", "--calibration", &folder.file("none.safetensors")])
        .fails_with(&["none.safetensors"]);
    run(&["compare", "--text", &folder.write("short.txt", "Too short."), "--schemes", "kivi", "--samples", "0"])
        .fails_with(&["a window needs 2047"]);
    run(&["compare", "--text", &text, "--schemes", "kivi", "--context", "99999", "--samples", "0"])
        .fails_with(&["between 2 and"]);
}
