//! Tokenizers of GGUF metadata and of `tokenizer.json` against the ids of Hugging Face tokenizers, on odd texts.

mod common;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use common::{Gguf, made_up, repository};
use dibit_model::{ModelError, ModelFiles, Tokenizer};
use serde_json::Value as Json;
use std::path::Path;

fn fixture(name: &str) -> Json {
    let path = repository().join("fixtures/tokenizers").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn texts() -> Vec<String> {
    serde_json::from_value(fixture("texts.json")).unwrap()
}

/// Encodes every text, and compares with the ids.
fn compare(name: &str, tokenizer: &Tokenizer, special: bool, ids: &Json) {
    let (texts, ids) = (texts(), ids.as_array().unwrap());
    assert!(texts.len() >= 40 && texts.len() == ids.len());
    for (text, ids) in texts.iter().zip(ids) {
        let mut expected: Vec<u32> = serde_json::from_value(ids.clone()).unwrap();
        // Hugging Face adds BOS to a text that begins with it; here a text has one.
        if special && tokenizer.adds_bos() && expected.get(1) == expected.first() {
            expected.remove(0);
        }
        assert_eq!(tokenizer.encode(text, special).unwrap(), expected, "{name}: {text:?}");
    }
}

/// The tokenizer of a GGUF file.
fn open(path: &Path) -> Result<Tokenizer, ModelError> {
    let files = ModelFiles::open_gguf(path)?;
    Tokenizer::parse(&files.tokenizer.unwrap(), 1 << 20, "tokenizer")
}

fn tokenizer(file: &Gguf) -> Result<Tokenizer, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    file.write(&path);
    open(&path)
}

/// A file without weights and with this vocabulary.
fn vocabulary(json: &Json) -> Gguf {
    let list = |key: &str, value: &dyn Fn(&Json) -> Value| {
        Value::Array(json[key].as_array().unwrap().iter().map(value).collect())
    };
    let text = |value: &Json| Value::String(value.as_str().unwrap().into());
    let mut file = made_up(GgmlDType::Q8_0);
    file.tensors.clear();
    for key in ["merges", "add_bos_token", "bos_token_id", "eos_token_id"] {
        file.metadata.remove(&format!("tokenizer.ggml.{key}"));
    }
    file.set("tokenizer.ggml.tokens", list("tokens", &text));
    file.set("tokenizer.ggml.token_type", list("types", &|kind| Value::I32(kind.as_i64().unwrap() as i32)));
    if json["scores"].is_array() {
        file.set("tokenizer.ggml.model", Value::String("llama".into()));
        file.set("tokenizer.ggml.scores", list("scores", &|score| Value::F32(score.as_f64().unwrap() as f32)));
        file.set("tokenizer.ggml.pre", Value::String("default".into()));
    } else {
        file.set("tokenizer.ggml.merges", list("merges", &text));
    }
    file
}

#[test]
fn byte_level_texts_are_cut_as_each_family_does() {
    let json = fixture("byte_level.json");
    let mut file = vocabulary(&json);
    let ids = json["ids"].as_object().unwrap();
    for (name, ids) in ids {
        file.set("tokenizer.ggml.pre", Value::String(name.clone()));
        compare(name, &tokenizer(&file).unwrap(), false, ids);
    }
    for (name, same) in [
        ("llama3", "llama-bpe"),
        ("llama-v3", "llama-bpe"),
        ("falcon3", "llama-bpe"),
        ("pixtral", "llama-bpe"),
        ("deepseek-r1-qwen", "qwen2"),
        ("megrez", "qwen2"),
        ("olmo", "gpt-2"),
        ("refact", "smollm"),
        ("dbrx", "smaug-bpe"),
    ] {
        file.set("tokenizer.ggml.pre", Value::String(name.into()));
        compare(name, &tokenizer(&file).unwrap(), false, &ids[same]);
    }
    file.metadata.remove("tokenizer.ggml.pre");
    compare("none", &tokenizer(&file).unwrap(), false, &ids["default"]);
    // No two ways give the same ids, so that no test passes by another's way.
    let ways: Vec<_> = ids.iter().collect();
    for (i, (name, ids)) in ways.iter().enumerate() {
        assert!(ways[..i].iter().all(|(_, other)| other != ids), "{name}");
    }
}

#[test]
fn sentence_pieces_are_those_of_sentence_piece() {
    for json in fixture("sentence_piece.json").as_array().unwrap() {
        let mut file = vocabulary(json);
        file.set("tokenizer.ggml.add_space_prefix", Value::Bool(json["prefix"] == true));
        file.set("tokenizer.ggml.bos_token_id", Value::U32(1));
        file.set("tokenizer.ggml.eos_token_id", Value::U32(2));
        file.set("tokenizer.ggml.unknown_token_id", Value::U32(0));
        let tokenizer = tokenizer(&file).unwrap();
        compare("SentencePiece", &tokenizer, false, &json["ids"]);
        for text in texts().iter().filter(|text| !text.contains(['<', '▁'])) {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!((ids[0], tokenizer.decode(&ids).unwrap()), (1, text.clone()));
        }
    }
}

#[test]
fn tokenizer_files_give_the_ids_of_hugging_face() {
    for (name, ids) in fixture("files.json").as_object().unwrap() {
        let path = repository().join(name);
        let file = Tokenizer::parse(&std::fs::read(&path).unwrap(), 1 << 20, name).unwrap();
        compare(name, &file, true, ids);
        // No family of GGUF files cuts texts as the bundled model does: as Qwen, but without composing characters.
        if !name.contains("tiny") {
            let gguf = Gguf::of_checkpoint(path.parent().unwrap(), GgmlDType::BF16);
            compare(name, &tokenizer(&gguf).unwrap(), true, ids);
        }
    }
}

#[test]
fn the_real_models_tokenizer_gives_the_ids_of_hugging_face() {
    let Some(path) = std::env::var_os("DIBIT_REAL_MODEL") else {
        println!("skipped: set DIBIT_REAL_MODEL to the file that tools/real_model.sh fetches");
        return;
    };
    let tokenizer = open(Path::new(&path)).unwrap();
    compare("SmolLM2", &tokenizer, false, &fixture("smollm2.json")["ids"]);
    // The file says that texts do not begin with BOS.
    compare("SmolLM2", &tokenizer, true, &fixture("smollm2.json")["ids"]);
}

#[test]
fn a_text_begins_and_ends_as_the_file_says() {
    let json = fixture("byte_level.json");
    let end = json["tokens"].as_array().unwrap().len() as u32;
    let (bos, eos) = (end - 4, end - 3);
    let begins = |pre: &str, flags: &[(&str, bool)]| {
        let mut file = vocabulary(&json);
        file.set("tokenizer.ggml.pre", Value::String(pre.into()));
        file.set("tokenizer.ggml.bos_token_id", Value::U32(bos));
        file.set("tokenizer.ggml.eos_token_id", Value::U32(eos));
        for (flag, value) in flags {
            file.set(&format!("tokenizer.ggml.{flag}"), Value::Bool(*value));
        }
        let tokenizer = tokenizer(&file).unwrap();
        let plain = tokenizer.encode("a b", false).unwrap();
        let ids = tokenizer.encode("a b", true).unwrap();
        let at = ids.windows(plain.len()).position(|window| window == plain).unwrap();
        (ids[..at].to_vec(), ids[at + plain.len()..].to_vec())
    };
    for pre in ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken"] {
        assert_eq!(begins(pre, &[("add_bos_token", true)]), (vec![bos], vec![]), "{pre}");
        assert_eq!(begins(pre, &[("add_bos_token", false)]), (vec![], vec![]), "{pre}");
        let both = [("add_bos_token", true), ("add_eos_token", true)];
        assert_eq!(begins(pre, &both), (vec![bos], vec![eos]), "{pre}");
        // Where a file does not say, its family does.
        let own = if matches!(pre, "llama-bpe" | "tekken") { vec![bos] } else { vec![] };
        assert_eq!(begins(pre, &[]), (own, vec![]), "{pre}");
    }
}

#[test]
fn every_end_of_a_turn_is_an_end() {
    let json = fixture("byte_level.json");
    let end = json["tokens"].as_array().unwrap().len() as u32;
    let ends = |ids: [u32; 3]| {
        let mut file = vocabulary(&json);
        for (name, id) in ["eos", "eot", "eom"].iter().zip(ids) {
            file.set(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        file.write(&path);
        let config: Json = serde_json::from_str(&ModelFiles::open_gguf(&path).unwrap().config).unwrap();
        config["eos_token_id"].clone()
    };
    assert_eq!(ends([end - 3, end - 2, end - 1]), serde_json::json!([end - 3, end - 2, end - 1]));
    assert_eq!(ends([end - 3, end - 2, end - 3]), serde_json::json!([end - 3, end - 2]));
}
