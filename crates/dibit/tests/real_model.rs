//! The whole on real models: SmolLM2-135M-Instruct, where DIBIT_REAL_MODEL names its file (tools/real_model.sh fetches it), and Gemma.

mod common;

use common::{Folder, greedy, run, run_with_stdin};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn model() -> Option<String> {
    let model = std::env::var("DIBIT_REAL_MODEL").ok().filter(|model| !model.is_empty());
    if model.is_none() {
        eprintln!("skipped: DIBIT_REAL_MODEL names no model; tools/real_model.sh fetches one");
    }
    model
}

/// The text that perplexities are known of.
fn wikitext() -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/wikitext2/wiki.test.raw");
    let path = path.exists().then_some(path);
    if path.is_none() {
        eprintln!("skipped: WikiText-2 is not beside the repository");
    }
    path
}

#[test]
fn its_perplexity_is_that_of_other_programs() {
    let (Some(model), Some(text)) = (model(), wikitext()) else { return };
    let folder = Folder::new();
    let json = folder.file("figures.json");
    let args = ["--dtype", "f32", "--windows", "4", "--context", "2048", "--kv", "kivi", "--json", &json];
    run(&[&["perplexity", "--model", &model, "--text", text.to_str().unwrap()], &args[..]].concat()).succeeds();
    let figures: Value = serde_json::from_slice(&folder.read("figures.json")).unwrap();
    let of = |scheme: usize, figure: &str| figures["schemes"][scheme][figure].as_f64().unwrap();
    // PyTorch's figures, of an independent program; the KL of two-bit codes moves with the rounding of f32 sums.
    assert!((of(0, "perplexity") / 24.39 - 1.0).abs() < 0.005, "{}", of(0, "perplexity"));
    assert!((of(1, "kl_mean") / 0.4555 - 1.0).abs() < 0.1, "{}", of(1, "kl_mean"));
}

/// Gemma 3 270M, where DIBIT_GEMMA names its file (tools/real_model.sh --gemma fetches it).
fn gemma() -> Option<String> {
    let model = std::env::var("DIBIT_GEMMA").ok().filter(|model| !model.is_empty());
    if model.is_none() {
        eprintln!("skipped: DIBIT_GEMMA names no model; tools/real_model.sh --gemma fetches one");
    }
    model
}

#[test]
fn gemma_goes_on_as_in_other_programs() {
    let Some(model) = gemma() else { return };
    let prompt = "The capital of France is";
    let done = greedy(&["--model", &model, "--kv", "fp16", "-n", "8", prompt]);
    assert_eq!(done["text"], " the capital of the country of France.", "{done}");
}

#[test]
fn the_perplexity_of_gemma_is_that_of_other_programs() {
    let (Some(model), Some(text)) = (gemma(), wikitext()) else { return };
    let folder = Folder::new();
    let figures = |args: &[&str]| -> Value {
        let json = folder.file("figures.json");
        let all =
            [&["perplexity", "--model", &model, "--text", text.to_str().unwrap(), "--dtype", "f32"], args].concat();
        run(&[&all[..], &["--json", &json]].concat()).succeeds();
        serde_json::from_slice(&folder.read("figures.json")).unwrap()
    };
    let of = |figures: &Value, scheme: usize, name: &str| figures["schemes"][scheme][name].as_f64().unwrap();
    // PyTorch's figures, of independent programs.
    let whole = figures(&["--windows", "1", "--context", "2048", "--kv", "fp16"]);
    assert!((of(&whole, 0, "perplexity") / 11.868 - 1.0).abs() < 0.005, "{whole}");
    let packed = figures(&["--windows", "2", "--context", "1024", "--kv", "kivi"]);
    assert!((of(&packed, 0, "perplexity") / 15.17 - 1.0).abs() < 0.005, "{packed}");
    assert!((of(&packed, 1, "kl_mean") / 0.266 - 1.0).abs() < 0.15, "{packed}");
}

#[test]
fn it_answers_a_question_and_ends_its_turn() {
    let Some(model) = model() else { return };
    // In f32, as its two best answers are nearly alike: kernels that round activations to 8 bits choose the other.
    let args = ["--model", &model, "--dtype", "f32", "--kv", "fp16", "-n", "64"];
    let done = greedy(&[&args[..], &["--chat", "What is the capital of France?"]].concat());
    assert!(done["text"].as_str().unwrap().contains("Paris"), "{done}");
    assert_eq!(done["finish_reason"], "stop", "{done}");
}

#[test]
fn three_turns_end_by_themselves() {
    let Some(model) = model() else { return };
    let lines = "Hello! Who are you?\nName one colour of the rainbow.\nThank you, and goodbye.\n";
    let chat = ["chat", "--model", &model, "--kv", "fp16", "--temperature", "0", "-n", "400", "--context", "2048"];
    let done = run_with_stdin(&chat, lines.as_bytes()).succeeds();
    let turns: Vec<&str> = done.stderr.lines().filter(|line| line.contains(" tokens/s, ")).collect();
    assert_eq!(turns.len(), 3, "{}", done.stderr);
    // Neither cut nor full: each ended with the token that ends a turn.
    assert!(turns.iter().all(|turn| turn.ends_with(" bits")), "{turns:?}");
    assert!(!done.stdout.contains("<|im_"), "{}", done.stdout);
}

/// The calibration of `dibit` for this model: `dibit calibrate --model MODEL --dtype f32 --out FILE`.
const CALIBRATION: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures/real/smollm2.dibit.safetensors");

#[test]
fn two_bits_keep_it_near_sixteen() {
    let (Some(model), Some(text)) = (model(), wikitext()) else { return };
    let folder = Folder::new();
    let json = folder.file("figures.json");
    let args = ["--dtype", "f32", "--windows", "1", "--context", "2048", "--json", &json, "--calibration", CALIBRATION];
    let kv = ["--kv", "dibit,k3v2,k2v2"];
    run(&[&["perplexity", "--model", &model, "--text", text.to_str().unwrap()], &args[..], &kv].concat()).succeeds();
    let figures: Value = serde_json::from_slice(&folder.read("figures.json")).unwrap();
    let kl = |scheme: usize| figures["schemes"][scheme]["kl_mean"].as_f64().unwrap();
    // The first window costs twice as much as the mean of the four of docs/schemes.md; with room for the rounding of sums.
    assert!(kl(1) < 0.009, "dibit: {}", kl(1));
    assert!(kl(2) < 0.075, "k3v2: {}", kl(2));
    assert!(kl(3) < 0.3, "k2v2: {}", kl(3));
}

#[test]
fn a_calibration_suits_other_types_of_its_numbers() {
    let Some(model) = model() else { return };
    // Made in f32; these are the quantised weights as they lie.
    let args = ["--model", &model, "--kv", "dibit", "--calibration", CALIBRATION, "-n", "8", "--temperature", "0"];
    let done = run(&[&["generate"], &args[..], &["The capital of France is"]].concat()).succeeds();
    assert!(done.stdout.contains("Paris"), "{}", done.stdout);
}
