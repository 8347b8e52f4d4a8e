//! Every family on a GPU: each token's negative log-likelihood against Hugging Face transformers in float32, read as a prompt
//! and decoded token by token.
#![cfg(feature = "gpu-tests")]

mod common;

use dibit_cache::{CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_cuda::Cuda;
use dibit_device::{DType, Device};
use dibit_model::{Model, ModelConfig, ModelFiles, WeightSource, Weights};
use dibit_runner::{Capacity, Executor, Runner};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const TOLERANCE: f64 = 1e-3;

/// How far a GPU and a CPU may be apart where keys and values are rounded, or packed: a number may fall to either side.
const CACHED_TOLERANCE: f64 = 1e-2;

/// Tokens that are decoded one by one behind a prompt: the first as it comes, the second as its pass is recorded, the others by
/// what was recorded.
const DECODED: usize = 4;

/// Checkpoints with reference outputs.
fn fixtures() -> Vec<PathBuf> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let folders = match std::env::var("DIBIT_FIXTURES") {
        Ok(folder) => vec![PathBuf::from(folder)],
        Err(_) => vec![repository.join("fixtures"), repository.join("../shared/fixtures/arch")],
    };
    let mut found: Vec<PathBuf> = Vec::new();
    for folder in folders {
        match std::fs::read_dir(&folder) {
            Ok(entries) => found.extend(entries.map(|entry| entry.unwrap().path())),
            Err(_) => println!("skipped: {} is not here", folder.display()),
        }
    }
    found.retain(|path| path.join("expected.json").exists());
    found.sort();
    found
}

struct Fixture {
    config: ModelConfig,
    weights: Weights,
    ids: Vec<u32>,
    expected: Vec<f64>,
}

fn load(directory: &Path) -> Fixture {
    let json: Value = serde_json::from_slice(&std::fs::read(directory.join("expected.json")).unwrap()).unwrap();
    let ids: Vec<u32> = json["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    let expected = json["nll"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
    let files = ModelFiles::open(directory).unwrap();
    let mut config = ModelConfig::parse(&files.config, "config.json").unwrap();
    config.set_context(ids.len());
    let weights = Weights::load(&files, &config, WeightSource::Checkpoint, Some(DType::F32)).unwrap();
    Fixture { config, weights, ids, expected }
}

impl Fixture {
    /// The negative log-likelihood of every token but the first, read in passes of these lengths.
    fn nll<D: Device + 'static>(&self, device: &Arc<D>, scheme: &str, passes: &[usize]) -> Vec<f64> {
        let layout = self.config.cache_layout(&CalibratedScheme::load(scheme).unwrap()).unwrap();
        let model = Arc::new(Model::new(device, &self.config, &self.weights).unwrap());
        let capacity = Capacity::of_one(&layout, self.ids.len(), self.ids.len());
        let mut runner = Runner::new(model, layout, capacity).unwrap();
        let mut sequence = runner.open().unwrap();
        let (mut all, mut logits) = (Vec::new(), Vec::new());
        for rows in passes {
            let first = sequence.len();
            runner.step(Mode::Chunk, &mut [(&mut sequence, &self.ids[first..first + rows])]).unwrap();
            runner.logits(&(0..*rows).collect::<Vec<_>>(), &mut logits).unwrap();
            let rows = logits.chunks_exact(self.config.vocab_size).zip(self.ids[first + 1..].iter());
            all.extend(rows.map(|(logits, id)| nll(logits, *id)));
        }
        all
    }
}

fn nll(logits: &[f32], id: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - largest).exp()).sum();
    sum.ln() - f64::from(logits[id as usize] - largest)
}

fn farthest(got: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(got.len(), expected.len());
    got.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn every_family_agrees_with_transformers() {
    let Some(_) = common::cuda() else { return };
    let (cuda, cpu) = (Arc::new(Cuda::new(0).unwrap()), Arc::new(Cpu::new(Some(2)).unwrap()));
    let fixtures = fixtures();
    assert!(!fixtures.is_empty());
    let mut failed = Vec::new();
    for directory in fixtures {
        let name = directory.file_name().unwrap().display().to_string();
        let own = load(&directory);
        let tokens = own.ids.len();
        let worst = farthest(&own.nll(&cuda, "fp16", &[tokens]), &own.expected);
        println!("{name}: {worst:.1e} from transformers");
        if worst > TOLERANCE {
            failed.push(name.clone());
        }
        // What is cached is rounded to fp16, or packed, as on the CPU.
        let passes = [&[200, tokens - 200 - DECODED][..], &[1; DECODED]].concat();
        for scheme in ["fp16", "kivi"] {
            let worst = farthest(&own.nll(&cuda, scheme, &passes), &own.nll(&cpu, scheme, &passes));
            println!("{name}: under {scheme} {worst:.1e} from the CPU");
            if worst > CACHED_TOLERANCE {
                failed.push(format!("{name} under {scheme}"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}
