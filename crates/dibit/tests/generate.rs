//! `dibit generate` as a user runs it.

mod common;

use common::{FIXTURES, Folder, Run, SCHEMES, essence, fixture, greedy, program, run, run_with_stdin, words};
use serde_json::{Value, json};
use std::io::Read;
use std::process::Stdio;

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is not a count"))
}

fn text(completion: &Value) -> &str {
    completion["text"].as_str().unwrap()
}

#[test]
fn the_text_begins_with_the_prompt_and_the_summary_names_the_bits() {
    let done = run(&["generate", "--temperature=0", "-n", "8", "Once upon a time"]).succeeds();
    assert!(done.stdout.starts_with("Once upon a time") && done.stdout.ends_with('\n'), "{}", done.stdout);
    assert!(done.stdout.len() > "Once upon a time\n".len());
    for part in ["tiny (bundled)", "8 generated tokens", "greedy", "in use", "8192 tokens take", "32768 tokens take"] {
        assert!(done.stderr.contains(part), "'{part}' is not in: {}", done.stderr);
    }
}

#[test]
fn json_holds_what_a_script_needs() {
    let prompt = words(300);
    let done = greedy(&["--kv", "kivi", "-n", "5", &prompt]);
    assert_eq!(done["prompt"], prompt.as_str());
    assert_eq!(done["finish_reason"], "length");
    assert_eq!(number(&done["generated_tokens"]), 5);
    assert_eq!(done["tokens"].as_array().unwrap().len(), 5);
    assert!(!text(&done).is_empty());
    let (cache, prompt_tokens) = (&done["cache"], number(&done["prompt_tokens"]));
    assert!(prompt_tokens > 300);
    // The last token is not fed back.
    assert_eq!(number(&cache["tokens"]), prompt_tokens + 4);
    assert_eq!(cache["scheme"], "kivi");
    let (used, allocated) = (number(&cache["used_bytes"]), number(&cache["allocated_bytes"]));
    assert!(used < allocated && allocated < number(&cache["fp16_bytes"]), "{cache}");
    let bits = 16.0 * used as f64 / number(&cache["fp16_bytes"]) as f64;
    assert!((cache["bits"].as_f64().unwrap() - bits).abs() < 1e-9 && bits < 16.0, "{cache}");
}

#[test]
fn greedy_text_depends_on_neither_the_run_nor_the_number_of_threads() {
    let prompt = words(300);
    for scheme in SCHEMES {
        let of = |threads: &str| essence(&greedy(&["--kv", scheme, "--threads", threads, "-n", "24", &prompt]));
        let first = of("1");
        assert_eq!(first["generated_tokens"], 24);
        for threads in ["1", "2", "3"] {
            assert_eq!(first, of(threads), "{scheme} with {threads} threads");
        }
    }
}

#[test]
fn every_family_decodes_the_same_on_any_number_of_threads() {
    let prompt = words(120);
    for name in FIXTURES {
        let model = fixture(name);
        for scheme in SCHEMES {
            let of = |threads: &str| {
                let options = ["-m", &model, "--kv", scheme, "--threads", threads, "-n", "16", &prompt];
                essence(&greedy(&options))
            };
            let (one, three) = (of("1"), of("3"));
            assert!(number(&one["cache"]["tokens"]) > 256, "nothing was packed");
            assert_eq!(one, three, "{name}, {scheme}");
        }
    }
}

#[test]
fn a_seed_repeats_its_text_and_another_one_gives_another() {
    let of = |seed: &str| {
        let options = ["generate", "--json", "--temperature=1", "-n", "24", "--seed", seed, "Once upon a time"];
        run(&options).json()
    };
    let first = of("1");
    assert_eq!(first["sampling"]["seed"], 1);
    assert_eq!(first["tokens"], of("1")["tokens"]);
    assert_ne!(first["tokens"], of("2")["tokens"]);
}

#[test]
fn the_prompt_can_come_from_stdin() {
    let prompt = "Once upon a time\n\tthere was – naïvely – a";
    let piped = run_with_stdin(&["generate", "--json", "--temperature=0", "-n", "8"], prompt.as_bytes()).json();
    assert_eq!(piped["prompt"], prompt);
    assert_eq!(essence(&piped), essence(&greedy(&["-n", "8", prompt])));
}

#[test]
fn prompts_that_run_together_get_what_each_gets_alone() {
    let long = words(320);
    let prompts = ["Hello", &long, "The old man", "Once upon a time there was a king who", "A"];
    let folder = Folder::new();
    let file = folder.write("prompts.txt", prompts.join("\n\n") + "\n");
    for scheme in ["fp16", "kivi", "kvlinc"] {
        // The stop string ends the texts at different times, so that places come free one by one.
        let options = ["--kv", scheme, "-n", "24", "--stop", ","];
        let alone: Vec<Value> = prompts.iter().map(|p| essence(&greedy(&[&options[..], &[p]].concat()))).collect();
        assert!(number(&alone[1]["prompt_tokens"]) > 300);
        assert!(
            alone.iter().any(|c| c["finish_reason"] == "stop") && alone.iter().any(|c| c["finish_reason"] == "length")
        );
        for parallel in [&[][..], &["--parallel", "2"], &["--parallel", "1"]] {
            let together = greedy(&[&options[..], &["--prompts", &file], parallel].concat());
            let together: Vec<Value> = together.as_array().unwrap().iter().map(essence).collect();
            assert_eq!(together, alone, "{scheme} {parallel:?}");
        }
    }
}

#[test]
fn prompts_are_printed_in_their_order() {
    let folder = Folder::new();
    let file = folder.write("prompts.txt", "Once upon\n\nThe old\n");
    let done = run(&["generate", "--temperature=0", "-n", "4", "--parallel", "1", "--prompts", &file]).succeeds();
    let texts: Vec<String> = ["Once upon", "The old"]
        .iter()
        .zip(1..)
        .map(|(prompt, index)| format!("[{index}] {prompt}{}\n\n", text(&greedy(&["-n", "4", prompt]))))
        .collect();
    assert_eq!(done.stdout, texts.concat());
    assert!(done.stderr.contains("8 generated tokens"), "{}", done.stderr);
}

#[test]
fn a_stop_string_ends_the_text_and_is_not_printed() {
    let whole = greedy(&["-n", "24", "The old man"]);
    let words: Vec<&str> = text(&whole).split(' ').collect();
    // From the middle of a word to the middle of another one.
    let stop = format!("{} {}", &words[4][1..], &words[5][..1]);
    let expected = text(&whole).split(&stop).next().unwrap();
    let done = greedy(&["-n", "24", "--stop", "not there", "--stop", &stop, "The old man"]);
    assert_eq!((text(&done), &done["finish_reason"]), (expected, &json!("stop")));
    assert!(number(&done["generated_tokens"]) < 24);
    let plain = run(&["generate", "--temperature=0", "-n", "24", "--stop", &stop, "The old man"]).succeeds();
    assert_eq!(plain.stdout, format!("The old man{expected}\n"));
}

#[test]
fn no_tokens_can_be_asked_for() {
    let model = fixture("qwen2-bias-bf16");
    let done = greedy(&["-m", &model, "--max-tokens", "0", "Hello"]);
    assert_eq!((text(&done), &done["tokens"], &done["finish_reason"]), ("", &json!([]), &json!("length")));
    assert_eq!(done["cache"]["tokens"], done["prompt_tokens"]);
    assert_eq!(run(&["generate", "-m", &model, "-n", "0", "Hello"]).succeeds().stdout, "Hello\n");
}

#[test]
fn the_end_of_the_context_ends_the_text() {
    let done = greedy(&["-m", &fixture("mistral-f32"), "--context", "12", "-n", "100", "Hello"]);
    assert_eq!((&done["finish_reason"], &done["cache"]["tokens"]), (&json!("context"), &json!(12)));
    assert_eq!(number(&done["prompt_tokens"]) + number(&done["generated_tokens"]), 13);
}

#[test]
fn weights_are_converted_where_asked_for() {
    for name in ["llama2-linear-f16", "mistral-f32", "qwen2-bias-bf16"] {
        for dtype in ["f32", "bf16"] {
            let model = fixture(name);
            let done = run(&["generate", "-m", &model, "--dtype", dtype, "-n", "4", "Hello"]).succeeds();
            assert!(done.stdout.starts_with("Hello"));
            assert!(done.stderr.contains(&format!("{dtype} on CPU")), "{name}: {}", done.stderr);
        }
    }
}

#[test]
fn a_sharded_checkpoint_is_what_its_tensors_are_in_one_file() {
    let folder = Folder::of_fixture("llama2-linear-f16");
    let options = ["-m", folder.path(), "-n", "24", "Once upon a time"];
    let sharded = greedy(&options);
    let mut tensors = Vec::new();
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        tensors.extend(common::read_tensors(&folder.read(shard)));
        folder.remove(shard);
    }
    folder.remove("model.safetensors.index.json");
    folder.write("model.safetensors", common::write_tensors(&tensors));
    assert_eq!(essence(&greedy(&options)), essence(&sharded));
}

#[test]
fn dummy_weights_need_only_a_configuration() {
    let folder = Folder::new();
    let config = folder.write("config.json", std::fs::read(fixture("qwen2-bias-bf16") + "/config.json").unwrap());
    let done = |model: &str| run(&["generate", "--load-format", "dummy", "--model", model, "--seed=1", "Hello"]);
    let first = done(&config).succeeds();
    assert!(first.stderr.contains("dummy weights") && first.stderr.contains("no tokenizer"), "{}", first.stderr);
    assert!(first.stdout.starts_with("Hello<"), "{}", first.stdout);
    assert_eq!(first.stdout, done(folder.path()).succeeds().stdout);
}

#[test]
fn heads_of_any_multiple_of_eight_generate() {
    let folder = Folder::of_fixture("llama32-old-bf16");
    let prompt = common::words(300);
    for head_dim in [48, 72] {
        folder.edit("config.json", serde_json::json!({"head_dim": head_dim, "initializer_range": 0.2}));
        let model = ["--load-format", "dummy", "-m", folder.path(), "-n", "8", &prompt];
        for kv in ["fp16", "kivi", "kvlinc", "gear", "quarot"] {
            let done = greedy(&[&model[..], &["--kv", kv]].concat());
            let tokens = done["prompt_tokens"].as_u64().unwrap() + done["generated_tokens"].as_u64().unwrap();
            assert!(done["cache"]["tokens"].as_u64().unwrap() + 1 >= tokens && tokens > 150, "{kv}: {done}");
            // Packed tokens take fewer bits.
            assert_eq!(done["cache"]["bits"].as_f64().unwrap() < 15.9, kv != "fp16", "{kv} {head_dim}: {done}");
        }
    }
}

#[test]
fn what_a_model_has_no_calibration_for_is_said() {
    let model = fixture("llama32-old-bf16");
    let notes = |more: &[&str]| run(&[&["generate", "-n", "1", "Hello"], more].concat()).succeeds().stderr;
    // The bundled model comes with what both schemes need.
    assert!(!notes(&["--kv", "kvlinc"]).contains("no adapters"));
    assert!(notes(&["-m", &model, "--kv", "kvlinc"]).contains("no adapters of the linear correction"));
    assert!(!notes(&["-m", &model, "--kv", "kivi"]).contains("correction"));
    let chosen = notes(&["-m", &model]);
    let command = format!("`dibit calibrate --kv dibit --model {model}` makes one");
    assert!(chosen.contains("no calibration of scheme dibit") && chosen.contains(&command), "{chosen}");
    assert!(chosen.contains("cache    k3v2: "), "{chosen}");
    run(&["generate", "-m", &model, "--kv", "dibit", "Hello"]).fails_with(&["dibit calibrate --kv dibit --model "]);
}

#[test]
fn calibrations_beside_a_model_are_found() {
    let folder = Folder::new();
    let tiny = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        folder.write(name, std::fs::read(tiny.join(name)).unwrap());
    }
    let summary = || run(&["generate", "-m", folder.path(), "-n", "1", "Hello"]).succeeds().stderr;
    assert!(summary().contains("k3v2: "));
    std::fs::create_dir(folder.file("calibration")).unwrap();
    std::fs::copy(tiny.join("calibration/dibit.safetensors"), folder.file("calibration/made.safetensors")).unwrap();
    let place = folder.file("calibration/made.safetensors");
    assert!(
        summary().contains("dibit: ") && summary().contains(&format!("calibration: {place} (key ")),
        "{}",
        summary()
    );
    folder.write("calibration/broken.safetensors", "nothing");
    run(&["generate", "-m", folder.path(), "-n", "1", "--kv", "kvlinc", "Hello"]).fails_with(&["broken.safetensors"]);
}

#[test]
fn a_scheme_file_of_ones_own_is_used() {
    let folder = Folder::new();
    let file = folder.write(
        "mine.toml",
        "name = \"mine\"\n[keys]\nbits = 4\n[values]\nbits = 8\ngroup = 32\n[window]\ntokens = 64\nschedule = \"guaranteed\"\n",
    );
    let done = greedy(&["--kv", &file, "-n", "4", &words(300)]);
    assert_eq!(done["cache"]["scheme"], "mine");
    let bits = done["cache"]["bits"].as_f64().unwrap();
    assert!(bits > 6.0 && bits < 16.0, "{bits}");
}

#[test]
fn a_long_prompt_is_read_in_several_passes_and_says_so() {
    let prompt = words(300);
    let of =
        |more: &[&str]| run(&[&["generate", "--temperature=0", "-n", "16", "--kv=fp16"], more, &[&prompt]].concat());
    let (cells, whole) = (of(&["--cell", "128"]).succeeds(), of(&["--prefill", "exact"]).succeeds());
    assert!(cells.stderr.contains(" is read in ") && cells.stderr.contains("prompts read in cells of 128"));
    assert!(!whole.stderr.contains(" is read in ") && whole.stderr.contains("one exact pass"), "{}", whole.stderr);
    // Nothing is packed, so that the passes see the same numbers.
    assert_eq!(cells.stdout, whole.stdout);
    let streamed = of(&["--prefill", "streaming"]).succeeds();
    assert_eq!(streamed.stdout, whole.stdout);
    // Where passes end is a choice of its own: a context or other prompts change nothing.
    let packed = |more: &[&str]| greedy(&[&["-n", "16", "--kv=k2v2"], more].concat());
    let alone = packed(&["--context", "1024", &prompt]);
    assert_eq!(alone["prefill"], "cells of 256");
    assert_eq!(alone["tokens"], packed(&["--context", "2000", &prompt])["tokens"]);
    let folder = Folder::new();
    let file = folder.write("prompts.txt", [&words(500), &prompt, "One", &words(280)].join("\n\n"));
    assert_eq!(alone["tokens"], packed(&["--prompts", &file])[1]["tokens"]);
}

#[test]
fn nothing_but_text_goes_to_a_pipe() {
    let mut command = program();
    command.args(["generate", "--temperature=0", "-n", "8", "Once upon a time"]).env("TERM", "xterm-256color");
    let Run { stdout, stderr, .. } = common::finish(&mut command).succeeds();
    let control = |c: char| c.is_control() && c != '\n';
    assert!(!stdout.contains(control) && !stderr.contains(control), "{stdout:?} {stderr:?}");
    assert_eq!(stdout.lines().count(), 1);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = std::process::Command::new(program().get_program())
        .args(["generate", "--temperature=0", "-n", "400", "Once upon a time"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 4]).unwrap();
    let done = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(done.stderr).unwrap();
    assert!(done.status.success(), "{stderr}");
    assert!(!stderr.contains("panicked") && !stderr.contains("error"), "{stderr}");
}

#[test]
fn every_id_of_the_eos_list_ends_the_text() {
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    let whole = greedy(&["-m", folder.path(), "-n", "24", "Once upon a time"]);
    let tokens = whole["tokens"].as_array().unwrap();
    let later = (3..tokens.len()).find(|&at| !tokens[..at].contains(&tokens[at])).expect("a token that is new");
    let before = greedy(&["-m", folder.path(), "-n", &later.to_string(), "Once upon a time"]);
    let ends_early = || {
        let done = greedy(&["-m", folder.path(), "-n", "24", "Once upon a time"]);
        assert_eq!(done["tokens"].as_array().unwrap(), &tokens[..=later]);
        assert_eq!((&done["finish_reason"], text(&done)), (&json!("stop"), text(&before)));
    };
    let unused = (5..).find(|id| !tokens.contains(&json!(id))).unwrap();
    folder.edit("generation_config.json", json!({"eos_token_id": [unused, tokens[later]]}));
    ends_early();
    folder.remove("generation_config.json");
    folder.edit("config.json", json!({"eos_token_id": [tokens[later], unused]}));
    ends_early();
}

#[test]
fn sampling_is_the_models_own_unless_asked_for() {
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    let sampling = |more: &[&str]| {
        run(&[&["generate", "--json", "-m", folder.path(), "-n", "1", "Hello"], more].concat()).json()["sampling"]
            .clone()
    };
    folder.edit("generation_config.json", json!({"temperature": 0.5, "top_p": 0.25, "top_k": 7}));
    let own = sampling(&[]);
    assert_eq!((&own["temperature"], &own["top_p"], &own["top_k"]), (&json!(0.5), &json!(0.25), &json!(7)));
    let asked = sampling(&["--temperature", "2", "--top-p", "1", "--top-k", "0"]);
    assert_eq!((&asked["temperature"], &asked["top_p"], &asked["top_k"]), (&json!(2.0), &json!(1.0), &json!(0)));
    folder.edit("generation_config.json", json!({"do_sample": false}));
    assert_eq!(sampling(&[])["temperature"], 0.0);
}
