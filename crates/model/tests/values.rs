//! Transforms of values: fused into the projections, done by the cache, and not done at all.

mod common;
mod passes;

use candle_core::quantized::GgmlDType;
use common::{Gguf, fixture, made_up};
use dibit_cache::{Batch, CacheLayout, CacheShape, CalibratedScheme, Calibration, LayerCalibration, Mode};
use dibit_cpu::Cpu;
use dibit_device::{Arithmetic, DType, KvCache, Tensor};
use dibit_model::{Model, ModelError, ModelFiles, Pretrained, WeightSource, Workspace};
use dibit_runner::{Capacity, Runner};
use std::path::Path;
use std::sync::Arc;

/// As exact as codes of a page get: 8 bits, and 4 planes of 2 bits.
const PLANES: &str = "name = \"planes\"\n[keys]\nbits = 8\n[values]\nbits = \"planes\"\naverage_bits = 4\n\
    axis = \"channel\"\ntransform = \"basis\"\n[planes]\nmost = 4\n[window]\ntokens = 128\nschedule = \"guaranteed\"\n";

const HADAMARD: &str = "name = \"hadamard\"\n[keys]\nbits = 8\n[values]\nbits = 8\ntransform = \"hadamard\"\n[window]\n\
    tokens = 128\nschedule = \"guaranteed\"\n";

/// How far logits of quantised weights may be apart that are the same but for rounding.
const BLOCKS: f32 = 0.03;

fn load(path: &Path, dtype: Option<DType>) -> Pretrained {
    let files = if path.is_dir() { ModelFiles::open(path) } else { ModelFiles::open_gguf(path) };
    Pretrained::load(&files.unwrap(), WeightSource::Checkpoint, dtype).unwrap()
}

fn load_gguf(gguf: &Gguf, dtype: Option<DType>) -> Pretrained {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    gguf.write(&path);
    load(&path, dtype)
}

/// Bases of random numbers, of a seed, that are far from orthogonal and from singular.
fn in_planes(shape: CacheShape, seed: u64) -> CalibratedScheme {
    let (heads, d) = (shape.num_key_value_heads, shape.head_dim);
    let basis = |layer: u64| {
        let mut numbers = Tensor::random(seed + layer, 1.0, DType::F32, heads * d, d).to_f32();
        for (i, row) in numbers.chunks_exact_mut(d).enumerate() {
            row[i % d] += 2.0 * (d as f32).sqrt();
            row.iter_mut().enumerate().for_each(|(channel, x)| *x *= 0.5 + (channel % 4) as f32);
        }
        numbers
    };
    let layer = |layer: usize| LayerCalibration {
        value_basis: Some(basis(layer as u64)),
        value_planes: Some(vec![4; heads * d]),
        ..Default::default()
    };
    let mut scheme = CalibratedScheme::parse(PLANES, "planes").unwrap();
    scheme.calibration = Some(Arc::new(Calibration { layers: (0..shape.num_layers).map(layer).collect() }));
    scheme
}

fn schemes(shape: CacheShape) -> [CalibratedScheme; 2] {
    [CalibratedScheme::parse(HADAMARD, "hadamard").unwrap(), in_planes(shape, 5)]
}

fn ids(count: usize, vocab_size: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 31 + i * 7) % vocab_size) as u32).collect()
}

/// The model of a layout, run token by token over what is stored.
fn decoded(model: &Arc<Model<Cpu>>, layout: &CacheLayout, ids: &[u32]) -> Vec<Vec<f32>> {
    passes::logits(model, layout, Mode::Streaming, ids, &[ids.len()])
}

/// Largest difference, as a share of the largest number.
fn apart(expected: &[Vec<f32>], found: &[Vec<f32>]) -> f32 {
    let pairs = expected.iter().flatten().zip(found.iter().flatten());
    let largest = expected.iter().flatten().fold(0f32, |most, x| most.max(x.abs()));
    pairs.fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest
}

#[test]
fn fused_is_online_is_plain() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    // Biases, several query heads on a KV head, one KV head, heads of 64 to 256.
    for name in ["qwen2-bias-bf16", "llama32-old-bf16", "llama2-linear-f16", "qwen3-hd256-bf16"] {
        for (dtype, rounding) in [(DType::F32, 1e-4), (DType::F16, 4e-3), (DType::Bf16, 3e-2)] {
            let pretrained = load(&fixture(name), Some(dtype));
            let Pretrained { config, weights, .. } = &pretrained;
            let plain = Arc::new(Model::new(&cpu, config, weights).unwrap());
            let half = config.cache_layout(&CalibratedScheme::load("fp16").unwrap()).unwrap();
            let ids = ids(300, config.vocab_size);
            let prompt = |model: &Arc<Model<Cpu>>, layout: &CacheLayout| {
                passes::logits(model, layout, Mode::Chunk, &ids, &[ids.len()])
            };
            let expected = prompt(&plain, &half);
            for scheme in schemes(config.cache_shape()) {
                let online = config.cache_layout(&scheme).unwrap();
                let fused = pretrained.cache_layout(&scheme).unwrap();
                assert!(fused.fused_values().iter().all(Option::is_some));
                let model = Arc::new(Model::for_cache(&cpu, config, weights, &fused).unwrap());
                let what = format!("{name} in {dtype:?}, {}", scheme.name);
                // A prompt is seen exactly.
                let differences =
                    [apart(&expected, &prompt(&plain, &online)), apart(&expected, &prompt(&model, &fused))];
                println!("{what}: a prompt online, and fused: {differences:?}");
                assert!(differences[0] < 1e-4 && differences[1] < rounding, "{what}: {differences:?}");
                // What is stored has 8 bits, and a code more or less here and there.
                let [online, fused] = [(&plain, &online), (&model, &fused)].map(|(m, l)| decoded(m, l, &ids));
                let differences = [apart(&expected, &online), apart(&online, &fused)];
                println!("{what}: decoded online against a prompt, and fused: {differences:?}");
                assert!(differences[0] < 0.2 && differences[1] < 0.02 + rounding, "{what}: {differences:?}");
            }
        }
    }
}

#[test]
fn quantised_projections_stay_as_they_are() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::Q4K] {
        let file = made_up(dtype);
        let [blocks, numbers] = [None, Some(DType::F32)].map(|dtype| load_gguf(&file, dtype));
        let config = &blocks.config;
        let ids = ids(300, config.vocab_size);
        let plain = Arc::new(Model::new(&cpu, config, &blocks.weights).unwrap());
        let half = config.cache_layout(&CalibratedScheme::load("fp16").unwrap()).unwrap();
        let prompt = |model: &Arc<Model<Cpu>>, layout: &CacheLayout| {
            passes::logits(model, layout, Mode::Chunk, &ids, &[ids.len()])
        };
        let expected = prompt(&plain, &half);
        for scheme in schemes(config.cache_shape()) {
            let what = format!("{dtype:?}, {}", scheme.name);
            let layout = blocks.cache_layout(&scheme).unwrap();
            let values = layout.transformed_values(config.num_attention_heads);
            assert_eq!((values.fused, values.online), (0, 2), "{what}");
            assert!(values.multiply_adds > 0 && values.to_string().contains("in 2 layers"), "{what}: {values}");
            let (before, model) =
                (blocks.weights.formats(), Arc::new(Model::for_cache(&cpu, config, &blocks.weights, &layout).unwrap()));
            assert_eq!(blocks.weights.formats(), before, "{what}");
            let difference = apart(&expected, &prompt(&model, &layout));
            // Products of blocks round the other factor to 8 bits, where the last bit of a number may decide.
            assert!(difference < BLOCKS, "{what}: {difference}");
            // The same numbers in 32 bit are fused, and compute the same.
            let fused = numbers.cache_layout(&scheme).unwrap();
            assert_eq!(fused.transformed_values(4).fused, 2, "{what}");
            let fused_model = Arc::new(Model::for_cache(&cpu, config, &numbers.weights, &fused).unwrap());
            let differences = [
                apart(
                    &prompt(&Arc::new(Model::new(&cpu, config, &numbers.weights).unwrap()), &half),
                    &prompt(&fused_model, &fused),
                ),
                apart(&decoded(&model, &layout, &ids), &decoded(&fused_model, &fused, &ids)),
            ];
            println!("{what}: {difference}, {differences:?}");
            assert!(differences[0] < 1e-4 && differences[1] < 0.1, "{what}: {differences:?}");
            let forced = scheme.layout(&config.cache_model().fusing(|_| true)).unwrap();
            let refused = Model::for_cache(&cpu, config, &blocks.weights, &forced).err().unwrap();
            assert!(matches!(refused, ModelError::QuantisedValues { layer: 0 }), "{refused}");
        }
    }
}

#[test]
fn layers_may_differ() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let mut mixed = load_gguf(&made_up(GgmlDType::Q8_0), None);
    let numbers = load_gguf(&made_up(GgmlDType::Q8_0), Some(DType::F16));
    // Of layer 0 both are numbers now, of layer 1 the value projection alone.
    mixed.weights.layers[0].v = numbers.weights.layers[0].v.clone();
    mixed.weights.layers[0].o = numbers.weights.layers[0].o.clone();
    mixed.weights.layers[1].v = numbers.weights.layers[1].v.clone();
    let config = &mixed.config;
    let ids = ids(200, config.vocab_size);
    let half = config.cache_layout(&CalibratedScheme::load("fp16").unwrap()).unwrap();
    let plain = Arc::new(Model::new(&cpu, config, &mixed.weights).unwrap());
    let expected = passes::logits(&plain, &half, Mode::Chunk, &ids, &[200]);
    for scheme in schemes(config.cache_shape()) {
        let layout = mixed.cache_layout(&scheme).unwrap();
        assert_eq!(layout.fused_values().iter().map(Option::is_some).collect::<Vec<_>>(), [true, false]);
        let model = Arc::new(plain.variant(&mixed.weights, &layout).unwrap());
        let difference = apart(&expected, &passes::logits(&model, &layout, Mode::Chunk, &ids, &[200]));
        println!("{}: {difference}", scheme.name);
        assert!(difference < BLOCKS, "{}: {difference}", scheme.name);
    }
}

#[test]
fn variants_are_the_models_that_they_stand_for() {
    let cpu = Arc::new(Cpu::new(Some(2)).unwrap());
    let pretrained = load(&fixture("qwen2-bias-bf16"), None);
    let Pretrained { config, weights, .. } = &pretrained;
    let ids = ids(150, config.vocab_size);
    let mut layouts: Vec<CacheLayout> =
        vec![pretrained.cache_layout(&CalibratedScheme::load("kivi").unwrap()).unwrap()];
    let [hadamard, basis] = schemes(config.cache_shape());
    let other = in_planes(config.cache_shape(), 50);
    layouts.extend([hadamard, basis, other].map(|scheme| pretrained.cache_layout(&scheme).unwrap()));
    let own: Vec<Arc<Model<Cpu>>> =
        layouts.iter().map(|layout| Arc::new(Model::for_cache(&cpu, config, weights, layout).unwrap())).collect();
    for (from, model) in own.iter().enumerate() {
        for (to, layout) in layouts.iter().enumerate() {
            assert_eq!(model.suits(layout), from == to);
            let variant = Arc::new(model.variant(weights, layout).unwrap());
            assert!(variant.suits(layout));
            assert!(decoded(&variant, layout, &ids) == decoded(&own[to], layout, &ids), "{from} to {to}");
        }
    }
}

#[test]
fn a_cache_of_another_frame_is_refused() {
    let cpu = Arc::new(Cpu::new(Some(1)).unwrap());
    let pretrained = load(&fixture("qwen2-bias-bf16"), None);
    let Pretrained { config, weights, .. } = &pretrained;
    let [hadamard, basis] = schemes(config.cache_shape());
    let other = in_planes(config.cache_shape(), 50);
    let online = config.cache_layout(&hadamard).unwrap();
    let fused = [hadamard, basis, other].map(|scheme| pretrained.cache_layout(&scheme).unwrap());
    let plain = Arc::new(Model::new(&cpu, config, weights).unwrap());
    let rotated = Arc::new(Model::for_cache(&cpu, config, weights, &fused[0]).unwrap());
    let based = Arc::new(Model::for_cache(&cpu, config, weights, &fused[1]).unwrap());
    for (model, layout) in [
        (&plain, &fused[0]),
        (&plain, &fused[1]),
        (&rotated, &online),
        (&rotated, &fused[1]),
        (&based, &fused[0]),
        (&based, &fused[2]),
    ] {
        let capacity = Capacity::of_one(layout, 4, 4);
        let refused = Runner::new(model.clone(), layout.clone(), capacity).err().unwrap();
        assert!(matches!(refused, ModelError::OtherValues { .. }), "{refused}");
        assert!(refused.to_string().contains(layout.scheme_name()), "{refused}");
    }
}

#[test]
fn a_cache_serves_one_model_and_one_workspace() {
    let pretrained = load(&fixture("mistral-f32"), None);
    let device = Arc::new(Cpu::new(Some(1)).unwrap());
    let model = || Model::new(&device, &pretrained.config, &pretrained.weights).unwrap();
    let layout = pretrained.config.cache_layout(&CalibratedScheme::load("fp16").unwrap()).unwrap();
    let (first, second) = (model(), model());
    let workspace = || Workspace::new(&*device, &pretrained.config, 4, 1).unwrap();
    let (mut own, mut other) = (workspace(), workspace());
    let cache = |arithmetic| KvCache::new(&*device, layout.clone(), 2, 1, 4, arithmetic).unwrap();
    let mut used = cache(Arithmetic::Exact);
    let mut sequence = used.open().unwrap();
    let mut batch = Batch::new(Mode::Chunk);
    used.reserve(&mut sequence, 4).unwrap();
    batch.push(used.manager(), &sequence, 4);
    let ids = [1, 2, 3, 4];
    first.forward(&mut own, &mut used, &batch, &ids).unwrap();
    first.forward(&mut own, &mut used, &batch, &ids).unwrap();
    for (model, workspace) in [(&second, &mut own), (&first, &mut other)] {
        assert!(matches!(model.forward(workspace, &mut used, &batch, &ids), Err(ModelError::OtherModel)));
    }
    let fast = &mut cache(Arithmetic::Fast);
    assert!(matches!(first.forward(&mut own, fast, &batch, &ids), Err(ModelError::OtherArithmetic)));
}
