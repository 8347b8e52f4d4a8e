//! What the metadata of GGUF files says of a model, as llama.cpp reads it, and their tensors.

mod common;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::{Gguf, made_up};
use dibit_model::{ModelError, ModelFiles, Pretrained, RopeScaling, WeightSource};

fn load(change: impl FnOnce(&mut Gguf)) -> Result<Pretrained, ModelError> {
    let mut file = made_up(GgmlDType::Q8_0);
    change(&mut file);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sha256-0123");
    file.write(&path);
    assert!(ModelFiles::is_gguf(&path), "a file is known by its first bytes");
    Pretrained::load(&ModelFiles::open_gguf(&path)?, WeightSource::Checkpoint, None)
}

fn with(values: &[(&str, Value)]) -> Result<Pretrained, ModelError> {
    load(|file| values.iter().for_each(|(key, value)| file.set(&format!("qwen3.{key}"), value.clone())))
}

fn fails(loaded: Result<Pretrained, ModelError>, words: &[&str]) {
    let message = loaded.err().unwrap_or_else(|| panic!("{words:?}: it loads")).to_string();
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

fn text(text: &str) -> Value {
    Value::String(text.into())
}

fn numbers(values: &[u32]) -> Value {
    Value::Array(values.iter().map(|value| Value::U32(*value)).collect())
}

fn vector(len: usize) -> QTensor {
    let ones = Tensor::ones(len, candle_core::DType::F32, &Device::Cpu).unwrap();
    QTensor::quantize(&ones, GgmlDType::F32).unwrap()
}

#[test]
fn rope_scaling_is_what_llama_cpp_makes_of_it() {
    let (factor, old) = (("rope.scaling.factor", Value::F32(4.0)), ("rope.scale_linear", Value::F32(2.0)));
    let kind = |kind: &str| ("rope.scaling.type", text(kind));
    let linear = |factor| RopeScaling::Linear { factor };
    for (values, expected) in [
        (vec![], RopeScaling::Default),
        // Without a type, a factor is linear.
        (vec![factor.clone()], linear(4.0)),
        (vec![old.clone()], linear(2.0)),
        (vec![factor.clone(), old.clone()], linear(4.0)),
        (vec![kind("linear"), factor.clone()], linear(4.0)),
        (vec![kind("linear"), old], linear(2.0)),
        (vec![kind("linear")], RopeScaling::Default),
        (vec![("rope.scaling.factor", Value::F32(0.0))], RopeScaling::Default),
        (vec![("rope.scaling.factor", Value::F32(1.0))], RopeScaling::Default),
        (vec![kind("none"), factor.clone()], RopeScaling::Default),
    ] {
        assert_eq!(with(&values).unwrap().config.rope.scaling, expected, "{values:?}");
    }
    fails(with(&[kind("proportional"), factor.clone()]), &["'proportional'", "linear"]);
    let yarn = [kind("yarn"), factor.clone(), ("rope.scaling.original_context_length", Value::U32(64))];
    match with(&yarn).unwrap().config.rope.scaling {
        RopeScaling::Yarn { factor, original_max_position_embeddings, beta, truncate, attention_factor } => {
            assert_eq!((factor, original_max_position_embeddings, beta, truncate), (4.0, 64.0, [32.0, 1.0], true));
            assert!((attention_factor - 1.138_629_4).abs() < 1e-6);
        }
        other => panic!("{other:?}"),
    }
    fails(with(&[("rope.scaling.attn_factor", Value::F32(1.2))]), &["qwen3.rope.scaling.attn_factor 1.2"]);
    let divisors = |file: &mut Gguf| drop(file.tensors.insert("rope_freqs.weight".into(), vector(32)));
    let scaling = load(divisors).unwrap().config.rope.scaling;
    assert!(matches!(scaling, RopeScaling::Divisors(divisors) if divisors[..] == [1.0; 32]));
    let both = load(|file| {
        divisors(file);
        file.set("qwen3.rope.scaling.factor", factor.1);
    });
    fails(both, &["rope_freqs.weight", "'linear'"]);
    fails(load(|file| drop(file.tensors.insert("rope_factors_long.weight".into(), vector(32)))), &["longrope"]);
}

#[test]
fn equal_numbers_for_each_layer_are_one_number() {
    let plain = with(&[]).unwrap().config;
    let lists = with(&[
        ("attention.head_count", numbers(&[4, 4])),
        ("attention.head_count_kv", numbers(&[2, 2])),
        ("feed_forward_length", numbers(&[512, 512])),
        ("rope.freq_base", Value::Array(vec![Value::F32(10_000.0); 2])),
    ]);
    assert_eq!(lists.unwrap().config, plain);
    let differ = numbers(&[2, 1, 2, 2, 2, 2, 2, 2, 2]);
    fails(with(&[("attention.head_count_kv", differ)]), &["qwen3.attention.head_count_kv", "2, 1, 2", ", …", "alike"]);
    fails(with(&[("attention.head_count_kv", numbers(&[]))]), &["qwen3.attention.head_count_kv", "empty list"]);
    let floats = Value::Array(vec![Value::F32(2.0); 2]);
    fails(with(&[("attention.head_count_kv", floats)]), &["qwen3.attention.head_count_kv", "whole numbers"]);
}

#[test]
fn keys_that_change_a_model_are_named() {
    fails(with(&[("attn_logit_softcapping", Value::F32(50.0))]), &["qwen3.attn_logit_softcapping 50"]);
    fails(with(&[("logit_scale", Value::F32(0.5))]), &["qwen3.logit_scale 0.5"]);
    fails(with(&[("attention.causal", Value::Bool(false))]), &["qwen3.attention.causal false"]);
    fails(load(|file| file.set("general.type", text("adapter"))), &["LoRA adapter", "llama-export-lora"]);
    let neutral = [
        ("attn_logit_softcapping", Value::F32(0.0)),
        ("logit_scale", Value::F32(1.0)),
        ("attention.causal", Value::Bool(true)),
    ];
    with(&neutral).unwrap();
}

#[test]
fn minus_one_is_no_token() {
    for none in [Value::I32(-1), Value::U32(u32::MAX)] {
        let loaded = load(|file| file.set("tokenizer.ggml.eos_token_id", none)).unwrap();
        assert_eq!(loaded.config.eos_token_ids, [0u32; 0]);
    }
}

#[test]
fn tensors_that_nobody_reads_are_told() {
    let added = |name: &str| load(|file| drop(file.tensors.insert(name.into(), vector(64))));
    for (name, words) in [
        ("blk.0.attn_sub_norm.weight", "another architecture"),
        ("blk.1.ffn_gate_inp.weight", "mixture of experts"),
        ("blk.2.attn_q.weight", "num_hidden_layers 2"),
        ("blk.0.attn_q.weight.lora_a", "merge it first"),
        ("output_norm.bias", "another architecture"),
    ] {
        fails(added(name), &[name, words, "Qwen3ForCausalLM does not read"]);
    }
    added("v.patch_embd.weight").unwrap();
}
