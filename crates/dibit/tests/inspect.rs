//! `dibit inspect` as a user runs it.

mod common;

use common::{Folder, SCHEMES, fixture, greedy, run, words};
use serde_json::{Value, json};

fn inspect(args: &[&str]) -> Value {
    run(&[&["inspect", "--json"], args].concat()).json()
}

fn scheme<'a>(report: &'a Value, name: &str) -> &'a Value {
    let all = report["schemes"].as_array().unwrap();
    all.iter().find(|scheme| scheme["scheme"] == name).unwrap_or_else(|| panic!("no {name} in {report}"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

#[test]
fn a_pass_is_planned_as_prompts_are_read() {
    let rows = |own: &[&str]| {
        let report = inspect(&[&["--device", "cpu", "--context", "3000", "--kv", "kivi"], own].concat());
        [&scheme(&report, "kivi")["pass_rows"], &scheme(&report, "kivi")["pass_bytes"]].map(number)
    };
    let [cells, small, exact] = [rows(&[]), rows(&["--cell", "128"]), rows(&["--prefill", "exact"])];
    assert_eq!([cells[0], small[0], exact[0]], [256.0, 128.0, 3000.0]);
    assert!(small[1] < cells[1] && cells[1] < exact[1]);
    // What is told to fit does by its own plan, with little left; a prompt that is one pass takes room for its rows.
    let fit = |context: f64, own: &[&str]| {
        let context = (context as usize).to_string();
        let report = inspect(&[&["--device", "cpu", "--context", &context, "--kv", "kivi"], own].concat());
        let own = scheme(&report, "kivi");
        let needed = number(&own["cache_bytes"]) + number(&own["pass_bytes"]) + number(&report["weights_bytes"]);
        (number(&own["tokens_that_fit"]), needed / number(&report["available_bytes"]))
    };
    for own in [&[][..], &["--prefill", "exact"]] {
        // A context that the command takes.
        let most = fit(3000.0, own).0.min(f64::from(1 << 27));
        let share = fit(most, own).1;
        assert!((0.9..1.1).contains(&share) || most == f64::from(1 << 27), "{own:?}: {most} tokens, {share}");
    }
    assert!(fit(3000.0, &["--prefill", "exact"]).0 < 0.7 * fit(3000.0, &[]).0);
}

#[test]
fn the_table_tells_weights_and_every_scheme() {
    let table = run(&["inspect", "--kv", &SCHEMES.join(",")]).succeeds().stdout;
    assert!(table.starts_with("tiny (bundled): LlamaForCausalLM, 6 layers"), "{table}");
    assert!(table.contains("weights 30.0 MiB") && table.contains("context 8192 tokens, batch 1"), "{table}");
    let first: Vec<&str> = table.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(first[3..8], ["scheme", "fp16", "kivi", "kivi-paper", "kvlinc"], "{table}");
    assert!(table.contains("\nkvlinc: calibration bundled (key "), "{table}");
}

#[test]
fn the_bundled_models_cache_is_what_its_shape_implies() {
    let report = inspect(&["--kv", "fp16,kvlinc"]);
    assert_eq!((&report["context"], &report["batch"]), (&json!(8192), &json!(1)));
    // 6 layers of 2 KV heads of 64 channels. A packed token takes 16 bytes of codes on either side, 2 bytes for
    // each key channel's scale and for its minimum in 128 tokens, and 4 bytes for its own values' scale and minimum.
    let heads = 6.0 * 2.0;
    let (half, packed) = (scheme(&report, "fp16"), scheme(&report, "kvlinc"));
    assert_eq!(number(&half["bytes_per_token"]), heads * 2.0 * 64.0 * 2.0);
    assert_eq!(number(&packed["bytes_per_token"]), heads * (16.0 + 64.0 * 4.0 / 128.0 + 16.0 + 4.0));
    assert_eq!(number(&half["bits"]), 16.0);
    assert_eq!(number(&half["fp16_bytes"]), 8192.0 * number(&half["bytes_per_token"]));
    // 128 of 8192 tokens are in 16 bit, or up to 127 more until a page is full.
    assert!((2.375..2.375 + 16.0 * 255.0 / 8192.0).contains(&number(&packed["bits"])), "{packed}");
    assert!(number(&packed["cache_bytes"]) < number(&half["cache_bytes"]) / 5.0);
}

#[test]
fn planned_bytes_are_those_that_generation_allocates() {
    let folder = Folder::of_fixture("llama32-old-bf16");
    folder.edit("config.json", json!({"max_position_embeddings": 8192}));
    let model = ["-m", folder.path()];
    for (prompt, schemes) in [(words(300), &SCHEMES[..]), (words(2500), &["kvlinc"])] {
        for name in schemes {
            let cache = greedy(&[&model[..], &["--kv", name, "-n", "3", &prompt]].concat())["cache"].clone();
            let report = inspect(&[&model[..], &["--kv", name, "--context", &cache["tokens"].to_string()]].concat());
            let planned = scheme(&report, name);
            let (planned_bytes, allocated) = (number(&planned["cache_bytes"]), number(&cache["allocated_bytes"]));
            assert!((planned_bytes / allocated - 1.0).abs() < 0.01, "{name}: {planned} for {cache}");
            assert!((number(&planned["bits"]) - number(&cache["bits"])).abs() < 1e-9, "{name}: {planned} for {cache}");
        }
    }
}

#[test]
fn layers_with_a_window_take_no_more_than_what_they_see() {
    let folder = Folder::new();
    let config = json!({"architectures": ["Gemma3ForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 6, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "vocab_size": 384,
        "max_position_embeddings": 32768, "sliding_window": 512});
    let model = folder.write("config.json", config.to_string());
    let model = ["--load-format", "dummy", "-m", &model];
    let report = inspect(&[&model[..], &["--kv", "fp16,kivi", "--context", "32768"]].concat());
    let (half, packed) = (scheme(&report, "fp16"), scheme(&report, "kivi"));
    // Of fp16 one layer keeps 256 pages and five keep five each; pages of 64 channels take 32 KiB.
    let pages = f64::from(256 + 5 * 5) * 32.0 * 1024.0;
    assert!((number(&half["cache_bytes"]) / pages - 1.0).abs() < 0.01, "{half}");
    assert!((number(&half["full_attention_bytes"]) / number(&half["fp16_bytes"]) - 1.0).abs() < 0.01, "{half}");
    assert!(number(&packed["full_attention_bytes"]) > 3.0 * number(&packed["cache_bytes"]), "{packed}");
    let table = run(&[&["inspect"], &model[..], &["--kv", "kivi"]].concat()).succeeds().stdout;
    assert!(table.contains("kivi: 5 layers see the last 512 tokens: a cache of "), "{table}");
    // What is planned is what is allocated.
    for name in ["fp16", "kivi", "k3v2"] {
        let run = ["--kv", name, "-n", "2", &words(1500)];
        let cache = greedy(&[&model[..], &run].concat())["cache"].clone();
        let report = inspect(&[&model[..], &["--kv", name, "--context", &cache["tokens"].to_string()]].concat());
        let (planned, allocated) = (number(&scheme(&report, name)["cache_bytes"]), number(&cache["allocated_bytes"]));
        assert!((planned / allocated - 1.0).abs() < 0.01, "{name}: {planned} for {cache}");
    }
}

#[test]
fn a_context_that_the_model_does_not_support_can_be_planned_for() {
    let model = fixture("llama32-old-bf16");
    let table = run(&["inspect", "-m", &model, "--context", "4096"]).succeeds().stdout;
    assert!(table.contains("context 4096 tokens (the model supports 1024)"), "{table}");
    assert_eq!(scheme(&inspect(&["-m", &model, "--context", "4096"]), "fp16")["fp16_bytes"], 4096 * 1024);
}

#[test]
fn a_batch_takes_as_often_as_much() {
    let model = fixture("qwen3-hd256-bf16");
    let of = |batch: &str| inspect(&["-m", &model, "--batch", batch, "--context", "1000"]);
    let (one, four) = (of("1"), of("4"));
    assert_eq!(four["batch"], 4);
    for name in ["fp16", "kivi", "kvlinc"] {
        let bytes = |report| number(&scheme(report, name)["cache_bytes"]);
        assert_eq!(bytes(&four), 4.0 * bytes(&one), "{name}");
    }
}

#[test]
fn weights_count_as_they_would_be_stored() {
    let model = fixture("mistral-f32");
    let report = inspect(&["-m", &model]);
    let (parameters, on_disk) = (number(&report["parameters"]), number(&report["weights_bytes"]));
    // A header is all that a file holds beside its numbers.
    assert!(on_disk > 4.0 * parameters && on_disk < 4.0 * parameters + 8192.0, "{report}");
    assert_eq!(number(&inspect(&["-m", &model, "--dtype", "bf16"])["weights_bytes"]), 2.0 * parameters);
    assert_eq!(number(&inspect(&["-m", &model, "--dtype", "f32"])["weights_bytes"]), 4.0 * parameters);
}

#[test]
fn what_a_head_size_changes_is_named() {
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    folder.edit("config.json", json!({"head_dim": 72}));
    let dummy = ["--load-format", "dummy", "-m", folder.path(), "--kv", "fp16,kvlinc"];
    let blocks = "kvlinc: values are rotated by a block-diagonal Hadamard matrix (40 + 32)";
    let shown = run(&[&["inspect", "--device", "cpu"], &dummy[..]].concat()).succeeds().stdout;
    assert!(shown.contains(&format!("\n{blocks}")), "{shown}");
    assert!(shown.contains("rows in 16 bit  16 channels at once, the last 8 by themselves"), "{shown}");
    let report = inspect(&dummy);
    let notes = |name: &str| scheme(&report, name)["notes"].as_array().unwrap().clone();
    assert!(notes("fp16").is_empty() && notes("kvlinc")[0].as_str().unwrap().starts_with(blocks), "{report}");
    // The same is said before it runs.
    let said = run(&["generate", "--load-format", "dummy", "-m", folder.path(), "--kv", "kvlinc", "-n", "1", "Hello"]);
    assert!(said.succeeds().stderr.contains(blocks));
}

#[test]
fn a_configuration_is_enough_to_plan_for_dummy_weights() {
    let folder = Folder::new();
    let config = folder.write("config.json", std::fs::read(fixture("qwen2-bias-bf16") + "/config.json").unwrap());
    let planned = inspect(&["--load-format", "dummy", "-m", &config]);
    let whole = inspect(&["-m", &fixture("qwen2-bias-bf16")]);
    assert_eq!(planned["parameters"], whole["parameters"]);
    assert_eq!(scheme(&planned, "kvlinc")["cache_bytes"], scheme(&whole, "kvlinc")["cache_bytes"]);
    assert_eq!(number(&planned["weights_bytes"]), 2.0 * number(&planned["parameters"]));
    run(&["inspect", "-m", &config]).fails_with(&["config.json is a file", "--load-format dummy"]);
}
