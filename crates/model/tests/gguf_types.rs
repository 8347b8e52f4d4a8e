//! Every type of tensor that GGUF files are read with, against the dequantiser of the `gguf` package.

mod common;

use candle_core::quantized::{GgmlDType, QTensor};
use common::{Gguf, made_up};
use dibit_device::{DType, Tensor};
use dibit_model::{Checkpoint, ModelError, ModelFiles, Pretrained, WeightFile, WeightSource, Weights};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The shape of every tensor in the fixture.
const SHAPE: [usize; 2] = [3, 512];

fn types() -> Checkpoint {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/types.gguf");
    let bytes = Arc::new(std::fs::read(path).unwrap());
    Checkpoint::open(&[WeightFile { name: "types.gguf".into(), bytes }]).unwrap()
}

#[test]
fn every_type_stands_for_the_numbers_of_its_definition() {
    let checkpoint = types();
    let tensor = |name: String| checkpoint.tensor(&name, SHAPE[0], SHAPE[1]).unwrap().unwrap();
    for name in [
        "F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_K",
        "IQ4_NL", "IQ4_XS", "MXFP4",
    ] {
        let (found, expected) = (tensor(format!("raw.{name}")), tensor(format!("numbers.{name}")));
        // What is widened to f16 is the nearest number that f16 has. All else is exact, to the last bit.
        let expected = if name.starts_with("IQ") { expected.cast(DType::F16) } else { expected };
        let format = match name {
            "IQ4_NL" | "IQ4_XS" | "F16" => "f16",
            "MXFP4" | "BF16" => "bf16",
            "F32" => "f32",
            other => other,
        };
        assert_eq!(found.format(), format);
        assert_eq!(found.to_f32(), expected.to_f32(), "{name}");
        assert!(expected.to_f32().iter().any(|number| *number != 0.0), "{name}");
    }
    let formats = checkpoint.formats();
    assert!(formats.contains("Q3_K") && formats.contains("MXFP4"), "{formats}");
}

#[test]
fn packed_blocks_load_as_matrices_of_16_bits() {
    // Blocks of Q4_0 are as long as those of IQ4_NL, and only their levels differ.
    let bytes = made_up(GgmlDType::Q4_0).bytes();
    let mut changed = bytes.clone();
    for tensor in [&b"attn_q.weight"[..], b"attn_output.weight", b"ffn_down.weight", b"token_embd.weight"] {
        let places: Vec<_> = (0..bytes.len() - tensor.len()).filter(|at| bytes[*at..].starts_with(tensor)).collect();
        assert!(!places.is_empty());
        for at in places {
            let kind = at + tensor.len() + 4 + 16;
            assert_eq!(changed[kind], 2);
            changed[kind] = 20;
        }
    }
    let load = |bytes: &[u8], dtype| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, bytes).unwrap();
        let files = ModelFiles::open_gguf(&path).unwrap();
        Pretrained::load(&files, WeightSource::Checkpoint, dtype).unwrap().weights
    };
    let (plain, packed) = (load(&bytes, None), load(&changed, None));
    assert!(packed.formats().starts_with("f16 ") && packed.formats().contains("Q4_0"), "{}", packed.formats());
    const LEVELS: [f32; 16] =
        [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];
    fn down(weights: &Weights) -> &Tensor {
        &weights.layers[0].mlp.gated().unwrap().down.weight
    }
    let pairs: [(&Tensor, &Tensor); 3] = [
        (&plain.embed, &packed.embed),
        (&plain.layers[1].q.weight, &packed.layers[1].q.weight),
        (down(&plain), down(&packed)),
    ];
    for (plain, packed) in pairs {
        assert_eq!(packed.format(), "f16");
        for (plain, packed) in plain.to_f32().chunks_exact(32).zip(packed.to_f32().chunks_exact(32)) {
            // The largest number of a block of Q4_0 has the code 0, which is -8 scales.
            let largest = plain.iter().fold(0f32, |a, b| if b.abs() > a.abs() { *b } else { a });
            let scale = largest / -8.0;
            for (plain, packed) in plain.iter().zip(packed) {
                let level = LEVELS[((plain / scale).round() + 8.0) as usize];
                let expected = level * scale;
                assert!((packed - expected).abs() <= expected.abs() / 2048.0 + 1e-7, "{packed}, {expected}");
            }
        }
    }
    assert_eq!(load(&changed, Some(DType::F32)).formats(), "f32");
}

#[test]
fn packed_blocks_that_are_cut_short_are_an_error() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden/types.gguf");
    let bytes = std::fs::read(path).unwrap();
    let name = b"raw.MXFP4";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap() + name.len() + 4;
    for (rows, cols, words) in [(1u64 << 40, 512u64, "MXFP4"), (3, 500, "3 x 500"), (u64::MAX, u64::MAX, "MXFP4")] {
        let mut changed = bytes.clone();
        changed[at..at + 8].copy_from_slice(&cols.to_le_bytes());
        changed[at + 8..at + 16].copy_from_slice(&rows.to_le_bytes());
        let file = WeightFile { name: "types.gguf".into(), bytes: Arc::new(changed) };
        let message = Checkpoint::open(&[file]).err().unwrap().to_string();
        assert!(message.contains("'raw.MXFP4'") && message.contains(words), "{message}");
    }
}

/// Experts, rows and columns.
const EXPERTS: [usize; 3] = [4, 8, 64];

/// A file with the matrices of experts alone.
fn experts(dtype: GgmlDType) -> Vec<u8> {
    let [experts, rows, cols] = EXPERTS;
    let numbers = Tensor::random(1, 1.0, DType::F32, experts * rows, cols).to_f32();
    let tensor = candle_core::Tensor::from_vec(numbers, EXPERTS.to_vec(), &candle_core::Device::Cpu).unwrap();
    let tensors = BTreeMap::from([("blk.0.ffn_up_exps.weight".into(), QTensor::quantize(&tensor, dtype).unwrap())]);
    Gguf { tensors, ..made_up(GgmlDType::Q8_0) }.bytes()
}

/// The same, with other levels for the codes of Q4_0.
fn packed_experts() -> Vec<u8> {
    let mut bytes = experts(GgmlDType::Q4_0);
    let name = b"ffn_up_exps.weight";
    let at = bytes.windows(name.len()).position(|window| window == name).unwrap();
    // The type stands behind three dimensions.
    let kind = at + name.len() + 4 + 24;
    assert_eq!(bytes[kind], 2);
    bytes[kind] = 20;
    bytes
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint, ModelError> {
    Checkpoint::open(&[WeightFile { name: "experts".into(), bytes: Arc::new(bytes) }])
}

#[test]
fn experts_that_are_cut_short_are_an_error() {
    for bytes in [packed_experts(), experts(GgmlDType::Q8_0), experts(GgmlDType::F16)] {
        assert!(open(bytes.clone()).is_ok());
        // What is left holds all but one of the experts.
        let message = open(bytes[..bytes.len() - 300].to_vec()).err().unwrap().to_string();
        let words = ["'blk.0.ffn_up_exps.weight'", "32 x 64", "cut short"];
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }
}

#[test]
fn experts_count_as_they_are_widened() {
    let numbers: usize = EXPERTS.iter().product();
    let checkpoint = open(packed_experts()).unwrap();
    assert_eq!(
        (checkpoint.widening_bytes(), checkpoint.formats().as_str()),
        (2 * numbers - numbers / 32 * 18, "IQ4_NL")
    );
    assert_eq!(open(experts(GgmlDType::Q4_0)).unwrap().widening_bytes(), 0);
    // MXFP4 whose powers of two lie apart, beside a matrix of numbers.
    let [codes, exponents] = [vec![0u8; numbers / 2], vec![127u8; numbers / 32]];
    let matrix = vec![0u8; 2 * numbers];
    let [experts, rows, cols] = EXPERTS;
    let views = [
        ("model.layers.0.mlp.experts.down_proj_blocks", Dtype::U8, vec![experts, rows, cols / 32, 16], &codes),
        ("model.layers.0.mlp.experts.down_proj_scales", Dtype::U8, vec![experts, rows, cols / 32], &exponents),
        ("model.embed_tokens.weight", Dtype::BF16, vec![experts * rows, cols], &matrix),
    ];
    let views = views.map(|(name, dtype, shape, data)| (name, TensorView::new(dtype, shape, data).unwrap()));
    let checkpoint = open(safetensors::serialize(views, None).unwrap()).unwrap();
    assert_eq!(checkpoint.widening_bytes(), 2 * numbers - numbers / 32 * 17);
    assert_eq!(checkpoint.formats(), "bf16 79 %, MXFP4 21 %");
}
