//! The families of models.

/// Decoder families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3, 3.1, 3.2.
    Llama,
    /// Mistral 7B from version 0.2 on.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
    /// Qwen3: a norm on each head of q and k.
    Qwen3,
    /// Granite 3: factors of the embedding, of what layers add, of attention and of logits.
    Granite,
    /// SmolLM3: layers without rotary positions.
    SmolLm3,
    /// OLMo 2: norms behind attention and the gated layers.
    Olmo2,
    /// Phi-3 and Phi-4: joint projections, longrope.
    Phi3,
    /// Gemma 2: norms on both sides, sliding windows in every second layer, capped logits.
    Gemma2,
    /// Gemma 3, its text part: sliding windows in five of six layers, norms of q and k.
    Gemma3,
    /// Mixtral: mixtures of experts.
    Mixtral,
    /// Qwen3-MoE: norms of q and k, mixtures of experts.
    Qwen3Moe,
    /// gpt-oss: mixtures of experts, learned sinks of attention, sliding windows in every second layer.
    GptOss,
}

impl Architecture {
    pub(crate) const ALL: [Architecture; 13] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Granite,
        Architecture::SmolLm3,
        Architecture::Olmo2,
        Architecture::Phi3,
        Architecture::Gemma2,
        Architecture::Gemma3,
        Architecture::Mixtral,
        Architecture::Qwen3Moe,
        Architecture::GptOss,
    ];

    /// The name in `architectures`.
    pub const fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Mistral => "MistralForCausalLM",
            Architecture::Qwen2 => "Qwen2ForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
            Architecture::Granite => "GraniteForCausalLM",
            Architecture::SmolLm3 => "SmolLM3ForCausalLM",
            Architecture::Olmo2 => "Olmo2ForCausalLM",
            Architecture::Phi3 => "Phi3ForCausalLM",
            Architecture::Gemma2 => "Gemma2ForCausalLM",
            Architecture::Gemma3 => "Gemma3ForCausalLM",
            Architecture::Mixtral => "MixtralForCausalLM",
            Architecture::Qwen3Moe => "Qwen3MoeForCausalLM",
            Architecture::GptOss => "GptOssForCausalLM",
        }
    }

    /// Whether q, k and v always have biases.
    pub const fn has_qkv_bias(self) -> bool {
        matches!(self, Architecture::Qwen2)
    }

    /// Whether `attention_bias` gives the projections of attention biases.
    pub(crate) const fn may_have_attention_bias(self) -> bool {
        !matches!(self, Architecture::Mistral | Architecture::Mixtral | Architecture::Qwen2 | Architecture::Phi3)
    }

    /// `model_type` of its configurations.
    pub(crate) const fn model_type(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Granite => "granite",
            Architecture::SmolLm3 => "smollm3",
            Architecture::Olmo2 => "olmo2",
            Architecture::Phi3 => "phi3",
            Architecture::Gemma2 => "gemma2",
            Architecture::Gemma3 => "gemma3_text",
            Architecture::Mixtral => "mixtral",
            Architecture::Qwen3Moe => "qwen3_moe",
            Architecture::GptOss => "gpt_oss",
        }
    }

    /// Whether it is one of the Qwen families.
    pub(crate) const fn is_qwen(self) -> bool {
        matches!(self, Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen3Moe)
    }

    /// Whether it is one of the Gemma families.
    pub(crate) const fn is_gemma(self) -> bool {
        matches!(self, Architecture::Gemma2 | Architecture::Gemma3)
    }

    /// Longest context where a configuration does not say.
    pub(crate) const fn default_context(self) -> usize {
        match self {
            Architecture::Llama | Architecture::Granite | Architecture::Olmo2 => 2048,
            Architecture::Phi3 => 4096,
            Architecture::Gemma2 => 8192,
            Architecture::Mistral | Architecture::Gemma3 | Architecture::Mixtral | Architecture::GptOss => 131_072,
            Architecture::Qwen2 | Architecture::Qwen3 | Architecture::Qwen3Moe | Architecture::SmolLm3 => 32_768,
        }
    }

    /// Whether `mlp_bias` gives the projections of the gated activation biases.
    pub(crate) const fn may_have_mlp_bias(self) -> bool {
        matches!(self, Architecture::Llama | Architecture::Granite | Architecture::SmolLm3)
    }

    /// Base of the rotary frequencies where a configuration does not say.
    pub(crate) const fn default_rope_theta(self) -> f32 {
        match self {
            Architecture::SmolLm3 => 2_000_000.0,
            Architecture::Gemma3 | Architecture::Mixtral => 1_000_000.0,
            Architecture::GptOss => 150_000.0,
            _ => 10_000.0,
        }
    }

    /// What norms add to the mean square where a configuration does not say.
    pub(crate) const fn default_rms_norm_eps(self) -> f64 {
        match self {
            Architecture::Olmo2 | Architecture::Phi3 | Architecture::Mixtral | Architecture::GptOss => 1e-5,
            _ => 1e-6,
        }
    }

    /// Whether heads may turn in part.
    pub(crate) const fn may_turn_in_part(self) -> bool {
        matches!(self, Architecture::Phi3)
    }

    /// Whether a configuration that does not speak of a sliding window means one.
    pub(crate) const fn implies_window(self) -> bool {
        matches!(
            self,
            Architecture::Mistral
                | Architecture::Qwen2
                | Architecture::Qwen3
                | Architecture::Qwen3Moe
                | Architecture::Gemma2
                | Architecture::Gemma3
        )
    }

    /// Whether q and k are normalised.
    pub const fn has_qk_norm(self) -> bool {
        matches!(self, Architecture::Qwen3 | Architecture::Qwen3Moe | Architecture::Olmo2 | Architecture::Gemma3)
    }
}
