//! GGUF files that are damaged, or that dibit does not read.

mod common;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use common::{Gguf, made_up};
use dibit_model::{ModelError, ModelFiles, Pretrained, WeightSource};
use proptest::prelude::*;
use std::sync::OnceLock;

fn load(bytes: &[u8]) -> Result<(), ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    Pretrained::load(&ModelFiles::open_gguf(&path)?, WeightSource::Checkpoint, None).map(drop)
}

fn fails(bytes: &[u8], words: &[&str]) {
    let message = load(bytes).err().unwrap_or_else(|| panic!("{words:?}: it loads")).to_string();
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

fn changed(change: impl FnOnce(&mut Gguf)) -> Vec<u8> {
    let mut file = made_up(GgmlDType::Q8_0);
    change(&mut file);
    file.bytes()
}

#[test]
fn what_is_missing_is_named() {
    for key in [
        "general.architecture",
        "qwen3.block_count",
        "qwen3.embedding_length",
        "qwen3.attention.head_count",
        "qwen3.attention.layer_norm_rms_epsilon",
        "qwen3.context_length",
        "tokenizer.ggml.model",
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
    ] {
        fails(&changed(|file| drop(file.metadata.remove(key))), &[key, "convert the model again"]);
    }
    let tensor = "blk.1.ffn_down.weight";
    fails(&changed(|file| drop(file.tensors.remove(tensor))), &["no tensor", tensor, "incomplete"]);
    fails(&changed(|file| file.set("qwen3.block_count", Value::U32(3))), &["no tensor 'blk.2."]);
}

#[test]
fn what_is_not_supported_is_named_with_what_is() {
    let set = |key: &str, value: Value| changed(|file| file.set(key, value));
    let text = |text: &str| Value::String(text.into());
    fails(&set("general.architecture", text("gemma4")), &["'gemma4'", "llama, qwen2, qwen3"]);
    fails(&set("split.count", Value::U16(3)), &["3 files", "llama-gguf-split --merge"]);
    fails(&set("qwen3.expert_count", Value::U32(8)), &["mixture of experts"]);
    fails(&set("qwen3.rope.scaling.type", text("proportional")), &["'proportional'", "linear"]);
    fails(&set("qwen3.rope.dimension_count", Value::U32(32)), &["qwen3.rope.dimension_count 32", "64"]);
    fails(&set("tokenizer.ggml.model", text("bert")), &["'bert'", "gpt2, llama"]);
    for (kind, name) in [(9u32, "Q8_1"), (16, "IQ2_XXS"), (29, "IQ1_M"), (34, "TQ1_0"), (26, "I32"), (4, "type 4")] {
        // The number of the type stands behind a tensor's name and its two dimensions.
        let mut bytes = changed(|_| {});
        let tensor = b"blk.0.ffn_down.weight";
        let at = bytes.windows(tensor.len()).position(|window| window == tensor).unwrap() + tensor.len() + 4 + 16;
        assert_eq!(bytes[at..at + 4], 8u32.to_le_bytes());
        bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        fails(&bytes, &["blk.0.ffn_down.weight", name, "Q8_0, Q4_0, Q4_1", "IQ4_XS, MXFP4", "llama-quantize"]);
    }
}

#[test]
fn what_does_not_fit_together_is_named() {
    let set = |key: &str, value: Value| changed(|file| file.set(key, value));
    fails(&set("qwen3.feed_forward_length", Value::U32(500)), &["blk.0.ffn_gate.weight", "[512, 256]", "[500, 256]"]);
    fails(&set("qwen3.embedding_length", Value::String("many".into())), &["qwen3.embedding_length", "String"]);
    fails(&set("qwen3.embedding_length", Value::U32(0)), &["the metadata of ", "hidden_size is 0"]);
    fails(&set("qwen3.attention.head_count", Value::U32(0)), &["num_attention_heads is 0"]);
    fails(&set("tokenizer.ggml.bos_token_id", Value::U32(400)), &["bos_token_id is 400", "vocabulary of 384"]);
    fails(&set("tokenizer.ggml.token_type", Value::Array(vec![Value::I32(1)])), &["1 token types for 384 tokens"]);
    let merges = |merge: &str| set("tokenizer.ggml.merges", Value::Array(vec![Value::String(merge.into())]));
    fails(&merges("alone"), &["not two tokens"]);
    fails(&merges("no such"), &["malformed", "out of vocabulary"]);
}

#[test]
fn headers_are_not_believed() {
    let good = made_up(GgmlDType::Q8_0).bytes();
    load(&good).unwrap();
    let with = |at: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[at..at + bytes.len()].copy_from_slice(bytes);
        changed
    };
    fails(b"", &["malformed"]);
    fails(b"GGUF", &["ends within its header", "download it again"]);
    fails(&with(0, b"GGML"), &["does not begin with 'GGUF'"]);
    fails(&with(4, &1u32.to_le_bytes()), &["GGUF version 1", "convert the model again"]);
    fails(&with(4, &3u32.to_be_bytes()), &["version 3, big-endian"]);
    for count in [u64::MAX, 1 << 40, 1 << 21] {
        fails(&with(8, &count.to_le_bytes()), &["malformed"]);
        fails(&with(16, &count.to_le_bytes()), &["malformed"]);
    }
    for length in [good.len() - 40, good.len() / 2, 5000, 30] {
        fails(&good[..length], &["cut short"]);
    }
    for alignment in [0, 3, 1 << 31] {
        fails(&changed(|file| file.set("general.alignment", Value::U32(alignment))), &["general.alignment"]);
    }
    let nested = Value::Array(vec![Value::Array(vec![Value::U8(1)])]);
    fails(&changed(|file| file.set("x", nested)), &["lists of lists"]);
}

fn good() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| made_up(GgmlDType::Q4K).bytes())
}

/// Bytes before the weights.
const HEADER: usize = 12_000;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn files_that_are_cut_short_are_errors(length in 0..good().len() - 32) {
        prop_assert!(load(&good()[..length]).is_err());
    }

    #[test]
    fn damaged_headers_are_errors_or_load_but_never_panic(
        flips in proptest::collection::vec((0..HEADER, any::<u8>()), 1..8),
    ) {
        let mut bytes = good().to_vec();
        for (at, value) in flips {
            bytes[at] = value;
        }
        load(&bytes).ok();
    }
}
