//! What the tests of calibration share: small models, schemes and runs.
#![allow(dead_code, reason = "every test file uses a part of it")]

use dibit_cache::CalibratedScheme;
use dibit_calibrate::{Artefact, CalibrationError, Options, Recipe, Text, calibrate};
use dibit_cpu::Cpu;
use dibit_device::DType;
use dibit_model::{ModelFiles, Pretrained, WeightSource};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

/// One checkpoint of each family, with head sizes of every kind.
pub const FIXTURES: [&str; 5] =
    ["llama2-linear-f16", "llama32-old-bf16", "mistral-f32", "qwen2-bias-bf16", "qwen3-hd256-bf16"];

pub fn fixture_as(name: &str, dtype: Option<DType>) -> Pretrained {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name);
    Pretrained::load(&ModelFiles::open(&directory).unwrap(), WeightSource::Checkpoint, dtype).unwrap()
}

pub fn fixture(name: &str) -> Pretrained {
    fixture_as(name, None)
}

/// Made-up weights of a small shape with so many KV heads.
pub fn dummy(num_key_value_heads: usize, seed: u64, changes: Value) -> Pretrained {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": num_key_value_heads, "num_key_value_heads": num_key_value_heads, "head_dim": 64,
        "vocab_size": 384, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "bos_token_id": 0,
        "initializer_range": 0.2, "torch_dtype": "float32"
    });
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let files = ModelFiles {
        origin: "made up".into(),
        config: config.to_string().into(),
        generation_config: None,
        tokenizer: None,
        tokenizer_config: None,
        chat_template: None,
        weights: Vec::new(),
    };
    Pretrained::load(&files, WeightSource::Dummy { seed, pooled: false }, None).unwrap()
}

/// Token ids that look random.
pub fn text(count: usize, seed: u64) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // As in a language, some tokens occur far more often than others.
        let (a, b) = ((state >> 33) % 380, (state >> 45) % 380);
        5 + (a * b / 380) as u32
    };
    (0..count).map(|_| next()).collect()
}

pub fn parse(text: &str) -> CalibratedScheme {
    CalibratedScheme::parse(text, "mine").unwrap()
}

/// RotateKV without sinks and window, so that every token is packed.
pub fn rotatekv(bits: u32, permutation: &str, statistic: &str) -> String {
    format!(
        "name = \"rotated\"\n\
         [keys]\nbits = {bits}\naxis = \"token\"\ngroup = 128\nquantizer = \"integer-zero\"\nclip = 1.0\n\
         position = \"pre-rope\"\ntransform = \"grouped-hadamard\"\nheads = 4\npermutation = \"{permutation}\"\n\
         statistic = \"{statistic}\"\n\
         [values]\nbits = {bits}\naxis = \"token\"\ngroup = 128\ntransform = \"hadamard\"\n"
    )
}

/// ResQ without a window.
pub fn resq(bits: u32) -> String {
    let side =
        format!("bits = {bits}\naxis = \"token\"\ngroup = 128\ntransform = \"basis\"\nhigh_precision = 0.03125\n");
    format!("name = \"based\"\n[keys]\n{side}[values]\n{side}")
}

/// A permutation for keys and a basis for values.
pub fn both() -> String {
    let values = "[values]\nbits = 2\naxis = \"token\"\ntransform = \"basis\"\nhigh_precision = 0.03125\n";
    format!("{}{values}", rotatekv(2, "local", "mean").split("[values]").next().unwrap())
}

pub fn options(context: usize) -> Options {
    Options { context, tokens: None, seed: 0, state: None, recipe: Recipe::default(), held_out: 0.05 }
}

/// A text of one document.
pub fn one(ids: &[u32]) -> Text {
    Text { documents: vec![ids.to_vec()], held_out: Vec::new() }
}

/// Runs to the end.
pub fn try_make(
    pretrained: &Pretrained,
    scheme: &CalibratedScheme,
    ids: &[u32],
    options: &Options,
) -> Result<Artefact, CalibrationError> {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let made = calibrate(&cpu, pretrained, scheme, &one(ids), options, |_| ControlFlow::Continue(()))?;
    Ok(made.expect("nobody stopped it"))
}

pub fn make(pretrained: &Pretrained, scheme: &CalibratedScheme, ids: &[u32], options: &Options) -> Artefact {
    try_make(pretrained, scheme, ids, options).unwrap()
}

/// What a person reads of an error, its causes included.
pub fn message(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// The error says all of this.
#[track_caller]
pub fn says<T>(result: Result<T, CalibrationError>, words: &[&str]) {
    let Err(error) = result else { panic!("no error, and one with {words:?} was expected") };
    let message = message(&error);
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(TempDir::new().unwrap())
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.file(name), bytes).unwrap();
        self.file(name)
    }

    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The bytes that an artefact has as a file.
pub fn bytes(artefact: &Artefact) -> Vec<u8> {
    let folder = Folder::new();
    artefact.save(&folder.file("x")).unwrap();
    std::fs::read(folder.file("x")).unwrap()
}

/// A safetensors file to be changed.
#[derive(Clone)]
pub struct Parts {
    pub metadata: HashMap<String, String>,
    pub tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    pub fn of(bytes: &[u8]) -> Self {
        let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
        let tensors = SafeTensors::deserialize(bytes).unwrap();
        let tensor = |(name, view): (&str, TensorView)| {
            (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        Parts { metadata: header.metadata().clone().unwrap_or_default(), tensors: tensors.iter().map(tensor).collect() }
    }

    /// Shape, type and bytes of a tensor.
    pub fn tensor(&mut self, name: &str) -> (&mut Dtype, &mut Vec<usize>, &mut Vec<u8>) {
        let (_, dtype, shape, data) = self.tensors.iter_mut().find(|tensor| tensor.0 == name).unwrap();
        (dtype, shape, data)
    }

    /// Sets number `at` of a tensor of 4-byte numbers.
    pub fn set(&mut self, name: &str, at: usize, number: [u8; 4]) {
        self.tensor(name).2[4 * at..4 * at + 4].copy_from_slice(&number);
    }

    pub fn remove(&mut self, name: &str) {
        let before = self.tensors.len();
        self.tensors.retain(|tensor| tensor.0 != name);
        assert_eq!(self.tensors.len(), before - 1, "{name}");
    }

    pub fn bytes(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, dtype, shape, data)| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        safetensors::serialize(views, Some(self.metadata.clone())).unwrap()
    }
}
