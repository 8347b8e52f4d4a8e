//! Changed weights, indices and files in their place are errors or load, whatever is changed.

mod strange;

use dibit_model::{Checkpoint, ModelConfig, ModelFiles, WeightFile, WeightSource, Weights};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::sync::{Arc, OnceLock};
use strange::{Largest, cases, change, changed, damage, damaged, largest_allocation};

#[global_allocator]
static ALLOCATOR: Largest = Largest;

/// Far above what the files below take.
const MOST: usize = 4 << 20;

const LENGTH: usize = 8;

fn config() -> &'static ModelConfig {
    static CONFIG: OnceLock<ModelConfig> = OnceLock::new();
    let text = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 16, "head_dim": 64,
        "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10, "tie_word_embeddings": true}"#;
    CONFIG.get_or_init(|| ModelConfig::parse(text, "config.json").unwrap())
}

/// The header of a model of this configuration, and the length of what follows.
fn header() -> (Value, usize) {
    let (mut header, mut end) = (Map::new(), 0);
    let mut add = |name: &str, shape: &[usize]| {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        header.insert(name.into(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, end]}));
    };
    add("model.embed_tokens.weight", &[10, 8]);
    add("lm_head.weight", &[10, 8]);
    add("model.norm.weight", &[8]);
    for (name, shape) in [
        ("input_layernorm", &[8][..]),
        ("post_attention_layernorm", &[8]),
        ("self_attn.q_proj", &[64, 8]),
        ("self_attn.k_proj", &[64, 8]),
        ("self_attn.v_proj", &[64, 8]),
        ("self_attn.o_proj", &[8, 64]),
        ("mlp.gate_proj", &[16, 8]),
        ("mlp.up_proj", &[16, 8]),
        ("mlp.down_proj", &[8, 16]),
    ] {
        add(&format!("model.layers.0.{name}.weight"), shape);
    }
    (header.into(), end)
}

fn file(header: &Value, len: usize) -> Vec<u8> {
    let text = header.to_string();
    [&(text.len() as u64).to_le_bytes(), text.as_bytes(), &vec![0; len]].concat()
}

fn load(bytes: Vec<u8>) -> bool {
    let files = [WeightFile { name: "model.safetensors".into(), bytes: Arc::new(bytes) }];
    if let Ok(checkpoint) = Checkpoint::open(&files) {
        assert!(checkpoint.formats().len() < MOST);
    }
    let [weights] = files;
    let files = ModelFiles {
        origin: "made up".into(),
        config: "".into(),
        generation_config: None,
        tokenizer: None,
        tokenizer_config: None,
        chat_template: None,
        weights: vec![weights],
    };
    let loaded = Weights::load(&files, config(), WeightSource::Checkpoint, None);
    if let Err(error) = &loaded {
        assert!(!error.to_string().is_empty());
    }
    assert!(largest_allocation() < MOST, "{} bytes at once", largest_allocation());
    loaded.is_ok()
}

/// A directory of a model in two shards, to write other indices into.
fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (header, len) = header();
        for name in ["config.json", "a.safetensors", "b.safetensors"] {
            std::fs::write(folder.path().join(name), file(&header, len)).unwrap();
        }
        folder
    });
    folder.path()
}

fn index() -> Value {
    json!({"metadata": {"total_size": 100}, "weight_map": {
        "model.norm.weight": "a.safetensors", "model.embed_tokens.weight": "b.safetensors", "x": "a.safetensors"}})
}

/// Opens a directory with this index; the files that it maps lie within.
fn open(index: &[u8], config: &[u8]) -> bool {
    std::fs::write(folder().join("config.json"), config).unwrap();
    std::fs::write(folder().join("model.safetensors.index.json"), index).unwrap();
    let opened = ModelFiles::open(folder());
    let inside = |file: &WeightFile| Path::new(&file.name).parent() == Some(folder());
    assert!(opened.as_ref().map_or(true, |files| files.weights.iter().all(inside)));
    assert!(largest_allocation() < MOST, "{} bytes at once", largest_allocation());
    opened.is_ok()
}

#[test]
fn what_is_changed_loads_before() {
    let (header, len) = header();
    assert!(load(file(&header, len)));
    let _turn = turn();
    assert!(open(index().to_string().as_bytes(), b"{}"));
}

/// The folder is one for all tests.
fn turn() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn changed_headers(changes in proptest::collection::vec((any::<usize>(), change()), 1..4)) {
        let (header, len) = header();
        load(file(&changed(&header, &changes), len));
    }

    #[test]
    fn damaged_files(all in proptest::collection::vec(damage(), 1..6)) {
        let (header, len) = header();
        let file = file(&header, len);
        load(damaged(&file, file.len() - len + LENGTH, &all));
    }

    #[test]
    fn files_of_noise(start in proptest::sample::select(vec![
        &b""[..], b"GGUF", b"version https://git-lfs.github.com/spec/", b"<!DOCTYPE html", b"{\"error\":", b"PK\x03\x04",
        b"\x1f\x8b\x08", b"\xef\xbb\xbf",
    ]), noise in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(!load([start, &noise].concat()));
    }

    #[test]
    fn changed_indices(changes in proptest::collection::vec((any::<usize>(), change()), 1..4)) {
        let _turn = turn();
        open(changed(&index(), &changes).to_string().as_bytes(), b"{}");
    }

    #[test]
    fn damaged_indices_and_configurations(
        all in proptest::collection::vec(damage(), 1..6),
        noise in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        let _turn = turn();
        let text = index().to_string();
        open(&damaged(text.as_bytes(), text.len(), &all), &noise);
    }
}
