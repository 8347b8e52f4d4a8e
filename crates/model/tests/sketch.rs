//! Models are known again by a sketch of their weights, however these are stored.

mod common;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use common::{Gguf, fixture, tiny};
use dibit_device::DType;
use dibit_model::{ModelFiles, Pretrained, Sketch, WeightSource};
use std::path::{Path, PathBuf};

fn load(path: &Path, dtype: Option<DType>) -> Pretrained {
    let files = if path.is_dir() { ModelFiles::open(path) } else { ModelFiles::open_gguf(path) };
    Pretrained::load(&files.unwrap(), WeightSource::Checkpoint, dtype).unwrap()
}

fn of_gguf(gguf: &Gguf) -> Sketch {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf.write(&path);
    load(&path, None).weights.sketch
}

/// The larger reference model, where it is beside the repository.
fn models() -> Vec<PathBuf> {
    let larger = common::repository().join("../shared/models/ref-qwen3-59m");
    if !larger.exists() {
        eprintln!("skipped: the larger reference model is not beside the repository");
    }
    [tiny(), larger].into_iter().filter(|path| path.exists()).collect()
}

/// A file of the checkpoint whose matrices are changed by a matrix of rank 4 of this share of their norm.
fn fine_tuned(checkpoint: &Path, kind: GgmlDType, share: f64) -> Gguf {
    let mut gguf = Gguf::of_checkpoint(checkpoint, GgmlDType::F32);
    let mut seed = 1u64;
    let mut numbers = |count: usize| -> Vec<f32> {
        seed += 1;
        dibit_device::Tensor::random(seed, 1.0, DType::F32, 1, count).to_f32()
    };
    for tensor in gguf.tensors.values_mut() {
        let plain = tensor.dequantize(&Device::Cpu).unwrap();
        let [rows, cols] = plain.dims()[..] else { continue };
        let factor = |values: Vec<f32>, shape: (usize, usize)| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
        let change = factor(numbers(4 * rows), (rows, 4)).matmul(&factor(numbers(4 * cols), (4, cols))).unwrap();
        let norm = |tensor: &Tensor| tensor.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
        let scale = share * f64::from(norm(&plain) / norm(&change));
        let kind = if cols.is_multiple_of(kind.block_size()) { kind } else { GgmlDType::Q8_0 };
        *tensor = QTensor::quantize(&(plain + (change * scale).unwrap()).unwrap(), kind).unwrap();
    }
    gguf
}

#[test]
fn every_format_of_a_model_is_that_model() {
    for model in models() {
        let own = load(&model, None).weights.sketch;
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            assert_eq!(load(&model, Some(dtype)).weights.sketch, own, "{dtype:?}");
        }
        for kind in [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
            GgmlDType::Q8_0,
            GgmlDType::Q6K,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q5K,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q4K,
            GgmlDType::Q3K,
            GgmlDType::Q2K,
        ] {
            // Those that only rows of whole blocks of 256 show, and one more.
            if model != tiny() && kind.block_size() != 256 && kind != GgmlDType::Q8_0 {
                continue;
            }
            let other = of_gguf(&Gguf::of_checkpoint(&model, kind));
            assert_eq!(own.difference(&other), None, "{} as {kind:?}", model.display());
            assert_eq!(other.difference(&own), None, "{} as {kind:?}", model.display());
        }
    }
}

#[test]
fn a_fine_tune_that_rounding_does_not_hide_is_another_model() {
    for model in models() {
        let own = load(&model, None).weights.sketch;
        let all: &[(GgmlDType, f64)] = &[
            (GgmlDType::F32, 0.01),
            (GgmlDType::BF16, 0.01),
            (GgmlDType::Q8_0, 0.02),
            (GgmlDType::Q6K, 0.05),
            (GgmlDType::Q4_0, 0.2),
            (GgmlDType::Q4K, 0.2),
        ];
        for &(kind, share) in if model == tiny() { all } else { &all[3..4] } {
            let difference = own.difference(&of_gguf(&fine_tuned(&model, kind, share)));
            let difference = difference.unwrap_or_else(|| panic!("{} as {kind:?}, {share}", model.display()));
            assert!(difference.distance.unwrap() > difference.explained, "{difference}");
        }
    }
}

#[test]
fn what_only_one_model_has_is_named() {
    let [llama, qwen] = ["llama32-old-bf16", "qwen2-bias-bf16"].map(|name| load(&fixture(name), None).weights.sketch);
    for (own, other) in [(&llama, &qwen), (&qwen, &llama)] {
        let difference = own.difference(other).unwrap().to_string();
        assert!(difference.contains("model.") || difference.contains("lm_head"), "{difference}");
    }
    let mut gguf = Gguf::of_checkpoint(&tiny(), GgmlDType::F32);
    let norm = gguf.tensors["blk.3.attn_norm.weight"].dequantize(&Device::Cpu).unwrap();
    let changed = QTensor::quantize(&(norm * 1.01).unwrap(), GgmlDType::F32).unwrap();
    gguf.tensors.insert("blk.3.attn_norm.weight".into(), changed);
    let difference = load(&tiny(), None).weights.sketch.difference(&of_gguf(&gguf)).unwrap();
    assert_eq!(difference.tensor, "model.layers.3.input_layernorm.weight");
}
