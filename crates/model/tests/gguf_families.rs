//! GGUF files of single families against the checkpoints that they were made of.

mod common;
mod passes;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::{DType, Device, Tensor};
use common::{Gguf, repository};
use dibit_cache::{CalibratedScheme, Mode};
use dibit_cpu::Cpu;
use dibit_model::{Model, ModelFiles, Pretrained, WeightSource};
use serde_json::{Value as Json, json};
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const TOLERANCE: f64 = 1e-4;

/// Numbers that share an exponent in MXFP4.
const GROUP: usize = 32;

/// Files do not say the scale of attention and the limit of experts: llama.cpp knows those of the models.
fn checkpoints() -> Vec<(&'static str, Json)> {
    vec![
        ("gemma2", json!({"query_pre_attn_scalar": 128})),
        ("gemma3", json!({"query_pre_attn_scalar": 256})),
        ("gptoss", json!({"swiglu_limit": 7.0})),
        ("granite", json!({})),
        ("mixtral", json!({})),
        ("olmo2", json!({})),
        ("phi3-longrope-long", json!({})),
        ("phi3-longrope-short", json!({})),
        ("smollm3-nope", json!({})),
    ]
}

/// A checkpoint that is too large to be in the repository, where it is at hand.
fn family(name: &str) -> Option<PathBuf> {
    let directory = repository().join("../shared/fixtures/arch").join(name);
    if !directory.exists() {
        let line = format!("skipped: {} is not here\n", directory.display());
        std::io::stderr().write_all(line.as_bytes()).unwrap();
        return None;
    }
    Some(directory)
}

/// A copy of a checkpoint with changes of its configuration, and with these tensors in place of its own.
fn copy(source: &Path, changes: &Json, tensors: Option<&HashMap<String, Tensor>>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::write(folder.path().join(name), std::fs::read(source.join(name)).unwrap()).unwrap();
    }
    let mut config: Json = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    if let Some(tensors) = tensors {
        candle_core::safetensors::save(tensors, folder.path().join("model.safetensors")).unwrap();
    }
    folder
}

/// With matrices in f32, or as they are stored.
fn load(files: &ModelFiles, dtype: Option<dibit_device::DType>) -> Pretrained {
    Pretrained::load(files, WeightSource::Checkpoint, dtype).unwrap()
}

fn load_gguf(bytes: Vec<u8>, dtype: Option<dibit_device::DType>) -> Pretrained {
    load(&ModelFiles::from_gguf(Arc::new(bytes), "model.gguf").unwrap(), dtype)
}

/// The negative log-likelihood of every id after the first.
fn nlls(pretrained: &Pretrained, ids: &[u32]) -> Vec<f64> {
    let mut config = pretrained.config.clone();
    config.set_context(ids.len());
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let model = Arc::new(Model::new(&cpu, &config, &pretrained.weights).unwrap());
    let layout = config.cache_layout(&CalibratedScheme::load("fp16").unwrap()).unwrap();
    let logits = passes::logits(&model, &layout, Mode::Chunk, ids, &[ids.len()]);
    let nll = |(row, id): (&Vec<f32>, &u32)| {
        let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - largest).exp()).sum();
        sum.ln() - f64::from(row[*id as usize] - largest)
    };
    logits.iter().zip(&ids[1..]).map(nll).collect()
}

/// That a file computes what its checkpoint does, and is known as the same model.
fn compare(name: &str, checkpoint: &Path, ids: &[u32], file: Vec<u8>) {
    let checkpoint = load(&ModelFiles::open(checkpoint).unwrap(), Some(dibit_device::DType::F32));
    let gguf = load_gguf(file, Some(dibit_device::DType::F32));
    let pairs = nlls(&checkpoint, ids).into_iter().zip(nlls(&gguf, ids));
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("{name}: largest difference {worst:.1e} of {} tokens", ids.len() - 1);
    assert!(worst < TOLERANCE, "{name}: {worst}");
    assert_eq!(gguf.config.num_parameters(), checkpoint.config.num_parameters(), "{name}");
    let difference = checkpoint.weights.sketch.difference(&gguf.weights.sketch);
    assert!(difference.is_none(), "{name}: {}", difference.unwrap());
}

fn ids(directory: &Path) -> Vec<u32> {
    let expected: Json = serde_json::from_slice(&std::fs::read(directory.join("expected.json")).unwrap()).unwrap();
    serde_json::from_value(expected["ids"].clone()).unwrap()
}

#[test]
fn files_of_families_compute_what_their_checkpoints_do() {
    for (name, changes) in checkpoints() {
        let Some(directory) = family(name) else { continue };
        let folder = copy(&directory, &changes, None);
        let file = Gguf::of_checkpoint(folder.path(), GgmlDType::F32).bytes();
        compare(name, folder.path(), &ids(&directory), file);
    }
}

#[test]
fn quantised_files_of_families_cost_what_their_bits_allow() {
    for (name, changes) in checkpoints() {
        let Some(directory) = family(name) else { continue };
        let folder = copy(&directory, &changes, None);
        let ids = ids(&directory);
        let exact = nlls(&load(&ModelFiles::open(folder.path()).unwrap(), Some(dibit_device::DType::F32)), &ids);
        let gguf = load_gguf(Gguf::of_checkpoint(folder.path(), GgmlDType::Q8_0).bytes(), None);
        let formats = gguf.weights.formats();
        let apart = exact.iter().zip(nlls(&gguf, &ids)).map(|(a, b)| (a - b).abs());
        let mean = apart.sum::<f64>() / exact.len() as f64;
        println!("{name}: mean difference {mean:.4}, {formats}");
        // These weights are random and rounding weighs; rows of another head would cost several times as much.
        assert!(mean < 0.5 && formats.contains("Q8_0"), "{name}: {mean}, {formats}");
    }
}

/// Numbers of MXFP4 that are close to a tensor `[experts, rows, cols]`: two codes in each byte, and the exponents.
fn mxfp4(tensor: &Tensor) -> [Tensor; 2] {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let numbers: Vec<f32> = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    let (mut codes, mut exponents) = (Vec::new(), Vec::new());
    for group in numbers.chunks_exact(GROUP) {
        let largest = group.iter().fold(0f32, |most, x| most.max(x.abs()));
        let exponent = (largest / 6.0).log2().ceil();
        exponents.push((exponent + 127.0) as u8);
        let code = |x: f32| {
            let distance = |code: &usize| (x.abs() / exponent.exp2() - MAGNITUDES[*code]).abs();
            let nearest = (0..8).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap() as u8;
            nearest | u8::from(x < 0.0) << 3
        };
        codes.extend(group.chunks_exact(2).map(|pair| code(pair[0]) | code(pair[1]) << 4));
    }
    let (experts, rows, cols) = tensor.dims3().unwrap();
    let shape = [experts, rows, cols / GROUP, GROUP / 2];
    [
        Tensor::from_vec(codes, &shape, &Device::Cpu).unwrap(),
        Tensor::from_vec(exponents, &shape[..3], &Device::Cpu).unwrap(),
    ]
}

/// Puts experts into a file as blocks of MXFP4: an exponent, then codes of which the halves of a block share bytes.
fn add_mxfp4(gguf: &mut Gguf, name: &str, codes: &Tensor, exponents: &Tensor) {
    let numbers = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    let mut raw = Vec::new();
    for (codes, exponent) in numbers(codes).chunks_exact(GROUP / 2).zip(numbers(exponents)) {
        let code = |at: usize| codes[at / 2] >> (4 * (at % 2)) & 15;
        raw.push(exponent);
        raw.extend((0..GROUP / 2).map(|at| code(at) | code(at + GROUP / 2) << 4));
    }
    let (experts, rows, groups) = exponents.dims3().unwrap();
    // Half as many rows of Q8_0 take as many bytes; `told_of_mxfp4` says what they are.
    let dims = vec![experts, rows / 2, groups * GROUP];
    gguf.tensors.insert(name.into(), qtensor_from_ggml(GgmlDType::Q8_0, &raw, dims, &Device::Cpu).unwrap());
}

/// A file whose header has these tensors, of half as many rows in Q8_0, as what they are.
fn told_of_mxfp4(mut file: Vec<u8>, names: &[String]) -> Vec<u8> {
    for name in names {
        let needle = [&(name.len() as u64).to_le_bytes()[..], name.as_bytes()].concat();
        let at = file.windows(needle.len()).position(|window| window == needle).unwrap() + needle.len();
        // Behind the number of dimensions these follow, that of neighbours first, and the type.
        let (rows, kind) = (at + 4 + 8, at + 4 + 3 * 8);
        let count = u64::from_le_bytes(file[rows..rows + 8].try_into().unwrap());
        file[rows..rows + 8].copy_from_slice(&(2 * count).to_le_bytes());
        assert_eq!(file[kind..kind + 4], 8u32.to_le_bytes());
        file[kind..kind + 4].copy_from_slice(&39u32.to_le_bytes());
    }
    file
}

#[test]
fn experts_in_mxfp4_are_the_same_in_both_kinds_of_files() {
    const HIDDEN: usize = 64;
    let Some(directory) = family("gptoss") else { return };
    let own = candle_core::safetensors::load(directory.join("model.safetensors"), &Device::Cpu).unwrap();
    let (mut checkpoint, mut experts) = (HashMap::new(), Vec::new());
    for (name, mut tensor) in own {
        // Rows of 48 numbers are no whole blocks.
        for (dim, size) in tensor.dims().to_vec().into_iter().enumerate().filter(|(_, size)| *size == 48) {
            tensor = tensor.pad_with_zeros(dim, 0, HIDDEN - size).unwrap();
        }
        if name.ends_with("up_proj") || name.ends_with("experts.down_proj") {
            let [codes, exponents] = mxfp4(&tensor.transpose(1, 2).unwrap().contiguous().unwrap());
            experts.push((name.clone(), codes.clone(), exponents.clone()));
            checkpoint.insert(format!("{name}_blocks"), codes);
            checkpoint.insert(format!("{name}_scales"), exponents);
        } else {
            checkpoint.insert(name, tensor);
        }
    }
    assert_eq!(experts.len(), 2 * 4);
    let changes = json!({"hidden_size": HIDDEN, "swiglu_limit": 7.0, "quantization_config": {"quant_method": "mxfp4"}});
    // The file is made without experts, which are put into it in its own layout.
    let others = checkpoint.iter().filter(|(name, _)| !name.ends_with("_blocks") && !name.ends_with("_scales"));
    let others: HashMap<String, Tensor> = others.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
    let mut gguf = Gguf::of_checkpoint(copy(&directory, &changes, Some(&others)).path(), GgmlDType::F32);
    let mut names = Vec::new();
    for (name, codes, exponents) in experts {
        let layer = name.split('.').nth(2).unwrap();
        let parts: &[(&str, usize)] =
            if name.ends_with("up_proj") { &[("gate", 0), ("up", 1)] } else { &[("down", 0)] };
        for (part, first) in parts {
            let rows: Vec<u32> = (*first as u32..codes.dims()[1] as u32).step_by(parts.len()).collect();
            let rows = Tensor::new(rows, &Device::Cpu).unwrap();
            let own = |tensor: &Tensor| tensor.index_select(&rows, 1).unwrap();
            names.push(format!("blk.{layer}.ffn_{part}_exps.weight"));
            add_mxfp4(&mut gguf, names.last().unwrap(), &own(&codes), &own(&exponents));
        }
    }
    let folder = copy(&directory, &changes, Some(&checkpoint));
    let file = told_of_mxfp4(gguf.bytes(), &names);
    compare("gptoss in MXFP4", folder.path(), &ids(&directory), file);
}
