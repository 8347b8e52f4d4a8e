//! Files of models that are not what they seem: others in their place, parts that nobody reads, other spellings.

mod common;
#[path = "../../model/tests/common/mod.rs"]
mod file;

use candle_core::quantized::GgmlDType;
use common::{Folder, Run, Tensor, finish, greedy, program, read_tensors, run, words, write_tensors};
use file::{Gguf, made_up, tiny};
use serde_json::json;
use std::path::Path;

const WEIGHTS: &str = "model.safetensors";
const POINTER: &str = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n";
const PAGE: &str = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>";
const REFUSAL: &str = r#"{"error":"Access to model x/y is restricted"}"#;

fn generate(model: &str) -> Run {
    run(&["generate", "--kv", "kivi", "--model", model, "-n", "4", "--temperature=0", "Hello"])
}

fn inspect(model: &str) -> Run {
    run(&["inspect", "--kv", "kivi", "--model", model])
}

fn with_tensors(change: impl FnOnce(&mut Vec<Tensor>)) -> Folder {
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    let mut tensors = read_tensors(&folder.read(WEIGHTS));
    change(&mut tensors);
    folder.write(WEIGHTS, write_tensors(&tensors));
    folder
}

fn tensor(name: &str, like: &Tensor) -> Tensor {
    Tensor { name: name.into(), dtype: like.dtype.clone(), shape: like.shape.clone(), data: like.data.clone() }
}

#[test]
fn what_lies_in_place_of_a_file_is_named() {
    let kinds = [
        (POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull` in "),
        (PAGE, "is a web page (HTML)"),
        (REFUSAL, "'Access to model x/y is restricted'"),
    ];
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS] {
        for (contents, words) in kinds {
            let folder = Folder::of_fixture("qwen2-bias-bf16");
            folder.write(name, contents);
            generate(folder.path()).fails_with(&[name, words]);
        }
    }
    for name in ["model-00002-of-00002.safetensors", "model.safetensors.index.json"] {
        for (contents, words) in kinds {
            let folder = Folder::of_fixture("llama2-linear-f16");
            folder.write(name, contents);
            for command in [generate, inspect] {
                command(folder.path()).fails_with(&[name, words]);
            }
        }
    }
    let folder = Folder::new();
    for (contents, words) in kinds {
        generate(&folder.write("model.gguf", contents)).fails_with(&["model.gguf", words]);
    }
}

#[test]
fn an_adapter_is_no_model() {
    let folder = Folder::new();
    folder.write("adapter_config.json", "{}");
    folder.write("adapter_model.safetensors", "");
    generate(folder.path()).fails_with(&[folder.path(), "is a LoRA adapter", "merge_and_unload"]);
    let folder = with_tensors(|all| {
        let extra = tensor("model.layers.0.self_attn.q_proj.lora_A.weight", &all[0]);
        all.push(extra);
    });
    generate(folder.path()).fails_with(&["q_proj.lora_A.weight", "does not read", "merge_and_unload"]);
}

#[test]
fn tensors_that_nobody_reads_are_told() {
    let with = |name: &str| {
        with_tensors(|all| {
            let extra = tensor(name, &all[0]);
            all.push(extra);
        })
    };
    for (name, words) in [
        ("model.layers.0.self_attn.q_norm.weight", "probably a Qwen3"),
        ("model.layers.1.mlp.router.weight", "another architecture"),
        ("model.layers.2.mlp.up_proj.weight", "num_hidden_layers 2"),
    ] {
        generate(with(name).path()).fails_with(&[name, "Qwen2ForCausalLM does not read", words]);
    }
    let folder = with("visual.patch.weight");
    let done = generate(folder.path()).succeeds();
    assert!(done.stderr.contains("WARN") && done.stderr.contains("visual.patch.weight"), "{}", done.stderr);
    let folder = with("model.layers.0.self_attn.rotary_emb.inv_freq");
    let done = generate(folder.path()).succeeds();
    assert!(!done.stderr.contains("WARN"), "{}", done.stderr);

    let prefixed = with_tensors(|all| {
        for tensor in all {
            tensor.name = format!("language_model.{}", tensor.name);
        }
    });
    let words =
        ["no tensor 'model.embed_tokens.weight'", "language_model.model.embed_tokens.weight", "images and text"];
    generate(prefixed.path()).fails_with(&words);
}

#[test]
fn biases_are_as_the_configuration_says() {
    let folder = Folder::of_fixture("llama32-old-bf16");
    let mut tensors = read_tensors(&folder.read(WEIGHTS));
    let rows = tensors.iter().find(|t| t.name == "model.layers.0.mlp.up_proj.weight").unwrap().shape[0];
    let bias = "model.layers.0.mlp.up_proj.bias";
    tensors.push(Tensor { name: bias.into(), dtype: "BF16".into(), shape: vec![rows], data: vec![0; 2 * rows] });
    folder.write(WEIGHTS, write_tensors(&tensors));
    generate(folder.path()).fails_with(&[bias, "mlp_bias"]);
    folder.edit("config.json", json!({"mlp_bias": null}));
    generate(folder.path()).succeeds();
    folder.edit("config.json", json!({"mlp_bias": true}));
    generate(folder.path()).fails_with(&["no tensor", "model.layers.0.mlp.gate_proj.bias"]);
}

#[test]
fn an_output_layer_of_its_own_is_used_and_a_copy_is_none() {
    let model = |change: &dyn Fn(&mut Tensor)| {
        with_tensors(|all| {
            let embed = all.iter().find(|t| t.name == "model.embed_tokens.weight").unwrap();
            let mut head = tensor("lm_head.weight", embed);
            change(&mut head);
            all.push(head);
        })
    };
    let plain = generate(&common::fixture("qwen2-bias-bf16")).succeeds();
    let copy = model(&|_| {});
    let done = generate(copy.path()).succeeds();
    assert_eq!((done.stdout, done.stderr.contains("WARN")), (plain.stdout.clone(), false));
    // Rows the other way round: other tokens.
    let other = model(&|head| {
        let row = head.data.len() / head.shape[0];
        head.data = head.data.chunks(row).rev().flatten().copied().collect();
    });
    let done = generate(other.path()).succeeds();
    assert!(done.stderr.contains("WARN") && done.stderr.contains("tie_word_embeddings"), "{}", done.stderr);
    assert_ne!(done.stdout, plain.stdout);
}

#[test]
fn settings_that_scale_or_change_the_model_are_not_passed_over() {
    for (changes, words) in [
        (json!({"rope_scaling": {"factor": 2.0}}), ["factor", "rope_type"]),
        (
            json!({"rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}),
            ["rope_scaling and rope_parameters", "contradict"],
        ),
        (json!({"attn_logit_softcapping": 50.0}), ["attn_logit_softcapping 50.0", "not supported"]),
    ] {
        let folder = Folder::of_fixture("qwen2-bias-bf16");
        folder.edit("config.json", changes);
        for command in [generate, inspect] {
            command(folder.path()).fails_with(&words);
        }
    }
    // Scaling reaches the model: the text is that of the other spelling, and not that without.
    let tokens = |changes: serde_json::Value| {
        let folder = Folder::of_fixture("qwen2-bias-bf16");
        folder.edit("config.json", changes);
        greedy(&["--kv", "fp16", "--model", folder.path(), "-n", "32", &words(40)])["tokens"].clone()
    };
    let plain = tokens(json!({}));
    let scaled = tokens(json!({"rope_scaling": {"type": "linear", "factor": 8.0}}));
    assert_ne!(plain, scaled);
    let null = json!({"rope_scaling": {"rope_type": null, "type": "linear", "factor": 8.0}});
    assert_eq!(tokens(null), scaled);
    let both = json!({"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": {"rope_theta": 1e6}});
    assert_eq!(tokens(both), scaled);
}

#[test]
fn sampling_defaults_matter_only_to_who_samples() {
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    let text = folder.write("text.txt", words(200));
    let sample = |more: &[&str]| {
        run(&[&["generate", "--kv", "kivi", "--model", folder.path(), "-n", "4", "--seed", "1"], more, &["Hello"]]
            .concat())
    };
    let others = || {
        inspect(folder.path()).succeeds();
        let options = ["--context", "64", "--windows", "1", "--text", &text];
        run(&[&["perplexity", "--kv", "kivi", "--model", folder.path()], &options[..]].concat()).succeeds();
    };
    for broken in ["{", PAGE, POINTER, "\u{0}"] {
        folder.write("generation_config.json", broken);
        sample(&[]).fails_with(&["generation_config.json"]);
        others();
    }
    folder.write("generation_config.json", r#"{"do_sample": true, "temperature": "hot", "top_k": -7}"#);
    sample(&[]).fails_with(&["generation_config.json", "temperature is \"hot\""]);
    sample(&["--temperature", "1"]).fails_with(&["generation_config.json", "top_k is -7"]);
    sample(&["--temperature", "1", "--top-k", "5"]).succeeds();
    sample(&["--temperature", "0"]).succeeds();
    others();
    let spelled = r#"{"do_sample": true, "temperature": 1, "top_k": 5.0, "top_p": null, "eos_token_id": -1}"#;
    folder.write("generation_config.json", spelled);
    let expected = sample(&["--temperature", "1", "--top-k", "5"]).succeeds().stdout;
    assert_eq!(sample(&[]).succeeds().stdout, expected);
    for off in ["-1", "0"] {
        folder.write("generation_config.json", format!("{{\"do_sample\": true, \"top_k\": {off}}}"));
        sample(&[]).succeeds();
    }
}

#[test]
fn a_gguf_file_needs_no_ending_and_a_directory_may_have_it() {
    let folder = Folder::new();
    let blob = folder.file("sha256-0123456789ab");
    Gguf::of_checkpoint(&tiny(), GgmlDType::BF16).write(Path::new(&blob));
    let args = ["--kv", "fp16", "-n", "8", "Once upon a time"];
    let by_blob = greedy(&[&args[..], &["--model", &blob]].concat());
    assert_eq!(by_blob["tokens"], greedy(&args)["tokens"]);
    run(&["inspect", "--model", &blob, "--load-format", "dummy"]).fails_with(&["is a GGUF file", "config.json"]);

    let directory = folder.file("model.gguf");
    std::fs::create_dir(&directory).unwrap();
    for name in Folder::of_fixture("mistral-f32").names() {
        std::fs::copy(Path::new(&common::fixture("mistral-f32")).join(&name), Path::new(&directory).join(&name))
            .unwrap();
    }
    generate(&directory).succeeds();
    let mut list = made_up(GgmlDType::Q8_0);
    list.set("qwen3.attention.head_count_kv", candle_core::quantized::gguf_file::Value::Array(vec![]));
    list.write(Path::new(&blob));
    generate(&blob).fails_with(&["qwen3.attention.head_count_kv", "empty list"]);
}

#[test]
fn what_looks_like_a_path_is_no_such_file() {
    let folder = Folder::new();
    std::fs::create_dir(folder.file("org")).unwrap();
    let generate = |model: &str| {
        let mut command = program();
        command.args(["generate", "--kv", "kivi", "--model", model, "Hello"]).current_dir(folder.path());
        // Nobody answers there: who asks the hub gets another error.
        finish(command.env("HF_ENDPOINT", "http://127.0.0.1:9").env("HF_HOME", folder.file("home")))
    };
    for model in ["models/qwen.gguf", "other/config.json", "./x", "../x/y", "org/a/b"] {
        generate(model).fails_with(&["no such file", model, "does not exist"]);
    }
    generate("org/name").fails_with(&["no such file", "in the folder org", "org/name@main"]);
    for model in ["org/name@main", "other/name"] {
        generate(model).fails_with(&[model, "from the hub"]);
    }
}
