//! Tokens that end an answer.

use crate::{GenerationConfig, ModelConfig, Tokenizer, TokenizerSettings};

/// Tokens that end a turn or a text in the families that have them. Makers of models forget to name them: then the
/// configuration still has the token that ends a text of the base model.
const KNOWN: [&str; 16] = [
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<end_of_turn>",
    "<|eot|>",
    "<|eom|>",
    "<EOT>",
    "<|return|>",
    "<|call|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_utterance>",
    "</s>",
];

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
    ids.sort_unstable();
    ids.dedup();
    ids
}
