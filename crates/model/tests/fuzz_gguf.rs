//! GGUF files of strangers: whatever is in them, they load or are refused. `PROPTEST_CASES` sets the number of cases.

#[path = "common/allocations.rs"]
mod allocations;
mod common;

use allocations::largest_allocation;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use common::Gguf;
use dibit_model::{ModelFiles, Pretrained, WeightSource};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// Bytes that no allocation for a file of 20 KB needs, whatever it claims: its own bytes many times over.
const MOST_BYTES: usize = 4 << 20;

/// A small valid file of a Llama: one layer, with a vocabulary of bytes and some more.
fn small(sentence_piece: bool) -> Gguf {
    let mut file = Gguf { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
    let numbers = [
        ("block_count", 1),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 64),
        ("rope.dimension_count", 64),
        ("context_length", 128),
    ];
    for (key, value) in numbers {
        file.set(&format!("llama.{key}"), Value::U32(value));
    }
    file.set("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5));
    file.set("llama.rope.freq_base", Value::F32(1e4));
    let text = |text: &str| Value::String(text.into());
    file.set("general.architecture", text("llama"));
    file.set("tokenizer.chat_template", text("{{ messages[0].content }}"));
    let mut tokens: Vec<(String, f32, i32)> = vec![("<unk>".into(), 0.0, 2), ("<s>".into(), 0.0, 3)];
    if sentence_piece {
        tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
        tokens.extend("▁helo".chars().map(|letter| (letter.to_string(), -9.0, 1)));
        tokens.extend(["he", "ll", "hell", "▁hell"].map(|piece| (piece.to_owned(), -1.0, 1)));
    } else {
        tokens.extend(('!'..='~').map(|letter| (letter.to_string(), 0.0, 1)));
        tokens.extend(["Ġ", "Ċ", "he", "ll", "hell"].map(|piece| (piece.to_owned(), 0.0, 1)));
        file.set("tokenizer.ggml.merges", Value::Array(["h e", "l l", "he ll"].map(text).to_vec()));
        file.set("tokenizer.ggml.pre", text("llama-bpe"));
    }
    let list = |value: &dyn Fn(&(String, f32, i32)) -> Value| Value::Array(tokens.iter().map(value).collect());
    file.set("tokenizer.ggml.model", text(if sentence_piece { "llama" } else { "gpt2" }));
    file.set("tokenizer.ggml.tokens", list(&|token| text(&token.0)));
    file.set("tokenizer.ggml.scores", list(&|token| Value::F32(token.1)));
    file.set("tokenizer.ggml.token_type", list(&|token| Value::I32(token.2)));
    for (name, id) in [("bos", 1), ("eos", 1), ("unknown", 0)] {
        file.set(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
    }
    let mut add = |name: &str, rows: usize, cols: usize| {
        let values = dibit_device::Tensor::random(rows as u64, 0.1, dibit_device::DType::F32, rows, cols).to_f32();
        file.add_tensor(name, Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap(), GgmlDType::Q8_0, None);
    };
    add("model.embed_tokens.weight", tokens.len(), 32);
    for (name, rows, cols) in [
        ("self_attn.q_proj", 128, 32),
        ("self_attn.k_proj", 64, 32),
        ("self_attn.v_proj", 64, 32),
        ("self_attn.o_proj", 32, 128),
        ("mlp.gate_proj", 32, 32),
        ("mlp.up_proj", 32, 32),
        ("mlp.down_proj", 32, 32),
    ] {
        add(&format!("model.layers.0.{name}.weight"), rows, cols);
    }
    for name in ["model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm"] {
        let ones = Tensor::ones(32, DType::F32, &Device::Cpu).unwrap();
        file.add_tensor(&format!("{name}.weight"), ones, GgmlDType::Q8_0, None);
    }
    file
}

const FAMILIES: [&str; 8] = ["gemma2", "gemma3", "gpt-oss", "granite", "olmo2", "phi3", "qwen3moe", "smollm3"];

/// Keys that some of them read.
const KEYS: [&str; 16] = [
    "attention.key_length",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "block_count",
    "embedding_scale",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "logit_scale",
    "residual_scale",
    "rope.dimension_count",
    "rope.freq_base_swa",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
];

/// Loads a file and uses its tokenizer; gives whether it loads.
fn load(bytes: Vec<u8>) -> bool {
    let Ok(files) = ModelFiles::from_gguf(Arc::new(bytes), "model.gguf") else { return false };
    let Ok(model) = Pretrained::load(&files, WeightSource::Checkpoint, None) else { return false };
    for text in ["hello hell\n 12", "é\u{0}▁ <s>"] {
        if let Ok(ids) = model.tokenizer.encode(text, true) {
            model.tokenizer.decode(&ids).ok();
        }
    }
    model.tokenizer.decode(&[0, 1, 50, u32::MAX]).ok();
    model.chat_template(None).ok();
    true
}

fn good(sentence_piece: bool) -> &'static Gguf {
    static FILES: OnceLock<[Gguf; 2]> = OnceLock::new();
    &FILES.get_or_init(|| [small(false), small(true)])[usize::from(sentence_piece)]
}

/// Where the weights begin.
fn header(sentence_piece: bool) -> usize {
    let weights: usize = good(sentence_piece).tensors.values().map(|tensor| tensor.storage_size_in_bytes()).sum();
    good(sentence_piece).bytes().len() - weights
}

/// A change of a file's bytes, at a share of its length.
#[derive(Debug, Clone)]
enum Change {
    Set(f64, u8),
    /// A number, as sizes and counts are written.
    Number(f64, u64, bool),
    Remove(f64, usize),
    Repeat(f64, usize),
    Cut(f64),
}

fn change() -> impl Strategy<Value = Change> {
    let place = || 0.0..1.0f64;
    let number = prop_oneof![
        0..64u64,
        Just(u64::MAX),
        Just(u64::from(u32::MAX)),
        Just(1 << 31),
        Just(1 << 62),
        (0..64u32).prop_map(|shift| 1 << shift),
        any::<u64>(),
    ];
    prop_oneof![
        4 => (place(), any::<u8>()).prop_map(|(place, value)| Change::Set(place, value)),
        4 => (place(), number, any::<bool>()).prop_map(|(place, value, long)| Change::Number(place, value, long)),
        1 => (place(), 1..40usize).prop_map(|(place, count)| Change::Remove(place, count)),
        1 => (place(), 1..40usize).prop_map(|(place, count)| Change::Repeat(place, count)),
        1 => place().prop_map(Change::Cut),
    ]
}

fn apply(bytes: &mut Vec<u8>, header: usize, change: &Change) {
    let at = |place: f64| (place * header.min(bytes.len()) as f64) as usize;
    match *change {
        Change::Set(place, value) => {
            let at = at(place);
            bytes[at..].iter_mut().take(1).for_each(|byte| *byte = value);
        }
        Change::Number(place, value, long) => {
            let (at, len) = (at(place), if long { 8 } else { 4 });
            bytes[at..].iter_mut().zip(&value.to_le_bytes()[..len]).for_each(|(byte, value)| *byte = *value);
        }
        Change::Remove(place, count) => {
            let at = at(place);
            let end = bytes.len().min(at + count);
            bytes.drain(at..end);
        }
        Change::Repeat(place, count) => {
            let at = at(place);
            let part = bytes[at..bytes.len().min(at + count)].to_vec();
            bytes.splice(at..at, part);
        }
        Change::Cut(place) => bytes.truncate((place * bytes.len() as f64) as usize),
    }
}

/// A value that some key may have.
fn value() -> impl Strategy<Value = Value> {
    let scalar = prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<u32>().prop_map(Value::U32),
        (0..200u32).prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        "\\PC{0,12}".prop_map(Value::String),
        prop::sample::select(vec![
            "llama", "gpt2", "qwen2", "qwen3", "linear", "yarn", "longrope", "default", "smollm", "tekken",
        ])
        .prop_map(|text| Value::String(text.into())),
    ];
    let list = (scalar.clone(), 0..300usize).prop_map(|(value, len)| Value::Array(vec![value; len]));
    prop_oneof![4 => scalar, 1 => list]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_never_panic(
        sentence_piece in any::<bool>(),
        changes in prop::collection::vec(change(), 1..6),
    ) {
        let (mut bytes, header) = (good(sentence_piece).bytes(), header(sentence_piece));
        for change in &changes {
            apply(&mut bytes, header, change);
        }
        load(bytes);
        prop_assert!(largest_allocation() < MOST_BYTES, "{} bytes at once", largest_allocation());
    }

    #[test]
    fn changed_values_never_panic(
        sentence_piece in any::<bool>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), value()), 1..4),
        tokens in prop::collection::vec((any::<prop::sample::Index>(), "\\PC{0,6}"), 0..4),
    ) {
        let good = good(sentence_piece);
        let mut metadata = good.metadata.clone();
        if let Some(Value::Array(list)) = metadata.get_mut("tokenizer.ggml.tokens") {
            for (index, token) in tokens {
                let at = index.index(list.len());
                list[at] = Value::String(token);
            }
        }
        let keys: Vec<String> = metadata.keys().cloned().collect();
        for (index, value) in changes {
            metadata.insert(keys[index.index(keys.len())].clone(), value);
        }
        load(good.bytes_with(&metadata));
        prop_assert!(largest_allocation() < MOST_BYTES, "{} bytes at once", largest_allocation());
    }

    #[test]
    fn changed_values_of_families_never_panic(
        family in prop::sample::select(FAMILIES.to_vec()),
        expected in prop::collection::vec((prop::sample::select(KEYS.to_vec()), 0..200u32), 0..8),
        changes in prop::collection::vec((prop::sample::select(KEYS.to_vec()), value()), 0..3),
        factors in prop::collection::vec((prop::sample::select(vec!["short", "long"]), 1..64usize), 0..3),
    ) {
        let mut file = Gguf { metadata: good(false).metadata.clone(), tensors: BTreeMap::new() }.named(family);
        for (key, value) in expected {
            file.set(&format!("{family}.{key}"), Value::U32(value));
        }
        for (key, value) in changes {
            file.set(&format!("{family}.{key}"), value);
        }
        for (name, len) in factors {
            let ones = Tensor::ones(len, DType::F32, &Device::Cpu).unwrap();
            file.add_tensor(&format!("rope_factors_{name}.weight"), ones, GgmlDType::F32, None);
        }
        load(file.bytes());
        prop_assert!(largest_allocation() < MOST_BYTES, "{} bytes at once", largest_allocation());
    }
}

#[test]
fn the_files_that_are_changed_load() {
    assert!(load(good(false).bytes()) && load(good(true).bytes()));
}
