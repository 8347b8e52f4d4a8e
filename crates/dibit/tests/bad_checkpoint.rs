//! Models that are missing, damaged or not supported: each says what is wrong.

mod common;

use common::{Folder, Run, Tensor, program, read_tensors, run, run_with_stdin, write_tensors};
use serde_json::{Value, json};

const WEIGHTS: &str = "model.safetensors";

/// What is done to a copy of a fixture, and words of the error.
type Case<'a> = (&'a dyn Fn(&Folder), &'a [&'a str]);

fn generate(model: &str) -> Run {
    run(&["generate", "--kv", "kivi", "--model", model, "-n", "4", "Hello"])
}

fn inspect(model: &str) -> Run {
    run(&["inspect", "--model", model])
}

fn check(fixture: &str, cases: &[Case], commands: &[fn(&str) -> Run]) {
    for (damage, words) in cases {
        let folder = Folder::of_fixture(fixture);
        generate(folder.path()).succeeds();
        damage(&folder);
        for command in commands {
            command(folder.path()).fails_with(words);
        }
    }
}

fn with_tensors(folder: &Folder, change: impl FnOnce(&mut Vec<Tensor>)) {
    let mut tensors = read_tensors(&folder.read(WEIGHTS));
    change(&mut tensors);
    folder.write(WEIGHTS, write_tensors(&tensors));
}

/// A safetensors file that is only this header.
fn header(json: &Value) -> Vec<u8> {
    let text = json.to_string();
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

#[test]
fn a_place_without_a_model_says_what_is_missing() {
    let folder = Folder::new();
    for command in [generate, inspect] {
        command(&folder.file("nowhere")).fails_with(&["no such file", "nowhere", "does not exist", "org/name"]);
        command(folder.path()).fails_with(&[folder.path(), "no config.json"]);
    }
    let file = folder.write("file", "");
    generate(&file).fails_with(&[&file, "is a file", "--load-format dummy"]);
    let no_config: Case = (&|f| f.remove("config.json"), &["no config.json", "Hugging Face"]);
    let no_weights: Case = (&|f| f.remove(WEIGHTS), &["neither model.safetensors nor model.safetensors.index.json"]);
    let only_pickle = |f: &Folder| {
        f.remove(WEIGHTS);
        f.write("pytorch_model.bin", "");
    };
    let cases = [no_config, no_weights, (&only_pickle, &["only PyTorch weights", "convert them to safetensors"])];
    check("qwen2-bias-bf16", &cases, &[generate, inspect]);
}

#[test]
fn damaged_weights_are_told_apart() {
    let cut = |f: &Folder, at: usize| {
        f.write(WEIGHTS, &f.read(WEIGHTS)[..at]);
    };
    let replaced = |f: &Folder, bytes: &[u8]| {
        f.write(WEIGHTS, bytes);
    };
    let long_header = [&u64::from(u16::MAX).to_le_bytes()[..], b"{}"].concat();
    let no_json = [&4u64.to_le_bytes()[..], b"abcd"].concat();
    let outside = header(
        &json!({"model.norm.weight": {"dtype": "BF16", "shape": [48], "data_offsets": [1u64 << 40, (1u64 << 40) + 96]}}),
    );
    let noise: Vec<u8> = (0..1000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 | 1).collect();
    let cases: [Case; 8] = [
        (&|f| cut(f, 100_000), &[WEIGHTS, "cut short"]),
        (&|f| cut(f, 100), &[WEIGHTS, "longer than the file"]),
        (&|f| cut(f, 0), &[WEIGHTS, "it is empty"]),
        (&|f| replaced(f, &long_header), &[WEIGHTS, "longer than the file"]),
        (&|f| replaced(f, b"this is a text and no model at all"), &[WEIGHTS, "no safetensors file"]),
        (&|f| replaced(f, &noise), &[WEIGHTS, "no safetensors file"]),
        (&|f| replaced(f, &no_json), &[WEIGHTS, "damaged or no safetensors file"]),
        (&|f| replaced(f, &outside), &[WEIGHTS, "malformed"]),
    ];
    check("qwen2-bias-bf16", &cases, &[generate, inspect]);
}

#[test]
fn shards_are_all_there_and_in_the_directory() {
    const INDEX: &str = "model.safetensors.index.json";
    const SECOND: &str = "model-00002-of-00002.safetensors";
    let renamed = |f: &Folder, name: &str| {
        let index = String::from_utf8(f.read(INDEX)).unwrap();
        f.write(INDEX, index.replace(SECOND, name));
    };
    let cases: [Case; 6] = [
        (&|f| f.remove(SECOND), &[SECOND, "is missing"]),
        (&|f| renamed(f, "../x"), &[INDEX, "'../x'", "not a plain file name"]),
        (&|f| renamed(f, "/x"), &[INDEX, "'/x'", "not a plain file name"]),
        (&|f| renamed(f, ".."), &[INDEX, "'..'", "not a plain file name"]),
        (&|f| drop(f.write(INDEX, "{")), &[INDEX, "malformed"]),
        (&|f| drop(f.write(INDEX, "{}")), &[INDEX, "no weight_map"]),
    ];
    check("llama2-linear-f16", &cases, &[generate, inspect]);
}

#[test]
fn tensors_must_belong_to_the_configuration() {
    let down = "model.layers.1.mlp.down_proj.weight";
    let config = |f: &Folder, changes: Value| f.edit("config.json", changes);
    let other_dtype = |f: &Folder| {
        with_tensors(f, |tensors| tensors.iter_mut().find(|t| t.name == down).unwrap().dtype = "I16".to_owned());
    };
    let other_shape = |f: &Folder| {
        with_tensors(f, |tensors| tensors.iter_mut().find(|t| t.name == down).unwrap().shape.reverse());
    };
    let cases: [Case; 8] = [
        (&|f| config(f, json!({"hidden_size": 64})), &["[384, 48]", "[384, 64]", "do not belong together"]),
        (&|f| config(f, json!({"vocab_size": 400})), &["embed_tokens", "[384, 48]", "[400, 48]"]),
        (&|f| config(f, json!({"intermediate_size": 97})), &["mlp.gate_proj", "[96, 48]", "[97, 48]"]),
        (&other_shape, &[down, "[96, 48]", "[48, 96]"]),
        (&other_dtype, &[down, "I16", "F32, F16, BF16"]),
        (&|f| with_tensors(f, |all| all.retain(|t| t.name != down)), &["no tensor", down, "incomplete"]),
        (&|f| config(f, json!({"num_hidden_layers": 3})), &["no tensor", "model.layers.2."]),
        (
            &|f| config(f, json!({"architectures": ["Qwen3ForCausalLM"]})),
            &["q_norm", "Qwen3ForCausalLM", "another architecture"],
        ),
    ];
    check("qwen2-bias-bf16", &cases, &[generate]);
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    let cases = [
        ("qwen2-bias-bf16", json!({"architectures": ["GPT2LMHeadModel"]}), ["GPT2LMHeadModel", "Qwen3ForCausalLM"]),
        ("llama32-old-bf16", json!({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}), ["'mrope'", "llama3"]),
        ("mistral-f32", json!({"layer_types": ["linear_attention"]}), ["'linear_attention'", "sliding_attention"]),
        ("qwen2-bias-bf16", json!({"hidden_act": "gelu"}), ["'gelu'", "silu"]),
        ("qwen2-bias-bf16", json!({"quantization_config": {"quant_method": "awq"}}), ["'awq'", "bf16"]),
        ("qwen2-bias-bf16", json!({"head_dim": 75}), ["head_dim 75", "even numbers from 8 to 256"]),
    ];
    for (fixture, changes, words) in cases {
        let change = |f: &Folder| f.edit("config.json", changes.clone());
        check(fixture, &[(&change, &[&words[..], &["not supported"]].concat())], &[generate, inspect]);
    }
}

#[test]
fn configurations_that_make_no_sense_are_malformed() {
    let cases: [Case; 5] = [
        (&|f| drop(f.write("config.json", "{\"hidden_size\": ")), &["config.json", "malformed", "line 1"]),
        (&|f| drop(f.write("config.json", "")), &["config.json", "malformed", "it is empty"]),
        (&|f| drop(f.write("config.json", b"\xff\xfe")), &["config.json", "malformed", "utf-8"]),
        (&|f| f.edit("config.json", json!({"hidden_size": 0})), &["config.json", "hidden_size is 0"]),
        (&|f| f.edit("config.json", json!({"num_key_value_heads": 3})), &["num_key_value_heads 3", "not a multiple"]),
    ];
    check("qwen2-bias-bf16", &cases, &[generate, inspect]);
}

#[test]
fn the_tokenizer_must_be_there_and_fit() {
    let larger = |f: &Folder| {
        let mut json: Value = serde_json::from_slice(&f.read("tokenizer.json")).unwrap();
        let mut token = json["added_tokens"][0].clone();
        token["id"] = json!(384);
        token["content"] = json!("<|one_too_many|>");
        json["added_tokens"].as_array_mut().unwrap().push(token);
        f.write("tokenizer.json", json.to_string());
    };
    let cases: [Case; 3] = [
        (&|f| f.remove("tokenizer.json"), &["no tokenizer.json"]),
        (&|f| drop(f.write("tokenizer.json", "{")), &["tokenizer.json of ", "is malformed"]),
        (&|f| drop(f.write("tokenizer.json", "")), &["tokenizer.json", "is malformed: it is empty"]),
    ];
    check("qwen2-bias-bf16", &cases, &[generate]);
    // One with more tokens than the model has rows for is of no harm until a prompt takes such a token.
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    larger(&folder);
    generate(folder.path()).succeeds();
    let taken = run(&["generate", "--model", folder.path(), "Hello<|one_too_many|>"]);
    taken.fails_with(&["'<|one_too_many|>' of id 384", "embeddings for 384 ids"]);
}

#[test]
fn a_chat_needs_a_template_that_works() {
    let chat = |model: &str| run_with_stdin(&["chat", "--kv", "kivi", "-n", "4", "--model", model], b"Hello\n");
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    assert!(!chat(folder.path()).succeeds().stdout.is_empty());
    folder.write("chat_template.jinja", "{% for %}");
    chat(folder.path()).fails_with(&["chat template", "line 1"]);
    folder.remove("chat_template.jinja");
    folder.edit("tokenizer_config.json", json!({"chat_template": "{{ messages"}));
    chat(folder.path()).fails_with(&["chat template", "line 1"]);
    folder.edit("tokenizer_config.json", json!({"chat_template": null}));
    chat(folder.path()).fails_with(&["no chat template", "generate"]);
    folder.write("tokenizer_config.json", "{");
    chat(folder.path()).fails_with(&["tokenizer_config.json of ", "is malformed"]);
    // It also says how texts begin.
    generate(folder.path()).fails_with(&["tokenizer_config.json of ", "is malformed"]);
}

#[test]
fn a_conversation_that_the_template_refuses_gets_no_answer() {
    let folder = Folder::of_fixture("mistral-f32");
    folder.write("chat_template.jinja", "{{ raise_exception('roles must alternate') }}");
    let done = run_with_stdin(&["chat", "--model", folder.path()], b"Hello\n");
    assert!(done.stderr.contains("roles must alternate") && !done.stderr.contains("panicked"), "{}", done.stderr);
    assert_eq!((done.code, done.stdout.as_str()), (Some(1), ""));
}

#[test]
#[cfg(unix)]
fn weights_without_permission_are_named() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::of_fixture("qwen2-bias-bf16");
    let path = folder.file(WEIGHTS);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    if std::fs::read(&path).is_ok() {
        println!("skipped: permissions do not bind this user");
        return;
    }
    generate(folder.path()).fails_with(&[WEIGHTS, "Permission denied"]);
}

#[test]
fn a_hub_model_needs_a_copy_or_a_network() {
    let home = Folder::new();
    let hub = |variable: &str, value: &str| {
        let mut command = program();
        command.args(["generate", "--kv=kivi", "--model", "org/name", "Hello"]);
        common::finish(command.env("HF_HOME", home.path()).env(variable, value))
    };
    hub("HF_HUB_OFFLINE", "1").fails_with(&["org/name", "HF_HUB_OFFLINE", "not in the local cache"]);
    hub("HF_ENDPOINT", "http://127.0.0.1:9").fails_with(&["org/name", "from the hub", "check the network"]);
}
