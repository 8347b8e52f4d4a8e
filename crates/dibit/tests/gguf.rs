//! GGUF files as a user runs them.

mod common;
#[path = "../../model/tests/common/mod.rs"]
mod file;

use candle_core::quantized::GgmlDType;
use common::{Folder, greedy, run, run_with_stdin};
use file::{Gguf, tiny};
use std::path::Path;

const NAME: &str = "model.gguf";

/// A folder with the bundled model as a GGUF file, and the file's path.
fn bundled(dtype: GgmlDType) -> (Folder, String) {
    let folder = Folder::new();
    let path = folder.file(NAME);
    Gguf::of_checkpoint(&tiny(), dtype).write(Path::new(&path));
    (folder, path)
}

#[test]
fn values_of_quantised_projections_are_transformed_by_the_cache() {
    let (_folder, path) = bundled(GgmlDType::Q8_0);
    let values = |further: &[&str]| {
        let args = [&["inspect", "--json", "--kv", "dibit,kvlinc", "--model", &path], further].concat();
        [0, 1].map(|scheme| run(&args).json()["schemes"][scheme]["values"].clone())
    };
    // 6 layers of 2 KV heads and 6 query heads of 64.
    let counts = |fused: usize, online: usize, work: usize| serde_json::json!({"fused_layers": fused, "online_layers": online, "multiply_adds_per_token": work});
    assert_eq!(values(&[]), [counts(0, 6, 6 * 8 * 64 * 64), counts(0, 6, 6 * 8 * 64 * 7)]);
    assert_eq!(values(&["--dtype", "f32"]), [counts(6, 0, 0), counts(6, 0, 0)]);
    let shown = run(&["inspect", "--kv", "fp16,dibit", "--model", &path]).succeeds().stdout;
    assert!(
        shown.contains(
            "\ndibit: the cache transforms values, and outputs back, in 6 layers, 196608 multiply-adds a token"
        )
    );
    assert!(!shown.contains("fp16: the"), "{shown}");
}

#[test]
fn a_file_is_a_model() {
    let (_folder, path) = bundled(GgmlDType::BF16);
    for kv in ["fp16", "kvlinc"] {
        let args = ["--kv", kv, "-n", "24", "Once upon a time"];
        let expected = greedy(&args);
        assert_eq!(greedy(&[&args[..], &["--model", &path]].concat())["tokens"], expected["tokens"], "{kv}");
    }
    let (_folder, path) = bundled(GgmlDType::Q8_0);
    for (kv, words) in [
        ("kivi", ["LlamaForCausalLM", "Q8_0 on CPU"]),
        ("kvlinc", ["Q8_0 on CPU", "the cache transforms values, and outputs back, in 6 layers"]),
    ] {
        let done = run(&["generate", "--model", &path, "--kv", kv, "-n", "8", "Once upon a time"]).succeeds();
        assert!(
            !done.stdout.trim().is_empty() && words.iter().all(|word| done.stderr.contains(word)),
            "{}",
            done.stderr
        );
    }
    let done = run(&["generate", "--model", &path, "--dtype", "f32", "--kv", "kivi", "-n", "8", "Once"]).succeeds();
    assert!(done.stderr.contains("f32 on CPU"), "{}", done.stderr);
}

#[test]
fn threads_and_batches_do_not_change_a_text() {
    let (folder, path) = bundled(GgmlDType::Q4_0);
    let args = ["--model", &path, "--kv", "kivi", "-n", "16"];
    let one = greedy(&[&args[..], &["--threads", "1", "Once upon a time"]].concat());
    let two = greedy(&[&args[..], &["--threads", "2", "Once upon a time"]].concat());
    assert_eq!(one["tokens"], two["tokens"]);
    let prompts = folder.write("prompts.txt", "The wolf\nOnce upon a time\nA\n");
    let batch = greedy(&[&args[..], &["--prompts", &prompts]].concat());
    assert_eq!(batch[1]["tokens"], one["tokens"]);
}

#[test]
fn a_conversation_uses_the_files_template() {
    let (_folder, path) = bundled(GgmlDType::Q8_0);
    let done = run_with_stdin(&["chat", "--model", &path, "--kv", "kivi", "-n", "4", "--temperature=0"], b"Hello\n");
    assert!(!done.succeeds().stdout.is_empty());
}

#[test]
fn inspect_tells_how_weights_are_stored() {
    let (folder, path) = bundled(GgmlDType::Q4K);
    let report = run(&["inspect", "--json", "--model", &path]).json();
    assert_eq!(report["weights_bytes"], folder.read(NAME).len());
    let table = run(&["inspect", "--model", &path]).succeeds().stdout;
    assert!(table.contains("MiB (Q8_0 ") && table.contains(" %, Q4_K "), "{table}");
    // What is widened counts as it is in memory.
    let (folder, path) = bundled(GgmlDType::Q4_0);
    let mut bytes = folder.read(NAME);
    let (name, numbers) = (b"blk.0.attn_q.weight", 384 * 384);
    let kind = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4 + 16;
    assert_eq!(bytes[kind], 2);
    bytes[kind] = 20;
    folder.write(NAME, &bytes);
    let report = run(&["inspect", "--json", "--model", &path]).json();
    assert_eq!(report["weights_bytes"], bytes.len() + 2 * numbers - numbers / 32 * 18);
}

#[test]
fn a_path_that_is_no_gguf_model_says_what_to_do() {
    let (folder, path) = bundled(GgmlDType::Q8_0);
    let generate = |model: &str| run(&["generate", "--kv", "kivi", "--model", model, "Hello"]);
    generate("models/nothing.gguf").fails_with(&["models/nothing.gguf", "does not exist"]);
    generate(folder.path()).fails_with(&["GGUF", "give the file itself", &path]);
    run(&["inspect", "--model", &path, "--load-format", "dummy"]).fails_with(&["is a GGUF file", "config.json"]);
    let bytes = folder.read(NAME);
    folder.write(NAME, &bytes[..bytes.len() / 2]);
    for done in [generate(&path), run(&["inspect", "--model", &path])] {
        done.fails_with(&[NAME, "cut short"]);
    }
    folder.write(NAME, "no model at all");
    generate(&path).fails_with(&[NAME, "does not begin with 'GGUF'"]);
}

#[test]
#[cfg(target_os = "linux")]
fn weights_are_resident_once() {
    let (_folder, path) = bundled(GgmlDType::F32);
    let report = greedy(&["--model", &path, "--kv", "fp16", "-n", "4", "Once upon a time"]);
    let number = |value: &serde_json::Value| value.as_u64().unwrap();
    let (weights, peak) = (number(&report["memory"]["weights_bytes"]), number(&report["memory"]["peak_rss_bytes"]));
    let cache = number(&report["cache"]["allocated_bytes"]);
    assert!(peak <= weights + cache + (64 << 20), "{peak} resident, {weights} of weights, {cache} of cache");
}
