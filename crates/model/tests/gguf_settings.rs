//! What the metadata of GGUF files says of a model, as llama.cpp reads it, and their tensors.

mod common;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::{Gguf, made_up};
use dibit_model::{ModelConfig, ModelError, ModelFiles, Pretrained, RopeScaling, WeightSource};
use std::sync::Arc;

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
    let factors = |file: &mut Gguf, names: &[&str], len: usize| {
        names.iter().for_each(|name| drop(file.tensors.insert(format!("rope_factors_{name}.weight"), vector(len))));
        file.set("qwen3.rope.scaling.original_context_length", Value::U32(64));
    };
    let scaling = load(|file| factors(file, &["short", "long"], 32)).unwrap().config.rope.scaling;
    assert!(matches!(scaling, RopeScaling::LongRope { original_max_position_embeddings: 64.0, .. }), "{scaling:?}");
    fails(load(|file| factors(file, &["long"], 32)), &["longrope", "rope_factors_short.weight", "convert the model"]);
    fails(load(|file| factors(file, &["short", "long"], 8)), &["32 positive numbers short_factor"]);
    fails(with(&[kind("longrope")]), &["longrope", "rope_factors_long.weight"]);
    let beside = load(|file| {
        factors(file, &["short", "long"], 32);
        file.set("qwen3.rope.scaling.type", text("yarn"));
    });
    fails(beside, &["rope_factors_long.weight", "'yarn'"]);
}

/// What is read of the metadata of another family, which has the values of this one.
fn family(name: &str, values: &[(&str, Value)]) -> Result<ModelConfig, ModelError> {
    let mut file = made_up(GgmlDType::Q8_0).named(name);
    values.iter().for_each(|(key, value)| file.set(&format!("{name}.{key}"), value.clone()));
    let files = ModelFiles::from_gguf(Arc::new(file.bytes()), "model.gguf")?;
    ModelConfig::parse(&files.config, "the metadata")
}

fn refused(family: Result<ModelConfig, ModelError>, words: &[&str]) {
    let message = family.expect_err("it is read").to_string();
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

#[test]
fn factors_of_granite_are_those_of_the_file() {
    let logits = ("logit_scale", Value::F32(8.0));
    let scale = |key: &'static str, value: f32| (key, Value::F32(value));
    let all =
        [logits.clone(), scale("attention.scale", 0.5), scale("embedding_scale", 12.0), scale("residual_scale", 0.25)];
    let spec = family("granite", &all).unwrap().spec;
    assert_eq!((spec.embedding_multiplier, spec.residual_multiplier, spec.logits_scaling), (12.0, 0.25, 8.0));
    assert_eq!(spec.attention_multiplier, Some(0.5));
    // As llama.cpp reads it, without a scale attention is scaled by its heads, of 64 channels.
    let spec = family("granite", &[logits.clone(), scale("residual_scale", 0.0)]).unwrap().spec;
    assert_eq!((spec.attention_multiplier, spec.residual_multiplier), (Some(0.125), 1.0));
    refused(family("granite", &[]), &["granite.logit_scale", "convert the model again"]);
    let finetuned = ("rope.scaling.finetuned", Value::Bool(false));
    refused(family("granite", &[logits, finetuned]), &["granite.rope.scaling.finetuned false", "rotary"]);
    refused(family("smollm3", &[scale("residual_scale", 0.25)]), &["smollm3.residual_scale 0.25"]);
}

#[test]
fn layers_with_a_window_are_those_of_the_file_or_the_family() {
    let numbers = |key: &'static str, value: u32| (key, Value::U32(value));
    let experts = [
        numbers("expert_count", 4),
        numbers("expert_used_count", 2),
        numbers("expert_feed_forward_length", 512),
        numbers("attention.sliding_window", 100),
    ];
    let windows = |values: &[(&str, Value)]| {
        let config = family("gpt-oss", &[&experts, values].concat())?;
        Ok::<_, ModelError>([0, 1].map(|layer| config.spec.window(layer).is_some()))
    };
    let pattern = |value| [("attention.sliding_window_pattern", value)];
    let flags = |flags: &[bool]| Value::Array(flags.iter().map(|own| Value::Bool(*own)).collect());
    assert_eq!(windows(&[]).unwrap(), [true, false]);
    assert_eq!(windows(&pattern(Value::U32(3))).unwrap(), [true, true]);
    assert_eq!(windows(&pattern(Value::U32(1))).unwrap(), [false, false]);
    assert_eq!(windows(&pattern(flags(&[false, true]))).unwrap(), [false, true]);
    let message = windows(&pattern(flags(&[true]))).unwrap_err().to_string();
    assert!(message.contains("sliding_window_pattern") && message.contains("1 values for 2 layers"), "{message}");
    for missing in 0..experts.len() {
        let mut fewer = experts.to_vec();
        let (key, _) = fewer.remove(missing);
        refused(family("gpt-oss", &fewer), &[&format!("gpt-oss.{key}"), "convert the model again"]);
    }
    refused(
        family("olmo2", &[numbers("attention.sliding_window", 100)]),
        &["olmo2.attention.sliding_window 100", "OLMo 3"],
    );
    assert_eq!(family("phi3", &[numbers("attention.sliding_window", 0)]).unwrap().spec.window(0), None);
    assert_eq!(family("phi3", &[numbers("attention.sliding_window", 100)]).unwrap().spec.window(1), Some(100));
}

#[test]
fn heads_of_phi_may_turn_in_part() {
    let turned = |name: &str, channels: u32| family(name, &[("rope.dimension_count", Value::U32(channels))]);
    for channels in [2, 30, 48, 62] {
        let frequencies = turned("phi3", channels).unwrap().inv_freq();
        assert_eq!(frequencies.iter().filter(|own| **own > 0.0).count(), channels as usize / 2);
    }
    for (name, channels) in [("phi3", 66), ("olmo2", 48)] {
        refused(turned(name, channels), &[&format!("{name}.rope.dimension_count {channels}"), "64, the whole head"]);
    }
    refused(turned("phi3", 47), &["no even number"]);
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
