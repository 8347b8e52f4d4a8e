//! Every token's negative log-likelihood against Hugging Face transformers in float32.

mod passes;

use dibit_cache::{CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_device::DType;
use dibit_model::{ChatTemplate, Message, Model, ModelConfig, ModelFiles, Tokenizer, WeightSource, Weights};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const TOLERANCE: f64 = 1e-3;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Families of which a checkpoint is too large to be in the repository.
const FAMILIES: [&str; 14] = [
    "gemma2",
    "gemma3",
    "gptoss",
    "granite",
    "llama-yarn",
    "mistral-swa",
    "mixtral",
    "olmo2",
    "phi3-longrope-long",
    "phi3-longrope-short",
    "qwen2-swa",
    "qwen2-swa-unused",
    "qwen3moe",
    "smollm3-nope",
];

/// Checkpoints with reference outputs: those of the repository, and more where they are at hand.
fn fixtures() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let shared = repository().join("../shared/fixtures");
    if shared.exists() {
        found.extend(FAMILIES.map(|family| shared.join("arch").join(family)));
    }
    for folder in [repository().join("fixtures"), shared] {
        let Ok(entries) = std::fs::read_dir(&folder) else {
            let line = format!("skipped: {} is not here\n", folder.display());
            std::io::stderr().write_all(line.as_bytes()).unwrap();
            continue;
        };
        found.extend(entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("expected.json").exists()));
    }
    found.sort();
    found
}

struct Loaded {
    config: ModelConfig,
    weights: Weights,
    model: Arc<Model<Cpu>>,
}

fn load(cpu: &Arc<Cpu>, directory: &Path, dtype: Option<DType>) -> Loaded {
    let files = ModelFiles::open(directory).unwrap();
    let mut config = ModelConfig::parse(&files.config, "config.json").unwrap();
    config.set_context(expected(directory).0.len());
    let weights = Weights::load(&files, &config, WeightSource::Checkpoint, dtype).unwrap();
    let model = Arc::new(Model::new(cpu, &config, &weights).unwrap());
    Loaded { config, weights, model }
}

fn logits(model: &Arc<Model<Cpu>>, scheme: &str, mode: Mode, ids: &[u32], passes: &[usize]) -> Vec<Vec<f32>> {
    let layout = model.config().cache_layout(&CalibratedScheme::load(scheme).unwrap()).unwrap();
    passes::logits(model, &layout, mode, ids, passes)
}

/// With values rotated by the projections.
fn rotated(loaded: &Loaded, mode: Mode, ids: &[u32], passes: &[usize]) -> Vec<Vec<f32>> {
    let Loaded { config, weights, model } = loaded;
    let layout = weights.cache_layout(config, &CalibratedScheme::load("kvlinc").unwrap()).unwrap();
    let model = Arc::new(model.variant(weights, &layout).unwrap());
    assert!(!model.suits(&config.cache_layout(&CalibratedScheme::load("kvlinc").unwrap()).unwrap()));
    passes::logits(&model, &layout, mode, ids, passes)
}

fn nll(logits: &[f32], id: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    sum.ln() - f64::from(logits[id as usize] - largest)
}

fn expected(directory: &Path) -> (Vec<u32>, Vec<f64>, Vec<usize>) {
    let json: Value = serde_json::from_slice(&std::fs::read(directory.join("expected.json")).unwrap()).unwrap();
    let list = |key: &str| json[key].as_array().unwrap().iter();
    (
        list("ids").map(|id| id.as_u64().unwrap() as u32).collect(),
        list("nll").map(|x| x.as_f64().unwrap()).collect(),
        list("argmax").map(|id| id.as_u64().unwrap() as usize).collect(),
    )
}

#[test]
fn every_token_agrees_with_transformers() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let fixtures = fixtures();
    assert!(fixtures.len() >= 5);
    for directory in fixtures {
        let (ids, nlls, argmax) = expected(&directory);
        let Loaded { model, .. } = load(&cpu, &directory, Some(DType::F32));
        let passes = [ids.len()];
        let logits = logits(&model, "fp16", Mode::Chunk, &ids, &passes);
        let mut worst = 0f64;
        for (at, expected) in nlls.iter().enumerate() {
            worst = worst.max((nll(&logits[at], ids[at + 1]) - expected).abs());
        }
        println!("{}: largest difference {worst:.1e}", directory.display());
        assert!(worst < TOLERANCE, "{}: {worst}", directory.display());
        for (row, expected) in logits.iter().zip(argmax) {
            let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            assert!(best == expected || row[best] - row[expected] < 1e-3, "{}", directory.display());
        }
    }
}

#[test]
fn a_configuration_says_the_same_in_old_and_new_words() {
    for directory in fixtures() {
        let Ok(new) = std::fs::read_to_string(directory.join("config_v5.json")) else { continue };
        let old = ModelFiles::open(&directory).unwrap().config.into_owned();
        let [old, new] = [old, new].map(|text| ModelConfig::parse(&text, "config.json").unwrap());
        assert_eq!(old, new, "{}", directory.display());
    }
}

#[test]
fn fused_value_rotation_changes_nothing_but_rounding() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    for directory in fixtures() {
        let (ids, ..) = expected(&directory);
        let ids = &ids[..200];
        let loaded = load(&cpu, &directory, Some(DType::F32));
        let plain = logits(&loaded.model, "fp16", Mode::Chunk, ids, &[200]);
        let rotated = rotated(&loaded, Mode::Chunk, ids, &[200]);
        for (at, (a, b)) in plain.iter().zip(&rotated).enumerate() {
            let difference = (nll(a, ids[at]) - nll(b, ids[at])).abs();
            assert!(difference < TOLERANCE, "{}: {difference}", directory.display());
        }
    }
}

#[test]
fn streaming_in_one_pass_is_decoding_token_by_token() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    for name in ["qwen2-bias-bf16", "llama32-old-bf16"] {
        let directory = repository().join("fixtures").join(name);
        let (ids, ..) = expected(&directory);
        let ids: Vec<u32> = ids.iter().copied().cycle().take(512).collect();
        let loaded = load(&cpu, &directory, None);
        // Here the cache rotates the values of kvlinc.
        for scheme in ["fp16", "kivi", "kivi-paper", "kvlinc"] {
            let one_pass = logits(&loaded.model, scheme, Mode::Streaming, &ids, &[200, 312]);
            let decoded = logits(&loaded.model, scheme, Mode::Chunk, &ids, &[1; 512]);
            assert!(one_pass == decoded, "{name}, {scheme}");
        }
        let one_pass = rotated(&loaded, Mode::Streaming, &ids, &[200, 312]);
        assert!(one_pass == rotated(&loaded, Mode::Chunk, &ids, &[1; 512]), "{name}, rotated by the weights");
    }
}

/// What is cached is read by every family as if its tokens had come one by one, across windows too.
#[test]
fn every_family_streams_as_it_decodes() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    for directory in fixtures() {
        let (ids, ..) = expected(&directory);
        let ids: Vec<u32> = ids.iter().copied().cycle().take(420).collect();
        let loaded = load(&cpu, &directory, None);
        for scheme in ["fp16", "kivi"] {
            let one_pass = logits(&loaded.model, scheme, Mode::Streaming, &ids, &[300, 120]);
            let decoded = logits(&loaded.model, scheme, Mode::Chunk, &ids, &[1; 420]);
            assert!(one_pass == decoded, "{}, {scheme}", directory.display());
        }
    }
}

#[test]
fn aligned_weights_are_mapped_and_tied_ones_shared() {
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let mut shared = 0;
    for directory in fixtures() {
        let Loaded { weights, config, .. } = load(&cpu, &directory, None);
        assert_eq!(weights.embed.same_numbers(&weights.lm_head), config.tie_word_embeddings);
        shared += usize::from(weights.embed.is_shared());
    }
    assert!(shared > 0, "no checkpoint was mapped");
}

#[test]
fn chat_templates_render_as_in_transformers() {
    let mut checked = 0;
    for directory in fixtures() {
        let Ok(text) = std::fs::read_to_string(directory.join("expected_chat.json")) else { continue };
        let files = ModelFiles::open(&directory).unwrap();
        let template =
            ChatTemplate::parse(files.tokenizer_config.as_deref(), files.chat_template.as_deref(), "m").unwrap();
        for case in serde_json::from_str::<Vec<Value>>(&text).unwrap() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let rendered =
                template.as_ref().unwrap().render(&messages, case["add_generation_prompt"].as_bool().unwrap()).unwrap();
            assert_eq!(rendered, case["text"].as_str().unwrap(), "{}", directory.display());
            checked += 1;
        }
    }
    assert!(checked >= 4);
}

#[test]
fn text_comes_out_of_a_stream_as_it_went_in() {
    let directory = repository().join("fixtures/qwen2-bias-bf16");
    let files = ModelFiles::open(&directory).unwrap();
    let tokenizer = Tokenizer::parse(files.tokenizer.as_deref().unwrap(), 384, "m").unwrap();
    let text = "naïve café, 数字 and 🦀 in one line";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(ids[0], 0, "the tokenizer begins a text with BOS");
    assert_eq!(tokenizer.decode(&ids).unwrap(), text);
    let mut stream = tokenizer.stream(&[]);
    let mut out = String::new();
    for id in ids {
        let piece = stream.push(&tokenizer, id).unwrap();
        assert!(!piece.contains('\u{fffd}'), "half a character was released");
        out += &piece;
    }
    assert_eq!(out + &stream.finish(&tokenizer).unwrap(), text);
    // A model may have fewer ids: then a text that takes one of the others is refused.
    let smaller = Tokenizer::parse(files.tokenizer.as_deref().unwrap(), 100, "m").unwrap();
    assert!(smaller.encode(text, true).is_err());
}

#[test]
fn prompts_are_neither_cut_nor_filled_up() {
    let path = repository().join("fixtures/qwen2-bias-bf16/tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let text = "A sentence of some more than eight tokens, to be cut or filled up.";
    let ids =
        |json: &Value| Tokenizer::parse(json.to_string().as_bytes(), 384, "m").unwrap().encode(text, true).unwrap();
    let expected = ids(&json);
    json["truncation"] =
        serde_json::json!({"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
        "pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"});
    assert_eq!(ids(&json), expected);
}
