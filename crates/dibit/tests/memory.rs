//! Memory of the running program.

use assert_cmd::Command;
use serde_json::Value;
use std::io::Write;
use std::path::Path;

const SLACK: u64 = 64 << 20;

/// The report of a run on a long prompt.
fn report(model: Option<&str>, scheme: &str) -> Value {
    let prompt = "It was the best of times, it was the worst of times, and nobody could say which. ".repeat(300);
    let mut command = Command::cargo_bin("dibit").unwrap();
    command.args(["generate", "--json", "--temperature", "0", "--max-tokens", "8", "--kv", scheme]).write_stdin(prompt);
    if let Some(model) = model {
        command.args(["--model", model]);
    }
    let output = command.assert().success().get_output().stdout.clone();
    serde_json::from_slice(&output).unwrap()
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Weights are resident once, and nothing grows with the context but the cache.
fn check(model: Option<&str>, scheme: &str) {
    let report = report(model, scheme);
    assert!(number(&report["cache"]["tokens"]) > 4000);
    let (weights, cache) = (number(&report["memory"]["weights_bytes"]), number(&report["cache"]["allocated_bytes"]));
    let peak = number(&report["memory"]["peak_rss_bytes"]);
    assert!(peak <= weights + cache + SLACK, "{peak} resident, {weights} of weights, {cache} of cache");
}

#[test]
#[cfg(target_os = "linux")]
fn resident_memory_is_weights_cache_and_a_constant() {
    for scheme in ["fp16", "kvlinc"] {
        check(None, scheme);
    }
    let larger = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/models/ref-qwen3-59m");
    if larger.exists() {
        check(larger.to_str(), "kvlinc");
    } else {
        std::io::stderr().write_all(b"skipped: the larger reference model is not here\n").unwrap();
    }
}
