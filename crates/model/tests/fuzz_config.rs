//! Changed configurations are errors or make sense, whatever is changed.

mod strange;

use dibit_model::{GenerationConfig, ModelConfig};
use proptest::prelude::*;
use serde_json::{Value, json};
use strange::{Largest, cases, change, changed, damage, damaged, largest_allocation};

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// Far above what reading a small text takes.
const MOST: usize = 1 << 20;

fn configs() -> [Value; 11] {
    let sizes = json!({
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
        "head_dim": 64, "hidden_act": "silu", "tie_word_embeddings": false, "bos_token_id": 1, "eos_token_id": [2, 3],
        "dtype": "bfloat16", "initializer_range": 0.02, "attention_bias": false, "quantization_config": null,
    });
    let family = |name: &str, more: Value| {
        let mut config = sizes.clone();
        config["architectures"] = json!([name]);
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        config
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256});
    [
        family("LlamaForCausalLM", json!({"rope_theta": 5e5, "rope_scaling": llama3, "mlp_bias": false})),
        family("MistralForCausalLM", json!({"sliding_window": null, "rope_scaling": {"type": "linear", "factor": 2}})),
        family(
            "Qwen2ForCausalLM",
            json!({"use_sliding_window": true, "sliding_window": 100, "max_window_layers": 2, "clip_qkv": null}),
        ),
        family(
            "Qwen3ForCausalLM",
            json!({"layer_types": ["full_attention", "full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "no_rope_layers": [1, 1]}),
        ),
        family(
            "Gemma3ForCausalLM",
            json!({"sliding_window": 100, "sliding_window_pattern": 2, "query_pre_attn_scalar": 64,
                "hidden_activation": "gelu_pytorch_tanh", "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8}}),
        ),
        family("Gemma2ForCausalLM", json!({"attn_logit_softcapping": 50, "final_logit_softcapping": null})),
        family(
            "Phi3ForCausalLM",
            json!({"partial_rotary_factor": 0.125, "original_max_position_embeddings": 256,
                "rope_scaling": {"type": "longrope", "short_factor": [1, 1, 1, 2], "long_factor": [1, 2, 3, 4]}}),
        ),
        family(
            "Qwen3MoeForCausalLM",
            json!({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
                "norm_topk_prob": true, "decoder_sparse_step": 1}),
        ),
        family(
            "GptOssForCausalLM",
            json!({"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 7, "rope_scaling": {
                "rope_type": "yarn", "factor": 8, "beta_fast": 32, "beta_slow": 1, "truncate": false}}),
        ),
        family(
            "GraniteForCausalLM",
            json!({"attention_multiplier": 0.1, "residual_multiplier": 0.2, "logits_scaling": 3}),
        ),
        family("SmolLM3ForCausalLM", json!({"no_rope_layers": [1, 0], "no_rope_layer_interval": 4})),
    ]
}

fn check(text: &str) {
    match ModelConfig::parse(text, "config.json") {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(config) => {
            assert!(config.head_dim > 0 && config.num_attention_heads.is_multiple_of(config.num_key_value_heads));
            assert!(config.num_parameters() > 0 && config.rms_norm_eps.is_finite());
            let frequencies = config.inv_freq();
            assert_eq!(frequencies.len(), config.head_dim / 2);
            assert!(frequencies.iter().all(|x| x.is_finite()), "{frequencies:?}");
        }
    }
    assert!(largest_allocation() < MOST, "{} bytes at once", largest_allocation());
}

fn check_generation(text: &str) {
    let config = GenerationConfig::parse(text, "generation_config.json");
    assert_eq!(config.check(&[]).is_err(), !config.problems.is_empty());
    let in_range = |value: Option<f32>, most: f32| value.is_none_or(|x| (0.0..=most).contains(&x));
    assert!(in_range(config.temperature, 100.0) && in_range(config.top_p, 1.0) && in_range(config.min_p, 1.0));
    assert!(config.repetition_penalty.is_none_or(|x| x.is_finite() && x > 0.0) && config.top_p != Some(0.0));
    assert!(largest_allocation() < MOST, "{} bytes at once", largest_allocation());
}

fn generation() -> Value {
    json!({"do_sample": true, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.0, "repetition_penalty": 1.1,
        "eos_token_id": [1, 2], "num_beams": 1, "suppress_tokens": null})
}

#[test]
fn what_is_changed_is_read_before() {
    for config in configs() {
        ModelConfig::parse(&config.to_string(), "config.json").unwrap();
    }
    assert_eq!(GenerationConfig::parse(&generation().to_string(), "generation_config.json").problems, []);
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn changed_configurations(
        which in 0usize..4,
        changes in proptest::collection::vec((any::<usize>(), change()), 1..5),
    ) {
        check(&changed(&configs()[which], &changes).to_string());
    }

    #[test]
    fn damaged_configurations(which in 0usize..4, all in proptest::collection::vec(damage(), 1..6)) {
        let text = configs()[which].to_string();
        check(&String::from_utf8_lossy(&damaged(text.as_bytes(), text.len(), &all)));
    }

    #[test]
    fn changed_generation_configurations(changes in proptest::collection::vec((any::<usize>(), change()), 1..5)) {
        check_generation(&changed(&generation(), &changes).to_string());
    }

    #[test]
    fn damaged_generation_configurations(all in proptest::collection::vec(damage(), 1..6)) {
        let text = generation().to_string();
        check_generation(&String::from_utf8_lossy(&damaged(text.as_bytes(), text.len(), &all)));
    }
}
