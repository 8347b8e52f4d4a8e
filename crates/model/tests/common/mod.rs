//! GGUF files made of checkpoints, as llama.cpp's converter makes them.
#![allow(dead_code, reason = "every test file uses a part of it")]

pub mod families;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::Value as Json;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// The bundled model.
pub fn tiny() -> PathBuf {
    repository().join("models/tiny")
}

/// A checkpoint of the repository.
pub fn fixture(name: &str) -> PathBuf {
    repository().join("fixtures").join(name)
}

/// The folder of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A file to be written.
pub struct Gguf {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, QTensor>,
}

impl Gguf {
    /// A checkpoint whose matrices are stored as `dtype`, or as Q8_0 or F32 where their rows are no whole blocks.
    pub fn of_checkpoint(directory: &Path, dtype: GgmlDType) -> Gguf {
        let json = |name: &str| -> Json {
            serde_json::from_slice(&std::fs::read(directory.join(name)).unwrap_or("{}".into())).unwrap()
        };
        let config = json("config.json");
        let architecture = families::architecture(&config);
        let mut gguf = Gguf { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
        gguf.add_config(&config, architecture);
        gguf.add_tokenizer(&json("tokenizer.json"), &config, &json("tokenizer_config.json"));
        let mut tensors = HashMap::new();
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                tensors.extend(candle_core::safetensors::load(path, &Device::Cpu).unwrap());
            }
        }
        for (name, tensor) in families::tensors(&config, architecture, tensors) {
            gguf.add_tensor(&name, tensor, dtype, families::has_pairs(architecture).then_some(&config));
        }
        gguf
    }

    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.insert(key.to_owned(), value);
    }

    /// The file with the values of its architecture under another one's name.
    pub fn named(mut self, architecture: &str) -> Gguf {
        let Value::String(own) = self.metadata["general.architecture"].clone() else { panic!("no name") };
        for (key, value) in std::mem::take(&mut self.metadata) {
            self.set(&key.replace(&format!("{own}."), &format!("{architecture}.")), value);
        }
        self.set("general.architecture", Value::String(architecture.into()));
        self
    }

    fn add_config(&mut self, config: &Json, architecture: &str) {
        let number = |key: &str| config[key].as_u64().map(|value| Value::U32(value as u32));
        let float = |value: &Json| value.as_f64().map(|value| Value::F32(value as f32));
        let mut put = |key: &str, value: Option<Value>| {
            if let Some(value) = value {
                self.metadata.insert(format!("{architecture}.{key}"), value);
            }
        };
        put("block_count", number("num_hidden_layers"));
        put("embedding_length", number("hidden_size"));
        put("feed_forward_length", number("intermediate_size"));
        put("attention.head_count", number("num_attention_heads"));
        put("attention.head_count_kv", number("num_key_value_heads"));
        put("attention.key_length", number("head_dim"));
        put("attention.value_length", number("head_dim"));
        put("rope.dimension_count", number("head_dim"));
        put("attention.layer_norm_rms_epsilon", float(&config["rms_norm_eps"]));
        put("context_length", number("max_position_embeddings"));
        let rope =
            ["rope_parameters", "rope_scaling"].map(|key| &config[key]).into_iter().find(|rope| rope.is_object());
        let theta = rope.and_then(|rope| float(&rope["rope_theta"])).or(float(&config["rope_theta"]));
        put("rope.freq_base", theta);
        let kind = rope.and_then(|rope| rope["rope_type"].as_str().or(rope["type"].as_str()));
        if kind == Some("linear") {
            put("rope.scaling.type", Some(Value::String("linear".into())));
            put("rope.scaling.factor", float(&rope.unwrap()["factor"]));
        }
        if let Some(rope) = rope.filter(|_| kind == Some("yarn")) {
            put("rope.scaling.type", Some(Value::String("yarn".into())));
            let original = rope["original_max_position_embeddings"].as_u64().unwrap();
            put("rope.scaling.original_context_length", Some(Value::U32(original as u32)));
            for (key, name) in [("factor", "factor"), ("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")]
            {
                put(&format!("rope.scaling.{key}"), float(&rope[name]));
            }
        }
        families::metadata(config, architecture).into_iter().for_each(|(key, value)| put(key, Some(value)));
        if kind == Some("llama3") {
            let rope = rope.unwrap();
            let theta = rope["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).unwrap();
            self.add_llama3_divisors(rope, theta, config["head_dim"].as_u64().unwrap() as usize);
        }
        self.set("general.architecture", Value::String(architecture.into()));
    }

    fn add_llama3_divisors(&mut self, rope: &Json, theta: f64, head_dim: usize) {
        let number = |key: &str| rope[key].as_f64().unwrap();
        let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
        let original = number("original_max_position_embeddings");
        let divisor = |i: usize| {
            let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
        };
        let divisors: Vec<f32> = (0..head_dim / 2).map(divisor).collect();
        let tensor = Tensor::from_vec(divisors, head_dim / 2, &Device::Cpu).unwrap();
        self.tensors.insert("rope_freqs.weight".into(), QTensor::quantize(&tensor, GgmlDType::F32).unwrap());
    }

    fn add_tokenizer(&mut self, tokenizer: &Json, config: &Json, tokenizer_config: &Json) {
        let mut tokens: BTreeMap<u64, (String, i32)> = BTreeMap::new();
        for (token, id) in tokenizer["model"]["vocab"].as_object().unwrap() {
            tokens.insert(id.as_u64().unwrap(), (token.clone(), 1));
        }
        for token in tokenizer["added_tokens"].as_array().unwrap() {
            let kind = if token["special"] == true { 3 } else { 4 };
            tokens.insert(token["id"].as_u64().unwrap(), (token["content"].as_str().unwrap().into(), kind));
        }
        assert_eq!(tokens.len() as u64, tokens.last_key_value().unwrap().0 + 1, "ids without gaps");
        let merges = tokenizer["model"]["merges"].as_array().unwrap().iter().map(|merge| {
            let pair = |merge: &Vec<Json>| format!("{} {}", merge[0].as_str().unwrap(), merge[1].as_str().unwrap());
            Value::String(merge.as_str().map_or_else(|| pair(merge.as_array().unwrap()), str::to_owned))
        });
        self.set("tokenizer.ggml.merges", Value::Array(merges.collect()));
        let texts = tokens.values().map(|(token, _)| Value::String(token.clone())).collect();
        self.set("tokenizer.ggml.tokens", Value::Array(texts));
        self.set(
            "tokenizer.ggml.token_type",
            Value::Array(tokens.values().map(|(_, kind)| Value::I32(*kind)).collect()),
        );
        self.set("tokenizer.ggml.model", Value::String("gpt2".into()));
        let three_digits = tokenizer["pre_tokenizer"].to_string().contains("{1,3}");
        self.set("tokenizer.ggml.pre", Value::String(if three_digits { "llama-bpe" } else { "qwen2" }.into()));
        self.set("tokenizer.ggml.add_bos_token", Value::Bool(true));
        for name in ["bos", "eos"] {
            let id = &config[format!("{name}_token_id")];
            let id = id.as_u64().or(id[0].as_u64()).unwrap();
            self.set(&format!("tokenizer.ggml.{name}_token_id"), Value::U32(id as u32));
        }
        if let Some(template) = tokenizer_config["chat_template"].as_str() {
            self.set("tokenizer.chat_template", Value::String(template.into()));
        }
    }

    /// Adds a tensor by the name that Hugging Face has for it. A Llama's rows are put in pairs.
    pub fn add_tensor(&mut self, name: &str, tensor: Tensor, dtype: GgmlDType, llama: Option<&Json>) {
        let mut file_name = name.replace("model.layers.", "blk.").replace("model.embed_tokens", "token_embd");
        for (from, to) in [
            ("model.norm", "output_norm"),
            ("lm_head", "output"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.", "attn_"),
            ("mlp.", "ffn_"),
            ("_proj", ""),
        ] {
            file_name = file_name.replace(from, to);
        }
        let mut tensor = tensor.to_dtype(DType::F32).unwrap().contiguous().unwrap();
        if let Some(config) = llama {
            let heads = |key: &str| config[key].as_u64().unwrap() as usize;
            let key_value =
                if config["num_key_value_heads"].is_null() { "num_attention_heads" } else { "num_key_value_heads" };
            if name.contains("q_proj") {
                tensor = in_pairs(&tensor, heads("num_attention_heads"));
            } else if name.contains("k_proj") {
                tensor = in_pairs(&tensor, heads(key_value));
            }
        }
        let cols = tensor.dims().last().copied().unwrap();
        let whole = |dtype: GgmlDType| cols.is_multiple_of(dtype.block_size());
        let dtype = match tensor.dims().len() {
            1 => GgmlDType::F32,
            _ => [dtype, GgmlDType::Q8_0, GgmlDType::F32].into_iter().find(|dtype| whole(*dtype)).unwrap(),
        };
        self.tensors.insert(file_name, QTensor::quantize(&tensor, dtype).unwrap());
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_with(&self.metadata)
    }

    /// The file with other metadata.
    pub fn bytes_with(&self, metadata: &BTreeMap<String, Value>) -> Vec<u8> {
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut file = std::io::Cursor::new(Vec::new());
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
        file.into_inner()
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }
}

/// Rows of each head so that the channels that turn together are neighbours.
fn in_pairs(tensor: &Tensor, heads: usize) -> Tensor {
    let shape = tensor.dims().to_vec();
    let (rows, cols) = (shape[0], shape.get(1).copied().unwrap_or(1));
    let heads = tensor.reshape((heads, 2, rows / heads / 2, cols)).unwrap();
    heads.transpose(1, 2).unwrap().contiguous().unwrap().reshape(shape).unwrap()
}

/// A Qwen3 of made-up weights with the tokenizer of a fixture, whose rows are whole blocks of 256.
pub fn made_up(dtype: GgmlDType) -> Gguf {
    let (vocab, hidden, inner, heads, key_value, head_dim) = (384, 256, 512, 4, 2, 64);
    let config = serde_json::json!({
        "num_hidden_layers": 2, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": key_value, "head_dim": head_dim, "rms_norm_eps": 1e-6, "max_position_embeddings": 1024,
        "rope_theta": 10000.0, "bos_token_id": 0, "eos_token_id": 1,
    });
    let mut gguf = Gguf { metadata: BTreeMap::new(), tensors: BTreeMap::new() };
    gguf.add_config(&config, "qwen3");
    let tokenizer = std::fs::read(fixture("qwen3-hd256-bf16").join("tokenizer.json")).unwrap();
    gguf.add_tokenizer(&serde_json::from_slice(&tokenizer).unwrap(), &config, &Json::Null);
    let mut seed = 0;
    let mut add = |name: &str, rows: usize, cols: usize| {
        seed += 1;
        let values = dibit_device::Tensor::random(seed, 0.05, dibit_device::DType::F32, rows, cols).to_f32();
        gguf.add_tensor(name, Tensor::from_vec(values, (rows, cols), &Device::Cpu).unwrap(), dtype, None);
    };
    add("model.embed_tokens.weight", vocab, hidden);
    add("lm_head.weight", vocab, hidden);
    for layer in 0..2 {
        let mut add = |name: &str, rows, cols| add(&format!("model.layers.{layer}.{name}.weight"), rows, cols);
        add("self_attn.q_proj", heads * head_dim, hidden);
        add("self_attn.k_proj", key_value * head_dim, hidden);
        add("self_attn.v_proj", key_value * head_dim, hidden);
        add("self_attn.o_proj", hidden, heads * head_dim);
        add("mlp.gate_proj", inner, hidden);
        add("mlp.up_proj", inner, hidden);
        add("mlp.down_proj", hidden, inner);
    }
    let mut norm = |name: String, width: usize| {
        let ones = Tensor::ones(width, DType::F32, &Device::Cpu).unwrap();
        gguf.add_tensor(&name, ones, dtype, None);
    };
    norm("model.norm.weight".into(), hidden);
    for layer in 0..2 {
        for (name, width) in [
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.q_norm", head_dim),
            ("self_attn.k_norm", head_dim),
        ] {
            norm(format!("model.layers.{layer}.{name}.weight"), width);
        }
    }
    gguf
}
