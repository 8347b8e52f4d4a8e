//! `dibit perplexity` as a user runs it.

mod common;

use common::{Folder, fixture, program, run};
use serde_json::Value;

/// English sentences, some 3000 tokens of the bundled model.
fn english() -> String {
    let subjects = ["The river", "An old man", "The king", "A small boat", "My sister"];
    let verbs = ["went down to", "looked for", "came back from", "was afraid of"];
    let objects = ["the sea", "a house on the hill", "the city of his father", "the long winter"];
    let sentence = |i: usize| format!("{} {} {}. ", subjects[i % 5], verbs[i / 2 % 4], objects[i / 3 % 4]);
    (0..300).map(sentence).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
fn the_reference_comes_first_and_packing_costs_something() {
    let folder = Folder::new();
    let (text, json) = (folder.write("text.txt", english()), folder.file("out.json"));
    let windows = ["--context", "512", "--windows", "2"];
    let options = [&["perplexity", "--text", &text, "--kv", "kivi", "--json", &json], &windows[..]].concat();
    let mut command = program();
    let done = common::finish(command.args(options).env("TERM", "xterm-256color")).succeeds();
    assert!(!done.stderr.contains(['\u{1b}', '\r']), "{:?}", done.stderr);

    let lines: Vec<Vec<&str>> = done.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0][0], "scheme");
    assert_eq!((lines[1][0], lines[1][2]), ("fp16", "0.00000"), "{}", done.stdout);
    assert_eq!(lines[2][0], "kivi");
    assert!(lines[2][2].parse::<f64>().unwrap() > 0.0, "{}", done.stdout);
    assert_eq!(lines[3][..4], ["1022", "tokens", "in", "2"]);

    let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    assert_eq!((&report["model"], &report["tokens"]), (&"tiny (bundled)".into(), &1022.into()));
    assert_eq!((&report["windows"], &report["context"]), (&2.into(), &512.into()));
    let [half, kivi] = &report["schemes"].as_array().unwrap()[..] else { panic!("two schemes") };
    for (entry, line) in [half, kivi].into_iter().zip(&lines[1..]) {
        let (nll, kl) = (numbers(&entry["nll"]), numbers(&entry["kl"]));
        assert_eq!((nll.len(), kl.len()), (2 * 511, 2 * 511));
        let perplexity = mean(&nll).exp();
        assert!((entry["perplexity"].as_f64().unwrap() / perplexity - 1.0).abs() < 1e-6);
        assert_eq!(line[1], format!("{perplexity:.3}"));
        assert!((entry["kl_mean"].as_f64().unwrap() - mean(&kl)).abs() < 1e-9);
        // The bundled model has learned English.
        assert!(perplexity > 1.0 && perplexity < 500.0, "{perplexity}");
    }
    assert!(numbers(&half["kl"]).iter().all(|&kl| kl == 0.0));
    assert_eq!((&half["bits"], &half["top1_agreement"]), (&16.0.into(), &1.0.into()));
    // 128 to 255 of 512 tokens are in 16 bit, the others in 2.375.
    let bits = kivi["bits"].as_f64().unwrap();
    assert!((5.7..9.2).contains(&bits), "{bits}");
    // The first 128 tokens are packed once 128 further ones are there.
    for window in numbers(&kivi["kl"]).chunks_exact(511) {
        let largest = |part: &[f64]| part.iter().copied().fold(0.0, f64::max);
        let (before, after) = (largest(&window[..255]), largest(&window[256..]));
        assert!(before < 1e-4 && after > 1e-2, "{before} {after}");
    }
}

#[test]
fn ways_to_read_a_text_are_compared_in_one_table() {
    let folder = Folder::new();
    let (text, json) = (folder.write("text.txt", english()), folder.file("out.json"));
    let options = ["perplexity", "--text", &text, "--context", "512", "--windows", "1", "--kv", "kivi"];
    let ways = ["--prefill", "streaming,cells,exact", "--cell", "128", "--json", &json];
    let done = run(&[&options[..], &ways].concat()).succeeds();
    let lines: Vec<&str> = done.stdout.lines().collect();
    let header: Vec<&str> = lines[0].split_whitespace().collect();
    assert_eq!(header[..3], ["scheme", "prefill", "perplexity"], "{}", done.stdout);
    let named = ["one exact pass", "streaming mode", "cells of 128", "one exact pass"];
    assert!(lines[1..5].iter().zip(named).all(|(line, way)| line.contains(way)), "{}", done.stdout);
    let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    let kl: Vec<f64> =
        report["schemes"].as_array().unwrap().iter().map(|own| own["kl_mean"].as_f64().unwrap()).collect();
    assert!(kl[0] == 0.0 && kl[1] > 1e-3 && kl[2] > 1e-3 && kl[3] == 0.0, "{kl:?}");
    // One way goes without saying.
    let alone = run(&options).succeeds().stdout;
    assert!(!alone.contains("streaming") && alone.contains(&format!("{:.5}", kl[1])), "{alone}");
    run(&[&options[..], &["--prefill", "cells,exact,cells"]].concat()).fails_with(&["--prefill names cells twice"]);
}

#[test]
fn schemes_are_evaluated_in_the_order_asked_for_and_fp16_only_once() {
    let folder = Folder::new();
    let text = folder.write("text.txt", english());
    let model = fixture("qwen3-hd256-bf16");
    let of = |kv: &str| {
        let options = ["perplexity", "-m", &model, "--text", &text, "--kv", kv, "--context", "256", "--windows", "1"];
        let table = run(&options).succeeds().stdout;
        let names = table.lines().skip(1).filter(|line| !line.contains("tokens in"));
        names.map(|line| line.split(' ').next().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(of("kvlinc,kivi-paper"), ["fp16", "kvlinc", "kivi-paper"]);
    assert_eq!(of("kivi, fp16"), ["fp16", "kivi"]);
    assert_eq!(of("fp16"), ["fp16"]);
}

#[test]
fn figures_do_not_depend_on_the_number_of_threads() {
    let folder = Folder::new();
    let text = folder.write("text.txt", english());
    let model = fixture("llama32-old-bf16");
    let of = |threads: &str| {
        let json = folder.file(&format!("{threads}.json"));
        let options = ["perplexity", "-m", &model, "--text", &text, "--context", "400", "--windows", "2"];
        run(&[&options[..], &["--threads", threads, "--json", &json]].concat()).succeeds();
        String::from_utf8(folder.read(&format!("{threads}.json"))).unwrap()
    };
    let one = of("1");
    assert!(one.contains("kvlinc"));
    assert_eq!(one, of("3"));
}

#[test]
fn without_a_number_of_windows_the_whole_text_is_read() {
    let folder = Folder::new();
    let text = folder.write("text.txt", "x".repeat(700));
    let model = fixture("mistral-f32");
    let json = folder.file("out.json");
    run(&["perplexity", "-m", &model, "--text", &text, "--kv=fp16", "--context", "101", "--json", &json]).succeeds();
    let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    // Every window begins with BOS, and "x" is a token of its own.
    assert_eq!((&report["windows"], &report["tokens"]), (&7.into(), &700.into()));
}

/// At fewer bits than KIVI, planes cost a fraction of its accuracy, on a text that no calibration has seen.
#[test]
fn the_bundled_calibration_makes_dibit_the_better_scheme() {
    let folder = Folder::new();
    let (text, json) = (folder.write("text.txt", english()), folder.file("out.json"));
    let options = ["perplexity", "--text", &text, "--kv", "kivi,kvlinc,dibit", "--json", &json];
    run(&[&options[..], &["--context", "1024", "--windows", "1"]].concat()).succeeds();
    let report: Value = serde_json::from_slice(&folder.read("out.json")).unwrap();
    let figure = |scheme: usize, name: &str| report["schemes"][scheme][name].as_f64().unwrap();
    assert_eq!(report["schemes"][3]["scheme"], "dibit");
    assert!(figure(3, "kl_mean") * 5.0 < figure(1, "kl_mean"), "{report}");
    assert!(figure(3, "bits") < figure(1, "bits") && figure(1, "bits") < figure(2, "bits"));
}
