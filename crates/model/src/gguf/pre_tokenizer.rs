//! How texts are cut before merges, by the names of `tokenizer.ggml.pre`.

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The names of all families; some have others too.
pub(super) const SUPPORTED_PRE_TOKENIZERS: &str = "default, gpt-2, smollm, refact, llama-bpe, smaug-bpe, dbrx, qwen2, tekken, gpt-4o, deepseek-coder; convert the model again if its name is new";

/// What a family does with a text.
pub(super) struct PreTokenizer {
    /// Each expression cuts what the ones before it left together.
    pub cuts: &'static [&'static str],
    /// Whether characters are composed first.
    pub composed: bool,
    /// Whether a piece that is a token as a whole needs no merges.
    pub whole: bool,
    /// Whether texts begin with BOS where the metadata does not say.
    pub begins: bool,
}

impl PreTokenizer {
    /// That of a name.
    pub fn named(name: &str) -> Option<PreTokenizer> {
        let plain = |cuts| PreTokenizer { cuts, composed: false, whole: false, begins: false };
        Some(match name {
            "default" => plain(&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]),
            "gpt-2" | "olmo" => plain(&[GPT2]),
            "smollm" | "refact" => plain(&[r"\p{N}", GPT2]),
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "pixtral" => {
                PreTokenizer { whole: true, begins: true, ..plain(&[LLAMA3]) }
            }
            "smaug-bpe" | "dbrx" => plain(&[LLAMA3]),
            "qwen2" | "deepseek-r1-qwen" | "megrez" => PreTokenizer { composed: true, ..plain(&[QWEN2]) },
            "tekken" => PreTokenizer { whole: true, begins: true, ..plain(&[TEKKEN]) },
            "gpt-4o" => plain(&[GPT4O]),
            "deepseek-coder" => plain(&[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"]),
            _ => return None,
        })
    }
}
