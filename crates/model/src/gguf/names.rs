//! Names of tensors.

/// The name in a GGUF file of this architecture of the tensor that Hugging Face calls `name`. Experts share one tensor.
pub(crate) fn file_name(name: &str, architecture: &str) -> String {
    let Some(rest) = name.strip_prefix("model.layers.") else {
        return match name {
            "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
            "model.norm.weight" => "output_norm.weight".to_owned(),
            "lm_head.weight" => "output.weight".to_owned(),
            other => other.to_owned(),
        };
    };
    let (layer, part) = rest.split_once('.').unwrap_or((rest, ""));
    if part == "self_attn.sinks" {
        return format!("blk.{layer}.attn_sinks.weight");
    }
    let (module, kind) = part.rsplit_once('.').unwrap_or((part, ""));
    // Here this norm has its own name, and not that of the norm before the gated layers.
    let has_attention_norm = matches!(architecture, "gemma2" | "gemma3" | "olmo2" | "gpt-oss");
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" if has_attention_norm => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        // The gates come first.
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" | "mlp.router" | "block_sparse_moe.gate" => "ffn_gate_inp",
        "mlp.experts.gate_proj" => "ffn_gate_exps",
        "mlp.experts.up_proj" => "ffn_up_exps",
        "mlp.experts.down_proj" => "ffn_down_exps",
        other => match expert(name).map(|(_, part)| part) {
            Some("gate_proj" | "w1") => "ffn_gate_exps",
            Some("up_proj" | "w3") => "ffn_up_exps",
            Some("down_proj" | "w2") => "ffn_down_exps",
            _ => other,
        },
    };
    format!("blk.{layer}.{module}.{kind}")
}

/// The expert whose matrix Hugging Face calls so, and which of its matrices it is.
pub(crate) fn expert(name: &str) -> Option<(usize, &str)> {
    let (number, part) = name.split_once(".experts.")?.1.split_once('.')?;
    Some((number.parse().ok()?, part.strip_suffix(".weight")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_and_experts_have_the_names_of_their_family() {
        let of = |part: &str, architecture: &str| file_name(&format!("model.layers.3.{part}.weight"), architecture);
        assert_eq!(of("post_attention_layernorm", "llama"), "blk.3.ffn_norm.weight");
        assert_eq!(of("post_attention_layernorm", "gemma3"), "blk.3.post_attention_norm.weight");
        assert_eq!(of("pre_feedforward_layernorm", "gemma3"), "blk.3.ffn_norm.weight");
        assert_eq!(of("mlp.experts.17.down_proj", "qwen3moe"), "blk.3.ffn_down_exps.weight");
        assert_eq!(of("block_sparse_moe.experts.0.w3", "llama"), "blk.3.ffn_up_exps.weight");
        assert_eq!(of("mlp.gate", "qwen3moe"), "blk.3.ffn_gate_inp.weight");
        assert_eq!(of("post_attention_layernorm", "gpt-oss"), "blk.3.post_attention_norm.weight");
        assert_eq!(of("mlp.gate_up_proj", "phi3"), "blk.3.ffn_up.weight");
        assert_eq!(file_name("model.layers.3.self_attn.sinks", "gpt-oss"), "blk.3.attn_sinks.weight");
        assert_eq!(file_name("model.layers.3.mlp.experts.up_proj.bias", "gpt-oss"), "blk.3.ffn_up_exps.bias");
        assert_eq!(expert("model.layers.3.mlp.experts.17.up_proj.weight"), Some((17, "up_proj")));
        assert_eq!(expert("model.layers.3.mlp.up_proj.weight"), None);
    }
}
