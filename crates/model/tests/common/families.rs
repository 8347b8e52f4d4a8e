//! What llama.cpp's converter makes of checkpoints of single families.

use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Tensor};
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap};

/// The name of an architecture in files.
pub fn architecture(config: &Json) -> &'static str {
    match config["architectures"][0].as_str().unwrap() {
        "LlamaForCausalLM" | "MistralForCausalLM" | "MixtralForCausalLM" => "llama",
        "Qwen2ForCausalLM" => "qwen2",
        "Qwen3ForCausalLM" => "qwen3",
        "Gemma2ForCausalLM" => "gemma2",
        "Gemma3ForCausalLM" => "gemma3",
        "Phi3ForCausalLM" => "phi3",
        "Olmo2ForCausalLM" => "olmo2",
        "GraniteForCausalLM" => "granite",
        "SmolLM3ForCausalLM" => "smollm3",
        "GptOssForCausalLM" => "gpt-oss",
        other => panic!("{other}"),
    }
}

/// Whether rows of query and key projections are put in pairs.
pub fn has_pairs(architecture: &str) -> bool {
    matches!(architecture, "llama" | "granite" | "smollm3")
}

/// Values that only files of this family have.
pub fn metadata(config: &Json, architecture: &str) -> Vec<(&'static str, Value)> {
    let count = |key: &str| config[key].as_u64().unwrap();
    let number = |key: &str| Value::U32(count(key) as u32);
    let float = |key: &str| Value::F32(config[key].as_f64().unwrap() as f32);
    let head_dim = config["head_dim"].as_u64().unwrap_or_else(|| count("hidden_size") / count("num_attention_heads"));
    let experts =
        || vec![("expert_count", number("num_local_experts")), ("expert_used_count", number("num_experts_per_tok"))];
    let window = |key| ("attention.sliding_window", number(key));
    match architecture {
        "gemma2" => vec![
            window("sliding_window"),
            ("attn_logit_softcapping", float("attn_logit_softcapping")),
            ("final_logit_softcapping", float("final_logit_softcapping")),
        ],
        "gemma3" => vec![window("sliding_window"), ("rope.freq_base_swa", float("rope_local_base_freq"))],
        "gpt-oss" => {
            let own = [window("sliding_window"), ("expert_feed_forward_length", number("intermediate_size"))];
            experts().into_iter().chain(own).collect()
        }
        "granite" => vec![
            ("rope.dimension_count", Value::U32(head_dim as u32)),
            ("attention.scale", float("attention_multiplier")),
            ("embedding_scale", float("embedding_multiplier")),
            ("residual_scale", float("residual_multiplier")),
            ("logit_scale", float("logits_scaling")),
        ],
        "llama" if config["num_local_experts"].is_u64() => experts(),
        "phi3" => phi3(config, head_dim),
        "smollm3" => vec![("rope.dimension_count", Value::U32(head_dim as u32))],
        _ => Vec::new(),
    }
}

fn phi3(config: &Json, head_dim: u64) -> Vec<(&'static str, Value)> {
    let part = config["partial_rotary_factor"].as_f64().unwrap_or(1.0);
    let original = config["original_max_position_embeddings"].as_f64().unwrap();
    let scale = config["max_position_embeddings"].as_f64().unwrap() / original;
    let grown = if scale > 1.0 { (1.0 + scale.ln() / original.ln()).sqrt() } else { 1.0 };
    vec![
        ("rope.dimension_count", Value::U32((part * head_dim as f64) as u32)),
        ("rope.scaling.original_context_length", Value::U32(original as u32)),
        ("rope.scaling.attn_factor", Value::F32(grown as f32)),
        ("attention.sliding_window", Value::U32(config["sliding_window"].as_u64().unwrap_or(0) as u32)),
    ]
}

/// Tensors by the names that they have in files, or by those of Hugging Face where these differ as in a Llama.
pub fn tensors(config: &Json, architecture: &str, all: HashMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    let renames: &[(&str, &str)] = match architecture {
        "gemma2" | "gemma3" | "olmo2" => &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("pre_feedforward_layernorm", "ffn_norm"),
            ("post_feedforward_layernorm", "post_ffw_norm"),
        ],
        "gpt-oss" => &[
            ("post_attention_layernorm", "post_attention_norm"),
            ("mlp.router", "ffn_gate_inp"),
            ("self_attn.sinks", "attn_sinks.weight"),
        ],
        "llama" => &[("block_sparse_moe.gate", "ffn_gate_inp")],
        "phi3" => &[("mlp.gate_up_proj", "ffn_up")],
        _ => &[],
    };
    let mut found = BTreeMap::new();
    let mut experts: BTreeMap<String, BTreeMap<usize, Tensor>> = BTreeMap::new();
    for (name, tensor) in all {
        let mut renamed = name.clone();
        renames.iter().for_each(|(from, to)| renamed = renamed.replace(from, to));
        if let Some((layer, expert)) = name.split_once(".block_sparse_moe.experts.") {
            let (number, part) = expert.split_once('.').unwrap();
            let part = match part {
                "w1.weight" => "gate",
                "w2.weight" => "down",
                _ => "up",
            };
            let name = format!("{layer}.ffn_{part}_exps.weight");
            experts.entry(name).or_default().insert(number.parse().unwrap(), tensor);
        } else if let Some((layer, part)) = name.split_once(".mlp.experts.") {
            found.extend(expert_of_gpt_oss(layer, part, &tensor));
        } else if architecture.starts_with("gemma") && name.contains("norm") {
            found.insert(renamed, (tensor.to_dtype(DType::F32).unwrap() + 1.0).unwrap());
        } else {
            found.insert(renamed, tensor);
        }
    }
    for (name, experts) in experts {
        found.insert(name, Tensor::stack(&experts.into_values().collect::<Vec<_>>(), 0).unwrap());
    }
    if config["rope_scaling"]["type"] == "longrope" {
        for (key, name) in [("short_factor", "rope_factors_short"), ("long_factor", "rope_factors_long")] {
            let factors: Vec<f32> = serde_json::from_value(config["rope_scaling"][key].clone()).unwrap();
            let vector = Tensor::new(factors, &candle_core::Device::Cpu).unwrap();
            found.insert(format!("{name}.weight"), vector);
        }
    }
    found
}

/// Matrices of all experts with rows of what they multiply, or their biases; those of gates and of the other halves apart.
fn expert_of_gpt_oss(layer: &str, part: &str, tensor: &Tensor) -> Vec<(String, Tensor)> {
    let (part, kind) = part.strip_suffix("_bias").map_or((part, "weight"), |part| (part, "bias"));
    let tensor = if kind == "weight" { tensor.transpose(1, 2).unwrap() } else { tensor.clone() };
    if part == "down_proj" {
        return vec![(format!("{layer}.ffn_down_exps.{kind}"), tensor)];
    }
    let mut shape = tensor.dims().to_vec();
    shape[1] /= 2;
    shape.insert(2, 2);
    let pairs = tensor.contiguous().unwrap().reshape(shape).unwrap();
    let half = |at: usize| pairs.narrow(2, at, 1).unwrap().squeeze(2).unwrap();
    vec![(format!("{layer}.ffn_gate_exps.{kind}"), half(0)), (format!("{layer}.ffn_up_exps.{kind}"), half(1))]
}
