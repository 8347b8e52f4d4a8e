//! Tokens that end an answer.

use crate::{GenerationConfig, ModelConfig, Tokenizer, TokenizerSettings};

/// Tokens that end a turn or a text in the families that have them. Makers of models forget to name them: then the
/// configuration still has the token that ends a text of the base model.
const KNOWN: [&str; 16] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    END_OF_MESSAGE,
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|eot|>",
    "<|eom|>",
    "<EOT>",
    ENDS_OF_HARMONY[0],
    ENDS_OF_HARMONY[1],
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "</s>",
];

/// What ends an answer of gpt-oss. It has several messages, each in a channel, and the token that ends a turn of others
/// ends one of them.
const ENDS_OF_HARMONY: [&str; 2] = ["<|return|>", "<|call|>"];
const END_OF_MESSAGE: &str = "<|end|>";

/// All ids that end a text: those of `generation_config.json` and `config.json` (or what a GGUF file names), the tokenizer's EOS,
/// and those of the vocabulary that are known to end a turn. In rising order, each once.
pub(crate) fn stop_token_ids(
    config: &ModelConfig,
    generation_config: &GenerationConfig,
    settings: &TokenizerSettings,
    tokenizer: &Tokenizer,
) -> Vec<u32> {
    let named = settings.eos_token.as_deref().and_then(|token| tokenizer.id(token));
    // Some files do not call them special.
    let known = KNOWN.iter().filter_map(|token| tokenizer.id(token));
    let told = config.eos_token_ids.iter().chain(&generation_config.eos_token_ids).copied();
    let mut ids: Vec<u32> = told.chain(named).chain(known).collect();
    if ENDS_OF_HARMONY.iter().all(|token| tokenizer.id(token).is_some()) {
        // Some files name it.
        let end = tokenizer.id(END_OF_MESSAGE);
        ids.retain(|id| Some(*id) != end);
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// Of a vocabulary that begins with these tokens, where the configuration names this end.
    fn ends(tokens: &[&str], told: u32) -> Vec<u32> {
        let added = |(id, token): (usize, &&str)| {
            json!({"id": id, "content": token, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false})
        };
        let vocab: serde_json::Map<String, Value> =
            tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
        let added: Vec<Value> = tokens.iter().enumerate().map(added).collect();
        let json = json!({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}});
        let tokenizer = Tokenizer::parse(json.to_string().as_bytes(), 100, "m").unwrap();
        let config = json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 1, "vocab_size": 100, "eos_token_id": told});
        let config = ModelConfig::parse(&config.to_string(), "config.json").unwrap();
        let settings = TokenizerSettings::parse("{}", "m").unwrap();
        stop_token_ids(&config, &GenerationConfig::default(), &settings, &tokenizer)
    }

    #[test]
    fn a_message_of_harmony_ends_without_the_answer() {
        let harmony = ["<|return|>", "<|call|>", "<|end|>", "<|start|>", "<|channel|>", "<|message|>"];
        assert_eq!(ends(&harmony, 0), [0, 1]);
        // Also where a file names the end of messages as one of turns.
        assert_eq!(ends(&harmony, 2), [0, 1]);
        assert_eq!(ends(&["<|user|>", "<|end|>", "<|endoftext|>"], 2), [1, 2]);
    }
}
