//! The tokenizer in a file's metadata, as a `tokenizer.json` and a `tokenizer_config.json`.

use super::merges::merges;
use super::metadata::Metadata;
use super::pre_tokenizer::{PreTokenizer, SUPPORTED_PRE_TOKENIZERS};
use crate::ModelError;
use serde_json::{Map, Value, json};
use std::collections::HashSet;

/// What stands for a space in SentencePiece.
const SPACE: &str = "\u{2581}";

/// Kinds of tokens in `tokenizer.ggml.token_type`.
const NORMAL: usize = 1;
const UNKNOWN: usize = 2;
const CONTROL: usize = 3;
const USER_DEFINED: usize = 4;

/// Tokens of Phi-3 that do not take the spaces behind them along, as its other added ones do.
const PHI3_KEEPS_SPACES: [&str; 3] = ["<unk>", "<s>", "<|endoftext|>"];

struct Vocabulary<'a> {
    metadata: &'a Metadata<'a>,
    tokens: Vec<&'a str>,
    kinds: Vec<usize>,
}

/// The `tokenizer.json` of a file.
///
/// # Errors
/// [`ModelError::Malformed`] and [`ModelError::Unsupported`].
pub(super) fn tokenizer(metadata: &Metadata) -> Result<Value, ModelError> {
    let vocabulary = Vocabulary::new(metadata)?;
    let model = metadata.text("tokenizer.ggml.model")?.ok_or_else(|| metadata.missing("tokenizer.ggml.model"))?;
    let (mut json, begins) = match model {
        "gpt2" => vocabulary.byte_level()?,
        "llama" => (vocabulary.sentence_piece()?, true),
        other => {
            return Err(ModelError::Unsupported {
                what: format!("tokenizer.ggml.model '{other}'"),
                supported: "gpt2, llama".into(),
            });
        }
    };
    let bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(begins);
    let eos = metadata.flag("tokenizer.ggml.add_eos_token")?.unwrap_or(false);
    json["version"] = json!("1.0");
    json["added_tokens"] = vocabulary.added_tokens()?;
    json["post_processor"] = vocabulary.around_a_text(bos, eos)?;
    Ok(json)
}

/// The `tokenizer_config.json` of a file: its chat template, and the tokens that the template may name.
///
/// # Errors
/// [`ModelError::Malformed`].
pub(super) fn tokenizer_config(metadata: &Metadata) -> Result<Value, ModelError> {
    let vocabulary = Vocabulary::new(metadata)?;
    let mut config = Map::new();
    config.insert("chat_template".into(), json!(metadata.text("tokenizer.chat_template")?));
    for (name, key) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")]
    {
        config.insert(name.into(), json!(vocabulary.named(key)?.map(|(_, token)| token)));
    }
    Ok(config.into())
}

impl<'a> Vocabulary<'a> {
    fn new(metadata: &'a Metadata<'a>) -> Result<Self, ModelError> {
        let tokens =
            metadata.texts("tokenizer.ggml.tokens")?.ok_or_else(|| metadata.missing("tokenizer.ggml.tokens"))?;
        let kinds = metadata.numbers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if kinds.len() != tokens.len() {
            return Err(metadata.malformed(format!("it has {} token types for {} tokens", kinds.len(), tokens.len())));
        }
        Ok(Vocabulary { metadata, tokens, kinds })
    }

    /// The token that the metadata names as `bos`, `eos` and the like.
    fn named(&self, name: &str) -> Result<Option<(usize, &'a str)>, ModelError> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        let Some(id) = self.metadata.id(&key)? else { return Ok(None) };
        let token = self.tokens.get(id).ok_or_else(|| {
            self.metadata.malformed(format!("{key} is {id}, outside its vocabulary of {}", self.tokens.len()))
        })?;
        Ok(Some((id, token)))
    }

    fn ids(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect()
    }

    /// Byte-level BPE, and whether its texts begin with BOS where the metadata does not say.
    fn byte_level(&self) -> Result<(Value, bool), ModelError> {
        let pre = self.metadata.text("tokenizer.ggml.pre")?.unwrap_or("default");
        let pre_tokenizer = PreTokenizer::named(pre).ok_or_else(|| ModelError::Unsupported {
            what: format!("tokenizer.ggml.pre '{pre}'"),
            supported: SUPPORTED_PRE_TOKENIZERS.into(),
        })?;
        let split =
            |cut: &&str| json!({"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": false});
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
        let steps: Vec<Value> = pre_tokenizer.cuts.iter().map(split).chain([bytes.clone()]).collect();
        let key = "tokenizer.ggml.merges";
        let merges = self.metadata.texts(key)?.ok_or_else(|| self.metadata.missing(key))?;
        let pairs: Option<Vec<_>> = merges.into_iter().map(|merge| merge.split_once(' ')).collect();
        let pairs = pairs.ok_or_else(|| self.metadata.malformed(format!("a merge of '{key}' is not two tokens")))?;
        let json = json!({
            "normalizer": if pre_tokenizer.composed { json!({"type": "NFC"}) } else { Value::Null },
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
            "decoder": bytes,
            "model": {"type": "BPE", "vocab": self.ids(), "merges": pairs, "ignore_merges": pre_tokenizer.whole},
        });
        Ok((json, pre_tokenizer.begins))
    }

    /// BPE over characters, with bytes for those that are not in the vocabulary.
    fn sentence_piece(&self) -> Result<Value, ModelError> {
        let key = "tokenizer.ggml.scores";
        let scores = self.metadata.floats(key)?.ok_or_else(|| self.metadata.missing(key))?;
        if scores.len() != self.tokens.len() {
            let reason = format!("it has {} scores for {} tokens", scores.len(), self.tokens.len());
            return Err(self.metadata.malformed(reason));
        }
        let pieces = (0..).zip(&self.tokens).zip(scores).zip(&self.kinds).filter(|(_, kind)| **kind == NORMAL);
        let pieces: Vec<_> = pieces.map(|(((id, token), score), _)| (*token, id, score)).collect();
        let prefix = self.metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
        let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})];
        let mut decoders = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = match self.named("unknown")? {
            Some((_, token)) => Some(token),
            None => self.kinds.iter().position(|kind| *kind == UNKNOWN).map(|id| self.tokens[id]),
        };
        Ok(json!({
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "pre_tokenizer": null,
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE", "vocab": self.ids(), "merges": merges(&pieces),
                "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
            },
        }))
    }

    /// Tokens that are found in a text before it is cut. Those that control are left out of decoded text.
    fn added_tokens(&self) -> Result<Value, ModelError> {
        let mut control = HashSet::new();
        for name in ["bos", "eos", "eot", "eom", "unknown", "padding"] {
            control.extend(self.named(name)?.map(|(id, _)| id));
        }
        // Files do not say it of tokens; llama.cpp knows this model, too.
        let is_phi3 = self.metadata.text("general.architecture")? == Some("phi3")
            && self.metadata.text("tokenizer.ggml.model")? == Some("llama");
        let added = self.tokens.iter().zip(&self.kinds).enumerate().filter_map(|(id, (token, kind))| {
            let special = matches!(*kind, CONTROL | UNKNOWN) || control.contains(&id);
            (special || *kind == USER_DEFINED).then(|| {
                json!({
                    "id": id, "content": token, "special": special,
                    "rstrip": is_phi3 && !PHI3_KEEPS_SPACES.contains(token),
                    "single_word": false, "lstrip": false, "normalized": false,
                })
            })
        });
        Ok(added.collect())
    }

    /// Puts BOS and EOS around a text.
    fn around_a_text(&self, bos: bool, eos: bool) -> Result<Value, ModelError> {
        let wanted = |name: &str, wanted: bool| -> Result<Option<(usize, &str)>, ModelError> {
            if wanted { self.named(name) } else { Ok(None) }
        };
        let (bos, eos) = (wanted("bos", bos)?, wanted("eos", eos)?);
        let mut special = Map::new();
        for (id, token) in [bos, eos].into_iter().flatten() {
            special.insert(token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}));
        }
        let around = |sequence: &str| -> Vec<Value> {
            let special = |token: Option<(usize, &str)>| {
                token.map(|(_, token)| json!({"SpecialToken": {"id": token, "type_id": 0}}))
            };
            let text = json!({"Sequence": {"id": sequence, "type_id": 0}});
            special(bos).into_iter().chain([text]).chain(special(eos)).collect()
        };
        let pair = [around("A"), around("B")].concat();
        Ok(json!({"type": "TemplateProcessing", "single": around("A"), "pair": pair, "special_tokens": special}))
    }
}
